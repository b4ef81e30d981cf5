"""Work that would hold up the event loop, done by a few threads: many large requests queue here for their turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import ParamSpec, TypeVar

WORKERS = 4
"""Threads for reading requests, apart from those for all else: a flood of requests must not hold that up."""

is_large: ContextVar[bool] = ContextVar("is_large", default=False)
"""Whether the request that is being answered has so large a body that all work on it belongs off the event loop."""

_pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="read-request")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


async def off_loop(
    function: Callable[Arguments, Result], /, *arguments: Arguments.args, **options: Arguments.kwargs
) -> Result:
    """Call `function` in a thread."""
    return await asyncio.get_running_loop().run_in_executor(_pool, partial(function, *arguments, **options))


async def off_loop_if_large(
    function: Callable[Arguments, Result], /, *arguments: Arguments.args, **options: Arguments.kwargs
) -> Result:
    """Call `function`, in a thread where the request is large."""
    return await off_loop(function, *arguments, **options) if is_large.get() else function(*arguments, **options)
