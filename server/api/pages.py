"""The browser pages: the chat at `/` and the API reference at `/docs`. They load nothing from other servers."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route

from ..http.errors import JsonResponse
from .assets import ASSET_PATHS, STATIC, VERSION, accepts_gzip, send_asset

ASSETS = ("swagger-ui-bundle.js", "swagger-ui.css")  # of the API reference: the only files of fastapi-offline in use
NO_SNIFFING = {"x-content-type-options": "nosniff"}
PAGE_HEADERS = NO_SNIFFING | {"referrer-policy": "no-referrer", "cache-control": "no-cache"}
CHAT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
"""No inline script or style, and no text becomes markup except through DOMPurify."""
PAGE_PATHS = ASSET_PATHS | {"/", "/v1", "/v1/", "/docs", "/openapi.json", *(f"/docs/{name}" for name in ASSETS)}
"""They need no key: they hold no data, and a browser that opens a page cannot send one."""


def add_page_routes(app: FastAPI) -> None:
    """Add the pages and their assets to `app`."""
    assets = Path(str(files("fastapi_offline"))) / "static"
    pages: dict[str, Any] = {"/": _chat_page(), "/docs": _page("docs.html")}
    pages |= {f"/docs/{name}": partial(_asset, assets / name) for name in ASSETS}
    pages["/static/{version}/{name:path}"] = send_asset
    app.router.routes += [Route(path, page, methods=["GET"]) for path, page in pages.items()]


def methods_of(route: Route) -> list[str]:
    """Return the methods that a route answers; HEAD is answered like GET."""
    methods = route.methods or set()
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


def add_base_route(app: FastAPI, routes: Sequence[Route], root: str) -> None:
    """Add a route at the base URL that lists the routes, under the path `root`; for people in a browser too."""
    listed = [
        f"{method} {route.path}"
        for route in routes
        for method in methods_of(route)
        if method != "HEAD" and not route.path.startswith("/static/")
    ]

    async def show(request: Request) -> Response:
        places = {"chat_page": "/", "reference": "/docs", "models": "/v1/models", "health": "/health"}
        shown = {"message": "This is the base URL of an API like OpenAI's."}
        return JsonResponse(
            shown | {name: root.rstrip("/") + path for name, path in places.items()} | {"endpoints": sorted(listed)}
        )

    app.router.routes += [Route(path, show, methods=["GET"]) for path in ("/v1", "/v1/")]


async def _asset(path: Path, request: Request) -> Response:
    # Always the whole file, since Starlette's answer to a bad range is not JSON.
    request.scope["headers"] = [header for header in request.scope["headers"] if header[0] != b"range"]
    return FileResponse(path, headers=NO_SNIFFING)


def _chat_page() -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint of the chat page, which is a small frame around its modules."""
    text = (STATIC / "chat.html").read_text(encoding="utf-8").replace("{version}", VERSION)
    etag = f'"{hashlib.sha256(text.encode()).hexdigest()[:16]}"'
    headers = PAGE_HEADERS | {"content-security-policy": CHAT_POLICY, "etag": etag, "vary": "accept-encoding"}
    small = gzip.compress(text.encode(), 9, mtime=0)

    async def show(request: Request) -> Response:
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if accepts_gzip(request):
            return HTMLResponse(small, headers=headers | {"content-encoding": "gzip"})
        return HTMLResponse(text, headers=headers)

    return show


def _page(name: str) -> HTMLResponse:
    """Return a page that may run and load only its own contents, and connect only to this server."""
    text = (STATIC / name).read_text(encoding="utf-8")
    scripts, styles = _hashes(text, "script"), _hashes(text, "style")
    policy = (
        f"default-src 'none'; script-src 'self' {scripts}; style-src 'self' {styles}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(text, headers=PAGE_HEADERS | {"content-security-policy": policy})


def _hashes(text: str, tag: str) -> str:
    """Return the policy's sources that allow the inline elements `tag` of a page."""
    elements = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    hashes = (base64.b64encode(hashlib.sha256(element.encode()).digest()).decode() for element in elements)
    return " ".join(f"'sha256-{value}'" for value in hashes)
