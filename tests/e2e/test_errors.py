"""Requests that cannot be served: each gets OpenAI's error object, and no later request notices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from support.hostile import comparable

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hi"}
ENDLESS = b"9" * 5000


def canary(http: httpx.Client) -> bytes:
    body = {"model": "tiny", "messages": [USER], "temperature": 0, "max_tokens": 16, "logprobs": True}
    answer = http.post(CHAT, json=body)
    return json.dumps([answer.status_code, comparable(answer)["choices"]]).encode()


@pytest.fixture(scope="module", autouse=True)
def _later_requests_are_served_as_before(http: httpx.Client) -> Iterator[None]:
    before = canary(http)
    yield
    assert canary(http) == before


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, after a look at what all errors have in common."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert answer.json().keys() == {"error"}
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert 0 < len(error["message"]) < 1000
    return error


def chat(**fields: Any) -> tuple[str, dict[str, Any], str]:
    """A chat request that is wrong in the first of these fields."""
    return CHAT, {"messages": [USER], "max_tokens": 4} | fields, next(iter(fields))


def completion(**fields: Any) -> tuple[str, dict[str, Any], str]:
    return COMPLETIONS, {"prompt": "Hi"} | fields, next(iter(fields))


def message(**fields: Any) -> tuple[str, dict[str, Any], str]:
    return CHAT, {"messages": [USER, USER | fields]}, f"messages[1].{next(iter(fields))}"


BAD_FIELDS = {
    "no messages": chat(messages=[]),
    "messages null": chat(messages=None),
    "messages text": chat(messages="Hi"),
    "a message that is text": (CHAT, {"messages": ["Hi"]}, "messages[0]"),
    "unknown role": message(role="robot"),
    "content number": message(content=5),
    "content null": message(content=None),
    "no parts": message(content=[]),
    "image part": (CHAT, {"messages": [USER | {"content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
                   "messages[0].content[0]"),
    "unknown field": chat(temprature=1),
    "unknown field in a message": message(weight=1),
    "temperature 3": chat(temperature=3),
    "temperature below 0": completion(temperature=-0.1),
    "temperature text": chat(temperature="0.5"),
    "temperature true": chat(temperature=True),
    "top_p 0": chat(top_p=0),
    "top_p above 1": completion(top_p=1.01),
    "top_k -2": chat(top_k=-2),
    "min_p above 1": chat(min_p=1.5),
    "n 0": chat(n=0),
    "n 129": chat(n=129),
    "n 1.5": completion(n=1.5),
    "max_tokens 0": chat(max_tokens=0),
    "max_tokens negative": completion(max_tokens=-1),
    "max_completion_tokens 0": chat(max_completion_tokens=0),
    "min_tokens above max_tokens": chat(min_tokens=5),
    "empty stop": chat(stop=[""]),
    "empty stop text": chat(stop=""),
    "five stops": chat(stop=["a", "b", "c", "d", "e"]),
    "stop number": completion(stop=1),
    "stop id outside the vocabulary": chat(stop_token_ids=[272]),
    "stop id below 0": chat(stop_token_ids=[-1]),
    "logprobs 50": completion(logprobs=50),
    "logprobs number in a chat": chat(logprobs=5),
    "top_logprobs 21": chat(top_logprobs=21, logprobs=True),
    "top_logprobs alone": chat(top_logprobs=2),
    "presence_penalty 2.5": chat(presence_penalty=2.5),
    "frequency_penalty -3": chat(frequency_penalty=-3),
    "repetition_penalty 0": chat(repetition_penalty=0),
    "seed beyond 64 bits": chat(seed=2**63),
    "seed text": chat(seed="x"),
    "stream text": chat(stream="yes"),
    "stream_options without stream": chat(stream_options={"include_usage": True}),
    "unknown stream option": (CHAT, {"messages": [USER], "stream": True, "stream_options": {"often": True}},
                              "stream_options.often"),
    "model number": chat(model=7),
    "functions": chat(functions=[{"name": "f"}]),
    "tool_choice required": chat(tool_choice="required"),
    "audio": chat(audio={"voice": "alto"}),
    "logit_bias outside the vocabulary": chat(logit_bias={"272": 1}),
    "echo text": completion(echo="yes"),
    "suffix": completion(suffix="end"),
    "best_of 2": completion(best_of=2),
    "no prompt": completion(prompt=None),
    "empty prompt": completion(prompt=""),
    "no prompts": completion(prompt=[]),
    "no ids": completion(prompt=[[]]),
    "ids and texts": completion(prompt=["a", 5]),
    "id outside the vocabulary": completion(prompt=[5, 272]),
    "id beyond 64 bits": completion(prompt=[[5], [2**70]]),
    "id below 0": completion(prompt=[-5]),
    "id true": completion(prompt=[True]),
    "too many sequences": (COMPLETIONS, {"prompt": ["a"] * 200, "n": 100}, "n"),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", BAD_FIELDS)
def test_a_field_that_cannot_be_honoured_is_named(http: httpx.Client, case: str, stream: bool) -> None:
    path, body, param = BAD_FIELDS[case]
    if stream and param not in ("stream", "stream_options"):
        body = body | {"stream": True}
    error = error_of(http.post(path, json=body), 400)
    assert error["param"].startswith(param), "the field, or the place in it"
    assert param in error["message"]


@pytest.mark.parametrize(
    ("path", "field", "prompt"),
    [(CHAT, "messages", [USER | {"content": "a" * 8175}]), (COMPLETIONS, "prompt", "a" * 8192)],
    ids=["chat", "text"],
)
def test_prompt_without_room_for_an_answer_gets_the_numbers(
    http: httpx.Client, path: str, field: str, prompt: Any
) -> None:
    error = error_of(http.post(path, json={field: prompt, "max_tokens": 9000}), 400)
    assert (error["param"], error["code"]) == (field, "context_length_exceeded")
    assert "context is 8192 tokens, but the prompt has 8192 tokens" in error["message"]


def test_a_prompt_longer_than_the_context_is_refused_by_name(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "word " * 5000}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[[5], [5] * 8193])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


BAD_BODIES = {
    "nothing": b"",
    "half an object": b'{"messages": [',
    "no object": b"[1, 2]",
    "a text": b'"messages"',
    "NaN": b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}',
    "infinity": b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": Infinity}',
    "a number too large": b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": 1e999}',
    "an endless penalty": b'{"messages": [{"role": "user", "content": "Hi"}], "min_p": %s}' % ENDLESS,
    "an endless seed": b'{"messages": [{"role": "user", "content": "Hi"}], "seed": %s}' % ENDLESS,
    "an endless id": b'{"prompt": [%s]}' % ENDLESS,
    "invalid UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "half a surrogate in UTF-8": b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
    "deep lists": b'{"messages": ' + b"[" * 200_000,
    "deep closed lists": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "two values": b'{"messages": []} {}',
    "single quotes": b"{'messages': []}",
    "UTF-16": '{"messages": []}'.encode("utf-16"),
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("case", BAD_BODIES)
def test_a_body_that_is_not_right_is_refused(http: httpx.Client, path: str, case: str) -> None:
    answer = http.post(path, content=BAD_BODIES[case], headers={"content-type": "application/json"})
    error_of(answer, 400)


def test_a_lone_surrogate_in_text_is_served(http: httpx.Client) -> None:
    """JSON can spell it, UTF-8 cannot: it may be refused or replaced, but not fail inside."""
    for field, path in (("prompt", COMPLETIONS), ("stop", COMPLETIONS)):
        text = json.dumps({"prompt": "Hi", "max_tokens": 2} | {field: "a\ud800b"})
        answer = http.post(path, content=text.encode(), headers={"content-type": "application/json"})
        if answer.status_code != 200:
            error_of(answer, 400)


def test_other_content_types_are_refused(http: httpx.Client) -> None:
    body = json.dumps({"messages": [USER]}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        error_of(http.post(CHAT, content=body, headers={"content-type": kind}), 415)
    compressed = {"content-type": "application/json", "content-encoding": "gzip"}
    error_of(http.post(CHAT, content=body, headers=compressed), 415)


def test_oversized_body_is_refused_declared_or_not(http: httpx.Client) -> None:
    large = json.dumps({"messages": [USER | {"content": "x" * (8 * 2**20)}]}).encode()
    headers = {"content-type": "application/json"}
    error_of(http.post(CHAT, content=large, headers=headers), 413)
    pieces = (large[at : at + 2**16] for at in range(0, len(large), 2**16))  # sent without a content-length
    error_of(http.post(CHAT, content=pieces, headers=headers), 413)


@pytest.mark.parametrize("path", ["/v2", "/v1/nothing", "/v1/chat/completions/x", "/v1//nothing/", "/%00", "/é"])
def test_an_unknown_route_is_not_found(http: httpx.Client, path: str) -> None:
    assert error_of(http.post(path, json={}), 404)["code"] == "unknown_url"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, "POST"),
        ("PUT", COMPLETIONS, "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("POST", "/v1", "GET, HEAD"),
    ],
)
def test_wrong_method_gets_the_allowed_ones(http: httpx.Client, method: str, path: str, allowed: str) -> None:
    answer = http.request(method, path)
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == allowed


def test_messages_repeat_little_of_what_was_sent(http: httpx.Client) -> None:
    long = "é" * 100_000
    bodies = [{"model": long}, {long: 1}, {"stop": [long]}, {"messages": [{"role": long}]}, {"user": long}]
    for body in bodies:
        answer = http.post(CHAT, json={"messages": [USER]} | body)
        assert answer.status_code in (400, 404)
        assert len(error_of(answer, answer.status_code)["message"]) < 500


def test_the_official_client_raises_by_status(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.completions.create(model="tiny", prompt="Hi", temperature=5)
    assert caught.value.param == "temperature"
    assert caught.value.body["type"] == "invalid_request_error"
