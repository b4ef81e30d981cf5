"""What holds the memory of a server's processes: looked at from a thread in each of them, where asked.

`watched` gives the environment of a server; every Python process of it then writes a line of JSON at intervals: the
C library's heap in use and its gaps, and the objects that Python's collector knows, by type. `growth` compares a line
from the middle with the last one.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

FOLDER, SECONDS = "MEMORY_OWNERS_FOLDER", "MEMORY_OWNERS_SECONDS"
MOST = 12
"""Types that are named: those with the most new objects."""


class _Heap(ctypes.Structure):
    """The C library's `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "free", "fast", "maps", "mapped", "unused", "fast_bytes", "in_use", "gaps", "top")]  # fmt: skip


def watched(folder: Path, seconds: float) -> dict[str, str]:
    """Environment variables with which a process, and each Python process that it starts, watches itself."""
    folder.mkdir()
    # Python imports a module of this name at its start.
    (folder / "sitecustomize.py").write_text(
        f"import importlib.util as u\ns = u.spec_from_file_location('memory_owners', {__file__!r})\n"
        "m = u.module_from_spec(s)\ns.loader.exec_module(m)\nm.start()\n"
    )
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return {FOLDER: str(folder), SECONDS: str(seconds), "PYTHONPATH": path}


def start() -> None:
    """Watch this process, from a thread that does not keep it alive."""
    threading.Thread(target=_watch, args=(Path(os.environ[FOLDER]), float(os.environ[SECONDS])), daemon=True).start()


def _watch(folder: Path, seconds: float) -> None:
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Heap
    while True:
        time.sleep(seconds)
        heap = library.mallinfo2()
        counts = Counter(f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.get_objects())
        seen = {"time": time.monotonic(), "blocks": sys.getallocatedblocks(), "objects": counts}
        seen |= {name: getattr(heap, name) for name in ("in_use", "gaps", "mapped")}
        with (folder / f"{os.getpid()}.jsonl").open("a") as sink:
            sink.write(json.dumps(seen) + "\n")


def growth(folder: Path, pid: int) -> dict[str, Any]:
    """MB of the C library's heap, and counts, in the middle and at the end; and the types with the most new objects."""
    lines = [json.loads(line) for line in (folder / f"{pid}.jsonl").read_text().splitlines()]
    middle, last = lines[len(lines) // 2], lines[-1]
    found = {name: [round(seen[name] / 1e6, 2) for seen in (middle, last)] for name in ("in_use", "gaps", "mapped")}
    found["blocks"] = [seen["blocks"] for seen in (middle, last)]
    new = Counter(last["objects"])
    new.subtract(middle["objects"])
    return found | {"new_objects": {name: count for name, count in new.most_common(MOST) if count > 0}}
