"""vllm-router's policy kv_aware, which follows the events of two servers' KV caches and sends prompts by them.

PYLLM_REPLICAS has the servers' URLs, and PYLLM_EVENTS the addresses of their events and of the replay, in pairs.
"""

from __future__ import annotations

import os
import time

import attempts
import httpx
import routers
from attempts import MODEL

REPLICAS = os.environ.get("PYLLM_REPLICAS", "").split()
EVENTS = [pair.split(",") for pair in os.environ.get("PYLLM_EVENTS", "").split()]
BLOCK = 16
PROMPTS = 8


def words() -> list[str]:
    """The router's arguments."""
    found = ["--policy", "kv_aware", "--kv-event-block-size", str(BLOCK), "--kv-event-model", MODEL]
    for url, (events, replay) in zip(REPLICAS, EVENTS, strict=True):
        found += ["--kv-event-source", f"{url}={events}", "--kv-event-replay-source", f"{url}={replay}"]
    return found


def cached(server: str, text: str) -> tuple[int, int]:
    """Ask; return the tokens of the prompt, and how many of them were cached."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0}
    answer = httpx.post(f"{server}/v1/chat/completions", json=body, timeout=180).raise_for_status().json()
    usage = answer["usage"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def try_prefixes() -> None:
    """a prompt goes to the replica that has computed its beginning"""
    texts = [" ".join(f"{n} times {n + m} is {n * (n + m)}," for m in range(12)) for n in range(11, 11 + PROMPTS)]
    for number, text in enumerate(texts):
        assert cached(REPLICAS[number % 2], text)[1] < BLOCK * 2
    time.sleep(1)  # the router learns of them
    for number, text in enumerate(texts):
        before = routers.answered()
        tokens, found = cached(routers.ROUTED, text + " and so on?")
        answered = [now - then for now, then in zip(routers.answered(), before, strict=True)]
        assert answered == [1 - number % 2, number % 2], (number, answered)
        assert found >= tokens - BLOCK - 8, (number, found, tokens)


if __name__ == "__main__":
    with routers.router(*words()) as routers.ROUTED:
        attempts.main()
