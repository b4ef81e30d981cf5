"""Hostile HTTP: headers, paths, and bytes that are hardly HTTP at all."""

from __future__ import annotations

import json
from collections.abc import Iterator

from support.bodies import POSTS
from support.hostile import Case, post

COMPLETIONS = "/v1/completions"
BODY = json.dumps(POSTS[COMPLETIONS]).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
LENGTH = b"content-length: %d\r\n" % len(BODY)
GOOD = HEAD + LENGTH + b"\r\n" + BODY
KEPT = GOOD.replace(b"connection: close\r\n", b"")
UPGRADE = (
    b"GET /v1/completions HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-key: x\r\nsec-websocket-version: 13\r\n\r\n"
)
SMUGGLED = HEAD + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n5c\r\nGET /admin HTTP/1.1\r\n\r\n0\r\n\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


def headers() -> Iterator[Case]:
    """Content types, encodings, ids and whatever else a client may say of a body."""
    kinds = ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
    "application/xml", "*/*", "json",
             "application/json; charset=utf-16", "application/json; charset=" + "x" * 5000, "application/jsonp",
             "APPLICATION/JSON",
             "application/json, text/plain", "application/vnd.api+json", "application/\xff", ";;;",
             "application/json\t;"]  # fmt: skip
    lines = [
        "content-encoding: gzip", "content-encoding: br, deflate", "content-encoding: identity",
        "content-encoding: " + "x" * 9000,
        "x-request-id: " + "x" * 5000, "x-request-id: \xff\xfe", "x-request-id: a\tb",
        "x-request-id: {{7*7}}${jndi:ldap://x}", "x-request-id:",
        "expect: 100-continue", "expect: 200-ok", "upgrade: websocket\r\nconnection: upgrade",
        "upgrade: h2c\r\nhttp2-settings: AAMAAABk",
        "authorization: Bearer " + "x" * 9000, "authorization: \xff", "authorization: Basic \x80",
        "x-api-key: \xff\xff", "host: evil.example",
        "origin: http://evil.example", "accept: text/html", "accept-encoding: gzip", "range: bytes=0-1",
        "if-none-match: *", "te: trailers",
        "x-forwarded-for: " + "1.1.1.1, " * 900, "x-forwarded-prefix: /x", "x-http-method-override: DELETE",
        "cookie: " + "a=b; " * 9000,
        "traceparent: 00-zz-zz-00", "traceparent: " + "0" * 9000, "baggage: " + "a=b," * 5000, "anthropic-version: x",
        "openai-organization: \xe9",
        *(f"x-{n}: {'a' * 10_000}" for n in range(2)), "\r\n".join(f"x-{n}: 1" for n in range(2000)), "x-empty:",
        "x y: 1", ": 1", "x-nul: a\0b",
    ]  # fmt: skip
    for path, valid in POSTS.items():
        body = json.dumps(valid).encode()
        for kind in kinds:
            yield post(path, body, kind=kind, name=f"{path} content-type: {kind[:40]}")
        for line in lines:
            case = post(path, body, line, name=f"{path} {line[:40]!r}")
            is_http = line not in ("x y: 1", ": 1", "x-nul: a\0b")  # what is none belongs to no route
            yield case if is_http else Case(case.name, case.data)


def odd_bytes() -> Iterator[Case]:
    """What no HTTP library would send."""
    for name, data in {
        "nothing": b"", "a line": b"\r\n", "many lines": b"\r\n" * 1000 + GOOD, "NUL": b"\0" * 1000,
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500,
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/0.9": b"GET /\r\n",
        "HTTP/1.0": b"GET /health HTTP/1.0\r\n\r\n", "HTTP/1.2": GOOD.replace(b"1.1", b"1.2", 1),
        "HTTP/9.9": GOOD.replace(b"1.1", b"9.9", 1), "HTTP/1.11": GOOD.replace(b"1.1", b"1.11", 1),
        "no version": GOOD.replace(b" HTTP/1.1", b"", 1),
        "lower-case method": GOOD.replace(b"POST", b"post", 1), "unknown method": GOOD.replace(b"POST", b"BREW", 1),
        "long method": b"A" * 90_000 + b" / HTTP/1.1\r\n\r\n",
        "CONNECT": b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n", "TRACE": GOOD.replace(b"POST", b"TRACE", 1),
        "no host": GOOD.replace(b"host: x\r\n", b"", 1),
        "two hosts": GOOD.replace(b"host: x", b"host: x\r\nhost: y", 1), "odd host": GOOD.replace(b"host: x",
        b"host: a b@[::1]:99999/\xff", 1),
        "absolute form": GOOD.replace(b"POST /", b"POST http://evil.example/", 1),
        "asterisk": b"OPTIONS * HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        "authority form": b"GET x:80 HTTP/1.1\r\nhost: x\r\n\r\n", "two spaces": GOOD.replace(b"POST /", b"POST  /", 1),
        "tabs": GOOD.replace(b"POST ", b"POST\t", 1),
        "bare newlines": GOOD.replace(b"\r\n", b"\n"), "bare returns": GOOD.replace(b"\r\n", b"\r"),
        "folded header": GOOD.replace(b"host: x", b"host: x\r\nx-a: 1\r\n  2", 1),
        "blank before colon": GOOD.replace(b"host:", b"host :", 1), "no colon": GOOD.replace(b"host: x",
        b"host: x\r\nnonsense", 1),
        "huge header": HEAD + b"x-a: " + b"a" * 300_000 + b"\r\n\r\n",
        "many headers": HEAD + b"a: b\r\n" * 40_000 + b"\r\n",
        "huge path": b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\n\r\n",
        "path of 60 KB": b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        "two lengths": HEAD + LENGTH + b"content-length: 3\r\n\r\n" + BODY,
        "same length twice": HEAD + LENGTH + LENGTH + b"\r\n" + BODY,
        "length and chunks": HEAD + LENGTH + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "length of 5000 digits": HEAD + b"content-length: " + b"9" * 5000 + b"\r\n\r\n",
        "negative length": HEAD + b"content-length: -1\r\n\r\n",
        "length with plus": HEAD + b"content-length: +%d\r\n\r\n" % len(BODY) + BODY,
        "length in hex": HEAD + b"content-length: 0x10\r\n\r\n",
        "length list": HEAD + b"content-length: 5, 5\r\n\r\nabcde", "empty length": HEAD + b"content-length:\r\n\r\n",
        "length of 2^64": HEAD + b"content-length: 18446744073709551617\r\n\r\n",
        "length beyond the cap": HEAD + b"content-length: 99999999999\r\n\r\n",
        "no length": HEAD + b"\r\n" + BODY, "bad chunk size": CHUNKED + b"zz\r\nabc\r\n0\r\n\r\n",
        "negative chunk": CHUNKED + b"-5\r\nabc\r\n0\r\n\r\n",
        "huge chunk size": CHUNKED + b"f" * 40 + b"\r\nabc", "chunk too short": CHUNKED + b"3\r\nabcdef\r\n0\r\n\r\n",
        "chunk extension": CHUNKED + b"%x;a=%s\r\n" % (len(BODY), b"b" * 30_000) + BODY + b"\r\n0\r\n\r\n",
        "chunks of a byte": CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n",
        "trailers": CHUNKED + b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\nx-a: 1\r\ncontent-length: 5\r\n\r\n",
        "chunks of 10 MB": CHUNKED + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 160 + b"0\r\n\r\n",
        "unknown coding": HEAD + b"transfer-encoding: gzip\r\n\r\n" + BODY,
        "chunked twice": HEAD + b"transfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        "Chunked, spelled oddly": HEAD + b"transfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        "chunked in 1.0": CHUNKED.replace(b"1.1", b"1.0", 1) + b"0\r\n\r\n", "garbage behind": GOOD + b"\xff" * 5000,
        "a second one behind": GOOD + GOOD,
        "upgrade to websocket": UPGRADE,
        "smuggled": SMUGGLED,
    }.items():  # fmt: skip
        # Where nothing was asked, or the end cannot be known, there may be no answer; then we do not wait for one.
        yield Case(f"bytes: {name}", data, COMPLETIONS, replies=0 if name in ("nothing", "a line", "HTTP/0.9") else 1,
                   optional=name in SILENT)  # fmt: skip
    yield Case("bytes: 50 pipelined", KEPT * 49 + GOOD, COMPLETIONS, replies=50)
    yield Case(
        "bytes: a bad one pipelined",
        KEPT + KEPT.replace(b"tiny", b"none") + b"nonsense\r\n\r\n",
        COMPLETIONS,
        replies=3,
        optional=True,
    )
    yield Case("bytes: 300 refused, pipelined", b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n" * 300, replies=300)
    for at in range(1, len(GOOD), 7):
        yield Case(f"bytes: closed after {at}", GOOD[:at], COMPLETIONS, replies=0)
    for n in range(20):
        yield Case(
            f"bytes: closed after all, {n}",
            GOOD.replace(b'"max_tokens": 3', b'"max_tokens": 90'),
            COMPLETIONS,
            replies=0,
        )


SILENT = frozenset({"bare returns"})
"""Of the names above: where the connection may be closed without an answer."""


def paths() -> Iterator[Case]:
    """Tricks with paths and methods, on the routes that show something."""
    tricks = [
        "//", "///v1//models", "/v1/../v1/models", "/v1/./models", "/v1/models/", "/v1/models/..",
        "/v1/models/../../etc/passwd",
        "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/v1/models/%00", "/v1/models/%ff", "/v1/models/%",
        "/v1/models/%zz", "/v1/models/a%0d%0ab",
        "/v1/models/" + "a" * 8000, "/v1/models/" + "%61" * 2000, "/v1/models/💥", "/v1/models/{{7*7}}",
        "/v1/models?x=" + "y" * 8000, "/v1/models;x=1",
        "/v1/models#x", "/V1/MODELS", "/v1%2fmodels", "/%76%31/models", "/health/", "/health/../v1/models", "/health?",
        "/health%00", "/healthz", "/ready%20",
        "/metrics/../../x", "/docs/../v1", "/docs/%2e%2e/app.py", "/docs/swagger-ui.css/..",
        "/docs/swagger-ui-bundle.js%00", "/docs//etc/passwd", "/openapi.json/x",
        "/.env", "/.git/config", "/static/../app.py", "/../../../../etc/passwd", "/..%5c..%5cwindows", "/v1/responses/",
        "/v1/responses/x", "/v1/responses/%00",
        "/v1/responses/" + "r" * 9000, "/v1/responses/resp_x?stream=true",
        "/v1/responses/resp_x/input_items?limit=" + "9" * 5000, "/v1/responses/x/input_items?limit=-1",
        "/v1/responses/x/input_items?after=%ff&order=x", "/v1/responses/x/cancel", "/v1/responses/x/../y",
        "/v1/messages/", "/v1/messages/x", "/v1/messages/batches",
        "/v1/messages/count_tokens/", "/v1/chat/completions?api_key=x", "/v1/chat/completions/x", "/v1/embeddings/..",
        "/tokenize/", "/detokenize?tokens=1", "/version/..;/",
    ]  # fmt: skip
    for path in tricks:
        for method in ("GET", "POST", "DELETE", "PUT", "OPTIONS"):
            body = "{}" if method in ("POST", "PUT") else ""
            head = (
                f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n{body}"
            )
            yield Case(f"{method} {path[:60]}", head.encode(), path.partition("?")[0])
