"""The chat on a terminal: an editor with history for questions, and answers drawn as Markdown.

prompt_toolkit and rich are imported only here, since that takes long.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from .chat_commands import printable

MAX_HISTORY_BYTES, MAX_ENTRY_BYTES = 1 << 20, 1 << 16
REDRAWS_PER_SECOND = 10
BRACKETED_PASTE_ON, BRACKETED_PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"

_parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


class EditorScreen:
    """Asks for questions and shows answers."""

    def __init__(self, commands: list[str]) -> None:
        keys = KeyBindings()
        editing = has_focus(DEFAULT_BUFFER)

        @keys.add("enter", filter=editing)
        def send(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter", filter=editing)
        def break_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        self._session: PromptSession[str] = PromptSession(
            "> ", multiline=True, prompt_continuation="  ", key_bindings=keys, history=open_history(history_path()),
            completer=WordCompleter(commands, sentence=True), complete_while_typing=False, enable_open_in_editor=True,
        )  # fmt: skip
        self._console = Console(highlight=False)

    def ask(self, runner: asyncio.Runner) -> str | None:
        """Read the next question; return None at the end of input. Engine and connections keep running meanwhile."""
        return runner.run(self._ask())

    async def _ask(self) -> str | None:
        while True:
            try:
                if words := (await self._session.prompt_async()).rstrip():
                    return words
            except KeyboardInterrupt:
                continue
            except EOFError:
                return None

    @contextlib.contextmanager
    def answer(self) -> Iterator[Answer]:
        """Show an answer, for as long as the block runs."""
        with _typed_ahead(), Live(console=self._console, refresh_per_second=REDRAWS_PER_SECOND, transient=True) as live:
            answer = Answer(live)
            live.update(answer)
            try:
                yield answer
            finally:
                answer.finish()


class Answer:
    """Prints the finished blocks of an answer for good, and redraws only the last one."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._tail = ""  # text that is not printed for good
        self._is_first = True

    def write(self, text: str) -> None:
        """Add text."""
        self._tail += printable(text)
        if "\n" in text:
            lines = self._tail[: self._tail.rfind("\n")].split("\n")
            tokens = _parser.parse("\n".join(lines))
            starts = [token.map[0] for token in tokens if token.map and token.level == 0 and token.nesting >= 0]
            if len(starts) > 1:
                self._tail = "\n".join(self._tail.split("\n")[starts[-1] :])  # first, or it would be drawn twice
                self._print("\n".join(lines[: starts[-1]]))

    def finish(self) -> None:
        """Print the rest."""
        tail, self._tail = self._tail, ""
        if tail.strip():
            self._print(tail)

    def _print(self, text: str) -> None:
        if not self._is_first:
            self._live.console.print()
        self._is_first = False
        self._live.console.print(_Markdown(text))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the last block, from its end if it is longer than the screen."""
        if self._tail.strip():
            lines = console.render_lines(_Markdown(self._tail), options, pad=False)[-max(console.height - 2, 1) :]
            if not self._is_first:
                yield Segment.line()
            for line in lines:
                yield from line
                yield Segment.line()


class _Markdown(Markdown):
    """Markdown in which line breaks are kept, and `<` is text."""

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self.markup, self.parsed = text, _parser.parse(text)
        for token in self.parsed:
            for child in token.children or ():
                child.type = "hardbreak" if child.type == "softbreak" else child.type


@contextlib.contextmanager
def _typed_ahead() -> Iterator[None]:
    """Keep text typed or pasted meanwhile off the screen; the next question reads it, with a paste as one piece.

    Like the editor, this reads keys and not lines, since a terminal cuts lines at 4,096 bytes; Ctrl-C still interrupts.
    """
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    keys = [before[0] & ~termios.ICRNL, *before[1:3], before[3] & ~(termios.ECHO | termios.ICANON), *before[4:]]
    termios.tcsetattr(descriptor, termios.TCSADRAIN, keys)
    _write(BRACKETED_PASTE_ON)
    try:
        yield
    finally:
        _write(BRACKETED_PASTE_OFF)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _write(sequence: str) -> None:
    sys.stdout.write(sequence)
    sys.stdout.flush()


def history_path() -> Path:
    """Return the file of earlier questions."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state") / "pyllm" / "chat_history"


def open_history(path: Path) -> History:
    """Open the file, which only this user can read and which stays small; if that fails, remember for this run only."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600)
        with open(descriptor, "r+b") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return InMemoryHistory()
            os.fchmod(descriptor, 0o600)
            if (size := os.fstat(descriptor).st_size) > MAX_HISTORY_BYTES:
                file.seek(size - MAX_HISTORY_BYTES // 2)
                kept = file.read().partition(b"\n\n")[2]  # from the next entry on
                file.seek(0)
                file.truncate()
                file.write(kept)
        return _History(path)
    except (OSError, RuntimeError):  # it cannot be written, or there is no home
        return InMemoryHistory()


class _History(FileHistory):
    def store_string(self, string: str) -> None:
        """Keep a question, if it is not too long and there is room on the disk."""
        if len(string.encode()) <= MAX_ENTRY_BYTES:
            with contextlib.suppress(OSError):
                super().store_string(string)
