"""The page on the architecture names the modules that a request passes through."""

from __future__ import annotations

import re
from pathlib import Path

from support.request_path import modules_of_a_chat

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"
OFF_THE_WAY = {
    "engine/client/watchdog.py",  # on a timer
    "engine/host.py",  # when nothing is to be done
    "server/lifetime.py",  # in threads that write the log
}
BACKENDS = {"model/backend.py", "model/cpu/backend.py"}
"""One of them runs."""
MOST = 24
"""Files through which a reader follows a chat."""


def test_page_lists_the_modules_of_a_streamed_chat() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("<!-- way-of-a-request -->")[2].partition("\n\n**")[0]
    listed = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    traced = {module for modules in modules_of_a_chat().values() for module in modules}
    assert len(listed) == len(set(listed)) <= MOST
    assert set(listed) - BACKENDS == traced - BACKENDS - OFF_THE_WAY
    assert BACKENDS & traced <= set(listed)
