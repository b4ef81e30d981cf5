"""The server of a replica: a real one, started, watched and stopped as Ray's process does it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from support.fleets import arguments
from support.serving import children, is_running, wait_for

from pyllm.server.replicas.child import ReplicaStartError, ServerChild
from pyllm.server.replicas.relay import fetch


def test_a_server_is_ready_pinned_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("PYLLM_PORT", "not a port")  # its settings come from the file alone

    async def run() -> None:
        child = ServerChild({"served_model_name": ["mine"], "max_num_seqs": 2, "api_key": ["secret"]}, 1)
        await child.wait_ready()
        await child.check()
        assert os.listdir(os.path.dirname(child.socket)) == ["http"], "no file with the key is left"
        status, _ = await fetch(child.socket, "/v1/models")
        assert status == 401
        assert len(os.sched_getaffinity(child.pid)) == 1
        (engine,) = children(child.pid)
        assert "secret" not in " ".join(arguments(child.pid))
        os.kill(engine, signal.SIGKILL)
        with pytest.raises((RuntimeError, OSError)):
            await _check_for_long(child)
        await child.stop(30)
        assert not child.is_alive
        assert [name for name in os.listdir(tmp_path) if not name.startswith("pyllm-cores")] == []

    asyncio.run(run())


async def _check_for_long(child: ServerChild) -> None:
    while True:
        await child.check()


def test_stopping_ends_the_server_and_its_engine() -> None:
    async def run() -> list[int]:
        child = ServerChild({}, 0)
        await child.wait_ready()
        below = [child.pid, *children(child.pid)]
        await child.stop(30)
        return below

    below = asyncio.run(run())
    assert len(below) == 2
    wait_for(lambda: not any(map(is_running, below)), "the engine to end")


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    async def run() -> None:
        await ServerChild({"model": str(tmp_path / "none")}, 0).wait_ready()

    with pytest.raises(ReplicaStartError, match=str(tmp_path / "none")):
        asyncio.run(run())
