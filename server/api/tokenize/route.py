"""Tokenising: what completions and chat completions make of their input, and texts of token ids."""

from __future__ import annotations

import asyncio

from starlette.responses import Response

from ....engine.errors import RequestError
from ...chat.turn import prepare_turn
from ...generation.served_model import ServedModel
from ...http.context import RequestContext
from ...http.errors import JsonResponse
from ..chat.wire import ChatCompletionRequest, TemplateOptions
from ..fields import MAX_INT
from .wire import DetokenizeRequest, TokenizeRequest

LARGE_IDS = 4000
"""Token ids from which texts are made off the event loop."""


async def tokenize(context: RequestContext, body: TokenizeRequest, model: ServedModel) -> Response:
    """Tell the token ids of a prompt, or of messages put through the chat template."""
    ids = await _chat_ids(body, model) if body.prompt is None else await _prompt_ids(body, body.prompt, model)

    def answer() -> Response:
        texts = [model.tokenizer.token_text(id_) for id_ in ids] if body.return_token_strs else None
        limit = model.engine.info.max_model_len
        return JsonResponse({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": texts})

    return answer() if len(ids) < LARGE_IDS else await asyncio.to_thread(answer)


async def _prompt_ids(body: TokenizeRequest, prompt: str, model: ServedModel) -> list[int]:
    if body.messages is not None:
        raise RequestError("prompt and messages cannot both be given.", param="messages")
    for name in TemplateOptions.model_fields:
        if getattr(body, name) is not None:
            raise RequestError(f"{name} is only for messages.", param=name)
    return await model.encode(prompt, add_bos=bool(body.add_special_tokens), any_length=True)


async def _chat_ids(body: TokenizeRequest, model: ServedModel) -> list[int]:
    if body.messages is None:
        raise RequestError("Either prompt or messages is needed.", param="prompt", code="missing_required_parameter")
    if body.add_special_tokens:
        raise RequestError(
            "add_special_tokens is only for a prompt: a chat has those of its template.", param="add_special_tokens"
        )
    chat = ChatCompletionRequest(
        messages=body.messages,
        truncate_prompt_tokens=MAX_INT,  # longer ones than the context are counted too
        **{name: getattr(body, name) for name in TemplateOptions.model_fields},
    )
    return (await prepare_turn(chat, model)).prompt


async def detokenize(context: RequestContext, body: DetokenizeRequest, model: ServedModel) -> Response:
    """Tell the text of token ids, that of special tokens too."""
    size = model.engine.info.vocab_size
    if body.tokens and max(body.tokens) >= size:
        raise RequestError(f"tokens has a token id outside 0 to {size - 1}.", param="tokens")

    def answer() -> Response:
        return JsonResponse({"prompt": model.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    return answer() if len(body.tokens) < LARGE_IDS else await asyncio.to_thread(answer)
