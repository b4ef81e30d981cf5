"""The served model: a checkpoint's names, tokenizer, chat template, sampling defaults and engine."""

from __future__ import annotations

import asyncio
import difflib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...engine.client.async_engine import AsyncEngine
from ...engine.client.launch import EngineProcess
from ...engine.errors import RequestError
from ...engine.messages import SamplingParams
from ...model.checkpoint.hub import resolve_model
from ...model.tokenizer import Tokenizer
from ..flags import DEMO_FOLDER, DEMO_NAME, ConfigError, ModelFlags, ServerConfig
from ..generation.defaults import read_defaults
from ..generation.metrics import Metrics
from ..http.body import is_large, off_loop
from ..http.errors import ApiError, encode_json, shorten
from .conversation import Message, Sampling
from .template import ChatTemplate
from .tool_calls import FORMATS, ToolCallFormat, detect_format

logger = logging.getLogger("pyllm.server")

LARGE_TEXT = 4000
"""Characters from which text is tokenised off the event loop."""
LARGE_CHAT = 50
"""Messages from which a chat is rendered off the event loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """Everything that requests need of a loaded checkpoint."""

    names: tuple[str, ...]  # under which clients may ask for it; the first is its id
    tokenizer: Tokenizer
    template: ChatTemplate
    engine: AsyncEngine
    defaults: dict[str, Any]  # fields of `SamplingParams` for what a request leaves out
    metrics: Metrics
    created: int  # Unix time of loading
    longest_token: int  # in bytes: refuses a text that is far too long without tokenising it
    flags: ServerConfig
    tool_format: ToolCallFormat = FORMATS["hermes"]  # of calls in the model's text

    def check_name(self, name: str | None) -> str:
        """Return the name to answer with; raise `ApiError` 404 for a model that is not served."""
        if name is not None and name not in self.names:
            message = f"The model {shorten(name)!r} does not exist; this server has {self.names[0]!r}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return name or self.names[0]

    def sampling_params(
        self, sampling: Sampling, *, max_tokens: int | None, grammar: str | None, turn_ends: tuple[str, ...] = ()
    ) -> SamplingParams:
        """Join a request's fields with the model's defaults; raises `RequestError`.

        `turn_ends` are strings that end a turn like an end-of-sequence id, so `ignore_eos` ignores them too.
        """
        values: dict[str, Any] = {**self.defaults, **sampling, "max_tokens": max_tokens, "grammar": grammar}
        if "bad_words" in values:
            values["bad_words"] = tuple(self._spellings(values["bad_words"]))
        if not values.get("ignore_eos"):
            values["stop"] = values.get("stop", ()) + turn_ends
        return SamplingParams(**values)

    def _spellings(self, words: Sequence[str]) -> Iterator[tuple[int, ...]]:
        """Yield the token ids of each word at the start of a text and after a space."""
        for word in words:
            ids = {tuple(self.tokenizer.encode(text)) for text in (word, f" {word.lstrip()}")}
            yield from sorted(spelling for spelling in ids if spelling)

    async def encode(self, text: str, *, add_bos: bool, any_length: bool = False) -> list[int]:
        """Tokenise plain text; raises `RequestError` if it cannot fit the context, unless `any_length`."""
        small = len(text) < LARGE_TEXT if any_length else self._is_small(len(text), "prompt")
        if small and not is_large.get():
            return self.tokenizer.encode(text, add_bos=add_bos)
        return await off_loop(self.tokenizer.encode, text, add_bos=add_bos)

    async def render(
        self, messages: Sequence[Message], *, field: str = "messages", any_length: bool = False, **options: Any
    ) -> list[int]:
        """Render messages through the chat template and tokenise them; raises `ChatTemplateError` or `RequestError`.

        `options` are those of `ChatTemplate.render`; `any_length` accepts messages that cannot fit the context; an
        error calls the messages `field`.
        """
        render = partial(self.template.render, messages, **options)
        if not any_length:
            self._is_small(sum(len(message.text or "") for message in messages), field)
        if is_large.get() or len(messages) >= LARGE_CHAT or len(encode_json([messages, options])) >= LARGE_TEXT:
            return await off_loop(render)
        return render()

    def _is_small(self, characters: int, param: str) -> bool:
        """Whether to tokenise text on the event loop; raises `RequestError` if it cannot fit the context."""
        fewest, limit = characters // self.longest_token, self.engine.info.config.max_model_len
        if fewest > limit:
            message = f"This model's context is {limit} tokens, but the prompt has at least {fewest} tokens."
            raise RequestError(message, param=param, code="context_length_exceeded")
        return characters < LARGE_TEXT


async def load(flags: ModelFlags, process: EngineProcess, *, names: tuple[str, ...] = ()) -> ServedModel:
    """Find the checkpoint, let `process` load it while this process reads its tokenizer, and wait for the engine.

    Raises `CheckpointError`, `ChatTemplateError`, `ConfigError` or `EngineStartError`, each with one plain sentence.
    """
    path = DEMO_FOLDER if flags.model is None else await asyncio.to_thread(resolve_model, flags.model)
    folder = path if path.is_dir() else path.parent
    if flags.model is None and not (folder / "config.json").exists():
        raise ConfigError("This copy of pyllm has no demo model: pass a folder or a hub id.")
    defaults, description = read_defaults(folder, flags.generation_config, flags.override_generation_config)
    config = flags.engine_config(path)
    process.configure(config)
    tokenizer = await asyncio.to_thread(Tokenizer.from_folder, folder)
    template = ChatTemplate.from_tokenizer(tokenizer, override=_read_template(flags.chat_template))
    server = flags if isinstance(flags, ServerConfig) else ServerConfig()
    tool_format = find_format(server.tool_call_parser, template)
    longest_token = max(len(tokenizer.token_bytes(id_)) for id_ in range(tokenizer.vocab_size))
    engine = await AsyncEngine.start(config, tokenizer, process)
    logger.info("Sampling defaults: %s", description)
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
    """Return the format of `--tool-call-parser`, or the template's for "auto"; raises `ConfigError`."""
    if name == "auto":
        name = detect_format(template.source)
    if name not in FORMATS:
        near = difflib.get_close_matches(name, ["auto", *FORMATS], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known parsers: auto, {', '.join(FORMATS)}."
        raise ConfigError(f"--tool-call-parser {shorten(name)} is unknown; {hint}")
    return FORMATS[name]


def model_name(model: str | None) -> str:
    """Return a model's default name: its hub id, or the folder's own name, since paths are private."""
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
