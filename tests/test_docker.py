"""The Dockerfile, the compose files and the script that builds images are right about the product and each other."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from pyllm.server.arguments import load_config, unknown_variables
from pyllm.server.flags import ServerConfig

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
TARGETS = ("cpu", "cuda")
COMPOSE = {
    "docker/compose.yaml": ("cpu", "gpu"),
    "docker/monitoring/compose.yaml": ("pyllm",),
}
"""The services of each compose file that are our server."""


def lint(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["hadolint", "-"], input=text, capture_output=True, text=True, check=False)


@pytest.mark.needs("hadolint")
def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = lint(DOCKERFILE)
    assert done.returncode == 0, done.stdout


@pytest.mark.needs("hadolint")
@pytest.mark.parametrize(
    ("rule", "old", "new"),
    [
        ("DL3006", "FROM ${BASE} AS runtime", "FROM python AS runtime"),
        ("DL3007", "FROM ${BASE} AS runtime", "FROM python:latest AS runtime"),
        ("DL3020", "COPY docker/healthcheck.py", "ADD docker/healthcheck.py"),
        ("DL3022", "COPY --from=build-cpu", "COPY --from=built-cpu"),
        ("DL3025", 'ENTRYPOINT ["pyllm", "serve", "--host", "0.0.0.0"]', "ENTRYPOINT pyllm serve --host 0.0.0.0"),
        ("DL3012", 'ENTRYPOINT ["pyllm"', 'HEALTHCHECK NONE\nENTRYPOINT ["pyllm"'),
        ("SC1072", 'if [ -z "$(find', 'if [ -z "$(find"'),
    ],
)
def test_hadolint_finds_a_planted_mistake(rule: str, old: str, new: str) -> None:
    assert old in DOCKERFILE
    done = lint(DOCKERFILE.replace(old, new))
    assert done.returncode == 1
    assert f" {rule} " in re.sub(r"\x1b\[\d+m", "", done.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_runs_as_a_user_and_says_what_it_is(target: str) -> None:
    _, _, rest = DOCKERFILE.partition(f"\nFROM runtime AS {target}\n")
    stage = re.split(r"^FROM ", rest, flags=re.MULTILINE)[0]
    assert stage.count(f"COPY --from=build-{target} /opt/pyllm /opt/pyllm\n") == 1
    assert re.findall(r"^USER (.*)$", stage, re.MULTILINE) == ["10001:10001"]
    labels = set(re.findall(r'org\.opencontainers\.image\.(\w+)="[^"]+"', stage))
    assert labels == {"title", "description", "licenses", "version", "revision", "created"}


def check_service(service: dict[str, Any], folder: Path) -> None:
    """A compose file's server has flags that it accepts, time to drain, and no rights that it does not need."""
    assert (folder / service["build"]["context"]).resolve() == ROOT
    assert service["build"]["dockerfile"] == "docker/Dockerfile"
    assert service["build"].get("target", TARGETS[-1]) in TARGETS
    variables = {name: str(value) for name, value in service["environment"].items() if value is not None}
    variables = {name: re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", value) for name, value in variables.items()}
    assert unknown_variables(dict.fromkeys(service["environment"], ""), ServerConfig, ()) == []
    config = load_config(ServerConfig, service.get("command", []), variables, program="pyllm serve", description="")
    mounts = [volume.rsplit(":", 2) for volume in service["volumes"]]
    assert config.model is None or [config.model, "ro"] in [words[-2:] for words in mounts]
    assert ["cache", "/home/pyllm/.cache"] in [words[-2:] for words in mounts]
    ports = [re.sub(r"\$\{\w+:-(\d+)\}", r"\1", port) for port in service["ports"]]
    assert ports == [f"127.0.0.1:{config.port}:{config.port}"]
    assert int(service["stop_grace_period"].removesuffix("s")) >= config.shutdown_timeout + 10
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"]


def services() -> dict[str, tuple[dict[str, Any], Path]]:
    """Our services, by file and name."""
    return {
        f"{path} {name}": (yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))["services"][name],
                           (ROOT / path).parent)
        for path, names in COMPOSE.items() for name in names
    }  # fmt: skip


@pytest.mark.parametrize("place", services())
def test_compose_files_are_right_about_the_server(place: str) -> None:
    check_service(*services()[place])


def test_the_gpu_starts_only_if_it_is_named() -> None:
    content = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    assert {name: service.get("profiles") for name, service in content["services"].items()} == {
        "cpu": None, "gpu": ["gpu"],
    }  # fmt: skip
    assert set(content["volumes"]) == {"cache"}
    (device,) = content["services"]["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("build", {"context": "..", "dockerfile": "docker/Dockerfile", "target": "gpu"}),
        ("command", ["/models"]),
        ("command", ["/model", "--devise=cpu"]),
        ("environment", {"PYLLM_PROT": "8000"}),
        ("environment", {"PYLLM_PORT": "${PYLLM_PORT:-8001}"}),
        ("ports", ["8000:8000"]),
        ("stop_grace_period", "60s"),
        ("read_only", False),
        ("cap_drop", []),
    ],
)
def test_a_mistake_in_a_compose_file_is_noticed(name: str, value: Any) -> None:
    service, folder = services()["docker/compose.yaml cpu"]
    changed = copy.deepcopy(service) | {name: value}
    with pytest.raises((AssertionError, ValueError)):
        check_service(changed, folder)


ENGINE = """
import os, pathlib, signal, subprocess, sys, time
words, folder = sys.argv[1:], pathlib.Path(__file__).parent
with open(folder / "calls", "a") as calls:
    print(*words, file=calls)
name = words[-1]
if words[0] == "run":
    given = dict(word.removeprefix("--env=").split("=", 1) for word in words if word.startswith("--env="))
    command = [sys.executable, "-m", "pyllm", "serve", *os.environ.get("TRY_FLAGS", "").split()]
    if not os.fork():  # the container's monitor
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        for number in (0, 1, 2):
            os.dup2(log, number)
        process = subprocess.Popen(command, env=os.environ | given, start_new_session=True)
        (folder / "pid").write_text(str(process.pid))
        (folder / "code").write_text(str(process.wait()))
    else:
        while not (folder / "pid").exists():
            time.sleep(0.05)
elif words[:2] == ["inspect", "--format={{.State.Running}}"]:
    print("false" if (folder / "code").exists() else "true")
elif words[:2] == ["inspect", "--format={{.State.ExitCode}}"]:
    print((folder / "code").read_text())
elif words[:2] == ["image", "inspect"]:
    print(1000000)
elif words[0] == "exec" and "python" in words:
    check = [sys.executable, "docker/healthcheck.py", (folder / "pid").read_text()]
    sys.exit(subprocess.run(check).returncode)
elif words[0] in ("stop", "rm") and (folder / "pid").exists() and not (folder / "code").exists():
    os.kill(int((folder / "pid").read_text()), signal.SIGTERM)
    while not (folder / "code").exists():
        time.sleep(0.05)
elif words[0] == "logs":
    print((folder / "log").read_text())
"""
"""A container engine without containers: it runs the server of this environment."""


def build(folder: Path, *words: str, **variables: str) -> tuple[int, str, list[str]]:
    """Run the script with that engine; its exit code, its output and the engine's commands."""
    (folder / "engine.py").write_text(textwrap.dedent(ENGINE), encoding="utf-8")
    command = [sys.executable, str(DOCKER / "build.py"), *words, "--engine", f"{sys.executable} {folder}/engine.py"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYLLM_")}
    done = subprocess.run(command, env=kept | variables, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr, (folder / "calls").read_text().splitlines()


def test_the_build_script_tries_the_image_and_pushes_it(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").touch()
    words = ("--tag", "r/pyllm:1-cpu", "--torch-index", "URL", "--pip-config", f"{tmp_path}/pip.conf", "--push")
    code, output, calls = build(tmp_path, "cpu", "--try", "--base", "mine", *words)
    assert code == 0, output
    assert "The capital of Italy is Rome." in output
    first, second = calls[0].split(), calls[1].split()
    assert first[:3] == ["build", "--file=docker/Dockerfile", "--target=cpu"]
    assert {"--tag=r/pyllm:1-cpu", "--build-arg=BASE=mine", "--build-arg=TORCH_INDEX=URL"} <= {*first}
    assert f"--secret=id=pip,src={tmp_path}/pip.conf" in first
    named = {word.split("=")[1] for word in first if word.startswith("--build-arg=")}
    assert named <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    assert second[0] == "run"
    assert {"--read-only", "--cap-drop=all", "--security-opt=no-new-privileges"} <= {*second}
    assert [call.split()[0] for call in calls[-4:]] == ["logs", "rm", "image", "push"]


def test_the_build_script_reports_a_server_that_does_not_start(tmp_path: Path) -> None:
    code, output, calls = build(tmp_path, "cuda", "--try", "--push", TRY_FLAGS="--max-model-len 100000")
    assert code == 1
    assert "--max-model-len 100000 is more than" in output
    assert "The container does not serve." in output
    assert [call.split()[0] for call in calls[-2:]] == ["logs", "rm"], "it pushes nothing"
