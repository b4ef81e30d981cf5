"""Answers that are too large to be held twice: encoded and sent in pieces."""

from __future__ import annotations

import asyncio
import json
import tracemalloc

import msgspec
import pytest

from pyllm.server.generation import generation
from pyllm.server.http.errors import PIECE_BYTES, Items, encode_json, encode_pieces

CONTENTS = {
    "nothing": dict,
    "no items": lambda: {"a": Items([])},
    "small": lambda: {"a": Items([1]), "b": Items(iter([{"c": "\0"}, None])), "d": "\\u0000"},
    "large": lambda: [Items("x" * 1000 for _ in range(200)), Items(range(3)), "end"],
}


def plain(content):
    """Replace `Items` by lists, which uses them up."""
    if isinstance(content, Items):
        return list(content.items)
    if isinstance(content, dict):
        return {name: plain(value) for name, value in content.items()}
    return [plain(value) for value in content] if isinstance(content, list) else content


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_pieces_are_the_json_of_the_whole(content):
    pieces = list(encode_pieces(content()))
    assert json.loads(b"".join(pieces)) == plain(content()) == json.loads(encode_json(content()))
    assert all(PIECE_BYTES <= len(piece) < 2 * PIECE_BYTES for piece in pieces[:-1])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_large_answer_is_the_same_in_pieces(harness, monkeypatch, path):
    fields = {"prompt_logprobs": 2, "temperature": 0, "seed": 1, "max_tokens": 30, "ignore_eos": True}
    if path == "/v1/completions":
        fields |= {"prompt": "Hello " * 20, "logprobs": 2}
    else:
        fields |= {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 2}
    whole = harness.post(path, fields)
    monkeypatch.setattr(generation, "LARGE_RESPONSE", 1)
    pieces = harness.post(path, fields)
    assert "content-length" in whole.headers
    assert "content-length" not in pieces.headers
    assert pieces.json()["choices"] == whole.json()["choices"]
    assert pieces.json().get("prompt_logprobs") == whole.json().get("prompt_logprobs")
    assert harness.service.budget.used == 0


async def post_raw(harness, path, fields, send):
    """Post as the HTTP server does; `send` gets what is sent."""
    request = [{"type": "http.request", "body": json.dumps(fields).encode(), "more_body": False}]
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "root_path": "", "http_version": "1.1", "scheme": "http",
        "client": ("x", 1), "server": ("x", 1),
    }  # fmt: skip

    async def receive():
        return request.pop() if request else await asyncio.Event().wait()

    await asyncio.wait_for(harness.app(scope, receive, send), 60)


def test_an_answer_is_sent_in_pieces_and_counted_until_then(harness):
    """A client that reads nothing holds one piece in the transport; the rest is counted once."""
    sent, budget = [], harness.service.budget

    async def send(message):
        held = budget.by_kind["answers"]
        sent.append((len(message.get("body", b"")), held, message.get("more_body", False)))

    asyncio.run(post_raw(harness, "/v1/embeddings", {"input": [[1]] * 2000}, send))
    pieces = sent[1:]
    total = sum(size for size, *_ in pieces)
    assert total > 2 * PIECE_BYTES
    assert max(size for size, *_ in pieces) == PIECE_BYTES
    assert min(held for _, held, _ in pieces) >= total
    assert [more for *_, more in pieces] == [True] * (len(pieces) - 1) + [False]
    assert budget.used == 0


def test_vectors_take_as_little_memory_as_is_counted_for_them(harness, monkeypatch):
    """Four bytes a number, although each is five times as long as text, and eight times as a Python float."""
    size, inputs = 1024, [[n % 200 + 3] for n in range(1000)]
    harness.engine.info = msgspec.structs.replace(harness.engine.info, hidden_size=size)
    monkeypatch.setattr(harness.engine, "embed", lambda prompt, _: [prompt[0] + n / 3 for n in range(size)])
    counted, sent = [], []

    async def send(message):
        counted.append(harness.service.budget.by_kind["answers"])
        sent.append(len(message.get("body", b"")))

    asyncio.run(post_raw(harness, "/v1/embeddings", {"input": inputs[:200]}, send))  # what is loaded on first use
    tracemalloc.start()
    try:
        asyncio.run(post_raw(harness, "/v1/embeddings", {"input": inputs}, send))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(sent) > 15 * size * len(inputs)
    assert 4 * size * len(inputs) < max(counted) < 6 * size * len(inputs)
    assert peak < max(counted) + 4 * 2**20, "1,000 inputs, the answer's pieces and the scripted engine take some too"


def test_an_answer_that_does_not_fit_is_refused_before_it_begins(harness):
    harness.service.budget.limit = 10_000
    answer = harness.post("/v1/embeddings", {"input": [[1]] * 2000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "memory_full")
    assert harness.service.budget.used == 0
