"""One sequence on its way through the engine, whose progress is kept only here; and a step of several sequences."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..errors import RequestError, describe
from ..grammar.state import GrammarState
from ..messages import EngineRequest, FinishReason, Pooling, SamplingParams, TokenDynamics, TokenLogprobs, TokenOutput
from .drafting import Drafter

Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]
PENDING_TOKEN = -1  # placeholder for a token that the step in flight is still drawing


class RequestStatus(enum.Enum):
    """The stages of a request's life."""

    COMPILING = enum.auto()  # its grammar is being compiled; the scheduler does not know it yet
    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()  # waiting again without its blocks; what has left the cache is recomputed
    FINISHED = enum.auto()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of one request."""

    token_id: int
    logprobs: TokenLogprobs | None
    dynamics: TokenDynamics | None = None


@dataclass(eq=False, slots=True)
class Request:
    """A sequence, its tokens, and how many of them are computed."""

    message: InitVar[EngineRequest]
    eos_token_ids: InitVar[tuple[int, ...]] = ()  # the model's

    request_id: str = field(init=False)
    params: SamplingParams = field(init=False)
    token_ids: list[int] = field(init=False)  # prompt and output so far
    stop_token_ids: frozenset[int] = field(init=False)
    priority: int = field(init=False)  # lower goes first under the policy `priority`
    background: bool = field(init=False)  # goes after all requests that are not in the background
    client: str = field(init=False)  # the client's name; clients take turns
    cache_salt: str | None = field(init=False)  # only requests with the same salt share blocks
    pooling: Pooling | None = field(init=False)  # which hidden state to return instead of tokens

    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    rank: tuple[bool, int, int] = (False, 0, 0)  # order of service, lowest first; set by the scheduler
    scheduled_time: float = 0.0  # `time.monotonic()` when it first ran
    num_computed_tokens: int = 0  # tokens whose keys and values are in the cache
    num_cached_tokens: int = 0  # prompt tokens that were in the prefix cache when it first ran

    # Changed only by the KV cache manager:
    block_ids: list[int] = field(default_factory=list)  # the blocks of all its tokens, in order
    block_hashes: list[bytes] = field(default_factory=list)  # of its first full blocks, as many as were needed so far
    num_registered_blocks: int = 0  # how many of its first blocks other requests can find

    grammar: GrammarState | None = None  # also None until it is compiled
    drafter: Drafter | None = None  # proposes its next tokens
    logit_rules: object | None = None  # made by the sampler when it first needs them
    draw_row: int = 0  # row of its pending token in the last step's draws; set by the runner

    # Results from the prompt's hidden states, written by the runner:
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # from the prompt's second token on
    pooled: Tensor | None = None  # FP64 [H]: the sum of the hidden states, or the last one
    num_pooled_tokens: int = 0

    num_prompt_tokens: int = field(init=False)
    generates: bool = field(init=False)  # draws tokens, rather than only reading its prompt
    reads_prompt: bool = field(init=False)  # needs all of the prompt's hidden states, which the prefix cache lacks
    has_logit_rules: bool = field(init=False)
    needs_tokens: bool = field(init=False)  # its step must be read before the next one can be planned

    def __post_init__(self, message: EngineRequest, eos_token_ids: tuple[int, ...]) -> None:
        self.request_id, self.pooling = message.request_id, message.pooling
        self.priority, self.background = message.priority, message.background
        self.client, self.cache_salt = message.client, message.cache_salt
        params = self.params = message.params
        self.token_ids = list(message.prompt_token_ids)
        self.stop_token_ids = frozenset(params.stop_token_ids + (() if params.ignore_eos else eos_token_ids))
        self.num_prompt_tokens = len(self.token_ids)
        self.generates = self.pooling is None and params.max_tokens != 0
        self.reads_prompt = self.pooling is not None or params.prompt_logprobs is not None
        self.has_logit_rules = bool(
            params.logit_bias or params.bad_words or params.allowed_token_ids is not None or params.min_tokens
        )
        # Its draws depend on earlier tokens in ways that only the host knows, or the host reads more than the tokens.
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

    @property
    def allows_drafts(self) -> bool:
        """Whether several next tokens can be verified in one step: each draw depends on nothing but the tokens."""
        params = self.params
        return self.generates and not (self.has_logit_rules or params.grammar or params.return_dynamics)

    @property
    def is_complete(self) -> bool:
        """Whether it has `max_tokens` tokens, the pending one included."""
        limit = self.params.max_tokens
        return limit is not None and self.generates and self.num_output_tokens >= limit

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output, the pending one included."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, the pending one included."""
        return len(self.token_ids) - self.num_prompt_tokens

    def append(self, token_id: int) -> None:
        """Add a sampled token, and set the finish reason if it is the last one."""
        self.token_ids.append(PENDING_TOKEN)
        self.resolve(len(self.token_ids) - 1, token_id)

    def resolve(self, index: int, token_id: int) -> None:
        """Replace the pending token at `index`; if it ends the sequence, discard those still pending."""
        self.token_ids[index] = token_id
        params, count = self.params, index + 1 - self.num_prompt_tokens
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
        if self.finish_reason is not None:
            del self.token_ids[index + 1 :]

    def output(self, draws: list[SampledToken], embedding: list[float] | None = None) -> TokenOutput:
        """Report its new tokens, and the results from its prompt."""
        last = draws[-1].token_id if draws else None
        by_stop_id = self.finish_reason == "stop" and last in self.stop_token_ids
        return TokenOutput(
            request_id=self.request_id,
            token_ids=[draw.token_id for draw in draws],
            logprobs=[draw.logprobs for draw in draws if draw.logprobs is not None],
            finish_reason=self.finish_reason,
            stop_token_id=last if by_stop_id else None,
            num_cached_tokens=self.num_cached_tokens,
            scheduled_time=self.scheduled_time,
            prompt_logprobs=self.prompt_logprobs,
            dynamics=[draw.dynamics for draw in draws if draw.dynamics is not None],
            embedding=embedding,
        )


def failure_of(request: Request | EngineRequest, error: Exception) -> TokenOutput:
    """End a request; the client sees the message of a `RequestError`; any other error goes only to the log."""
    refused = isinstance(error, RequestError)
    text = str(error) if refused else describe(error)
    return TokenOutput(request_id=request.request_id, token_ids=[], finish_reason="error", error=text, refused=refused)


class ScheduledSequence(NamedTuple):
    """The next `num_tokens` uncomputed tokens of a request."""

    request: Request
    num_tokens: int
    samples: bool  # they include the request's last token, so that its next token is drawn
    draft: Sequence[int] = ()  # the last of the tokens, if they are guesses: a token is drawn after each


@dataclass(frozen=True, slots=True)
class FlatStep:
    """A scheduled step as flat arrays: T tokens of S sequences, in order."""

    ids: Longs  # [T]; 0 for a pending token
    pending: tuple[Longs, Longs]  # [P] each, the indices of pending tokens and their rows in the last step's draws
    positions: Longs  # [T], of each token in its own sequence
    slots: Longs  # [T], the place in the pages of each token's key and value
    tables: Ints  # [S, B], the blocks of each sequence, padded with one of the same sequence
    counts: Longs  # [S], tokens of each sequence
    lengths: Longs  # [S], tokens of each sequence after this step

    @property
    def starts(self) -> Ints:
        """The first token of each sequence, and T: int32 [S + 1]."""
        starts: Ints = np.concatenate(([0], self.counts.cumsum())).astype(np.int32)
        return starts


def flatten(sequences: Sequence[ScheduledSequence], block_size: int) -> FlatStep:
    """Turn a scheduled step into flat arrays."""
    requests = [sequence.request for sequence in sequences]
    begins = np.array([request.num_computed_tokens for request in requests])
    counts = np.array([sequence.num_tokens for sequence in sequences])
    owners = np.arange(len(requests))  # [T], the sequence of each token
    if counts.sum() == len(requests):  # decodes alone, the most frequent step
        positions = begins
        ids = np.array([request.token_ids[at] for request, at in zip(requests, begins.tolist(), strict=True)])
    else:
        tokens: list[int] = []
        for request, count, _, draft in sequences:
            start = request.num_computed_tokens
            tokens += request.token_ids[start : start + count]
            tokens += draft
        ids = np.array(tokens)
        owners = owners.repeat(counts)
        positions = np.arange(len(ids)) + (begins - (counts.cumsum() - counts))[owners]
    indices = rows = (ids == PENDING_TOKEN).nonzero()[0]
    if len(indices):
        ids[indices] = 0
        rows = np.array([requests[owner].draw_row for owner in owners[indices].tolist()])
    held = [len(request.block_ids) for request in requests]
    # Padded with a block of the same sequence, so that no sequence can read from another.
    tables = np.empty((len(requests), max(held)), np.int32)
    tables[:] = np.array([request.block_ids[-1] for request in requests])[:, None]
    blocks = np.fromiter(itertools.chain.from_iterable(r.block_ids for r in requests), np.int32, sum(held))
    tables[np.arange(max(held)) < np.array(held)[:, None]] = blocks
    slots = tables[owners, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return FlatStep(ids, (indices, rows), positions, slots, tables, counts, begins + counts)
