"""vllm-router or sglang-router in front of two servers; CLIENT_FOLDER has the one to try."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attempts
import httpx
import openai
from attempts import GREETING, MODEL, QUESTION, TOOL, WEATHER, one, uses_weather
from commands import FOLDER

REPLICAS = os.environ.get("PYLLM_REPLICAS", "").split()
ROUTED = ""


@contextmanager
def router(*words: str) -> Iterator[str]:
    """The address of a running router, which takes turns unless its `words` say otherwise."""
    with socket.socket() as probe, socket.socket() as other:
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = [str(s.getsockname()[1]) for s in (probe, other)]
    program = next(path for path in (FOLDER / "bin" / n for n in ("vllm-router", "sglang-router")) if path.exists())
    launch = [] if program.name == "vllm-router" else ["launch"]
    command = [
        str(program), *launch, "--worker-urls", *REPLICAS, *(words or ("--policy", "round_robin")),
        "--host", "127.0.0.1", "--port", ports[0], "--prometheus-port", ports[1],
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=sink, cwd=folder)
        try:
            while not is_ready(f"http://127.0.0.1:{ports[0]}"):
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.2)
            yield f"http://127.0.0.1:{ports[0]}"
        finally:
            process.terminate()
            process.wait(30)


def is_ready(address: str) -> bool:
    body = {"model": MODEL, "messages": GREETING, "max_tokens": 1}
    try:
        return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).is_success
    except httpx.HTTPError:
        return False


def answered() -> list[int]:
    """How many chats each replica has answered."""
    counts = []
    for replica in REPLICAS:
        lines = httpx.get(f"{replica}/metrics").text.splitlines()
        found = [line for line in lines if line.startswith("pyllm:request_success_total")]
        counts.append(int(sum(float(line.rsplit(" ", 1)[1]) for line in found)))
    return counts


def client() -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{ROUTED}/v1", api_key="none", max_retries=0, timeout=180)


def ask(messages: list[Any], **fields: Any) -> Any:
    return client().chat.completions.create(model=MODEL, messages=messages, temperature=0, **fields)


def try_chat() -> None:
    """chat: text, stream, stop, usage"""
    whole = ask(GREETING)
    text = whole.choices[0].message.content
    assert text
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(ask(GREETING, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens > 0
    assert ask(GREETING, stop=[text[3:6]]).choices[0].message.content == text[: text.index(text[3:6])]


def try_balance() -> None:
    """both replicas answer"""
    before = answered()
    for _ in range(8):
        ask(GREETING)
    assert all(now > then for now, then in zip(answered(), before, strict=True))


def try_tools() -> None:
    """tools: a loop whose answer uses the result"""
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    message = ask(messages, tools=[TOOL]).choices[0].message
    call = one(message.tool_calls)
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    messages += [message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": WEATHER}]
    uses_weather(ask(messages, tools=[TOOL]).choices[0].message.content)


def try_completions() -> None:
    """completions: text, stream, usage"""
    fields: dict[str, Any] = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 5, "temperature": 0}
    answer = client().completions.create(**fields)
    assert answer.usage.completion_tokens == 5
    assert (
        "".join(c.choices[0].text for c in client().completions.create(**fields, stream=True)) == answer.choices[0].text
    )


def try_responses() -> None:
    """responses: text, stream, a tool call"""
    fields: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 60}
    answer = client().responses.create(input="Hello!", **fields)
    events = list(client().responses.create(input="Hello!", stream=True, **fields))
    assert answer.output_text
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == answer.output_text
    assert events[-1].response.usage.output_tokens == answer.usage.output_tokens
    tool = {"type": "function", **TOOL["function"]}
    called = client().responses.create(input=QUESTION, tools=[tool], tool_choice="required", **fields)
    assert json.loads(one(called.output).arguments) == {"city": "Paris"}


def try_embeddings() -> None:
    """embeddings: the same from each replica"""
    answers = [client().embeddings.create(model=MODEL, input=["red", "green"]) for _ in range(4)]
    vectors = [[item.embedding for item in answer.data] for answer in answers]
    assert len(vectors[0]) == 2
    for others in vectors[1:]:  # plain torch may differ in the last bits, by what else is in a step
        for one_, other in zip(vectors[0], others, strict=True):
            assert sum(a * b for a, b in zip(one_, other, strict=True)) > 0.9999, "they have length 1"


def try_nameless() -> None:
    """a request that names no model"""
    body = {"messages": GREETING, "max_tokens": 3}
    answer = httpx.post(f"{ROUTED}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == MODEL


def try_models() -> None:
    """the router lists the model"""
    assert MODEL in [model.id for model in client().models.list()]


def try_refusal() -> None:
    """a refusal arrives as the server's 400"""
    body = {"model": MODEL, "messages": GREETING, "top_p": 2}
    answer = httpx.post(f"{ROUTED}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "top_p" in answer.json()["error"]["message"]


if __name__ == "__main__":
    with router() as ROUTED:
        attempts.main()
