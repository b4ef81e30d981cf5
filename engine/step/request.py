"""One sequence on its way through the engine: the only place where its progress is kept."""

from __future__ import annotations

import enum
from dataclasses import InitVar, dataclass, field

from torch import Tensor

from ..errors import RequestError, describe
from ..grammar.state import GrammarState
from ..messages import EngineRequest, FinishReason, Pooling, SamplingParams, TokenDynamics, TokenLogprobs, TokenOutput
from .drafting import Drafter

PENDING_TOKEN = -1  # placeholder for a token that the step in flight is still drawing


class RequestStatus(enum.Enum):
    """The stages of a request's life."""

    COMPILING = enum.auto()  # its grammar is being compiled; the scheduler does not know it yet
    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()  # waiting again without its blocks, to be computed from scratch
    FINISHED = enum.auto()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of one request."""

    token_id: int
    logprobs: TokenLogprobs | None
    dynamics: TokenDynamics | None = None


@dataclass(eq=False, slots=True)
class Request:
    """A sequence, its tokens and how far they are computed."""

    message: InitVar[EngineRequest]
    eos_token_ids: InitVar[tuple[int, ...]] = ()  # the model's

    request_id: str = field(init=False)
    params: SamplingParams = field(init=False)
    token_ids: list[int] = field(init=False)  # prompt and output so far
    stop_token_ids: frozenset[int] = field(init=False)
    priority: int = field(init=False)  # lower goes first under the policy `priority`
    background: bool = field(init=False)  # goes after all requests that are not
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
    block_hashes: list[bytes] = field(default_factory=list)  # of its first full blocks, as far as they were needed
    num_registered_blocks: int = 0  # of its first blocks, how many other requests can find

    grammar: GrammarState | None = None  # also None until it is compiled
    drafter: Drafter | None = None  # proposes its next tokens
    logit_rules: object | None = None  # made by the sampler when it first needs them
    draw_row: int = 0  # row of its pending token in the last step's draws; set by the runner

    # What the runner reads of the prompt's hidden states:
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
        self.cache_salt = message.cache_salt
        params = self.params = message.params
        self.token_ids = list(message.prompt_token_ids)
        self.stop_token_ids = frozenset(params.stop_token_ids + (() if params.ignore_eos else eos_token_ids))
        self.num_prompt_tokens = len(self.token_ids)
        self.generates = self.pooling is None and params.max_tokens != 0
        self.reads_prompt = self.pooling is not None or params.prompt_logprobs is not None
        self.has_logit_rules = bool(
            params.logit_bias or params.bad_words or params.allowed_token_ids is not None or params.min_tokens
        )
        # Its draws depend on earlier tokens in ways that only the host knows, or the host reads more than the token.
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
        """Report its new tokens, and what was read of its prompt."""
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
