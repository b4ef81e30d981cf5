"""What users of such servers complain about most: each must be impossible here."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.checkpoints import TINY, write_checkpoint
from support.serving import FOREVER, PATIENCE, ServerProcess, posted, run_command, wait_for_load

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hi"}
SEEDED = {"temperature": 1, "seed": 3}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ann", "Bob"]},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "greet", "parameters": PERSON}},
    {"type": "function", "function": {"name": "clock", "description": "Has no parameters."}},
]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, float, list[float]]]:
    """A server of its own with a generation_config.json and impatient keep-alives; and how long it took to be ready,
    and its first requests to be answered."""
    folder = tmp_path_factory.mktemp("fresh") / "tiny"
    folder.mkdir()
    write_checkpoint(folder, seed=7, config=replace(TINY, max_position_embeddings=8192))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "top_k": 7, "max_new_tokens": 5}))
    flags = ("--dtype", "float32", "--max-num-batched-tokens", "64", "--sse-keep-alive-interval", "0.05")
    began = time.monotonic()
    with ServerProcess(folder.parent / "log", str(folder), *flags) as server:
        ready = time.monotonic() - began
        seconds = []
        for _ in range(5):
            began = time.monotonic()
            httpx.post(f"{server.url}{COMPLETIONS}", json={"prompt": "Hi", "max_tokens": 4}).raise_for_status()
            seconds.append(time.monotonic() - began)
        yield server, ready, seconds


def post(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat(http: httpx.Client, **body: Any) -> dict[str, Any]:
    return post(http, CHAT, **{"messages": [USER], "max_tokens": 16} | body)


def stream(http: httpx.Client, path: str = CHAT, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream."""
    body = ({"messages": [USER]} if path == CHAT else {}) | {"max_tokens": 16} | body
    answer = http.post(path, json=body | {"stream": True})
    assert answer.status_code == 200, answer.text
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n") if line.startswith("data: {")]


def deltas(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [choice["delta"] for chunk in chunks for choice in chunk["choices"]]


def test_1_a_client_that_is_gone_takes_its_work_along(server: ServerProcess) -> None:
    """While it decodes, in prefill and in the queue; test_disconnect.py has every other way to go."""
    before = server.wait_until_idle()
    with posted(server), posted(server, stream=True):
        wait_for_load(server, running=2)
    server.wait_until_idle()
    with posted(server, prompt="x" * 6000, max_tokens=2000):
        wait_for_load(server, running=1)
    server.wait_until_idle()
    with posted(server, n=24):
        with posted(server):
            wait_for_load(server, running=24, waiting=1)
        wait_for_load(server, running=24, waiting=0)
    after = server.wait_until_idle()
    assert after.engine_step_seconds_count - before.engine_step_seconds_count < FOREVER / 2


def test_2_temperature_zero_is_the_same_under_concurrency(http: httpx.Client, server: ServerProcess) -> None:
    body = {"messages": [USER], "temperature": 0, "max_tokens": 24, "logprobs": True, "ignore_eos": True}

    async def crowd() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as many:
            others = [
                many.post(COMPLETIONS, json={"prompt": "z" * (7 * n + 1), "max_tokens": 20, "ignore_eos": True})
                for n in range(16)
            ]
            answers = await asyncio.gather(*(many.post(CHAT, json=body) for _ in range(8)), *others)
            return answers[:8]

    alone = chat(http, **body)["choices"][0]["message"]
    assert all(answer.json()["choices"][0]["message"] == alone for answer in asyncio.run(crowd()))


def test_3_streamed_emoji_are_whole(http: httpx.Client) -> None:
    """Each token of this model is a byte, so that every character is made in pieces."""
    text = "👩‍👩‍👧 été 你好 🎉"
    pieces = [
        delta["content"]
        for delta in deltas(stream(http, structured_outputs={"choice": [text]}, max_tokens=99))
        if delta
    ]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 5


def test_4_stop_strings_do_not_leak_and_no_chunk_is_empty(http: httpx.Client) -> None:
    fields = {"structured_outputs": {"choice": ["one two STOP three"]}, "max_tokens": 60, "stop": ["STOP", "two!"]}
    first, *pieces, last = deltas(stream(http, **fields))
    assert (first, last) == ({"role": "assistant", "content": ""}, {})
    assert "".join(piece["content"] for piece in pieces) == "one two "
    assert all(piece["content"] for piece in pieces)
    assert chat(http, **fields)["choices"][0]["message"]["content"] == "one two "


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "greet"}}])
def test_5_a_streamed_tool_call_is_valid_json_and_nothing_else(http: httpx.Client, choice: Any) -> None:
    found = deltas(stream(http, tools=TOOLS, tool_choice=choice, max_tokens=300, **SEEDED))
    assert not any(delta.get("content") for delta in found)
    pieces = [piece for delta in found for piece in delta.get("tool_calls", [])]
    for index in range(pieces[-1]["index"] + 1):
        first, *more = [piece for piece in pieces if piece["index"] == index]
        assert first["id"]
        assert (first["type"], first["function"]["name"] in ("greet", "clock")) == ("function", True)
        assert all(piece.get("id") is None and piece["function"].get("name") is None for piece in more)
        assert all(isinstance(piece["function"]["arguments"], str) for piece in [first, *more])
        arguments = json.loads("".join(piece["function"]["arguments"] for piece in [first, *more]))
        if first["function"]["name"] == "greet":
            assert arguments.keys() == {"name", "tags"}


@pytest.mark.parametrize("streamed", [False, True])
def test_6_function_without_parameters_gets_an_empty_object(http: httpx.Client, streamed: bool) -> None:
    fields = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "clock"}}, "max_tokens": 100}
    if streamed:
        pieces = [piece for delta in deltas(stream(http, **fields)) for piece in delta.get("tool_calls", [])]
        arguments = "".join(piece["function"]["arguments"] for piece in pieces)
    else:
        (call,) = chat(http, **fields)["choices"][0]["message"]["tool_calls"]
        arguments = call["function"]["arguments"]
    assert json.loads(arguments) == {}


@pytest.mark.parametrize("seed", range(4))
def test_7_json_ends_though_the_model_would_rather_write_blanks(http: httpx.Client, seed: int) -> None:
    """A bias makes blanks as likely as can be."""
    blanks = {str(id_): 100 for id_ in http.post("/tokenize", json={"prompt": " \n\t\r"}).json()["tokens"]}
    schema = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}
    fields = {"logit_bias": blanks, "temperature": 1, "seed": seed, "max_tokens": 300}
    (choice,) = chat(http, response_format=schema, **fields)["choices"]
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["message"]["content"]).keys() == {"name", "tags"}
    text = chat(http, response_format={"type": "json_object"}, temperature=1, seed=seed, max_tokens=300)
    assert not re.search(r"\s{40}", text["choices"][0]["message"]["content"])


def test_8_logprobs_are_there_and_equal_on_every_endpoint(http: httpx.Client) -> None:
    """That they are true as well is what test_logprobs_truth.py shows."""
    options = {"temperature": 0, "max_tokens": 9, "ignore_eos": True}
    answer = chat(http, **options, logprobs=True, top_logprobs=2, return_token_ids=True)
    expected = [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]]
    assert len(expected) == 9
    prompt = answer["prompt_token_ids"]
    legacy = post(http, COMPLETIONS, prompt=prompt, **options, logprobs=2)["choices"][0]["logprobs"]
    assert legacy["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    streamed = stream(http, **options, logprobs=True)
    entries = [
        e for c in streamed for choice in c["choices"] if choice["logprobs"] for e in choice["logprobs"]["content"]
    ]
    assert [entry["logprob"] for entry in entries] == pytest.approx(expected, abs=1e-4)
    chunks = [c["choices"][0]["logprobs"] for c in stream(http, COMPLETIONS, prompt=prompt, **options, logprobs=0)]
    flat = [score for shown in chunks if shown for score in shown["token_logprobs"]]
    assert flat == pytest.approx(expected, abs=1e-4)


HOSTILE: list[dict[str, Any]] = [
    {"temperature": 1e308},
    {"max_tokens": 10**9},
    {"messages": [{"role": "user", "content": "x" * 10**6}]},
    {"logit_bias": {"999999": 1}},
    {"logit_bias": {str(n): -100 for n in range(272)}},
    {"allowed_token_ids": [0], "min_tokens": 10},
    {"stop_token_ids": [10**6]},
    {"structured_outputs": {"regex": "(((a+)+)+)+$("}},
    {"structured_outputs": {"regex": "(a{1000}){1000}"}},
    {"structured_outputs": {"grammar": "start: start start"}},
    {"structured_outputs": {"json": {"$ref": "#/x"}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"allOf": [{"$ref": "#"}]}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}], "tool_choice": "required"},
    {"chat_template_kwargs": {"messages": "x" * 1000}},
    {"n": 128, "max_tokens": 2},
    {"seed": -(2**63), "n": 3},
]


def test_9_no_request_harms_the_engine(http: httpx.Client, server: ServerProcess) -> None:
    before = chat(http, **SEEDED)["choices"]
    engine = server.engine_pid
    for body in HOSTILE:
        answer = http.post(CHAT, json={"messages": [USER], "max_tokens": 16} | body)
        assert answer.status_code in (200, 400), (body, answer.text)
    assert chat(http, **SEEDED)["choices"] == before
    assert server.engine_pid == engine


def test_10_every_stream_can_tell_its_usage(http: httpx.Client) -> None:
    options = {"stream_options": {"include_usage": True}}
    for path, body in [(CHAT, {}), (COMPLETIONS, {"prompt": "Hi"})]:
        last = stream(http, path, **body, **options, **SEEDED)[-1]
        assert last["choices"] == []
        assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
    body = {"stream": True, "model": server_name(http)}
    answer = http.post("/v1/responses", json=body | {"input": "Hi", "max_output_tokens": 5})
    ended = json.loads(answer.text.rpartition("data: {")[2].join(["{", ""]).partition("\n")[0])
    assert ended["response"]["usage"]["output_tokens"] > 0
    answer = http.post("/v1/messages", json=body | {"messages": [USER], "max_tokens": 5})
    assert '"output_tokens":' in answer.text.rpartition("event: message_delta")[2]


def server_name(http: httpx.Client) -> str:
    return http.get("/v1/models").json()["data"][0]["id"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/responses", "/v1/messages"])
def test_11_bad_requests_get_one_error_shape_before_a_stream(http: httpx.Client, path: str) -> None:
    prompts = {CHAT: {"messages": [USER]}, COMPLETIONS: {"prompt": "Hi"}, "/v1/responses": {"input": "Hi"},
               "/v1/messages": {"messages": [USER], "max_tokens": 5, "model": "tiny"}}  # fmt: skip
    for wrong in ({"temperature": -1}, {"unknown": 1}, {"tools": "x"}, {"top_p": "high"}):
        answer = http.post(path, json=prompts[path] | {"stream": True} | wrong)
        assert answer.status_code == 400, answer.text
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_12_start_is_quick_and_first_request_is_not_slower(fresh: Any) -> None:
    _, ready, (first, *others) = fresh
    assert ready < 30
    assert first < 1 + 5 * max(others)


def test_13_too_little_memory_is_said_with_the_flag_to_set(checkpoint: Path) -> None:
    done = run_command("serve", str(checkpoint), "--port", "0", "--kv-cache-memory-bytes", "1KiB")
    assert done.returncode not in (0, -9)
    assert "--kv-cache-memory-bytes" in done.stderr
    assert "Traceback" not in done.stderr


def test_14_health_is_quick_under_load(http: httpx.Client, server: ServerProcess) -> None:
    server.wait_until_idle()
    with posted(server, n=24), posted(server, prompt="x" * 7000, max_tokens=900), posted(server, stream=True):
        wait_for_load(server, running=24, waiting=2)
        for _ in range(20):
            began = time.monotonic()
            assert http.get("/health").status_code == 200
            assert time.monotonic() - began < 5, "no request waits for the work of others"
    server.wait_until_idle()


def test_15_an_idle_stream_is_kept_open_by_comments(fresh: Any) -> None:
    """The prompt takes many steps, so that the first token is long in coming."""
    server, *_ = fresh
    body = {"prompt": "x" * 8000, "max_tokens": 2, "stream": True}
    text = httpx.post(f"{server.url}{COMPLETIONS}", json=body, timeout=PATIENCE).text
    before, found, after = text.partition("data: ")
    assert found
    assert ": keep-alive\n\n" in before
    assert set(before.split("\n")) == {": keep-alive", ""}
    # A comment may come at any time, even before the connection's end.
    assert after.replace(": keep-alive\n\n", "").endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_16_cached_tokens_are_counted(http: httpx.Client, path: str) -> None:
    text = f"A prompt of {path} that fills several blocks of the cache, and is sent twice."
    body = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    counts = [post(http, path, **body, max_tokens=2)["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in "ab"]
    *_, last = stream(http, path, **body, stream_options={"include_usage": True})
    assert counts[0] == 0
    assert counts[1] == last["usage"]["prompt_tokens_details"]["cached_tokens"] >= 48


def test_17_defaults_from_a_file_are_announced(fresh: Any) -> None:
    server, *_ = fresh
    (line,) = [line for line in server.log.splitlines() if "Sampling defaults" in line]
    for part in ("temperature = 0.25", "top_k = 7", "max_tokens = 5", "generation_config.json"):
        assert part in line or part.replace("max_tokens", "max_new_tokens") in line
    answer = httpx.post(f"{server.url}{CHAT}", json={"messages": [USER], "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 5


def test_18_too_long_a_prompt_gets_both_numbers(http: httpx.Client) -> None:
    answer = http.post(CHAT, json={"messages": [USER | {"content": "a" * 9000}], "max_tokens": 9000})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    prompt = len("user: \nassistant:") + 9000
    assert all(re.search(rf"\b{number}\b", error["message"]) for number in (8192, prompt))


@pytest.mark.parametrize("name", ["response_format", "tools", "tool_choice", "stop", "logit_bias", "stream_options"])
def test_19_null_is_the_default(http: httpx.Client, name: str) -> None:
    assert chat(http, **SEEDED, **{name: None})["choices"] == chat(http, **SEEDED)["choices"]


def test_20_a_constrained_request_leaves_its_neighbours_alone(http: httpx.Client, server: ServerProcess) -> None:
    def free(seed: int) -> dict[str, Any]:
        return {"messages": [USER], "max_tokens": 40, "temperature": 1, "seed": seed, "ignore_eos": True}

    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}}

    async def crowd() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as many:
            bodies = [free(seed) | (form if seed % 2 else {}) for seed in range(12)]
            return await asyncio.gather(*(many.post(CHAT, json=body) for body in bodies))

    alone = [chat(http, **free(seed))["choices"] for seed in range(0, 12, 2)]
    together = [answer.json()["choices"] for answer in asyncio.run(crowd())]
    assert together[::2] == alone
    for (choice,) in together[1::2]:
        if choice["finish_reason"] == "stop":
            assert json.loads(choice["message"]["content"]).keys() == {"name", "tags"}
