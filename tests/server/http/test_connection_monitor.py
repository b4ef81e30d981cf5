"""The limits on connections, with a clock and connections that are plain objects."""

from __future__ import annotations

import logging
import resource
import time

import pytest

from pyllm.server.flags import ServerConfig
from pyllm.server.http.budget import Hold, MemoryBudget
from pyllm.server.http.connection_monitor import (
    CONNECTION_BYTES,
    IDLE_TRIM_BYTES,
    MAX_EVICTION_TRIES,
    MIN_IDLE_SECONDS,
    MIN_PROGRESS,
    SPARE_FILES,
    TRIM_BYTES,
    ConnectionLimits,
    ConnectionMonitor,
    ProgressTimer,
    Wait,
)
from pyllm.server.http.errors import ApiError

LIMITS = ConnectionLimits(header=10.0, body=20.0, write=40.0, connections=3)


class FakeConnection:
    speed: float | None = None
    hold: Hold

    def __init__(self, reason: str | None = None, unsent: bool = False) -> None:
        self.reason = reason
        self.unsent = unsent
        self.closed = False

    def pace(self) -> float | None:
        return self.speed

    def give_way(self) -> None:
        self.closed = True
        self.hold.release()

    def check(self, now: float) -> str | None:
        self.closed = self.reason is not None
        return self.reason

    def close_idle(self) -> bool:
        self.closed = not self.unsent
        return self.closed


@pytest.mark.parametrize("phase", ["header", "body", "write"])
def test_each_phase_has_its_own_timeout(phase):
    timer, wait, timeout = ProgressTimer(), Wait(phase, 1), getattr(LIMITS, phase)
    assert timer.expired(wait, LIMITS, 100.0) is None
    assert timer.expired(wait, LIMITS, 100.0 + timeout - 0.1) is None
    assert timer.expired(wait, LIMITS, 100.0 + timeout) == timeout


def test_progress_gives_the_client_the_timeout_again():
    timer = ProgressTimer()
    assert timer.expired(Wait("body", 1, 500), LIMITS, 0.0) is None
    assert timer.expired(Wait("body", 1, 500 + MIN_PROGRESS), LIMITS, 20.0) is None
    assert timer.expired(Wait("body", 1, 500 + MIN_PROGRESS), LIMITS, 39.9) is None
    assert timer.expired(Wait("body", 1, 499 + 2 * MIN_PROGRESS), LIMITS, 40.0) == 20.0


@pytest.mark.parametrize("other", [Wait("body", 1), Wait("header", 2), None])
def test_another_wait_starts_the_clock_again(other):
    timer, wait = ProgressTimer(), Wait("header", 1)
    assert timer.expired(wait, LIMITS, 0.0) is None
    assert timer.expired(other, LIMITS, 9.0) is None
    assert timer.expired(wait, LIMITS, 11.0) is None
    assert timer.expired(wait, LIMITS, 21.0) == 10.0


def test_an_early_answer_does_not_restart_the_clock_of_its_body():
    timer = ProgressTimer()
    assert timer.expired(Wait("body", 1, 5000), LIMITS, 0.0) is None
    assert timer.expired(Wait("body", 1, 0), LIMITS, 20.0) == 20.0


def test_a_sweep_is_as_frequent_as_the_shortest_timeout_needs():
    assert LIMITS.sweep_interval == 1.0
    assert ConnectionLimits(header=10.0, body=2.0, write=40.0, connections=3).sweep_interval == 0.5


def test_a_sweep_logs_how_many_connections_it_closed_and_why(caplog):
    caplog.set_level(logging.INFO, logger="pyllm.server")
    monitor = ConnectionMonitor(LIMITS, MemoryBudget(10**6))
    connections = [FakeConnection("too slow"), FakeConnection(), FakeConnection("too slow")]
    monitor.sweep(connections, 0.0)
    assert [connection.closed for connection in connections] == [True, False, True]
    assert caplog.messages == ["Closed 2 connection(s): too slow"]
    monitor.sweep(connections[1:2], 1.0)
    assert len(caplog.messages) == 1


def test_the_connection_idle_longest_is_evicted(caplog):
    caplog.set_level(logging.INFO, logger="pyllm.server")
    monitor = ConnectionMonitor(LIMITS, MemoryBudget(10**6))
    first, second = FakeConnection(), FakeConnection()
    monitor.idle |= {first: 1.0, second: 2.0}
    assert monitor.evict_idle(10.0)
    assert (first.closed, second.closed) == (True, False)
    assert list(monitor.idle) == [second]
    monitor.sweep([], 10.0)
    assert caplog.messages == ["Closed 1 connection(s): idle, and a new connection needed the slot"]


def test_a_connection_that_has_just_become_idle_is_not_evicted():
    monitor, connection = ConnectionMonitor(LIMITS, MemoryBudget(10**6)), FakeConnection()
    monitor.idle[connection] = 10.0
    assert not monitor.evict_idle(10.0 + MIN_IDLE_SECONDS / 2)
    assert not connection.closed
    assert monitor.evict_idle(10.0 + MIN_IDLE_SECONDS)


def test_idle_connections_with_unsent_bytes_are_passed_over():
    monitor = ConnectionMonitor(LIMITS, MemoryBudget(10**6))
    busy, free = FakeConnection(unsent=True), FakeConnection()
    monitor.idle |= {busy: 1.0, free: 2.0}
    assert monitor.evict_idle(10.0)
    assert list(monitor.idle.items()) == [(busy, 10.0)]


def test_an_eviction_looks_at_a_bounded_number_of_connections():
    monitor = ConnectionMonitor(LIMITS, MemoryBudget(10**6))
    monitor.idle |= dict.fromkeys([FakeConnection(unsent=True) for _ in range(MAX_EVICTION_TRIES)], 1.0)
    monitor.idle[FakeConnection()] = 2.0
    assert not monitor.evict_idle(10.0)
    assert monitor.evict_idle(20.0)


@pytest.fixture
def files(monkeypatch):
    """Fake this process's limit of open files."""
    changes = []

    def fake(soft: int, hard: int):
        monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
        monkeypatch.setattr(resource, "setrlimit", lambda _, pair: changes.append(pair))
        return changes

    return fake


@pytest.mark.parametrize(
    ("soft", "hard", "changes", "connections"),
    [
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, [], 1000),
        (5000, 5000, [], 1000),
        (256, resource.RLIM_INFINITY, [(1000 + SPARE_FILES, resource.RLIM_INFINITY)], 1000),
        (256, 4096, [(1000 + SPARE_FILES, 4096)], 1000),
        (256, 512, [(512, 512)], 512 - SPARE_FILES),
        (64, 64, [(64, 64)], 1),
    ],
)
def test_the_limit_of_open_files_is_raised_as_far_as_allowed(files, caplog, soft, hard, changes, connections):
    found = files(soft, hard)
    limits = ConnectionLimits.from_config(ServerConfig(max_connections=1000, header_timeout=7.0))
    assert (limits.connections, limits.header) == (connections, 7.0)
    assert found == changes
    assert ("The system allows" in caplog.text) == (connections < 1000)


def holding(budget: MemoryBudget, size: int, speed: float | None = None) -> FakeConnection:
    connection = FakeConnection()
    connection.hold, connection.speed = budget.hold("answers", size), speed
    return connection


def test_newest_incomplete_request_gives_way_then_slow_reader(caplog):
    caplog.set_level(logging.INFO, logger="pyllm.server")
    budget = MemoryBudget(100)
    monitor = ConnectionMonitor(LIMITS, budget)
    older, newer = holding(budget, 10), holding(budget, 10)
    fast, slow, fresh = holding(budget, 20, 9.0), holding(budget, 20, 3.0), holding(budget, 30)
    monitor.incomplete |= {older: None, newer: None}
    monitor.behind |= {fast: None, slow: None, fresh: None}
    order = [newer, older, slow, fast]
    for count, size in enumerate((15, 15, 20, 20), 1):
        budget.hold("bodies", size)
        assert [each.closed for each in order] == [True] * count + [False] * (4 - count)
    with pytest.raises(ApiError):
        budget.hold("bodies", 50)
    assert not fresh.closed, "nothing is known of how fast it is"
    monitor.sweep([], 0.0)
    assert "memory is used up, and its request was incomplete" in caplog.text
    assert "memory is used up, and its client was the slowest reader" in caplog.text


def test_a_sweep_frees_memory_that_is_used_beyond_the_limit():
    budget = MemoryBudget(100)
    monitor = ConnectionMonitor(LIMITS, budget)
    slow = holding(budget, 10, 1.0)
    monitor.behind[slow] = None
    slow.hold.record(101)
    monitor.sweep([], 0.0)
    assert slow.closed


@pytest.mark.parametrize(
    ("released", "returned"),
    [
        ([TRIM_BYTES, 0], [True, False]),
        ([IDLE_TRIM_BYTES, 0, 0], [False, True, False]),
        ([IDLE_TRIM_BYTES - 1, 0, 0], [False, False, False]),
        ([TRIM_BYTES // 4] * 5, [False, False, False, True, False]),
    ],
)
def test_released_memory_is_returned_when_much_or_idle(released: list[int], returned: list[bool]):
    monitor = ConnectionMonitor(LIMITS, MemoryBudget(2**30))
    seen = []
    for size in released:
        monitor.budget.count("bodies", "", size)
        monitor.budget.count("bodies", "", -size)
        seen.append(monitor.has_memory_to_return(0.0))
    assert seen == returned


def test_returning_memory_pauses_in_proportion_to_its_length():
    monitor = ConnectionMonitor(LIMITS, MemoryBudget(2**30))
    begun = time.monotonic()
    monitor.return_memory(lambda: time.sleep(0.1))
    monitor.budget.count("bodies", "", TRIM_BYTES)
    monitor.budget.count("bodies", "", -TRIM_BYTES)
    assert not monitor.has_memory_to_return(begun + 2)
    assert monitor.has_memory_to_return(time.monotonic() + 1000)


def test_closed_connections_free_their_memory_at_once():
    budget = MemoryBudget(2**30)
    monitor = ConnectionMonitor(LIMITS, budget)
    monitor.sweep([FakeConnection() for _ in range(100)], 0.0)
    monitor.release(90)
    assert budget.used == 90 * CONNECTION_BYTES
    monitor.release(95)  # five were opened meanwhile
    assert budget.used == 90 * CONNECTION_BYTES
    monitor.sweep([], 1.0)
    assert budget.used == 0
