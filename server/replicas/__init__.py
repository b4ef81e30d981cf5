"""Many servers behind one address, run by Ray Serve; the only package that imports ray.

`pyllm.server.replicas:app` is the import path for Ray Serve's config files.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Import ray only when the application is asked for; its module has another name, which would hide it."""
    if name == "app":
        from .application import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
