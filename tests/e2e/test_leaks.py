"""Requests leave nothing behind, in the API process nor in the engine's: counted in bytes and files for each of them.

Both run in this process here, where Python tells of every byte that it has given out. What it does not know of, such as
memory that a library takes for itself, shows in `test_soak.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import signal
import socket
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import uvloop
from support.serving import PATIENCE

from pyllm.engine.build import build_engine
from pyllm.engine.client.launch import EngineProcess
from pyllm.engine.config import EngineConfig
from pyllm.engine.messages import (
    Abort,
    EngineRequest,
    FromEngine,
    SamplingParams,
    Shutdown,
    StepOutputs,
    encode_frame,
    read_frames,
)
from pyllm.engine.process import receive
from pyllm.engine.process import serve as serve_engine
from pyllm.server import serve
from pyllm.server.flags import ServerConfig
from pyllm.server.lifetime import Lifetime

WINDOWS, ROUNDS = 4, 4
"""How often memory is compared, after so many rounds of requests each, behind one window for what is made only once."""
MOST = 400
"""Bytes that may be left of a request in every window: containers that grow at times do so in one of them."""
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
GRAMMAR = json.dumps({"grammars": [{"json_schema": SCHEMA}]})


@pytest.fixture(autouse=True)
def _traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()
    gc.unfreeze()  # a server freezes what there is when it has loaded


class Meter:
    """Compares what there is after every window with what there was after the one before it."""

    def __init__(self) -> None:
        self._asked: list[int] = []
        self._bytes: list[int] = []
        self._files: list[int] = []

    def take(self, asked: int) -> None:
        """Look, after so many requests."""
        gc.collect()
        gc.collect()
        files = Path("/proc/self/fd")
        self._asked.append(asked)
        self._bytes.append(tracemalloc.get_traced_memory()[0])
        self._files.append(len(list(files.iterdir())) if files.exists() else 0)

    def check(self) -> None:
        """Fail if every window has left something of each request, or files are open that were not."""
        pairs = zip(self._asked[1:], pairwise(self._bytes), strict=True)
        left = [(after - before) / asked for asked, (before, after) in pairs]
        assert min(left) < MOST, f"{min(left):.0f} bytes are left of each request"
        assert self._files[-1] <= self._files[0], "files are left open"


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 4, "ignore_eos": True, "seed": 3} | fields)


def engine_requests(draw: random.Random, number: int) -> list[EngineRequest]:
    """One of every kind, with a prompt of its own."""
    each: list[SamplingParams] = [
        params(temperature=0.0, logprobs=3), params(max_tokens=40), params(grammar=GRAMMAR, max_tokens=30),
        params(grammar='{"grammars": [{"lark_grammar": "start: ("}]}'), params(stop_token_ids=(5, 6, 7)),
        params(logit_bias={70: 3.0}, bad_words=((71,), (72, 73)), allowed_token_ids=tuple(range(60, 90))),
        params(repetition_penalty=1.3, presence_penalty=1.0, return_dynamics=True), params(prompt_logprobs=2),
        params(max_tokens=10**6),
    ]  # fmt: skip
    prompts = [[draw.randrange(4, 260) for _ in range(draw.randrange(1, 60))] for _ in range(len(each) + 1)]
    requests = [
        EngineRequest(request_id=f"{number}-{n}", prompt_token_ids=prompts[n], params=own, cache_salt=f"s{n % 2}")
        for n, own in enumerate(each)
    ]
    pooled = EngineRequest(request_id=f"{number}-p", prompt_token_ids=prompts[-1], params=params(), pooling="mean")
    return [*requests, pooled]


def test_the_engine_keeps_nothing_of_a_request(checkpoint: Path) -> None:
    config = EngineConfig(model=str(checkpoint), dtype="float32", device="cpu", quiet=True, max_model_len=128,
                          num_kv_blocks=60, max_num_seqs=6)  # fmt: skip
    core = build_engine(config)
    ours, theirs = socket.socketpair()
    engine = threading.Thread(target=serve_engine, args=(core, theirs, receive(read_frames(theirs.makefile("rb")))))
    draw, meter = random.Random(1), Meter()
    with ours, theirs:
        engine.start()
        said = read_frames(ours.makefile("rb"))

        def play(number: int) -> int:
            requests = engine_requests(draw, number)
            aborted, left = requests[1].request_id, {request.request_id for request in requests}
            for request in requests:
                ours.sendall(encode_frame(request))
            while left:
                message = msgspec.msgpack.decode(next(said), type=FromEngine)
                for output in message.outputs if isinstance(message, StepOutputs) else ():
                    if output.finish_reason is not None:
                        left.discard(output.request_id)
                    elif output.request_id == aborted:
                        ours.sendall(encode_frame(Abort(request_ids=[aborted])))
                        left.discard(aborted)
            return len(requests)

        for window in range(WINDOWS):
            meter.take(sum(play(window * ROUNDS + number) for number in range(ROUNDS)))
        ours.sendall(encode_frame(Shutdown()))
        engine.join(PATIENCE)
    assert not engine.is_alive()
    meter.check()


Exchange = Callable[[httpx.AsyncClient], Awaitable[int]]


def post(path: str, **fields: Any) -> Exchange:
    async def ask(http: httpx.AsyncClient) -> int:
        return (await http.post(path, json=fields)).status_code

    return ask


def hang_up(path: str, **fields: Any) -> Exchange:
    """Go away in the middle of a stream."""

    async def ask(http: httpx.AsyncClient) -> int:
        async with http.stream("POST", path, json=fields | {"stream": True}) as answer:
            async for _ in answer.aiter_bytes():
                return answer.status_code
        return 0

    return ask


def half(data: bytes) -> Exchange:
    """Bytes on a connection of their own, which is then closed."""

    async def ask(http: httpx.AsyncClient) -> int:
        reader, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
        writer.write(data)
        await writer.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(), 0.01)
        writer.close()
        await writer.wait_closed()
        return 0

    return ask


def exchanges(draw: random.Random) -> list[Exchange]:
    """One of every kind, with a prompt of its own."""
    text = "".join(draw.choices("abcdefghij ", k=draw.randrange(1, 80)))
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": 6}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n"
    return [
        post("/v1/chat/completions", **chat), post("/v1/chat/completions", **chat, stream=True, logprobs=True),
        post("/v1/chat/completions", **chat | {"max_tokens": 30}, response_format=form),
        post("/v1/completions", prompt=[text, text[::-1]], max_tokens=4, n=2, logprobs=2, stop=["q"]),
        post("/v1/responses", input=text, max_output_tokens=6, store=False), post("/v1/embeddings", input=[text, "a"]),
        post("/v1/messages", model="tiny", **chat, stream=True), post("/tokenize", prompt=text),
        post("/v1/completions", prompt=7), post("/v1/completions", prompt=text * 10**4), post("/v1/nothing"),
        hang_up("/v1/completions", prompt=text, max_tokens=1000, ignore_eos=True),
        half(head), half(head + b"\r\n{"), half(b"no HTTP at all\r\n\r\n"),
    ]  # fmt: skip


def test_the_api_process_keeps_nothing_of_a_request(checkpoint: Path) -> None:
    config = ServerConfig(model=str(checkpoint), served_model_name=("tiny",), dtype="float32", num_kv_blocks=600)
    meter = Meter()

    async def load(url: str) -> None:
        draw = random.Random(2)

        async def play() -> int:
            asked = exchanges(draw)
            statuses = [await ask(http) for ask in asked]
            assert statuses == [200] * 8 + [400, 400, 404, 200, 0, 0, 0]
            return len(asked)

        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as http:
            deadline = time.monotonic() + PATIENCE
            while (await http.get("/ready")).status_code != 200:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)  # each request is traced, and takes time from the engine's start
            for _ in range(WINDOWS):
                asked = sum([await play() for _ in range(ROUNDS)])
                await asyncio.sleep(0.1)  # the last connections end
                meter.take(asked)

    async def run() -> None:
        lifetime = Lifetime()
        process = serve._ServerProcess(config, EngineProcess(), lifetime)
        server = asyncio.create_task(process.run())
        try:
            while not process.sockets:  # noqa: ASYNC110 - nothing tells when it listens
                await asyncio.sleep(0.01)
            await load(f"http://127.0.0.1:{process.sockets[0].getsockname()[1]}")
        finally:
            assert lifetime.on_stop is not None
            lifetime.on_stop(signal.SIGTERM)
            assert await server == 0

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    meter.check()
