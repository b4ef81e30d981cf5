"""`pyllm generate` and `pyllm chat`: one model, one user, text as it is generated."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncGenerator, Iterator
from typing import Protocol, cast

from ...engine.client.launch import EngineProcess
from ...engine.errors import RequestError
from ..chat.conversation import Message
from ..chat.served_model import load
from ..flags import ConfigError, GenerateConfig, TerminalConfig
from .chat_commands import HELP, Commands, Talk, options_of, printable
from .load_client import LoadError
from .models import TOO_LONG, Asked, EngineModel, Model, ServerModel, has_older


class Writer(Protocol):
    """Takes the text of an answer, piece by piece."""

    def write(self, text: str) -> object:
        """Add text."""


class Screen(Protocol):
    """Reads a chat's questions and shows its answers."""

    def ask(self, runner: asyncio.Runner) -> str | None:
        """Read the next line that is not blank; return None at the end of input."""

    def answer(self) -> contextlib.AbstractContextManager[Writer]:
        """Show an answer, for as long as the block runs."""


class Lines:
    """Questions from a pipe, one per line, and answers as plain text; also for a terminal without cursor control."""

    def ask(self, runner: asyncio.Runner) -> str | None:
        """Read a line."""
        while True:
            try:
                print("> " if sys.stdin.isatty() else "", end="", flush=True)  # input() would write it to stderr
                if (line := input().rstrip()) != "":
                    return line
            except KeyboardInterrupt:
                print()
            except EOFError:
                return None

    @contextlib.contextmanager
    def answer(self) -> Iterator[Writer]:
        """End the answer's last line, unless it failed before the first word."""
        plain = Plain()
        try:
            yield plain
        except Exception:
            if plain.has_text:
                print()
            raise
        except KeyboardInterrupt:
            print()
            raise
        print()


class Plain:
    """Prints text as it is; on a terminal, control characters are replaced."""

    def __init__(self) -> None:
        self.has_text = False
        self._is_terminal = sys.stdout.isatty()

    def write(self, text: str) -> None:
        """Print text."""
        self.has_text |= text != ""
        print(printable(text) if self._is_terminal else text, end="", flush=True)


def generate(config: GenerateConfig, process: EngineProcess | None) -> int:
    """Continue one prompt; return the exit code. Ctrl-C raises `KeyboardInterrupt`."""
    options = options_of(config)
    asked: Asked = config.prompt
    if config.chat or config.system:
        system = [Message("system", config.system)] if config.system else []
        asked = [*system, Message("user", config.prompt)]
    with asyncio.Runner() as runner:
        model = runner.run(_open(config, process))
        try:
            with Lines().answer() as writer:
                runner.run(_write(model.answer(asked, options), writer, []))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ConfigError(_broken_off(error)) from None
        finally:
            runner.run(model.close())
    return 0


def chat(config: TerminalConfig, process: EngineProcess | None) -> int:
    """Chat until the end of input; Ctrl-C stops an answer, whose text so far stays in the conversation."""
    talk = Talk(options_of(config), config.system or "")
    commands = Commands(talk, _say)
    # The runner is entered once per step, so that Ctrl-C stops an answer, and reading a line may block.
    with asyncio.Runner() as runner:
        model = runner.run(_open(config, process))
        try:
            _say(f"Chatting with {model.name}. /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves.")
            screen = _screen()
            while model.is_alive and not commands.is_done and (line := screen.ask(runner)) is not None:
                if line.startswith("/"):
                    is_asked = commands.run(line)
                else:
                    talk.pending, is_asked = line.strip(), True
                if is_asked:
                    _answer(runner, model, talk, screen)
        finally:
            runner.run(model.close())
    return 0


def _answer(runner: asyncio.Runner, model: Model, talk: Talk, screen: Screen) -> None:
    """Answer the pending question, dropping the oldest messages if there are too many."""
    pieces: list[str] = []
    before = list(talk.messages)
    while True:
        try:
            with contextlib.suppress(KeyboardInterrupt), screen.answer() as writer:
                runner.run(_write(model.answer(talk.asked, talk.options), writer, pieces))
        except BrokenPipeError:
            raise
        except RequestError as error:
            if error.code == TOO_LONG and has_older(talk.asked):
                talk.drop_oldest(_say)
                continue
            talk.messages = before
            _say(str(error))
        except OSError as error:
            _say(_broken_off(error))
        if pieces:
            talk.conclude("".join(pieces))
        return


async def _write(answer: AsyncGenerator[str, None], writer: Writer, pieces: list[str]) -> None:
    async with contextlib.aclosing(answer) as texts:
        async for text in texts:
            pieces.append(text)
            writer.write(text)


async def _open(config: TerminalConfig, process: EngineProcess | None) -> Model:
    """Load the model, or find it on a running server; raises `ConfigError` or the errors of `load`."""
    if config.base_url is None:
        return EngineModel(await load(config, cast(EngineProcess, process)))
    try:
        return await ServerModel.connect(config.base_url, config.model, config.api_key)
    except LoadError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        hint = ": pass its key as --api-key" if str(error) == "status 401" else ""
        raise ConfigError(f"{config.base_url} cannot be used ({error}){hint}.") from None


def _screen() -> Screen:
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM", "") in ("", "dumb"):
        return Lines()
    from .screen import EditorScreen

    return EditorScreen([f"/{name}" for name in HELP])


def _broken_off(error: OSError) -> str:
    return f"The server's answer was cut off ({str(error).rstrip('.') or type(error).__name__})."


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
