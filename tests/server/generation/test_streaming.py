"""Events survive clients that split a stream wherever `str.splitlines` does, as httpx's `iter_lines`."""

from __future__ import annotations

import json

import pytest

ENDS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\r\nj"
USER = {"role": "user", "content": f"Hi{ENDS}"}
STREAMS = {
    "chat": ("/v1/chat/completions", {"messages": [USER], "logprobs": True}),
    "completions": ("/v1/completions", {"prompt": ENDS, "echo": True, "logprobs": 1}),
    "responses": ("/v1/responses", {"input": ENDS, "instructions": ENDS}),
    "messages": ("/v1/messages", {"model": "alias", "messages": [USER], "max_tokens": 100}),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("fail_after", [0, 5])
def test_no_event_holds_a_line_end(harness, name, fail_after):
    path, body = STREAMS[name]
    harness.engine.reply, harness.engine.fail_after = ENDS, fail_after
    response = harness.post(path, body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.text.splitlines() == response.text.removesuffix("\n").split("\n")
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    texts = json.dumps([json.loads(line) for line in lines])
    assert "\\u2028" in texts


def test_the_text_is_unchanged(harness):
    harness.engine.reply = ENDS
    events = harness.complete(stream=True, max_tokens=100).text.splitlines()
    chunks = [json.loads(line[6:]) for line in events if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == ENDS
    assert harness.complete(max_tokens=100).json()["choices"][0]["text"] == ENDS
