"""The embeddings endpoint: pools the model's final hidden states into one vector for each input.

No model of this family was trained for embeddings: the vectors distinguish texts, but a retrieval model's are better.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from starlette.responses import Response

from ...engine.errors import RequestError
from ...engine.messages import EngineRequest, SamplingParams, check_request
from ..chat.served_model import ServedModel
from ..chat.truncation import encode_prompts
from ..generation.generation import MAX_SEQUENCES, Choice, Generation
from ..http.errors import Items, JsonResponse, PiecewiseResponse
from ..http.middleware import RequestContext
from .types import MAX_INT, KeptTokens, Name, Priority, Salt, StrictModel, Text, TokenIds

MAX_INPUTS = 2048
NUMBER_BYTES = 4  # of memory for each number of a vector until it is sent
ARRIVING_BYTES = 48  # of memory for each number while it arrives from the engine
LARGE_ANSWER = 2**16  # a response with at least this many numbers is encoded while being sent


class EmbeddingRequest(StrictModel):
    """Body of `POST /v1/embeddings`."""

    model: Name | None = None
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    ) = Field(description="One or more texts or lists of token ids, none of them empty.")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: little-endian 32-bit floats.")
    pooling: Literal["mean", "last"] | None = Field(None, description="Of the final hidden states (default: mean).")
    dimensions: int | None = Field(None, ge=1, le=MAX_INT, description="Only the model's hidden size is supported.")
    add_special_tokens: bool | None = Field(None, description="Put the begin-of-sequence token before each text.")
    truncate_prompt_tokens: KeptTokens = None
    priority: Priority = None
    cache_salt: Salt | None = Field(None, description="Only requests with the same salt share cached prompts.")
    user: Name | None = None


class Embedding(StrictModel):
    """One input's vector, of length 1."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(StrictModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(StrictModel):
    """Response body of `POST /v1/embeddings`."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


async def create_embedding(context: RequestContext, body: EmbeddingRequest, model: ServedModel) -> Response:
    """Turn each input into a vector of length 1."""
    info = model.engine.info
    if body.dimensions not in (None, info.hidden_size):
        message = f"dimensions must be {info.hidden_size}, the model's hidden size, but got {body.dimensions}."
        raise RequestError(message, param="dimensions")
    keep, add_bos = body.truncate_prompt_tokens, bool(body.add_special_tokens)
    prompts = await encode_prompts(body.input, model, "input", add_bos=add_bos, keep=keep, max_tokens=0)
    params = SamplingParams(max_tokens=1)
    for prompt in prompts:  # check every input before the first is computed
        try:
            check_request(EngineRequest(request_id="", prompt_token_ids=prompt, params=params, pooling="mean"), info)
        except RequestError as error:
            error.param = "input"
            raise
    size, choices, vectors = info.hidden_size, list[Choice](), list[bytes]()
    batch = min(info.config.max_num_seqs, MAX_SEQUENCES)  # as many as run at once, so that none of them fills the queue
    context.hold("answers", size * (NUMBER_BYTES * len(prompts) + ARRIVING_BYTES * min(batch, len(prompts))))
    for start in range(0, len(prompts), batch):
        inputs = prompts[start : start + batch]
        generation = Generation(
            model.engine, model.metrics, context, inputs, params,
            field="input", priority=body.priority or 0, cache_salt=body.cache_salt, pooling=body.pooling or "mean",
        )  # fmt: skip
        try:
            await generation.collect()
        finally:  # the log counts all inputs so far, even if this one fails
            choices += generation.choices
            generation.choices = choices
        for choice in choices[start:]:
            vectors.append(_normalised(choice.embedding or []))
            choice.embedding = []
    count = sum(map(len, prompts))
    usage = {"prompt_tokens": count, "total_tokens": count}
    data = Items(_data(vectors, body.encoding_format == "base64"))
    answer = {"object": "list", "data": data, "model": body.model, "usage": usage}
    return PiecewiseResponse(answer) if len(vectors) * size >= LARGE_ANSWER else JsonResponse(answer)


def _normalised(vector: list[float]) -> bytes:
    """Return the vector of length 1 in little-endian 32-bit floats."""
    exact = np.array(vector, dtype=np.float64)
    unit = exact / np.maximum(np.sqrt(np.sum(exact * exact)), np.finfo(np.float64).tiny)
    return bytes(unit.astype("<f4"))


def _data(vectors: list[bytes], as_base64: bool) -> Iterator[dict[str, Any]]:
    """Yield the objects of the answer."""
    for index, vector in enumerate(vectors):
        shown = base64.b64encode(vector).decode() if as_base64 else np.frombuffer(vector, "<f4").tolist()
        yield {"object": "embedding", "index": index, "embedding": shown}
