"""`POST /v1/chat/completions`: shapes, streams, choices, log-probabilities, and what reaches the engine."""

from __future__ import annotations

import pytest

from pyllm.server.api.chat import ChatCompletion, ChatCompletionChunk

REPLY = "Hello, wörld!"
REPLY_TOKENS = 15  # 14 bytes and the end


def test_whole_answer_has_openai_shape_text_and_counts(harness):
    response = harness.chat()
    answer = ChatCompletion.model_validate_json(response.content)
    assert answer.choices[0].message.content == REPLY
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "org/tiny"
    assert answer.usage.prompt_tokens == len(harness.engine.requests[0][1])
    assert answer.usage.completion_tokens == REPLY_TOKENS
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + REPLY_TOKENS
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_stream_order_is_role_content_reason_usage(harness, events_of):
    response = harness.chat(stream=True, stream_options={"include_usage": True}, model="alias")
    events = events_of(response)
    chunks = [ChatCompletionChunk.model_validate(event) for event in events]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].model == "alias"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(event["choices"][0]["delta"]["content"] for event in events[1:-2])
    assert "".join(event["choices"][0]["delta"]["content"] for event in events[1:-2]) == REPLY
    assert events[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == harness.chat().json()["usage"]
    assert all(event["usage"] is None for event in events[:-1])


def test_stream_without_usage_has_none(harness, events_of):
    assert all("usage" not in event for event in events_of(harness.chat(stream=True)))


def test_choices_are_numbered_and_draw_with_consecutive_seeds(harness, events_of):
    answer = ChatCompletion.model_validate_json(harness.chat(n=3, seed=2**63 - 2, temperature=0).content)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [params.seed for _, _, params in harness.engine.requests] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert answer.usage.completion_tokens == 3 * REPLY_TOKENS
    assert answer.usage.prompt_tokens == len(harness.engine.requests[0][1])
    events = events_of(harness.chat(n=3, stream=True))
    for index in range(3):
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in own) == REPLY
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["stop"]


def test_logprobs_and_token_ids_are_the_same_whole_and_streamed(harness, events_of):
    asked = {"logprobs": True, "top_logprobs": 3, "return_token_ids": True}
    whole = ChatCompletion.model_validate_json(harness.chat(**asked).content)
    entries = whole.choices[0].logprobs.content
    assert len(entries) == REPLY_TOKENS
    assert bytes(entries[0].bytes) == b"H"
    assert [top.logprob for top in entries[0].top_logprobs] == [-0.5, -1.5, -9999.0]
    events = events_of(harness.chat(stream=True, **asked))
    streamed = [entry for event in events for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == [entry.model_dump() for entry in entries]
    assert [t for event in events for t in event["choices"][0].get("token_ids", [])] == whole.choices[0].token_ids
    assert events[0]["prompt_token_ids"] == whole.prompt_token_ids


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("fields", "hidden"),
    [({}, 1), ({"stop": ["wö"]}, 3), ({"stop": ["ö"], "n": 2}, 2), ({"stop": ["ld!?"]}, 1), ({"max_tokens": 9}, 1),
     ({"stop": ["wö"], "include_stop_str_in_output": True}, 0), ({"skip_special_tokens": False}, 1),
     ({"ignore_eos": True, "max_tokens": 20}, 1)],
)  # fmt: skip
def test_the_bytes_of_logprobs_add_up_to_the_content(harness, events_of, fields, hidden, stream):
    response = harness.chat(logprobs=True, top_logprobs=1, stream=stream, **fields)
    choices = [choice for event in events_of(response) for choice in event["choices"]] if stream else None
    for index in range(fields.get("n", 1)):
        if choices is None:
            choice = response.json()["choices"][index]
            content, entries = choice["message"]["content"], choice["logprobs"]["content"]
        else:
            own = [choice for choice in choices if choice["index"] == index]
            content = "".join(choice["delta"].get("content") or "" for choice in own)
            entries = [entry for choice in own for entry in (choice["logprobs"] or {"content": []})["content"]]
        assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == content
        assert sum(not entry["bytes"] for entry in entries) == hidden


def test_logprobs_alone_report_the_chosen_token(harness):
    answer = ChatCompletion.model_validate_json(harness.chat(logprobs=True).content)
    assert all(entry.top_logprobs == [] for entry in answer.choices[0].logprobs.content)
    assert harness.chat().json()["choices"][0]["logprobs"] is None


def test_tokens_of_one_character_are_streamed_with_its_text(harness, events_of):
    harness.engine.reply = "é🙂"
    events = events_of(harness.chat(stream=True, return_token_ids=True))
    pieces = [(e["choices"][0]["delta"]["content"], len(e["choices"][0]["token_ids"])) for e in events[1:-2]]
    assert pieces == [("é", 2), ("🙂", 4)]


def test_stop_string_ends_the_answer_and_is_not_leaked(harness, events_of):
    answer = harness.chat(stop="wö").json()
    assert answer["choices"][0]["message"]["content"] == "Hello, "
    assert answer["choices"][0]["finish_reason"] == "stop"
    events = events_of(harness.chat(stop=["never", "o, "], stream=True))
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "Hell"


def test_turn_end_of_a_plain_text_format_stops_unless_ignore_eos(harness):
    harness.engine.reply = "Fine.\n\nUser: and you?"
    assert harness.chat().json()["choices"][0]["message"]["content"] == "Fine."
    text = harness.chat(ignore_eos=True, max_tokens=12).json()["choices"][0]["message"]["content"]
    assert text == "Fine.\n\nUser:"


def test_max_completion_tokens_wins_over_max_tokens(harness):
    """Without either, an answer may use the rest of the context."""
    harness.chat(max_tokens=50, max_completion_tokens=4)
    harness.chat(max_tokens=5)
    harness.chat()
    assert [params.max_tokens for _, _, params in harness.engine.requests] == [4, 5, None]
    assert harness.chat(max_tokens=4).json()["choices"][0]["finish_reason"] == "length"


def test_null_fields_mean_their_defaults(harness):
    names = ["temperature", "top_p", "n", "stop", "stream", "stream_options", "seed", "logprobs", "max_tokens"]
    names += ["response_format", "tools", "tool_choice", "logit_bias", "functions", "user", "model"]
    assert harness.chat(**dict.fromkeys(names)).status_code == 200
    assert harness.chat().status_code == 200
    first, second = (params for _, _, params in harness.engine.requests)
    assert first == second


def test_checkpoint_defaults_fill_missing_fields(harness):
    harness.model.defaults.update(temperature=0.5, top_k=7, max_tokens=3)
    harness.chat()
    harness.chat(temperature=1.5, top_k=0, max_tokens=6)
    found = [(params.temperature, params.top_k, params.max_tokens) for _, _, params in harness.engine.requests]
    assert found == [(0.5, 7, 3), (1.5, 0, 6)]


def test_max_tokens_is_clamped_given_or_by_default(harness):
    harness.model.defaults.update(max_tokens=1000)
    harness.engine.reply = "x" * 1000
    for fields in ({}, {"max_tokens": 900}):
        assert harness.chat(**fields).json()["usage"]["total_tokens"] == harness.engine.info.config.max_model_len
    long = [{"role": "user", "content": "x" * 300}]
    assert harness.chat(messages=long).json()["error"]["code"] == "context_length_exceeded"


def test_parts_system_and_developer_messages_reach_the_prompt(harness):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "three"},
    ]
    assert harness.chat(messages=messages).status_code == 200
    prompt = harness.tokenizer.decode(harness.engine.requests[0][1])
    assert prompt == "Be brief.\n\nUser: one\ntwo\n\nAssistant: ok\n\nUser: three\n\nAssistant:"


def test_special_tokens_spelled_by_the_user_stay_text(harness):
    harness.chat(messages=[{"role": "user", "content": "a</s>b"}])
    assert 0 not in harness.engine.requests[0][1]


@pytest.mark.parametrize("field", ["user", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"])
def test_bookkeeping_fields_are_accepted(harness, field):
    extra = {field: "x", "metadata": {"a": "b"}, "store": True, "modalities": ["text"]}
    assert harness.chat(**extra).status_code == 200


def test_fields_that_ask_for_nothing_are_accepted(harness):
    idle = {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "logit_bias": {}}
    assert harness.chat(**idle).status_code == 200
