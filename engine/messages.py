"""The typed messages that cross the border between the API process and the engine process.

Each is a `msgspec.Struct`, encoded as msgpack and tagged with its class name, so that nothing but
data can ever arrive (no pickle) and a reader finds the whole protocol on this page.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import IO, Literal

import msgspec

from ..model.draw_params import DrawParams
from .config import MAX_LOGPROBS as MAX_LOGPROBS
from .config import EngineConfig, ResolvedConfig
from .errors import RequestError

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_BAD_SEQUENCES = 512
Pooling = Literal["mean", "last"]
Kernels = Literal["native", "triton", "torch"]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of everything that crosses the process border."""


class SamplingParams(DrawParams, Message, frozen=True, kw_only=True):
    """How one sequence is sampled (the fields of `DrawParams` too) and when it ends.

    Raises `RequestError` naming the field when a value is out of its range.

    Attributes:
        max_tokens: most tokens to generate; None means the rest of the context; 0 only reads the prompt.
        stop: strings that end the text (held back, removed unless `include_stop_str_in_output`).
        stop_token_ids: token ids that end the sequence, beside the model's own end-of-sequence ids.
        ignore_eos: go on past the model's end-of-sequence ids.
        min_tokens: no end-of-sequence or stop id before this many tokens.
        logprobs: None for none; else the number of most likely tokens reported beside the chosen one.
        skip_special_tokens: leave special tokens out of the text.
        logit_bias: added to the logits of these token ids, after the penalties; -100 and 100 are as good as a ban and
            a command.
        bad_words: sequences of token ids, of which the last is ruled out where the others have just been generated
            (a single one always). Where they and `min_tokens` rule out all that is allowed, they rule out nothing.
        allowed_token_ids: only these may be generated; None allows all.
        prompt_logprobs: None for none; else as `logprobs`, for every token of the prompt but the first.
        grammar: what the text must obey, in llguidance's grammar language (see `engine/grammar`); None is anything.
        return_dynamics: report what the network did for each token (`TokenDynamics`).
    """

    max_tokens: int | None = 16
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] = {}
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None
    return_dynamics: bool = False

    def __post_init__(self) -> None:
        def require(condition: bool, param: str, text: str) -> None:
            if not condition:
                raise RequestError(f"{param} must be {text}, got {getattr(self, param)!r}.", param=param)

        def within(param: str, low: float, high: float) -> None:
            value = getattr(self, param)
            require(math.isfinite(value) and low <= value <= high, param, f"between {low:g} and {high:g}")

        require(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", "0 or more")
        within("temperature", 0.0, 2.0)
        require(-1 <= self.top_k < 2**31, "top_k", "-1 or 0 (off) or a positive number below 2147483648")
        require(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        within("min_p", 0.0, 1.0)
        within("presence_penalty", -2.0, 2.0)
        within("frequency_penalty", -2.0, 2.0)
        within("repetition_penalty", 0.01, 100.0)
        require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        require(all(self.stop), "stop", "without empty strings")
        require(len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS, "stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids")
        require(self.min_tokens >= 0, "min_tokens", "0 or more")
        require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"no larger than the token limit ({self.max_tokens})",
        )
        for param in ("logprobs", "prompt_logprobs"):
            count = getattr(self, param)
            require(count is None or 0 <= count <= MAX_LOGPROBS, param, f"between 0 and {MAX_LOGPROBS}")
        require(len(self.logit_bias) <= MAX_LOGIT_BIAS, "logit_bias", f"for at most {MAX_LOGIT_BIAS} token ids")
        require(
            all(-100.0 <= bias <= 100.0 for bias in self.logit_bias.values()), "logit_bias", "between -100 and 100 each"
        )
        require(len(self.bad_words) <= MAX_BAD_SEQUENCES, "bad_words", f"at most {MAX_BAD_SEQUENCES} sequences")
        require(all(self.bad_words), "bad_words", "without empty sequences")
        require(
            self.allowed_token_ids is None or len(self.allowed_token_ids) > 0, "allowed_token_ids", "at least one id"
        )


class EngineRequest(Message, frozen=True, kw_only=True):
    """A new sequence to generate; `resolve_request` draws the `seed` of `params` and finds its `max_tokens`.

    Attributes:
        request_id: its name, of which no other unfinished request may be.
        prompt_token_ids: at least one.
        params: how it is sampled.
        priority: lower goes first, under the scheduling policy `priority`.
        cache_salt: only requests with the same salt share computed prefixes.
        pooling: generate nothing, but answer with the final hidden states of the prompt: their mean, or the last.
            The prompt may fill the whole context, and of `params` nothing counts.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    pooling: Pooling | None = None


class Abort(Message, frozen=True, kw_only=True):
    """Forget these requests, in whatever state they are; unknown ids are fine."""

    request_ids: list[str]


class CheckGrammar(Message, frozen=True, kw_only=True):
    """Compile a grammar and answer with a `GrammarVerdict`, so that its requests are refused before they begin."""

    key: bytes  # comes back with the verdict
    grammar: str


class Ping(Message, frozen=True, kw_only=True):
    """Say that you are alive: between two steps, not from a thread beside them."""


class Shutdown(Message, frozen=True, kw_only=True):
    """End the engine process now."""


class GraphInfo(Message, frozen=True, kw_only=True):
    """The steps that were recorded as CUDA graphs."""

    sizes: tuple[int, ...]  # batch sizes of decode steps
    mixed_sizes: tuple[int, ...]  # numbers of tokens of other steps
    seconds: float
    bytes: int


class EngineInfo(Message, frozen=True, kw_only=True):
    """What the engine reports once it is ready."""

    config: ResolvedConfig
    era: str
    parameters: int
    file_dtypes: tuple[str, ...] = ()  # number formats of the checkpoint's files; none for dummy weights
    load_seconds: float
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    hidden_size: int = 0
    num_layers: int = 0
    num_experts: int = 0  # 0 for a network without routed experts
    kernels: Kernels = "torch"
    graphs: GraphInfo | None = None
    chunk_multiple: int = 1  # where a prompt must be cut, if at all, so that its tokens' last bits do not change


class StartFailed(Message, frozen=True, kw_only=True):
    """The engine could not start; one plain sentence."""

    message: str


class Alive(Message, frozen=True, kw_only=True):
    """The answer to a ping; also said of itself in a long step, when a layer is done."""


class TokenLogprobs(Message, frozen=True, kw_only=True, array_like=True):
    """Log-probabilities at one position, of the raw distribution (before penalties, masks and temperature)."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    """(token id, log-probability) of the most likely tokens, best first."""
    rank: int = 1
    """1 for the most likely token of all."""


class TokenDynamics(Message, frozen=True, kw_only=True, array_like=True):
    """What the network did in the pass whose logits a token was drawn from; the lists have one entry per layer.

    Attributes:
        input_token_id: the token that the pass read, whose id routes it.
        experts: the expert used; [] for a network without routed experts.
        rerouted: whether mu chose another expert than the id's; [] likewise.
        mu_norm: Euclidean norm of the layer's mu; [] where the network has none.
        velocity_norm: Euclidean norm of the velocity after the layer; [] where the network has none.
    """

    input_token_id: int
    experts: list[int]
    rerouted: list[bool]
    mu_norm: list[float]
    velocity_norm: list[float]


class TokenOutput(Message, frozen=True, kw_only=True, array_like=True):
    """What one step added to one request."""

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The stop id that ended the sequence, when one did; it is the last of `token_ids`."""
    num_cached_tokens: int = 0
    """Prompt tokens that were taken from the prefix cache when the request was first scheduled."""
    scheduled_time: float = 0.0
    """When the request was first scheduled, in seconds of `time.monotonic()` (shared by the processes of a machine)."""
    error: str | None = None
    refused: bool = False
    """With an error: it is the request's own fault, and the error says which."""
    prompt_logprobs: list[TokenLogprobs] = []
    """Of the prompt's next tokens, for a request that asks; they come in order, the last with the first token."""
    dynamics: list[TokenDynamics] = []
    """One per new token, for a request that asks."""
    embedding: list[float] | None = None
    """Of a request with `pooling`: its one answer, with the finish reason "stop"."""


class GrammarVerdict(Message, frozen=True, kw_only=True, array_like=True):
    """The answer to a `CheckGrammar`."""

    key: bytes
    outcome: Literal["accepted", "refused", "busy", "failed"]
    reason: str = ""  # why it is refused or busy, for the client; or the traceback of a failure, for the log


class EngineStats(Message, frozen=True, kw_only=True):
    """The engine's state after a step, and what that step did."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    """Share of the KV blocks in use, 0 to 1."""
    num_preemptions: int = 0
    """Since the start."""
    prefix_cache_queries: int = 0
    """Prompt tokens that were looked up in the prefix cache, since the start."""
    prefix_cache_hits: int = 0
    """Prompt tokens that were found there, since the start."""
    step_seconds: float = 0.0
    step_tokens: int = 0
    """Tokens computed in the step, of prompts and outputs together."""
    num_drafts: int = 0
    """Guesses of next tokens that were checked, since the start."""
    num_draft_tokens: int = 0
    """Tokens in them, since the start."""
    num_accepted_tokens: list[int] = []
    """How often the first, the second, ... token of a guess was right, since the start; [] without speculation."""
    expert_tokens: list[list[int]] | None = None
    """Tokens that each expert has computed since the start, [layer][expert]; None: as last told, or no experts."""
    expert_reroutes: list[int] | None = None
    """Tokens that mu has sent to another expert than the id's since the start, [layer]; None likewise."""


class StepOutputs(Message, frozen=True, kw_only=True):
    """All that one engine step produced: one message, so one wake-up of the API process."""

    outputs: list[TokenOutput]
    stats: EngineStats
    verdicts: list[GrammarVerdict] = []


ToEngine = EngineRequest | Abort | CheckGrammar | Ping | Shutdown
FromEngine = EngineInfo | StartFailed | Alive | StepOutputs


LENGTH_BYTES = 4
_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: msgspec.Struct | EngineConfig | str) -> bytes:
    """One message as it goes over the socket: its length in four bytes, then msgpack."""
    body = _encoder.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def read_frames(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the body of each message that arrives, until the other side closes."""
    with contextlib.suppress(ConnectionResetError):
        while len(head := stream.read(LENGTH_BYTES)) == LENGTH_BYTES:
            size = int.from_bytes(head, "little")
            if len(body := stream.read(size)) < size:
                return
            yield body
