"""Completions: the request, the answer and the chunks of its stream."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ....engine.messages import MAX_LOGPROBS
from ...generation.generation import MAX_SEQUENCES
from ..fields import (
    MAX_INT,
    MAX_PROMPTS,
    FinishReason,
    GenerationRequest,
    PromptLogprob,
    StrictModel,
    Text,
    TokenDynamics,
    TokenIds,
    Usage,
)


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    ) = Field(description=f"One or more texts or lists of token ids; prompts times n ≤ {MAX_SEQUENCES}.")
    max_tokens: int | None = Field(None, ge=0, le=MAX_INT, description="16 without it; 0 needs echo.")
    echo: bool | None = Field(None, description="Put the prompt before the text, and its logprobs before the others.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool | None = Field(None, description="Put the model's first token before a text prompt.")


class CompletionLogprobs(StrictModel):
    """Log-probabilities in the older format."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(StrictModel):
    """One continuation of a prompt; in a stream, a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    dynamics: list[TokenDynamics] | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(StrictModel):
    """Answer of `POST /v1/completions`, and one event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
