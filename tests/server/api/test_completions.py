"""`POST /v1/completions`: prompts of every kind, the order of choices, the older log-probabilities."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pyllm.engine.messages import TokenLogprobs
from pyllm.server.api.completions import Completion
from pyllm.server.generation import generation
from pyllm.server.generation.token_details import LegacyLogprobs

CONTEXT = 200

REPLY = "Hello, wörld!"


def test_whole_answer_has_openai_shape_and_16_tokens_by_default(harness):
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


def test_whole_numbers_may_be_written_with_a_point(harness):
    def post(data):
        return harness.post("/v1/completions", content=data, headers={"content-type": "application/json"})

    assert post(b'{"prompt": [5.0, 6], "max_tokens": 3.0, "seed": -7e0, "temperature": 1.0}').status_code == 200
    (_, prompt, params), *_ = harness.engine.requests
    assert repr((prompt, params.max_tokens, params.seed, params.temperature)) == "([5, 6], 3, -7, 1.0)"
    for field, param in (
        (b'"max_tokens": 3.5', "max_tokens"), (b'"seed": 1e17', "seed"), (b'"stream": 1.0', "stream"),
        (b'"seed": 1e999', None),
    ):  # fmt: skip
        response = post(b'{"prompt": "a", %s}' % field)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


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


def test_stream_has_the_text_and_logprobs_of_the_whole_answer(harness, events_of):
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


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("fields", [{}, {"stop": ["wö"]}, {"stop": ["o"]}, {"max_tokens": 9}, {"stop": ["ld!?"]}])
def test_offsets_divide_the_text_whole_and_streamed(harness, events_of, fields, echo):
    asked = {"logprobs": 1, "echo": echo, "max_tokens": 30} | fields
    whole = harness.complete(**asked).json()["choices"][0]
    pieces = [event["choices"][0] for event in events_of(harness.complete(stream=True, **asked))]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for piece in pieces if piece["logprobs"] for value in piece["logprobs"][name]] == values
    offsets = [*whole["logprobs"]["text_offset"], len(whole["text"])]
    slices = [whole["text"][a:b] for a, b in pairwise(offsets)]
    assert "".join(slices) == whole["text"]
    assert len(slices) == len(whole["logprobs"]["tokens"])
    assert all(
        part in ("", token) or "\ufffd" in token
        for part, token in zip(slices, whole["logprobs"]["tokens"], strict=True)
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": "x"},
        {"best_of": 2},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"logprobs": 21},
        {"prompt_logprobs": -1},
        {"truncate_prompt_tokens": 0},
        {"min_tokens": 17},
        {"stream_options": {}},
    ],
)
def test_fields_that_cannot_be_honoured_are_named(harness, fields):
    response = harness.complete(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] in fields
    assert harness.engine.requests == []


def test_fields_that_ask_for_nothing_are_taken(harness):
    idle = {"suffix": "", "best_of": 1, "echo": False, "logprobs": None, "user": "me", "metadata": {"a": "b"}}
    assert harness.complete(**idle).json()["choices"][0]["text"] == REPLY


def test_too_many_sequences_at_once_are_refused(harness):
    response = harness.complete(prompt=["a"] * 10, n=128)
    assert response.status_code == 400
    assert harness.engine.requests == []


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_logprobs": 20},
        {"echo": True, "logprobs": 20},
        {"logprobs": 20, "max_tokens": 100},
        {"prompt_logprobs": 20, "stream": True},
    ],
)
def test_more_candidates_than_memory_holds_are_refused(harness, fields):
    response = harness.post("/v1/completions", {"prompt": [[5] * 100] * 8, "n": 128} | fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "n"
    assert "the limit is 2097152" in response.json()["error"]["message"]
    assert harness.engine.requests == []


def test_the_lists_of_all_sequences_together_have_a_bound(harness):
    words = ["é" * 200 + str(n) for n in range(128)]
    response = harness.post("/v1/completions", {"prompt": [[5]] * 8, "n": 128, "bad_words": words})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "bad_words"
    assert harness.engine.requests == []


def test_dynamics_of_too_many_tokens_are_refused(harness, monkeypatch):
    monkeypatch.setattr(generation, "MAX_SHOWN", 99)
    body = {"prompt": "Hi", "return_dynamics": True, "ignore_eos": True}
    # Two layers and the token itself are three candidates.
    assert harness.post("/v1/completions", body | {"max_tokens": 33}).status_code == 200
    assert harness.post("/v1/completions", body | {"max_tokens": 34}).status_code == 400
    assert harness.post("/v1/completions", body | {"max_tokens": 34, "stream": True}).status_code == 200


def test_a_refused_prompt_leaves_no_other_running(harness):
    response = harness.complete(prompt=[[70], [71], [99999]])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"
    assert harness.engine.running == set()


def joined(events):
    """Each choice of a stream, with its pieces put together as a client would."""
    choices: dict[int, dict] = {}
    for event in events:
        for piece in event["choices"]:
            Completion.model_validate(event)
            assert "usage" not in event
            whole = choices.setdefault(piece["index"], {"text": "", "logprobs": None})
            whole["text"] += piece.pop("text")
            logprobs = piece.pop("logprobs")
            if logprobs:
                before = whole["logprobs"] or {name: [] for name in logprobs}
                whole["logprobs"] = {name: before[name] + logprobs[name] for name in logprobs}
            for name in ("token_ids", "dynamics"):
                if name in piece:
                    whole[name] = whole.get(name, []) + piece.pop(name)
            assert not {"prompt_logprobs", "prompt_token_ids"} & piece.keys() & whole.keys(), "each is reported once"
            whole.update(piece)
    return [choices[index] for index in sorted(choices)]


def test_echo_puts_the_prompt_before_the_text(harness):
    assert harness.complete(echo=True).json()["choices"][0]["text"] == "Hi" + REPLY
    ids = harness.tokenizer.encode("né")
    texts = [choice["text"] for choice in harness.complete(prompt=[ids, [70]], echo=True).json()["choices"]]
    assert texts == ["né" + REPLY, harness.tokenizer.token_text(70) + REPLY]


def test_echo_shows_the_first_token_only_with_special_tokens(harness):
    asked = {"echo": True, "add_special_tokens": True, "logprobs": 0}
    hidden, shown = (harness.complete(skip_special_tokens=skip, **asked).json()["choices"][0] for skip in (True, False))
    assert (hidden["text"], shown["text"]) == ("Hi" + REPLY, "<s>Hi" + REPLY)
    assert hidden["logprobs"]["text_offset"][:4] == [0, 0, 1, 2]
    assert shown["logprobs"]["text_offset"][:4] == [0, 3, 4, 5]


def test_echo_with_logprobs_begins_with_those_of_the_prompt(harness):
    logprobs = harness.complete(prompt="abé", echo=True, logprobs=1, max_tokens=2).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "\ufffd", "\ufffd", "H", "e"]
    assert logprobs["token_logprobs"] == [None, -2, -3, -4, -0.5, -0.5]
    assert logprobs["top_logprobs"][:2] == [None, {"<s>": -0.25, "b": -2}]
    assert logprobs["text_offset"] == [0, 1, 2, 2, 3, 4]
    assert harness.complete(echo=True).json()["choices"][0]["logprobs"] is None
    assert harness.engine.requests[-1][2].prompt_logprobs is None, "nothing is computed that was not requested"


def test_a_prompt_that_ends_inside_a_character_shifts_no_offsets(harness):
    choice = harness.complete(prompt=[harness.tokenizer.encode("aé")[:-1]], echo=True, logprobs=0).json()["choices"][0]
    assert choice["text"] == "a\ufffd" + REPLY
    assert choice["logprobs"]["text_offset"][:4] == [0, 1, 2, 3]


def test_of_candidates_that_look_alike_the_likeliest_is_shown(harness):
    """A scorer compares the chosen token with the best candidate to see whether it was greedy."""
    ids = harness.tokenizer.encode("é")
    position = TokenLogprobs(token_id=ids[0], logprob=-2.0, top=[(ids[1], -0.5), (ids[0], -2.0)])
    shown = LegacyLogprobs(harness.tokenizer, True).write([position])
    assert shown["top_logprobs"] == [{"\ufffd": -0.5}]
    assert shown["token_logprobs"] == [-2.0]


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"prompt": ["Hi", "Ho"]}, {"stream": True}])
def test_a_prompt_is_scored_without_an_answer(harness, events_of, fields):
    response = harness.complete(echo=True, max_tokens=0, logprobs=1, **fields)
    choices = joined(events_of(response)) if "stream" in fields else response.json()["choices"]
    assert len(choices) == (1 if fields in ({}, {"stream": True}) else 2)
    for choice, text in zip(choices, ["Hi", "Ho" if "prompt" in fields else "Hi"], strict=False):
        assert (choice["text"], choice["finish_reason"]) == (text, "length")
        assert choice["logprobs"]["token_logprobs"] == [None, -2]
    if "stream" not in fields:
        assert response.json()["usage"]["completion_tokens"] == 0
        assert 'pyllm:generation_tokens_total{model_name="org/tiny"} 0.0' in harness.get("/metrics").text


def test_a_scored_prompt_may_fill_the_context(harness):
    ids = [70] * CONTEXT
    assert harness.complete(prompt=ids, echo=True, max_tokens=0).status_code == 200
    error = harness.complete(prompt=ids, echo=True, max_tokens=1).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


def test_the_default_of_max_tokens_is_what_each_prompt_leaves(harness):
    harness.engine.reply = "x" * 40
    prompts = [[70] * (CONTEXT - 5), [70]]
    answer = harness.complete(prompt=prompts).json()
    assert [len(choice["text"]) for choice in answer["choices"]] == [5, 16]
    answer = harness.complete(prompt=prompts, max_tokens=16).json()
    assert [len(choice["text"]) for choice in answer["choices"]] == [5, 16]
    assert harness.complete(prompt=[70] * CONTEXT).json()["error"]["code"] == "context_length_exceeded"


def test_prompt_logprobs_name_each_candidate_by_its_id(harness):
    choice = harness.complete(prompt="ab", prompt_logprobs=2, logprobs=0, echo=True).json()["choices"][0]
    b = harness.tokenizer.encode("b")[0]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "2": {"logprob": -0.25, "rank": 1, "decoded_token": "<s>"},
            str(b): {"logprob": -2.0, "rank": 2, "decoded_token": "b"},
        },
    ]
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"b": -2}], "each field has as many as it asked for"
    fewer = harness.complete(prompt="ab", prompt_logprobs=0, logprobs=2, echo=True).json()["choices"][0]
    assert list(fewer["prompt_logprobs"][1]) == [str(b)]
    assert list(fewer["logprobs"]["top_logprobs"][1]) == ["<s>", "b"]


EVERYTHING = {
    "echo": True,
    "logprobs": 1,
    "prompt_logprobs": 2,
    "return_token_ids": True,
    "return_dynamics": True,
}


@pytest.mark.parametrize(
    "fields",
    [
        EVERYTHING,
        EVERYTHING | {"max_tokens": 0},
        EVERYTHING | {"logit_bias": {"5": 1}, "stop": "wö"},
        {"echo": True},
        {"echo": True, "max_tokens": 0},
        {"echo": True, "stop": "H"},
        {"prompt_logprobs": 0},
        {"prompt_logprobs": 1, "stop": "H"},
        {"return_token_ids": True, "stop": "H"},
        {"return_dynamics": True, "stop": "llo"},
    ],
)
def test_a_stream_has_all_that_the_whole_answer_has(harness, events_of, fields):
    asked = {"prompt": ["ab", "né"], "n": 2} | fields
    whole = Completion.model_validate_json(harness.complete(**asked).content)
    streamed = joined(events_of(harness.complete(stream=True, **asked)))
    for choice, expected in zip(streamed, whole.choices, strict=True):
        expected = expected.model_dump(exclude_none=False)
        extra = ("token_ids", "dynamics", "prompt_logprobs", "prompt_token_ids", "stop_reason")
        got = {name: choice.get(name) for name in ("index", "text", "logprobs", "finish_reason", *extra)}
        if fields.get("max_tokens") == 0:
            got |= {name: got[name] or expected[name] for name in ("token_ids", "dynamics")}
        assert got == expected


def test_dynamics_are_reported_for_each_token(harness):
    choice = harness.complete(max_tokens=2, return_dynamics=True).json()["choices"][0]
    assert [entry["token"] for entry in choice["dynamics"]] == ["H", "e"]
    assert choice["dynamics"][1]["experts"] == [2, 0]
    assert "dynamics" not in harness.complete().json()["choices"][0]


def test_a_prompt_is_cut_to_its_last_tokens(harness):
    for keep, expected in ((2, "de"), (-1, "abcde"), (9, "abcde")):
        choice = harness.complete(prompt="abcde", truncate_prompt_tokens=keep, return_token_ids=True).json()["choices"][
            0
        ]
        assert harness.tokenizer.decode(choice["prompt_token_ids"]) == expected
    long = "x" * 8000
    assert harness.complete(prompt=long).json()["error"]["code"] == "context_length_exceeded"
    harness.complete(prompt=long, truncate_prompt_tokens=-1)
    assert len(harness.engine.requests[-1][1]) == CONTEXT - 16
    harness.complete(prompt=long, truncate_prompt_tokens=-1, max_tokens=3)
    assert len(harness.engine.requests[-1][1]) == CONTEXT - 3


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}},
        {"structured_outputs": {"regex": "a+"}},
        {"structured_outputs": {"choice": ["a", "b"]}},
    ],
)
def test_the_form_of_the_text_reaches_the_engine_as_a_grammar(harness, fields):
    assert harness.complete(**fields).status_code == 200
    assert harness.engine.requests[0][2].grammar
    assert harness.complete(response_format={"type": "text"}).status_code == 200
    assert harness.engine.requests[1][2].grammar is None


def test_a_schema_in_hugging_faces_place_is_enforced(harness):
    form = {"name": "n", "schema": {"type": "integer"}}
    harness.complete(response_format={"type": "json_schema", "json_schema": form})
    assert harness.complete(response_format={"type": "json_object", "value": form["schema"]}).status_code == 200
    assert harness.engine.requests[1][2].grammar == harness.engine.requests[0][2].grammar
    refused = harness.complete(response_format={"type": "json_object", "value": {"type": "whole number"}})
    assert refused.json()["error"]["param"].startswith("response_format.value")


def test_sampling_fields_reach_the_engine(harness):
    harness.complete(
        logit_bias={"5": 1.5, "7": -100}, allowed_token_ids=[70, 71], bad_words=["no"], min_tokens=2,
        stop_token_ids=[9], temperature=0.5, top_p=0.25, top_k=7, min_p=0.125, seed=3,
        presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.5, ignore_eos=True, include_stop_str_in_output=True,
    )  # fmt: skip
    params = harness.engine.requests[0][2]
    assert params.logit_bias == {5: 1.5, 7: -100}
    assert (params.allowed_token_ids, params.min_tokens, params.stop_token_ids) == ((70, 71), 2, (9,))
    assert tuple(harness.tokenizer.encode("no")) in params.bad_words
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.5, 0.25, 7, 0.125, 3)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.5)
    assert params.ignore_eos
    assert params.include_stop_str_in_output
