"""Bodies and fields that no endpoint takes: what is said of them, in few words."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from support.answers import error_of

from pyllm.server.flags import ServerConfig
from pyllm.server.http import body

CONTEXT = 200
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "user", "content": []}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [USER | {"mood": "good"}]}, "messages[0].mood"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": list("abcde")}, "stop"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"color": 1}}, "stream_options.color"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"best_of": True}, "best_of"),
        ({"frobnicate": 1}, "frobnicate"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refused_field_is_a_400_that_names_it_even_for_streams(harness, fields, param, stream):
    response = harness.chat(**({"stream": True} if stream and "stream_options" not in fields else {}) | fields)
    assert response.status_code == 400
    error = error_of(response)
    assert error.param == param
    assert param.split(".")[-1].split("[")[0] in error.message
    assert error.type == "invalid_request_error"
    assert error.code
    assert harness.engine.running == set()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b'"x"', b'{"messages": NaN}', b'{"temperature": Infinity, "messages": []}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"user": "\xff"}', b'{"user": "\xed\xa0\x80"}',
        b'{"seed": ' + b"9" * 5000 + b"}", b'{"temperature": 1e999}', b"[" * 200_000, b'{"a":' * 100_000,
    ],
    ids=lambda data: repr(data[:30]),
)  # fmt: skip
def test_unparsable_body_is_a_400(harness, data):
    response = harness.post(CHAT, content=data, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error_of(response).message


def test_a_giant_id_list_is_refused_quickly_and_in_short(harness):
    response = harness.post("/v1/completions", {"prompt": [1] * 300_000 + ["x"]})
    assert response.status_code == 400
    assert len(response.content) < 1000


@pytest.mark.parametrize("size", [CONTEXT + 10, 100_000])
def test_context_overflow_says_what_the_limit_is(harness, size):
    chat = harness.chat(messages=[USER | {"content": "x" * size}])
    for response, field in ((harness.complete(prompt="x" * size), "prompt"), (chat, "messages")):
        error = error_of(response)
        assert response.status_code == 400
        assert (error.code, error.param) == ("context_length_exceeded", field)
        assert str(CONTEXT) in error.message


@pytest.mark.parametrize("where", ["chat_template", "chat_template_kwargs"])
def test_a_template_in_a_request_is_refused(harness, where):
    template = "{{ 7 * 7 }}"
    response = harness.chat(**{where: {"chat_template": template} if where.endswith("kwargs") else template})
    assert response.status_code == 400
    assert error_of(response).param.startswith(where)
    assert harness.engine.requests == []


def test_messages_echo_little_of_the_input(harness):
    for fields in ({"model": "z" * 500}, {"z" * 5000: 1}, {"messages": [{"role": "z" * 5000, "content": ""}]}):
        response = harness.chat(**fields)
        assert response.status_code in (400, 404)
        assert response.text.count("z") < 450


def test_message_without_a_role_names_the_role(harness):
    error = error_of(harness.chat(messages=[USER, {"content": "x"}]))
    assert error.message == "Missing required parameter: messages[1].role."
    assert (error.param, error.code) == ("messages[1].role", "missing_required_parameter")


def test_other_content_types_are_415(harness):
    assert harness.post(CHAT, content=b"a=1", headers={"content-type": "text/plain"}).status_code == 415
    gzipped = {"content-type": "application/json", "content-encoding": "gzip"}
    assert error_of(harness.post(CHAT, content=b"x", headers=gzipped)).code == "content_encoding"
    good = json.dumps({"messages": [USER]}).encode()
    for kind in ("application/json; charset=utf-8", "application/vnd.x+json", None):
        headers = {"content-type": kind} if kind else {}
        assert harness.post(CHAT, content=good, headers=headers).status_code == 200


def test_oversized_body_is_413_with_or_without_its_length(harness, monkeypatch):
    monkeypatch.setattr(body, "MAX_BODY_BYTES", 1000)

    async def chunks():
        for _ in range(20):
            yield b" " * 100

    assert harness.post(CHAT, content=b" " * 1001).status_code == 413
    response = harness.run(lambda client: client.post(CHAT, content=chunks()))
    assert response.status_code == 413
    assert error_of(response).code == "body_too_large"


@pytest.mark.parametrize(
    "fields", [{"priority": 2**31}, {"priority": "1"}, {"cache_salt": ""}, {"cache_salt": "x" * 129}]
)
def test_priority_and_salt_have_bounds(harness, fields):
    for response in (harness.chat(**fields), harness.complete(**fields)):
        assert response.status_code == 400
        assert error_of(response).param == next(iter(fields))


@pytest.mark.parametrize("field", ["metadata", "logit_bias", "stream_options", "structured_outputs"])
def test_very_many_wrong_names_are_not_listed_one_by_one(harness, field):
    error = harness.post(CHAT, {"messages": [USER], field: {f"x{n}": [] for n in range(100_000)}}).json()["error"]
    assert error["param"].startswith(field)
    assert len(error["message"]) < 1000
    assert re.search(r"has \d{6} invalid values or field names", error["message"]), "to tell each takes long"


def test_first_of_many_unknown_fields_is_named(harness):
    error = harness.post(CHAT, {"messages": [USER]} | {f"x{n}": 1 for n in range(100_000)}).json()["error"]
    assert (error["param"], error["code"]) == ("x0", "unknown_parameter")


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"prompt": "a", "logprobs": 3}, "logprobs"),
        ("/v1/completions", {"prompt": "a", "prompt_logprobs": 3}, "prompt_logprobs"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 3},
            "top_logprobs",
        ),
    ],
)
def test_more_logprobs_than_the_server_gives_are_refused(harness, path, fields, param):
    assert harness.post(path, fields).status_code == 200
    harness.service.model = dataclasses.replace(harness.model, flags=ServerConfig(max_logprobs=2))
    response = harness.post(path, fields)
    assert response.status_code == 400
    error = error_of(response)
    assert (error.param, error.message) == (param, f"{param} must be at most 2 on this server, but got 3.")
    assert harness.post(path, fields | {param: 2}).status_code == 200


def test_a_long_grammar_is_not_copied_for_many_sequences(harness):
    """Each sequence carries its own: a thousand of 200 KB would take the memory of both processes."""
    form = {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {"enum": ["1234" * n for n in range(1, 350)]}},
    }
    assert harness.complete(response_format=form, n=2).status_code == 200
    refused = harness.complete(response_format=form, n=128, prompt=["a"] * 4)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert "too long for 512 sequences" in refused.json()["error"]["message"]
