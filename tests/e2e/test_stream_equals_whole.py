"""Three hundred random requests, each asked for as a stream and as a whole: both say the same."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest
from support.answers import close
from support.serving import PATIENCE, ServerProcess

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REQUESTS, BATCH, AT_ONCE = 300, 50, 16
AROUND = ("usage", "prompt_token_ids", "prompt_logprobs")
WORDS = ["Hello", "How are you?", "Été à Paris", "日本語", "👩‍👩‍👧", "x" * 90, "1 2 3"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "greet", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "clock"}},
]
FORMS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}},
    {"structured_outputs": {"choice": ["yes", "no", "peut-être", "🎉👍"]}},
    {"structured_outputs": {"regex": "[a-f]{2,9}( [0-9]{1,3}){0,4}"}},
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"grammar": 'start: "a" ("b" | "é")* "."'}},
]
CALLS: list[dict[str, Any]] = [
    {"tool_choice": "required"},
    {"tool_choice": "required", "parallel_tool_calls": False},
    {"tool_choice": {"type": "function", "function": {"name": "greet"}}},
    {"tool_choice": {"type": "function", "function": {"name": "clock"}}},
    {"tool_choice": "none"},
    {},
]


def sampling(rng: random.Random) -> dict[str, Any]:
    """Anything that both endpoints know, but repeatable."""
    options: dict[str, Any] = {
        "temperature": rng.choice([0, 0.5, 1, 1, 2]), "seed": rng.randrange(-(2**63), 2**63),
        "max_tokens": rng.choice([1, 2, 5, 12, 30]),
    }  # fmt: skip
    extra: dict[str, list[Any]] = {
        "n": [2, 3],
        "top_p": [0.9, 0.3],
        "top_k": [3, 40],
        "min_p": [0.05],
        "stop": ["a", ["e", "zz"], ["é", "\n"]],
        "stop_token_ids": [[70, 80, 90]],
        "include_stop_str_in_output": [True],
        "ignore_eos": [True],
        "min_tokens": [1],
        "presence_penalty": [1.5, -1],
        "frequency_penalty": [1, -0.5],
        "repetition_penalty": [1.3],
        "logit_bias": [{"70": 6, "100": -100}, {str(i): 4 for i in range(69, 95)}],
        "bad_words": [["a", "He"]],
        "allowed_token_ids": [list(range(40, 120)), list(range(160, 260))],
        "prompt_logprobs": [0, 2],
        "return_token_ids": [True],
        "skip_special_tokens": [False],
        "return_dynamics": [True],
    }
    return options | {name: rng.choice(values) for name, values in extra.items() if rng.random() < 0.22}


def request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body."""
    body = sampling(rng)
    form = rng.choice(FORMS) if rng.random() < 0.3 else {}
    if form:
        body = {k: v for k, v in body.items() if k not in ("allowed_token_ids", "bad_words")} | {"max_tokens": 60}
    if rng.random() < 0.4:
        prompts: list[Any] = [rng.choice(WORDS), rng.sample(WORDS, 2), [70, 71, 72], [[70, 71], [80]]]
        body |= {"prompt": rng.choice(prompts), "echo": rng.random() < 0.3}
        body |= {"logprobs": rng.choice([0, 3])} if rng.random() < 0.5 else {}
        return COMPLETIONS, body | form
    body["messages"] = [{"role": "user", "content": rng.choice(WORDS)}]
    body |= {"logprobs": True, "top_logprobs": rng.choice([0, 3])} if rng.random() < 0.5 else {}
    if not form and rng.random() < 0.3:
        body = {k: v for k, v in body.items() if k not in ("allowed_token_ids", "bad_words", "stop", "stop_token_ids")}
        body |= {"tools": TOOLS, "max_tokens": 120} | rng.choice(CALLS)
    return CHAT, body | form


def extended(found: dict[str, Any], more: dict[str, Any]) -> None:
    """Add a piece's members to what was there: lists and texts are appended, the rest is set once."""
    for name, value in more.items():
        if value is None or name in ("index", "finish_reason", "stop_reason", "role"):
            if value is not None and name != "index":
                assert found.get(name) is None, f"{name} is said once"
                found[name] = value
        elif name == "tool_calls":
            calls = found.setdefault(name, [])
            for piece in value:
                if piece["index"] == len(calls):
                    calls.append(
                        {"type": piece["type"], "function": {"name": piece["function"]["name"], "arguments": ""}}
                    )
                calls[piece["index"]]["function"]["arguments"] += piece["function"].get("arguments") or ""
        elif isinstance(value, dict):
            extended(found.setdefault(name, {}), value)
        elif name in ("prompt_token_ids", "prompt_logprobs"):
            found.setdefault(name, value)
            assert found[name] == value
        else:
            found[name] = found[name] + value if name in found else value


def joined(text: str) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """The choices that a stream's chunks add up to, with "delta" for "message"; and the members around them."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert blocks.pop() == "data: [DONE]"
    choices: dict[int, dict[str, Any]] = {}
    around: dict[str, Any] = {}
    for block in blocks:
        chunk = json.loads(block.removeprefix("data: "))
        assert "error" not in chunk, chunk
        for piece in chunk["choices"]:
            assert choices.get(piece["index"], {}).get("finish_reason") is None, "nothing comes after the end"
            extended(choices.setdefault(piece["index"], {}), piece)
        for name in AROUND:
            if chunk.get(name) is not None:
                around[name] = chunk[name]
    return choices, around


def plain(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice without what only one of the two forms has: ids that are made up, empty members."""
    kept = {name: value for name, value in choice.items() if name not in ("index", "message", "delta")}
    message = dict(choice.get("message") or choice.get("delta") or {})
    calls = [{k: v for k, v in call.items() if k not in ("id", "index")} for call in message.get("tool_calls") or []]
    kept |= {"role": message.get("role"), "content": message.get("content") or "", "tool_calls": calls}
    return {name: value for name, value in kept.items() if value not in (None, [], "")}


async def differences(url: str, requests: list[tuple[str, dict[str, Any]]]) -> list[str]:
    turns = asyncio.Semaphore(AT_ONCE)
    found: list[str] = []
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as http:

        async def compare(path: str, body: dict[str, Any]) -> None:
            streamed_body = body | {"stream": True, "stream_options": {"include_usage": True}}
            async with turns:
                answers = await asyncio.gather(http.post(path, json=body), http.post(path, json=streamed_body))
            whole, streamed = answers
            if not whole.status_code == streamed.status_code == 200:
                found.append(f"{path} {body}: {whole.text[:300]} / {streamed.text[:300]}")
                return
            content = whole.json()
            try:
                choices, around = joined(streamed.text)
            except AssertionError as error:
                found.append(f"{path} {body}: {error}")
                return
            for usage in (content["usage"], around["usage"]):
                usage.pop("prompt_tokens_details", None)
            pairs = [(plain(choice), plain(choices[choice["index"]])) for choice in content["choices"]]
            pairs += [({name: content[name] for name in AROUND if name in content}, around)]
            found.extend(f"{path} {body}:\n  {a}\n  {b}" for a, b in pairs if not close(a, b))

        await asyncio.gather(*(compare(*one) for one in requests))
    return found


@pytest.mark.parametrize("batch", range(REQUESTS // BATCH))
def test_a_stream_says_what_the_whole_answer_says(server: ServerProcess, batch: int) -> None:
    rng = random.Random(batch)
    found = asyncio.run(differences(server.url, [request(rng) for _ in range(BATCH)]))
    assert not found, f"{len(found)} of {BATCH} differ, the first:\n" + "\n".join(found[:3])
