"""One sequence on its way through the engine: the only place where its progress is kept."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from ..messages import EngineRequest, FinishReason, Pooling, SamplingParams, TokenLogprobs

if TYPE_CHECKING:  # most need torch, which a client of the engine does without
    from torch import Tensor

    from ..grammar.state import GrammarState
    from .drafting import Drafter

PENDING_TOKEN = -1
"""Stands at the end of a sequence for a token that is being drawn: the step that computes it is not read yet."""


class RequestStatus(enum.Enum):
    """Where a request stands."""

    COMPILING = enum.auto()  # its grammar is, and the scheduler does not know of it yet
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
        has_logit_rules: whether it asks for anything that is kept in
        logit_rules: made by the sampler when it first needs them.
        grammar: how far it has come in its grammar; None for a request without, or before it is compiled.
        reads_prompt: whether the final hidden states of its prompt are still to be read, all of them: it takes none
            from the prefix cache. What is read of them is kept in these, by the model runner:
        prompt_logprobs: of the prompt's tokens from the second on, as far as they have been computed at any time, and
        pooled: for a request with `pooling`, FP64 [H], the sum of the hidden states, or the last one alone.
        num_pooled_tokens: how many states are in that sum.
        pooling: what is made of them in the place of an output; None for one without.
        generates: whether tokens are drawn for it, rather than only its prompt read.
        drafter: guesses its next tokens; None where nobody does.
        needs_tokens: whether a step with it must be read before the one after it is planned: its draws hang on earlier
            tokens in ways that only the host knows, or the host reads more than a token.
        draw_row: while its last token is awaited, which of the last step's draws that is; set by the model runner.
        scheduled_time: `time.monotonic()` when it first ran; 0 before.
    """

    __slots__ = (
        "block_ids",
        "block_names",
        "cache_salt",
        "drafter",
        "draw_row",
        "finish_reason",
        "generates",
        "grammar",
        "has_logit_rules",
        "logit_rules",
        "needs_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_pooled_tokens",
        "num_prompt_tokens",
        "num_published_blocks",
        "params",
        "pooled",
        "pooling",
        "priority",
        "prompt_logprobs",
        "rank",
        "reads_prompt",
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
        self.has_logit_rules = bool(
            params.logit_bias or params.bad_words or params.allowed_token_ids is not None or params.min_tokens
        )
        self.logit_rules: object | None = None
        self.grammar: GrammarState | None = None
        self.pooling: Pooling | None = message.pooling
        self.generates = message.pooling is None and params.max_tokens != 0
        self.reads_prompt = message.pooling is not None or params.prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.pooled: Tensor | None = None
        self.num_pooled_tokens = 0
        self.drafter: Drafter | None = None
        self.needs_tokens = bool(
            not self.generates
            or self.reads_prompt
            or self.has_logit_rules
            or params.grammar is not None
            or params.logprobs is not None
            or params.return_dynamics
            or params.repetition_penalty != 1.0
            or params.presence_penalty
            or params.frequency_penalty
        )
        self.draw_row = 0
        self.status = RequestStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.scheduled_time = 0.0

    @property
    def may_be_guessed(self) -> bool:
        """Whether several next tokens can be checked in one step: nothing but the tokens decides what is drawn."""
        params = self.params
        return self.generates and not (self.has_logit_rules or params.grammar or params.return_dynamics)

    @property
    def is_spent(self) -> bool:
        """Whether its last token is drawn or being drawn: `max_tokens` of them."""
        most = self.params.max_tokens
        return most is not None and self.generates and self.num_output_tokens >= most

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output, with one that is awaited."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    def append(self, token_id: int) -> None:
        """Take a sampled token, and finish if it is the last: by a stop id, its grammar or the number of tokens."""
        self.token_ids.append(token_id)
        self._judge(token_id, self.num_output_tokens)

    def resolve(self, index: int, token_id: int) -> None:
        """Take the token that was awaited at `index`; what is awaited behind an end is given up."""
        self.token_ids[index] = token_id
        self._judge(token_id, index + 1 - self.num_prompt_tokens)
        if self.finish_reason is not None:
            del self.token_ids[index + 1 :]

    def _judge(self, token_id: int, count: int) -> None:
        """Finish if the token, the output's last of `count`, ends it."""
        params = self.params
        if token_id in self.stop_token_ids and count >= params.min_tokens:
            self.finish_reason = "stop"
        elif params.max_tokens is not None and count >= params.max_tokens:
            self.finish_reason = "length"
        if self.grammar is not None and self.finish_reason != "stop":
            self.grammar.consume(token_id)
            if self.grammar.error:
                self.finish_reason = "error"
            elif self.grammar.finished:
                self.finish_reason = "stop"
