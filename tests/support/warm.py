"""Starts Python commands by forking a process that has loaded what they import.

A cold start of a server loads libraries for three seconds of processor time, and the tests start a hundred. Signals,
memory, and the interpreter's options are tested on cold starts.

python warm.py FD    # that process; each request that it reads from the socket is a command to run in a fork
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

LIBRARIES = (
    "anyio._backends._asyncio", "pyllm.engine.build", "pyllm.server.cli.bench", "pyllm.server.cli.run_batch",
    "pyllm.server.cli.terminal", "pyllm.server.serve",
)  # fmt: skip
PR_SET_CHILD_SUBREAPER = 36
PID_BYTES = 4
MAX_FILES = 4096  # more than any process here has open


class WarmProcess(subprocess.Popen[Any]):
    """A `subprocess.Popen` of this interpreter whose process is forked; it takes no `preexec_fn` or `pass_fds`."""

    def _execute_child(
        self, args: Sequence[str], executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any,
        env: Any, startupinfo: Any, creationflags: Any, shell: Any, p2cread: int, p2cwrite: int, c2pread: int,
        c2pwrite: int, errread: int, errwrite: int, *_: Any,
    ) -> None:  # fmt: skip
        assert args[0] == sys.executable
        assert preexec_fn is None
        assert not pass_fds
        variables = dict(os.environ if env is None else env)
        job = {"words": args[1:], "folder": str(cwd or os.getcwd()), "variables": variables}
        streams = [default if file == -1 else file for default, file in enumerate((p2cread, c2pwrite, errwrite))]
        self.pid = _start(json.dumps(job).encode(), streams)
        self._child_created = True
        for theirs, ours in ((p2cread, p2cwrite), (c2pwrite, c2pread), (errwrite, errread)):
            if -1 not in (theirs, ours):
                os.close(theirs)
        if (null := getattr(self, "_devnull", None)) is not None:
            os.close(null)
        self._closed_child_pipe_fds = True


Process = WarmProcess if sys.platform == "linux" else subprocess.Popen


@functools.cache
def _requests() -> socket.socket:
    """Start the process that is forked; it ends when this one closes the socket, at its end at the latest."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # so that this process can wait for the forks
    ours, theirs = socket.socketpair()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYLLM_")}
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=kept | {"OMP_NUM_THREADS": "1"})
    process.returncode = 0  # it is not waited for
    return ours


def _start(job: bytes, streams: list[int]) -> int:
    ours, theirs = socket.socketpair()
    with ours, theirs, os.fdopen(os.memfd_create("job"), "wb") as file:
        file.write(job)
        file.flush()
        socket.send_fds(_requests(), [b"."], [file.fileno(), theirs.fileno(), *streams])
        theirs.close()
        return int.from_bytes(ours.recv(PID_BYTES), "little")


class ForkedEngine(subprocess.Popen[bytes]):
    """The engine process of a forked server, which has its libraries too; a second one is started as usual."""

    def __init__(self, args: Sequence[str], **more: Any) -> None:
        from pyllm.engine.client.launch import EngineProcess

        EngineProcess.popen = subprocess.Popen
        self._more = more
        super().__init__(args, **more)

    def _execute_child(self, args: Sequence[str], *_: Any) -> None:
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            _run(args[2:], self._more["env"], self._more["pass_fds"])


def _run(words: Sequence[str], variables: dict[str, str], files: Sequence[int] = ()) -> NoReturn:
    """Run what `python WORDS` does, as the only thing in this process, with no files but these open."""
    first = 3
    for file in [*sorted(files), MAX_FILES]:
        os.closerange(first, file)
        first = file + 1
    os.environ.clear()
    os.environ.update(variables)
    os.environ.setdefault("PYTHONMALLOC", "pymalloc")  # or a server would start again, without its libraries
    code: Any = 1
    try:
        if words[0] == "-m":
            sys.argv = ["-m", *words[2:]]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _begin(files: list[int]) -> NoReturn:
    """Be the command of a request: a child of the process that has sent it."""
    parent = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == parent:
        time.sleep(0.0005)
    job, reply, *streams = files
    for number, file in enumerate(streams):
        os.dup2(file, number)
    os.lseek(job, 0, os.SEEK_SET)
    with open(job, "rb", closefd=False) as text:
        command = json.load(text)
    os.write(reply, os.getpid().to_bytes(PID_BYTES, "little"))
    os.chdir(command["folder"])
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as a new interpreter would
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.enable()
    from pyllm.engine.client.launch import EngineProcess

    EngineProcess.popen = ForkedEngine
    _run(command["words"], command["variables"])


def main() -> None:
    """Load the libraries, and fork for each request until the other end of the socket closes."""
    gc.disable()
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        while files := socket.recv_fds(requests, 1, 5)[1]:
            if (guard := os.fork()) == 0:
                _begin(files)
            os.waitpid(guard, 0)
            for file in files:
                os.close(file)


if __name__ == "__main__":
    main()
