"""The life of an engine process: start, death, shutdown, and what a client must not import."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.async_engines import ENDLESS, config, read, start, until

from pyllm import SamplingParams
from pyllm.engine.client.async_engine import AsyncEngine
from pyllm.engine.errors import EngineDeadError, EngineStartError
from pyllm.model.tokenizer import Tokenizer

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True, scope="module")
def _one_thread_in_the_engine() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"


def children() -> set[int]:
    """Processes that this one has started and that are not gone (a zombie is not gone)."""
    lists = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for file in lists for pid in file.read_text().split()}


def processes() -> set[int]:
    return {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}


async def test_a_killed_engine_fails_everyone_within_two_seconds(tiny_checkpoint):
    before = children()
    engine = await start(tiny_checkpoint)
    (pid,) = children() - before
    streams = [engine.submit(str(i), [5] * 10, ENDLESS) for i in range(3)]
    for stream in streams:
        await anext(stream)
    # One stream is read all along, one later, and one never.
    reader = asyncio.create_task(read(streams[0]))
    watcher = asyncio.create_task(engine.wait_dead())
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="engine process"):
        await asyncio.wait_for(reader, 2)
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(read(streams[1]), 2)
    assert "engine process" in await asyncio.wait_for(watcher, 2)
    assert not engine.is_alive
    with pytest.raises(EngineDeadError):
        engine.submit("late", [5], SamplingParams())
    for stream in streams:
        stream.abort()
    await engine.shutdown()
    await engine.shutdown()
    assert children() == before


async def test_shutdown_ends_running_requests_and_leaves_no_child(tiny_checkpoint):
    before = children()
    engine = await start(tiny_checkpoint)
    (pid,) = children() - before
    stream = engine.submit("r", [5] * 10, ENDLESS)
    await anext(stream)
    started = time.monotonic()
    await engine.shutdown()
    assert time.monotonic() - started < 4, "it ended when asked to, and was not killed"
    assert children() == before
    assert pid not in processes()
    with pytest.raises(EngineDeadError, match="shutting down"):
        await read(stream)
    with pytest.raises(EngineDeadError):
        engine.submit("late", [5], SamplingParams())


async def test_failed_engine_start_gives_a_reason_and_no_child(tiny_checkpoint, tmp_path):
    before = children()
    tokenizer = Tokenizer.from_folder(tiny_checkpoint)
    with pytest.raises(EngineStartError, match=r"config\.json") as failure:
        await AsyncEngine.start(config(tmp_path), tokenizer)
    assert "\n" not in str(failure.value)
    assert children() == before


async def test_a_cancelled_start_leaves_no_child(tiny_checkpoint):
    before = children()
    starting = asyncio.create_task(start(tiny_checkpoint))
    await until(lambda: bool(children() - before))
    await asyncio.sleep(0.2)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert children() == before


async def test_files_in_the_users_folder_are_not_taken_for_modules(tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("raise SystemExit('a file of the user was run')")
    monkeypatch.chdir(tmp_path)
    engine = await start(tiny_checkpoint)
    await engine.shutdown()


PROGRAM = """
import asyncio, sys
from pyllm.engine.client.async_engine import AsyncEngine
from pyllm.engine.config import EngineConfig
from pyllm.engine.messages import SamplingParams
from pyllm.model.tokenizer import Tokenizer

async def main():
    asyncio.get_running_loop().slow_callback_duration = 60  # a busy machine is no fault
    folder = sys.argv[1]
    config = EngineConfig(model=folder, device="cpu", quiet=True, num_kv_blocks=50)
    engine = await AsyncEngine.start(config, Tokenizer.from_folder(folder))
    stream = engine.submit("r", [5], SamplingParams(max_tokens=3, ignore_eos=True))
    print(sum([len(output.token_ids) async for output in stream]))
    engine.submit("cut", [5], SamplingParams(max_tokens=200, ignore_eos=True))
    await engine.shutdown()

asyncio.run(main())
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "safetensors"}))
"""


def test_client_needs_no_torch_and_ends_cleanly(tiny_checkpoint):
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM, str(tiny_checkpoint)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert (done.returncode, done.stdout.split("\n"), done.stderr) == (0, ["3", "[]", ""], "")
