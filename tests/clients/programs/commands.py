"""Runs a client that is a command, in a folder of its own, against the server."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

FOLDER = Path(os.environ.get("CLIENT_FOLDER", "."))
"""The client's environment."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none", "ANTHROPIC_API_KEY": "none"}


def run(command: list[str], folder: str, **variables: str) -> str:
    """What the command prints; an error with all of it if the command fails."""
    done = subprocess.run(
        command, cwd=folder, env=os.environ | OFFLINE | variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=500, check=False,
    )  # fmt: skip
    if done.returncode:
        raise AssertionError(f"{command[0]} ended with {done.returncode}: {done.stdout[-6000:]}")
    return done.stdout
