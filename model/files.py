"""Read the text files of a checkpoint within bounds: anything odd in one becomes a `CheckpointError`."""

from __future__ import annotations

import json
import re
import reprlib
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_BYTES = 32 << 20  # of one file: an index of 300,000 tensors
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_values = reprlib.Repr()
_values.maxstring = _values.maxother = 100


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the path and what to do."""


def shown(value: Any) -> str:
    """Return a value of a file for a message: short, however long or deeply nested it is."""
    return _values.repr(value)


def folder_of(path: Path, file: str = "config.json") -> Path:
    """Return the folder of a checkpoint, given the folder or one of its files.

    If the folder holds many checkpoints, return the newest one's, unless `file` is in the outer folder.
    """
    try:
        if path.is_file():
            return path.parent
        pack = None if (path / file).exists() else newest_pack(entry.name for entry in path.iterdir() if entry.is_dir())
        return path / pack if pack and (path / pack / file).exists() else path
    except OSError:  # reading it gives the reason
        return path


def newest_pack(names: Iterable[str]) -> str | None:
    """Return the name `token_pack_NNN_TOKENS` with the highest NNN."""
    packs = {
        int(match[1]): name for name in sorted(names) if (match := re.fullmatch(r"token_pack_(\d{1,18})_.+", name))
    }
    return packs[max(packs)] if packs else None


def is_present(path: Path) -> bool:
    """Return whether there is a file at `path`; raise `CheckpointError` if it cannot be read, such as a FIFO."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "folder" if stat.S_ISDIR(mode) else "device, pipe or socket"
            raise CheckpointError(f"{path} is a {kind} where a file must be: replace it with the checkpoint's file.")
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to a file that does not exist: fetch it again.") from None
        return False
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check it, or fetch it again.") from None
    if start == LFS_POINTER:
        raise CheckpointError(f"{path} is only a Git LFS pointer to the file: run `git lfs pull` in its folder.")
    return True


def read_text(path: Path, *, most: int = MAX_BYTES) -> str | None:
    """Return a file's text without its byte order mark, None if there is no such file; raise `CheckpointError`."""
    if not is_present(path):
        return None
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read (byte {error.start} is not UTF-8): fetch it again.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check it, or fetch it again.") from None
    if len(content) > most:
        raise CheckpointError(f"{path} has more than {most >> 20} MiB: fetch it again.")
    if not text.strip():
        raise CheckpointError(f"{path} is empty: fetch it again.")
    return text


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, None if there is no such file; raise `CheckpointError` if it is broken."""
    text = read_text(path)
    if text is None:
        return None
    try:
        values = json.loads(text, object_pairs_hook=_object)
        if "\\ud" in text.lower():  # a lone surrogate is not text
            json.dumps(values, ensure_ascii=False).encode()
    except RecursionError:
        raise CheckpointError(f"{path} cannot be read as JSON (it is nested too deeply): fetch it again.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): fetch it again.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object: fetch it again.")
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; raise `ValueError` if a key has two values, since only its author knows which is right."""
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if value != values[key]:
                raise ValueError(f"the key {shown(key)} has the values {shown(value)} and {shown(values[key])}")
    return values
