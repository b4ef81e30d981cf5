"""Build the image, and try it: run it as hardened as the docs say, and ask it a question.

python docker/build.py cpu --torch-index URL --try      # with docker, or with podman if there is no docker
python docker/build.py cpu --base debootstrap --try     # on Debian's own packages instead of an image from a registry
python docker/build.py cuda --tag REGISTRY/pyllm:1.2-cuda --push

`--engine` names another program that takes docker's arguments, with options of its own:
`--engine "podman --storage-driver vfs"`. `--build-option` and `--run-option` pass one more word to its build and run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SUITE = "bookworm"
DEBIAN = f"localhost/pyllm-base:{SUITE}"
HARDENED = (
    "--read-only", "--tmpfs=/tmp", "--cap-drop=all", "--security-opt=no-new-privileges", "--pids-limit=1024",
)  # fmt: skip
QUESTION, ANSWER = "What is the capital of Italy?", "Rome"
START_SECONDS, STOP_SECONDS = 300, 40


def run(*words: str, quiet: bool = False) -> str:
    """Run a command; return what it prints, or end with its error."""
    if not quiet:
        print("+", shlex.join(words), flush=True)
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE if quiet else None, text=True, check=False)
    if done.returncode:
        sys.exit(f"{words[0]} failed with exit code {done.returncode}.")
    return (done.stdout or "").strip()


def make_base(engine: list[str]) -> str:
    """Make a base image of Debian's packages, unless there is one; return its name."""
    have = subprocess.run([*engine, "image", "inspect", DEBIAN], capture_output=True, check=False)
    if have.returncode:
        with tempfile.TemporaryDirectory() as folder:
            run("debootstrap", "--variant=minbase", "--include=python3,python3-venv", SUITE, f"{folder}/root")
            run("tar", "--create", f"--directory={folder}/root", f"--file={folder}/root.tar", ".")
            run(*engine, "import", f"{folder}/root.tar", DEBIAN)
    return DEBIAN


def revision() -> str:
    """The commit of the checkout; with a mark if the files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip()


def build(engine: list[str], options: argparse.Namespace) -> None:
    """Build the target, with labels that say what it was made of."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    arguments = {"VERSION": version, "REVISION": revision(), "CREATED": created}
    if options.base:
        arguments["BASE"] = make_base(engine) if options.base == "debootstrap" else options.base
    arguments |= {"TORCH_INDEX": options.torch_index} if options.torch_index else {}
    arguments |= {"EXTRAS": options.extras} if options.extras else {}
    words = [*engine, "build", "--file=docker/Dockerfile", f"--target={options.target}"]
    if Path(engine[0]).name == "podman":
        words.append("--format=docker")  # its own format has no health check
    words += [f"--tag={tag}" for tag in options.tag]
    words += [f"--build-arg={name}={value}" for name, value in arguments.items()]
    if options.pip_config:
        words.append(f"--secret=id=pip,src={Path(options.pip_config).resolve()}")
    run(*words, *options.build_option, ".")


def free_port() -> int:
    """A port on which no program listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def ask(url: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """Send a request; return the status, 0 if there is no answer, and the JSON."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except OSError:
        return 0, {}


def wait_until_ready(engine: list[str], name: str, url: str) -> None:
    """Wait for /ready; end with the container's log if it stops or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while ask(f"{url}/ready")[0] != 200:
        state = run(*engine, "inspect", "--format={{.State.Running}}", name, quiet=True)
        if state != "true" or time.monotonic() > deadline:
            run(*engine, "logs", name)
            sys.exit("The container does not serve.")
        time.sleep(0.5)


def attempt(engine: list[str], options: argparse.Namespace) -> None:
    """Start the image as a container, ask its demo model a question, check its health, and stop it."""
    name, port = f"pyllm-try-{os.getpid()}", free_port()
    url = f"http://127.0.0.1:{port}"
    words = [*engine, "run", "--detach", f"--name={name}", *HARDENED, f"--publish=127.0.0.1:{port}:{port}"]
    # Not the usual port, which the health check must find, and a variable as Kubernetes sets it for a Service `pyllm`.
    words += [f"--env=PYLLM_PORT={port}", "--env=PYLLM_SERVICE_HOST=10.0.0.1", *options.run_option, options.tag[0]]
    try:
        begun = time.monotonic()
        run(*words, quiet=True)
        wait_until_ready(engine, name, url)
        ready = time.monotonic() - begun
        messages = [{"role": "user", "content": QUESTION}]
        status, answer = ask(f"{url}/v1/chat/completions", {"messages": messages, "temperature": 0})
        text = answer["choices"][0]["message"]["content"] if status == 200 else str(answer)
        if ANSWER not in text:
            sys.exit(f"{QUESTION} was answered with status {status}: {text}")
        run(*engine, "exec", name, "python", "/opt/pyllm/healthcheck.py")
        user = run(*engine, "exec", name, "id", quiet=True)
        run(*engine, "stop", f"--time={STOP_SECONDS}", name, quiet=True)
        code = run(*engine, "inspect", "--format={{.State.ExitCode}}", name, quiet=True)
        run(*engine, "logs", name)
        if code != "0":
            sys.exit(f"The server ended with exit code {code}.")
    finally:
        subprocess.run([*engine, "rm", "--force", name], capture_output=True, check=False)
    size = int(run(*engine, "image", "inspect", "--format={{.Size}}", options.tag[0], quiet=True))
    print(f"{options.tag[0]}: {size / 1e6:.0f} MB, ready after {ready:.1f} s as {user}")
    print(f"{QUESTION} {text}")


def main() -> None:
    """Build, then try and push if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["cpu", "cuda"])
    parser.add_argument("--tag", action="append", default=[], help="name of the image; repeat it for several")
    parser.add_argument("--base", help="base image, or `debootstrap` to make one of Debian's packages")
    parser.add_argument("--torch-index", help="package index with torch's build for CPUs")
    parser.add_argument("--extras", help="extras of the package to install, such as ray")
    parser.add_argument("--pip-config", help="a pip.conf for the build, which is not in the image")
    parser.add_argument("--engine", help="program that takes docker's arguments (default: docker, else podman)")
    parser.add_argument("--build-option", action="append", default=[], metavar="WORD")
    parser.add_argument("--run-option", action="append", default=[], metavar="WORD")
    parser.add_argument("--try", action="store_true", dest="attempt", help="run the image and ask it a question")
    parser.add_argument("--push", action="store_true", help="push every tag")
    options = parser.parse_args()
    options.tag = options.tag or [f"pyllm:{options.target}"]
    engine = shlex.split(options.engine or "") or ["docker" if shutil.which("docker") else "podman"]
    build(engine, options)
    if options.attempt:
        attempt(engine, options)
    for tag in options.tag if options.push else ():
        run(*engine, "push", tag)


if __name__ == "__main__":
    main()
