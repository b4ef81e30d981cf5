"""Trace one streamed chat through both processes of a real server and list the modules in which a function ran.

python tests/support/request_path.py    # one module a line, the server's process first
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import httpx

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.serving import ServerProcess, wait_for

ROOT = Path(__file__).resolve().parents[2]
BODY = {"messages": [{"role": "user", "content": "Which day comes after Sunday?"}], "max_tokens": 12, "stream": True}


def modules_of_a_chat() -> dict[str, list[str]]:
    """The modules that ran, as paths from the root, in the `server` process and in the `engine` process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hook = str(Path(__file__).parent / "traced")
        paths = os.pathsep.join(filter(None, (hook, os.environ.get("PYTHONPATH"))))
        extra = {"PYTHONPATH": paths, "PYLLM_TRACE_FOLDER": name}
        with ServerProcess(folder / "log", cold=True, **extra) as server:
            _chat(server)  # what runs only once is not on every request's way
            pids = {"server": server.process.pid, "engine": server.engine_pid}
            (folder / "on").touch()
            wait_for(lambda: all((folder / f"{pid}.ready").exists() for pid in pids.values()), "recording to begin")
            _chat(server)
            (folder / "on").unlink()
            files = {name: folder / f"{pid}.modules" for name, pid in pids.items()}
            wait_for(lambda: all(file.exists() for file in files.values()), "the lists of modules")
            return {name: _product_modules(file.read_text().split("\n")) for name, file in files.items()}


def _chat(server: ServerProcess) -> None:
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=BODY, timeout=60) as answer:
        text = answer.read().decode()
    assert answer.status_code == 200, text
    assert text.rstrip().endswith("data: [DONE]"), text


def _product_modules(files: list[str]) -> list[str]:
    """Files of the product as paths from the root; `__init__.py` does not count."""
    names = [Path(file).resolve().relative_to(ROOT) for file in files if Path(file).resolve().is_relative_to(ROOT)]
    return [name.as_posix() for name in names if name.parts[0] in ("server", "engine", "model")
            and name.name != "__init__.py"]  # fmt: skip


if __name__ == "__main__":
    for process, modules in modules_of_a_chat().items():
        print(f"{process}: {len(modules)}", *modules, sep="\n  ")
