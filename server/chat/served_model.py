"""The served model: a checkpoint's names, tokenizer, chat template, sampling defaults and engine."""

from __future__ import annotations

import asyncio
import difflib
import logging
import re
import time
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from ...engine.client.async_engine import AsyncEngine
from ...engine.client.launch import EngineProcess
from ...engine.messages import Marks
from ...model.checkpoint.hub import resolve_model
from ...model.files import folder_of, read_text
from ...model.tokenizer import Tokenizer
from ..flags import DEMO_FOLDER, DEMO_NAME, ConfigError, ModelFlags, ServerConfig
from ..generation.defaults import read_defaults
from ..generation.metrics import Metrics
from ..http.body import is_large, off_loop
from ..http.errors import ApiError, shorten
from .reasoning import SWITCHES, find_marks, has_reasoning, special_id
from .template import ChatTemplate, TokenIds, collect_ids, too_long
from .tool_calls import FORMATS, ToolCallFormat, detect_format

logger = logging.getLogger("pyllm.server")

TOKENIZING_FACTOR = 10  # bytes of memory for each character of a text whose ids are all kept
# Of clients that have no model to name: "dummy" is from Hugging Face's InferenceClient, "unknown" from sglang-router.
PLACEHOLDERS = ("", "dummy", "unknown")
WILDCARDS = frozenset("*?[")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LARGE_TEXT = 4000  # text of at least this many characters is tokenised off the event loop


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A loaded checkpoint, with everything that requests need."""

    names: tuple[str, ...]  # as listed; the first is its id
    patterns: tuple[str, ...] = ()  # of further names that clients may use
    tokenizer: Tokenizer
    template: ChatTemplate
    engine: AsyncEngine
    defaults: dict[str, Any]  # fields of `SamplingParams` that apply if a request leaves them out
    metrics: Metrics
    created: int  # Unix time of loading
    longest_token: int  # in bytes: refuses a text that is far too long without tokenising it
    flags: ServerConfig
    tool_format: ToolCallFormat = FORMATS["hermes"]  # of calls in the model's text
    marks: Marks | None = None  # of sections in the model's text

    @property
    def reasons(self) -> bool:
        """Whether the model's text has marks that separate reasoning from answers."""
        return has_reasoning(self.marks)

    @property
    def switches(self) -> frozenset[str]:
        """The variables that a request may set: the template's, and those that act on the reasoning."""
        return self.template.variables | (SWITCHES if self.reasons else frozenset())

    def resolve_name(self, name: str) -> str:
        """Return the name that answers a request for `name` show; raise `ApiError` 404 if this is another model."""
        if name in self.names or any(fnmatchcase(name, pattern) for pattern in self.patterns):
            return name
        if name in PLACEHOLDERS:
            return self.names[0]
        raise self.not_found(name)

    def not_found(self, name: str) -> ApiError:
        """Return the error for a request that names another model."""
        message = f"The model {shorten(name)!r} does not exist; this server has {self.names[0]!r}."
        return ApiError(404, message, param="model", code="model_not_found")

    async def encode(self, text: str, field: str, *, add_bos: bool, any_length: bool = False) -> TokenIds:
        """Tokenise the plain text of a request's `field`.

        Raises `RequestError` if it cannot be tokenised or, unless `any_length`, cannot fit the context.
        """
        context = self.engine.info.config.max_model_len
        if not any_length and len(text) // self.longest_token > context:
            raise too_long(len(text) // self.longest_token, context, field)
        pieces = self.tokenizer.encode_pieces(text, add_bos=add_bos)
        work = partial(collect_ids, pieces, self.tokenizer, context, field, any_length=any_length)
        return work() if len(text) < LARGE_TEXT and not is_large.get() else await off_loop(work)


async def load(flags: ModelFlags, process: EngineProcess, *, names: tuple[str, ...] = ()) -> ServedModel:
    """Find the checkpoint, let `process` load it while this process reads its tokenizer, and wait for the engine.

    Raises `CheckpointError`, `ChatTemplateError`, `ConfigError` or `EngineStartError`, with one sentence for the user.
    """
    path = await asyncio.to_thread(find_checkpoint, flags)
    folder = folder_of(path)
    defaults, description = read_defaults(folder, flags.generation_config, flags.override_generation_config)
    config = flags.engine_config(path)
    process.configure(config)
    tokenizer = await asyncio.to_thread(Tokenizer.from_folder, path)
    template, _ = find_template(flags, tokenizer)
    server = flags if isinstance(flags, ServerConfig) else ServerConfig()
    tool_format = find_format(server.tool_call_parser, template, tokenizer)
    longest_token = max(len(tokenizer.token_bytes(id_)) for id_ in range(tokenizer.vocab_size))
    engine = await AsyncEngine.start(config, tokenizer, process)
    marks = find_marks(server.reasoning_parser, tokenizer, template.source, engine.info.era)
    logger.info("Sampling defaults: %s", description)
    patterns = tuple(name for name in names if WILDCARDS.intersection(name))
    names = tuple(name for name in names if name not in patterns)
    if not names:
        names = model_names(flags.model)
        patterns += (escape(flags.model),) if flags.model else ()  # a path is not listed
    metrics = Metrics(names[0], lambda: engine.stats, engine.info.config, vllm_names=server.metrics_vllm_names)
    engine.step_listener = metrics.on_step
    return ServedModel(
        names=names,
        patterns=patterns,
        tokenizer=tokenizer,
        template=template,
        engine=engine,
        defaults=defaults,
        metrics=metrics,
        created=int(time.time()),
        longest_token=longest_token,
        flags=server,
        tool_format=tool_format,
        marks=marks,
    )


def find_checkpoint(flags: ModelFlags) -> Path:
    """Return the path of the named checkpoint, fetched from the hub if it is not on this machine, or of the demo's.

    Raises `CheckpointError` or `ConfigError`.
    """
    if flags.model is None and not (DEMO_FOLDER / "config.json").exists():
        raise ConfigError("This copy of pyllm has no demo model: pass a folder or a hub id.")
    return resolve_model(flags.model or str(DEMO_FOLDER), flags.revision)


def find_template(flags: ModelFlags, tokenizer: Tokenizer) -> tuple[ChatTemplate, str]:
    """Compile the chat template, and return it with its origin; raises `ChatTemplateError` or `ConfigError`."""
    override = flags.chat_template
    template = ChatTemplate.from_tokenizer(tokenizer, _read_template(override), override or "")
    return template, override or (tokenizer.template_origin if tokenizer.chat_templates else "")


def find_format(name: str, template: ChatTemplate, tokenizer: Tokenizer) -> ToolCallFormat:
    """Return the format of `--tool-call-parser`, or the checkpoint's for "auto"; raises `ConfigError`."""
    marked = FORMATS["agentic"]
    ids = (special_id(tokenizer, marked.opening), special_id(tokenizer, marked.closing))
    if name == "auto":
        name = "agentic" if min(ids) >= 0 else detect_format(template.with_tools.source)
    if name not in FORMATS:
        near = difflib.get_close_matches(name, ["auto", *FORMATS], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known parsers: auto, {', '.join(FORMATS)}."
        raise ConfigError(f"--tool-call-parser {shorten(name)} is unknown; {hint}")
    if name == "agentic" and min(ids) < 0:
        needed = f"{marked.opening} and {marked.closing}"
        raise ConfigError(f"--tool-call-parser agentic needs a tokenizer with the special tokens {needed}.")
    return replace(marked, ids=ids) if name == "agentic" else FORMATS[name]


def model_names(model: str | None) -> tuple[str, ...]:
    """Return the names under which a model is listed by default: its own, its last part, and `org/name` as given."""
    names = [model_name(model)]
    if model is not None:
        last = Path(model).name
        names += [last] if last != ".." else []
        names += [model] if HUB_ID.fullmatch(model) else []
    return tuple(dict.fromkeys(filter(None, names)))


def model_name(model: str | None) -> str:
    """Return a model's default name: its hub id, or the folder's own name, since paths are private."""
    if model is None:
        return DEMO_NAME
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _read_template(path: str | None) -> str | None:
    text = None if path is None else read_text(Path(path))
    if path is not None and text is None:
        raise ConfigError(f"--chat-template {path} does not exist: pass a file with a Jinja template.")
    return text
