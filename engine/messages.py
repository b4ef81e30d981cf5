"""The messages between the API process and the engine process.

Each is a `msgspec.Struct`, encoded as msgpack and tagged with its class name: only data can arrive (no pickle), and
this module is the whole protocol. The checks of a request are at the end: the client refuses at once a request that
the engine can never run, and the engine checks again.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Collection, Iterator
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
PRIORITY_LIMIT = 2**31
ID_BYTES = 36  # of an integer in a list
Pooling = Literal["mean", "last"]
Kernels = Literal["native", "triton", "torch"]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of all messages."""


class Marks(Message, frozen=True, kw_only=True):
    """How a model marks the sections of its text: reasoning, the final answer, tool calls.

    Marks are special tokens if there are `ids`; otherwise they are the plain texts, and white space around them is
    removed with them.
    """

    ids: tuple[int, ...] = ()  # of each section's start and end marks, in the order of `SECTIONS`; -1 for none
    think: tuple[str, str] = ("<think>", "</think>")
    final: tuple[str, str] = ("<final>", "</final>")
    starts_in: Literal["reasoning", "content"] | None = None  # the section whose start mark is in the prompt
    continues: bool = (
        False  # the prompt has some of its text too, so that white space at the start belongs to the section
    )


Section = Literal["reasoning", "content", "call", "mark"]
SECTIONS: tuple[Section, ...] = ("reasoning", "content", "call")
"""The sections that have marks; other text is content."""


class SamplingParams(DrawParams, Message, frozen=True, kw_only=True):
    """How a sequence is sampled (see also `DrawParams`) and when it ends; a wrong value raises `RequestError`."""

    max_tokens: int | None = 16  # None: as many as fit; 0: only read the prompt
    stop: tuple[str, ...] = ()  # strings that end the text, and are removed unless `include_stop_str_in_output`
    stop_token_ids: tuple[int, ...] = ()  # in addition to the model's end-of-sequence ids
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False  # continue past the model's end-of-sequence ids
    min_tokens: int = 0  # no end-of-sequence id, stop id or stop string ends the text before this many tokens
    logprobs: int | None = None  # how many of the most likely tokens to report in addition to the chosen one
    skip_special_tokens: bool = True  # in the text
    logit_bias: dict[int, float] = {}  # added to logits after the penalties; -100 bans a token and 100 forces it
    # The last token of each sequence is banned right after the others were generated. If this and `min_tokens` would
    # ban all allowed tokens, they ban none.
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None  # None: all
    prompt_logprobs: int | None = None  # like `logprobs`, for every token of the prompt except the first
    grammar: str | None = None  # that the text must match, in llguidance's grammar language
    return_dynamics: bool = False  # report `TokenDynamics`
    marks: Marks | None = None  # split the text into sections; stop strings count in content and calls only

    def __post_init__(self) -> None:
        def require(condition: bool, param: str, text: str) -> None:
            if not condition:
                raise RequestError(f"{param} must be {text}, but got {getattr(self, param)!r}.", param=param)

        def within(low: float, high: float, *params: str) -> None:
            for param in params:
                value = getattr(self, param)
                require(value is None or low <= value <= high, param, f"between {low:g} and {high:g}")

        within(0.0, 2.0, "temperature")
        within(0.0, 1.0, "min_p")
        within(-2.0, 2.0, "presence_penalty", "frequency_penalty")
        within(0.01, 100.0, "repetition_penalty")
        within(0, MAX_LOGPROBS, "logprobs", "prompt_logprobs")
        most, allowed = self.max_tokens, self.allowed_token_ids
        require(most is None or most >= 0, "max_tokens", "0 or more")
        require(-1 <= self.top_k < 2**31, "top_k", "-1 or 0 (off) or a positive number below 2147483648")
        require(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        require(all(self.stop), "stop", "without empty strings")
        require(len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS, "stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids")
        require(self.min_tokens >= 0, "min_tokens", "0 or more")
        require(most is None or self.min_tokens <= most, "min_tokens", f"no larger than the token limit ({most})")
        require(len(self.logit_bias) <= MAX_LOGIT_BIAS, "logit_bias", f"for at most {MAX_LOGIT_BIAS} token ids")
        biases = self.logit_bias.values()
        require(all(-100.0 <= bias <= 100.0 for bias in biases), "logit_bias", "between -100 and 100 each")
        require(len(self.bad_words) <= MAX_BAD_SEQUENCES, "bad_words", f"at most {MAX_BAD_SEQUENCES} sequences")
        require(all(self.bad_words), "bad_words", "without empty sequences")
        require(allowed is None or len(allowed) > 0, "allowed_token_ids", "at least one id")


class EngineRequest(Message, frozen=True, kw_only=True):
    """A new sequence to generate; `resolve_request` sets the `seed` and `max_tokens` of `params`."""

    request_id: str  # unique among unfinished requests
    prompt_token_ids: list[int]  # at least one
    params: SamplingParams
    priority: int = 0  # under the scheduling policy `priority`, the lowest runs first
    background: bool = False  # runs only in the room that other requests leave, under every policy
    client: str = ""  # the scheduler is fair between clients of these names; requests without one count as one client
    cache_salt: str | None = None  # only requests with the same salt share the prefix cache
    # Instead of generating, return the mean of the prompt's final hidden states, or the last one. The prompt may fill
    # the whole context, and `params` is ignored.
    pooling: Pooling | None = None

    @property
    def num_bytes(self) -> int:
        """Return about how much memory it takes once it is decoded."""
        words = sum(map(len, self.params.bad_words))
        ids = len(self.prompt_token_ids) + len(self.params.allowed_token_ids or ()) + words
        return ID_BYTES * ids + len(self.params.grammar or "")


class Abort(Message, frozen=True, kw_only=True):
    """Drop these requests, whatever their state; unknown ids are ignored."""

    request_ids: list[str]


class CheckGrammar(Message, frozen=True, kw_only=True):
    """Compile a grammar and return a `GrammarVerdict`, so that a bad one is refused before its request starts."""

    key: bytes  # returned with the verdict
    grammar: str


class Ping(Message, frozen=True, kw_only=True):
    """Ask for `Alive`, which the engine's loop sends between two steps."""


class Shutdown(Message, frozen=True, kw_only=True):
    """Exit now."""


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
    active_parameters: int = 0  # used to compute one token
    sizes: str = ""  # of the network, in words
    file_dtypes: tuple[str, ...] = ()  # number formats of the checkpoint's files; none for dummy weights
    load_seconds: float
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    hidden_size: int = 0
    num_layers: int = 0
    num_experts: int = 0  # 0 for a network without routed experts
    kernels: Kernels = "torch"
    instruction_set: str = ""  # of the compiled kernels
    graphs: GraphInfo | None = None
    kv_event_endpoints: tuple[str, ...] = ()  # where its events are published, and missed ones can be requested
    chunk_multiple: int = 1  # chunks of a prompt that end at multiples of this leave its results unchanged, to the bit

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.config.num_kv_blocks * self.config.block_size


class Loading(Message, frozen=True, kw_only=True):
    """How many bytes of the weights are loaded so far, and how many there are."""

    done: int
    total: int


class StartFailed(Message, frozen=True, kw_only=True):
    """The engine could not start; the message is one sentence to show the user."""

    message: str


class Alive(Message, frozen=True, kw_only=True):
    """The reply to a ping; also sent unasked in a long step, when a layer is done."""


class TokenLogprobs(Message, frozen=True, kw_only=True, array_like=True):
    """Log-probabilities at one position, of the raw distribution (before penalties, masks and temperature)."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # the most likely tokens, best first
    rank: int = 1  # 1 for the most likely token of all


class TokenDynamics(Message, frozen=True, kw_only=True, array_like=True):
    """The network's dynamics in the pass from which a token was drawn; lists have one entry per layer, or none."""

    input_token_id: int  # the token that the pass read; its id chooses the experts
    experts: list[int]  # the expert used, the first one if an id uses several
    rerouted: list[bool]  # whether mu chose another expert than the id's
    mu_norm: list[float]  # Euclidean norm of the layer's mu
    velocity_norm: list[float]  # Euclidean norm of the velocity after the layer
    routed_experts: list[list[int]] = []  # all experts used, the first one first
    expert_weights: list[list[float]] = []  # the weight of each in their sum


class TokenOutput(Message, frozen=True, kw_only=True, array_like=True):
    """The output of one step for one request."""

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop id that ended the sequence: the last of `token_ids`
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache when the request was first scheduled
    scheduled_time: float = 0.0  # `time.monotonic()` when it was first scheduled; all processes share that clock
    error: str | None = None
    refused: bool = False  # the error is the request's own fault, and is reported to the client
    prompt_logprobs: list[TokenLogprobs] = []  # of the prompt's next tokens; the last come with the first token
    dynamics: list[TokenDynamics] = []  # one per new token
    embedding: list[float] | None = None  # of a request with `pooling`: its only output


class GrammarVerdict(Message, frozen=True, kw_only=True, array_like=True):
    """The result of a `CheckGrammar`."""

    key: bytes
    outcome: Literal["accepted", "refused", "busy", "failed"]
    reason: str = ""  # why it was refused or the machine busy, for the client; or a failure's traceback, for the log


class EngineStats(Message, frozen=True, kw_only=True):
    """The engine's state after a step, with counts since the start, and the size of that step."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0  # share of the KV blocks in use, 0 to 1
    num_preemptions: int = 0
    prefix_cache_queries: int = 0  # prompt tokens that were looked up in the prefix cache
    prefix_cache_hits: int = 0  # prompt tokens that were found there
    step_seconds: float = 0.0
    step_tokens: int = 0  # computed in the step, of prompts and outputs together
    num_drafts: int = 0  # drafts of next tokens that were verified
    num_draft_tokens: int = 0  # tokens in them
    num_kv_event_batches: int = 0  # steps whose events of the KV cache were published, those dropped included
    num_kv_event_batches_dropped: int = 0  # because too many waited to be published
    num_accepted_tokens: list[int] = []  # how many times the first, second, ... token was right; [] without speculation
    expert_tokens: list[list[int]] | None = None  # by [layer][expert]; None: as last reported, or no experts
    expert_reroutes: list[int] | None = (
        None  # by [layer], tokens that mu sent to an expert other than their id's; None: the same
    )


class StepOutputs(Message, frozen=True, kw_only=True):
    """Everything that one step produced, in one message, so that it wakes the API process once."""

    outputs: list[TokenOutput]
    stats: EngineStats
    verdicts: list[GrammarVerdict] = []


ToEngine = EngineRequest | Abort | CheckGrammar | Ping | Shutdown
FromEngine = EngineInfo | Loading | StartFailed | Alive | StepOutputs


LENGTH_BYTES = 4
_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: msgspec.Struct | EngineConfig | str) -> bytes:
    """Encode a message for the socket: its length in four bytes, then msgpack."""
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
    more = f"up to {output} more were requested" if output > 1 else "the answer needs at least one more"
    has = f"the prompt has {prompt} tokens" + (f" and {more}" if output else "")
    context, capacity, code = info.config.max_model_len, info.kv_capacity_tokens, "context_length_exceeded"
    if prompt + output > context:
        raise RequestError(f"This model's context is {context} tokens, but {has}.", code=code)
    if prompt + max(output - 1, 0) > capacity:  # the last token is never computed
        raise RequestError(f"The KV cache holds {capacity} tokens, but {has}.", code=code)
    if message.pooling not in (None, "mean", "last"):
        raise RequestError(f"pooling must be 'mean' or 'last', but got {message.pooling!r}.", param="pooling")
    if not -PRIORITY_LIMIT <= message.priority < PRIORITY_LIMIT:
        raise RequestError(f"priority must be a 32-bit integer, but got {message.priority}.", param="priority")


def resolve_request(message: EngineRequest, info: EngineInfo, seeds: random.Random) -> EngineRequest:
    """Limit `max_tokens` to the room in the context, fill in `seed`, and check the result; raises `RequestError`."""
    params, context, prompt = message.params, info.config.max_model_len, len(message.prompt_token_ids)
    if 0 < context - prompt < params.min_tokens:
        has = f"the context of {context} tokens has room for {context - prompt} after the prompt's {prompt}"
        raise RequestError(f"min_tokens is {params.min_tokens}, but {has}.", param="min_tokens")
    room = max(context - prompt, params.min_tokens, 1)  # for a prompt that is too long, which the check refuses
    params = msgspec.structs.replace(
        params,
        max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
        seed=seeds.getrandbits(63) if params.seed is None else params.seed,
    )
    message = msgspec.structs.replace(message, params=params)
    check_request(message, info)
    return message
