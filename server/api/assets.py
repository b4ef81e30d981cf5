"""The files of the chat page: our modules in `static/chat/` and the libraries in `static/vendor/`.

Their addresses contain a hash of all of them, so a browser keeps each file for good and never mixes two versions.
"""

from __future__ import annotations

import gzip
import hashlib
from functools import cache
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..http.body import off_loop

STATIC = Path(__file__).parent / "static"
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".woff2": "font/woff2",
}
IS_COMPRESSED = (".woff2",)
FILES = {
    path.relative_to(STATIC).as_posix(): path
    for folder in ("chat", "vendor")
    for path in sorted((STATIC / folder).rglob("*"))
    if path.suffix in TYPES
}
"""Every file that is served, by its path below `static/`: a request chooses only from this table."""


def _version() -> str:
    digest = hashlib.sha256()
    for name, path in FILES.items():
        digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


VERSION = _version()
ASSET_PATHS = frozenset(f"/static/{VERSION}/{name}" for name in FILES)


def accepts_gzip(request: Request) -> bool:
    """Whether the client takes gzip; a weight of zero refuses it."""
    for item in request.headers.get("accept-encoding", "").lower().split(","):
        coding, _, weight = item.replace(" ", "").partition(";q=")
        if coding == "gzip":
            return weight.strip("0.") != "" or not weight
    return False


@cache
def compressed(path: Path) -> bytes:
    """Return a file's bytes for `content-encoding: gzip`."""
    return gzip.compress(path.read_bytes(), 9, mtime=0)


async def send_asset(request: Request) -> Response:
    """Send a file of the current version; any other address is a 404."""
    version, name = request.path_params["version"], request.path_params["name"]
    path = FILES.get(name)
    if version != VERSION or path is None:
        raise HTTPException(404)
    headers = {"cache-control": "public, max-age=31536000, immutable", "x-content-type-options": "nosniff"}
    if path.suffix in IS_COMPRESSED:
        data = path.read_bytes()
    else:
        headers["vary"] = "accept-encoding"
        if accepts_gzip(request):
            data = await off_loop(compressed, path)
            headers["content-encoding"] = "gzip"
        else:
            data = path.read_bytes()
    return Response(data, media_type=TYPES[path.suffix], headers=headers)
