"""Which cores of this machine a replica gets: neighbours on one memory node, and those of no other replica."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ...engine.host import allowed_cores, first_sibling, numbers

SYSTEM = Path("/sys/devices/system")


@dataclass(slots=True)
class Cores:
    """Cores that this process has claimed, until it ends or releases them.

    Attributes:
        numbers: of the cores; empty if they are not bound.
        node: their memory node, if they have only one and the machine has several.
    """

    numbers: list[int] = field(default_factory=list)
    node: int | None = None
    _locks: list[IO[str]] = field(default_factory=list)

    def release(self) -> None:
        """Let other replicas claim them."""
        while self._locks:
            self._locks.pop().close()


def memory_nodes(system: Path = SYSTEM) -> dict[int, list[int]]:
    """Return the cores that this process may use on each memory node, siblings of a core next to each other."""
    allowed = allowed_cores()
    nodes = {}
    for path in sorted(system.glob("node/node[0-9]*/cpulist"), key=lambda path: int(path.parent.name[4:])):
        found = numbers(path.read_text(encoding="ascii")) & allowed
        if found:
            nodes[int(path.parent.name[4:])] = sorted(found, key=lambda core: (first_sibling(system, core), core))
    return nodes or {0: sorted(allowed)}


def claim_cores(count: int, *, system: Path = SYSTEM, folder: Path | None = None) -> Cores:
    """Claim `count` cores, on one memory node if possible; none if there are not so many free ones.

    A lock on a file for each core keeps other replicas of this user from it. A lock ends with its process, however
    that ends.
    """
    if count < 1 or (nodes := memory_nodes(system)) is None:
        return Cores()
    folder = folder or Path(tempfile.gettempdir()) / f"pyllm-cores-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():  # another user's: a trap
        return Cores()
    with (folder / "all").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        free = {node: _lock_free(folder, cores) for node, cores in nodes.items()}
        fitting = [node for node, locks in free.items() if len(locks) >= count]
        # The fullest node that fits leaves the others to larger replicas.
        chosen = [min(fitting, key=lambda node: len(free[node]))] if fitting else list(free)
        locks = [pair for node in chosen for pair in free[node].items()][:count]
        taken = {core for core, _ in locks} if len(locks) == count else set[int]()
        for core, lock in [pair for cores in free.values() for pair in cores.items()]:
            if core not in taken:
                lock.close()
    if not taken:
        return Cores()
    node = chosen[0] if len(chosen) == 1 and len(nodes) > 1 else None
    return Cores([core for core, _ in locks], node, [lock for _, lock in locks])


def _lock_free(folder: Path, cores: list[int]) -> dict[int, IO[str]]:
    """Lock the files of those cores that no process has locked."""
    locks: dict[int, IO[str]] = {}
    for core in cores:
        lock = (folder / str(core)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            locks[core] = lock
    return locks
