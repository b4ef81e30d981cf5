"""`POST /v1/embeddings`: inputs of every kind, formats of vectors, the counts."""

from __future__ import annotations

import base64
import logging

import numpy as np
import pytest

from pyllm.server.api.embeddings import EmbeddingList

CONTEXT = 200


def embed(harness, **fields):
    response = harness.post("/v1/embeddings", {"input": "Hi"} | fields)
    assert response.status_code == 200, response.text
    return EmbeddingList.model_validate_json(response.content)


def expected(harness, ids, pooling="mean"):
    vector = np.array(harness.engine.embed(ids, pooling))
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize(
    ("given", "texts"),
    [("ab", ["ab"]), (["a", "b"], ["a", "b"]), ([70, 71], [[70, 71]]), ([[70], [71, 72]], [[70], [71, 72]])],
)
def test_inputs_may_be_text_or_ids_one_or_many(harness, given, texts):
    answer = embed(harness, input=given)
    ids = [harness.tokenizer.encode(item) if isinstance(item, str) else item for item in texts]
    assert [item.index for item in answer.data] == list(range(len(ids)))
    for item, tokens in zip(answer.data, ids, strict=True):
        assert item.embedding == pytest.approx(expected(harness, tokens), abs=1e-7)
        assert np.linalg.norm(item.embedding) == pytest.approx(1, abs=1e-6)
    count = sum(map(len, ids))
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (count, count)
    assert (answer.object, answer.model) == ("list", "org/tiny")


def test_base64_holds_the_same_numbers(harness):
    as_floats, as_text = (embed(harness, encoding_format=form).data[0].embedding for form in ("float", "base64"))
    assert isinstance(as_text, str)
    assert np.frombuffer(base64.b64decode(as_text), "<f4").tolist() == as_floats


def test_pooling_is_the_mean_or_the_last(harness):
    ids = harness.tokenizer.encode("Hi")
    assert embed(harness, pooling="last").data[0].embedding == pytest.approx(expected(harness, ids, "last"), abs=1e-7)
    assert embed(harness, pooling=None).data == embed(harness, pooling="mean").data == embed(harness).data


def test_the_log_counts_the_tokens_of_all_inputs(harness, caplog):
    caplog.set_level(logging.INFO, logger="pyllm.server")
    embed(harness, input=[[3, 4]] * 100)
    assert "prompt_tokens=200 " in caplog.records[-1].getMessage()


def test_the_log_counts_all_inputs_until_the_engine_fails(harness, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="pyllm.server")
    answer, answered = harness.engine._answer, []

    async def answer_twelve_times(stream, message):
        answered.append(message)
        await answer(stream, message) if len(answered) <= 12 else stream.die("gone")

    monkeypatch.setattr(harness.engine, "_answer", answer_twelve_times)
    at_once = harness.engine.info.config.max_num_seqs
    assert at_once < 12
    assert harness.post("/v1/embeddings", {"input": [[3, 4]] * (2 * at_once)}).status_code >= 500
    assert f"prompt_tokens={2 * 2 * at_once} " in caplog.records[-1].getMessage()


def test_more_inputs_than_run_at_once_are_answered_in_order(harness):
    given = [[3 + n % 200] for n in range(1100)]
    answer = embed(harness, input=given)
    assert [item.index for item in answer.data] == list(range(1100))
    assert answer.data[1099].embedding == pytest.approx(expected(harness, given[1099]), abs=1e-7)


def test_inputs_may_fill_the_context_and_be_cut_to_it(harness):
    assert embed(harness, input=[70] * CONTEXT).usage.prompt_tokens == CONTEXT
    response = harness.post("/v1/embeddings", {"input": [70] * (CONTEXT + 1)})
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert response.json()["error"]["param"] == "input"
    assert embed(harness, input="x" * 9000, truncate_prompt_tokens=-1).usage.prompt_tokens == CONTEXT
    assert embed(harness, input="abc", truncate_prompt_tokens=2).usage.prompt_tokens == 2
    assert embed(harness, input="abc", add_special_tokens=True).usage.prompt_tokens == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input[0]"),
        ({"input": None}, "input"),
        ({"input": [70, "a"]}, "input"),
        ({"input": [99999]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"dimensions": 2}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"pooling": "max"}, "pooling"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"stream": True}, "stream"),
    ],
)
def test_a_refusal_names_the_field(harness, fields, param):
    response = harness.post("/v1/embeddings", {"input": "Hi"} | fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)
    assert not harness.engine.running


def test_the_hidden_size_is_the_only_number_of_dimensions(harness):
    assert embed(harness, dimensions=4, user="me").data == embed(harness).data


def test_priority_reaches_the_engine(harness):
    embed(harness, priority=-5)
    assert harness.engine.extras[-1][0] == -5


def test_metrics_of_generation_see_only_the_prompts(harness):
    embed(harness, input=["ab", "c"])
    text = harness.get("/metrics").text
    label = '{model_name="org/tiny"}'
    for name, value in (
        ("prompt_tokens_total", 3),
        ("generation_tokens_total", 0),
        ("time_to_first_token_seconds_count", 0),
        ("inter_token_latency_seconds_count", 0),
        ("e2e_request_latency_seconds_count", 2),
    ):
        assert f"pyllm:{name}{label} {value}.0" in text
