"""A checkpoint that is being served: its names, tokenizer, chat template, defaults and engine, loaded together."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..engine.async_engine import AsyncEngine
from ..engine.errors import RequestError
from ..engine.launch import EngineProcess
from ..engine.messages import SamplingParams
from ..model.hub import resolve_model
from ..model.tokenizer import Tokenizer
from .chat_template import ChatTemplate
from .config import DEMO_FOLDER, DEMO_NAME, ConfigError, ModelFlags
from .errors import ApiError, shorten
from .metrics import Metrics

logger = logging.getLogger("pyllm.server")

LARGE_TEXT = 4000
"""Characters from which text is tokenised off the event loop."""
LARGE_CHAT = 50
"""Messages from which a chat is rendered off the event loop."""
DEFAULT_FIELDS = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
DEFAULT_FIELDS["max_new_tokens"] = "max_tokens"
"""The keys of `generation_config.json` that are defaults here, and what they are called in `SamplingParams`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """All that a request needs once the model is loaded.

    Attributes:
        names: what clients may call the model; the first is its id.
        defaults: values of `SamplingParams` for the fields that a request leaves out.
        created: when it was loaded, in seconds of Unix time.
        longest_token: bytes of the longest token, by which a text that is far too long is known without tokenising it.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer
    template: ChatTemplate
    engine: AsyncEngine
    defaults: dict[str, Any]
    metrics: Metrics
    created: int
    longest_token: int

    def check_name(self, name: str | None) -> str:
        """The name to answer with; raise `ApiError` 404 for a model that is not served."""
        if name is not None and name not in self.names:
            message = f"The model {shorten(name)!r} does not exist; this server has {self.names[0]!r}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return name or self.names[0]

    async def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Tokenise plain text; raises `RequestError`."""
        if self._is_small(len(text), "prompt"):
            return self.tokenizer.encode(text, add_bos=add_bos)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_bos=add_bos)

    async def render(self, messages: list[dict[str, Any]]) -> list[int]:
        """Put messages through the chat template and tokenise them; raises `ChatTemplateError` or `RequestError`."""
        characters = sum(len(message.get("content") or "") for message in messages)
        if self._is_small(characters, "messages") and len(messages) < LARGE_CHAT:
            return self.template.render(messages)
        return await asyncio.to_thread(self.template.render, messages)

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
    config = flags.engine_config(path)
    process.configure(config)
    tokenizer = await asyncio.to_thread(Tokenizer.from_folder, folder)
    template = ChatTemplate.from_tokenizer(tokenizer, override=_read_template(flags.chat_template))
    defaults = read_defaults(folder)
    if defaults:
        values = ", ".join(f"{name}={value}" for name, value in defaults.items())
        logger.info("Defaults from the checkpoint's generation_config.json: %s", values)
    longest_token = max(len(tokenizer.token_bytes(id_)) for id_ in range(tokenizer.vocab_size))
    engine = await AsyncEngine.start(config, tokenizer, process)
    names = names or (model_name(flags.model),)
    metrics = Metrics(names[0], lambda: engine.stats)
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
    )


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


def read_defaults(folder: Path) -> dict[str, Any]:
    """The sampling defaults in a checkpoint's `generation_config.json`, by their names in `SamplingParams`.

    A value that cannot be used is left out with a warning, for the file is not the user's to mend.
    """
    try:
        content = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("generation_config.json cannot be read and is left out: %s", error)
        return {}
    defaults: dict[str, Any] = {}
    for key, name in DEFAULT_FIELDS.items():
        value = content.get(key) if isinstance(content, dict) else None
        if value is None:
            continue
        try:
            checked = msgspec.convert({"type": "SamplingParams", name: value}, SamplingParams)
        except (RequestError, msgspec.ValidationError):
            logger.warning("generation_config.json has %s = %r, which is left out.", key, value)
        else:
            defaults[name] = getattr(checked, name)
    return defaults
