"""Checkpoints by name: a folder on this machine, or a model on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..files import CheckpointError, newest_pack

# What serving reads, and nothing that can run code: no pickles, no Python.
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
FILE_ENDINGS = (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt")


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
        return path
    if not HUB_ID.fullmatch(name_or_path) or name_or_path.endswith(FILE_ENDINGS):
        raise CheckpointError(
            f"{name_or_path:.200} is neither a path that exists nor a hub id like organisation/name: "
            "pass the folder that holds config.json and model.safetensors, as in pyllm serve /path/to/folder."
        )
    return _fetch(name_or_path, revision)


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
            if pack := newest_pack(name.partition("/")[0] for name in names):
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
