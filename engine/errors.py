"""The ways in which the engine says no: one type per kind of failure."""

from __future__ import annotations

import traceback


class RequestError(ValueError):
    """A request that cannot be honoured as asked; the client must change it.

    Attributes:
        param: the field at fault, when one is.
        code: a machine-readable word for the failure, such as `context_length_exceeded`.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class EngineBusyError(RuntimeError):
    """Too many requests wait already.

    Attributes:
        retry_after: whole seconds until it is worth asking again.
    """

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineStartError(RuntimeError):
    """The engine could not start; the message is one plain sentence for the user."""


class EngineDeadError(RuntimeError):
    """The engine process has ended or failed; no request can be served any more."""


def describe(error: BaseException) -> str:
    """What is told of a fault of ours in the log, and to no client: its traceback."""
    return "".join(traceback.format_exception(error)).rstrip()
