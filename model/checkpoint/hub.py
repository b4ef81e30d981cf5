"""Checkpoints by name: a folder on this machine, or a model on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from ..files import CheckpointError, folder_of, newest_pack

# The files that serving reads, and no file that can run code: no pickles, no Python.
FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
NO_FILES = ("*/*.safetensors", "*/*.json")  # the patterns' `*` also matches folders, which hold training states
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
WEIGHTS_ENDINGS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
)  # of one file; the loader says why pickles are refused
FILE_ENDINGS = (*WEIGHTS_ENDINGS, ".json", ".gguf")
NEEDED = "the folder that holds config.json, *.safetensors and tokenizer.json"


def resolve_model(
    name_or_path: str,  # a path that exists, or a hub id `organisation/name`
    revision: str | None = None,  # branch, tag or commit on the hub
) -> Path:
    """Return the folder (or weights file) of a checkpoint, fetched from the hub if there is no such path.

    A download continues where an earlier one stopped, shows its progress and is kept in the hub's cache. A cached copy
    is used if the hub cannot be reached. Raises `CheckpointError` if there is no such path or model, or no connection.
    """
    try:
        path = Path(name_or_path).expanduser()
        exists = path.exists()
        str(path.resolve()).encode()
    except UnicodeEncodeError:
        name = name_or_path.encode("utf-8", "replace").decode()
        raise CheckpointError(f"The path of {name} is not UTF-8: rename its folders.") from None
    except (OSError, ValueError, RuntimeError) as error:  # it is too long, may not be read, or begins with `~`
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise CheckpointError(f"{name_or_path:.200} cannot be read ({reason}): pass the checkpoint's folder.") from None
    if exists:
        if revision is not None:
            raise CheckpointError(f"{path} is on this machine, and --revision is for hub ids: leave it out.")
        if (problem := _what_else(path)) is not None:
            raise CheckpointError(f"{path} {problem}.")
        return path
    if not HUB_ID.fullmatch(name_or_path) or name_or_path.endswith(FILE_ENDINGS):
        raise CheckpointError(
            f"{name_or_path:.200} is neither a path that exists nor a hub id like organisation/name: "
            "pass the folder that holds config.json and model.safetensors, as in pyllm serve /path/to/folder."
        )
    return _fetch(name_or_path, revision)


def _what_else(path: Path) -> str | None:
    """Return the end of a sentence that says what a path is, and what to do, if it is clearly not a checkpoint."""
    folder = folder_of(path)
    in_checkpoint = os.path.lexists(folder / "config.json")
    gguf = (
        "in llama.cpp's format, which PyLLM does not read: pass the folder of the model from which it was made, with "
    )
    gguf += "config.json, *.safetensors and tokenizer.json"
    if not path.is_dir() and path.suffix not in WEIGHTS_ENDINGS:
        if not path.is_file():
            return f"is a device, pipe or socket: pass {NEEDED}"
        if path.suffix.lower() == ".gguf" or _begins_with(path, b"GGUF"):
            return f"is a GGUF file, {gguf}"
        return (
            f"is one file of a checkpoint: pass its folder, {folder}"
            if in_checkpoint
            else f"is not a model: pass {NEEDED}"
        )
    if in_checkpoint:
        return None
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"holds no config.json but {ggufs[0].name}, a GGUF file {gguf}"
    if (folder / "adapter_config.json").exists():
        return (
            "holds an adapter (adapter_config.json), not a model: merge it into its model, and pass the result's folder"
        )
    if any(folder.glob("*.safetensors")):
        return "has no config.json: copy it there from the checkpoint's source"
    # Such as the hub's cache, a training run, or a collection of models.
    inner = [
        found.parent for pattern in ("*", "snapshots/*") for found in sorted(folder.glob(f"{pattern}/config.json"))
    ]
    if models := [inside for inside in inner if any(inside.glob("*.safetensors"))]:
        return f"is not a checkpoint, but holds {'one' if len(models) == 1 else 'several'}: pass {models[-1]}"
    return f"is not a checkpoint, since it has no config.json: pass {NEEDED}"


def _begins_with(path: Path, start: bytes) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(len(start)) == start
    return False


def _fetch(hub_id: str, revision: str | None) -> Path:
    # Slow to import, and only needed here.
    from huggingface_hub import HfApi, constants, snapshot_download

    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": list(FILES), "ignore_patterns": list(NO_FILES)}
    try:
        # A download sends the same request first, but without a timeout.
        HfApi().model_info(hub_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # the errors of several libraries, and of several versions of them
        try:
            return Path(snapshot_download(hub_id, local_files_only=True, **wanted))
        except Exception:
            raise _refusal(hub_id, revision, error) from None
    try:
        folder = Path(snapshot_download(hub_id, **wanted))
        if not any(folder.glob("*.safetensors")):
            names = HfApi().list_repo_files(hub_id, revision=revision)
            if pack := newest_pack(name.partition("/")[0] for name in names if "/" in name):
                wanted |= {kind: [f"{pack}/{name}" for name in wanted[kind]] for kind in wanted if kind != "revision"}
                snapshot_download(hub_id, **wanted)
        return folder
    except Exception as error:
        raise _refusal(hub_id, revision, error) from None


def _refusal(hub_id: str, revision: str | None, error: Exception) -> CheckpointError:
    from huggingface_hub import errors

    detail = f"{type(error).__name__}: {' '.join(str(error).split())[:200].rstrip('.')}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        reason = "is not in the hub's cache, and HF_HUB_OFFLINE is set: unset it"
    elif isinstance(error, errors.GatedRepoError):
        reason = "is gated: ask for access on its page and log in with `hf auth login`"
    elif isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        reason = "is not on the hub, or is private: check the name, or log in with `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = f"has no revision {revision!r:.200}: pass a branch, a tag or a commit as --revision"
    elif isinstance(error, errors.HfHubHTTPError):
        reason = f"could not be fetched from the hub ({detail}): try again"
    elif getattr(error, "errno", None) is not None:
        reason = f"cannot be stored on this machine ({detail}): free disk space, or set HF_HOME to another folder"
    else:
        reason = f"is not in the hub's cache, and the hub cannot be reached ({detail}): check the connection"
    return CheckpointError(f"{hub_id} {reason}, or pass a folder: pyllm serve /path/to/folder.")
