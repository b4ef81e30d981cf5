"""Note the product's modules in which a function runs, in every Python process that has this folder on PYTHONPATH.

`request_path.py` starts a server so. Functions are noted while the file `on` exists in the folder that
PYLLM_TRACE_FOLDER names; when it is gone, each process writes its modules to a file named by its process id.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

SECONDS = 0.02
OUTSIDE = {"ConnectionMonitor.watch", "ConnectionMonitor.release"}
"""What runs each second, or when a connection has closed: neither is part of a request, nor what these call."""
seen: set[str] = set()
is_on = False


def note(frame: FrameType, event: str, _: Any) -> None:
    """Profile function: remember the file of a Python function that is called while recording is on."""
    code = frame.f_code
    if is_on and event == "call" and code.co_name != "<module>" and code.co_filename not in seen:
        caller: FrameType | None = frame
        while caller is not None and caller.f_code.co_qualname not in OUTSIDE:
            caller = caller.f_back
        if caller is None:
            seen.add(code.co_filename)


def watch(folder: Path) -> None:
    """Follow the file `on`, and write what was seen once it is gone."""
    global is_on
    while True:
        wanted = (folder / "on").exists()
        if is_on and not wanted:
            is_on = False
            (folder / f"{os.getpid()}.part").write_text("\n".join(sorted(seen)))
            (folder / f"{os.getpid()}.part").rename(folder / f"{os.getpid()}.modules")
        elif wanted and not is_on:
            is_on = True
            (folder / f"{os.getpid()}.ready").touch()
        time.sleep(SECONDS)


threading.Thread(target=watch, args=(Path(os.environ["PYLLM_TRACE_FOLDER"]),), daemon=True).start()
threading.setprofile(note)
sys.setprofile(note)
