"""Threads for work that would block the event loop; many large requests queue here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import ParamSpec, TypeVar

is_large: ContextVar[bool] = ContextVar("is_large", default=False)
"""Whether the current request's body is so large that all work on it belongs off the event loop."""

_pool = ThreadPoolExecutor(4, thread_name_prefix="read-request")
"""Apart from asyncio's own threads, so that a flood of large requests blocks only large requests."""
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


async def off_loop(call: Callable[Arguments, Result], /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Call in a thread."""
    return await asyncio.get_running_loop().run_in_executor(_pool, partial(call, *args, **kwargs))


async def off_loop_if_large(
    call: Callable[Arguments, Result], /, *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """Call in a thread if the request is large."""
    return await off_loop(call, *args, **kwargs) if is_large.get() else call(*args, **kwargs)
