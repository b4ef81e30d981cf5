"""Every flag of the command line; those of the engine are declared in `engine/config.py`.

A value comes from the arguments, else from the environment (`PYLLM_` and the flag's name), else from the YAML file
named by `--config`, else from the default. Nothing heavy is imported, so `--help` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import select
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from ..engine.config import MAX_LOGPROBS, Bytes, EngineConfig, EngineSettings, nearest, setting, settings_of

DEMO_FOLDER = Path(__file__).parent.parent / "model" / "demo"
DEMO_NAME = "pyllm-demo"
ENVIRONMENT_PREFIX = "PYLLM_"
DAY = 86400.0  # seconds
MAX_YAML_BYTES, MAX_YAML_VALUES = 2**16, 10_000
PIPE_SECONDS = 5.0
# What Kubernetes sets for a Service whose name begins with `pyllm`, and Docker for a linked container. Its PYLLM_PORT
# is an address, which tells it from the flag's.
SERVICE_NAME = re.compile(r"PYLLM_(.*_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://.+")
OTHER_VARIABLES = ("PYLLM_NATIVE",)  # see model/cpu/backend.py


class ConfigError(ValueError):
    """A flag, variable or line of the YAML file that cannot be used; the message is one sentence to show the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlags(EngineSettings):
    """The flags of every command that runs a model."""

    config: str | None = setting(None, "YAML file with values for these flags", guard=True)
    model: str | None = setting(None, "folder or hub id of the checkpoint (default: the bundled demo model)")
    revision: str | None = setting(None, "branch, tag or commit of a hub id (default: its main branch)")
    chat_template: str | None = setting(None, "file with a Jinja chat template to use instead of the checkpoint's")
    override_generation_config: dict[str, Any] | None = setting(  # noqa: RUF009 - it is a field
        None, 'sampling defaults that override that file, such as {"temperature": 0.5}; null removes one'
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "minimum severity to log")

    def engine_config(self, path: Path) -> EngineConfig:
        """The engine's settings, for the checkpoint at `path`."""
        return EngineConfig(model=str(path), **{name: getattr(self, name) for name in settings_of(EngineSettings)})

    def model_arguments(self) -> list[str]:
        """These flags as words of a command line, as far as they differ from the defaults."""
        words: list[str] = []
        for name, own in settings_of(ModelFlags).items():
            value = getattr(self, name)
            if name in ("config", "log_level") or value == own.default:
                continue
            if own.kind == "switch":
                words.append(_option(name if value else f"no_{name}"))
            elif own.kind == "json":
                words += [_option(name), json.dumps(value if isinstance(value, dict) else dataclasses.asdict(value))]
            else:
                words += [_option(name), str(value)]
        return words


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(ModelFlags):
    """The flags of `pyllm serve`."""

    served_model_name: tuple[str, ...] = setting(
        (), "name of the model in the API, or a pattern such as gpt-*; repeat it for several"
    )
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on; 0 picks a free one", low=0, high=65535)
    uds: str | None = setting(None, "Unix socket to listen on, instead of host and port", guard=True)
    api_key: tuple[str, ...] = setting((), "key that clients must send; repeat it for several", secret=True)
    api_key_file: str | None = setting(
        None, "file with a key in each line, perhaps a name and limits; read again when it changes", guard=True
    )
    isolate_cache_by_key: bool = setting(
        False, "share the prefix cache only among requests with the same API key", guard=True
    )
    fair_scheduling: bool | None = setting(
        None,
        "let clients take turns, by key or without keys by address, so that many requests of one do not delay "
        "another's (default: on with several keys)",
    )
    allowed_origins: tuple[str, ...] = setting(
        (), "origin whose web pages may call the API (CORS); * allows all", guard=True
    )
    root_path: str = setting("", "path under which a proxy serves this server")
    ssl_keyfile: str | None = setting(
        None, "PEM file with the private key to serve HTTPS; needs --ssl-certfile", guard=True
    )
    ssl_certfile: str | None = setting(None, "PEM file with the certificate (chain) of that key", guard=True)
    max_logprobs: int = setting(
        MAX_LOGPROBS, "maximum logprobs per token that a request may ask for", low=0, high=MAX_LOGPROBS
    )
    ignore_unknown_fields: bool = setting(
        False, "accept request fields that nothing here knows, and name them in x-pyllm-ignored, instead of refusing"
    )
    tool_call_parser: str = setting("auto", "format of tool calls in the model's text; auto goes by the checkpoint")
    metrics_vllm_names: bool = setting(False, "export metrics under vLLM's names too, for its dashboards")
    log_format: Literal["text", "json"] = setting("text", "json writes one object per line")
    sse_keep_alive_interval: float = setting(
        15.0, "seconds between comments that keep a silent stream open; 0 sends none", low=0, high=3600
    )
    otlp_traces_endpoint: str | None = setting(
        None, "URL to send OpenTelemetry traces to, such as http://localhost:4318/v1/traces"
    )
    max_connections: int = setting(
        4096, "maximum open connections; further ones replace idle ones or get a 503", low=1, high=2**20
    )
    header_timeout: float = setting(15.0, "seconds within which a request's headers must arrive", low=0.1, high=DAY)
    body_timeout: float = setting(30.0, "seconds within which more of a request's body must arrive", low=0.1, high=DAY)
    write_timeout: float = setting(
        30.0, "seconds within which a client must read more of its response, or its generation stops", low=0.1, high=DAY
    )
    max_api_memory: Bytes | None = setting(  # noqa: RUF009 - it is a field
        None, "bytes the API process may hold for clients (default: a quarter of the memory, at most 2GiB)", low=2**24
    )
    batch_dir: str | None = setting(None, "folder for files and batches, which are off without one")
    batch_dir_size: Bytes = setting(  # noqa: RUF009 - it is a field
        10 * 10**9, "maximum bytes of that folder", low=10**6
    )
    batch_concurrency: int | None = setting(
        None, "lines of batches that run at a time (default: a quarter of --max-num-seqs)", low=1, high=4096
    )
    restart_engine: int = setting(0, "times in a row to restart a dead engine before exiting", low=0, high=1000)
    shutdown_timeout: float = setting(30.0, "seconds that running requests get to finish on SIGTERM", low=0, high=DAY)


@dataclass(frozen=True, slots=True, kw_only=True)
class TerminalConfig(ModelFlags):
    """The flags of `pyllm chat`."""

    log_level: Literal["debug", "info", "warning", "error"] = setting("warning", "minimum severity to log")
    max_tokens: int | None = setting(None, "maximum tokens of one answer (default: what fits)", low=1, high=2**31 - 1)
    temperature: float | None = setting(None, "0 is greedy (default: the checkpoint's, else 1)", low=0, high=2)
    top_k: int | None = setting(None, "sample among the k most likely tokens; 0 means all", low=-1, high=2**31 - 1)
    top_p: float | None = setting(
        None, "sample among the most likely tokens whose probabilities add up to this", low=1e-6, high=1
    )
    repetition_penalty: float | None = setting(
        None, "above 1 makes tokens that occurred before less likely", low=0.01, high=100
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig(TerminalConfig):
    """The flags of `pyllm generate`."""

    prompt: str = setting("", "text to continue")
    chat: bool = setting(False, "put the prompt through the chat template, as a user message")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunBatchConfig(ModelFlags):
    """The flags of `pyllm run-batch`."""

    log_level: Literal["debug", "info", "warning", "error"] = setting("warning", "minimum severity to log")
    input_file: str = setting("", "file with one request a line, in OpenAI's batch format; - is standard input (-i)")
    output_file: str = setting("", "file for one answer a line; - is standard output (-o)")
    served_model_name: tuple[str, ...] = setting((), "name of the model in the requests; repeat it for aliases")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig(ModelFlags):
    """The flags of `pyllm bench`."""

    log_level: Literal["debug", "info", "warning", "error"] = setting("warning", "minimum severity to log")
    base_url: str | None = setting(None, "running server to measure (default: start one with the flags of the model)")
    api_key: str | None = setting(None, "API key of that server")
    concurrency: str = setting("1,8,32", "numbers of concurrent clients, one measurement each")
    num_requests: int | None = setting(None, "requests per run (default: 2 per client, at least 4)", low=1, high=10**6)
    input_len: int = setting(128, "tokens per prompt", low=1, high=10**6)
    output_len: int = setting(128, "tokens per answer", low=1, high=10**6)
    vocab_size: int = setting(1000, "prompts are random token ids from 100 to N - 1", low=101, high=10**7)
    json: bool = setting(False, "print one line of JSON instead of a table")


Config = TypeVar("Config", bound=ModelFlags)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message[:1].upper() + message[1:].rstrip(".") + ".")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _with_dashes(arguments: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return the words of a command line with each known flag in dashes, since vLLM takes `--max_tokens` too."""
    options, words = {_option(prefix + name) for name in known for prefix in ("", "no_")}, list(arguments)
    for n, word in enumerate(words):
        if word == "--":  # what follows are no flags
            break
        name, equals, value = word.partition("=")
        if (dashed := name.replace("_", "-")) in options:
            words[n] = dashed + equals + value
    return words


def _parser(cls: type[Config], program: str, description: str) -> _Parser:
    parser = _Parser(prog=program, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    engine = parser.add_argument_group("engine")
    positional = "prompt" if "prompt" in settings_of(cls) else "model"
    for name, own in settings_of(cls).items():
        group = engine if name in settings_of(EngineSettings) else parser
        default = "on" if own.default is True else f"{own.default:g}" if isinstance(own.default, float) else own.default
        text = own.text + (f" (default: {default})" if own.default not in (None, (), "", False) else "")
        text = text.replace("%", "%%")
        if name == positional:
            parser.add_argument(f"_{name}", nargs="?", metavar=name.upper(), help=text)
            if name == "prompt":
                continue
            text = "the same as MODEL"
        if own.kind == "switch":
            group.add_argument(_option(name), action=argparse.BooleanOptionalAction, help=text)
        else:
            metavar = {"int": "N", "float": "X", "size": "SIZE", "json": "JSON"}.get(own.kind, "TEXT")
            metavar = "{" + ",".join(own.choices) + "}" if own.choices else metavar
            action = "append" if own.kind == "list" else "store"
            group.add_argument(_option(name), action=action, metavar=metavar, help=text)
    return parser


def _read_yaml(path: str, known: Sequence[str]) -> dict[str, Any]:
    import yaml

    try:
        text = _read(path).decode("utf-8-sig")
        node: Any = yaml.compose(text, yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except yaml.YAMLError as error:
        # Without the line itself, which may hold a key.
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "it cannot be read"
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"--config {path} is not valid YAML: {problem}{where}.") from None
    except RecursionError:
        raise ConfigError(f"--config {path} is not valid YAML: it is nested too deeply.") from None
    except Exception:  # the library's conversions of dates, numbers and tags raise many types
        reason = "a value is no valid date or number, or does not fit its tag: put it in quotes"
        raise ConfigError(f"--config {path} is not valid YAML: {reason}.") from None
    if len(text) > MAX_YAML_BYTES or not _is_small(content):
        raise ConfigError(f"--config {path} is too large for a file of flags.")
    if not text.strip():
        raise ConfigError(f"--config {path} is empty.")
    if not isinstance(content, (dict, type(None))):
        raise ConfigError(f"--config {path} must hold lines of the form `flag: value`.")
    names = [str(key.value).replace("-", "_") for key, _ in (node.value if content else ())]
    for name in names:
        if name not in known or name == "config":
            hint = nearest(name, [flag for flag in known if flag != "config"])
            raise ConfigError(f"{path} has an unknown flag {name!r:.200}{hint}")
        if names.count(name) > 1:
            raise ConfigError(f"{path} has the flag {name} twice.")
    return {str(key).replace("-", "_"): value for key, value in (content or {}).items()}


def _read(path: str) -> bytes:
    """Read a file, or a pipe such as a shell's `<(command)`, but not for longer than that may take."""
    data, deadline = b"", time.monotonic() + PIPE_SECONDS
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
        poll = select.poll()
        poll.register(file, select.POLLIN)
        while len(data) <= MAX_YAML_BYTES:
            if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
                raise OSError(f"nothing was written to it for {PIPE_SECONDS:g} s")
            if not (more := file.read(MAX_YAML_BYTES)):
                break
            data += more
    return data


def _is_small(content: Any) -> bool:
    """Return whether a file's values stay few when its aliases, which may refer to each other, are written out."""
    values = [content]
    for count, value in enumerate(values):
        if count > MAX_YAML_VALUES:
            return False
        if isinstance(value, (dict, list, tuple, set)):
            values += [*value, *value.values()] if isinstance(value, dict) else value
    return True


def unknown_variables(
    environment: Mapping[str, str], own: type[ModelFlags], others: Iterable[type[ModelFlags]]
) -> list[str]:
    """Return a sentence for each variable that is named like a flag, but is one of neither this nor another command."""
    ours = [ENVIRONMENT_PREFIX + name.upper() for name in settings_of(own)]
    known = {ENVIRONMENT_PREFIX + name.upper() for cls in others for name in settings_of(cls)}.union(ours)
    return [
        f"The environment has {name:.200}, which is no variable of PyLLM and has no effect{nearest(name, ours)}"
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known and name not in OTHER_VARIABLES
        if not SERVICE_NAME.fullmatch(name) and not SERVICE_ADDRESS.fullmatch(value)
    ]


def load_config(
    cls: type[Config], arguments: Sequence[str], environment: Mapping[str, str], *, program: str, description: str
) -> Config:
    """Make a configuration of class `cls`; raise `ConfigError` for anything unknown or out of range."""
    known = settings_of(cls)
    given, unknown = _parser(cls, program, description).parse_known_args(_with_dashes(arguments, known))
    for word in unknown:
        name = word.split("=")[0].replace("_", "-")
        if name.startswith("-"):
            raise ConfigError(f"Unknown flag {name[:200]}{nearest(name, [_option(flag) for flag in known])}")
        if any(argument.partition("=")[0] == "--api-key" for argument in arguments):
            raise ConfigError("An argument belongs to no flag (hidden: it may be a key); repeat --api-key before each.")
        raise ConfigError(f"Unexpected argument {word[:200]!r}.")
    found = vars(given)
    if found.keys() >= {"_model", "model"} and found["_model"] != found["model"]:
        raise ConfigError("The model is named twice, as MODEL and by --model.")
    raw: dict[str, tuple[Any, str]] = {}
    for name, own in known.items():
        variable = ENVIRONMENT_PREFIX + name.upper()
        # An empty variable counts as absent, unless it was to protect the server.
        if SERVICE_ADDRESS.fullmatch(value := environment.get(variable, "")) and name == "port":
            continue
        if value or (variable in environment and own.guard):
            raw[name] = value, variable
    raw |= {name.lstrip("_"): (value, _option(name.lstrip("_"))) for name, value in found.items()}
    if "config" in raw:
        path = raw["config"][0]
        raw = {name: (value, f"{name} in {path}") for name, value in _read_yaml(path, list(known)).items()} | raw
    try:
        return cls(**{name: known[name].convert(value, source) for name, (value, source) in raw.items()})
    except ValueError as error:
        raise ConfigError(str(error)) from None
