"""How `pyllm serve` listens, what it says when it is ready, and how it ends when its HTTP server does."""

from __future__ import annotations

import asyncio
import logging
import os
import socket

import msgspec
import pytest

from pyllm.engine.client.launch import EngineProcess
from pyllm.server import serve as module
from pyllm.server.flags import ConfigError, ServerConfig
from pyllm.server.lifetime import Lifetime
from pyllm.server.listen import listen_on_addresses


class Listener:
    """Replaces the HTTP server: notes where it listens, and ends as configured."""

    def __init__(self, monkeypatch, harness):
        self.addresses = []
        self.error = RuntimeError("out of luck")
        self.loaded = True
        self.process = EngineProcess()
        listener = self

        async def serve(self, sockets=None):
            listener.addresses = [s.getsockname()[:2] for s in sockets]
            await asyncio.sleep(0.05)
            for each in sockets:
                each.close()
            if listener.error is not None:
                raise listener.error

        async def load(config, process, *, names):
            if not listener.loaded:
                await asyncio.Event().wait()
            return harness.model

        def leave(code):
            raise SystemExit(code)

        monkeypatch.setattr(module._HttpServer, "serve", serve)
        monkeypatch.setattr(module, "load", load)
        monkeypatch.setattr(os, "_exit", leave)

    def run(self, **flags):
        try:
            return module.serve(ServerConfig(port=0, **flags), self.process, Lifetime())
        except SystemExit as end:
            return end.code
        finally:
            self.process.kill()


@pytest.fixture
def listener(monkeypatch, harness, caplog):
    caplog.set_level(logging.INFO, logger="pyllm.server")
    return Listener(monkeypatch, harness)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("out of luck"), OSError(22, "out of luck"), None])
def test_failed_http_server_is_reported_with_exit_code_1(listener, caplog, loaded, error):
    listener.loaded, listener.error = loaded, error
    assert listener.run() == 1
    assert "The HTTP server has ended" in caplog.text
    assert ("out of luck" in caplog.text) == (error is not None)
    assert "engine has died" not in caplog.text


def addresses(monkeypatch, *hosts):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in hosts]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


def test_unavailable_address_is_skipped_if_another_binds(listener, monkeypatch):
    addresses(monkeypatch, "203.0.113.7", "127.0.0.1")
    listener.run(host="localhost")
    ((host, port),) = listener.addresses
    assert (host, port > 0) == ("127.0.0.1", True)


def test_a_host_without_any_address_here_is_refused(listener, monkeypatch):
    addresses(monkeypatch, "203.0.113.7", "203.0.113.8")
    with pytest.raises(ConfigError, match=r"^Cannot listen on localhost:0 \(cannot assign requested address\): "):
        listener.run(host="localhost")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_the_host_of_all_ipv6_addresses_takes_ipv4_too():
    (listener,) = listen_on_addresses("::", 0)
    port = listener.getsockname()[1]
    for address in ("127.0.0.1", "::1"):
        socket.create_connection((address, port), timeout=10).close()
    listener.close()


@pytest.mark.parametrize(
    ("dtypes", "source"),
    [(("BF16", "F32"), "read from BF16/F32 files in 2.5 s"), ((), "randomly initialized in 2.5 s")],
)
def test_the_log_tells_what_was_loaded(listener, harness, caplog, dtypes, source):
    harness.engine.info = msgspec.structs.replace(
        harness.engine.info,
        era="TR-Hash native",
        parameters=7_516_544,
        load_seconds=2.5,
        file_dtypes=dtypes,
        active_parameters=7_000_000,
        sizes="2 layers",
        kernels="native",
        instruction_set="avx2",
    )
    listener.run()
    computed = "computed in float32 on cpu by compiled kernels for avx2"
    assert f"era TR-Hash native, 7,516,544 parameters, {source}, {computed}" in caplog.text
    assert "; 7,000,000 parameters are active for a token: 2 layers" in caplog.text
