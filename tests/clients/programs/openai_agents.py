"""The OpenAI Agents SDK over chat and over responses."""

from __future__ import annotations

import asyncio
from typing import Any

import attempts
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from attempts import MODEL, QUESTION, V1, WEATHER, uses_weather
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

ASKED: list[str] = []


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


@function_tool
def get_weather(city: str) -> str:
    """get the weather in a city"""
    ASKED.append(city)
    return WEATHER


def run(model: Any, question: str, streamed: bool = False, **fields: Any) -> Any:
    async def go() -> Any:
        async with AsyncOpenAI(base_url=V1, api_key="none", max_retries=0) as client:
            settings = ModelSettings(temperature=0, include_usage=True)
            agent = Agent(
                name="assistant", model=model(model=MODEL, openai_client=client), model_settings=settings, **fields
            )
            if not streamed:
                return await Runner.run(agent, question)
            result = Runner.run_streamed(agent, question)
            async for _ in result.stream_events():
                pass
            return result

    return asyncio.run(go())


def check(model: Any) -> None:
    result = run(model, "Hello!")
    assert result.final_output
    assert result.context_wrapper.usage.output_tokens > 0
    assert run(model, "Hello!", streamed=True).final_output == result.final_output
    for streamed in (False, True):
        ASKED.clear()
        uses_weather(run(model, QUESTION, streamed, tools=[get_weather]).final_output)
        assert ASKED == ["Paris"]
    assert isinstance(run(model, "Who are you?", output_type=Person).final_output, Person)


def try_chat() -> None:
    """chat: text, a function called and its result used (streamed too), an object"""
    check(OpenAIChatCompletionsModel)


def try_responses() -> None:
    """responses: text, a function called and its result used (streamed too), an object"""
    check(OpenAIResponsesModel)


if __name__ == "__main__":
    set_tracing_disabled(True)
    attempts.main()
