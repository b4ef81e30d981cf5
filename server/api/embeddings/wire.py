"""Embeddings: the request and the answer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..fields import MAX_INT, KeptTokens, Name, Priority, StrictModel, Text, TokenIds

MAX_INPUTS = 2048


class EmbeddingRequest(StrictModel):
    """Body of `POST /v1/embeddings`."""

    model: Name | None = None
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    ) = Field(description="One or more texts or lists of token ids, none of them empty.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="float without it; base64 is of little-endian 32-bit floats."
    )
    pooling: Literal["mean", "last"] | None = Field(
        None, description="The mean of the final hidden states, which is the default, or the last token's alone."
    )
    dimensions: int | None = Field(None, ge=1, le=MAX_INT, description="Only the model's own hidden size.")
    add_special_tokens: bool | None = Field(None, description="Put the model's first token before a text.")
    truncate_prompt_tokens: KeptTokens = None
    priority: Priority = None
    user: Name | None = None


class Embedding(StrictModel):
    """One input's vector, of length 1."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(StrictModel):
    """Token counts of one request."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(StrictModel):
    """Answer of `POST /v1/embeddings`."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
