"""A checkpoint that is being served: its names, tokenizer, chat template, defaults and engine, loaded together."""

from __future__ import annotations

import asyncio
import difflib
import functools
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ...engine.client.async_engine import AsyncEngine
from ...engine.client.launch import EngineProcess
from ...engine.errors import RequestError
from ...engine.messages import SamplingParams
from ...model.checkpoint.hub import resolve_model
from ...model.tokenizer import Tokenizer
from ..chat.template import ChatTemplate
from ..chat.tool_calls import FORMATS, ToolCallFormat, detect_format
from ..flags import DEMO_FOLDER, DEMO_NAME, ConfigError, ModelFlags, ServerConfig
from ..http.errors import ApiError, encode_json, shorten
from ..http.offload import is_large, off_loop
from .metrics import Metrics

logger = logging.getLogger("pyllm.server")

LARGE_TEXT = 4000
"""Characters from which text is tokenised off the event loop."""
LARGE_CHAT = 50
"""Messages from which a chat is rendered off the event loop."""
DEFAULT_FIELDS = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
DEFAULT_FIELDS["max_new_tokens"] = "max_tokens"
"""The keys of `generation_config.json` that are defaults here, and what they are called in `SamplingParams`."""
LOGPROB_FIELDS = ("logprobs", "top_logprobs", "prompt_logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """All that a request needs once the model is loaded.

    Attributes:
        names: what clients may call the model; the first is its id.
        defaults: values of `SamplingParams` for the fields that a request leaves out.
        created: when it was loaded, in seconds of Unix time.
        longest_token: bytes of the longest token, by which a text that is far too long is known without tokenising it.
        flags: of the server.
        tool_format: how calls of tools are written in the model's text.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer
    template: ChatTemplate
    engine: AsyncEngine
    defaults: dict[str, Any]
    metrics: Metrics
    created: int
    longest_token: int
    flags: ServerConfig
    tool_format: ToolCallFormat = FORMATS["hermes"]

    def check_name(self, name: str | None) -> str:
        """The name to answer with; raise `ApiError` 404 for a model that is not served."""
        if name is not None and name not in self.names:
            message = f"The model {shorten(name)!r} does not exist; this server has {self.names[0]!r}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return name or self.names[0]

    def check_logprobs(self, body: object) -> None:
        """Raise `RequestError` where a request's field asks for more log-probabilities than this server gives."""
        for name in LOGPROB_FIELDS:
            value = getattr(body, name, None)
            if value is not None and value is not True and value > self.flags.max_logprobs:
                message = f"{name} is at most {self.flags.max_logprobs} on this server, got {value}."
                raise RequestError(message, param=name)

    async def encode(self, text: str, *, add_bos: bool, any_length: bool = False) -> list[int]:
        """Tokenise plain text; raises `RequestError` where it cannot fit the context, unless it has `any_length`."""
        small = len(text) < LARGE_TEXT if any_length else self._is_small(len(text), "prompt")
        if small and not is_large.get():
            return self.tokenizer.encode(text, add_bos=add_bos)
        return await off_loop(self.tokenizer.encode, text, add_bos=add_bos)

    async def render(self, messages: list[dict[str, Any]], *, any_length: bool = False, **options: Any) -> list[int]:
        """Put messages through the chat template and tokenise them; raises `ChatTemplateError` or `RequestError`.

        `options` are those of `ChatTemplate.render`; with `any_length`, messages that cannot fit the context may pass.
        """
        render = functools.partial(self.template.render, messages, **options)
        characters = sum(len(message.get("content") or "") for message in messages)
        if not any_length:
            self._is_small(characters, "messages")
        if is_large.get() or len(messages) >= LARGE_CHAT or len(encode_json([messages, options])) >= LARGE_TEXT:
            return await off_loop(render)
        return render()

    def _is_small(self, characters: int, param: str) -> bool:
        """Whether text may be tokenised on the event loop; raise `RequestError` where it cannot fit the context."""
        fewest, limit = characters // self.longest_token, self.engine.info.max_model_len
        if fewest > limit:
            message = f"This model's context is {limit} tokens, but the prompt has at least {fewest} tokens."
            raise RequestError(message, param=param, code="context_length_exceeded")
        return characters < LARGE_TEXT


async def load(flags: ModelFlags, process: EngineProcess, *, names: tuple[str, ...] = ()) -> ServedModel:
    """Find the checkpoint, let `process` load it, read what belongs to it here meanwhile, and wait for the engine.

    Raises `CheckpointError`, `ChatTemplateError`, `ConfigError` or `EngineStartError`, each with one plain sentence.
    """
    path = DEMO_FOLDER if flags.model is None else await asyncio.to_thread(resolve_model, flags.model)
    folder = path if path.is_dir() else path.parent
    if flags.model is None and not (folder / "config.json").exists():
        raise ConfigError("This copy of pyllm has no demo model: pass a folder or a hub id.")
    defaults, said = read_defaults(folder, flags.generation_config, flags.override_generation_config)
    config = flags.engine_config(path)
    process.configure(config)
    tokenizer = await asyncio.to_thread(Tokenizer.from_folder, folder)
    template = ChatTemplate.from_tokenizer(tokenizer, override=_read_template(flags.chat_template))
    server = flags if isinstance(flags, ServerConfig) else ServerConfig()
    tool_format = find_format(server.tool_call_parser, template)
    longest_token = max(len(tokenizer.token_bytes(id_)) for id_ in range(tokenizer.vocab_size))
    engine = await AsyncEngine.start(config, tokenizer, process)
    logger.info("Sampling defaults: %s", said)
    names = names or (model_name(flags.model),)
    metrics = Metrics(names[0], lambda: engine.stats, vllm_names=server.metrics_vllm_names)
    engine.step_listener = metrics.on_step
    return ServedModel(
        names=names,
        tokenizer=tokenizer,
        template=template,
        engine=engine,
        defaults=defaults,
        metrics=metrics,
        created=int(time.time()),
        longest_token=longest_token,
        flags=server,
        tool_format=tool_format,
    )


def find_format(name: str, template: ChatTemplate) -> ToolCallFormat:
    """The format of `--tool-call-parser`, or for "auto" that of the template; raises `ConfigError`."""
    if name == "auto":
        name = detect_format(template.source)
    if name not in FORMATS:
        near = difflib.get_close_matches(name, ["auto", *FORMATS], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"it is auto, {', '.join(FORMATS)}."
        raise ConfigError(f"--tool-call-parser {shorten(name)} is not known; {hint}")
    return FORMATS[name]


def model_name(model: str | None) -> str:
    """What a model is called unless told otherwise: its hub id, or its folder's own name, for paths are private."""
    if model is None:
        return DEMO_NAME
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"--chat-template {path} cannot be read: {reason}.") from None


def read_defaults(folder: Path, source: str = "auto", override: str | None = None) -> tuple[dict[str, Any], str]:
    """The sampling defaults, by their names in `SamplingParams`; and in words which they are and where from.

    Args:
        folder: of the checkpoint, for the source "auto".
        source: a folder with `generation_config.json`, "auto", or "none" (or vLLM's word for it, "vllm").
        override: JSON object with the same keys, of which each wins over the file's; null takes one away.

    Raises:
        ConfigError: what the flags name cannot be used. A value of the checkpoint's own file that cannot be used is
            left out with a warning, for the file is not the user's to mend.
    """
    content: dict[str, Any] = {}
    where = f"{'the checkpoint' if source == 'auto' else source}'s generation_config.json"
    if source not in ("none", "vllm"):
        try:
            read = json.loads(((folder if source == "auto" else Path(source)) / "generation_config.json").read_bytes())
            if not isinstance(read, dict):
                raise ValueError
            content = read
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not a JSON object"
            if source != "auto":
                raise ConfigError(f"--generation-config: {where} cannot be read: {reason}.") from None
            if not isinstance(error, FileNotFoundError):
                logger.warning("generation_config.json cannot be read and is left out: %s", reason)
    found: dict[str, tuple[Any, str]] = {}
    for key in DEFAULT_FIELDS:
        if content.get(key) is None:
            continue
        try:
            found[key] = _checked(key, content[key]), where
        except ValueError:
            logger.warning("generation_config.json has %s = %r, which is left out.", key, content[key])
    found |= {key: (value, "--override-generation-config") for key, value in _overrides(override).items()}
    found = {key: pair for key, pair in found.items() if pair[0] is not None}
    parts = [
        ", ".join(f"{key} = {value}" for key, (value, whence) in found.items() if whence == source) + f" from {source}"
        for source in dict.fromkeys(whence for _, whence in found.values())
    ]
    values = {DEFAULT_FIELDS[key]: value for key, (value, _) in found.items()}
    return values, "; ".join([*parts, "else OpenAI's" if parts else "OpenAI's"])


def _overrides(text: str | None) -> dict[str, Any]:
    """The checked values of `--override-generation-config`; raises `ConfigError`."""
    values: dict[str, Any] = {}
    for key, value in json.loads(text or "{}").items():
        flag = f"--override-generation-config has {key[:200]!r}"
        if key not in DEFAULT_FIELDS:
            near = difflib.get_close_matches(key, DEFAULT_FIELDS, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else f": it takes {', '.join(DEFAULT_FIELDS)}."
            raise ConfigError(f"{flag}, which is not known{hint}")
        try:
            values[key] = None if value is None else _checked(key, value)
        except ValueError as error:
            raise ConfigError(f"{flag} with the value {value!r:.200}: {error}") from None
    return values


def _checked(key: str, value: Any) -> Any:
    """The value of a default, of its type and within its range; raises `ValueError`."""
    name = DEFAULT_FIELDS[key]
    if name == "max_tokens" and value == 0:
        raise ValueError(f"{key} must be at least 1, got 0.")
    try:
        return getattr(msgspec.convert({"type": "SamplingParams", name: value}, SamplingParams), name)
    except RequestError as error:
        raise ValueError(str(error).replace(name, key, 1)) from None
    except msgspec.ValidationError as error:
        raise ValueError(f"{str(error).partition(' - ')[0]}.") from None
