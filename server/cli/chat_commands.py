"""A conversation in the terminal: its messages and options, the slash commands that change them, and its file.

Questions are read in `terminal.py` (plain lines) and `screen.py` (a line editor).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...engine.config import nearest, settings_of
from ..chat.conversation import Message
from ..flags import ConfigError, TerminalConfig
from .models import Options

MAX_FILE_BYTES = 32 << 20
SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")
ROLES = ("system", "user", "assistant")


class TalkError(ValueError):
    """A command that cannot be carried out; the message is one sentence to show the user."""


@dataclass(slots=True)
class Talk:
    """A conversation with a model."""

    options: Options
    system: str = ""
    messages: list[Message] = field(default_factory=list)  # alternating user and assistant messages
    pending: str = ""  # a question that has no answer yet
    is_cut: bool = False  # whether the oldest messages have been left out

    @property
    def asked(self) -> list[Message]:
        """The messages to send to the model."""
        first = [Message("system", self.system)] if self.system else []
        return [*first, *self.messages, Message("user", self.pending)]

    def drop_oldest(self, say: Callable[[str], None]) -> None:
        """Forget the oldest question and its answer, and say so the first time."""
        del self.messages[:2]
        if not self.is_cut:
            say("The chat is too long for the model: dropping its oldest messages.")
        self.is_cut = True

    def conclude(self, answer: str) -> None:
        """Keep the question and its answer."""
        self.messages += [Message("user", self.pending), Message("assistant", answer)]
        self.pending = ""

    def save(self, path: Path) -> None:
        """Write a file that `load` reads, and whose `messages` an API accepts; raises `TalkError`."""
        if path.exists():
            try:
                _read(path)
            except TalkError:
                raise TalkError(f"{path} exists and is not a saved chat: choose another name.") from None
        first = [Message("system", self.system)] if self.system else []
        messages = [{"role": message.role, "content": message.text} for message in [*first, *self.messages]]
        text = json.dumps({"messages": messages}, ensure_ascii=False, indent=2) + "\n"
        new = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            new.touch(mode=0o600)
            new.write_text(text, encoding="utf-8")
            new.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                new.unlink()
            raise TalkError(f"{path} cannot be written: {error.strerror}.") from None

    def load(self, path: Path) -> None:
        """Replace the messages with those of a file; raises `TalkError`."""
        messages = _read(path)
        self.system = messages.pop(0).text or "" if messages and messages[0].role == "system" else ""
        self.messages, self.pending = messages, ""


def _read(path: Path) -> list[Message]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        found = json.loads(data)["messages"] if len(data) <= MAX_FILE_BYTES else ()
        messages = [Message(entry["role"], entry["content"]) for entry in found]
    except OSError as error:
        raise TalkError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        messages = [Message("user", None)]
    roles = [message.role for message in messages if message.role != "system"]
    alternate = roles == ["user", "assistant"] * (len(roles) // 2) and not any(
        message.role == "system" for message in messages[1:]
    )
    if not alternate or not all(isinstance(message.text, str) for message in messages):
        raise TalkError(
            f'{path} is not a saved chat: it must hold {{"messages": […]}} with alternating user and assistant '
            "messages."
        )
    return messages


def read_schema(text: str | None) -> dict[str, Any] | None:
    """Return the schema of `--json-schema`, which is JSON or the name of a JSON file; raises `ConfigError`."""
    if text is None:
        return None
    where = "--json-schema"
    if not text.lstrip().startswith("{"):
        where = f"{where} {text:.200}"
        try:
            with Path(text).expanduser().open("rb") as file:
                text = file.read(MAX_FILE_BYTES).decode("utf-8-sig")
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ConfigError(f"{where} cannot be read ({reason}): pass a JSON object or a file with one.") from None
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON ({error}).") from None
    if not isinstance(schema, dict):
        raise ConfigError(f"{where} is not a JSON object.")
    return schema


def printable(text: str) -> str:
    """Return a model's text with control characters replaced, since a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def options_of(config: TerminalConfig) -> Options:
    """Return the answer options that the flags set; raises `ConfigError`."""
    sampling = {name: value for name in SAMPLING if (value := getattr(config, name)) is not None}
    return Options(sampling, config.max_tokens, config.stop, read_schema(config.json_schema))


class Commands:
    """Carries out the lines that begin with a slash."""

    def __init__(self, talk: Talk, say: Callable[[str], None]) -> None:
        self._talk, self._say = talk, say
        self.is_done = False  # whether the user has left

    def run(self, line: str) -> bool:
        """Carry out `line`; return whether the pending question should be asked now."""
        name, _, rest = line.partition(" ")
        names = {f"/{name}": name for name in HELP}
        if name in ("/exit", "/bye"):
            name = "/quit"
        if name not in names:
            hint = nearest(name, names).rstrip(".")
            self._say(
                f"Unknown command {name:.60}{hint} /help lists the commands; to send this text, put a space first."
            )
            return False
        try:
            getattr(self, f"_{names[name]}")(rest.strip())
        except TalkError as error:
            self._say(str(error))
            return False
        return name == "/retry"

    def _help(self, _: str) -> None:
        rows = [f"  {usage:<22}{text}" for usage, text in HELP.values()]
        self._say("\n".join([*rows, "", KEYS]))

    def _system(self, text: str) -> None:
        if text:
            self._talk.system = "" if text == "none" else text
        self._say(f"System prompt: {self._talk.system or 'none'}")

    def _clear(self, _: str) -> None:
        self._talk.messages, self._talk.pending = [], ""
        self._say("The chat starts again; the system prompt and the settings stay.")

    def _save(self, name: str) -> None:
        self._talk.save(path := _path(name, "/save"))
        self._say(f"Saved {len(self._talk.messages)} messages to {path}.")

    def _load(self, name: str) -> None:
        self._talk.load(path := _path(name, "/load"))
        self._say(f"Loaded {len(self._talk.messages)} messages from {path}.")

    def _retry(self, _: str) -> None:
        messages = self._talk.messages
        if messages and not self._talk.pending:
            self._talk.pending = messages[-2].text or ""
            del messages[-2:]
        if not self._talk.pending:
            raise TalkError("There is no question to ask again.")

    def _set(self, words: str) -> None:
        options = self._talk.options
        name, _, value = words.partition(" ")
        name = name.replace("-", "_")
        known = {name: own for name, own in settings_of(TerminalConfig).items() if name in (*SAMPLING, "max_tokens")}
        if name and name not in known:
            raise TalkError(f"/set knows {', '.join(known)}, but not {name:.60}{nearest(name, known)}")
        if name and not value:
            raise TalkError(f"/set {name} needs a value, or default.")
        if name:
            try:
                new = None if value == "default" else known[name].convert(value.strip(), f"/set {name}")
            except ValueError as error:
                raise TalkError(str(error)) from None
            options.max_tokens = new if name == "max_tokens" else options.max_tokens
            changed = {} if name == "max_tokens" else {name: new}
            options.sampling = {key: v for key, v in (options.sampling | changed).items() if v is not None}
        values = options.sampling | {"max_tokens": options.max_tokens}
        self._say(", ".join(f"{key} {'default' if (v := values.get(key)) is None else v}" for key in known))

    def _quit(self, _: str) -> None:
        self.is_done = True


HELP = {
    "system": ("/system [TEXT]", "show or set the system prompt; none removes it"),
    "set": ("/set [NAME VALUE]", "show the settings or set one: temperature, top_k, top_p …"),
    "retry": ("/retry", "ask the last question again"),
    "clear": ("/clear", "forget the conversation"),
    "save": ("/save FILE", "write the conversation to a file"),
    "load": ("/load FILE", "continue a conversation from a file"),
    "help": ("/help", "show this list"),
    "quit": ("/quit", "leave, as Ctrl-D does"),
}
KEYS = "Enter sends, Alt-Enter (or Esc, then Enter) starts a new line, Ctrl-C stops an answer, Ctrl-R searches."


def _path(name: str, command: str) -> Path:
    if not name:
        raise TalkError(f"{command} needs the name of a file.")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise TalkError(f"{name:.200} is not a valid file name: {error}") from None
