"""An engine that dies or hangs: how soon that shows, what its clients hear, and how a new one takes its place."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.serving import FOREVER, PATIENCE, ServerProcess, children, is_running, wait_for, wait_for_load

pytestmark = pytest.mark.anyio
HANG = 2.0
BODY: dict[str, Any] = {"prompt": "Hi", "max_tokens": FOREVER, "ignore_eos": True}
CANARY: dict[str, Any] = {"prompt": "The canary", "max_tokens": 30, "ignore_eos": True, "temperature": 0}


async def follow(http: httpx.AsyncClient, running: asyncio.Semaphore) -> tuple[str, float]:
    """The end of a stream, and when it came."""
    async with http.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer:
        lines = []
        async for line in answer.aiter_lines():
            running.release()
            lines += [line] if line else []
    return "\n".join(lines[-2:]), time.monotonic()


async def wait_whole(http: httpx.AsyncClient) -> tuple[httpx.Response, float]:
    answer = await http.post("/v1/completions", json=BODY)
    return answer, time.monotonic()


async def watch_health(http: httpx.AsyncClient) -> list[tuple[float, int]]:
    """(time, status) of /health until the server is gone, where it is 0."""
    seen = []
    while not seen or seen[-1][1]:
        try:
            status = (await http.get("/health")).status_code
        except httpx.TransportError:
            status = 0
        seen.append((time.monotonic(), status))
        await asyncio.sleep(0.02)
    return seen


def ask_marked(server: ServerProcess) -> asyncio.Future[httpx.Response]:
    """Send the request that the planted fault is for, without waiting for its answer."""
    headers = {"x-request-id": "marked"}
    ask = partial(httpx.post, f"{server.url}/v1/completions", json=BODY, headers=headers)
    return asyncio.get_running_loop().run_in_executor(None, ask)


async def check_end(server: ServerProcess, strike: Callable[[], Any], *, patience: float) -> None:
    """Strike while three streams and an answer are under way: all of it must show in time, `patience` for a hang."""
    engine = server.engine_pid
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as http:
        running = asyncio.Semaphore(0)
        streams = [asyncio.create_task(follow(http, running)) for _ in range(3)]
        for _ in range(6):
            await running.acquire()
        whole = asyncio.create_task(wait_whole(http))
        await asyncio.to_thread(wait_for_load, server, running=4)
        health = asyncio.create_task(watch_health(http))
        struck = time.monotonic()
        strike()
        ends = await asyncio.gather(*streams)
        answer, answered = await whole
        seen = await health
    code = await asyncio.to_thread(server.process.wait, PATIENCE)
    assert time.monotonic() - struck < patience + 10
    assert code == 1
    assert not is_running(engine)
    assert all('"server_error"' in end and end.endswith("data: [DONE]") for end, _ in ends)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
    assert int(answer.headers["retry-after"]) > 0
    assert max(answered, *(moment for _, moment in ends)) - struck < patience + 5
    statuses = [status for _, status in seen]
    assert statuses == sorted(statuses, key=[200, 503, 0].index), "once dead, always dead"
    assert next(moment for moment, status in seen if status != 200) - struck < patience + 2
    assert "engine has died" in server.log


@pytest.mark.parametrize("kind", ["broken", "crash", "exit"])
async def test_engine_failing_for_every_request_ends_with_errors(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    with ServerProcess(tmp_path / "log", str(checkpoint), exit_code=1, faults=f"{kind}@marked") as server:
        await check_end(server, lambda: ask_marked(server), patience=0)


async def test_an_engine_that_hangs_in_a_step_is_ended_with_the_server(checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--engine-hang-timeout", str(HANG))
    with ServerProcess(tmp_path / "log", str(checkpoint), *flags, exit_code=1, faults="hang@marked") as server:
        await check_end(server, lambda: ask_marked(server), patience=HANG)


def test_hung_idle_engine_is_detected_and_killed(checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--engine-hang-timeout", str(HANG))
    with ServerProcess(tmp_path / "log", str(checkpoint), *flags, exit_code=1) as server:
        engine = server.engine_pid
        time.sleep(1.5 * HANG)
        assert httpx.get(f"{server.url}/health").status_code == 200, "idle is not hung"
        stopped = time.monotonic()
        os.kill(engine, signal.SIGSTOP)
        assert server.process.wait(PATIENCE) == 1
        assert time.monotonic() - stopped < HANG + 5
        assert not is_running(engine)
        assert "no progress for 2 s" in server.log


def test_slow_step_with_progress_is_not_a_hang(checkpoint: Path, tmp_path: Path) -> None:
    """A step may take longer than the hang timeout as long as its layers finish."""
    flags = ("--engine-hang-timeout", str(HANG))
    with ServerProcess(tmp_path / "log", str(checkpoint), *flags, faults="slow@slow") as server:
        started = time.monotonic()
        answer = httpx.post(
            f"{server.url}/v1/completions", json=BODY | {"max_tokens": 1}, headers={"x-request-id": "slow"},
            timeout=PATIENCE,
        )  # fmt: skip
        assert time.monotonic() - started > 1.1 * HANG
        assert answer.status_code == 200


async def test_a_dead_engine_is_started_again_as_often_as_allowed(checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--restart-engine", "1", "--dtype", "float32")
    with ServerProcess(tmp_path / "log", str(checkpoint), *flags, exit_code=1) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as http:
            expected = (await http.post("/v1/completions", json=CANARY)).json()["choices"]
            before = server.wait_until_idle()
            running = asyncio.Semaphore(0)
            stream = asyncio.create_task(follow(http, running))
            for _ in range(3):
                await running.acquire()
            first = server.engine_pid
            struck = time.monotonic()
            os.kill(first, signal.SIGKILL)
            end, ended = await stream
            assert '"server_error"' in end
            assert ended - struck < 5
            while "engine_restarting" not in (ready := await http.get("/ready")).text:
                assert time.monotonic() - struck < 2
            refused = await http.post("/v1/completions", json=CANARY)
            for answer in (refused, ready):
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_restarting")
                assert int(answer.headers["retry-after"]) > 0
            assert (await http.get("/health")).status_code == 503
            meanwhile = server.metrics()
            while (await http.get("/ready")).status_code != 200:
                assert time.monotonic() - struck < PATIENCE
                await asyncio.sleep(0.05)
            after = server.metrics()
            for name, value in before.items():
                if name[0].endswith(("_total", "_count", "_sum")):
                    assert value <= meanwhile[name] <= after[name], name
            assert after.engine_restarts_total == 1
            assert after.num_requests_running == meanwhile.num_requests_running == 0
            assert (await http.get("/health")).status_code == 200
            assert (await http.post("/v1/completions", json=CANARY)).json()["choices"] == expected
            assert server.wait_until_idle().generation_tokens_total >= before.generation_tokens_total + 30
        second = server.engine_pid
        assert second != first
        os.kill(second, signal.SIGKILL)
        assert server.process.wait(PATIENCE) == 1
        assert not any(map(is_running, (first, second)))


def test_server_waiting_to_restart_its_engine_can_be_stopped(checkpoint: Path, tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", str(checkpoint), "--restart-engine", "5") as server:
        os.kill(server.engine_pid, signal.SIGKILL)
        wait_for(lambda: "engine_restarting" in httpx.get(f"{server.url}/ready").text, "the death to show")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert "is serving again" not in server.log, "it did not wait for that"
        assert not children(server.process.pid)
