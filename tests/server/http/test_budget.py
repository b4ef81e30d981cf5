"""The budget that large request bodies share."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from pyllm.engine.errors import EngineBusyError
from pyllm.server.http import budget as module
from pyllm.server.http.budget import BodyBudget


@pytest.fixture
def clock(monkeypatch):
    moment = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: moment[0]))
    return moment


def test_a_reservation_waits_until_enough_is_released():
    async def main() -> list[str]:
        budget, order = BodyBudget(10), []
        first, second = await budget.reserve(6), await budget.reserve(4)

        async def reserve(name: str, size: int) -> None:
            await budget.reserve(size)
            order.append(name)

        tasks = [asyncio.create_task(reserve("large", 8)), asyncio.create_task(reserve("small", 1))]
        await asyncio.sleep(0.01)
        second.release()
        second.release()
        await asyncio.sleep(0.01)
        assert order == [], "the small one is behind the large one, for which 4 of 8 bytes are free"
        first.release()
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(main()) == ["large", "small"]


def test_a_body_larger_than_the_budget_takes_all_of_it():
    async def main() -> None:
        budget = BodyBudget(10)
        (await budget.reserve(99)).release()
        await budget.reserve(10)

    asyncio.run(asyncio.wait_for(main(), 5))


@pytest.mark.parametrize("how", ["timeout", "cancel"])
def test_a_wait_that_ends_early_lets_the_next_one_in(monkeypatch, how):
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.05 if how == "timeout" else 5.0)

    async def main() -> None:
        budget = BodyBudget(10)
        held = await budget.reserve(6)
        waiting = asyncio.create_task(budget.reserve(8))
        await asyncio.sleep(0.01)
        monkeypatch.setattr(module, "WAIT_SECONDS", 5.0)
        small = asyncio.create_task(budget.reserve(4))
        await asyncio.sleep(0.02)
        if how == "cancel":
            waiting.cancel()
        with pytest.raises(asyncio.CancelledError if how == "cancel" else EngineBusyError):
            await waiting
        (await small).release()
        held.release()
        await budget.reserve(10)

    asyncio.run(asyncio.wait_for(main(), 5))


def test_a_slow_upload_is_overdue_only_while_others_wait(clock, monkeypatch):
    async def main() -> None:
        budget = BodyBudget(10, upload_seconds=30.0)
        held = await budget.reserve(10)
        clock[0] += 31
        assert not held.is_overdue, "the budget has been enough for all"
        monkeypatch.setattr(module, "WAIT_SECONDS", 0.01)
        with pytest.raises(EngineBusyError):
            await budget.reserve(1)
        assert held.is_overdue
        held.release()
        fresh = await budget.reserve(10)
        assert not fresh.is_overdue

    asyncio.run(asyncio.wait_for(main(), 5))
