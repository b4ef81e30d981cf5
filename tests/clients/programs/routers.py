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
def router() -> Iterator[str]:
    """The address of a running router."""
    with socket.socket() as probe, socket.socket() as other:
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = [str(s.getsockname()[1]) for s in (probe, other)]
    program = next(path for path in (FOLDER / "bin" / n for n in ("vllm-router", "sglang-router")) if path.exists())
    launch = [] if program.name == "vllm-router" else ["launch"]
    command = [
        str(program), *launch, "--worker-urls", *REPLICAS, "--policy", "round_robin", "--host", "127.0.0.1",
        "--port", ports[0], "--prometheus-port", ports[1],
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


def ask(messages: list[Any], **fields: Any) -> Any:
    client = openai.OpenAI(base_url=f"{ROUTED}/v1", api_key="none", max_retries=0, timeout=180)
    return client.chat.completions.create(model=MODEL, messages=messages, temperature=0, **fields)


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
    """completions: text, usage"""
    client = openai.OpenAI(base_url=f"{ROUTED}/v1", api_key="none", max_retries=0, timeout=180)
    answer = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=5)
    assert answer.usage.completion_tokens == 5


def try_refusal() -> None:
    """a refusal arrives as the server's 400"""
    body = {"model": MODEL, "messages": GREETING, "top_p": 2}
    answer = httpx.post(f"{ROUTED}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "top_p" in answer.json()["error"]["message"]


if __name__ == "__main__":
    with router() as ROUTED:
        attempts.main()
