"""Reads the values of a command's flags, and writes its help.

A value comes from the arguments, else from the environment (`PYLLM_` and the flag's name), else from the YAML file
named by `--config`, else from the default.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from ..engine.config import nearest, settings_of
from .flags import ENVIRONMENT_PREFIX, OTHER_VARIABLES, ConfigError, ModelFlags, ServerConfig, option

Config = TypeVar("Config", bound=ModelFlags)

MAX_YAML_BYTES, MAX_YAML_VALUES = 2**16, 10_000
PIPE_SECONDS = 5.0
# What Kubernetes sets for a Service whose name begins with `pyllm`, and Docker for a linked container. Its PYLLM_PORT
# is an address, which the flag's value never is.
SERVICE_NAME = re.compile(r"PYLLM_(.*_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
PASSWORD = re.compile("[^/]*://[^/]*:[^/]*@")  # in a URL
SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://.+")

EPILOG = (
    "A flag's value may also come from the variable in brackets, or from the flag's name in the YAML file of --config; "
    "arguments win over variables, and variables over the file."
)
GROUPS = {
    "model": "model revision config served_model_name device dtype quantization load_format max_model_len "
    "allow_long_max_model_len chat_template tool_call_parser reasoning_parser",
    "requests": "generation_config override_generation_config seed max_logprobs ignore_unknown_fields",
    "batching": "max_num_seqs max_num_batched_tokens max_num_prefill_tokens max_num_queued_reqs scheduling_policy "
    "fair_scheduling speculative_config deterministic enforce_eager engine_hang_timeout restart_engine",
    "KV cache": "kv_cache_memory_bytes gpu_memory_utilization num_kv_blocks kv_cache_dtype block_size "
    "enable_prefix_caching isolate_cache_by_key kv_events_config",
    "listening": "host port uds root_path ssl_keyfile ssl_certfile api_key api_key_file allowed_origins",
    "connections": "max_connections max_api_memory header_timeout body_timeout write_timeout sse_keep_alive_interval "
    "shutdown_timeout",
    "replicas": "replicas max_replicas ray_address",
    "stored responses": "response_store response_store_size response_ttl",
    "files and batches": "batch_dir batch_dir_size batch_concurrency",
    "logs and metrics": "log_level log_format metrics_vllm_names otlp_traces_endpoint",
}
"""The flags of `pyllm serve` as its help shows them; other commands show their own flags first."""

# What to do instead of flags of other servers and programs that people try.
FOREIGN = {
    "PyLLM computes on one device, so leave it out.":
        "tensor-parallel-size pipeline-parallel-size tp tp-size",
    "use --replicas.": "data-parallel-size dp dp-size num-replicas",
    "use --max-model-len.": "ctx-size context-length n-ctx max-length max-total-tokens",
    "use --host.": "bind listen hostname",
    "use --gpu-memory-utilization.": "mem-fraction-static cuda-memory-fraction",
    "use --num-kv-blocks.": "num-gpu-blocks-override",
    "use --log-level.": "uvicorn-log-level verbose",
    "use --max-tokens, or in a request max_tokens.": "n-predict max-new-tokens",
    "the whole model is on one device: use --device.": "n-gpu-layers",
    "set the variable OMP_NUM_THREADS.": "threads",
    "set the variable HF_HOME.": "download-dir",
    "set the variable HF_TOKEN.": "hf-token",
    "the tokenizer.json of the checkpoint is used, so leave it out.": "tokenizer",
    "no code of a checkpoint is ever run, so leave it out.": "trust-remote-code",
    "it is always on, so leave it out.":
        "enable-auto-tool-choice enable-chunked-prefill enable-prompt-tokens-details enable-tokenizer-info-endpoint",
    "one process serves all requests, so leave it out.": "workers",
    "requests' texts are never logged, so leave it out.": "disable-log-requests enable-log-requests enable-log-outputs",
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message[:1].upper() + message[1:].rstrip(".") + ".")


def _with_dashes(arguments: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return the words of a command line with each known flag in dashes, since vLLM takes `--max_tokens` too."""
    options, words = {option(prefix + name) for name in known for prefix in ("", "no_")}, list(arguments)
    for n, word in enumerate(words):
        if word == "--":  # no flags follow
            break
        name, equals, value = word.partition("=")
        if (dashed := name.replace("_", "-")) in options:
            words[n] = dashed + equals + value
    return words


def make_parser(cls: type[ModelFlags], parser: argparse.ArgumentParser) -> None:
    """Add the flags of `cls` to `parser`, in groups."""
    known = settings_of(cls)
    grouped = known if cls is ServerConfig else settings_of(ModelFlags)
    homes = {name: title for title, names in GROUPS.items() for name in names.split() if name in grouped}
    groups = {title: parser.add_argument_group(title) for title in GROUPS if title in homes.values()}
    positional = "prompt" if "prompt" in known else "model"
    order = {name: n for n, name in enumerate(homes)}
    for name in sorted(known, key=lambda name: order.get(name, -1)):
        own, group = known[name], groups[homes[name]] if name in homes else parser
        text = own.text + (f" (default: {default})" if (default := own.shown_default) else "")
        text = text.replace("%", "%%") + f" [{ENVIRONMENT_PREFIX}{name.upper()}]"
        if name == positional:
            group.add_argument(f"_{name}", nargs="?", metavar=name.upper(), help=text)
            if name == "prompt":
                continue
            text = "the same as MODEL"
        if own.kind == "switch":
            group.add_argument(option(name), action=argparse.BooleanOptionalAction, help=text)
        else:
            metavar = {"int": "N", "float": "X", "size": "SIZE", "json": "JSON"}.get(own.kind, "TEXT")
            metavar = "{" + ",".join(own.choices) + "}" if own.choices else metavar
            action = "append" if own.kind == "list" else "store"
            group.add_argument(option(name), action=action, metavar=metavar, help=text)


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
        reason = "a value is not a valid date or number, or does not fit its tag: put it in quotes"
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
    """Read a file, or a pipe such as a shell's `<(command)`, but for `PIPE_SECONDS` at most."""
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
    """Return a sentence for each variable that is named like a flag, but belongs to none of any command."""
    ours = [ENVIRONMENT_PREFIX + name.upper() for name in settings_of(own)]
    known = {ENVIRONMENT_PREFIX + name.upper() for cls in others for name in settings_of(cls)}.union(ours)
    return [
        f"PyLLM has no environment variable {name:.200}, so it has no effect{nearest(name, ours)}"
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known and name not in OTHER_VARIABLES
        if not SERVICE_NAME.fullmatch(name) and not SERVICE_ADDRESS.fullmatch(value)
    ]


def load_config(
    cls: type[Config], arguments: Sequence[str], environment: Mapping[str, str], *, program: str, description: str
) -> Config:
    """Make a configuration of class `cls`; raise `ConfigError` for anything unknown or out of range."""
    known = settings_of(cls)
    positional = "PROMPT" if "prompt" in known else "MODEL"
    parser = _Parser(
        prog=program, usage=f"{program} [{positional}] [OPTIONS]", description=description, epilog=EPILOG,
        allow_abbrev=False, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    make_parser(cls, parser)
    given, unknown = parser.parse_known_args(_with_dashes(arguments, known))
    for word in unknown:
        name = word.split("=")[0].replace("_", "-")
        for instead, names in FOREIGN.items():
            if name.startswith("--") and name[2:] in names.split():
                raise ConfigError(f"Unknown flag {name}: {instead}")
        if name.startswith("-"):
            raise ConfigError(f"Unknown flag {name[:200]}{nearest(name, [option(flag) for flag in known])}")
        if any(argument.partition("=")[0] == "--api-key" for argument in arguments):
            raise ConfigError("An argument belongs to no flag (hidden: it may be a key); repeat --api-key before each.")
        raise ConfigError(f"Unexpected argument {word[:200]!r}.")
    found = vars(given)
    if found.keys() >= {"_model", "model"} and found["_model"] != found["model"]:
        raise ConfigError("The model is named twice, as MODEL and by --model.")
    if PASSWORD.match(found.get("response_store", "")):
        message = "--response-store has a password, which every user of this machine could read: give the URL by the"
        raise ConfigError(f"{message} variable PYLLM_RESPONSE_STORE, or by --config and a file.")
    raw: dict[str, tuple[Any, str]] = {}
    for name, own in known.items():
        variable = ENVIRONMENT_PREFIX + name.upper()
        # An empty variable counts as unset, unless its flag protects the server.
        if SERVICE_ADDRESS.fullmatch(value := environment.get(variable, "")) and name == "port":
            continue
        if value or (variable in environment and own.guard):
            raw[name] = value, variable
    raw |= {name.lstrip("_"): (value, option(name.lstrip("_"))) for name, value in found.items()}
    if "config" in raw:
        path = raw["config"][0]
        raw = {name: (value, f"{name} in {path}") for name, value in _read_yaml(path, list(known)).items()} | raw
    try:
        return cls(**{name: known[name].convert(value, source) for name, (value, source) in raw.items()})
    except ValueError as error:
        raise ConfigError(str(error)) from None
