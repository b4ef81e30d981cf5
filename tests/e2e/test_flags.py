"""Flags whose effect shows only in a whole server: HTTPS, JSON logs, and what is refused at the start."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from support.serving import PATIENCE, ServerProcess, run_command

from pyllm.model.cpu.library import SETS, find_obstacle, usable_sets


def test_https_json_logs_own_defaults_and_vllms_metric_names(
    https_pair: tuple[Path, Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = https_pair
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    flags = ["--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), "--log-format", "json"]
    flags += ["--override-generation-config", '{"temperature": 0}', "--metrics-vllm-names", "--dtype", "float32"]
    with ServerProcess(tmp_path / "log", str(checkpoint), *flags) as server:
        assert server.url.startswith("https://")
        body = {"prompt": "Hello", "max_tokens": 5}
        answers = {
            httpx.post(f"{server.url}/v1/completions", json=body, headers={"x-request-id": "me"}).json()["choices"][0][
                "text"
            ]
            for _ in range(3)
        }
        assert len(answers) == 1, "greedy, as the flag says"
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}) as response:
            assert "data: [DONE]" in response.read().decode()
        metrics = httpx.get(f"{server.url}/metrics").text
        assert "vllm:generation_tokens_total{" in metrics
        lines = [json.loads(line) for line in server.log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert any("temperature = 0.0 from --override-generation-config" in line["message"] for line in lines)
    line = next(line for line in lines if line.get("id") == "me")
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert line["tokens"] == {"prompt": 5, "cached": 0, "completion": 5}
    assert 0 < line["seconds"] < PATIENCE


def test_stalled_tls_handshake_is_closed_and_delays_no_one(
    https_pair: tuple[Path, Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = https_pair
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    flags = ["--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), "--header-timeout", "1"]
    with ServerProcess(tmp_path / "log", str(checkpoint), *flags) as server:
        address = "127.0.0.1", httpx.URL(server.url).port
        idle = [socket.create_connection(address, timeout=30) for _ in range(60)]  # OpenSSL alone would wait a minute
        for connection in idle[::2]:
            connection.sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a handshake
        body = {"prompt": "Hello", "max_tokens": 2}
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
        for connection in idle:
            with contextlib.suppress(ConnectionError):
                assert connection.recv(1) == b""
            connection.close()
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
        assert "Traceback" not in server.log


def test_idle_https_connections_are_evicted_at_once(
    https_pair: tuple[Path, Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where their clients do not agree to the end of the connection, as those that wait for nothing do not."""
    key, certificate = https_pair
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    flags = ["--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), "--max-connections", "5"]
    context = ssl.create_default_context(cafile=str(certificate))
    with ServerProcess(tmp_path / "log", str(checkpoint), *flags) as server, contextlib.ExitStack() as stack:
        address = "127.0.0.1", httpx.URL(server.url).port
        for _ in range(5):
            connection = stack.enter_context(socket.create_connection(address, timeout=PATIENCE))
            stack.enter_context(context.wrap_socket(connection, server_hostname=address[0]))
        time.sleep(0.7)
        assert [httpx.get(f"{server.url}/health").status_code for _ in range(10)] == [200] * 10


def refusal(*flags: str, **variables: str) -> str:
    """The one sentence with which `pyllm serve` refuses to start."""
    done = run_command("serve", *flags, "--port", "0", **variables)
    assert done.returncode == 2, done.stderr
    return done.stderr.splitlines()[-1]


def test_keys_that_cannot_serve_https_are_refused(https_pair: tuple[Path, Path], tmp_path: Path) -> None:
    key, certificate = map(str, https_pair)
    other, locked = str(tmp_path / "other.pem"), str(tmp_path / "locked.pem")
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", other], check=True, capture_output=True)
    lock = ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", locked]
    subprocess.run(lock, check=True, capture_output=True)
    assert "both --ssl-keyfile and --ssl-certfile" in refusal("--ssl-keyfile", key)
    missing = refusal("--ssl-keyfile", "/no/key", "--ssl-certfile", certificate)
    assert missing == "pyllm: --ssl-keyfile /no/key cannot be read: No such file or directory."
    for wrong in (other, locked, certificate):
        assert "cannot be used" in refusal("--ssl-keyfile", wrong, "--ssl-certfile", certificate)
    assert "do not belong together" in refusal("--ssl-keyfile", other, "--ssl-certfile", certificate)


def test_determinism_is_refused_where_plain_torch_would_compute() -> None:
    assert "--deterministic needs the compiled CPU kernels" in refusal("--deterministic", PYLLM_NATIVE="0")


def test_an_instruction_set_that_cannot_compute_is_refused() -> None:
    sentence = refusal(PYLLM_CPU_ISA="sse9")
    assert sentence.startswith("pyllm: PYLLM_CPU_ISA is sse9, but there is no such instruction set: set it to ")
    assert sentence.endswith("none.")
    for name in set(SETS).difference(usable_sets()):
        assert f"PYLLM_CPU_ISA is {name}, but {find_obstacle(name)}: set it to " in refusal(PYLLM_CPU_ISA=name)


def test_defaults_that_cannot_be_used_are_refused() -> None:
    sentence = refusal("--override-generation-config", '{"temprature": 1}')
    assert sentence.endswith("'temprature', which is unknown; did you mean temperature?")
    assert "/no/such/folder/generation_config.json, which --generation-config" in refusal(
        "--generation-config", "/no/such/folder"
    )
