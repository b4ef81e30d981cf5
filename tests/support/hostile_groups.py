"""All hostile requests, by group, and the server that they are sent to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from support import hostile_bodies, hostile_bytes, hostile_forms
from support.hostile import Case

SEED = 6
GROUPS: dict[str, Callable[[], Iterable[Case]]] = {
    "fields": lambda: hostile_bodies.fields(SEED),
    "members": lambda: hostile_bodies.members(SEED),
    "whole bodies": hostile_bodies.whole_bodies,
    "special tokens": lambda: hostile_bodies.special_tokens(SEED),
    "caps": hostile_bodies.caps,
    "forms": hostile_forms.forms,
    "templates": hostile_forms.templates,
    "tools": lambda: hostile_forms.tools(SEED),
    "headers": hostile_bytes.headers,
    "bytes": hostile_bytes.odd_bytes,
    "paths": hostile_bytes.paths,
}
FLAGS = ("--served-model-name", "tiny", "--max-model-len", "128")
"""The bundled model; so short a context that no request is large work by right."""
CONCURRENCY = {"forms": 3, "tools": 3, "caps": 1}
"""Where each may be seconds of work by right: two new grammars at a time, or a text of 4 MiB to tokenise."""
