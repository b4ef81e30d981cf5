"""Every flag of the command line, declared once.

A value comes from the arguments, else from the environment (`PYLLM_` and the flag's name), else from the
YAML file named by `--config`, else from the default here. Nothing heavy is imported, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    from ..engine.config import EngineConfig

DEMO_FOLDER = Path(__file__).parent.parent / "model" / "demo"
DEMO_NAME = "pyllm-demo"
ENVIRONMENT_PREFIX = "PYLLM_"
MAX_LOGPROBS = 20
"""That of `engine/messages.py`, whose import would let the engine process start later."""


class ConfigError(ValueError):
    """A flag, variable or line of the YAML file that cannot be used; the message is one plain sentence."""


def flag(
    default: Any,
    text: str,
    kind: str = "text",
    *,
    low: float = -math.inf,
    high: float = math.inf,
    choices: tuple[str, ...] = (),
    positional: bool = False,
    secret: bool = False,
) -> Any:
    """Declare a flag: `kind` is text, list (repeatable), int, float, size, switch or json; the bounds are inclusive.

    A size is a number of bytes, or a number with a unit such as 512MB or 2GiB. JSON is the text of an object; in the
    YAML file it may also be a mapping. A secret is not shown where the configuration is.
    """
    settings = {"text": text, "kind": kind, "low": low, "high": high, "choices": choices, "positional": positional}
    return field(default=default, metadata=settings, repr=not secret)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlags:
    """The flags of every command that runs a model."""

    config: str | None = flag(None, "YAML file with values for these flags")
    model: str | None = flag(None, "folder or hub id of the checkpoint (none: the bundled demo model)", positional=True)
    dtype: str = flag("auto", "number format of the weights", choices=("auto", "bfloat16", "float32"))
    device: str = flag("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    quantization: str = flag("none", "int8 packs the large weights to 8 bits at load", choices=("none", "int8"))
    kv_cache_dtype: str = flag(
        "auto", "fp8 keeps twice as many tokens in the KV cache, on a GPU", choices=("auto", "fp8")
    )
    load_format: str = flag("auto", "dummy gives random weights of the config's shapes", choices=("auto", "dummy"))
    seed: int | None = flag(
        None, "makes requests that bring no seed repeatable; also dummy weights", "int", low=0, high=2**63 - 1
    )
    max_model_len: int | None = flag(None, "most tokens of prompt and answer (none: the model's context)", "int", low=2)
    max_num_seqs: int | None = flag(
        None, "most sequences in one step (none: 64 on the CPU, 256 on a GPU)", "int", low=1, high=4096
    )
    max_num_batched_tokens: int = flag(2048, "most tokens in one step", "int", low=1, high=2**20)
    max_num_prefill_tokens: int | None = flag(
        None, "most prompt tokens in a step in which up to 8 others decode (none: by device)", "int", low=1, high=2**20
    )
    max_num_queued_reqs: int = flag(1024, "most requests that wait; more are refused with 429", "int", low=1)
    scheduling_policy: str = flag("fcfs", "whose turn it is; priority: lower first", choices=("fcfs", "priority"))
    enable_prefix_caching: bool = flag(True, "compute what prompts have in common only once", "switch")
    speculative_config: str | None = flag(
        None, 'guess repeated text and check several tokens at once, as in {"method": "ngram"}', "json"
    )
    block_size: int = flag(16, "tokens in one block of the KV cache", "int", low=1, high=1024)
    kv_cache_memory_bytes: int | None = flag(
        None, "size of the KV cache, such as 2GiB (none: by what is free)", "size", low=1, high=2**60
    )
    gpu_memory_utilization: float = flag(
        0.92, "share of a GPU's memory to fill, where the KV cache is given no size", "float", low=0.01, high=1
    )
    num_kv_blocks: int | None = flag(None, "number of blocks in the KV cache, instead of a size", "int", low=1)
    enforce_eager: bool = flag(False, "record no steps as CUDA graphs", "switch")
    deterministic: bool = flag(
        False, "an answer's last bits never depend on who else is served; refused where that cannot be", "switch"
    )
    chat_template: str | None = flag(None, "file with a Jinja chat template, instead of the checkpoint's own")
    generation_config: str = flag(
        "auto", "where generation_config.json with the sampling defaults is: auto (the checkpoint), a folder, or none"
    )
    override_generation_config: str | None = flag(
        None, 'sampling defaults that win over that file, such as {"temperature": 0.5}; null takes one away', "json"
    )
    log_level: str = flag("info", "least severe messages shown", choices=("debug", "info", "warning", "error"))

    def engine_config(self, path: Path) -> EngineConfig:
        """The engine's part of these flags, for the checkpoint at `path`."""
        import msgspec

        from ..engine.config import EngineConfig, SpeculativeConfig

        shared = set(EngineConfig.__struct_fields__) & {f.name for f in dataclasses.fields(self)} - {"model"}
        values = {name: getattr(self, name) for name in shared}
        if self.speculative_config is not None:
            try:
                values["speculative_config"] = msgspec.json.decode(self.speculative_config, type=SpeculativeConfig)
            except msgspec.ValidationError as error:
                raise ConfigError(f"--speculative-config cannot be used: {error}.") from None
        return EngineConfig(model=str(path), **values)

    def model_arguments(self) -> list[str]:
        """These flags as words of a command line, as far as they differ from the defaults."""
        words: list[str] = []
        for f in dataclasses.fields(ModelFlags):
            value = getattr(self, f.name)
            if f.name in ("config", "log_level") or value == f.default:
                continue
            if f.metadata["kind"] == "switch":
                words.append(_option(f.name if value else f"no_{f.name}"))
            else:
                words += [_option(f.name), str(value)]
        return words


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(ModelFlags):
    """The flags of `pyllm serve`."""

    served_model_name: tuple[str, ...] = flag((), "name of the model in the API; repeat it for aliases", "list")
    host: str = flag("127.0.0.1", "address to listen on")
    port: int = flag(8000, "port to listen on; 0 picks a free one", "int", low=0, high=65535)
    uds: str | None = flag(None, "Unix socket to listen on, instead of host and port")
    api_key: tuple[str, ...] = flag((), "key that clients must send; repeat it for several", "list", secret=True)
    isolate_cache_by_key: bool = flag(False, "share computed prompts only among requests of one key", "switch")
    allowed_origins: tuple[str, ...] = flag((), "origin whose web pages may call the API (CORS); * is all", "list")
    root_path: str = flag("", "path under which a proxy offers this server")
    ssl_keyfile: str | None = flag(None, "PEM file with the key to serve HTTPS; needs --ssl-certfile")
    ssl_certfile: str | None = flag(None, "PEM file with the certificate (chain) of that key")
    max_logprobs: int = flag(
        MAX_LOGPROBS, "most likely tokens that a request may ask for at a position", "int", low=0, high=MAX_LOGPROBS
    )
    tool_call_parser: str = flag("auto", "format of the tool calls in the model's text; auto: by the checkpoint")
    metrics_vllm_names: bool = flag(
        False, "/metrics also has vLLM's metrics under vLLM's names, for its dashboards", "switch"
    )
    log_format: str = flag("text", "json writes one object per line", choices=("text", "json"))
    sse_keep_alive_interval: float = flag(
        15.0, "seconds between comments that keep a stream open; 0: none", "float", low=0, high=3600
    )
    otlp_traces_endpoint: str | None = flag(
        None, "URL to send OpenTelemetry traces to, such as http://localhost:4318/v1/traces"
    )
    max_connections: int = flag(
        4096, "most open connections; a new one takes the place of one at rest, else 503", "int", low=1, high=2**20
    )
    header_timeout: float = flag(15.0, "seconds in which a request's headers must arrive", "float", low=0.1, high=86400)
    body_timeout: float = flag(
        30.0, "seconds after which a request is closed whose body does not come on", "float", low=0.1, high=86400
    )
    write_timeout: float = flag(
        30.0, "seconds after which an answer is stopped of which the client takes nothing", "float", low=0.1, high=86400
    )
    engine_hang_timeout: float = flag(
        30.0, "seconds without any progress after which the engine counts as dead", "float", low=1, high=86400
    )
    restart_engine: int = flag(
        0, "how often in a row a dead engine is started again before the server ends", "int", low=0, high=1000
    )
    shutdown_timeout: float = flag(
        30.0, "seconds that running requests get to finish on SIGTERM", "float", low=0, high=86400
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TerminalConfig(ModelFlags):
    """The flags of `pyllm chat`."""

    log_level: str = flag("warning", "least severe messages shown", choices=("debug", "info", "warning", "error"))
    max_tokens: int | None = flag(None, "most tokens of one answer (none: what fits)", "int", low=1, high=2**31 - 1)
    temperature: float | None = flag(None, "0 is greedy (none: the checkpoint's, else 1)", "float", low=0, high=2)
    top_k: int | None = flag(None, "sample among the k most likely tokens; 0: all", "int", low=-1, high=2**31 - 1)
    top_p: float | None = flag(None, "sample among the tokens that make up this probability", "float", low=1e-6, high=1)
    repetition_penalty: float | None = flag(
        None, "above 1 makes tokens already seen less likely", "float", low=0.01, high=100
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig(TerminalConfig):
    """The flags of `pyllm generate`."""

    model: str | None = flag(None, "folder or hub id of the checkpoint (none: the bundled demo model)")
    prompt: str = flag("", "text to continue", positional=True)
    chat: bool = flag(False, "put the prompt through the chat template, as a user's message", "switch")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig(ModelFlags):
    """The flags of `pyllm bench`."""

    log_level: str = flag("warning", "least severe messages shown", choices=("debug", "info", "warning", "error"))
    base_url: str | None = flag(None, "running server to measure (none: one is started with the flags of the model)")
    api_key: str | None = flag(None, "key that this server wants")
    concurrency: str = flag("1,8,32", "numbers of clients at a time, one measurement each")
    num_requests: int | None = flag(
        None, "requests per measurement (none: two per client, at least 4)", "int", low=1, high=10**6
    )
    input_len: int = flag(128, "tokens of a prompt", "int", low=1, high=10**6)
    output_len: int = flag(128, "tokens of an answer", "int", low=1, high=10**6)
    vocab_size: int = flag(1000, "ids of the random prompts are 100 or more and below this", "int", low=101, high=10**7)
    json: bool = flag(False, "print one line of JSON instead of a table", "switch")


Config = TypeVar("Config", bound=ModelFlags)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message[:1].upper() + message[1:].rstrip(".") + ".")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else "."


def _parser(cls: type[Config], program: str, description: str) -> _Parser:
    parser = _Parser(prog=program, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(cls):
        kind, choices = f.metadata["kind"], f.metadata["choices"]
        text = f.metadata["text"] + (f" (default {f.default})" if f.default not in (None, (), "", False) else "")
        text = text.replace("%", "%%")
        if f.metadata["positional"]:
            parser.add_argument(f"_{f.name}", nargs="?", metavar=f.name.upper(), help=text)
            if f.name != "model":
                continue
            text = "the same as MODEL"
        if kind == "switch":
            parser.add_argument(_option(f.name), action=argparse.BooleanOptionalAction, help=text)
        else:
            metavar = {"int": "N", "float": "X", "size": "SIZE", "json": "JSON"}.get(kind, "TEXT")
            metavar = "{" + ",".join(choices) + "}" if choices else metavar
            action = "append" if kind == "list" else "store"
            parser.add_argument(_option(f.name), action=action, metavar=metavar, help=text)
    return parser


def _bytes(text: str) -> int:
    """The bytes of a size; raise `ValueError` for what is none."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ValueError(text)
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " ")) if found[2] else int(found[1])


def _json_object(raw: Any, source: str) -> str:
    """The text of a JSON object, from that text or from a mapping."""
    try:
        value = json.loads(raw) if isinstance(raw, str) else raw
        if not isinstance(value, dict):
            raise TypeError
        return json.dumps(value)
    except (ValueError, TypeError, RecursionError):
        raise ConfigError(f'{source} must be a JSON object such as {{"temperature": 0.5}}, got {raw!r:.200}.') from None


def _convert(f: dataclasses.Field[Any], raw: Any, source: str) -> Any:
    """Make a value of the flag's kind from a string or a YAML value; `source` names it in the error."""
    kind, low, high, choices = (f.metadata[key] for key in ("kind", "low", "high", "choices"))
    if raw is None and f.default is None:
        return None
    if kind == "list":
        items = [part.strip() for part in raw.split(",")] if isinstance(raw, str) else raw
        if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
            raise ConfigError(f"{source} must be one or more texts, none empty.")
        return tuple(items)
    if kind == "switch":
        word = str(raw).lower()
        if word in ("1", "true", "yes", "on", "0", "false", "no", "off"):
            return word in ("1", "true", "yes", "on")
        raise ConfigError(f"{source} must be true or false, got {raw!r:.200}.")
    if kind in ("int", "float", "size"):
        try:
            number = float(str(raw)) if kind == "float" else _bytes(str(raw)) if kind == "size" else int(str(raw))
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            what = {"int": "a whole number", "size": "a number of bytes, or one such as 2GiB,"}.get(kind, "a number")
            raise ConfigError(f"{source} must be {what} {bounds}, got {raw!r:.200}.")
        return number
    if kind == "json":
        return _json_object(raw, source)
    value = str(raw) if isinstance(raw, (str, int, float)) else ""
    if choices and value not in choices:
        raise ConfigError(f"{source} must be one of {', '.join(choices)}, got {value!r:.200}{_nearest(value, choices)}")
    if not value and f.default:
        raise ConfigError(f"{source} must be a text, not empty.")
    return value


def _read_yaml(path: str, known: Sequence[str]) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except yaml.YAMLError as error:
        # Without the line itself, which may hold a key.
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "it cannot be read"
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"--config {path} is not valid YAML: {problem}{where}.") from None
    if not isinstance(content, (dict, type(None))):
        raise ConfigError(f"--config {path} must hold lines of the form `flag: value`.")
    values = {str(key).replace("-", "_"): value for key, value in (content or {}).items()}
    for name in values:
        if name not in known or name == "config":
            raise ConfigError(f"{path} has an unknown flag {name!r:.200}{_nearest(name, known)}")
    return values


def load_config(
    cls: type[Config], arguments: Sequence[str], environment: Mapping[str, str], *, program: str, description: str
) -> Config:
    """Make a configuration of class `cls`; raise `ConfigError` for anything unknown or out of range."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given, unknown = _parser(cls, program, description).parse_known_args(arguments)
    for word in unknown:
        name = word.split("=")[0]
        if name.startswith("-"):
            raise ConfigError(f"Unknown flag {name[:200]}{_nearest(name, [_option(known) for known in fields])}")
        if any(argument.partition("=")[0] == "--api-key" for argument in arguments):
            raise ConfigError("There is an argument that belongs to no flag; repeat --api-key before each key.")
        raise ConfigError(f"Unexpected argument {word[:200]!r}.")
    found = vars(given)
    if found.keys() >= {"_model", "model"} and found["_model"] != found["model"]:
        raise ConfigError("The model is named twice, as MODEL and by --model.")
    variables = {name: ENVIRONMENT_PREFIX + name.upper() for name in fields}
    # An empty variable is as none; but a key that was not found where it was meant to be must not open the server.
    raw: dict[str, tuple[Any, str]] = {
        name: (environment[variable], variable)
        for name, variable in variables.items()
        if environment.get(variable) or (variable in environment and not fields[name].repr)
    }
    raw |= {name.lstrip("_"): (value, _option(name.lstrip("_"))) for name, value in found.items()}
    if "config" in raw:
        path = raw["config"][0]
        raw = {name: (value, f"{name} in {path}") for name, value in _read_yaml(path, list(fields)).items()} | raw
    return cls(**{name: _convert(fields[name], value, source) for name, (value, source) in raw.items()})
