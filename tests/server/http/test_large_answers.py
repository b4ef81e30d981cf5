"""Answers that are too large to be held twice: encoded and sent in pieces."""

from __future__ import annotations

import asyncio
import json

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


def test_an_answer_is_sent_in_pieces_and_counted_until_then(harness):
    """A client that reads nothing holds one piece in the transport; the rest is counted once."""
    sent, budget = [], harness.service.budget
    inputs = [[1]] * 2000
    request = json.dumps({"input": inputs}).encode()
    scope = {
        "type": "http", "method": "POST", "path": "/v1/embeddings", "raw_path": b"/v1/embeddings", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "root_path": "", "http_version": "1.1", "scheme": "http",
        "client": ("x", 1), "server": ("x", 1),
    }  # fmt: skip

    async def main() -> None:
        stop = asyncio.Event()

        async def receive():
            if not sent and not stop.is_set():
                stop.set()
                return {"type": "http.request", "body": request, "more_body": False}
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message):
            held = budget.by_kind["answers"]
            sent.append((len(message.get("body", b"")), held, message.get("more_body", False)))

        await harness.app(scope, receive, send)

    asyncio.run(asyncio.wait_for(main(), 60))
    pieces = sent[1:]
    total = sum(size for size, *_ in pieces)
    assert total > 2 * PIECE_BYTES
    assert max(size for size, *_ in pieces) == PIECE_BYTES
    assert min(held for _, held, _ in pieces) >= total
    assert [more for *_, more in pieces] == [True] * (len(pieces) - 1) + [False]
    assert budget.used == 0


def test_an_answer_that_does_not_fit_is_refused_before_it_begins(harness):
    harness.service.budget.limit = 10_000
    answer = harness.post("/v1/embeddings", {"input": [[1]] * 2000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "memory_full")
    assert harness.service.budget.used == 0
