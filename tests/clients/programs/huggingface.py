"""Hugging Face's InferenceClient, which sends `model: "dummy"` when none is named."""

from __future__ import annotations

import json

import attempts
from attempts import GREETING, MODEL, QUESTION, TOOL, V1, one
from huggingface_hub import InferenceClient


def try_chat() -> None:
    """chat_completion with a model's name: text, stream, stop, usage"""
    client = InferenceClient(base_url=V1, api_key="none")
    whole = client.chat_completion(GREETING, model=MODEL, temperature=0, max_tokens=50)
    text = whole.choices[0].message.content
    assert text
    assert whole.usage.completion_tokens > 0
    stream = client.chat_completion(GREETING, model=MODEL, temperature=0, max_tokens=50, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
    cut = client.chat_completion(GREETING, model=MODEL, temperature=0, max_tokens=50, stop=[text[3:6]])
    assert cut.choices[0].message.content == text[: text.index(text[3:6])]


def try_no_model() -> None:
    """chat_completion without a model's name"""
    answer = InferenceClient(base_url=V1, api_key="none").chat_completion(GREETING, temperature=0)
    assert answer.choices[0].message.content


def try_tools() -> None:
    """chat_completion with tools, and with a JSON schema"""
    client = InferenceClient(base_url=V1, api_key="none")
    messages = [{"role": "user", "content": QUESTION}]
    answer = client.chat_completion(messages, model=MODEL, tools=[TOOL], tool_choice="auto", temperature=0)
    arguments = one(answer.choices[0].message.tool_calls).function.arguments
    assert (json.loads(arguments) if isinstance(arguments, str) else arguments) == {"city": "Paris"}
    schema = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 1}}, "required": ["age"]}
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    found = client.chat_completion(messages, model=MODEL, response_format=form)
    assert json.loads(found.choices[0].message.content)["age"] >= 1


if __name__ == "__main__":
    attempts.main()
