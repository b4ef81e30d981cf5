"""The memory, cores and threads that this machine allows this process, and the return of freed memory.

Threads start before they are needed, so that a server without enough of them never reports that it is ready.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MAX_GAPS = 16 * 2**20  # up to this many freed bytes in the C library's heap are not worth returning
_ARENA_MAX, _MMAP_THRESHOLD = -8, -3  # of the GNU C library's `mallopt`
LARGE_BLOCK = (
    256 * 2**10
)  # from this size, a block is not part of the heap, so that it is returned as soon as it is freed


class _Heap(ctypes.Structure):
    """The GNU C library's `struct mallinfo2`."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    ))  # fmt: skip


def use_one_heap() -> None:
    """Let all threads share one heap, without large blocks; call it before there are threads.

    With a heap for each thread, no thread can use memory that another has freed, and hardly a page of it is
    empty. The user's own settings win. With any C library but GNU's, this does nothing.
    """
    if not any(name.startswith("MALLOC_") for name in os.environ):
        with contextlib.suppress(AttributeError, OSError):
            library = ctypes.CDLL(None)
            library.mallopt(_ARENA_MAX, 1)
            library.mallopt(_MMAP_THRESHOLD, LARGE_BLOCK)


def return_free_memory(max_gaps: int = MAX_GAPS) -> None:
    """Return the freed memory between this process's objects to the system, if there is much.

    The GNU C library does so by itself only at the end of its heap; with other libraries, this does nothing. Takes
    some milliseconds, in which other threads can run, and the next allocations take a little longer.
    """
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _Heap
        if library.mallinfo2().fordblks > max_gaps:
            library.malloc_trim(0)


def free_host_bytes(root: Path = Path("/")) -> int:
    """Return how much memory this process can use without swapping, within the limits of its control groups."""
    return min([_machine_bytes(root, "MemAvailable"), *(max(most - used, 0) for most, used in _groups(root))])


def total_host_bytes(root: Path = Path("/")) -> int:
    """Return the machine's memory, or the smallest limit of this process's control groups."""
    return min([_machine_bytes(root, "MemTotal"), *(most for most, _ in _groups(root))])


def _machine_bytes(root: Path, name: str) -> int:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) * 1024
    except (OSError, StopIteration):  # not Linux: assume that half is free
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total if name == "MemTotal" else total // 2


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield the limit and the use of each limited control group around this process (versions 1 and 2), in bytes."""
    for folder, version in _group_folders(root, "memory"):
        limit, usage, cached = (
            ("limit_in_bytes", "usage_in_bytes", "total_") if version == 1 else ("max", "current", "")
        )
        try:
            most = (folder / f"memory.{limit}").read_text(encoding="ascii").strip()
            used = int((folder / f"memory.{usage}").read_text(encoding="ascii"))
            stat = (folder / "memory.stat").read_text(encoding="ascii").split()
        except OSError:
            continue  # inside a container, its own group is the root
        if most != "max":
            counts = dict(zip(stat[::2], map(int, stat[1::2]), strict=True))
            # The kernel drops cached files, such as the checkpoint, when memory is needed.
            used -= counts.get(f"{cached}active_file", 0) + counts.get(f"{cached}inactive_file", 0)
            yield int(most), used


def _group_folders(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Yield the folder of each control group around this process, from the inside out, and its version."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mounts, version = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], 2
        elif controller in controllers.split(","):
            mounts, version = [f"sys/fs/cgroup/{controller}", f"sys/fs/cgroup/{controllers}"], 1
        else:
            continue
        own = Path(path.lstrip("/"))
        for mount in dict.fromkeys(mounts):
            yield from ((root / mount / group, version) for group in (own, *own.parents))


def compute_cores(root: Path = Path("/")) -> int:
    """Return on how many cores this process can compute at once, within its affinity and its control groups' limits.

    Two threads of one core count once, since they share its arithmetic units.
    """
    system = root / "sys/devices/system"
    cores = {first_sibling(system, core) for core in allowed_cores()}
    return max(1, min([len(cores), *_processor_limits(root)]))


def _processor_limits(root: Path) -> Iterator[int]:
    """Yield how many whole cores each limited control group's time is worth."""
    for folder, version in _group_folders(root, "cpu"):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if version == 1 else ("cpu.max",)
        with contextlib.suppress(OSError):
            quota, period = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
            if quota not in ("max", "-1"):
                yield int(quota) // int(period)


def allowed_cores() -> set[int]:
    """Return the numbers of the cores that this process may run on, as the system counts them."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def first_sibling(system: Path, core: int) -> int:
    """Return the lowest number that the system, described in the folder `system`, has for the same physical core."""
    try:
        return min(numbers((system / f"cpu/cpu{core}/topology/thread_siblings_list").read_text(encoding="ascii")))
    except (OSError, ValueError):
        return core


def numbers(text: str) -> set[int]:
    """Return the numbers in a list such as `0-3,8`."""
    ranges = [re.fullmatch(r"(\d+)(?:-(\d+))?", part) for part in text.strip().split(",") if part]
    return {number for found in ranges if found for number in range(int(found[1]), int(found[2] or found[1]) + 1)}


def start_pool(count: int, name: str) -> ThreadPoolExecutor:
    """Make a pool whose threads are already running; raise `RuntimeError` if the system does not allow that many."""
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
    """Raise `RuntimeError` if the system does not allow `count` more threads, for libraries that would exit instead."""
    if count:
        start_pool(count, "check").shutdown()
