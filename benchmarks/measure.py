"""What every benchmark needs: how quiet the machine was, a server of our own, and one line of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pyllm.benchmarks.checkpoint import SHAPES, write_shape
from pyllm.model.cpu.library import describe
from pyllm.server.cli.bench import measure_load, own_server
from pyllm.server.cli.load_client import Target

PROC = Path("/proc")
QUIET_SHARE = 0.02
"""Of the processors' time, used by others: up to here the machine was quiet."""
VOCAB_SIZE = 32000


def busy_seconds() -> float:
    """Processor time that the whole machine has used since it started; 0 where that cannot be read (not Linux)."""
    if not PROC.is_dir():
        return 0.0
    fields = [int(x) for x in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Processor time of this process and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def family(pid: int) -> list[int]:
    """A process and all its living descendants."""
    parents: dict[int, int] = {}
    for path in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while we looked
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def cpu_seconds(pid: int) -> tuple[float, float]:
    """User and system time of one living process, all its threads together."""
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    tick = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / tick, int(fields[12]) / tick


def family_seconds(pid: int) -> float:
    """Processor time of a living process and of its living descendants."""
    return sum(sum(cpu_seconds(member)) for member in family(pid))


def peak_memory_mib(pid: int) -> list[float]:
    """The peak of resident memory of a process and of each descendant; together never less than their true peak."""
    peaks = []
    for member in family(pid):
        lines = (PROC / str(member) / "status").read_text().splitlines()
        peaks += [round(int(line.split()[1]) / 1024, 1) for line in lines if line.startswith("VmHWM:")]
    return peaks


STARTED = time.monotonic(), busy_seconds(), own_seconds()


def report(benchmark: str, result: Mapping[str, Any], servers: float = 0.0) -> None:
    """Print the result as one line of JSON, with the machine and how quiet it was since this program started.

    Args:
        benchmark: its name.
        result: its figures.
        servers: processor seconds that measured servers used which this program did not start.
    """
    wall, busy, own = time.monotonic() - STARTED[0], busy_seconds() - STARTED[1], own_seconds() - STARTED[2]
    other = max(0.0, busy - own - servers)
    models = [line.partition(":")[2].strip() for line in (PROC / "cpuinfo").read_text().splitlines()
              if line.startswith("model name")] if PROC.is_dir() else [platform.processor()]  # fmt: skip
    machine = {
        "date": date.today().isoformat(),
        "machine": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "torch": version("torch"),
        "cpu_kernels": describe(),
        "other_cpu_s": round(other, 1),
        "quiet": other <= QUIET_SHARE * wall * (os.cpu_count() or 1),
    }
    print(json.dumps({"benchmark": benchmark} | dict(result) | machine), flush=True)


@contextlib.contextmanager
def served(
    shape: str, *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[Target, subprocess.Popen[bytes]]]:
    """A server of ours with random weights of a shape, ready and warm -> where to ask, and its process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / shape
        write_shape(folder, shape)
        with own_server([str(folder), "--load-format", "dummy", *flags], environment) as (base, process):
            target = Target(base, shape)
            load(target, 1, requests=1, output_len=8, vocab_size=SHAPES[shape].vocab_size)
            yield target, process


def load(
    target: Target,
    clients: int,
    *,
    requests: int | None = None,
    input_len: int = 128,
    output_len: int = 128,
    vocab_size: int = VOCAB_SIZE,
) -> dict[str, float]:
    """A closed loop of random prompts; by default two requests per client, at least four."""
    count = requests or max(4, 2 * clients)
    return measure_load(
        target, clients, requests=count, input_len=input_len, output_len=output_len, vocab_size=vocab_size
    )
