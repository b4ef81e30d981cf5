"""What a process writes never waits for the reader of its standard error, and what cannot be written is counted."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from support.serving import PATIENCE, environment

WRITE = """
import functools, logging, os, subprocess, sys, traceback, warnings
from pyllm.server.http.logs import configure_logging, dropped_notice
from pyllm.server.lifetime import Lifetime

lifetime = Lifetime.begin(["serve"])
lifetime.take_output(functools.partial(dropped_notice, configure_logging("info", sys.argv[1])))
log = logging.getLogger("pyllm.server")
"""
FILL = """
for n in range(20_000):
    log.info("%06d %s", n, "x" * 200)
"""
END = "lifetime.exit(7)\n"


@contextlib.contextmanager
def started(
    program: str, errors: int | IO[bytes], form: str = "text", **more: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs `program`."""
    command = [sys.executable, "-c", WRITE + program + END, form]
    with subprocess.Popen(command, stdout=errors, stderr=subprocess.STDOUT, env=environment(), **more) as process:
        try:
            yield process
        finally:
            process.kill()


def run(program: str, errors: IO[bytes]) -> str:
    """Run a program to its end; return what it wrote."""
    with started(program, errors) as process:
        assert process.wait(PATIENCE) == 7
    errors.seek(0)
    return errors.read().decode()


def test_everything_is_written_in_order_at_the_end(tmp_path: Path) -> None:
    """Logging, other loggers, prints, warnings, tracebacks, native code and child processes."""
    program = """
log.info("first")
logging.getLogger("uvicorn").warning("second")
print("third", flush=True)
warnings.warn("fourth")
sys.stderr.write("fifth\\n")
try:
    raise ValueError("sixth")
except ValueError:
    traceback.print_exc()
os.write(2, b"seventh\\n")
subprocess.run([sys.executable, "-c", "print('eighth')"])
subprocess.run([sys.executable, "-c", "import sys; sys.stderr.write('ninth')"])
"""
    with (tmp_path / "log").open("w+b") as log:
        text = run(program, log)
    words = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth"]
    assert sorted(words, key=text.index) == words
    assert text.endswith("eighth\nninth")


@pytest.mark.parametrize("form", ["text", "json"])
def test_lines_that_are_not_read_are_dropped_and_counted(form: str) -> None:
    """The process does not wait; once its output is read, the log continues and says where how many are missing."""
    source, sink = os.pipe()

    def message(line: bytes) -> str:
        return str(json.loads(line)["message"]) if form == "json" else line.decode()

    program = f"""
for n in range(20_000):
    log.info("%06d %s", n, "x" * 200)
os.write({sink}, b"done")
sys.stdin.read(1)
log.info("again")
"""
    with started(program, subprocess.PIPE, form, stdin=subprocess.PIPE, pass_fds=[sink]) as process:
        assert process.stdin
        assert process.stdout
        assert os.read(source, 4) == b"done"
        number = num_kept = 0
        while number < 20_000:
            line = message(process.stdout.readline())
            if missing := re.search(r"could not be written in time: (\d+)", line):
                number += int(missing[1])
            else:
                assert int(line.split("x")[0].split()[-1]) == number, "each line is there or counted"
                number, num_kept = number + 1, num_kept + 1
        process.stdin.write(b"x")
        process.stdin.close()
        assert message(process.stdout.read()).rstrip().endswith("again")
        assert process.wait(PATIENCE) == 7
    for descriptor in (source, sink):
        os.close(descriptor)
    assert 0 < num_kept < number == 20_000


def test_a_pipe_that_is_stuck_at_the_end_is_not_waited_for() -> None:
    with started(FILL, subprocess.PIPE) as process:
        assert process.wait(PATIENCE) == 7


def test_a_closed_pipe_harms_nothing() -> None:
    """Nor does one that is closed after a while."""
    ours, theirs = os.pipe()
    with started('log.info("first")\nsys.stdin.read(1)\n' + FILL, theirs, stdin=subprocess.PIPE) as process:
        os.close(theirs)
        assert b"first" in os.read(ours, 1000)
        os.close(ours)
        process.communicate(b"x", PATIENCE)
        assert process.returncode == 7


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_harms_nothing() -> None:
    with Path("/dev/full").open("wb") as full, started(FILL, full) as process:
        assert process.wait(PATIENCE) == 7


def test_the_log_continues_when_the_disk_has_room_again(tmp_path: Path) -> None:
    """A limit on the file's size stands for the disk's."""
    program = """
import resource, signal, time
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log.info("first")
resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
for n in range(10):
    log.info("lost %s", "x" * 100)
while lifetime.output.num_dropped < 9:
    time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.info("again")
"""
    with (tmp_path / "log").open("w+b") as log:
        lines = run(program, log).splitlines()
    assert lines[0].endswith("first")
    assert lines[-2].endswith("could not be written in time: 10") or lines[-2].endswith("in time: 9")
    assert lines[-1].endswith("INFO again")


def test_a_stopped_terminal_holds_nothing_up() -> None:
    """Ctrl-S stops it. Progress bars still see a terminal, and its width."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 123))
    termios.tcflow(theirs, termios.TCOOFF)
    with started(f"{FILL}assert sys.stderr.isatty() and os.get_terminal_size(2).columns == 123\n", theirs) as process:
        os.close(theirs)
        assert process.wait(PATIENCE) == 7
        os.close(ours)


@pytest.mark.parametrize("closed", ["0", "1", "2", "012"])
def test_closed_standard_streams_are_opened(closed: str) -> None:
    """Or the first files and sockets would take their numbers, and what is written would go there."""
    program = f"""
import os, subprocess, sys
for number in {closed!r}:
    os.close(int(number))
check = '''
import os, sys
from pyllm.server.lifetime import Lifetime
Lifetime.begin(["serve"])
print("out"), print("err", file=sys.stderr)
os._exit(7 if os.open(os.devnull, os.O_RDONLY) > 2 else 1)
'''
os.execv(sys.executable, [sys.executable, "-c", check])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 7, done.stderr
    assert (done.stdout, done.stderr) == ("out\n" * ("1" not in closed), "err\n" * ("2" not in closed))
