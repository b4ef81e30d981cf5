"""Completions: from prompts to their continuations."""

from __future__ import annotations

import codecs
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..engine.messages import TokenLogprobs
from ..model.tokenizer import Tokenizer
from .chat import LOWEST_LOGPROB
from .errors import JsonResponse, encode_json
from .generation import Generation, sampling_params
from .protocol import CompletionRequest
from .served_model import ServedModel
from .streaming import Chunks, EventStream

DEFAULT_MAX_TOKENS = 16


async def create_completion(
    request: Request, body: CompletionRequest, model: ServedModel, keep_alive_seconds: float
) -> Response:
    """Continue each prompt, whole or as a stream; every refusal is raised before the answer begins."""
    name = model.check_name(body.model)
    max_tokens = body.max_tokens or DEFAULT_MAX_TOKENS
    params = sampling_params(body, model, max_tokens=max_tokens, logprobs=body.logprobs)
    prompts = await _encode(body, model)
    generation = Generation(model, request, prompts, params, body, "prompt")
    head = {
        "id": f"cmpl-{request.state.request_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": name,
    }
    if body.stream:
        chunks = CompletionChunks(head, generation, model.tokenizer, body, params.skip_special_tokens)
        return EventStream(generation, chunks, keep_alive_seconds)
    await generation.collect()
    choices = []
    for index, choice in enumerate(generation.choices):
        entry: dict[str, Any] = {"index": index, "text": choice.text, "logprobs": None}
        if body.logprobs is not None:
            entry["logprobs"] = LegacyLogprobs(model.tokenizer, params.skip_special_tokens).take(choice.logprobs)
        entry["finish_reason"] = choice.finish_reason
        if body.return_token_ids:
            entry |= {"token_ids": choice.token_ids, "prompt_token_ids": choice.prompt_token_ids}
        choices.append(entry)
    return JsonResponse(head | {"choices": choices, "usage": generation.usage()})


async def _encode(body: CompletionRequest, model: ServedModel) -> list[list[int]]:
    """The token ids of each prompt."""
    prompts = body.prompt if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int) else [body.prompt]
    add_bos = bool(body.add_special_tokens)
    return [await model.encode(p, add_bos=add_bos) if isinstance(p, str) else p for p in prompts]


class LegacyLogprobs:
    """Log-probabilities of one choice in the older format, piece by piece.

    `text_offset` is where a token begins in the choice's text; a token that is a later part of a character begins
    where that character does.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._offset = 0

    def take(self, positions: list[TokenLogprobs]) -> dict[str, Any]:
        """The object for the next positions."""
        text = self._tokenizer.token_text
        offsets = []
        for position in positions:
            offsets.append(self._offset)
            if position.token_id not in self._hidden:
                self._offset += len(self._decode(self._tokenizer.token_bytes(position.token_id)))
        return {
            "tokens": [text(position.token_id) for position in positions],
            "token_logprobs": [max(position.logprob, LOWEST_LOGPROB) for position in positions],
            "top_logprobs": [
                {
                    text(id_): max(logprob, LOWEST_LOGPROB)
                    for id_, logprob in [*position.top, (position.token_id, position.logprob)]
                }
                for position in positions
            ],
            "text_offset": offsets,
        }


class CompletionChunks(Chunks):
    """Chunks whose choices have text."""

    member, empty = b"text", b'""'

    def __init__(
        self, head: dict[str, Any], generation: Generation, tokenizer: Tokenizer, body: CompletionRequest, skip: bool
    ) -> None:
        super().__init__(head, generation, tokenizer, body)
        self._logprobs = [LegacyLogprobs(tokenizer, skip) for _ in self.choices]
        self._without_prompt = set(range(len(self.choices)))

    def piece(self, index: int, text: str, token_ids: list[int], logprobs: list[TokenLogprobs]) -> bytes:
        """New text; the first piece of a choice brings the prompt's ids where ids are asked for."""
        shown = encode_json(self._logprobs[index].take(logprobs)) if self.with_logprobs else b"null"
        ids = b',"token_ids":' + encode_json(token_ids) if self.with_ids else b""
        if self.with_ids and index in self._without_prompt:
            self._without_prompt.remove(index)
            ids += b',"prompt_token_ids":' + encode_json(self.choices[index].prompt_token_ids)
        return self.chunk(index, encode_json(text), logprobs=shown, more=ids)
