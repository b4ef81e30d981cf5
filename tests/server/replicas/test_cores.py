"""Which cores replicas get: their own, next to each other, on one memory node."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyllm.server.replicas import pinned
from pyllm.server.replicas.cores import Cores, claim_cores, memory_nodes


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sockets of four cores; each core has a sibling four numbers up, as Linux numbers them."""
    system = tmp_path / "system"
    for node, numbers in enumerate(("0-3,8-11", "4-7,12-15")):
        (system / f"node/node{node}").mkdir(parents=True)
        (system / f"node/node{node}/cpulist").write_text(numbers + "\n")
    for core in range(16):
        first = core % 8
        (system / f"cpu/cpu{core}/topology").mkdir(parents=True)
        (system / f"cpu/cpu{core}/topology/thread_siblings_list").write_text(f"{first},{first + 8}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    return system


@pytest.fixture
def claim(machine: Path, tmp_path: Path) -> Iterator[Callable[..., Cores]]:
    """Claims cores of that machine, until the test ends."""
    with ExitStack() as stack:

        def make(count: int, folder: Path = tmp_path / "locks") -> Cores:
            claimed = claim_cores(count, system=machine, folder=folder)
            stack.callback(claimed.release)
            return claimed

        yield make


def test_siblings_are_neighbours(machine: Path) -> None:
    assert memory_nodes(machine) == {0: [0, 8, 1, 9, 2, 10, 3, 11], 1: [4, 12, 5, 13, 6, 14, 7, 15]}


def test_each_replica_has_cores_of_one_node(claim: Callable[..., Cores]) -> None:
    claims = [claim(4) for _ in range(4)]
    assert [(each.node, each.numbers) for each in claims] == [
        (0, [0, 8, 1, 9]), (0, [2, 10, 3, 11]), (1, [4, 12, 5, 13]), (1, [6, 14, 7, 15])
    ]  # fmt: skip
    assert claim(1).numbers == []
    claims[2].release()
    again = claim(4)
    assert (again.node, again.numbers) == (1, [4, 12, 5, 13])


def test_a_claim_larger_than_a_node_spans_two(claim: Callable[..., Cores]) -> None:
    claimed = claim(12)
    assert len(set(claimed.numbers)) == 12
    assert claimed.node is None


def test_a_claim_that_does_not_fit_takes_nothing(claim: Callable[..., Cores]) -> None:
    first = claim(10)
    assert claim(10).numbers == []
    assert len(claim(6).numbers) == 6
    assert len(first.numbers) == 10


def test_a_folder_of_another_user_is_not_trusted(claim: Callable[..., Cores], tmp_path: Path) -> None:
    trap = tmp_path / "locks"
    trap.symlink_to(tmp_path)
    assert claim(4, folder=trap).numbers == []


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_a_pinned_program_runs_there_and_ends_with_its_parent() -> None:
    core = min(os.sched_getaffinity(0))
    show = "import os; print(sorted(os.sched_getaffinity(0)))"
    command = [sys.executable, pinned.__file__, str(os.getpid()), str(core), "0", sys.executable, "-c", show]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"[{core}]\n"
    command[2] = "1"  # another parent
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 1
