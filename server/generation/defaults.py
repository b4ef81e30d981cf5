"""Sampling defaults: from the checkpoint's `generation_config.json` and from flags."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ...engine.errors import RequestError
from ...engine.messages import SamplingParams
from ..flags import ConfigError

logger = logging.getLogger("pyllm.server")

FILE = "generation_config.json"
DEFAULT_FIELDS = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
DEFAULT_FIELDS["max_new_tokens"] = "max_tokens"
"""The keys of the file that are used, and the fields of `SamplingParams` that they set."""


def read_defaults(
    folder: Path, source: str = "auto", override: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], str]:
    """Return the defaults as fields of `SamplingParams`, and a sentence that says where they come from.

    `source` is "auto" (the checkpoint's `folder`), another folder with the file, or "none" (in vLLM's words "vllm").
    `override` has values that replace the file's; None removes one. Raises `ConfigError` for an unusable
    flag; an unusable value of the file is ignored with a warning, since the user did not write it.
    """
    origin = f"{'the checkpoint' if source == 'auto' else source}'s {FILE}"
    overrides = _overrides(override or {})
    content = _read_file(folder, source, origin) if source not in ("none", "vllm") else {}
    values = {}
    for key in DEFAULT_FIELDS:
        if content.get(key) is not None and key not in overrides:
            try:
                values[key] = _checked(key, content[key])
            except ValueError:
                logger.warning("%s has %s = %r, which is ignored.", FILE, key, content[key])
    replaced = {key: value for key, value in overrides.items() if value is not None}
    parts = [
        ", ".join(f"{key} = {value}" for key, value in found.items()) + f" from {where}"
        for found, where in ((values, origin), (replaced, "--override-generation-config"))
        if found
    ]
    fields = {DEFAULT_FIELDS[key]: value for key, value in (values | replaced).items()}
    return fields, "; ".join([*parts, "else OpenAI's" if parts else "OpenAI's"])


def _read_file(folder: Path, source: str, origin: str) -> dict[str, Any]:
    try:
        content = json.loads(((folder if source == "auto" else Path(source)) / FILE).read_bytes())
        if isinstance(content, dict):
            return content
        raise ValueError
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not a JSON object"
        if source != "auto":
            raise ConfigError(f"--generation-config: {origin} cannot be read: {reason}.") from None
        if not isinstance(error, FileNotFoundError):
            logger.warning("%s cannot be read and is ignored: %s.", FILE, reason)
        return {}


def _overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked values of `--override-generation-config`; raises `ConfigError`."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        flag = f"--override-generation-config has {key[:200]!r}"
        if key not in DEFAULT_FIELDS:
            near = difflib.get_close_matches(key, DEFAULT_FIELDS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(DEFAULT_FIELDS)}."
            raise ConfigError(f"{flag}, which is unknown; {hint}")
        try:
            values[key] = None if value is None else _checked(key, value)
        except ValueError as error:
            raise ConfigError(f"{flag} with the value {value!r:.200}: {error}") from None
    return values


def _checked(key: str, value: Any) -> Any:
    """Return a value in its field's type; raises `ValueError` with a sentence if it is out of range."""
    name = DEFAULT_FIELDS[key]
    if name == "max_tokens" and value == 0:
        raise ValueError(f"{key} must be at least 1, but got 0.")
    try:
        return getattr(msgspec.convert({"type": "SamplingParams", name: value}, SamplingParams), name)
    except RequestError as error:
        raise ValueError(str(error).replace(name, key, 1)) from None
    except msgspec.ValidationError as error:
        raise ValueError(f"{str(error).partition(' - ')[0]}.") from None
