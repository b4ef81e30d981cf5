"""`max_tokens` is an upper limit, clamped to what fits on every route; a prompt that does not fit is refused."""

from __future__ import annotations

from typing import Any

import pytest

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
FIELDS = {
    CHAT: ("max_tokens", "max_completion_tokens"),
    COMPLETIONS: ("max_tokens",),
    RESPONSES: ("max_output_tokens",),
    MESSAGES: ("max_tokens",),
}
PLACES = [(path, field) for path, fields in FIELDS.items() for field in fields]
LIMITS = [4096, 16384, 32000, 10**6, 2**31 - 1, 2**31, 2**53, 2**63 - 1]


def body(path: str, text: str, **fields: Any) -> dict[str, Any]:
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "model": "org/tiny"}
    if path in (COMPLETIONS, RESPONSES):
        prompt = {"prompt" if path == COMPLETIONS else "input": text}
    return prompt | fields


def result(path: str, answer: dict[str, Any]) -> tuple[int, int, Any]:
    """The tokens of the prompt and of the answer, and why it ended."""
    usage = answer["usage"]
    if path == RESPONSES:
        assert answer["status"] == "incomplete"
        return usage["input_tokens"], usage["output_tokens"], answer["incomplete_details"]["reason"]
    if path == MESSAGES:
        return usage["input_tokens"] + usage["cache_read_input_tokens"], usage["output_tokens"], answer["stop_reason"]
    return usage["prompt_tokens"], usage["completion_tokens"], answer["choices"][0]["finish_reason"]


REASONS = {CHAT: "length", COMPLETIONS: "length", RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}


@pytest.fixture(autouse=True)
def endless(harness):
    harness.engine.reply = "x" * 1000


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(("path", "field"), PLACES)
def test_a_limit_above_what_fits_is_clamped(harness, path, field, limit):
    context = harness.engine.info.config.max_model_len
    response = harness.post(path, body(path, "Hello", **{field: limit}))
    assert response.status_code == 200, response.text
    prompt, tokens, reason = result(path, response.json())
    assert (prompt + tokens, reason) == (context, REASONS[path])


@pytest.mark.parametrize(("path", "field"), PLACES)
def test_a_stream_is_clamped_too(harness, path, field):
    context = harness.engine.info.config.max_model_len
    options = {"stream_options": {"include_usage": True}} if path in (CHAT, COMPLETIONS) else {}
    response = harness.post(path, body(path, "Hello", stream=True, **{field: 16384}, **options))
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert any(f'"{REASONS[path]}"' in event for event in events[-4:])
    tokens = result(path, harness.post(path, body(path, "Hello", **{field: 16384})).json())[1]
    counted = {CHAT: "completion_tokens", COMPLETIONS: "completion_tokens"}.get(path, "output_tokens")
    assert f'"{counted}":{tokens}' in "".join(events[-3:])
    assert tokens > context // 2


@pytest.mark.parametrize("limit", [2**63, 10**30, 0, -1])
@pytest.mark.parametrize(("path", "field"), PLACES)
def test_a_limit_that_is_no_count_is_refused_by_name(harness, path, field, limit):
    response = harness.post(path, body(path, "Hello", **{field: limit}))
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize("limit", [1, 16384])
@pytest.mark.parametrize(("path", "field"), PLACES)
def test_a_prompt_that_fills_the_context_is_refused(harness, path, field, limit):
    context = harness.engine.info.config.max_model_len
    base = result(path, harness.post(path, body(path, "", **{field: limit})).json())[0] if path != COMPLETIONS else 0
    fits = harness.post(path, body(path, "x" * (context - base - 1), **{field: limit}))
    assert result(path, fits.json())[:2] == (context - 1, 1)
    for length in (context, context + 30):
        response = harness.post(path, body(path, "x" * (length - base), **{field: limit}))
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert f"{context} tokens" in error["message"]
        assert f"{length} tokens" in error["message"]


@pytest.mark.parametrize(("path", "field"), [place for place in PLACES if place[0] != MESSAGES])
def test_more_min_tokens_than_fit_are_refused(harness, path, field):
    response = harness.post(path, body(path, "Hello", **{field: 16384}, min_tokens=1000))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "min_tokens")
    assert "1000" in error["message"]
    assert "200" in error["message"]
    assert harness.post(path, body(path, "Hello", **{field: 16384}, min_tokens=20)).status_code == 200
    long = harness.post(path, body(path, "x" * 300, **{field: 16384}, min_tokens=20)).json()["error"]
    assert long["code"] == "context_length_exceeded"


def test_each_prompt_has_its_own_limit(harness):
    context = harness.engine.info.config.max_model_len
    prompts = ["a", "a" * 150, "a" * (context - 1)]
    answer = harness.complete(prompt=prompts, max_tokens=10**6, n=2).json()
    lengths = [len(choice["text"]) for choice in answer["choices"]]
    assert lengths == [context - len(prompt) for prompt in prompts for _ in range(2)]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    counted = [line for line in harness.get("/metrics").text.splitlines() if "generation_tokens_total{" in line]
    assert float(counted[0].split()[-1]) == answer["usage"]["completion_tokens"] == sum(lengths)


def test_echo_and_logprobs_are_clamped_with_the_text(harness):
    context = harness.engine.info.config.max_model_len
    choice = harness.complete(prompt="ab", max_tokens=4096, echo=True, logprobs=1).json()["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == len(choice["text"]) == context
    assert harness.chat(max_tokens=4096, logprobs=True, top_logprobs=2).status_code == 200


@pytest.mark.parametrize("limit", [150, 1023, 16384, 10**6])
def test_a_huge_limit_does_not_cost_the_prompt(harness, limit):
    context = harness.engine.info.config.max_model_len
    for length, kept in ((30, 30), (context - 1, context - 1), (context + 50, context - 1)):
        answer = harness.complete(prompt="a" * length, truncate_prompt_tokens=-1, max_tokens=limit).json()
        assert answer["usage"]["prompt_tokens"] == kept
        assert answer["usage"]["completion_tokens"] == min(limit, context - kept)
    whole = harness.chat(max_tokens=limit).json()["usage"]["prompt_tokens"]
    assert harness.chat(max_tokens=limit, truncate_prompt_tokens=-1).json()["usage"]["prompt_tokens"] == whole
    items = [{"role": "user", "content": "a" * 20} for _ in range(12)]
    fields = {"truncation": "auto", "max_output_tokens": limit}
    whole, kept = (harness.post(RESPONSES, {"input": items[:4], **more}).json() for more in ({}, fields))
    assert kept["usage"] == whole["usage"]
    assert kept["max_output_tokens"] == limit
    cut = harness.post(RESPONSES, {"input": items, **fields}).json()["usage"]
    assert context // 2 < cut["input_tokens"] < context
