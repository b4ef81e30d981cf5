"""No check of the product depends on an `assert`: all these tests also run, as `.ci/run` does, under PYTHONOPTIMIZE=1.

That takes the asserts out of the product, in this process and in every server and engine that is started; those of
the tests stay, for pytest rewrites them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
import pytest
from support import serving
from support.hostile import canary
from support.serving import PATIENCE, ServerProcess, children

JSON_OBJECT = {"type": "json_object"}


def test_asserts_in_tests_and_support_always_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="assert 1 == 2"):
        assert int("1") == 2
    monkeypatch.setattr(serving, "PATIENCE", 0)
    with pytest.raises(AssertionError, match="timed out waiting for it"):
        serving.wait_for(lambda: False, "it")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="environments are read from Linux's /proc")
def test_server_under_optimize_answers_the_same(
    demo: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine process inherits -O, and no answer depends on an assert."""
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    with ServerProcess(tmp_path / "log", cold=True) as server:
        for pid in (server.process.pid, server.engine_pid):
            assert b"PYTHONOPTIMIZE=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert canary(server.url) == canary(demo.url)
        wrong = httpx.post(f"{server.url}/v1/completions", json={"prompt": [10**6]})
        assert wrong.status_code == 400


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="command lines are read from Linux's /proc")
@pytest.mark.parametrize(("options", "expected"), [("", "-P"), ("-O", "-PO"), ("-OO -E", "-POOE"), ("-I", "-PEs")])
def test_every_process_of_a_server_has_its_interpreters_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, expected: str
) -> None:
    """Those that take asserts out, and those that keep the user's own modules out: -I is -P, -E and -s together."""
    for name in ("PYTHONOPTIMIZE", "PYTHONNOUSERSITE"):
        monkeypatch.delenv(name, raising=False)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" {options} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with ServerProcess(tmp_path / "log", cold=True) as server:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "response_format": JSON_OBJECT}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE).status_code == 200
        (engine,) = children(server.process.pid)
        (checker,) = children(engine)
        for pid in (engine, checker):
            _, *words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            assert words[: words.index("-m")] == [expected]
