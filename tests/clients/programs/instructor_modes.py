"""instructor, in every mode that it has for OpenAI and for Anthropic.

Most modes enforce the schema. In those that only ask for JSON in the prompt, the small model may break it: then
instructor's own validation must be what fails, and not a request.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import anthropic
import attempts
import instructor
import openai
from attempts import MODEL, URL, V1
from instructor import Mode
from instructor.core import InstructorRetryException
from pydantic import BaseModel, Field

MESSAGES = [{"role": "user", "content": "Who are you?"}]


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


def client(mode: Mode) -> Any:
    if mode.name.startswith("ANTHROPIC"):
        return instructor.from_anthropic(anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0), mode=mode)
    return instructor.from_openai(openai.OpenAI(base_url=V1, api_key="none", max_retries=0), mode=mode)


def ask(mode: Mode, **fields: Any) -> Any:
    options = {"max_tokens": 4096} if mode.name.startswith("ANTHROPIC") else {"temperature": 0}
    return client(mode).chat.completions.create(model=MODEL, messages=MESSAGES, max_retries=0, **options | fields)


def enforced(mode: Mode) -> None:
    found = ask(mode, response_model=Person)
    assert isinstance(found, Person), found


def asked_for(mode: Mode, model: Any = Person) -> None:
    failure = ""
    try:
        found = ask(mode, response_model=model)
        assert all(isinstance(item, Person) for item in ([found] if model is Person else found))
    except InstructorRetryException as error:
        failure = str(error)
    assert "Error code" not in failure, failure  # what the two packages begin a refusal with


def try_tools() -> None:
    """TOOLS: an object"""
    enforced(Mode.TOOLS)


def try_tools_partial() -> None:
    """TOOLS: a streamed partial object"""
    *_, last = client(Mode.TOOLS).chat.completions.create_partial(
        model=MODEL, messages=MESSAGES, response_model=Person, temperature=0, max_retries=0
    )
    assert 0 <= last.age <= 150


def try_tools_strict() -> None:
    """TOOLS_STRICT: an object"""
    enforced(Mode.TOOLS_STRICT)


def try_functions() -> None:
    """FUNCTIONS (deprecated by OpenAI): an object"""
    enforced(Mode.FUNCTIONS)


def try_parallel_tools() -> None:
    """PARALLEL_TOOLS: objects, if the model calls"""
    asked_for(Mode.PARALLEL_TOOLS, Iterable[Person])


def try_json() -> None:
    """JSON: asked for in the prompt"""
    asked_for(Mode.JSON)


def try_json_o1() -> None:
    """JSON_O1: asked for in the prompt"""
    asked_for(Mode.JSON_O1)


def try_md_json() -> None:
    """MD_JSON: asked for in the prompt"""
    asked_for(Mode.MD_JSON)


def try_json_schema() -> None:
    """JSON_SCHEMA: an object"""
    enforced(Mode.JSON_SCHEMA)


def try_responses_tools() -> None:
    """RESPONSES_TOOLS: an object"""
    enforced(Mode.RESPONSES_TOOLS)


def try_responses_tools_with_inbuilt_tools() -> None:
    """RESPONSES_TOOLS_WITH_INBUILT_TOOLS: an object"""
    enforced(Mode.RESPONSES_TOOLS_WITH_INBUILT_TOOLS)


def try_anthropic_tools() -> None:
    """ANTHROPIC_TOOLS: an object"""
    enforced(Mode.ANTHROPIC_TOOLS)


def try_anthropic_reasoning_tools() -> None:
    """ANTHROPIC_REASONING_TOOLS: an object, if the model calls"""
    asked_for(Mode.ANTHROPIC_REASONING_TOOLS)


def try_anthropic_json() -> None:
    """ANTHROPIC_JSON: asked for in the prompt"""
    asked_for(Mode.ANTHROPIC_JSON)


def try_anthropic_parallel_tools() -> None:
    """ANTHROPIC_PARALLEL_TOOLS: objects, if the model calls"""
    asked_for(Mode.ANTHROPIC_PARALLEL_TOOLS, Iterable[Person])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    attempts.main()
