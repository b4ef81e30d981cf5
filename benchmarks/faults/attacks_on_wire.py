"""Attacks on what is read and written: before a key is checked, and with large questions and answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path

from pyllm.benchmarks.faults.attack_client import (
    PIECE,
    Seen,
    To,
    ask,
    attack,
    connected,
    crowd,
    head,
    hold,
    megabytes,
    pieces_of,
)

VOCABULARY = Path(__file__).parents[2] / "model" / "demo" / "tokenizer.json"
DEMO_CONTEXT = 1024


# ---- Before a key is checked ----


@attack("60 MB of `x:` trailers after a chunked body, no key", seconds=30)
async def trailers(to: To) -> Seen:
    async def play(_: int) -> str:
        async with connected(to) as connection:
            start = head(to, "/v1/completions", None, key="") + b"2\r\n{}\r\n0\r\n"
            sent = await connection.send((start, *(b"x:\r\n" * (PIECE // 4) for _ in range(60 * 2**20 // PIECE))))
            return f"{await hold(to, connection)} after {sent / 1e6:.0f} MB"

    return await crowd(to, 1, play, rounds=1)


@attack("400 connections with 62 KB of `x:` header lines each, no key", seconds=20)
async def tiny_headers(to: To) -> Seen:
    async def play(_: int) -> str:
        async with connected(to) as connection:
            start = head(to, "/v1/completions", 2, key="")[:-2]
            await connection.send((start + b"x:\r\n" * (62 * 2**10 // 4),))
            return await hold(to, connection)

    return await crowd(to, 400, play, rounds=400)


@attack("400 connections with one 62 KB header each, no key", seconds=20)
async def long_header(to: To) -> Seen:
    async def play(_: int) -> str:
        async with connected(to) as connection:
            await connection.send((head(to, "/v1/completions", 2, key="")[:-2] + b"x: " + b"y" * 62 * 2**10,))
            return await hold(to, connection)

    return await crowd(to, 400, play, rounds=400)


@attack("400 bodies of 60 KB whose last byte never comes, no key", seconds=20)
async def unfinished_bodies(to: To) -> Seen:
    async def play(_: int) -> str:
        async with connected(to) as connection:
            await connection.send((head(to, "/v1/completions", 60_000, key=""), b"x" * 59_999))
            return await hold(to, connection)

    return await crowd(to, 400, play, rounds=400)


@attack("chunk extensions of 100 KB, no key", seconds=20)
async def chunk_extensions(to: To) -> Seen:
    async def play(_: int) -> str:
        async with connected(to) as connection:
            start = head(to, "/v1/completions", None, key="")
            await connection.send((start, *(b"1;" + b"x" * 100_000 + b"\r\n{\r\n" for _ in range(200))))
            return await hold(to, connection)

    return await crowd(to, 20, play, rounds=20)


@attack("up to 25 GB of body after a 413", seconds=15)
async def body_after_refusal(to: To) -> Seen:
    sent = 0
    async with connected(to) as connection:
        connection.writer.write(head(to, "/v1/completions", 25 * 10**9))
        with contextlib.suppress(ConnectionError):
            while not to.is_over:
                connection.writer.write(b"x" * PIECE)
                await connection.writer.drain()
                sent += PIECE
        status = "closed" if not to.is_over else await hold(to, connection)
    return Seen({f"{status} after {sent / 1e6:.0f} MB": 1})


@attack("50 connections that pipeline 20,000 requests each, no key, and read nothing", seconds=20)
async def pipelined(to: To) -> Seen:
    async def play(_: int) -> str:
        async with connected(to) as connection:
            request = head(to, "/v1/completions", 2, key="") + b"{}"
            connection.reader._limit = 1  # type: ignore[attr-defined] # stop reading
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(max(0.1, to.until - time.monotonic())):
                    for _ in range(200):
                        connection.writer.write(request * 100)
                        await connection.writer.drain()
                    return "all taken"
            return "held back" if to.is_over else "closed"

    return await crowd(to, 50, play, rounds=50)


@attack("two Host headers, none, `RTSP/1.0`, control bytes, absurd methods", seconds=20)
async def odd_requests(to: To) -> Seen:
    lines = ("GET /health HTTP/1.1\r\nhost: a\r\nhost: b", "GET /health HTTP/1.1", "GET /health RTSP/1.0\r\nhost: x",
             "GET /health HTTP/3.7\r\nhost: x", "GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n"
             "content-length: 2", "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n"
             "transfer-encoding: chunked", "GET /health HTTP/1.1\r\nhost: x\r\n: y",
             "A" * 9000 + " / HTTP/1.1\r\nhost: x",
             "GET /health HTTP/1.1\r\nhost: x\r\nx: \0", "GET /" + "a" * 60_000 + " HTTP/1.1\r\nhost: x")  # fmt: skip
    numbers = iter(range(10**9))

    async def play(_: int) -> str:
        line = lines[next(numbers) % len(lines)]
        async with connected(to) as connection:
            await connection.send(((line + "\r\n\r\n").encode(),))
            try:
                return await asyncio.wait_for(connection.status(), 5)
            except TimeoutError:
                return "no answer"

    return await crowd(to, 4, play, rounds=len(lines) * 20)


# ---- Large questions and answers ----


def longest_tokens(count: int) -> list[int]:
    """Return ids of tokens whose text is long, so that a short question has a long answer."""
    vocabulary: dict[str, int] = json.loads(VOCABULARY.read_text())["model"]["vocab"]
    longest = sorted(vocabulary, key=len)[-20:]
    return ([vocabulary[token] for token in longest] * (count // 20 + 1))[:count]


async def _read_slowly(to: To, path: str, body: bytes, bytes_a_second: float) -> str:
    async with connected(to) as connection:
        await connection.send((head(to, path, len(body)), *pieces_of(body)))
        try:
            async with asyncio.timeout(max(0.1, to.until - time.monotonic())):
                start = await connection.reader.readuntil(b"\r\n\r\n")
                await connection.drain(start, bytes_a_second)
        except TimeoutError:
            return "still reading"
        except (ConnectionError, asyncio.IncompleteReadError):
            return "closed"
        return start.split(b" ", 2)[1].decode()


@attack("40 readers of 15 MB answers (/detokenize of 1,000,000 ids) that take 17 KB a second")
async def slow_readers(to: To) -> Seen:
    body = json.dumps({"tokens": longest_tokens(10**6)}, separators=(",", ":")).encode()
    return await crowd(to, 40, lambda _: _read_slowly(to, "/detokenize", body, 17_000), rounds=40)


@attack("one answer with 2,000,000 candidates of prompt log-probabilities, read at once", seconds=240)
async def prompt_logprobs(to: To) -> Seen:
    prompts = [[300 + (n * 7 + m) % 5000 for m in range(DEMO_CONTEXT - 1)] for n in range(96)]
    body = {"prompt": prompts, "prompt_logprobs": 20, "max_tokens": 1}
    return Seen([await ask(to, "/v1/completions", body)])


@attack("8 answers with 500,000 candidates of prompt log-probabilities, read at 17 KB a second", seconds=120)
async def slow_logprobs(to: To) -> Seen:
    prompts = [[300 + (n * 7 + m) % 5000 for m in range(DEMO_CONTEXT - 1)] for n in range(24)]
    body = json.dumps({"prompt": prompts, "prompt_logprobs": 20, "max_tokens": 1}).encode()
    return await crowd(to, 8, lambda _: _read_slowly(to, "/v1/completions", body, 17_000), rounds=8)


@attack("64 unread streams with 20 log-probabilities")
async def unread_streams(to: To) -> Seen:
    body = json.dumps({"prompt": "Hi", "max_tokens": 900, "ignore_eos": True, "logprobs": 20, "stream": True}).encode()

    async def play(_: int) -> str:
        async with connected(to) as connection:
            connection.reader._limit = 1  # type: ignore[attr-defined] # stop reading
            await connection.send((head(to, "/v1/completions", len(body)), body))
            for _ in range(int(max(0.0, to.until - time.monotonic()) / 0.2)):
                await asyncio.sleep(0.2)
                if connection.writer.transport.is_closing():
                    return "closed"
            return "held open"

    return await crowd(to, 64, play, rounds=64)


@attack("one /tokenize of 4 MB")
async def tokenize(to: To) -> Seen:
    return Seen([await ask(to, "/tokenize", {"prompt": megabytes(4)})])


@attack("eight /tokenize of 4 MB at once", seconds=120)
async def tokenize_eight(to: To) -> Seen:
    body = json.dumps({"prompt": megabytes(4), "return_token_strs": True}).encode()
    return await crowd(to, 8, lambda _: ask(to, "/tokenize", body), rounds=8)


@attack("eight chats, completions, count_tokens and embeddings of 4 MB at once", seconds=120)
async def large_prompts(to: To) -> Seen:
    text = megabytes(4)
    message = {"model": "x", "max_tokens": 4, "messages": [{"role": "user", "content": text}]}
    bodies: list[tuple[str, bytes]] = [
        (path, json.dumps(body).encode()) for path, body in (
            ("/v1/chat/completions", {"messages": message["messages"]}), ("/v1/completions", {"prompt": text}),
            ("/v1/messages/count_tokens", {"messages": message["messages"]}),
            ("/v1/embeddings", {"input": text}), ("/v1/responses", {"input": text}),
            ("/v1/completions", {"prompt": "x", "stop": ["y"], "user": "z" * 500, "suffix": text}),
        )
    ]  # fmt: skip
    return await crowd(to, 8, lambda n: ask(to, *bodies[n % len(bodies)]), rounds=24)


@attack("2,048 embeddings of 500 tokens, four times at once", seconds=90)
async def embeddings(to: To) -> Seen:
    ids = longest_tokens(500)
    body = json.dumps({"input": [ids[n % 7 :] for n in range(2048)]}).encode()
    return await crowd(to, 4, lambda _: ask(to, "/v1/embeddings", body), rounds=4)


@attack("bodies of 8 MB: 262,144 objects, 4,000,000 numbers, one string, 200,000 levels", seconds=60)
async def large_json(to: To) -> Seen:
    bodies = [
        b'{"prompt":"x","metadata":{"a":[' + b"{}," * 262_000 + b"{}]}}",
        b'{"prompt":[' + b"1," * 1_040_000 + b"1]}",
        b'{"prompt":"x","logit_bias":{' + b",".join(b'"%d":1' % n for n in range(500_000)) + b"}}",
        b'{"prompt":"' + b"\\u00e9" * 1_300_000 + b'"}',
        b"[" * 200_000 + b"]" * 200_000,
        b'{"messages":[' + b",".join([b'{"role":"user","content":"x"}'] * 200_000) + b"]}",
    ]
    paths = ["/v1/completions"] * 5 + ["/v1/chat/completions"]
    return await crowd(to, 8, lambda n: ask(to, paths[n % 6], bodies[n % 6]), rounds=48)
