"""Real clients, each in an environment of its own: a program in `programs/` is one test of several attempts."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.checkpoints import write_long_demo, write_rambler
from support.client_environments import node_environment, python_environment, version
from support.dialogues import FOLDER
from support.serving import ServerProcess, environment

PROGRAMS = Path(__file__).parent / "programs"
NAMES = ("--served-model-name", "pyllm-demo", "--served-model-name", "claude-*")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # installing a client counts too


@dataclass(frozen=True)
class Client:
    """A client, the program that tries it, and what it needs.

    Attributes:
        package: whose version the table shows.
        program: in `programs/`.
        language: of the environment: `python` or `node`.
        group: of packages, in versions.toml.
        server: `demo` answers sensibly, `rambler` has room and speed for long prompts, `reasoner` reasons.
        replicas: whether there is a second server.
    """

    package: str
    program: str
    language: str
    group: str
    server: str = "demo"
    replicas: bool = False

    def __str__(self) -> str:
        return self.program.partition(".")[0] + (f"-{self.group}" if self.replicas else "")


CLIENTS = [
    Client("litellm", "litellm_sdk.py", "python", "litellm"),
    Client("litellm", "litellm_proxy.py", "python", "litellm"),
    Client("pydantic-ai-slim", "pydantic_ai_models.py", "python", "agents"),
    Client("pydantic-ai-slim", "pydantic_ai_reasoning.py", "python", "agents", server="reasoner"),
    Client("openai-agents", "openai_agents.py", "python", "agents"),
    Client("huggingface_hub", "huggingface.py", "python", "agents"),
    Client("anthropic", "claude_agent.py", "python", "agents"),
    Client("instructor", "instructor_modes.py", "python", "instructor"),
    Client("lm-eval", "lm_eval_tasks.py", "python", "measuring"),
    Client("guidellm", "guidellm_run.py", "python", "measuring"),
    Client("vllm-router", "routers.py", "python", "vllm_router", replicas=True),
    Client("sglang-router", "routers.py", "python", "sglang_router", replicas=True),
    Client("ai", "ai_sdk.mjs", "node", "ai"),
    Client("ai", "ai_sdk_reasoning.mjs", "node", "ai", server="reasoner"),
    Client("promptfoo", "promptfoo.py", "node", "promptfoo"),
    Client("@openai/codex", "codex.py", "node", "codex", server="rambler"),
]
KV_ROUTER = Client("vllm-router", "kv_router.py", "python", "vllm_router")
COMMANDS = {"lm_eval_tasks.py", "guidellm_run.py", "routers.py", "kv_router.py", "promptfoo.py", "codex.py"}
"""Programs that start the client as a command, and run in the environment of the tests."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def demo(folder: Path) -> Iterator[ServerProcess]:
    (folder / "demo").mkdir()
    write_long_demo(folder / "demo", 65536)
    with ServerProcess(folder / "demo.log", str(folder / "demo"), *NAMES) as process:
        yield process


@pytest.fixture(scope="module")
def replica(folder: Path, demo: ServerProcess) -> Iterator[ServerProcess]:
    with ServerProcess(folder / "replica.log", str(folder / "demo"), *NAMES) as process:
        yield process


@pytest.fixture(scope="module")
def rambler(folder: Path) -> Iterator[ServerProcess]:
    (folder / "rambler").mkdir()
    write_rambler(folder / "rambler", 65536)
    with ServerProcess(folder / "rambler.log", str(folder / "rambler"), *NAMES) as process:
        yield process


@pytest.fixture(scope="module")
def reasoner(folder: Path) -> Iterator[ServerProcess]:
    greedy = ("--override-generation-config", '{"temperature": 0}')
    with ServerProcess(folder / "reasoner.log", str(FOLDER / "agentic"), *NAMES, *greedy) as process:
        yield process


@pytest.mark.parametrize("client", CLIENTS, ids=str)
def test_client(client: Client, request: pytest.FixtureRequest, report: Callable[..., None]) -> None:
    server: ServerProcess = request.getfixturevalue(client.server)
    variables = {"PYLLM_URL": server.url}
    if client.replicas:
        variables["PYLLM_REPLICAS"] = f"{server.url} {request.getfixturevalue('replica').url}"
    run(client, variables, report)
    server.wait_until_idle()


@pytest.mark.needs("pyzmq")
def test_a_router_that_follows_the_caches(folder: Path, report: Callable[..., None]) -> None:
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(4)]
    places = [f"tcp://127.0.0.1:{port}" for port in ports]
    pairs = [places[:2], places[2:]]
    with contextlib.ExitStack() as stack:
        urls = []
        for events, replay in pairs:
            config = {
                "enable_kv_cache_events": True, "endpoint": events, "replay_endpoint": replay, "event_encoding": "map"
            }  # fmt: skip
            log = folder / f"events-{len(urls)}.log"
            urls.append(stack.enter_context(ServerProcess(log, "--kv-events-config", json.dumps(config))).url)
        variables = {"PYLLM_REPLICAS": " ".join(urls), "PYLLM_EVENTS": " ".join(",".join(pair) for pair in pairs)}
        run(KV_ROUTER, variables, report)


def run(client: Client, variables: dict[str, str], report: Callable[..., None]) -> None:
    """Run a client's program in its environment; none of its attempts may fail."""
    environments = {"python": python_environment, "node": node_environment}
    home = environments[client.language](client.group)
    variables |= {
        "CLIENT_FOLDER": str(home), "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "PYTHONOPTIMIZE": "",  # the programs check with asserts
    }  # fmt: skip
    if client.program.endswith(".mjs"):
        interpreter = shutil.which("node") or "node"
    else:
        interpreter = sys.executable if client.program in COMMANDS else str(home / "bin" / "python")
    done = subprocess.run(
        [interpreter, str(PROGRAMS / client.program)], capture_output=True, text=True, timeout=850, check=False,
        env=environment() | variables,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"tried"')]
    for line in lines:
        report(client.package, version(client.package), line["tried"], line["error"])
    assert lines, done.stderr
    failed = [f"{line['tried']}: {line['error']}" for line in lines if line["error"]]
    assert not failed, "\n".join(failed)
    assert done.returncode == 0, done.stderr
