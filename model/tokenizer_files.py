"""Reads a checkpoint's tokenizer and chat templates from its files."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from .config import MAX_TOKENIZER_BYTES
from .expressions import find_slow, is_panic
from .files import CheckpointError, read_json, read_text, shown
from .long_text import unknown_expressions

MAX_ID = 2**22  # as in `DeepConfig`
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
EXTRAS = ("additional_special_tokens", "extra_special_tokens")  # keys for special tokens without a role


@contextlib.contextmanager
def refuse_panics(path: Path) -> Iterator[None]:
    """Raise `CheckpointError` if the library fails or panics, and keep the panic's own lines out of stderr."""
    source, pipe = os.pipe()
    os.set_blocking(source, False)
    os.set_blocking(pipe, False)
    stderr = os.dup(2)
    os.dup2(pipe, 2)
    try:
        yield
    except (CheckpointError, MemoryError, OSError):
        raise
    except BaseException as error:  # the library raises bare Exception
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise CheckpointError(f"{path} cannot be used as a tokenizer ({error!s:.200}): fetch it again.") from None
    finally:
        os.dup2(stderr, 2)
        with contextlib.suppress(BlockingIOError):
            written = os.read(source, 1 << 16)
            os.write(2, written.partition(b"\nthread '")[0])  # lines of other threads
        for descriptor in (source, pipe, stderr):
            os.close(descriptor)


def read_library(path: Path) -> tokenizers.Tokenizer:
    """Read a `tokenizer.json`; raise `CheckpointError` if it is broken or not of the family's kind."""
    text = read_text(path, most=MAX_TOKENIZER_BYTES)
    if text is None:
        raise CheckpointError(f"{path.parent} has no tokenizer.json: copy it there from the checkpoint's source.")
    try:
        library = tokenizers.Tokenizer.from_str(text)
        highest = max(library.get_vocab(with_added_tokens=True).values(), default=0)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} cannot be read as a tokenizer ({error!s:.200}): fetch it again.") from None
    if "ByteLevel" not in repr(library.decoder):
        raise CheckpointError(f"{path} is not a byte-level BPE tokenizer, the only kind that this family uses.")
    if highest >= MAX_ID:
        raise CheckpointError(
            f"{path} has a token with the id {highest}, but ids must be below {MAX_ID}: fetch it again."
        )
    if (slow := find_slow(unknown_expressions(library))) is not None:
        expression, unit = slow
        raise CheckpointError(
            f"{path} has the regular expression {shown(expression)}, which takes far too long on long texts, such as "
            f"{shown(unit)} repeated: replace it with one that takes linear time, such as GPT-4's."
        )
    others = [token for token in library.get_added_tokens_decoder().values() if not token.special]
    if any(t.rstrip for t in others) and (spaces := [t.content for t in others if t.content[:1].isspace()]):
        raise CheckpointError(  # the library panics if one token drops the white space with which another begins
            f"{path} has the added tokens {shown(spaces)}, which begin with white space, and others with rstrip: "
            "remove one kind."
        )
    if missing := _undeclared_tokens(library):
        raise CheckpointError(f"{path}: the post_processor uses {shown(missing)} without declaring it: fetch it again.")
    return library


def _undeclared_tokens(library: tokenizers.Tokenizer) -> list[str]:
    """List the tokens that a template of the post-processor uses without declaring them: the library would panic."""
    state = json.loads(library.post_processor.__getstate__()) if library.post_processor else {}
    used: list[str] = []
    for processor in [state, *state.get("processors", ())]:
        if processor.get("type") == "TemplateProcessing":
            pieces = [
                piece["SpecialToken"]["id"]
                for piece in processor["single"] + processor["pair"]
                if "SpecialToken" in piece
            ]
            used += [name for name in pieces if name not in processor["special_tokens"]]
    return used


def special_names(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Read the special tokens in the file at `path` by role; those without a role get a key of their own."""

    def require(condition: bool, name: str, kind: str) -> None:
        if not condition:
            raise CheckpointError(f"{path}: {name} must be {kind}, but got {shown(settings[name])}: fetch it again.")

    entries: dict[str, Any] = {}
    for name in EXTRAS:
        extra = settings.get(name) or []
        require(isinstance(extra, (list, dict)), name, "a list of tokens")
        entries |= {
            f"{name}_{n}": entry for n, entry in enumerate(extra.values() if isinstance(extra, dict) else extra)
        }
        require(all(isinstance(_content(entry), str) for entry in entries.values()), name, "a list of tokens")
    declared = settings.get("added_tokens_decoder") or {}
    require(isinstance(declared, dict), "added_tokens_decoder", "an object of tokens by id")
    entries |= {f"added_{id_}": entry for id_, entry in declared.items()
                if isinstance(entry, dict) and entry.get("special")}  # fmt: skip
    for role in ROLES:
        entries[role] = settings.get(role)
        require(entries[role] is None or isinstance(_content(entries[role]), str), role, "a token")
    names = {role: _content(entry) for role, entry in entries.items()}
    return {role: name for role, name in names.items() if isinstance(name, str) and name}


def _content(entry: Any) -> Any:
    """Return the text of a token, which may be written as an object with its properties."""
    return entry.get("content") if isinstance(entry, dict) else entry


def find_chat_templates(folder: Path) -> tuple[dict[str, str], Path]:
    """Return a checkpoint's chat templates by name, and the file they come from.

    As in transformers, the files `chat_template.jinja` ("default") and `additional_chat_templates/NAME.jinja` replace
    those of `tokenizer_config.json`; then come `chat_template.json` and `config.json`. Raises `CheckpointError`.
    """
    files = {"default": folder / "chat_template.jinja"}
    named = (folder / "additional_chat_templates").glob("*.jinja")
    files |= {path.name.removesuffix(".jinja"): path for path in sorted(named)}
    found = {name: text for name, path in files.items() if (text := read_text(path)) is not None}
    if found:
        return found, files[next(iter(found))]
    for name in ("tokenizer_config.json", "chat_template.json", "config.json"):
        path = folder / name
        settings = read_json(path) or {}
        if (value := settings.get("chat_template")) is not None:
            return _named_templates(path, value), path
        if "assistant_prefix" in settings:
            return {"default": _joined_pieces(path, settings)}, path
    return {}, folder


PIECES = """\
{%- if always or messages[0].role != "system" -%}{{ pieces.start }}{%- endif -%}
{%- for m in messages -%}{%- set text = m.content | trim -%}
{%- if m.role == "system" and not always -%}{{ pieces.system[0] + text + pieces.system[1] }}
{%- elif m.role == "user" -%}{{ pieces.user[0] + text + pieces.user[1] }}
{%- elif m.role == "assistant" -%}{{ pieces.assistant + text + eos_token }}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{ pieces.assistant }}{%- endif -%}"""


def _joined_pieces(path: Path, settings: Mapping[str, Any]) -> str:
    """Return the template made of the pieces in a `chat_template.json` of the TR-Hash line.

    The tokenizer's end token ends an assistant's turn: the file may have the end token of another tokenizer.
    """
    names = ("system_prompt", "system_format", "user_format", "assistant_prefix")
    texts = [settings.get(name, "") for name in names]
    if not all(isinstance(text, str) for text in texts) or any("{content}" not in text for text in texts[1:3]):
        needed = "system_format and user_format must be texts with {content}, and assistant_prefix a text"
        raise CheckpointError(f"{path}: {needed}: fetch it again.")
    system, user = (text.split("{content}", 1) for text in texts[1:3])
    prompt = texts[0].strip()
    pieces = {"start": prompt and prompt.join(system), "system": system, "user": user, "assistant": texts[3]}
    always = settings.get("id") == "complexity-chat-v1"  # this format has no place for a client's system message
    given = f"{{%- set pieces = {json.dumps(pieces)} -%}}{{%- set always = {json.dumps(always)} -%}}"
    return given + PIECES


def _named_templates(path: Path, value: Any) -> dict[str, str]:
    """Return the templates in `chat_template`: one, an object of templates by name, or a list with their names."""
    pairs: list[tuple[Any, Any]] = list(value.items()) if isinstance(value, dict) else [("default", value)]
    if isinstance(value, list):
        entries = [entry if isinstance(entry, dict) else {} for entry in value]
        pairs = [(entry.get("name"), entry.get("template")) for entry in entries]
    if not pairs or not all(isinstance(part, str) and part.strip() for pair in pairs for part in pair):
        kinds = 'a template, or templates by name such as {"default": "…", "tool_use": "…"}'
        raise CheckpointError(f"{path}: chat_template must be {kinds}, but got {shown(value)}: fetch it again.")
    return dict(pairs)
