"""Start threads before they are needed, so that a server without enough of them never reports that it is ready."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor


def start_pool(count: int, name: str) -> ThreadPoolExecutor:
    """Make a pool whose threads run already; raise `RuntimeError` if the system does not allow that many."""
    pool = ThreadPoolExecutor(count, thread_name_prefix=name)
    start_threads(pool, count)
    return pool


def start_threads(pool: ThreadPoolExecutor, count: int) -> None:
    """Start all `count` threads of a pool that has none; raise `RuntimeError` if the system does not allow that."""
    started = threading.Event()
    try:
        for _ in range(count):
            pool.submit(started.wait)  # holds its thread, so that the next one needs another
    finally:
        started.set()


def check_threads(count: int) -> None:
    """Raise `RuntimeError` if the system does not allow `count` more threads, for libraries that would just exit."""
    if count:
        start_pool(count, "check").shutdown()
