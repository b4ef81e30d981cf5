"""The official clients for Node. Skipped where they cannot be had."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.checkpoints import TINY
from support.client_environments import UnavailableError, node_environment
from support.components import missing
from support.serving import PATIENCE, ServerProcess, environment

from pyllm.model.cpu.backend import available

pytestmark = pytest.mark.needs("node", "npm")
SCRIPTS = sorted(path for path in (Path(__file__).parent / "node").glob("*.mjs") if path.stem != "client")
ANTHROPIC = Path(__file__).parents[1] / "clients" / "programs" / "anthropic_sdk.mjs"


def installed(package: str) -> Path:
    """A folder in which the client is installed; it stays, so that only the first run waits for it."""
    try:
        return node_environment(package, timeout=120)
    except UnavailableError as error:
        missing(str(error)[-300:])


def run(script: Path, **variables: str) -> None:
    command = ["node", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=environment() | variables, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_the_node_client(server: ServerProcess, script: Path) -> None:
    package, bits = installed("openai"), str(available(TINY)).lower()
    run(script, OPENAI_FOLDER=str(package), OPENAI_BASE_URL=f"{server.url}/v1", EQUAL_BITS=bits)
    server.wait_until_idle()


def test_anthropics_node_client(demo: ServerProcess) -> None:
    run(ANTHROPIC, CLIENT_FOLDER=str(installed("anthropic")), PYLLM_URL=demo.url)
    demo.wait_until_idle()
