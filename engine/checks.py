"""Whether an engine can ever run a request: the client refuses at once, and the engine checks again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection

import msgspec

from .errors import RequestError
from .messages import EngineInfo, EngineRequest

PRIORITY_LIMIT = 2**31


def check_request(message: EngineRequest, info: EngineInfo) -> None:
    """Raise `RequestError` if the request can never run on this engine."""
    prompt = len(message.prompt_token_ids)
    if not prompt:
        raise RequestError("The prompt is empty: it needs at least one token.", code="empty_prompt")
    params = message.params
    named: dict[str | None, Collection[int]] = {
        None: message.prompt_token_ids,
        "stop_token_ids": params.stop_token_ids,
        "logit_bias": params.logit_bias,
        "bad_words": [*itertools.chain.from_iterable(params.bad_words)],
        "allowed_token_ids": params.allowed_token_ids or (),
    }
    for param, ids in named.items():
        if ids and (min(ids) < 0 or max(ids) >= info.vocab_size):
            where = param or "The prompt"
            raise RequestError(f"{where} has a token id outside 0 to {info.vocab_size - 1}.", param=param)
    output = 0 if message.pooling else 1 if params.max_tokens is None else params.max_tokens
    has = f"the prompt has {prompt} tokens" + (f" and up to {output} more were requested" if output else "")
    context, capacity, code = info.config.max_model_len, info.config.kv_capacity_tokens, "context_length_exceeded"
    if prompt + output > context:
        raise RequestError(f"This model's context is {context} tokens, but {has}.", code=code)
    if prompt + max(output - 1, 0) > capacity:  # the last token is never computed
        raise RequestError(f"The KV cache holds {capacity} tokens, but {has}.", code=code)
    if message.pooling not in (None, "mean", "last"):
        raise RequestError(f"pooling must be 'mean' or 'last', got {message.pooling!r}.", param="pooling")
    if not -PRIORITY_LIMIT <= message.priority < PRIORITY_LIMIT:
        raise RequestError(f"priority must be a 32-bit integer, got {message.priority}.", param="priority")


def resolve_request(message: EngineRequest, info: EngineInfo, seeds: random.Random) -> EngineRequest:
    """Fill in `max_tokens` and `seed` where they are open, and check the result; raises `RequestError`."""
    params = message.params
    room = max(info.config.max_model_len - len(message.prompt_token_ids), 1)
    params = msgspec.structs.replace(
        params,
        max_tokens=max(room, params.min_tokens) if params.max_tokens is None else params.max_tokens,
        seed=seeds.getrandbits(63) if params.seed is None else params.seed,
    )
    message = msgspec.structs.replace(message, params=params)
    check_request(message, info)
    return message
