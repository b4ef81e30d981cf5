"""LiteLLM's proxy in front of the server: OpenAI's and Anthropic's clients talk to the proxy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import attempts
import httpx
import openai
from attempts import GREETING, MODEL, QUESTION, TOOL, V1, WEATHER, one, uses_weather

CONFIG = f"""
model_list:
  - model_name: {MODEL}
    litellm_params: {{model: hosted_vllm/{MODEL}, api_base: "{V1}", api_key: none}}
"""
KEY = "sk-0123456789abcdef0123456789abcdef"
ADDRESS = ""


@contextmanager
def proxy() -> Iterator[str]:
    """The address of a running proxy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config, log = Path(folder, "config.yaml"), Path(folder, "log")
        config.write_text(CONFIG)
        program = Path(sys.executable).with_name("litellm")
        command = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command, stdout=sink, stderr=sink, cwd=folder, env=os.environ | {"LITELLM_MASTER_KEY": KEY}
            )
        try:
            address = f"http://127.0.0.1:{port}"
            while not answers(f"{address}/health/liveliness"):
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            process.wait(30)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.HTTPError:
        return False


def ask(messages: list[Any], **fields: Any) -> Any:
    client = openai.OpenAI(base_url=f"{ADDRESS}/v1", api_key=KEY, max_retries=0)
    return client.chat.completions.create(model=MODEL, messages=messages, temperature=0, **fields)


def try_chat() -> None:
    """OpenAI's chat through it: text, stream, stop, usage"""
    whole = ask(GREETING)
    text = whole.choices[0].message.content
    assert text
    chunks = list(ask(GREETING, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens > 0
    assert ask(GREETING, stop=[text[3:6]]).choices[0].message.content == text[: text.index(text[3:6])]


def try_tools() -> None:
    """OpenAI's tools through it: a loop whose answer uses the result"""
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    message = ask(messages, tools=[TOOL], max_tokens=16384).choices[0].message
    call = one(message.tool_calls)
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    messages += [message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": WEATHER}]
    uses_weather(ask(messages, tools=[TOOL]).choices[0].message.content)


def try_responses() -> None:
    """OpenAI's responses through it"""
    client = openai.OpenAI(base_url=f"{ADDRESS}/v1", api_key=KEY, max_retries=0)
    assert client.responses.create(model=MODEL, input="Hello!", temperature=0).output_text


def try_messages() -> None:
    """Anthropic's messages through it: text, stream, a tool loop"""
    client = anthropic.Anthropic(base_url=ADDRESS, api_key=KEY, max_retries=0)
    fields: dict[str, Any] = {"model": MODEL, "max_tokens": 32000, "extra_body": {"temperature": 0}}
    tool = {"name": "get_weather", "description": "get the weather in a city",
            "input_schema": TOOL["function"]["parameters"]}  # fmt: skip
    with client.messages.stream(messages=GREETING, **fields) as stream:
        text = "".join(stream.text_stream)
        assert text == stream.get_final_message().content[0].text
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    with client.messages.stream(messages=messages, tools=[tool], **fields) as stream:
        answer = stream.get_final_message()
    use = one(block for block in answer.content if block.type == "tool_use")
    assert use.input == {"city": "Paris"}
    result = {"type": "tool_result", "tool_use_id": use.id, "content": WEATHER}
    messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    with client.messages.stream(messages=messages, tools=[tool], **fields) as stream:
        uses_weather(stream.get_final_message().content[0].text)


if __name__ == "__main__":
    with proxy() as ADDRESS:
        attempts.main()
