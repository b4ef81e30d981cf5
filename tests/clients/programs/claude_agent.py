"""A Claude-style agent: the anthropic package, 20 turns with a tool, and the fields that such agents send."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import attempts
from attempts import MODEL, TOOL, URL, one

CITIES = ["Paris", "Rome", "Berlin", "Madrid"]
BASH = {"name": "bash", "description": "run a command",
        "input_schema": {"type": "object", "properties": {"command": {"type": "string", "maxLength": 30}},
                         "required": ["command"]}}  # fmt: skip
GET_WEATHER = {"name": "get_weather", "description": "get the weather in a city",
               "input_schema": TOOL["function"]["parameters"]}  # fmt: skip
HINTS = {
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "high"},
    "context_management": {"edits": []},
    "metadata": {"user_id": "user_1"},
}


def client() -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0, timeout=180)


def turn(messages: list[Any], streamed: bool, **fields: Any) -> Any:
    with client() as claude:
        body: dict[str, Any] = {"model": MODEL, "max_tokens": 32000, "messages": messages, "tools": [GET_WEATHER, BASH]}
        if not streamed:
            body["max_tokens"] = 8192  # the package refuses a longer answer that is not streamed
            return claude.messages.create(**body | fields)
        with claude.messages.stream(**body | fields) as stream:
            return stream.get_final_message()


def try_twenty_turns() -> None:
    """20 turns, streamed by turns: each demanded call parses, each result adds its tokens to the next turn's prompt"""
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    before = 0
    for number in range(20):
        choice = {"type": "any", "disable_parallel_tool_use": True}
        answer = turn(messages, number % 2 == 0, tools=[BASH], tool_choice=choice)
        use = one(block for block in answer.content if block.type == "tool_use")
        assert answer.stop_reason == "tool_use"
        assert isinstance(one(use.input.values()), str), use
        usage = answer.usage
        prompt = usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
        assert prompt >= before + (60 if number else 0), (before, usage)  # one token a word at least
        before = prompt
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "temperature " * 60, "is_error": number == 7}
        messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    assert before > 20 * 60


def try_auto() -> None:
    """a loop in which the model itself decides, with cache_control, a system prompt in blocks, and hints of Claude's"""
    for number, city in enumerate(CITIES):
        block = {"type": "text", "text": f"What is the weather in {city}?", "cache_control": {"type": "ephemeral"}}
        messages: list[Any] = [{"role": "user", "content": [block]}]
        answer = turn(messages, number % 2 == 0, tools=[GET_WEATHER], extra_body={"temperature": 0, **HINTS})
        use = one(block for block in answer.content if block.type == "tool_use")
        assert use.input == {"city": city}
        content = json.dumps({"temperature": 7, "sky": "cloudy"})
        result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": content}]}
        messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
        answer = turn(messages, number % 2 == 1, tools=[GET_WEATHER], extra_body={"temperature": 0, **HINTS})
        assert answer.stop_reason == "end_turn"
        attempts.uses_weather(answer.content[0].text)


def try_stop_sequences() -> None:
    """five stop_sequences, a system prompt in blocks, a name of Claude's"""
    system = [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}]
    greeting: list[Any] = [{"role": "user", "content": "Hello!"}]
    fields: dict[str, Any] = {"system": system, "messages": greeting, "max_tokens": 4096, "model": "claude-opus-9"}
    greedy = {"extra_body": {"temperature": 0}}
    text = client().messages.create(**fields, **greedy).content[0].text
    stops = ["#1#", "#2#", "#3#", "#4#", text[3:6]]
    cut = client().messages.create(**fields, **greedy, stop_sequences=stops)
    assert cut.stop_reason == "stop_sequence"
    assert cut.stop_sequence == text[3:6]
    assert cut.content[0].text == text[: text.index(text[3:6])]


def try_count_tokens() -> None:
    """count_tokens agrees with usage"""
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    counted = client().messages.count_tokens(model=MODEL, messages=messages, tools=[GET_WEATHER])
    usage = turn(messages, False, tools=[GET_WEATHER]).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


if __name__ == "__main__":
    attempts.main()
