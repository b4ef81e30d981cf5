"""pydantic-ai with its chat, responses and Anthropic models."""

from __future__ import annotations

import asyncio
from typing import Any

import attempts
from attempts import MODEL, QUESTION, URL, V1, WEATHER, uses_weather
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


def models() -> dict[str, Any]:
    provider = OpenAIProvider(base_url=V1, api_key="none")
    return {
        "chat": OpenAIChatModel(MODEL, provider=provider),
        "responses": OpenAIResponsesModel(MODEL, provider=provider),
        "anthropic": AnthropicModel(MODEL, provider=AnthropicProvider(base_url=URL, api_key="none")),
    }


def agent(kind: str, **fields: Any) -> Agent[None, Any]:
    return Agent(models()[kind], model_settings={"temperature": 0, "max_tokens": 16384}, **fields)


def check_text(kind: str) -> None:
    whole = agent(kind).run_sync("Hello!")
    assert whole.output
    assert whole.usage.input_tokens > 0
    assert whole.usage.output_tokens > 0

    async def streamed() -> str:
        async with agent(kind).run_stream("Hello!") as run:
            return "".join([piece async for piece in run.stream_text(delta=True)])

    assert asyncio.run(streamed()) == whole.output
    second = agent(kind).run_sync("What is 7+5?", message_history=whole.all_messages())
    assert second.output
    assert second.usage.input_tokens > whole.usage.input_tokens


def check_tools(kind: str) -> None:
    asked = []
    weather = agent(kind)

    @weather.tool_plain
    def get_weather(city: str) -> str:
        """get the weather in a city"""
        asked.append(city)
        return WEATHER

    uses_weather(weather.run_sync(QUESTION).output)
    assert asked == ["Paris"]


def check_output(kind: str, wrapper: Any) -> None:
    found = agent(kind, output_type=wrapper(Person)).run_sync("Who are you?").output
    assert isinstance(found, Person)


def try_chat_text() -> None:
    """chat: text, stream, history, usage"""
    check_text("chat")


def try_chat_tools() -> None:
    """chat: an agent calls a function and uses its result"""
    check_tools("chat")


def try_chat_tool_output() -> None:
    """chat: an object by a tool"""
    check_output("chat", ToolOutput)


def try_chat_native_output() -> None:
    """chat: an object by a JSON schema"""
    check_output("chat", NativeOutput)


def try_responses_text() -> None:
    """responses: text, stream, history, usage"""
    check_text("responses")


def try_responses_tools() -> None:
    """responses: an agent calls a function and uses its result"""
    check_tools("responses")


def try_responses_tool_output() -> None:
    """responses: an object by a tool"""
    check_output("responses", ToolOutput)


def try_responses_native_output() -> None:
    """responses: an object by a JSON schema"""
    check_output("responses", NativeOutput)


def try_anthropic_text() -> None:
    """Anthropic: text, stream, history, usage"""
    check_text("anthropic")


def try_anthropic_tools() -> None:
    """Anthropic: an agent calls a function and uses its result"""
    check_tools("anthropic")


def try_anthropic_tool_output() -> None:
    """Anthropic: an object by a tool"""
    check_output("anthropic", ToolOutput)


def try_anthropic_thinking() -> None:
    """Anthropic: thinking is only a hint"""
    settings: Any = {"max_tokens": 16384, "anthropic_thinking": {"type": "enabled", "budget_tokens": 1024}}
    assert Agent(models()["anthropic"], model_settings=settings).run_sync("Hello!").output


if __name__ == "__main__":
    attempts.main()
