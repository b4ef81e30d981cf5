"""The flags that each replica's server gets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ...engine.config import settings_of
from ..flags import ServerConfig

PATHS = ("model", "chat_template", "generation_config", "api_key_file")  # flags that may name a file of this machine
OF_COMMAND = {
    "config", "host", "port", "uds", "ssl_keyfile", "ssl_certfile", "replicas", "max_replicas", "ray_address",
}  # fmt: skip
"""Flags that the command or Ray Serve reads, and no replica."""


def replica_settings(config: ServerConfig) -> dict[str, Any]:
    """Return the flags of a replica that differ from their defaults, with whole paths."""
    settings: dict[str, Any] = {}
    for name, own in settings_of(ServerConfig).items():
        value = getattr(config, name)
        if name in OF_COMMAND or value == own.default:
            continue
        if name in PATHS and (path := Path(value).expanduser()).exists():
            value = str(path.absolute())  # a replica has another working directory
        settings[name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
    return settings
