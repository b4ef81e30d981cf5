"""The health check of the image, against a server that the flags of a process describe."""

from __future__ import annotations

import os
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docker" / "healthcheck.py"
if not Path("/proc/self/cmdline").exists():
    pytest.skip("the image runs Linux", allow_module_level=True)


class Health(BaseHTTPRequestHandler):
    code = 200

    def do_GET(self) -> None:
        self.send_response(self.code if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


class Ipv6Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6


@contextmanager
def running(server: Any) -> Iterator[Any]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def check(*flags: str, cwd: Path | None = None, **variables: str) -> int:
    """The exit code of the check for a process with the flags and variables of a `pyllm serve`."""
    words = [sys.executable, "-c", "input()", "/opt/pyllm/bin/pyllm", "serve", "--host", "127.0.0.1", *flags]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYLLM_")}
    with subprocess.Popen(words, stdin=subprocess.PIPE, env=kept | variables, cwd=cwd) as process:
        command = [sys.executable, str(SCRIPT), str(process.pid)]
        done = subprocess.run(command, timeout=60, capture_output=True, text=True, check=False, env=kept)
        process.kill()
    return done.returncode


def test_the_check_follows_the_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(ThreadingHTTPServer(("127.0.0.1", 0), Health)) as server:
        port = str(server.server_port)
        (tmp_path / "flags.yaml").write_text(f"port: {port}\nhost: 0.0.0.0")
        assert check("--port", port) == 0
        assert check(PYLLM_PORT=port) == 0
        assert check("--config", "flags.yaml", cwd=tmp_path) == 0
        assert check("--host", "0.0.0.0", "--port", port, "--api-key", "k", "--root-path", "/llm") == 0
        monkeypatch.setattr(Health, "code", 503)
        assert check("--port", port) == 1
    assert check("--port", port) == 1


def test_the_check_follows_a_unix_socket(tmp_path: Path) -> None:
    with running(UnixServer(str(tmp_path / "socket"), Health)):
        assert check("--uds", str(tmp_path / "socket")) == 0
        assert check("--uds", "socket", cwd=tmp_path) == 0
    assert check("--uds", str(tmp_path / "other")) == 1


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_the_check_follows_an_ipv6_address() -> None:
    with running(Ipv6Server(("::1", 0), Health)) as server:
        assert check("--host", "::1", "--port", str(server.server_port)) == 0
        assert check("--host", "::", "--port", str(server.server_port)) == 0


@pytest.mark.needs("openssl")
def test_the_check_follows_https(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=elsewhere", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Health)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with running(server):
        port = str(server.server_port)
        assert check("--port", port, "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)) == 0
