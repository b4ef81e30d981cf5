"""The official client for Node: each script in `node/` is one test. Skipped where it cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.checkpoints import TINY
from support.serving import PATIENCE, ServerProcess, environment

from pyllm.model.cpu.backend import available

VERSION = "7.57.0"
SCRIPTS = sorted(path for path in (Path(__file__).parent / "node").glob("*.mjs") if path.stem != "client")


@pytest.fixture(scope="module")
def package() -> Path:
    """A folder in which the client is installed; it stays, so that only the first run waits for it."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "pyllm-tests" / f"node-openai-{VERSION}"
    if not (folder / "node_modules" / "openai" / "package.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [npm, "install", "--no-package-lock", "--no-save", "--no-audit", "--no-fund", f"openai@{VERSION}"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip("npm could not fetch the openai package in time")
        if done.returncode != 0:
            pytest.skip(f"npm could not install openai@{VERSION}: {done.stderr[-300:]}")
    return folder


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_the_node_client(package: Path, server: ServerProcess, script: Path) -> None:
    variables = {"OPENAI_FOLDER": str(package), "OPENAI_BASE_URL": f"{server.url}/v1",
                 "EQUAL_BITS": str(available(TINY)).lower()}  # fmt: skip
    command = [shutil.which("node") or "node", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=environment() | variables, check=False
    )
    assert done.returncode == 0, done.stderr
    server.wait_until_idle()
