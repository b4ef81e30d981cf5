"""The settings of an engine, and how a setting is declared: name, type, default, bounds and help in one place.

`server/flags.py` makes a flag of each field of `EngineSettings`. Only the standard library is imported, so that a
command can read its flags before it starts the engine process.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, NewType, TypeVar, get_args, get_origin, get_type_hints

MAX_LOGPROBS = 20
MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}
NUMBERS = {"int": "a whole number", "float": "a number", "size": "a number of bytes, or one such as 2GiB,"}
SWITCH_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}

# An address of ZeroMQ, with a port, which is * for a free one, or with a file; and one of this machine to listen on.
ZMQ_ADDRESS = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[\w.*-]+):(\*|[0-9]{1,5})|ipc://.{1,100}")
ZMQ_OWN = re.compile(r"ipc://|tcp://(\*|0\.0\.0\.0|127\.[0-9.]+|localhost|\[::1?\]):")
ZMQ_PRIVATE = re.compile(r"ipc://|tcp://(127\.[0-9.]+|localhost|\[::1\]):")

Settings = TypeVar("Settings")
Bytes = NewType("Bytes", int)  # may also be given with a unit, such as 512MB or 2GiB


def setting(
    default: Any, text: str, *, low: float = -math.inf, high: float = math.inf,
    secret: bool = False, guard: bool = False, blank: bool = False,
) -> Any:  # fmt: skip
    """Declare a field of a settings class with its help and its inclusive bounds.

    A secret is hidden in the repr. A guard protects the server, so it is refused if it is set but empty, as when the
    value of a template or of a variable is missing; secrets are guards too. `blank` texts of a list may be white space.
    """
    metadata = {"text": text, "low": low, "high": high, "guard": guard or secret, "blank": blank}
    return field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True, slots=True)
class Setting:
    """A field that `setting` has declared."""

    name: str
    type: Any
    kind: str  # text, list, switch, int, float, size or json
    default: Any
    secret: bool
    text: str
    low: float
    high: float
    guard: bool
    blank: bool

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed texts; empty if every text is allowed."""
        return get_args(self.type) if self.kind == "text" else ()

    @property
    def shown_default(self) -> str:
        """The default as its help shows it; empty for none."""
        if self.kind == "size" and self.default:
            return f"{self.default / 10**9:g}GB"
        if isinstance(self.default, bool):
            return "on" if self.default else ""
        if isinstance(self.default, float):
            return f"{self.default:g}"
        return "" if self.default in (None, ()) else str(self.default)

    def convert(self, raw: Any, source: str) -> Any:
        """Convert text or a value from YAML, JSON or Python; raise a `ValueError` that names `source`."""
        if (raw is None and self.default is None and not self.guard) or (
            self.kind == "json" and dataclasses.is_dataclass(raw)
        ):
            return raw
        if not all(_is_text(part) for part in (raw if isinstance(raw, list) else [raw])):
            raise ValueError(f"{source} is not UTF-8 text.")
        if self.kind == "list":
            items = [part.strip() for part in raw.split(",")] if isinstance(raw, str) else raw
            whole = isinstance(items, list) and all(
                isinstance(item, str) and (item if self.blank else item.strip()) for item in items
            )
            if not whole or (self.guard and not items):
                raise ValueError(f"{source} must be one or more strings, none of them empty.")
            return tuple(items)
        if self.kind == "switch":
            if (word := str(raw).lower()) not in SWITCH_WORDS:
                raise ValueError(f"{source} must be true or false, but got {raw!r:.200}.")
            return SWITCH_WORDS[word]
        if self.kind == "json":
            return self._parse_object(raw, source)
        if self.kind in NUMBERS:
            try:
                number = _parse_bytes(str(raw)) if self.kind == "size" else self.type(str(raw))
            except ValueError:
                number = math.nan
            return self.check(number, source, raw)
        if not isinstance(raw, (str, int, float)) or isinstance(raw, bool):
            raise ValueError(f"{source} must be text, but got {raw!r:.200}.")
        value = str(raw)
        if self.choices and value not in self.choices:
            words = ", ".join(self.choices)
            raise ValueError(f"{source} must be one of {words}, but got {value!r:.200}{nearest(value, self.choices)}")
        if not value and self.default != "":
            raise ValueError(f"{source} must not be empty.")
        return value

    def check(self, value: Any, source: str, given: Any) -> Any:
        """Return a number that is within the bounds."""
        if self.kind in NUMBERS and value is not None and not self.low <= value <= self.high:
            bounds = f"at least {self.low:g}" if self.high == math.inf else f"between {self.low:g} and {self.high:g}"
            raise ValueError(f"{source} must be {NUMBERS[self.kind]} {bounds}, but got {given!r:.200}.")
        return value

    def _parse_object(self, raw: Any, source: str) -> Any:
        try:
            values = json.loads(raw) if isinstance(raw, str) else raw
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            example = self.text[self.text.find("{") : self.text.find("}") + 1]
            raise ValueError(f"{source} must be a JSON object such as {example}, but got {raw!r:.200}.")
        if isinstance(self.type, type) and dataclasses.is_dataclass(self.type):
            return from_values(self.type, values, source)
        return values


def settings_of(cls: Any) -> dict[str, Setting]:
    """Return the declared fields of a dataclass by name."""
    kinds = {bool: "switch", int: "int", float: "float", Bytes: "size"}
    found, hints = {}, get_type_hints(cls)
    for f in dataclasses.fields(cls):
        own = hints[f.name]
        if NoneType in get_args(own):  # X | None
            own = get_args(own)[0]
        other = "json" if dataclasses.is_dataclass(own) else "text"
        kind = kinds.get(own) or {tuple: "list", dict: "json"}.get(get_origin(own), other)
        found[f.name] = Setting(f.name, own, kind, f.default, not f.repr, **f.metadata)
    return found


def from_values(cls: type[Settings], values: Mapping[str, Any], source: str = "") -> Settings:
    """Make an object of a settings class; raise `ValueError` for an unknown name or an unusable value."""
    known, where = settings_of(cls), f" in {source}" if source else ""
    for name in values:
        if name not in known:
            raise ValueError(f"Unknown setting {name!r:.200}{where}{nearest(name, known)}")
    return cls(**{name: known[name].convert(value, name + where) for name, value in values.items()})


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message: `; did you mean X?` for the closest known word, else a full stop.

    The prefix of all flags and variables does not count, since it would make any two of them alike.
    """
    names = {_bare(name): name for name in known}
    near = difflib.get_close_matches(_bare(word), names, n=1, cutoff=0.7)
    if not near and len(_bare(word)) > 2:
        near = [name for name in sorted(names, key=len) if name.startswith(_bare(word))]
    return f"; did you mean {names[near[0]]}?" if near else "."


def _bare(name: str) -> str:
    return re.sub("^(--|PYLLM_)", "", name[:200]).replace("_", "-")


def _is_text(value: Any) -> bool:
    """Whether a value is not a string, or one that UTF-8 can encode (other bytes of an argument are surrogates)."""
    return not isinstance(value, str) or ("\0" not in value and value == value.encode("utf-8", "replace").decode())


def _parse_bytes(text: str) -> int:
    """Read a size in bytes; raise `ValueError` for anything else."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ValueError(text)
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " ")) if found[2] else int(found[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How the next tokens of a sequence are guessed, to be verified several at a time."""

    method: Literal["ngram"] = setting("ngram", "ngram looks for the last tokens earlier in the sequence")
    num_speculative_tokens: int = setting(4, "maximum tokens per guess", low=1, high=16)
    prompt_lookup_min: int = setting(3, "minimum length of the match with earlier tokens", low=1, high=16)
    prompt_lookup_max: int = setting(
        4, "maximum length of the match with earlier tokens; longer matches are tried first", low=1, high=16
    )
    disable_by_batch_size: int = setting(
        4, "maximum decoding sequences in a step that guesses: with more, a guess costs as much as it saves", low=1
    )

    def __post_init__(self) -> None:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError("prompt_lookup_min must be no larger than prompt_lookup_max.")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEventsConfig:
    """Where the events of the KV cache are published, with vLLM's names."""

    enable_kv_cache_events: bool = setting(False, "publish the events")
    publisher: Literal["zmq", "null"] = setting("zmq", "null publishes nothing")
    endpoint: str = setting("tcp://127.0.0.1:5557", "ZeroMQ address of the events")
    replay_endpoint: str | None = setting(None, "ZeroMQ address for requests of missed events (default: none)")
    buffer_steps: int = setting(10_000, "steps kept for replay", low=0, high=10**6)
    hwm: int = setting(100_000, "messages kept for a slow subscriber; further ones are dropped", low=1, high=10**7)
    max_queue_size: int = setting(100_000, "steps waiting to be published; further ones are dropped", low=1, high=10**7)
    topic: str = setting("", "first frame of each message, such as kv@POD@MODEL")
    event_encoding: Literal["array", "map"] = setting("array", "how an event is written: as an array or as a map")

    def __post_init__(self) -> None:
        for name in ("endpoint", "replay_endpoint"):
            value = getattr(self, name)
            if value is not None and not ZMQ_ADDRESS.fullmatch(value):
                raise ValueError(f"{name} must be tcp://HOST:PORT or ipc://PATH, but got {value!r:.200}.")

    @property
    def enabled(self) -> bool:
        """Whether anything is published."""
        return self.enable_kv_cache_events and self.publisher == "zmq"

    @property
    def binds(self) -> bool:
        """Whether subscribers connect to `endpoint`; if it names another host, this engine connects to it instead."""
        return bool(ZMQ_OWN.match(self.endpoint))

    @property
    def exposed(self) -> list[str]:
        """The addresses at which other machines can read the events."""
        return [name for name in (self.endpoint, self.replay_endpoint) if name and not ZMQ_PRIVATE.match(name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """The settings of an engine that are flags of every command, by the same names."""

    dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", "number format of the weights")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")
    load_format: Literal["auto", "dummy"] = setting("auto", "dummy makes random weights of the configured shapes")
    generation_config: str = setting(
        "auto",
        "source of sampling defaults and end tokens: auto (the checkpoint's generation_config.json), a folder with "
        "one, or none",
    )
    quantization: Literal["none", "int8"] = setting("none", "int8 packs the large weights to 8 bits while loading")
    kv_cache_dtype: Literal["auto", "fp8"] = setting(
        "auto", "fp8 fits twice as many tokens in the KV cache, where supported"
    )
    seed: int | None = setting(None, "seed for requests without one, and for dummy weights", low=0, high=2**63 - 1)
    max_model_len: int | None = setting(
        None, "maximum prompt and output tokens (default: the model's context)", low=2, high=2**31 - 1
    )
    allow_long_max_model_len: bool = setting(
        False, "accept a --max-model-len above what the model was trained for, beyond which it writes nonsense"
    )
    max_num_seqs: int | None = setting(
        None,
        f"maximum sequences per step (default: {MAX_NUM_SEQS['cpu']}; GPU: {MAX_NUM_SEQS['cuda']})",
        low=1,
        high=4096,
    )
    max_num_batched_tokens: int = setting(2048, "maximum tokens per step; long prompts are chunked", low=1, high=2**20)
    max_num_prefill_tokens: int | None = setting(
        None,
        "maximum prompt tokens in a step that also decodes up to 8 sequences (default: by device)",
        low=1,
        high=2**20,
    )
    max_num_queued_reqs: int = setting(
        1024, "maximum requests waiting to run; further ones get a 429", low=1, high=2**31 - 1
    )
    scheduling_policy: Literal["fcfs", "priority"] = setting(
        "fcfs", "fcfs runs requests in order of arrival; priority runs those with the lowest priority value first"
    )
    enable_prefix_caching: bool = setting(True, "compute a prefix shared by several prompts only once")
    speculative_config: SpeculativeConfig | None = setting(  # noqa: RUF009 - it is a field
        None, 'guess repeated text and verify several tokens at once, as in {"method": "ngram"}'
    )
    block_size: int = setting(16, "tokens in one block of the KV cache", low=1, high=1024)
    kv_cache_memory_bytes: Bytes | None = setting(  # noqa: RUF009
        None, "size of the KV cache, such as 2GiB (default: from the free memory)", low=1, high=2**60
    )
    gpu_memory_utilization: float = setting(
        0.92, "share of the GPU's memory to fill if no size of the KV cache is set", low=0.01, high=1
    )
    num_kv_blocks: int | None = setting(None, "number of blocks in the KV cache, instead of a size", low=1, high=2**60)
    enforce_eager: bool = setting(False, "do not record steps as CUDA graphs")
    deterministic: bool = setting(
        False,
        "make outputs bit-for-bit independent of other requests; start-up fails if the device cannot guarantee it",
    )
    engine_hang_timeout: float = setting(
        30.0, "seconds without progress after which the engine counts as hung and is killed", low=1, high=86400
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(EngineSettings):
    """Everything that an engine needs to start."""

    model: str = setting(dataclasses.MISSING, "folder of the checkpoint")
    overlap_scheduling: bool | None = setting(
        None, "launch each step before reading the previous one's results (None: on a GPU)"
    )
    quiet: bool = setting(False, "no progress bar while loading")
    kv_events_config: KVEventsConfig | None = setting(None, "where to publish the events of the KV cache")  # noqa: RUF009

    def __post_init__(self) -> None:
        for name, own in settings_of(EngineConfig).items():
            own.check(getattr(self, name), name, getattr(self, name))

    def most_seqs(self, device: str) -> int:
        """`max_num_seqs`, or its default on `cpu` or `cuda`."""
        return self.max_num_seqs or MAX_NUM_SEQS[device]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig(EngineConfig):
    """The settings of a running engine: its `dtype` and `device`, and these, are decided."""

    max_model_len: int
    max_num_seqs: int
    max_num_prefill_tokens: int
    num_kv_blocks: int
    overlap_scheduling: bool
