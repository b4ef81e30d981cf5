"""A conversation with the model, independent of the API that the client speaks.

A part that an error may name carries its `field`: where it is in the client's request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Sampling = Mapping[str, Any]  # the fields of `SamplingParams` that a request sets; `bad_words` are still words
BETWEEN_PARTS = "\n"  # separates the texts of a message that has several


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call by the model."""

    id: str
    name: str
    arguments: str  # JSON text

    def to_openai(self) -> dict[str, Any]:
        """Return the call in OpenAI's shape."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Message:
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    text: str | None
    calls: tuple[ToolCall, ...] = ()
    call_id: str | None = None  # the call whose result this is
    call_id_field: str = ""
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None  # JSON Schema of the arguments; None: no arguments
    strict: bool | None = None  # unforced calls must satisfy `parameters` too
    field: str = ""
    parameters_field: str = ""

    def describe(self) -> dict[str, Any]:
        """Return the description that the model needs to call the function."""
        shown = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {key: value for key, value in shown.items() if value is not None}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which tools may be called, and whether one must be."""

    mode: Literal["none", "auto", "required", "named"] = "auto"
    names: tuple[str, ...] | None = None  # None: every tool


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """The format that the answer's text must match."""

    grammar: str  # for the engine, not yet checked
    field: str
    grammar_field: str  # the part of `field` that holds the schema or the expression


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Everything that a client asks for in a turn of a chat."""

    messages: Sequence[Message]  # at least one
    messages_field: str = "messages"
    sampling: Sampling = field(default_factory=dict)
    max_tokens: int | None = None
    tools: Sequence[Tool] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    answer_format: AnswerFormat | None = None
    add_generation_prompt: bool | None = None  # None: unless the final message is continued
    continue_final_message: bool = False
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    keep_tokens: int | None = None  # keep only this many of the prompt's last tokens; -1: as many as fit
    keep_messages: int | None = None  # after this many, the oldest may be dropped until the rest fits; None: drop none
