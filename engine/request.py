"""One sequence on its way through the engine: the only place where its progress is kept."""

from __future__ import annotations

import enum
import random
import time

import msgspec

from .errors import RequestError
from .messages import EngineInfo, EngineRequest, FinishReason, SamplingParams

PRIORITY_LIMIT = 2**31


class RequestStatus(enum.Enum):
    """Where a request stands."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()  # waiting again, its blocks given up: what was computed is computed anew
    FINISHED = enum.auto()


class Request:
    """A sequence, its tokens and how far they are computed.

    Attributes:
        request_id: the name that both processes know it by.
        params: how it is sampled.
        token_ids: prompt and output so far.
        num_prompt_tokens: how many of them are the prompt.
        num_computed_tokens: how many of them have their keys and values in the cache.
        num_cached_tokens: prompt tokens that were in the prefix cache when it first ran.
        block_ids: the pages of all its tokens, in order. These are changed by the KV cache manager alone, as are
        block_names: what its full blocks can be found by, as far as anyone has asked, and
        num_published_blocks: how many of its blocks can be found.
        cache_salt: only requests of one salt share blocks.
        priority: lower goes first, if the scheduler's policy says so.
        rank: its place in the order of service, the lowest first; set by the scheduler.
        stop_token_ids: the ids that end it.
        scheduled_time: `time.monotonic()` when it first ran; 0 before.
    """

    __slots__ = (
        "arrival_time",
        "block_ids",
        "block_names",
        "cache_salt",
        "finish_reason",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_published_blocks",
        "params",
        "priority",
        "rank",
        "request_id",
        "scheduled_time",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(self, message: EngineRequest, eos_token_ids: tuple[int, ...]) -> None:
        params = message.params
        self.request_id = message.request_id
        self.params: SamplingParams = params
        self.token_ids = list(message.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.block_ids: list[int] = []
        self.block_names: list[bytes] = []
        self.num_published_blocks = 0
        self.cache_salt = message.cache_salt
        self.priority = message.priority
        self.rank = (0, 0)
        self.stop_token_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_token_ids)
        self.status = RequestStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.arrival_time = time.monotonic()
        self.scheduled_time = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    def append(self, token_id: int) -> None:
        """Take a sampled token, and finish if it is the last: by a stop id, or by the number of tokens."""
        self.token_ids.append(token_id)
        params = self.params
        if token_id in self.stop_token_ids and self.num_output_tokens >= params.min_tokens:
            self.finish_reason = "stop"
        elif params.max_tokens is not None and self.num_output_tokens >= params.max_tokens:
            self.finish_reason = "length"


def check_request(message: EngineRequest, info: EngineInfo) -> None:
    """Raise `RequestError` if the request can never run on this engine."""
    prompt = len(message.prompt_token_ids)
    if not prompt:
        raise RequestError("The prompt is empty: it needs at least one token.", code="empty_prompt")
    if min(message.prompt_token_ids) < 0 or max(message.prompt_token_ids) >= info.vocab_size:
        raise RequestError(f"The prompt has a token id outside 0 to {info.vocab_size - 1}.")
    if not all(0 <= token < info.vocab_size for token in message.params.stop_token_ids):
        raise RequestError(f"stop_token_ids has a token id outside 0 to {info.vocab_size - 1}.", param="stop_token_ids")
    asked = message.params.max_tokens or 1
    if prompt + asked > info.max_model_len:
        raise RequestError(
            f"This model's context is {info.max_model_len} tokens, but the prompt has {prompt} tokens and up to "
            f"{asked} more were asked for.",
            code="context_length_exceeded",
        )
    if prompt + asked - 1 > info.kv_capacity_tokens:  # the last token is never computed
        raise RequestError(
            f"The KV cache holds {info.kv_capacity_tokens} tokens, but the prompt has {prompt} tokens and up to "
            f"{asked} more were asked for.",
            code="context_length_exceeded",
        )
    if not -PRIORITY_LIMIT <= message.priority < PRIORITY_LIMIT:
        raise RequestError("priority must be a 32-bit integer.", param="priority")


def resolve_request(
    request_id: str,
    prompt_token_ids: list[int],
    params: SamplingParams,
    info: EngineInfo,
    seeds: random.Random,
    *,
    priority: int = 0,
    cache_salt: str | None = None,
) -> EngineRequest:
    """The request with its open ends decided (max_tokens, seed), checked; raises `RequestError`."""
    room = max(info.max_model_len - len(prompt_token_ids), 1)
    params = msgspec.structs.replace(
        params,
        max_tokens=params.max_tokens or max(room, params.min_tokens),
        seed=seeds.getrandbits(63) if params.seed is None else params.seed,
    )
    message = EngineRequest(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids,
        params=params,
        priority=priority,
        cache_salt=cache_salt,
    )
    check_request(message, info)
    return message
