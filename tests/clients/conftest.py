"""The table of clients at the end of a run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

ROWS = pytest.StashKey[list[tuple[str, str, str, str]]]()


@pytest.fixture
def report(pytestconfig: pytest.Config) -> Callable[[str, str, str, str | None], None]:
    """Add a row: the client, its version, what was tried, and the error."""

    def add(client: str, version: str, tried: str, error: str | None) -> None:
        result = "ok" if error is None else error.strip().splitlines()[-1][:200]
        pytestconfig.stash.setdefault(ROWS, []).append((client, version, tried, result))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table, as Markdown."""
    rows = config.stash.get(ROWS, [])
    if rows:
        table = [("client", "version", "what was tried", "result"), ("---",) * 4, *rows]
        for row in table:
            terminalreporter.write_line(f"| {' | '.join(row)} |")
