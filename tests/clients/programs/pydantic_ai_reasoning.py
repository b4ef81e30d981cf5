"""pydantic-ai with a model that reasons, which sends reasoning back in ways of its own."""

from __future__ import annotations

import asyncio
from typing import Any

import attempts
from attempts import QUESTION, WEATHER
from pydantic_ai import Agent
from pydantic_ai.messages import TextPart, ThinkingPart
from pydantic_ai.models.openai import OpenAIResponsesModelSettings
from pydantic_ai_models import models

SETTINGS = {"responses": OpenAIResponsesModelSettings(openai_reasoning_summary="auto")}


def shown(run: Any) -> list[str]:
    """The reasoning and the texts of the answers, in order."""
    parts = [part for message in run.all_messages() for part in message.parts]
    return [part.content for part in parts if isinstance(part, ThinkingPart | TextPart)]


def check(kind: str) -> None:
    agent: Agent[None, str] = Agent(models()[kind], model_settings=SETTINGS.get(kind))

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """get the weather in a city"""
        assert city == "Paris"
        return WEATHER

    async def streamed(question: str) -> list[str]:
        async with agent.run_stream(question) as run:
            await run.get_output()
            return shown(run)

    expected = {
        "What is 2 + 3?": ["2 and 3 make 5.", "It is 5."],
        QUESTION: ["I look up Paris.", "It is 7.", "It is 7 degrees and cloudy in Paris."],
    }
    for question, texts in expected.items():
        assert shown(agent.run_sync(question)) == texts
        assert asyncio.run(streamed(question)) == texts


def try_chat_model() -> None:
    """chat model: reasoning apart from the answer and before a call, whole and streamed"""
    check("chat")


def try_responses_model() -> None:
    """responses model: the same"""
    check("responses")


def try_anthropic_model() -> None:
    """Anthropic model: the same"""
    check("anthropic")


if __name__ == "__main__":
    attempts.main()
