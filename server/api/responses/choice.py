"""Which store of responses the flags name."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from ...flags import ConfigError, ServerConfig
from ...http.budget import MemoryBudget
from .redis_store import RedisStore
from .sqlite_store import SqliteStore
from .store import Bounds, ResponseStore

MEMORY_RESPONSES, SHARED_RESPONSES = 4096, 10**6
MEMORY_BYTES, SHARED_BYTES = 64 * 2**20, 10**9
TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
FORMS = "memory, sqlite:///path/to/file, redis://host:port/number or rediss://host:port/number"


def make_store(config: ServerConfig, budget: MemoryBudget) -> ResponseStore:
    """Make the store that the flags name, without connecting to it; raise `ConfigError` if they name none."""
    size, seconds = config.response_store_size, config.response_ttl
    if config.response_store == "memory":
        most = min(MEMORY_BYTES, budget.limit // 8) if size is None else size
        return SqliteStore(None, Bounds(MEMORY_RESPONSES, most, seconds), budget)
    bounds = Bounds(SHARED_RESPONSES, SHARED_BYTES if size is None else size, seconds)
    try:
        url = urlsplit(config.response_store)
        port = url.port
    except ValueError:
        raise _invalid("it is not a URL") from None
    if url.scheme == "sqlite":
        return SqliteStore(_path(url), bounds)
    if url.scheme in ("redis", "rediss"):
        return _redis(url, 6379 if port is None else port, bounds)
    raise _invalid("it is none of these")


def _invalid(problem: str) -> ConfigError:
    # Without the value, which may have a password.
    return ConfigError(f"--response-store must be {FORMS}: {problem}.")


def _path(url: SplitResult) -> Path:
    path = unquote(url.path)
    if url.netloc or not path.strip("/") or "\0" in path:
        raise _invalid("sqlite:// needs three slashes, and then a path from the root, such as sqlite:///var/lib/x.db")
    if url.query or url.fragment:
        raise _invalid("a file has no options after ? or #")
    return Path(path.removeprefix("/") if path.startswith("/~") else "/" + path.lstrip("/")).expanduser()


def _redis(url: SplitResult, port: int, bounds: Bounds) -> RedisStore:
    number = url.path.strip("/") or "0"
    if not url.hostname or not (number.isascii() and number.isdecimal() and len(number) < 6) or url.fragment:
        raise _invalid("the host or the number of the database is missing or wrong")
    options: dict[str, Any] = {"host": url.hostname, "port": port, "db": int(number)}
    if url.username:
        options["username"] = unquote(url.username)
    if url.password:
        options["password"] = unquote(url.password)
    files = dict(parse_qsl(url.query, keep_blank_values=True))
    for name in files:
        if name not in TLS_FILES or url.scheme == "redis":
            raise _invalid(f"{name[:50]!r} is no option of {url.scheme}:// (rediss:// has {', '.join(TLS_FILES)})")
    if url.scheme == "rediss":
        _check_files(files)
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    name = f"{url.scheme}://{host}:{port}/{number}"  # without the password
    return RedisStore(name, bounds, tls=url.scheme == "rediss", **options, **files)


def _check_files(files: dict[str, str]) -> None:
    """Raise `ConfigError` unless these files can be used for TLS."""
    try:
        context = ssl.create_default_context(cafile=files.get("ssl_ca_certs"))
        if "ssl_certfile" in files:
            context.load_cert_chain(files["ssl_certfile"], files.get("ssl_keyfile"))
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"--response-store: its files for TLS cannot be used: {error.strerror or error}.") from None
