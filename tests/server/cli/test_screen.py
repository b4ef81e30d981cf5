"""What `pyllm chat` keeps of questions, and how it draws answers."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

import pytest
from prompt_toolkit.history import InMemoryHistory
from rich.console import Console
from rich.live import Live

from pyllm.server.cli.chat_commands import printable
from pyllm.server.cli.screen import MAX_ENTRY_BYTES, MAX_HISTORY_BYTES, Answer, history_path, open_history


def test_the_history_stays_small_and_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history"
    for n in range(40):
        open_history(path).store_string(f"{n} " + "x" * (MAX_ENTRY_BYTES - 100))
    open_history(path).store_string("y" * (MAX_ENTRY_BYTES + 1))
    path.chmod(0o644)
    kept = list(open_history(path).load_history_strings())
    assert path.stat().st_size <= MAX_HISTORY_BYTES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    numbers = [int(text.split()[0]) for text in kept]
    assert numbers == list(range(39, 39 - len(numbers), -1)), "the newest, whole, and not the one that is too long"
    assert len(numbers) > 5


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/full")])
def test_without_a_file_the_history_lasts_for_one_run(tmp_path: Path, make) -> None:
    make(tmp_path / "history")
    history = open_history(tmp_path / "history")
    assert isinstance(history, InMemoryHistory)
    history.append_string("Hi")
    assert history.get_strings() == ["Hi"]


def test_the_history_is_where_state_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for state, folder in (("/s", "/s"), ("relative", "/home/me/.local/state"), ("", "/home/me/.local/state")):
        monkeypatch.setenv("XDG_STATE_HOME", state)
        assert history_path() == Path(folder) / "pyllm" / "chat_history"


def test_finished_blocks_are_printed_once_and_for_good() -> None:
    """So drawing a long answer costs as much per piece as a short one."""
    console = Console(file=io.StringIO(), width=80, height=24)
    live = Live(console=console, auto_refresh=False, transient=True)
    answer = Answer(live)
    for n in range(50):
        for piece in ("Para", f"graph {n}", ".\n", "\n"):
            answer.write(piece)
        shown = console.file.getvalue()
        assert [shown.count(f"Paragraph {m}.") for m in range(n + 1)] == [1] * n + [0]
    answer.finish()
    assert console.file.getvalue().count("Paragraph 49.") == 1


def test_a_text_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b]0;title\x07b\tc\nd\r\x9b31m\u202eé") == "a�]0;title�b\tc\nd��31m�é"
