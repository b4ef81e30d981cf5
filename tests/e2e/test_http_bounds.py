"""What a connection can hold before a key is checked, and requests that contradict HTTP."""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
from support.hostile import parse_replies
from support.serving import PATIENCE, ServerProcess, posted, wait_for

from pyllm.model.tokenizer import Tokenizer
from pyllm.server.flags import DEMO_FOLDER

KIB, MIB = 2**10, 2**20
GET = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n"
CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
)
MOST_PER_CONNECTION = 64 * KIB
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


def memory(server: ServerProcess) -> int:
    """The bytes that the API process holds now."""
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) * KIB  # type: ignore[index]


def connect(server: ServerProcess, receive_bytes: int | None = None) -> socket.socket:
    connection, url = socket.socket(), httpx.URL(server.url)
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(PATIENCE)
    connection.connect((url.host, url.port))
    return connection


def read(connection: socket.socket) -> bytes:
    """What comes next; b"" at the end, however the server ends it."""
    with contextlib.suppress(ConnectionResetError):
        return connection.recv(MIB)
    return b""


def ask(server: ServerProcess, data: bytes) -> list[tuple[int, str]]:
    """The status and the error code of each answer to `data`."""
    with connect(server) as connection:
        connection.sendall(data)
        received = b""
        while piece := connection.recv(MIB):
            received += piece
    replies = parse_replies(received, ended=True)
    return [(reply.status, json.loads(reply.body).get("error", {}).get("code", "")) for reply in replies]


def send(connection: socket.socket, data: bytes) -> int:
    """Send as much as the server takes; return how much that is."""
    sent = 0
    with contextlib.suppress(ConnectionError, TimeoutError):
        while sent < len(data):
            sent += connection.send(data[sent : sent + MIB])
    return sent


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a key, which no client here has."""
    log, flags = tmp_path_factory.mktemp("keyed") / "log", ("--max-api-memory", "24MiB", "--header-timeout", "300")
    with ServerProcess(log, *flags, cold=True, PYLLM_API_KEY="secret") as server:
        yield server


@pytest.mark.parametrize(
    ("data", "status"),
    {
        "two hosts": (GET + b"host: x\r\n\r\n", 400),
        "no host": (b"GET /v1/models HTTP/1.1\r\n\r\n", 400),
        "no host in HTTP/1.0": (b"GET /v1/models HTTP/1.0\r\n\r\n", 200),
        "two hosts in HTTP/1.0": (b"GET /v1/models HTTP/1.0\r\nhost: x\r\nhost: x\r\n\r\n", 400),
        "no name in the host": (b"GET /v1/models HTTP/1.1\r\nhost: a b\r\n\r\n", 400),
        "a path in the host": (b"GET /v1/models HTTP/1.1\r\nhost: a/b\r\n\r\n", 400),
        "RTSP": (b"OPTIONS /v1/models RTSP/1.0\r\nhost: x\r\n\r\n", 400),
        "RTSP with a usual method": (b"GET /v1/models RTSP/1.1\r\nhost: x\r\n\r\n", 400),
        "ICE": (b"SOURCE /v1/models ICE/1.0\r\nhost: x\r\n\r\n", 400),
        "HTTP/2": (b"GET /v1/models HTTP/2.0\r\nhost: x\r\n\r\n", 400),
        "HTTP/0.9": (b"GET /v1/models HTTP/0.9\r\nhost: x\r\n\r\n", 400),
        "two codings": (CHUNKED.replace(b"chunked", b"gzip, chunked") + b"0\r\n\r\n", 400),
        "chunks in HTTP/1.0": (CHUNKED.replace(b"1.1", b"1.0") + b"0\r\n\r\n", 400),
        "length and chunks": (CHUNKED.replace(b"host", b"content-length: 5\r\nhost") + b"0\r\n\r\n", 400),
        "two lengths": (GET + b"content-length: 0\r\ncontent-length: 1\r\n\r\n", 400),
        "a folded header": (GET + b"a: b\r\n c\r\n\r\n", 400),
        "NUL in a header": (GET + b"a: b\0\r\n\r\n", 400),
        "a bare CR": (GET + b"a: b\rc: d\r\n\r\n", 400),
        "bare LFs": (GET.replace(b"\r", b"") + b"\n", 400),
        "no header name": (GET + b": b\r\n\r\n", 400),
        "no method": (GET.replace(b"GET", b"G\xc9T"), 400),
        "an absolute target": (GET.replace(b" /", b" http://other/") + b"connection: close\r\n\r\n", 200),
        "a long target": (GET.replace(b" HTTP", b"?" + b"a" * 9000 + b" HTTP") + b"\r\n", 414),
        "a long method": (b"A" * 9000 + b" / HTTP/1.1\r\nhost: x\r\n\r\n", 414),
        "100 headers": (GET + b"a: b\r\n" * 98 + b"connection: close\r\n\r\n", 200),
        "101 headers": (GET + b"a: b\r\n" * 100 + b"\r\n", 431),
        "large headers": (GET + b"a: %s\r\n" % (b"b" * 40_000) + b"\r\n", 431),
        "101 trailers": (CHUNKED + b"0\r\n" + b"x: y\r\n" * 101 + b"\r\n", 431),
        "large trailers": (CHUNKED + b"0\r\nx: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        "a large chunk extension": (CHUNKED + b"2;" + b"x" * 100_000 + b"\r\n{}\r\n0\r\n\r\n", 431),
    }.values(),
)  # fmt: skip
def test_contradictions_and_excess_are_refused(server: ServerProcess, data: bytes, status: int) -> None:
    codes = {200: "", 400: "invalid_http", 414: "uri_too_long", 431: "headers_too_large"}
    assert ask(server, data) == [(status, codes[status])]


@needs_proc
def test_trailers_and_extensions_take_no_memory(server: ServerProcess) -> None:
    before = memory(server)
    for endless in (b"0\r\n" + b"x:\r\n" * (4 * MIB), b"0\r\nx: " + b"y" * (16 * MIB), b"1;" + b"y" * (16 * MIB)):
        with connect(server) as connection:
            send(connection, CHUNKED + endless)
            assert memory(server) - before < 8 * MIB


@needs_proc
@pytest.mark.parametrize(
    "data",
    [
        GET + b"x:\r\n" * (15 * KIB),
        GET + b"".join(b"x%d: %s\r\n" % (n, b"a" * 300) for n in range(97)),
        GET + b"x: " + b"a" * 30_000,
        GET.replace(b" HTTP", b"?" + b"a" * 8000 + b" HTTP") + b"x: " + b"a" * 20_000,
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 4000000\r\n\r\n" + b" " * 300_000,
    ],
    ids=["tiny headers", "many headers", "a large header", "a long target", "a body"],
)
def test_half_open_connection_holds_little_memory(keyed: ServerProcess, data: bytes) -> None:
    count = 200
    before = memory(keyed)
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(connect(keyed))
            connection.settimeout(0.05)
            send(connection, data)
        httpx.get(f"{keyed.url}/health")
        assert memory(keyed) - before < count * MOST_PER_CONNECTION


def held(server: ServerProcess, kind: str = r"\w+") -> float:
    """The bytes that the server counts for its clients."""
    text = httpx.get(f"{server.url}/metrics").text
    return sum(map(float, re.findall(rf'api_memory_bytes{{[^}}]*kind="{kind}"[^}}]*}} (\S+)', text)))


def test_newest_half_open_connections_give_way(keyed: ServerProcess) -> None:
    """Together they would hold 32 MB of 24; those that came first stay, and a client with a key is answered."""
    wait_for(lambda: held(keyed) < MIB, "the memory of earlier connections to be released")
    data = GET + b"x: " + b"a" * 30_000
    refused = keyed.metrics().api_memory_refusals_total
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(keyed)) for _ in range(600)]
        for connection in connections:
            connection.sendall(data)
        body = {"prompt": "x" * 10_000, "max_tokens": 1, "truncate_prompt_tokens": 5}
        answer = httpx.post(f"{keyed.url}/v1/completions", json=body, headers={"x-api-key": "secret"}, timeout=PATIENCE)
        assert answer.status_code == 200
        wait_for(lambda: keyed.metrics().api_memory_refusals_total > refused + 100, "connections to be closed")
        assert held(keyed) <= 24 * MIB
        answered = select.select(connections, [], [], 0)[0]
        assert set(answered).isdisjoint(connections[:300])
        assert b" 503 " in answered[0].recv(1000)


def test_slowest_reader_gives_way(keyed: ServerProcess) -> None:
    """Two answers take 17 MB of 24 until they are read, and a third request needs 11: one is cut, one is whole."""
    wait_for(lambda: held(keyed) < MIB, "the memory of earlier connections to be released")
    tokenizer, count = Tokenizer.from_folder(DEMO_FOLDER), 140_000
    longest = max(range(tokenizer.vocab_size), key=lambda id_: len(tokenizer.token_bytes(id_)))
    body = json.dumps({"tokens": [longest] * count}).encode()
    head = b"POST /detokenize HTTP/1.1\r\nhost: x\r\nx-api-key: secret\r\nconnection: close\r\n"
    head += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    with connect(keyed, receive_bytes=4096) as slowest, connect(keyed, receive_bytes=128 * KIB) as slow:
        slowest.sendall(head + body)
        wait_for(lambda: held(keyed, "answers"), "an answer that is not read")
        time.sleep(1.2)  # until the server knows how fast this client reads
        slow.sendall(head + body)
        taken = 0

        def third_is_answered() -> bool:
            nonlocal taken
            until = taken + 300 * KIB  # more than both systems keep, so this client is faster from the first look
            while taken < until and (piece := slow.recv(until - taken)):
                taken += len(piece)
            answer = httpx.post(
                f"{keyed.url}/detokenize", content=body, timeout=PATIENCE,
                headers={"x-api-key": "secret", "content-type": "application/json"},
            )  # fmt: skip
            assert answer.status_code == 200 or answer.json()["error"]["code"] == "memory_full"
            return answer.status_code == 200

        wait_for(third_is_answered, "the slowest reader to give way")
        whole, cut = (b"".join(iter(partial(read, reader), b"")) for reader in (slow, slowest))
    assert whole.endswith(b"0\r\n\r\n")
    assert taken + len(whole) > count * len(tokenizer.token_bytes(longest)) > len(cut)
    assert not cut.endswith(b"0\r\n\r\n")
    wait_for(lambda: "its client was the slowest reader" in keyed.log, "the line in the log")


def test_requests_behind_a_running_one_wait_unparsed(server: ServerProcess) -> None:
    before = memory(server)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            connection = stack.enter_context(posted(server, stream=True))
            connection.settimeout(0.5)
            assert send(connection, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * (MIB // 4)) < 9 * MIB
        assert memory(server) - before < 20 * MIB
    server.wait_until_idle()


def test_body_is_not_read_for_long_after_its_answer(server: ServerProcess) -> None:
    with connect(server) as connection:
        connection.sendall(CHUNKED.replace(b"transfer-encoding: chunked", b"content-length: 25000000000"))
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
        blanks, sent, since = b" " * MIB, 0, time.monotonic()
        while len(blanks) == (more := send(connection, blanks)):
            sent += more
            assert sent < 200 * MIB
            assert time.monotonic() < since + PATIENCE


def test_answer_to_a_refused_upload_can_be_read(server: ServerProcess) -> None:
    """Closing at once would make the client's system drop the answer, so the server reads on for a moment."""
    for _ in range(20):
        with connect(server) as connection:
            sent = send(
                connection,
                GET.replace(b"host", b"host: x\r\nhost") + b"content-length: 3000000\r\n\r\n" + b" " * 3_000_000,
            )
            assert sent > 3_000_000
            assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")
