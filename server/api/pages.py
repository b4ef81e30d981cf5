"""The pages for people: the chat at `/` and the API reference at `/docs`. Nothing on them comes from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import FileResponse, HTMLResponse, Response

STATIC = Path(__file__).parent / "static"
ASSETS = ("swagger-ui-bundle.js", "swagger-ui.css")
"""The reference's program and style, from the package fastapi-offline, of which only these files are used."""
PAGE_PATHS = frozenset({"/", "/docs", "/openapi.json", *(f"/docs/{name}" for name in ASSETS)})
"""They hold no data, and a browser that opens a page can send no key."""


def add_page_routes(app: FastAPI) -> None:
    """Add the pages and their assets to `app`."""
    chat, reference = (_page(name) for name in ("chat.html", "docs.html"))
    assets = Path(str(files("fastapi_offline"))) / "static"

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return chat

    @app.get("/docs", include_in_schema=False)
    async def reference_page() -> Response:
        return reference

    def add_asset(name: str) -> None:
        @app.get(f"/docs/{name}", include_in_schema=False)
        async def asset() -> Response:
            return FileResponse(assets / name, headers={"x-content-type-options": "nosniff"})

    for name in ASSETS:
        add_asset(name)


def _page(name: str) -> HTMLResponse:
    """A page that may run and load only what it brings itself, and talk only to this server."""
    text = (STATIC / name).read_text(encoding="utf-8")
    scripts, styles = (" ".join(_hashes(text, tag)) for tag in ("script", "style"))
    # Swagger UI writes style attributes, which no hash allows; the chat page has none.
    styles = styles or "'self' 'unsafe-inline'"
    policy = (
        f"default-src 'none'; script-src 'self' {scripts}; style-src {styles}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


def _hashes(text: str, tag: str) -> list[str]:
    """The sources that allow the elements `tag` that stand in a page itself."""
    inside = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in inside]
