"""`--uds`: a socket file that is this server's own, for this user only, and gone when the server is."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.serving import PATIENCE, environment, wait_for
from support.warm import Process

from pyllm.server.flags import ConfigError
from pyllm.server.listen import listen_on_file


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for a socket's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


def start(checkpoint: Path, path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pyllm", "serve", str(checkpoint), "--dtype", "float32", "--uds", str(path)]
    return Process(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())


def is_ready(process: subprocess.Popen[bytes], path: Path) -> bool:
    assert process.poll() is None
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
            client.sendall(b"GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            return client.makefile("rb").readline().startswith(b"HTTP/1.1 200 ")
        except OSError:
            return False


def test_a_second_server_is_refused_and_a_dead_one_replaced(checkpoint: Path, folder: Path) -> None:
    path = folder / "socket"
    with start(checkpoint, path) as first:
        try:
            wait_for(lambda: is_ready(first, path), "the first server")
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            with start(checkpoint, path) as second:
                _, said = second.communicate(timeout=PATIENCE)
            assert second.returncode == 2
            (line,) = said.decode().splitlines()
            assert line.startswith(f"pyllm: Cannot listen on the socket {path} (another server listens there): ")
            assert is_ready(first, path), "the first one still serves"
        finally:
            first.kill()
            first.communicate()
    assert path.is_socket(), "a killed server leaves its file"
    with start(checkpoint, path) as third:
        wait_for(lambda: is_ready(third, path), "the next server")
        third.send_signal(signal.SIGTERM)
        third.communicate(timeout=PATIENCE)
    assert third.returncode == 0
    assert not path.exists()


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "file": (Path.touch, "not a socket"),
    "folder": (Path.mkdir, "not a socket"),
    "FIFO": (os.mkfifo, "not a socket"),
    "link": (lambda path: path.symlink_to(path.with_name("elsewhere")), "not a socket"),
    "link to a socket": (lambda path: path.symlink_to(bound(path.with_name("other"))), "not a socket"),
    "datagrams": (lambda path: bound(path, socket.SOCK_DGRAM, close=False), "wrong type"),
}  # fmt: skip
kept = []


def bound(path: Path, kind: int = socket.SOCK_STREAM, *, close: bool = True) -> Path:
    """A socket's file."""
    one = socket.socket(socket.AF_UNIX, kind)
    one.bind(str(path))
    one.close() if close else kept.append(one)
    return path


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_servers_socket_is_refused_and_stays(folder: Path, kind: str) -> None:
    make, words = ODD[kind]
    path = folder / "socket"
    make(path)
    before = path.lstat()
    with pytest.raises(
        ConfigError, match=rf"^Cannot listen on the socket {path} \(.*{words}.*\): choose another --uds"
    ):
        listen_on_file(str(path))
    assert path.lstat().st_ino == before.st_ino
    while kept:
        kept.pop().close()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/tmp/" + "x" * 103, "108 bytes, but a socket's has at most 107"),
        ("/tmp/" + "é" * 60, "125 bytes"),
        ("/nowhere/socket", "no such file or directory"),
        ("/dev/null/socket", "not a directory"),
        ("/proc/socket", "Cannot listen on the socket /proc/socket"),
        ("/tmp", "not a socket"),
        ("/tmp/", "not a socket"),
        ("@name", "is an abstract name"),
    ],
)
def test_a_path_that_cannot_be_is_refused_in_one_sentence(path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        listen_on_file(path)
    assert words in str(caught.value)
    assert str(caught.value).endswith(".")


def test_only_the_own_file_is_removed(folder: Path) -> None:
    path = folder / "socket"
    listener, remove = listen_on_file(str(path))
    listener.close()
    successor, remove_its = listen_on_file(str(path))
    remove()
    assert path.is_socket(), "it is the successor's by now"
    remove_its()
    assert not path.exists()
    remove_its()
    successor.close()
