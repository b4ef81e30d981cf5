"""Embeddings: from texts to vectors, made of the final hidden states that the model itself predicts from.

No model of the family was trained for this: the vectors tell texts apart, but are no match for a retrieval model's.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from ....engine.checks import check_request
from ....engine.errors import RequestError
from ....engine.messages import EngineRequest, SamplingParams
from ...generation.generation import Choice, Generation
from ...generation.served_model import ServedModel
from ...http.errors import JsonResponse
from ..completions.route import encode_prompts
from ..fields import MAX_SEQUENCES
from .wire import EmbeddingRequest

LARGE_ANSWER = 2**16
"""Numbers from which an answer is written off the event loop."""


async def create_embedding(request: Request, body: EmbeddingRequest, model: ServedModel) -> Response:
    """Turn each input into a vector of length 1."""
    size = model.engine.info.hidden_size
    if body.dimensions not in (None, size):
        raise RequestError(f"dimensions can only be {size}, the model's hidden size.", param="dimensions")
    keep, add_bos = body.truncate_prompt_tokens, bool(body.add_special_tokens)
    prompts = await encode_prompts(body.input, model, add_bos=add_bos, keep=keep, max_tokens=0)
    for prompt in prompts:  # all of them before any is computed
        message = EngineRequest(request_id="", prompt_token_ids=prompt, params=SamplingParams(), pooling="mean")
        try:
            check_request(message, model.engine.info)
        except RequestError as error:
            error.param = "input"
            raise
    choices: list[Choice] = []
    # As many at once as run without waiting, so that they take up no place in the queue.
    wave = min(model.engine.info.max_num_seqs, MAX_SEQUENCES)
    for start in range(0, len(prompts), wave):
        inputs = prompts[start : start + wave]
        generation = Generation(
            model, request, inputs, [SamplingParams(max_tokens=1)] * len(inputs),
            field="input", priority=body.priority or 0, pooling=body.pooling or "mean",
        )  # fmt: skip
        try:
            await generation.collect()
        finally:  # what is logged of the request is of all its inputs so far, also if it ends here
            choices += generation.choices
            generation.choices = choices
    vectors = [choice.embedding or [] for choice in choices]
    count = sum(map(len, prompts))
    usage = {"prompt_tokens": count, "total_tokens": count}

    def answer() -> Response:
        data = _shown(vectors, body.encoding_format == "base64")
        return JsonResponse({"object": "list", "data": data, "model": body.model, "usage": usage})

    return answer() if len(vectors) * size < LARGE_ANSWER else await asyncio.to_thread(answer)


def _shown(vectors: list[list[float]], as_base64: bool) -> list[dict[str, Any]]:
    """The normalised vectors with their places."""
    matrix = np.array(vectors, dtype=np.float64)
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    units = (matrix / np.maximum(lengths, np.finfo(np.float64).tiny)).astype("<f4")
    shown = [base64.b64encode(unit.tobytes()).decode() for unit in units] if as_base64 else units.tolist()
    return [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(shown)]
