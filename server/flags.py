"""Declares the flags of the server and of each command, next to the engine's of `engine/config.py`.

`arguments.py` reads their values. Nothing heavy is imported, so `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..engine.config import MAX_LOGPROBS, Bytes, EngineConfig, EngineSettings, KVEventsConfig, setting, settings_of

DEMO_FOLDER = Path(__file__).parent.parent / "model" / "demo"
DEMO_NAME = "pyllm-demo"
ENVIRONMENT_PREFIX = "PYLLM_"
DAY = 86400.0  # seconds
OTHER_VARIABLES = ("PYLLM_CPU_ISA", "PYLLM_NATIVE")  # see model/cpu/library.py


class ConfigError(ValueError):
    """A flag, variable or line of the YAML file that cannot be used; the message is one sentence to show the user."""


def option(name: str) -> str:
    """Return a flag as it is written on the command line."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlags(EngineSettings):
    """The flags of every command that runs a model."""

    config: str | None = setting(None, "YAML file with values for these flags", guard=True)
    model: str | None = setting(None, "folder or hub id of the checkpoint (default: the bundled demo model)")
    revision: str | None = setting(None, "branch, tag or commit of a hub id (default: its main branch)")
    chat_template: str | None = setting(None, "file with a Jinja chat template to use instead of the checkpoint's")
    override_generation_config: dict[str, Any] | None = setting(  # noqa: RUF009 - it is a field
        None,
        'sampling defaults that override those of --generation-config, such as {"temperature": 0.5}; null removes one',
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "minimum severity to log")

    def engine_config(self, path: Path) -> EngineConfig:
        """The engine's settings, for the checkpoint at `path`."""
        return EngineConfig(model=str(path), **{name: getattr(self, name) for name in settings_of(EngineSettings)})

    def model_arguments(self) -> list[str]:
        """The flags that differ from the defaults, as words of a command line."""
        words: list[str] = []
        for name, own in settings_of(ModelFlags).items():
            value = getattr(self, name)
            if name in ("config", "log_level") or value == own.default:
                continue
            if own.kind == "switch":
                words.append(option(name if value else f"no_{name}"))
            elif own.kind == "json":
                words += [option(name), json.dumps(value if isinstance(value, dict) else dataclasses.asdict(value))]
            else:
                words += [option(name), str(value)]
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
        None, "file with one key per line, optionally with a name and limits; read again when it changes", guard=True
    )
    isolate_cache_by_key: bool = setting(
        False, "share the prefix cache only among requests with the same API key", guard=True
    )
    fair_scheduling: bool | None = setting(
        None,
        "let clients (by API key, or by address if there are no keys) take turns, so that one client's many requests "
        "do not delay another's (default: on with several keys)",
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
        False,
        "accept unknown request fields, and list them in the x-pyllm-ignored header, instead of refusing the request",
    )
    tool_call_parser: str = setting(
        "auto", "format of tool calls in the model's text; auto chooses from the checkpoint"
    )
    reasoning_parser: str = setting(
        "auto", "marks of the model's reasoning: tokens, tags or none; auto chooses from the checkpoint"
    )
    metrics_vllm_names: bool = setting(False, "export metrics under vLLM's names too, for its dashboards and routers")
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
    kv_events_config: KVEventsConfig | None = setting(  # noqa: RUF009 - it is a field
        None,
        "publish which blocks the KV cache stores and evicts, for routers, as in "
        '{"enable_kv_cache_events": true, "endpoint": "tcp://*:5557"}; the events hold the tokens of every prompt',
    )
    batch_dir: str | None = setting(None, "folder for files and batches, which are off without one")
    batch_dir_size: Bytes = setting(  # noqa: RUF009 - it is a field
        10 * 10**9, "maximum size of --batch-dir", low=10**6
    )
    batch_concurrency: int | None = setting(
        None, "lines of batches running at a time (default: a quarter of --max-num-seqs)", low=1, high=4096
    )
    response_store: str = setting(
        "memory",
        "where to keep the responses of /v1/responses: memory, or for several servers sqlite:///path/to/file or "
        "redis://host:port/number (rediss:// with TLS)",
        secret=True,
    )
    response_store_size: Bytes | None = setting(  # noqa: RUF009 - it is a field
        None, "maximum size of kept responses (default: 64MiB in memory, else 1GB)", low=2**20
    )
    response_ttl: int = setting(
        30 * 86400, "seconds until a kept response is deleted; 0 keeps it until its space is needed", low=0, high=10**9
    )
    restart_engine: int = setting(
        0, "how many times in a row to restart a dead engine before exiting", low=0, high=1000
    )
    shutdown_timeout: float = setting(30.0, "seconds for running requests to finish on SIGTERM", low=0, high=DAY)
    replicas: int | None = setting(
        None, "number of servers behind one address, run by Ray Serve, each with its own GPU or cores", low=1, high=1024
    )
    max_replicas: int | None = setting(
        None, "number of replicas up to which busy ones are joined by more", low=1, high=1024
    )
    ray_address: str | None = setting(None, "Ray cluster to run the replicas on (default: a Ray on this machine)")

    def __post_init__(self) -> None:
        events = self.kv_events_config
        if events is not None and events.enabled and not self.enable_prefix_caching:
            raise ValueError("--kv-events-config needs the prefix cache: leave out --no-enable-prefix-caching.")

    def engine_config(self, path: Path) -> EngineConfig:
        """The engine's settings, for the checkpoint at `path`."""
        return dataclasses.replace(ModelFlags.engine_config(self, path), kv_events_config=self.kv_events_config)


@dataclass(frozen=True, slots=True, kw_only=True)
class TerminalConfig(ModelFlags):
    """The flags of `pyllm chat`, and of `pyllm generate`."""

    log_level: Literal["debug", "info", "warning", "error"] = setting("warning", "minimum severity to log")
    base_url: str | None = setting(
        None, "running server that answers, such as http://127.0.0.1:8000; --model is then a name that it lists"
    )
    api_key: str | None = setting(None, "API key of that server")
    system: str | None = setting(None, "system prompt of the chat")
    stop: tuple[str, ...] = setting((), "text that ends an answer; repeat it for several", blank=True)
    json_schema: str | None = setting(None, "JSON schema that answers must follow, or a file with one")
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

    prompt: str = setting("", "text to continue; - or none reads it from standard input")
    chat: bool = setting(False, "send the prompt through the chat template, as a user's message; --system does too")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunBatchConfig(ModelFlags):
    """The flags of `pyllm run-batch`."""

    log_level: Literal["debug", "info", "warning", "error"] = setting("warning", "minimum severity to log")
    input_file: str = setting("", "file with one request per line, in OpenAI's batch format; - is standard input (-i)")
    output_file: str = setting("", "file for one answer per line; - is standard output (-o)")
    served_model_name: tuple[str, ...] = setting((), "name of the model in the requests; repeat it for aliases")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckConfig(ModelFlags):
    """The flags of `pyllm check`."""

    log_level: Literal["debug", "info", "warning", "error"] = setting("warning", "minimum severity to log")
    skip_self_test: bool = setting(False, "only describe the checkpoint, without reading its weights")
    json: bool = setting(False, "print one JSON object")


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
    vocab_size: int | None = setting(
        None,
        "size of the vocabulary: prompts are random ids from 100 to N - 1 (default: the model's)",
        low=101,
        high=10**7,
    )
    json: bool = setting(False, "print one line of JSON instead of a table")
