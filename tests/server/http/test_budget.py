"""The memory budget: what waits for room, what is refused, and what gives way."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
from types import SimpleNamespace

import pytest

from pyllm.engine.errors import EngineBusyError
from pyllm.server.api.chat import ChatCompletionRequest
from pyllm.server.api.completions import CompletionRequest
from pyllm.server.api.embeddings import EmbeddingRequest
from pyllm.server.api.tokenize import DetokenizeRequest
from pyllm.server.http import budget as module
from pyllm.server.http.body import parse_body, parsed_bytes
from pyllm.server.http.budget import MemoryBudget, default_limit
from pyllm.server.http.errors import ApiError
from pyllm.server.http.tolerance import Rules, Tolerance

pytestmark = pytest.mark.usefixtures("settled")


@pytest.fixture(autouse=True)
def _one_byte_a_byte(monkeypatch):
    monkeypatch.setattr(module, "BODY_FACTOR", 1)


def of_bodies(size: int, **options) -> MemoryBudget:
    """Make a budget with `size` bytes for large bodies."""
    return MemoryBudget(1000, bodies=size, **options)


@pytest.fixture
def clock(monkeypatch):
    moment = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: moment[0]))
    return moment


def test_a_reservation_waits_until_enough_is_released():
    async def main() -> list[str]:
        budget, order = of_bodies(10), []
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
        budget = of_bodies(10)
        (await budget.reserve(99)).release()
        await budget.reserve(10)

    asyncio.run(asyncio.wait_for(main(), 5))


@pytest.mark.parametrize("how", ["timeout", "cancel"])
def test_a_wait_that_ends_early_lets_the_next_one_in(monkeypatch, how):
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.05 if how == "timeout" else 5.0)

    async def main() -> None:
        budget = of_bodies(10)
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
        budget = of_bodies(10, upload_seconds=30.0)
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


def test_bytes_are_counted_by_kind_by_owner_and_in_sum():
    budget = MemoryBudget(100)
    first, second = budget.hold("responses", 30, "alice"), budget.hold("answers", 20, "bob")
    other = budget.hold("answers", 5)
    assert (budget.used, budget.by_kind["answers"], dict(budget.by_owner)) == (55, 25, {"alice": 30, "bob": 20})
    first.resize(10)
    assert (budget.used, budget.by_owner["alice"]) == (35, 10)
    for hold in (first, second, other, first):
        hold.release()
    first.record(50)
    assert (budget.used, sum(budget.by_kind.values()), dict(budget.by_owner)) == (0, 0, {}), "released for good"


def test_what_does_not_fit_is_refused_and_changes_nothing():
    budget = MemoryBudget(100)
    kept = budget.hold("responses", 60)
    with pytest.raises(ApiError, match="memory for requests is used up") as caught:
        kept.resize(101)
    assert (caught.value.status, caught.value.code, kept.size, budget.used) == (503, "memory_full", 60, 60)
    assert caught.value.headers["retry-after"]
    with pytest.raises(ApiError), budget.hold("tokenizing", 41):
        pytest.fail("it does not fit")
    with budget.hold("tokenizing", 40):
        assert budget.used == 100
    assert (budget.used, budget.num_refused) == (60, 2)


def test_one_key_cannot_use_up_the_memory_of_the_others():
    budget = MemoryBudget(100, owner_limit=50)
    budget.hold("responses", 50, "greedy")
    with pytest.raises(EngineBusyError, match="this API key hold too much memory: at most 50 bytes"):
        budget.hold("tokenizing", 1, "greedy")
    budget.hold("tokenizing", 50, "other")


@pytest.mark.parametrize("owner", ["", "the only key"])
def test_others_give_way_until_there_is_room(owner):
    budget = MemoryBudget(100)
    held = [budget.hold("connections", 30, owner) for _ in range(3)]

    def give_way() -> bool:
        if held:
            held.pop().release()
            return True
        return False

    budget.give_way = give_way
    budget.hold("answers", 50, owner)
    assert (len(held), budget.used) == (1, 80)
    with pytest.raises(ApiError):
        budget.hold("answers", 60, owner)


def test_what_is_allocated_already_is_counted_beyond_the_limit():
    budget = MemoryBudget(100)
    hold = budget.hold("answers", 10)
    hold.record(150)
    assert budget.used == 150
    hold.resize(120)
    with pytest.raises(ApiError):
        hold.resize(121)


def test_the_default_is_a_quarter_of_the_memory(monkeypatch):
    monkeypatch.setattr(module, "total_host_bytes", lambda: 2**30)
    assert default_limit() == 2**28
    monkeypatch.setattr(module, "total_host_bytes", lambda: 2**40)
    assert default_limit() == 2**31


IDS = [*range(1000, 3000)]
MESSAGE = {"role": "user", "content": "a"}
PARTS = MESSAGE | {"content": [{"type": "text", "text": "a"}]}
SCHEMA = {"type": "object", "properties": {f"p{n}": {"type": "string", "enum": [n, {}]} for n in range(2000)}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
BODIES = {
    "ids": (CompletionRequest, {"prompt": IDS * 10}),
    "small ids": (CompletionRequest, {"prompt": [1, 2] * 10_000}),
    "lists of ids": (CompletionRequest, {"prompt": [IDS] * 20}),
    "lists of one id": (EmbeddingRequest, {"input": [[n] for n in IDS]}),
    "texts": (EmbeddingRequest, {"input": ["", "é"] * 1000}),
    "ids of a text": (DetokenizeRequest, {"tokens": IDS * 10}),
    "allowed ids": (CompletionRequest, {"prompt": "a", "allowed_token_ids": IDS * 10}),
    "biases": (CompletionRequest, {"prompt": "a", "logit_bias": {str(n): 0.5 for n in range(1000)}}),
    "text": (CompletionRequest, {"prompt": "word " * 20_000}),
    "a wide text": (CompletionRequest, {"prompt": "word " * 20_000 + "\U0001f600"}),
    "short messages": (ChatCompletionRequest, {"messages": [MESSAGE] * 2000}),
    "messages in parts": (ChatCompletionRequest, {"messages": [PARTS] * 1000}),
    "a schema": (ChatCompletionRequest, {"messages": [MESSAGE], "tools": TOOLS}),
}  # fmt: skip


@pytest.mark.parametrize("escapes", [False, True])
@pytest.mark.parametrize(("model", "fields"), BODIES.values(), ids=BODIES)
def test_a_parsed_body_takes_no_more_than_is_charged(model, fields, escapes):
    data = json.dumps(fields, separators=(",", ":"), ensure_ascii=escapes).encode()
    parse_body(data, model, Tolerance(Rules({})))
    gc.collect()
    tracemalloc.start()
    try:
        body = parse_body(data, model, Tolerance(Rules({})))
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert body is not None
    assert size < parsed_bytes(data)
