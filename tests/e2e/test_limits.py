"""What a server holds back: requests beyond its queue, and memory."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from support.checkpoints import TINY, write_checkpoint
from support.serving import PATIENCE, ServerProcess, wait_for

GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}

FLOOD_TOKENS = 100
"""So many that requests come sooner than others end."""


async def flood(url: str, requests: int, tokens: int = FLOOD_TOKENS) -> list[httpx.Response]:
    """Send so many requests at once, streams and whole answers in turn."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:

        def ask(n: int) -> Any:
            body = {"prompt": f"Request {n}", "max_tokens": tokens, "ignore_eos": True, "stream": n % 2 == 0}
            return client.post("/v1/completions", json=body)

        return await asyncio.gather(*(ask(n) for n in range(requests)))


def test_flood_is_answered_or_refused_with_retry_after(checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--dtype", "float32", "--max-num-seqs", "4", "--max-num-queued-reqs", "8")
    with ServerProcess(tmp_path / "log", str(checkpoint), *flags) as server:
        answers = asyncio.run(flood(server.url, 120))
        assert {answer.status_code for answer in answers} == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                error = answer.json()["error"]
                assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
                assert 1 <= int(answer.headers["retry-after"]) <= 60
            elif answer.headers["content-type"].startswith("text/event-stream"):
                assert answer.text.endswith("data: [DONE]\n\n")
                assert '"error"' not in answer.text
            else:
                assert answer.json()["usage"]["completion_tokens"] == FLOOD_TOKENS
        server.wait_until_idle()
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
            with pytest.raises(openai.BadRequestError, match="at most 12 sequences at once, but got 13"):
                client.completions.create(model=checkpoint.name, prompt="x", n=13, max_tokens=1)
            answer = client.completions.create(model=checkpoint.name, prompt="x", n=12, max_tokens=1, **GREEDY)
            assert len(answer.choices) == 12


@pytest.mark.anyio
async def test_the_official_client_comes_back_by_itself_when_refused(checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--dtype", "float32", "--max-num-seqs", "1", "--max-num-queued-reqs", "1")
    with ServerProcess(tmp_path / "log", str(checkpoint), *flags) as server:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=20, timeout=PATIENCE) as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(model=checkpoint.name, prompt=prompt, max_tokens=50, **GREEDY)
                    for prompt in "abcde"
                )
            )
    assert all(answer.usage and answer.usage.completion_tokens == 50 for answer in answers)
    assert " 429 " in server.log


def test_prefix_cache_hits_unless_the_salt_differs(server: ServerProcess, client: OpenAI) -> None:
    before = server.wait_until_idle()

    def ask(salt: str | None, **options: Any) -> Any:
        extra = {"ignore_eos": True, "cache_salt": salt}
        messages: Any = [{"role": "user", "content": "The same words again. " * 8}]
        return client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=4, temperature=0, extra_body=extra, **options
        )

    first, again, salted = ask("one"), ask("one"), ask("two")
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in (first, again, salted)]
    assert cached[0] == cached[2] == 0
    assert first.usage.prompt_tokens - 16 <= cached[1] < first.usage.prompt_tokens
    assert first.choices[0].message.content == again.choices[0].message.content == salted.choices[0].message.content
    *_, last = ask("one", stream=True, stream_options={"include_usage": True})
    assert last.usage.prompt_tokens_details.cached_tokens == cached[1]
    after = server.wait_until_idle()
    assert after.prefix_cache_hits_total - before.prefix_cache_hits_total == 2 * cached[1]
    assert after.prefix_cache_queries_total - before.prefix_cache_queries_total >= 3 * first.usage.prompt_tokens


def test_priority_decides_who_is_next(checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--dtype", "float32", "--max-num-seqs", "1", "--scheduling-policy", "priority")

    async def run(url: str) -> list[int]:
        order: list[int] = []
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:

            async def ask(priority: int, tokens: int) -> None:
                extra = {"ignore_eos": True, "priority": priority}
                await client.completions.create(model=checkpoint.name, prompt="x", max_tokens=tokens, extra_body=extra)
                order.append(priority)

            first = asyncio.create_task(ask(-9, 400))
            await asyncio.to_thread(wait_for, lambda: server.metrics().num_requests_running, "the first to run")
            others = [asyncio.create_task(ask(priority, 5)) for priority in (5, 1, 3)]
            await asyncio.gather(first, *others)
        return order

    with ServerProcess(tmp_path / "log", str(checkpoint), *flags) as server:
        assert asyncio.run(run(server.url)) == [-9, 1, 3, 5]


def peak_bytes(pid: int) -> int:
    """The most memory that a process ever held."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) * 1024  # type: ignore[index]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_server_memory_is_near_weights_plus_cache(tmp_path: Path) -> None:
    config = replace(TINY, hidden_size=384, intermediate_size=1536, num_hidden_layers=12, max_position_embeddings=1024)
    folder = tmp_path / "larger"
    folder.mkdir()
    write_checkpoint(folder, seed=1, config=config)
    cache = 100 * 2**20
    flags = ("--dtype", "bfloat16", "--kv-cache-memory-bytes", str(cache))
    with ServerProcess(tmp_path / "log", str(folder), *flags, cold=True) as server:
        found = re.search(r"([\d,]+) parameters", server.log)
        assert found is not None
        weights = 2 * int(found[1].replace(",", ""))
        assert weights > 40 * 2**20, "enough to be seen next to the programs themselves"
        size = re.search(r"KV cache holds ([\d,]+) tokens, or ([\d.]+) requests of 1,024 tokens", server.log)
        assert size is not None
        assert float(size[2]) == pytest.approx(int(size[1].replace(",", "")) / 1024, abs=0.1)
        answers = asyncio.run(flood(server.url, 40, 25))  # a step holds as much at its first token as at its last
        assert all(answer.status_code == 200 for answer in answers)
        peak = peak_bytes(server.process.pid) + peak_bytes(server.engine_pid)
    assert peak <= 1.3 * (weights + cache) + 400e6
