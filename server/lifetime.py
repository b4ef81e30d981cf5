"""The beginning and the end of a command's process: its standard streams, and the signals that stop it.

Imports little, since a signal may come while the rest is being imported.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
MAX_SIGNALS = 3  # the first one drains the requests, the second drops them, and the third waits for nothing
QUEUE_BYTES = 1 << 20  # of lines waiting to be written
CHUNK_BYTES = 1 << 16  # bytes per read; also the most of an unfinished line that is held back
SMALL_CACHES = "glibc.malloc.tcache_max=128"  # bytes of the largest block that a thread keeps
FLUSH_SECONDS = 1.0  # for the last lines, when the process ends


def use_one_allocator() -> None:
    """Start this program again in this process, with the GNU C library's allocator for Python's small objects too.

    Python's own allocator returns memory in 1 MiB arenas, and only once an arena is empty: after four minutes of
    attacks it still held 79 MB of unused memory, the C library's 14 MB. A chunk of a stream takes the same processor
    time with both. The user's own `PYTHONMALLOC` wins, and so does `GLIBC_TUNABLES`.

    The C library keeps for each thread up to seven freed blocks of each size. Those of idle threads lie all over the
    heap, and none of their pages can be returned: after two minutes of attacks they kept 13 MB. With small blocks only,
    Python is as fast, and few pages are kept.
    """
    if os.environ.get("PYTHONMALLOC") == "malloc":
        del os.environ["PYTHONMALLOC"]  # the engine's process keeps Python's own
        if os.environ.get("GLIBC_TUNABLES") == SMALL_CACHES:
            del os.environ["GLIBC_TUNABLES"]
    elif "PYTHONMALLOC" not in os.environ and not sys.flags.ignore_environment and _has_gnu_library():
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until the program has begun again
        wanted = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": SMALL_CACHES}
        with contextlib.suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted | os.environ)


def _has_gnu_library() -> bool:
    with contextlib.suppress(ValueError, OSError):
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    return False


class Lifetime:
    """How a command's process ends.

    `on_stop` is called with each signal. Until it is set, a signal ends the process at once, with code 0 for a server
    and 128 plus the signal number for other commands. A third signal always does, with code 1.
    """

    def __init__(self, code: int | None = None) -> None:
        self.code = code  # exit code when a signal ends the process at once; None: 128 plus the signal's number
        self.on_stop: Callable[[signal.Signals], object] | None = None
        self.output: Output | None = None
        self._closers: list[Callable[[], object]] = []
        self._count = 0

    @classmethod
    def begin(cls, words: Sequence[str]) -> Lifetime:
        """Watch for signals from now on, in the process of the command line `words`."""
        is_server = words[:1] == ["serve"]
        lifetime = cls(0 if is_server else None)
        for number in STOP_SIGNALS if is_server else (signal.SIGINT,):
            # Under nohup, hang-ups are already ignored, and stay ignored.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lifetime._receive)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        _open_streams()
        return lifetime

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._count += 1
        if self.on_stop is None:
            self.exit(128 + number if self.code is None else self.code)
        elif self._count >= MAX_SIGNALS:
            self.exit(1)
        else:
            self.on_stop(signal.Signals(number))

    def defer(self, close: Callable[[], object]) -> None:
        """Call `close` when the process ends, the last deferred one first; it must not wait for long."""
        self._closers.append(close)

    def take_output(self, notice: Callable[[int], str]) -> None:
        """Make sure that writes to standard output and error never block on a slow reader; see `Output`."""
        self.output = Output(notice)
        self.defer(self.output.close)

    def hand_back(self) -> None:
        """Let Ctrl-C raise `KeyboardInterrupt` from now on."""
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def settle(self, code: int) -> None:
        """Let signals end the process at once from now on, with this code."""
        self.on_stop, self.code = None, code

    def exit(self, code: int) -> NoReturn:
        """End the process now, without waiting for its threads."""
        self.settle(code)
        while self._closers:
            self._closers.pop()()
        os._exit(code)


def _open_streams() -> None:
    """Open closed standard streams, since the next sockets and files would otherwise take their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it stays open


class Output:
    """Stands between the process and its standard error, so that writing to it never waits.

    Everything that this process, its libraries and its children write to standard output and error goes into a pipe.
    One thread always empties the pipe into a queue, another writes the queue to the real standard error, and only the
    second one waits for a full pipe, a stopped terminal or a disk. Lines that do not fit the queue, or cannot be
    written, are dropped and counted; `notice` makes the line that says how many.
    """

    def __init__(self, notice: Callable[[int], str]) -> None:
        self.num_dropped = 0
        self._notice = notice
        self._lines: list[bytes] = []
        self._size = 0  # of these lines
        self._num_refused = 0  # lines that did not fit since the writer last emptied the queue
        self._closed = False
        self._changed = threading.Condition()
        self._sink = os.dup(2)
        source, pipe = _open_pipe(self._sink)
        self._reader = threading.Thread(target=self._read, args=(source,), name="read output", daemon=True)
        self._writer = threading.Thread(target=self._write, name="write output", daemon=True)
        self._reader.start()
        self._writer.start()
        for number in (1, 2):
            os.dup2(pipe, number)
        os.close(pipe)

    def _read(self, source: int) -> None:
        rest = b""
        while data := _read_chunk(source):
            rest += data
            end = max(rest.rfind(b"\n"), rest.rfind(b"\r")) + 1  # a progress bar's lines end with the latter
            if len(rest) - end > CHUNK_BYTES:
                end = len(rest)
            self._put(rest[:end].splitlines(keepends=True))
            rest = rest[end:]
        self._put([rest] if rest else [])
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _put(self, lines: list[bytes]) -> None:
        with self._changed:
            for line in lines:
                # After a refused line, further ones are refused too, so that all lost lines are missing in one place.
                if self._num_refused or self._size + len(line) > QUEUE_BYTES:
                    self._num_refused += 1
                else:
                    self._lines.append(line)
                    self._size += len(line)
            self._changed.notify()

    def _write(self) -> None:
        num_lost, is_torn = 0, False  # lines that could not be written, and whether the last one was cut
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._num_refused or self._closed)
                lines, num_refused = self._lines, self._num_refused
                if not lines and not num_refused:
                    return
                self._lines, self._size, self._num_refused = [], 0, 0
            self.num_dropped += num_refused
            text = b"\n" * is_torn + self._missing(num_lost) + b"".join(lines) + self._missing(num_refused)
            written = text[: _write_all(self._sink, text)]
            is_torn = bool(written or is_torn) and not written.endswith((b"\n", b"\r"))
            if len(written) == len(text):
                num_lost = 0
            else:
                num_unwritten = max(len(lines) - written.count(b"\n"), 0)
                self.num_dropped += num_unwritten
                num_lost += num_unwritten + num_refused

    def _missing(self, count: int) -> bytes:
        return self._notice(count).encode() if count else b""

    def close(self) -> None:
        """Write the remaining lines, for a moment only; call it once all other processes that write here have ended."""
        sys.stdout.flush()
        sys.stderr.flush()
        null = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(null, number)
        deadline = time.monotonic() + FLUSH_SECONDS
        for thread in (self._reader, self._writer):
            thread.join(max(deadline - time.monotonic(), 0))


def _open_pipe(sink: int) -> tuple[int, int]:
    """Open the two ends of a pipe, or of a terminal of the same width as `sink`, for progress bars."""
    if not os.isatty(sink):
        return os.pipe()
    import termios
    import tty

    source, pipe = os.openpty()
    tty.setraw(pipe)
    termios.tcsetwinsize(pipe, termios.tcgetwinsize(sink))
    return source, pipe


def _read_chunk(source: int) -> bytes:
    try:
        return os.read(source, CHUNK_BYTES)
    except OSError:  # the other end of a terminal is closed
        return b""


def _write_all(sink: int, text: bytes) -> int:
    """Write `text`, for as long as that takes; return how many bytes were written before an error."""
    done = 0
    while done < len(text):
        try:
            done += os.write(sink, memoryview(text)[done:])
        except BlockingIOError:  # it was opened not to block
            poll = select.poll()
            poll.register(sink, select.POLLOUT)
            poll.poll()
        except OSError:  # it is closed, full, or its terminal is gone
            break
    return done
