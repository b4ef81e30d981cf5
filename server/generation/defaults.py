"""Sampling defaults: from the checkpoint's `generation_config.json` and from flags."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ...engine.errors import RequestError
from ...engine.messages import SamplingParams
from ...model.config import read_generation_config
from ...model.files import CheckpointError, shown
from ..flags import ConfigError

logger = logging.getLogger("pyllm.server")

FILE = "generation_config.json"
DEFAULT_FIELDS = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
DEFAULT_FIELDS["max_new_tokens"] = "max_tokens"
"""The supported keys of the file, and the fields of `SamplingParams` that they set."""

IGNORED = {
    "bad_words_ids": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "guidance_scale": None,
    "min_length": 0, "min_new_tokens": None, "no_repeat_ngram_size": 0, "num_beams": 1, "penalty_alpha": None,
    "sequence_bias": None, "suppress_tokens": None, "typical_p": 1.0,
}  # fmt: skip
"""Keys that change transformers' output and have no effect here, and the values that turn them off."""


def read_defaults(
    folder: Path, source: str = "auto", override: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], str]:
    """Return the defaults as fields of `SamplingParams`, and a sentence about their source.

    `source` is where the file is, as for `read_generation_config`. `override` has values that replace the file's; None
    removes one. Raises `ConfigError` for an unusable flag, `CheckpointError` for an unusable file.
    """
    origin = f"{'the checkpoint' if source == 'auto' else source}'s {FILE}"
    overrides = _overrides(override or {})
    content, path = read_generation_config(folder, source)
    values = {}
    for key in DEFAULT_FIELDS:
        if (value := content.get(key)) is not None and key not in overrides:
            try:
                values[key] = _checked(key, value)
            except ValueError as error:
                reason = f"{str(error).rstrip('.')}: correct it, or pass --override-generation-config"
                raise CheckpointError(
                    f"{path} has {key} = {shown(value)}, but {reason} '{{\"{key}\": null}}'."
                ) from None
    if _is_greedy(content, path) and "temperature" not in overrides:
        values["temperature"] = 0.0
    if ignored := [key for key, off in IGNORED.items() if content.get(key) not in (None, off)]:
        logger.warning("%s sets %s, which have no effect here.", path, ", ".join(ignored))
    replaced = {key: value for key, value in overrides.items() if value is not None}
    parts = [
        ", ".join(f"{key} = {value}" for key, value in found.items()) + f" from {where}"
        for found, where in ((values, origin), (replaced, "--override-generation-config"))
        if found
    ]
    fields = {DEFAULT_FIELDS[key]: value for key, value in (values | replaced).items()}
    return fields, "; ".join([*parts, "else OpenAI's" if parts else "OpenAI's"])


def _is_greedy(content: Mapping[str, Any], path: Path) -> bool:
    """Return whether the file turns sampling off, as `do_sample: false` does at any temperature."""
    sampled = content.get("do_sample")
    if not isinstance(sampled, (bool, type(None))):
        raise CheckpointError(f"{path} has do_sample = {shown(sampled)}, but it must be true or false: correct it.")
    return sampled is False


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
    if name == "max_tokens" and type(value) is int and not 1 <= value < 2**31:
        raise ValueError(f"{key} must be at least 1 and below 2**31, but got {shown(value)}.")
    try:
        return getattr(msgspec.convert({"type": "SamplingParams", name: value}, SamplingParams), name)
    except RequestError as error:
        raise ValueError(str(error).replace(name, key, 1)) from None
    except msgspec.ValidationError as error:
        raise ValueError(f"{str(error).partition(' - ')[0]}.") from None
