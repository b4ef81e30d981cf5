"""The errors of the engine: one type per kind of failure."""

from __future__ import annotations

import errno
import re
import traceback


class RequestError(ValueError):
    """A request that must be changed before it can be served."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param  # the field at fault, if it is one
        self.code = code  # a machine-readable reason, such as `context_length_exceeded`


class EngineBusyError(RuntimeError):
    """There is no room for a request now, in the queue or in memory; clients get a 429."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # in whole seconds


class EngineStartError(RuntimeError):
    """The engine could not start; the message is one sentence to show the user."""


class EngineDeadError(RuntimeError):
    """The engine process has exited or failed and cannot serve requests."""


START_FAILURES = (OSError, MemoryError, ImportError, RuntimeError)
"""The exceptions raised here or in libraries when the system runs out of memory, open files or threads."""


def reason_of(error: BaseException) -> str:
    """Return why a process cannot start, as a part of a sentence."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()).rstrip(".")[:300]
    if isinstance(error, MemoryError):
        return f"memory is used up{f': {text}' if text else ''}"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many open files: raise the limit (ulimit -n)"
    if isinstance(error, BlockingIOError) or lacks_threads(error):
        return "the system allows no more processes or threads: raise the limit (ulimit -u), or that of the container"
    return text or type(error).__name__


def lacks_threads(error: BaseException) -> bool:
    """Return whether a thread could not be started; Python has no error type for that, and C++ words it differently."""
    return isinstance(error, RuntimeError) and bool(re.search("start new thread|temporarily unavailable", str(error)))


def describe(error: BaseException) -> str:
    """Format an internal error with its traceback, for the log and never for a client."""
    return "".join(traceback.format_exception(error)).rstrip()
