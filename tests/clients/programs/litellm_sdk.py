"""LiteLLM as a library: three providers that speak to the server, and its adapter from Anthropic's API to OpenAI's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import attempts
import litellm
from attempts import GREETING, MODEL, QUESTION, TOOL, URL, V1, WEATHER, one, uses_weather

PROVIDERS = {"openai": V1, "hosted_vllm": V1, "anthropic": URL}
GREEDY = {"temperature": 0, "api_key": "none"}


def ask(provider: str, messages: list[Any] = GREETING, **fields: Any) -> Any:
    return litellm.completion(
        model=f"{provider}/{MODEL}", api_base=PROVIDERS[provider], messages=messages, **(GREEDY | fields)
    )


def check_chat(provider: str) -> None:
    whole = ask(provider)
    text = whole.choices[0].message.content
    assert text, whole
    assert whole.choices[0].finish_reason == "stop"
    usage = whole.usage
    assert usage.prompt_tokens > 0
    assert usage.completion_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    chunks = list(ask(provider, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == usage.completion_tokens
    cut = ask(provider, stop=[text[3:6]]).choices[0]
    assert cut.message.content == text[: text.index(text[3:6])]
    assert ask(provider, max_tokens=2).choices[0].finish_reason == "length"
    assert ask(provider, max_tokens=10**6).choices[0].finish_reason == "stop"


def check_tools(provider: str) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    answer = ask(provider, messages, tools=[TOOL])
    call = one(answer.choices[0].message.tool_calls)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    chunks = list(ask(provider, messages, tools=[TOOL], stream=True))
    built = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert json.loads(one(built).function.arguments) == {"city": "Paris"}
    messages += [answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": WEATHER}]
    uses_weather(ask(provider, messages, tools=[TOOL]).choices[0].message.content)
    forced = ask(provider, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "get_weather"}})
    assert isinstance(json.loads(one(forced.choices[0].message.tool_calls).function.arguments)["city"], str)


def check_schema(provider: str) -> None:
    schema = {
        "type": "object", "properties": {"age": {"type": "integer", "minimum": 1, "maximum": 99}},
        "required": ["age"], "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    found = json.loads(ask(provider, response_format=form, temperature=1).choices[0].message.content)
    assert found.keys() == {"age"}
    assert 1 <= found["age"] <= 99


def try_openai_chat() -> None:
    """openai/: chat, stream, stop, usage, a huge max_tokens"""
    check_chat("openai")


def try_openai_tools() -> None:
    """openai/: a tool loop, streamed arguments, a forced call"""
    check_tools("openai")


def try_openai_schema() -> None:
    """openai/: a JSON schema"""
    check_schema("openai")


def try_hosted_vllm_chat() -> None:
    """hosted_vllm/: chat, stream, stop, usage, a huge max_tokens"""
    check_chat("hosted_vllm")


def try_hosted_vllm_tools() -> None:
    """hosted_vllm/: a tool loop, streamed arguments, a forced call"""
    check_tools("hosted_vllm")


def try_hosted_vllm_schema() -> None:
    """hosted_vllm/: a JSON schema"""
    check_schema("hosted_vllm")


def try_hosted_vllm_reasoning_effort() -> None:
    """hosted_vllm/: reasoning_effort is only a hint"""
    assert ask("hosted_vllm", reasoning_effort="low").choices[0].message.content


def try_anthropic_chat() -> None:
    """anthropic/: chat, stream, stop, usage, a huge max_tokens"""
    check_chat("anthropic")


def try_anthropic_tools() -> None:
    """anthropic/: a tool loop, streamed arguments, a forced call"""
    check_tools("anthropic")


def try_anthropic_thinking() -> None:
    """anthropic/: thinking is only a hint"""
    hint = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "allowed_openai_params": ["thinking"]}
    assert ask("anthropic", **hint, temperature=1, max_tokens=4096).choices[0].message.content


def try_text_completion() -> None:
    """text-completion-openai/: text, log-probabilities"""
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=V1,
        prompt="Once upon a time",
        max_tokens=5,
        logprobs=2,
        **GREEDY,
    )
    assert answer.usage.completion_tokens == 5
    assert len(answer.choices[0].logprobs.token_logprobs) == 5


def try_embedding() -> None:
    """openai/: embeddings"""
    answer = litellm.embedding(model=f"openai/{MODEL}", api_base=V1, api_key="none", input=["red", "green"])
    assert len(answer.data) == 2


def try_responses() -> None:
    """openai/: the Responses API, whole and streamed"""
    fields = {"model": f"openai/{MODEL}", "api_base": V1, "input": "Hello!", **GREEDY}
    whole = litellm.responses(**fields)
    assert whole.output[0].content[0].text
    kinds = [str(getattr(event.type, "value", event.type)) for event in litellm.responses(stream=True, **fields)]
    assert kinds[-1] == "response.completed"


def adapted(**fields: Any) -> Any:
    call = litellm.anthropic.messages.acreate(
        model=f"hosted_vllm/{MODEL}", api_base=V1, api_key="none", max_tokens=32000, **fields
    )
    return asyncio.run(call)


def try_adapter() -> None:
    """Anthropic's Messages adapted to OpenAI's API: a tool loop with cache_control and thinking"""
    tool = {
        "name": "get_weather",
        "description": "get the weather in a city",
        "input_schema": TOOL["function"]["parameters"],
    }
    block = {"type": "text", "text": QUESTION, "cache_control": {"type": "ephemeral"}}
    messages: list[Any] = [{"role": "user", "content": [block]}]
    answer = adapted(messages=messages, tools=[tool], temperature=0)
    use = one(block for block in answer["content"] if block["type"] == "tool_use")
    assert use["input"] == {"city": "Paris"}
    assert answer["stop_reason"] == "tool_use"
    assert answer["usage"]["output_tokens"] > 0
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": WEATHER}
    messages += [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": [result]}]
    uses_weather(adapted(messages=messages, tools=[tool], temperature=0)["content"][0]["text"])
    assert adapted(messages=GREETING, thinking={"type": "enabled", "budget_tokens": 1024})["content"]


if __name__ == "__main__":
    attempts.main()
