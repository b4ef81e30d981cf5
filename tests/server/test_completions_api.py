"""`POST /v1/completions`: prompts of every kind, the order of choices, the older log-probabilities."""

from __future__ import annotations

import pytest

from pyllm.server.protocol import Completion

REPLY = "Hello, wörld!"


def test_whole_answer_has_openai_shape_and_sixteen_tokens_by_default(harness):
    harness.engine.reply = "x" * 40
    answer = Completion.model_validate_json(harness.complete().content)
    assert answer.choices[0].text == "x" * 16
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("ab", ["ab"]), (["a", "b"], ["a", "b"]), ([70, 71], [[70, 71]]), ([[70], [71, 72]], [[70], [71, 72]])],
)
def test_prompts_may_be_text_or_ids_one_or_many(harness, prompt, expected):
    assert harness.complete(prompt=prompt).status_code == 200
    ids = [harness.tokenizer.encode(item) if isinstance(item, str) else item for item in expected]
    assert [request[1] for request in harness.engine.requests] == ids


def test_special_tokens_are_added_only_when_asked_for(harness):
    harness.complete(prompt="a")
    harness.complete(prompt="a", add_special_tokens=True)
    plain, marked = (request[1] for request in harness.engine.requests)
    assert marked == [2, *plain]


def test_choice_index_is_prompt_index_times_n_plus_j(harness, events_of):
    answer = harness.complete(prompt=["a", "b"], n=2, return_token_ids=True).json()
    prompts = [harness.tokenizer.decode(choice["prompt_token_ids"]) for choice in answer["choices"]]
    assert prompts == ["a", "a", "b", "b"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 2
    streamed = {}
    for event in events_of(harness.complete(prompt=["a", "b"], n=2, return_token_ids=True, stream=True)):
        choice = event["choices"][0]
        if "prompt_token_ids" in choice:
            streamed[choice["index"]] = harness.tokenizer.decode(choice["prompt_token_ids"])
    assert streamed == dict(enumerate(prompts))


def test_stream_gives_the_same_text_and_logprobs_as_the_whole_answer(harness, events_of):
    asked = {"logprobs": 2, "max_tokens": 30}
    whole = Completion.model_validate_json(harness.complete(**asked).content).choices[0]
    events = events_of(harness.complete(stream=True, stream_options={"include_usage": True}, **asked))
    chunks = [Completion.model_validate(event) for event in events]
    assert events[-1]["choices"] == []
    assert chunks[-1].usage is not None
    pieces = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(piece.text for piece in pieces) == whole.text == REPLY
    assert pieces[-1].finish_reason == "stop"
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [entry for piece in pieces if piece.logprobs for entry in getattr(piece.logprobs, name)]
        assert joined == getattr(whole.logprobs, name)


def test_text_offsets_point_at_characters_of_the_text(harness):
    logprobs = harness.complete(logprobs=0, max_tokens=30).json()["choices"][0]["logprobs"]
    assert logprobs["text_offset"][-1] == len(REPLY)
    start = logprobs["tokens"].index("w")
    assert logprobs["text_offset"][start : start + 4] == [7, 8, 8, 9]
    assert logprobs["top_logprobs"][0] == {"H": -0.5}


@pytest.mark.parametrize("fields", [{"echo": True}, {"suffix": "x"}, {"best_of": 2}, {"logit_bias": {"1": 2}}])
def test_fields_that_cannot_be_honoured_are_named(harness, fields):
    response = harness.complete(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] in fields


def test_too_many_sequences_at_once_are_refused(harness):
    response = harness.complete(prompt=["a"] * 10, n=128)
    assert response.status_code == 400
    assert harness.engine.requests == []


def test_a_refused_prompt_leaves_no_other_running(harness):
    response = harness.complete(prompt=[[70], [71], [99999]])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"
    assert harness.engine.running == set()
