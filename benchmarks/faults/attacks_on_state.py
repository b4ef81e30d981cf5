"""Attacks on what is kept: stored responses, compiled grammars, files; and on what each step must do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Iterable
from typing import Any

from pyllm.benchmarks.faults.attack_client import (
    HEAD,
    KEYS,
    PIECE,
    Seen,
    To,
    ask,
    attack,
    connected,
    crowd,
    head,
    pieces_of,
    words,
)

# ---- What the server keeps ----


@attack("4,160 short /v1/responses of one key, next to one that another key has stored", seconds=180)
async def kept_responses(to: To) -> Seen:
    body = json.dumps({"input": "Keep this.", "max_output_tokens": 1}).encode()
    async with connected(to) as connection:
        await connection.send((head(to, "/v1/responses", len(body), key=KEYS[0]), body))
        answer = await connection.reader.readuntil(b"\r\n\r\n")
        kept = json.loads(
            await connection.reader.readexactly(int(answer.lower().split(b"content-length: ")[1].split()[0]))
        )
    cheap = json.dumps({"input": "x", "max_output_tokens": 1}).encode()
    seen = await crowd(to, 32, lambda _: ask(to, "/v1/responses", cheap), rounds=4160)
    async with connected(to) as connection:
        path = f"/v1/responses/{kept['id']}"
        await connection.send((head(to, path, 0, key=KEYS[0], method="GET"),))
        seen[f"the other's response: {await connection.status()}"] += 1
    return seen


@attack("/v1/responses of 900 KB each that are stored, from one key", seconds=60)
async def large_responses(to: To) -> Seen:
    draw = random.Random(3)

    def body(number: int) -> bytes:
        text = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=900_000))
        return json.dumps({"input": f"{number}{text}", "max_output_tokens": 1, "truncation": "auto", "metadata": {
            f"k{n}": "v" * 512 for n in range(16)}}).encode()  # fmt: skip

    return await crowd(to, 4, lambda n: ask(to, "/v1/responses", body(n)), rounds=200)


@attack("1,500 different schemas, expressions and grammars", seconds=60)
async def grammars(to: To) -> Seen:
    def body(number: int) -> dict[str, Any]:
        members = {f"k{number}_{n}": {"type": "string", "maxLength": n + 1} for n in range(40)}
        rules = "start: " + " | ".join(f'"w{number}x{n}"' for n in range(800))
        options: list[dict[str, Any]] = [
            {"json": {"type": "object", "properties": members, "required": list(members)[:9]}},
            {"regex": f"[a-z]{{1,{number % 900 + 1}}}(b|c|{number})*"},
            {"grammar": rules},
            {"choice": [f"{number} {n} " + "z" * 60 for n in range(400)]},
        ]
        return {"prompt": "x", "max_tokens": 2, "structured_outputs": options[number % 4]}

    return await crowd(to, 8, lambda n: ask(to, "/v1/completions", body(n)), rounds=1500)


@attack("expressions and grammars that take long to compile, eight at a time", seconds=40)
async def slow_grammars(to: To) -> Seen:
    def body(number: int) -> dict[str, Any]:
        option = {"regex": f"(x{number}" + "(a?){1,90}" * 8 + "){1,90}"} if number % 2 else {
            "grammar": f'start: a{{1,400}} "{number}"\na: b{{1,400}}\nb: "x" | "y" a'}  # fmt: skip
        return {"prompt": "x", "max_tokens": 2, "structured_outputs": option}

    return await crowd(to, 8, lambda n: ask(to, "/v1/completions", body(n)))


# ---- What every step does ----


@attack("1,024 sequences with 4 stop strings of 1,000 characters", "--max-num-queued-reqs", "2000")
async def stop_strings(to: To) -> Seen:
    stops = [(word + " ") * (1000 // (len(word) + 1)) for word in ("the", "a", "of", "e")]
    body = {"prompt": ["the the the"] * 8, "n": 128, "max_tokens": 60, "ignore_eos": True, "stop": stops}
    return Seen([await ask(to, "/v1/completions", body)])


@attack("100 requests with 1,000,000 allowed_token_ids each", seconds=90)
async def allowed_ids(to: To) -> Seen:
    ids = b",".join(b"%d" % (300 + n % 5000) for n in range(2**20))
    body = b'{"prompt":"x","max_tokens":900,"ignore_eos":true,"allowed_token_ids":[' + ids + b"]}"
    return await crowd(to, 100, lambda _: ask(to, "/v1/completions", body, drain=False), rounds=100)


@attack("requests for 4 sequences with 1,000,000 allowed_token_ids each, given up at once", seconds=60)
async def abandoned_ids(to: To) -> Seen:
    ids = b",".join(b"%d" % (300 + n % 5000) for n in range(2**20))
    body = b'{"prompt":"x","n":4,"max_tokens":900,"ignore_eos":true,"allowed_token_ids":[' + ids + b"]}"

    async def play(_: int) -> str:
        async with connected(to) as connection:
            await connection.send((head(to, "/v1/completions", len(body)), *pieces_of(body)))
            await asyncio.sleep(0.3)
            return "left"

    return await crowd(to, 8, play)


@attack("1,024 sequences with 300 log-biases, 128 bad words and penalties", "--max-num-queued-reqs", "2000")
async def heavy_rules(to: To) -> Seen:
    body = {
        "prompt": ["x"] * 8, "n": 128, "max_tokens": 30, "ignore_eos": True, "repetition_penalty": 1.1,
        "logit_bias": {str(n): 1 for n in range(300, 1300)}, "bad_words": [f"{n} " + "word " * 40 for n in range(128)],
    }  # fmt: skip
    return Seen([await ask(to, "/v1/completions", body)])


@attack("500 requests of one key; what a request of the other key waits for its first token")
async def greedy_client(to: To) -> Seen:
    body = json.dumps({"prompt": "x", "max_tokens": 200, "ignore_eos": True}).encode()
    waits: list[float] = []

    async def other() -> None:
        await asyncio.sleep(1)
        while not to.is_over:
            since = time.monotonic()
            status = await ask(to, "/v1/completions", {"prompt": "y", "max_tokens": 1}, key=KEYS[0])
            waits.append(time.monotonic() - since if status == "200" else 99.0)
            await asyncio.sleep(1)

    task = asyncio.create_task(other())
    seen = await crowd(to, 500, lambda _: ask(to, "/v1/completions", body), rounds=500)
    task.cancel()
    return seen + Seen({f"the other waited up to {max(waits, default=0.0):.1f} s": 1})


@attack("clients that leave in every state of a request, 32 at a time", seconds=30)
async def disconnects(to: To) -> Seen:
    draw = random.Random(1)

    async def play(number: int) -> str:
        body = json.dumps({"prompt": words(200, number), "max_tokens": 500, "n": 4, "stream": number % 2 == 0}).encode()
        async with connected(to) as connection:
            data = head(to, "/v1/completions", len(body)) + body
            await connection.send((data[: draw.randrange(1, len(data))] if number % 3 == 0 else data,))
            await asyncio.sleep(draw.choice((0, 0.02, 0.3)))
        return "left"

    return await crowd(to, 32, play)


@attack("names, ids and labels that differ in every request", seconds=30)
async def labels(to: To) -> Seen:
    async def play(number: int) -> str:
        text = f"{number:0500d}"
        body = {"prompt": "x", "max_tokens": 1, "user": text, "cache_salt": text[-100:], "model": text}
        if number % 2:
            body.pop("model")
        return await ask(to, f"/v1/completions?{text}" if number % 3 else f"/v1/{text}", body)

    return await crowd(to, 16, play)


# ---- Files ----


async def _upload(to: To, pieces: Iterable[bytes], key: str | None = None) -> tuple[str, dict[str, Any]]:
    start = HEAD.format(method="POST", path="/v1/files", kind="multipart/form-data; boundary=b")
    lines = f"authorization: Bearer {key or to.key}\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    form = b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\n'
    form += b'content-disposition: form-data; name="file"; filename="x"\r\n\r\n'
    async with connected(to) as connection:
        chunks = (b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (form, *pieces, b"\r\n--b--\r\n"))
        await connection.send(((start + lines).encode(), *chunks, b"0\r\n\r\n"))
        data = bytearray()
        with contextlib.suppress(ConnectionError):
            while piece := await connection.reader.read(PIECE):
                data += piece
        answer = bytes(data).partition(b"\r\n\r\n")[2]
        status = data.split(b" ", 2)[1].decode() if b" " in data else "closed"
        return status, json.loads(answer) if answer[:1] == b"{" else {}


@attack("batch files of 100 MB: empty lines, a line of 8 MB, 1,000,000 lines", "--batch-dir", "{folder}", seconds=90)
async def batch_files(to: To) -> Seen:
    line = b'{"custom_id":"%d","method":"POST","url":"/v1/completions","body":{"prompt":"x","max_tokens":1}}\n'
    files: tuple[Iterable[bytes], ...] = (
        (b"\n" * PIECE for _ in range(100 * 2**20 // PIECE)),
        (b'{"custom_id":"a","body":{"prompt":"', *(b"y" * PIECE for _ in range(8 * 2**20 // PIECE)), b'"}}\n'),
        (line % n * 400 for n in range(2500)),
        (b"x" * PIECE for _ in range(100 * 2**20 // PIECE)),
        (b'{"custom_id":"%d","x":' % 1 + b"[" * PIECE for _ in range(100)),
    )
    seen = Seen()
    for pieces in files:
        status, record = await _upload(to, pieces)
        seen[f"file {status}"] += 1
        if "id" in record:
            body = {"input_file_id": record["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
            seen[f"batch {await ask(to, '/v1/batches', body)}"] += 1
    await asyncio.sleep(max(0.0, to.until - time.monotonic()))
    return seen


@attack("small files of one key until it is refused, then one of the other key", "--batch-dir", "{folder}", seconds=60)
async def many_files(to: To) -> Seen:
    async def play(number: int) -> str:
        status, _ = await _upload(to, [b'{"custom_id":"%d"}\n' % number])
        return f"file {status}"

    seen = await crowd(to, 2, play, rounds=1100)
    status, _ = await _upload(to, [b"{}\n"], key=KEYS[0])
    seen[f"the other's file: {status}"] += 1
    return seen
