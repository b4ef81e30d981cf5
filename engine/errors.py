"""The errors of the engine: one type per kind of failure."""

from __future__ import annotations

import traceback


class RequestError(ValueError):
    """A request that must be changed before it can be served."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param  # the field at fault, if it is one
        self.code = code  # a machine-readable reason, such as `context_length_exceeded`


class EngineBusyError(RuntimeError):
    """The engine cannot accept more requests now."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # in whole seconds


class EngineStartError(RuntimeError):
    """The engine could not start; the message is one sentence to show the user."""


class EngineDeadError(RuntimeError):
    """The engine process has exited or failed and cannot serve requests."""


def describe(error: BaseException) -> str:
    """Format an internal error with its traceback, for the log and never for a client."""
    return "".join(traceback.format_exception(error)).rstrip()
