"""Tokenising and its inverse: the requests and the answers, in vLLM's shapes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..chat.wire import Messages, TemplateOptions
from ..fields import MAX_IDS, Name, StrictModel, Text, TokenId


class TokenizeRequest(TemplateOptions):
    """Body of `POST /tokenize`: either a prompt, as completions read it, or messages, as chat completions do."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        None, description="Put the model's first token before the prompt; a chat's template does as it was trained."
    )
    return_token_strs: bool | None = Field(None, description="Also give each token's text.")


class TokenizeAnswer(StrictModel):
    """Answer of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(StrictModel):
    """Body of `POST /detokenize`."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_IDS, fail_fast=True)]


class DetokenizeAnswer(StrictModel):
    """Answer of `POST /detokenize`."""

    prompt: str
