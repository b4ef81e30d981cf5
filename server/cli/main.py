"""The `pyllm` command."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import resource
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from platform import python_version

from ... import __version__
from ...engine.client.launch import EngineProcess
from ...engine.config import nearest
from ...engine.errors import START_FAILURES, reason_of
from ...model.cpu.library import describe
from ..arguments import load_config, unknown_variables
from ..flags import (
    BenchConfig,
    CheckConfig,
    ConfigError,
    GenerateConfig,
    ModelFlags,
    RunBatchConfig,
    ServerConfig,
    TerminalConfig,
)
from ..http.logs import configure_logging, dropped_notice
from ..lifetime import Lifetime

logger = logging.getLogger("pyllm.server")

# Modules that take long to import are loaded when a command needs them, so that --help and usage errors are fast.

# Each command's flags, the function that runs it, and its description.
COMMANDS: dict[str, tuple[type[ModelFlags], str, str]] = {
    "serve": (ServerConfig, "..serve:serve", "Serve a Complexity-Deep model with an OpenAI-compatible HTTP API."),
    "generate": (GenerateConfig, ".terminal:generate", "Continue a prompt."),
    "chat": (TerminalConfig, ".terminal:chat", "Chat with a model in the terminal."),
    "run-batch": (RunBatchConfig, ".run_batch:run_batch", "Answer the requests in a file, in OpenAI's batch format."),
    "check": (CheckConfig, ".check:check", "Show how a checkpoint is read, and test it on this machine."),
    "bench": (BenchConfig, ".bench:bench", "Measure the speed of a server, PyLLM or another."),
}
COMPLETION = "Print a script that completes commands and flags in bash, zsh or fish."
LOADING = """Load it where your shell starts:
  bash  eval "$(pyllm completion bash)"
  zsh   eval "$(pyllm completion zsh)"   after compinit
  fish  pyllm completion fish | source"""
FIRST = """PyLLM serves Complexity-Deep language models. Three things to do first:

  pyllm serve         start a server with the small demo model: a chat page and an OpenAI-compatible API
  pyllm chat          talk to the demo model here, in the terminal
  pyllm serve MODEL   serve your own: a folder with config.json, *.safetensors and tokenizer.json, or a hub id

`pyllm --help` lists all commands, `pyllm serve --help` all flags."""
SHORT = {"run-batch": {"-i": "--input-file", "-o": "--output-file"}}  # vLLM's
USAGE_ERROR = 2
MIN_FILES = 64  # open files that every command needs
MAX_MESSAGE = 4000  # characters of an error
MAX_PROMPT_BYTES = 32 << 20


def main(arguments: Sequence[str] | None = None, lifetime: Lifetime | None = None) -> None:
    """Run the command line and exit: 0 on success, 2 with one sentence on stderr if it cannot start."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    lifetime = lifetime or Lifetime.begin(words)
    try:
        try:
            code = _dispatch(words, lifetime)
        finally:
            sys.stdout.flush()
    except OSError as error:
        # The output's reader has closed it, as in `| head`, or the disk is full: nothing more can be written,
        # not even at exit.
        if not isinstance(error, BrokenPipeError):
            _fail(ConfigError(f"The output cannot be written: {error.strerror}."))
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _dispatch(words: list[str], lifetime: Lifetime) -> int:
    if words[:1] == ["--version"]:
        print(_version())
        return 0
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help() if words else FIRST)
        return 0 if words else USAGE_ERROR
    return _run(words[0], words[1:], lifetime)


def _version() -> str:
    return f"pyllm {__version__}\ntorch {version('torch')}, Python {python_version()}\nCPU kernels: {describe()}"


def _help() -> str:
    described = {name: description for name, (*_, description) in COMMANDS.items()} | {"completion": COMPLETION}
    commands = "\n".join(f"  {name:<12}{description}" for name, description in described.items())
    end = "`pyllm COMMAND --help` lists a command's options, `pyllm --version` prints the version."
    return f"usage: pyllm COMMAND [OPTIONS]\n\n{commands}\n\n{end}"


def _run(command: str, words: list[str], lifetime: Lifetime) -> int:
    try:
        if command == "completion":
            return _complete(words)
        if command not in COMMANDS:
            raise ConfigError(_unknown(command))
        cls, entry, description = COMMANDS[command]
        words = [SHORT.get(command, {}).get(word, word) for word in words]
        config = load_config(cls, words, os.environ, program=f"pyllm {command}", description=description)
        if isinstance(config, GenerateConfig) and config.prompt in ("", "-"):
            config = dataclasses.replace(config, prompt=_read_prompt(is_asked_for=config.prompt == "-"))
        if 0 <= (files := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < MIN_FILES:
            raise ConfigError(f"The system allows only {files} open files: raise the limit (ulimit -n) to {MIN_FILES}.")
        if isinstance(config, ServerConfig):
            _check(config)
    except ConfigError as error:
        return _fail(error)
    formatter = configure_logging(config.log_level, config.log_format if isinstance(config, ServerConfig) else "text")
    try:
        if isinstance(config, ServerConfig):
            from ...engine.host import use_one_heap

            use_one_heap()
            lifetime.take_output(functools.partial(dropped_notice, formatter))
        else:
            lifetime.hand_back()
        for sentence in unknown_variables(os.environ, cls, [other for other, *_ in COMMANDS.values()]):
            logger.warning(sentence)
        code = _start(entry, config, lifetime)
    except BrokenPipeError:
        raise
    except START_FAILURES as error:
        logger.debug("It failed here:", exc_info=True)
        code = _fail(ConfigError(f"PyLLM cannot run ({reason_of(error)}); --log-level debug shows where."))
    if isinstance(config, ServerConfig):
        lifetime.exit(code)
    return code


def _unknown(command: str) -> str:
    """Return the error for an unknown command, which may be a flag or a model that lacks the command before it."""
    known = [*COMMANDS, "completion"]
    text = f"Unknown command {command[:200]!r}: use one of {', '.join(known)}"
    if command.startswith("-") or "/" in command:
        return f"{text}, as in: pyllm serve {command[:200]}"
    return text + nearest(command, known)


def _complete(words: list[str]) -> int:
    from .completion import SHELLS, script

    if words[:1] and words[0] in ("-h", "--help"):
        print(f"usage: pyllm completion {{{','.join(SHELLS)}}}\n\n{COMPLETION}\n\n{LOADING}")
        return 0
    if len(words) != 1 or words[0] not in SHELLS:
        raise ConfigError(f"Name one shell: pyllm completion {', '.join(SHELLS[:-1])} or {SHELLS[-1]}.")
    print(script(words[0], {name: (cls, description) for name, (cls, _, description) in COMMANDS.items()}))
    return 0


def _read_prompt(*, is_asked_for: bool) -> str:
    """Return standard input without its last line break; a terminal is read only if the user asks for it."""
    needed = 'A prompt is needed, as in: pyllm generate "Once upon a time", or: pyllm generate < prompt.txt'
    if sys.stdin.isatty():
        if not is_asked_for:
            raise ConfigError(needed)
        print("Type the prompt; Ctrl-D on a line of its own ends it.", file=sys.stderr)
    data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise ConfigError(f"The prompt on standard input has more than {MAX_PROMPT_BYTES >> 20} MiB.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"The prompt on standard input is not UTF-8 text (byte {error.start}).") from None
    if not (text := text.removesuffix("\n").removesuffix("\r")):
        raise ConfigError(needed)
    return text


def _check(config: ServerConfig) -> None:
    """Raise `ConfigError` for a mistake that shows before the engine's process starts."""
    if config.ssl_keyfile is not None or config.ssl_certfile is not None:
        from ..listen import check_certificate

        check_certificate(config.ssl_keyfile, config.ssl_certfile)
    if config.replicas is not None or config.max_replicas is not None or config.ray_address is not None:
        from ..replicas.command import check_replicas

        check_replicas(config)
    if config.isolate_cache_by_key and not (config.api_key or config.api_key_file):
        raise ConfigError("--isolate-cache-by-key needs keys to distinguish clients: add --api-key or --api-key-file.")


def _start(entry: str, config: ModelFlags, lifetime: Lifetime) -> int:
    if isinstance(config, ServerConfig) and config.replicas is not None:
        return _call("..replicas.command:serve_replicas", config, None, lifetime)
    # The engine's libraries take a second to load, so its process starts now, while this one loads its own.
    process = None
    try:
        if not isinstance(config, (BenchConfig, CheckConfig)) and getattr(config, "base_url", None) is None:
            process = EngineProcess()
            lifetime.defer(process.kill)
        return _call(entry, config, process, lifetime)
    finally:
        if process is not None:
            process.kill()


def _call(entry: str, config: ModelFlags, process: EngineProcess | None, lifetime: Lifetime) -> int:
    """Run a command's function; if it fails, print why in one sentence."""
    from ...engine.errors import EngineDeadError, EngineStartError, RequestError
    from ...model.files import CheckpointError
    from ..chat.template import ChatTemplateError

    try:
        module, _, function = entry.partition(":")
        run = getattr(import_module(module, __package__), function)
        if isinstance(config, ServerConfig):
            return int(run(config, process, lifetime))
        return int(run(config) if isinstance(config, (BenchConfig, CheckConfig)) else run(config, process))
    except EngineDeadError as error:
        return _fail(error, 1)
    except (ConfigError, CheckpointError, ChatTemplateError, EngineStartError, RequestError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        return 130


def _fail(error: Exception, code: int = USAGE_ERROR) -> int:
    # One line, even if the names of files or tensors have several.
    line = "".join(character if character.isprintable() else " " for character in str(error)[:MAX_MESSAGE])
    print(f"pyllm: {line}", file=sys.stderr)
    return code
