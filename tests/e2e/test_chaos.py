"""Abuse of a server at full size, a scene per test; `benchmarks/faults/chaos.py` prints what they measure."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.hostile import Outcome, Prober, canary, post, send_all
from support.hostile_groups import CONCURRENCY, FLAGS, GROUPS
from support.memory_owners import growth, watched
from support.serving import PATIENCE, ServerProcess, is_running, posted, wait_for
from support.soak import open_files, soak

pytestmark = pytest.mark.slow
QUICK = bool(os.environ.get("CHAOS_QUICK"))
MINUTES = float(os.environ.get("CHAOS_MINUTES", "2"))
Record = Callable[..., None]
PATH = "/v1/completions"


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Record:
    """Add figures to the test's report."""

    def add(**figures: Any) -> None:
        for name, value in figures.items():
            record_property(name, json.dumps(value))

    return add


@contextlib.contextmanager
def server_of(*flags: str, exit_code: int = 0, port: int = 0, **variables: str) -> Any:
    """A server of the bundled model, with its log in a temporary folder."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess(Path(folder) / "log", *flags, exit_code=exit_code, port=port, **variables) as server,
    ):
        yield server


def completion(**fields: Any) -> bytes:
    """The bytes of a request."""
    return json.dumps({"prompt": "Hi", "ignore_eos": True} | fields).encode()


def read_all(connection: socket.socket) -> bytes:
    """Read until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(2**16):
            data += piece
    return data


def test_hostile_requests_do_not_change_an_answer(record: Record) -> None:
    """The requests of `test_hostile.py`, one group after the other."""
    total, same = Outcome(), True
    with server_of(*FLAGS) as server, Prober(server.url) as prober:
        before = canary(server.url)
        for group, cases in GROUPS.items():
            chosen = list(cases())[:: 10 if QUICK else 1]
            outcome = send_all(server.url, chosen, CONCURRENCY.get(group, 8))
            total.tried += outcome.tried
            total.statuses += outcome.statuses
            total.slowest = max(total.slowest, outcome.slowest)
            total.faults += outcome.faults
            same = same and canary(server.url) == before
        tracebacks = server.log.count("Traceback")
    errors = sum(n for status, n in total.statuses.items() if status >= 500)
    record(
        tried=total.tried, errors=errors, statuses=dict(sorted(total.statuses.items())), faults=len(total.faults),
        slowest_s=round(total.slowest[0], 2), slowest=total.slowest[1][:80], tracebacks=tracebacks, canary_same=same,
        health_p99_s=round(prober.p99(), 3),
    )  # fmt: skip
    assert (errors, total.faults, tracebacks, same) == (0, [], 0, True)


async def _hang_up(server: ServerProcess, kind: str, draw: random.Random) -> None:
    """Send a request and disconnect in the state named by `kind`, half of the time with a reset."""
    long, regex = " x" * 900, "".join(draw.choice("abcdef") for _ in range(12)) + "(a|b){9,99}"
    body = {
        "in the prompt": completion(prompt=long, max_tokens=100, stream=draw.random() < 0.5),
        "n > 1": completion(n=5, max_tokens=900, stream=draw.random() < 0.5),
        "grammar": completion(structured_outputs={"regex": regex}, max_tokens=500),
        "whole": completion(max_tokens=900), "queued": completion(max_tokens=900, n=8),
    }.get(kind, completion(max_tokens=900, stream=True))  # fmt: skip
    data = post(PATH, body).data
    url = httpx.URL(server.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    with contextlib.suppress(ConnectionError, TimeoutError):
        writer.write(data[: draw.randrange(1, len(data))] if kind == "before the body ends" else data)
        if kind == "stream":
            await asyncio.wait_for(reader.read(draw.choice((1, 4000))), 2)
        await asyncio.sleep(draw.choice((0, 0.01, 0.05, 0.2)))
        if draw.random() < 0.5:  # a reset
            sock: socket.socket = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
        await writer.wait_closed()


def test_disconnects_leave_no_blocks_and_no_files(record: Record) -> None:
    """Clients that disconnect, 16 at a time, in every state of a request."""
    kinds = ["before the body ends", "queued", "in the prompt", "stream", "whole", "n > 1", "grammar"]
    draw, count = random.Random(6), 60 if QUICK else 300
    flags = ("--max-num-batched-tokens", "64", "--max-num-seqs", "12")
    with server_of(*flags) as server:
        for n in range(6):  # start what is started on first use
            asyncio.run(_hang_up(server, "grammar", random.Random(n)))
        time.sleep(2)
        before, files = server.wait_until_idle(), open_files(server)
        waiting, chosen = iter(range(count)), Counter[str]()

        async def work() -> None:
            for n in waiting:
                chosen[kinds[n % len(kinds)]] += 1
                await _hang_up(server, kinds[n % len(kinds)], draw)

        async def run() -> None:
            await asyncio.gather(*(work() for _ in range(16)))

        with Prober(server.url) as prober:
            asyncio.run(run())
            since = time.monotonic()
            after = server.wait_until_idle()
            seconds = time.monotonic() - since
        time.sleep(0.5)  # the connection of the last request for metrics closes
        leaked = open_files(server) - files
    done = ("request_success_total", "length")
    leaked_share = after.kv_cache_usage_perc - before.kv_cache_usage_perc
    record(
        tried=count, kinds=dict(chosen), idle_after_s=round(seconds, 3), leaked_kv_share=leaked_share,
        leaked_files=leaked, ran_to_their_end=after.get(done, 0) - before.get(done, 0),
        health_p99_s=round(prober.p99(), 3),
    )  # fmt: skip
    assert leaked_share == 0
    assert leaked <= 0


def test_overload_loses_no_request(record: Record) -> None:
    """Four hundred requests at once, with a queue of 32."""
    count = 100 if QUICK else 400
    cases = [post(PATH, completion(prompt=f"Request {n}", max_tokens=16, stream=n % 2 == 0)) for n in range(count)]
    with server_of("--max-num-seqs", "8", "--max-num-queued-reqs", "32") as server, Prober(server.url) as prober:
        canary(server.url)
        outcome = send_all(server.url, cases, concurrency=count)
    refused = sorted(seconds for status, seconds in outcome.seconds if status == 429) or [0.0]
    record(
        requests=count, statuses=dict(sorted(outcome.statuses.items())), lost=count - len(outcome.seconds),
        faults=len(outcome.faults), refusal_p50_s=round(refused[len(refused) // 2], 3),
        refusal_max_s=round(refused[-1], 3), last_answer_s=round(outcome.slowest[0], 2),
        health_p99_s=round(prober.p99(), 3),
    )  # fmt: skip
    assert (len(outcome.seconds), outcome.faults) == (count, [])


def test_sigterm_lets_streams_finish(record: Record) -> None:
    """SIGTERM while 16 streams run."""
    tokens = 100 if QUICK else 600
    with server_of() as server, contextlib.ExitStack() as stack:
        engine = server.engine_pid
        streams = [stack.enter_context(posted(server, stream=True, max_tokens=tokens)) for _ in range(16)]
        first = [stream.recv(1) for stream in streams]
        server.process.send_signal(signal.SIGTERM)
        since = time.monotonic()
        wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 503, "/ready to be 503")
        unready = time.monotonic() - since
        refused = httpx.post(f"{server.url}{PATH}", json={"prompt": "Hi"}).status_code
        with Prober(server.url) as prober:
            first = [head + stream.recv(2**16) for head, stream in zip(first, streams, strict=True)]
            time.sleep(0.2 if QUICK else 1)
        whole = sum(b"data: [DONE]\n\n" in head + read_all(s) for head, s in zip(first, streams, strict=True))
        code = server.process.wait(PATIENCE)
        seconds = time.monotonic() - since
    record(
        streams=16, whole=whole, refused_with=refused, exit_code=code, unready_after_s=round(unready, 3),
        ended_after_s=round(seconds, 2), orphans=int(is_running(engine)), health_p99_s=round(prober.p99(), 3),
    )  # fmt: skip
    assert (whole, refused, code, is_running(engine)) == (16, 503, 0, False)


def test_sigkill_frees_the_port_at_once(record: Record) -> None:
    """SIGKILL, and at once the next server on the same port."""
    clients, orphans, ready = [], [], []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for _ in range(1 if QUICK else 3):
        with server_of(exit_code=-9, port=port) as server, contextlib.ExitStack() as stack:
            streams = [stack.enter_context(posted(server, stream=True)) for _ in range(4)]
            for stream in streams:
                stream.recv(1)
            engine = server.engine_pid
            server.process.kill()
            since = time.monotonic()
            for stream in streams:
                read_all(stream)
            clients.append(round(time.monotonic() - since, 3))
            wait_for(lambda pid=engine: not is_running(pid), "the engine to end")
            orphans.append(round(time.monotonic() - since, 3))
            server.process.wait()
        with server_of(port=port):
            ready.append(round(time.monotonic() - since, 2))
    record(kills=len(ready), clients_ended_after_s=clients, engine_ended_after_s=orphans, same_port_ready_after_s=ready)
    assert max(clients) < 10


def test_half_open_connections_are_closed(record: Record) -> None:
    """A hundred connections that never finish their headers."""
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nx: ".encode()
    flags = ("--header-timeout", "3") if QUICK else ()
    with server_of(*flags) as server, Prober(server.url) as prober, contextlib.ExitStack() as stack:
        url = httpx.URL(server.url)
        sockets = [stack.enter_context(socket.create_connection((url.host, url.port))) for _ in range(100)]
        since, canaries, open_ones = time.monotonic(), [], list(sockets)
        for connection in sockets:
            connection.sendall(head)
            connection.settimeout(0)
        while open_ones and time.monotonic() < since + PATIENCE:
            began = time.monotonic()
            canary(server.url)
            canaries.append(time.monotonic() - began)
            for connection in list(open_ones):
                with contextlib.suppress(BlockingIOError):
                    try:
                        connection.sendall(b"a")
                        connection.recv(4096)
                    except ConnectionError:
                        pass
                    open_ones.remove(connection)
            time.sleep(0.2)
        seconds = time.monotonic() - since
    record(
        sockets=100, still_open=len(open_ones), closed_after_s=round(seconds, 1), canaries=len(canaries),
        canary_max_s=round(max(canaries), 3), health_p99_s=round(prober.p99(), 3),
    )  # fmt: skip
    assert not open_ones


def test_soak_leaves_no_block_and_no_error(record: Record, tmp_path: Path) -> None:
    """Mixed load, and what remains after it; with CHAOS_OWNERS, what holds the memory."""
    minutes, grammars = (0.5, 100) if QUICK else (MINUTES, 1500)
    flags = ("--served-model-name", "tiny", "--max-num-seqs", "16", "--num-kv-blocks", "512")
    variables = watched(tmp_path / "owners", 60 * minutes / 20) if os.environ.get("CHAOS_OWNERS") else {}
    with server_of(*flags, "--batch-dir", str(tmp_path / "files"), **variables) as server:
        names = {server.process.pid: "api", server.engine_pid: "engine"}
        asyncio.run(soak(server, min(10, 20 * minutes)))
        server.wait_until_idle()
        with Prober(server.url) as prober:
            found = asyncio.run(soak(server, 60 * minutes, seed=60, grammars=grammars, batches=True))
        after = server.wait_until_idle()
    middle = len(found.files) // 2
    errors = sum(n for status, n in found.statuses.items() if status >= 500)
    record(
        minutes=minutes, requests=found.statuses.total(), errors=errors, statuses=dict(sorted(found.statuses.items())),
        batches=found.batches,
        rss_mb=[[round(size / 1e6, 1) for size in found.memory[at][1:]] for at in (0, len(found.memory) // 2, -1)],
        rss_slopes_second_half_mb_per_hour=[round(slope, 1) for slope in found.slopes()],
        files_max=[max(found.files[:middle]), max(found.files[middle:])],
        p99_s=[round(found.p99(third), 3) for third in range(3)], p99_ratio=round(found.p99(2) / found.p99(0), 2),
        kv_share=after.kv_cache_usage_perc, health_p99_s=round(prober.p99(), 3),
        **{f"owners_{name}": growth(tmp_path / "owners", pid) for pid, name in names.items() if variables},
    )  # fmt: skip
    assert (errors, after.kv_cache_usage_perc) == (0, 0)
