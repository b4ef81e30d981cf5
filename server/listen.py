"""Where a server listens: addresses of this machine, or a Unix socket; and its certificate."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .flags import ConfigError

UNSENT_BYTES = 128 * 2**10  # how much of a response the system buffers; with more, slow clients would look fast
SOCKET_PATH_BYTES = 107  # the longest path that Linux accepts
LOCK_SECONDS = 5.0
# OpenSSL's names for a key and a certificate that do not belong together.
MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")


def check_certificate(key: str | None, certificate: str | None) -> None:
    """Raise `ConfigError` if HTTPS cannot use the files."""
    if not key or not certificate:
        raise ConfigError("HTTPS needs both --ssl-keyfile and --ssl-certfile.")
    for flag, path in (("--ssl-keyfile", key), ("--ssl-certfile", certificate)):
        try:
            if not Path(path).is_file():
                Path(path).stat()  # raises the reason if it does not exist
                raise ConfigError(f"{flag} {path} is not a file: pass a PEM file.")
            Path(path).open("rb").close()
        except OSError as error:
            raise ConfigError(f"{flag} {path} cannot be read: {error.strerror}.") from None
    try:
        # OpenSSL would ask for the password of an encrypted key on the terminal; an empty one makes it fail.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, lambda: "")
    except ssl.SSLError as error:
        reason = error.reason.replace("_", " ").lower() if error.reason else "not unencrypted PEM"
        if error.reason in MISMATCHES:
            reason = "they do not belong together"
        raise ConfigError(f"--ssl-keyfile {key} and --ssl-certfile {certificate} cannot be used: {reason}.") from None


def listen_on_addresses(host: str, port: int) -> list[socket.socket]:
    """Listen on the addresses of `host` that this machine has; raise `ConfigError` if there are none, or one fails."""
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, *_, address in dict.fromkeys(found):
            chosen = sockets[0].getsockname()[1] if sockets else port
            try:
                both = address[0] == "::" and socket.has_dualstack_ipv6()  # all addresses, those of IPv4 too
                listener = socket.create_server((address[0], chosen, *address[2:]), family=family, dualstack_ipv6=both)
                sockets.append(listener)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error  # such as ::1 of `localhost` on a machine without IPv6
        if missing is not None and not sockets:
            raise missing
    except (OSError, UnicodeError) as error:
        for listener in sockets:
            listener.close()
        reason = (getattr(error, "strerror", None) or str(error)).lower().partition(" (while")[0]
        raise ConfigError(f"Cannot listen on {host:.200}:{port} ({reason}): choose another --host or --port.") from None
    for listener in sockets:
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    return sockets


def listen_on_file(path: str) -> tuple[socket.socket, Callable[[], None]]:
    """Listen on a Unix socket that only this user can open; return it and a function that removes its file.

    A file left by a killed server is replaced. Raises `ConfigError` if another server listens there, or the
    socket cannot be made.
    """
    if path.startswith("@"):
        raise ConfigError(f"--uds {path:.200} is an abstract name, which every user could open: pass a path.")
    if (length := len(os.fsencode(path))) > SOCKET_PATH_BYTES:
        raise ConfigError(f"--uds has a path of {length} bytes, but a socket's has at most {SOCKET_PATH_BYTES}.")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _locked(os.path.dirname(path) or os.curdir):
            _remove_stale(path)
            listener.bind(path)
            made = _identity(path)
            os.chmod(path, 0o600)  # before it listens, so that no other user can have connected
            listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Cannot listen on the socket {path} ({(error.strerror or str(error)).lower()}): choose another --uds."
        ) from None

    def remove() -> None:
        with contextlib.suppress(OSError):
            if _identity(path) == made:  # another server may have replaced it
                os.unlink(path)

    return listener, remove


def _identity(path: str) -> tuple[int, int, int]:
    """Identify a file among earlier and later ones of its name, since a file system reuses inodes at once."""
    status = os.lstat(path)
    return status.st_dev, status.st_ino, status.st_mtime_ns


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Let servers that start at the same time look at a folder's sockets one after the other."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + LOCK_SECONDS  # another program may hold the lock for its own purpose
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(path: str) -> None:
    """Remove a socket on which nothing listens; raise `OSError` if the path is anything else."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "it is a file, folder or link, not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except TimeoutError:  # too many connections wait to be accepted
            pass
    raise OSError(errno.EADDRINUSE, "another server listens there")
