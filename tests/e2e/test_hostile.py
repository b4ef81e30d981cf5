"""Thousands of hostile requests against one real server: none fails inside, none hangs, and no other client notices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.hostile import LATEST, Prober, canary, send_all
from support.hostile_groups import CONCURRENCY, FLAGS, GROUPS
from support.serving import ServerProcess


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, bytes]]:
    """A server whose health is asked for all the time, and its answer to the canary."""
    with ServerProcess(tmp_path_factory.mktemp("hostile") / "log", *FLAGS) as server:
        before = canary(server.url)
        with Prober(server.url) as prober:
            yield server, before
        assert len(prober.seconds) > 10
        assert prober.p99() <= 1, sorted(prober.seconds)[-10:]


@pytest.mark.parametrize("group", GROUPS)
def test_no_request_fails_inside_hangs_or_harms_another(watched: tuple[ServerProcess, bytes], group: str) -> None:
    server, before = watched
    engine, said = server.engine_pid, len(server.settled_log())
    outcome = send_all(server.url, GROUPS[group](), CONCURRENCY.get(group, 8))
    assert not outcome.faults, "\n".join(outcome.faults[:20])
    assert outcome.slowest[0] <= LATEST
    assert sum(n for status, n in outcome.statuses.items() if status >= 400) > outcome.tried / 10, "they are hostile"
    server.wait_until_idle()
    assert canary(server.url) == before
    assert server.engine_pid == engine
    assert "Traceback" not in server.settled_log()[said:]
