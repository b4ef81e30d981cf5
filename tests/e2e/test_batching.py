"""Continuous batching, seen from outside: requests join and leave, and none changes what another gets."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from openai import AsyncOpenAI
from support.serving import ServerProcess

FOREVER = 8000
"""Tokens that no request of these tests lives to see."""

pytestmark = pytest.mark.anyio


async def open_stream(client: AsyncOpenAI, prompt: str, max_tokens: int) -> Any:
    return await client.completions.create(
        model="tiny", prompt=prompt, max_tokens=max_tokens, temperature=1, stream=True, extra_body={"ignore_eos": True}
    )


async def test_a_late_request_is_served_while_earlier_ones_run(
    server: ServerProcess, async_client: AsyncOpenAI
) -> None:
    """By the order of events: the long ones began first, run during the short one, and outlive it."""
    server.wait_until_idle()
    events: list[str] = []
    all_began = asyncio.Event()

    async def follow(name: str, stream: Any) -> None:
        async for _ in stream:
            events.append(name)
            if len(set(events)) == 3:
                all_began.set()

    streams = {f"long {n}": await open_stream(async_client, "x" * (50 * n + 1), FOREVER) for n in range(3)}
    tasks = [asyncio.create_task(follow(name, stream)) for name, stream in streams.items()]
    await all_began.wait()
    before = len(events)
    # A prompt of several chunks, which are computed in steps that also decode for the long ones; and more tokens than
    # the client reads at once.
    await follow("short", await open_stream(async_client, "y" * 300, 200))
    running = server.metrics().num_requests_running
    first = events.index("short")
    last = len(events) - 1 - events[::-1].index("short")
    assert before <= first
    assert set(events[first:last]) >= streams.keys(), "each long one got tokens between the short one's"
    assert running == 3, "the long ones outlive it"
    assert not any(task.done() for task in tasks)
    for stream in streams.values():
        await stream.close()
    await asyncio.gather(*tasks, return_exceptions=True)
    server.wait_until_idle()


def random_request(rng: random.Random) -> dict[str, Any]:
    """Any prompt and parameters, but repeatable: greedy or with a seed."""
    options = {
        "prompt": [rng.randrange(4, 260) for _ in range(rng.randint(1, 150))],
        "max_tokens": rng.randint(1, 60),
        "temperature": rng.choice([0, 0, 0.7, 1, 2]),
        "top_p": rng.choice([1, 0.9, 0.5]),
        "seed": rng.randrange(2**40),
        "n": rng.choice([1, 1, 1, 2]),
        "presence_penalty": rng.choice([0, 0, 1.5, -1]),
        "frequency_penalty": rng.choice([0, 0, 1, -0.5]),
        "logprobs": rng.choice([None, None, 3]),
        "stop": rng.choice([None, None, ["a", "e"]]),
    }
    extra = {
        "top_k": rng.choice([0, 0, 5, 50]),
        "min_p": rng.choice([0, 0, 0.1]),
        "repetition_penalty": rng.choice([1, 1, 1.4]),
        "ignore_eos": rng.random() < 0.7,
        "return_token_ids": True,
    }
    return {"model": "tiny", "extra_body": extra, **options}


async def answer(client: AsyncOpenAI, request: dict[str, Any]) -> list[tuple[str, list[int], str]]:
    found = await client.completions.create(**request)
    return [(choice.text, choice.token_ids, choice.finish_reason) for choice in found.choices]


@pytest.mark.parametrize("crowd", range(3))
async def test_an_answer_is_the_same_alone_and_among_sixteen_others(
    server: ServerProcess, async_client: AsyncOpenAI, crowd: int
) -> None:
    rng = random.Random(crowd)
    requests = [random_request(rng) for _ in range(17)]
    alone = [await answer(async_client, request) for request in requests]
    before = server.wait_until_idle()
    together = await asyncio.gather(*(answer(async_client, request) for request in requests))
    after = server.wait_until_idle()
    for request, one, same in zip(requests, alone, together, strict=True):
        assert one == same, request
    tokens = after.generation_tokens_total - before.generation_tokens_total
    steps = after.engine_step_seconds_count - before.engine_step_seconds_count
    assert steps < tokens / 3, "they ran together"


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 11}], ids=["greedy", "seeded"])
async def test_a_stream_is_the_same_alone_and_among_sixteen_others(
    server: ServerProcess, async_client: AsyncOpenAI, sampling: dict[str, Any]
) -> None:
    async def text() -> str:
        stream = await async_client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "How are you?"}], max_tokens=40, stream=True, **sampling
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    alone = await text()
    others = [await open_stream(async_client, "z" * random.Random(n).randint(1, 200), FOREVER) for n in range(16)]
    for other in others:
        await anext(aiter(other))
    assert server.metrics().num_requests_running == 16
    assert await text() == alone
    assert server.metrics().num_requests_running == 16
    for other in others:
        await other.close()
    server.wait_until_idle()
