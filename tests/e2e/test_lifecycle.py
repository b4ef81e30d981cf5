"""How a server ends: by a signal, with its streams whole; or because its engine has died, and everyone hears of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from support.serving import (
    FOREVER,
    PATIENCE,
    ServerProcess,
    children,
    environment,
    is_running,
    posted,
    wait_for,
    wait_for_load,
)
from support.warm import Process


def connect(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


def stream_of(client: Any, max_tokens: int) -> Any:
    return client.completions.create(
        model="tiny", prompt="Hi", max_tokens=max_tokens, stream=True, extra_body={"ignore_eos": True}
    )


@pytest.mark.anyio
async def test_streams_finish_whole_when_the_server_is_asked_to_stop(checkpoint: Path, tmp_path: Path) -> None:
    lengths = [800] + 15 * [200]
    body = {"prompt": "Hi", "ignore_eos": True}
    streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
    with ServerProcess(tmp_path / "log", str(checkpoint), "--dtype", "float32", "--shutdown-timeout", "200") as server:
        engine = server.engine_pid
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as http:
            started = asyncio.Semaphore(0)

            async def follow(tokens: int) -> list[str]:
                async with http.stream("POST", "/v1/completions", json=streamed | {"max_tokens": tokens}) as answer:
                    lines = []
                    async for line in answer.aiter_lines():
                        if not lines:
                            started.release()
                        lines += [line] if line else []
                    return lines

            tasks = [asyncio.create_task(follow(tokens)) for tokens in lengths]
            for _ in range(16):
                await started.acquire()
            server.process.send_signal(signal.SIGTERM)
            while (ready := await http.get("/ready")).status_code == 200:
                pass
            refused = await http.post("/v1/completions", json=body)
            for _ in range(5):
                await asyncio.sleep(0.02)
                assert (await http.get("/health")).status_code == 200, "it is alive while it drains"
            assert not all(task.done() for task in tasks)
            for answer in (ready, refused):
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "shutting_down"
                assert int(answer.headers["retry-after"]) > 0
            for tokens, lines in zip(lengths, await asyncio.gather(*tasks), strict=True):
                assert lines[-1] == "data: [DONE]"
                assert json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] == tokens
                assert '"finish_reason":"length"' in lines[-3]
        assert server.process.wait(PATIENCE) == 0
    assert not is_running(engine)


def test_a_second_signal_stops_at_once(checkpoint: Path, tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", str(checkpoint), exit_code=1) as server, connect(server) as client:
        engine = server.engine_pid
        stream = iter(stream_of(client, FOREVER))
        assert len(list(islice(stream, 3))) == 3
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 503, "the server to drain")
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises((openai.APIError, httpx.TransportError)):
            list(stream)
        assert server.process.wait(PATIENCE) == 1
    assert not is_running(engine)


def test_engine_death_fails_all_requests_and_ends_the_server(checkpoint: Path, tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", str(checkpoint), exit_code=1) as server, connect(server) as client:
        with client.completions.with_streaming_response.create(
            model="tiny", prompt="Hi", max_tokens=FOREVER, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            lines = (line for line in stream.iter_lines() if line)
            assert "error" not in next(lines)
            os.kill(server.engine_pid, signal.SIGKILL)
            last = list(lines)[-2:]
        assert '"error"' in last[0]
        assert '"server_error"' in last[0]
        assert last[1] == "data: [DONE]"

        def health() -> int:
            try:
                return httpx.get(f"{server.url}/health").status_code
            except httpx.TransportError:
                return 0

        assert health() in (503, 0), "the engine's death shows, unless the server has ended already"
        assert server.process.wait(PATIENCE) == 1
        assert "engine has died" in server.log


def test_idle_server_reports_engine_death_then_ends(checkpoint: Path, tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", str(checkpoint), exit_code=1) as server:
        with httpx.Client(base_url=server.url) as http:
            os.kill(server.engine_pid, signal.SIGKILL)
            statuses = []
            try:
                while len(statuses) < 100_000:
                    statuses.append(http.get("/health").status_code)
            except httpx.TransportError:
                pass
        assert set(statuses) <= {200, 503}
        assert statuses[-1] == 503, "there is time to ask before it is gone"
        assert statuses == sorted(statuses), "once dead, always dead"
        assert server.process.wait(PATIENCE) == 1


def test_the_engine_ends_with_a_server_that_is_killed(checkpoint: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ServerProcess(log, str(checkpoint), exit_code=-9, cold=True) as server, connect(server) as client:
        engine = server.engine_pid
        with stream_of(client, FOREVER) as stream:
            next(iter(stream))
            server.process.kill()
            assert server.process.wait(PATIENCE) == -9
        wait_for(lambda: not is_running(engine), "the orphaned engine to end")


Environments = tuple[dict[str, str], list[dict[str, str]]]
"""What a user sets of the environment, and then the environments of the API process and of the engine."""


TUNABLES = "glibc.malloc.tcache_max=128"
SET = {"OMP_WAIT_POLICY": "active", "PYTHONMALLOC": "pymalloc", "GLIBC_TUNABLES": "glibc.malloc.tcache_max=256"}


@pytest.fixture(scope="module", params=[{}, SET], ids=["", "set"])
def environments(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Environments:
    if not Path("/proc/self/environ").exists():
        pytest.skip("a process's environment is read from Linux's /proc")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "MALLOC_ARENA_MAX", "PYTHONMALLOC", "GLIBC_TUNABLES"):
            patch.delenv(name, raising=False)
        for name, value in request.param.items():
            patch.setenv(name, value)
        with ServerProcess(tmp_path_factory.mktemp("variables") / "log", str(checkpoint), cold=True) as server:
            texts = [Path(f"/proc/{pid}/environ").read_bytes() for pid in (server.process.pid, server.engine_pid)]
    return request.param, [dict(one.split("=", 1) for one in text.decode().split("\0") if one) for text in texts]


def test_engine_threads_spin_briefly_and_share_one_heap(environments: Environments) -> None:
    """Both are defaults: the user's own environment variables win."""
    chosen, (_, engine) = environments
    assert ("GOMP_SPINCOUNT" in engine) == ("OMP_WAIT_POLICY" not in chosen)
    assert engine["MALLOC_ARENA_MAX"] == "1", "threads' own heaps grow for long under mixed load"


def test_only_the_api_process_has_the_system_allocator(environments: Environments) -> None:
    """Python's own keeps most of the memory that a burst of large requests has taken; the user's choice wins."""
    chosen, found = environments
    mine = chosen.get("PYTHONMALLOC")
    assert [one.get("PYTHONMALLOC") for one in found] == ([mine, mine] if mine else ["malloc", None])
    cache = chosen.get("GLIBC_TUNABLES")
    assert [one.get("GLIBC_TUNABLES") for one in found] == ([cache, cache] if mine else [TUNABLES, None])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_sigkill_leaves_no_process_no_port_no_waiting_client(checkpoint: Path, tmp_path: Path) -> None:
    port = free_port()
    for n in range(3):
        log = tmp_path / f"log{n}"
        with ServerProcess(log, str(checkpoint), port=port, exit_code=-9, cold=n > 0) as server:
            with contextlib.ExitStack() as stack:
                # The process that tries grammars is a child of the engine.
                regex = {"structured_outputs": {"regex": "[a-z]{8000}"}}
                connections = [stack.enter_context(posted(server, stream=True, **regex)) for _ in range(4 if n else 0)]
                wait_for_load(server, running=len(connections))
                engine = server.engine_pid
                family = [engine, *children(engine), *children(server.process.pid)]
                assert len(set(family)) > bool(connections), "there is an engine, and where it works more"
                killed = time.monotonic()
                server.process.kill()
                for connection in connections:
                    connection.settimeout(10)
                    with contextlib.suppress(ConnectionResetError):
                        while connection.recv(65536):
                            pass
                assert time.monotonic() - killed < 10
            assert server.process.wait(PATIENCE) == -9
            wait_for(lambda running=family: not any(map(is_running, running)), "all its processes to end")
            assert time.monotonic() - killed < 10


def test_shutdown_timeout_reports_unfinished_requests(checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--shutdown-timeout", "0.5")
    with ServerProcess(tmp_path / "log", str(checkpoint), *flags) as server, connect(server) as client:
        engine = server.engine_pid
        stream = iter(stream_of(client, FOREVER))
        assert len(list(islice(stream, 3))) == 3
        asked = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="engine has stopped"):
            list(stream)
        assert server.process.wait(PATIENCE) == 0
        assert 0.5 < time.monotonic() - asked < 5
    assert not is_running(engine)


def test_shutdown_answers_a_request_with_an_unsent_body(checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--shutdown-timeout", "0.5", "--dtype", "float32")
    with ServerProcess(tmp_path / "log", str(checkpoint), *flags) as server:
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port), PATIENCE) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 200, "the request to be read after")
            server.process.send_signal(signal.SIGTERM)
            answer = connection.makefile("rb").read()
    assert b"HTTP/1.1 503 " in answer
    assert b'"code":"shutting_down"' in answer


def test_a_log_that_is_not_read_stops_nothing(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "pyllm", "serve", str(checkpoint), "--dtype", "float32", "--port", "0"]
    with Process(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            assert process.stderr
            url = next(line.split()[-1] for line in process.stderr if "Ready after" in line)
            with httpx.Client(base_url=url.removesuffix("/v1"), timeout=PATIENCE) as client:
                for n in range(600):  # more than 64 KiB of lines, and then some
                    assert client.get("/version", headers={"x-request-id": f"{n:128}".replace(" ", "-")}).is_success
                assert client.get("/health").status_code == 200
                assert "pyllm:log_lines_dropped_total" in client.get("/metrics").text
            process.terminate()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
