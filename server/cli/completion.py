"""Scripts for completing the command line in a shell: they are static, so that a TAB starts no Python."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import shtab

from ...engine.config import settings_of
from ..arguments import make_parser
from ..flags import ModelFlags

SHELLS = ("bash", "zsh", "fish")
FILES = (
    "config", "chat_template", "api_key_file", "ssl_keyfile", "ssl_certfile", "uds", "input_file", "output_file",
    "json_schema",
)  # fmt: skip
FOLDERS = ("model", "_model", "batch_dir", "generation_config")


def script(shell: str, commands: Mapping[str, tuple[type[ModelFlags], str]]) -> str:
    """Return the script for a shell, for `commands` with their flags and descriptions."""
    parser = argparse.ArgumentParser(prog="pyllm", allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version")
    below = parser.add_subparsers()
    for name, (cls, description) in commands.items():
        one = below.add_parser(name, help=description.rstrip("."), allow_abbrev=False)
        make_parser(cls, one)
        known = settings_of(cls)
        for action in one._actions:  # argparse has no public way to list them
            action.help = (action.help or "").partition(" [PYLLM_")[0]
            if action.dest in FILES + FOLDERS:
                action.complete = shtab.FILE if action.dest in FILES else shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.dest in known and known[action.dest].choices:
                action.choices = known[action.dest].choices
    below.add_parser("completion", help="print this script").add_argument("shell", choices=SHELLS)
    return str(shtab.complete(parser, shell))
