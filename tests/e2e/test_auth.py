"""Keys: who has none gets nothing, what belongs to one is not shown to another, and they are written nowhere."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.serving import PATIENCE, ServerProcess, run_command

FIRST, SECOND = "first-key-4f9c", "clé-zweite-77aa"
WORDS = "The same words again, so that there is something to share. " * 4
GREEDY = {"max_tokens": 2, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def locked(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with two keys that keeps their caches apart."""
    flags = ("--dtype", "float32", "--api-key", FIRST, "--api-key", SECOND, "--isolate-cache-by-key")
    flags += ("--served-model-name", "tiny", "--log-level", "debug")
    with ServerProcess(tmp_path_factory.mktemp("locked") / "log", str(checkpoint), *flags, cold=True) as server:
        yield server
        for secret in (FIRST, SECOND, SECOND.encode().hex(), repr(SECOND.encode())):
            assert secret not in server.settled_log()


def ask(server: ServerProcess, key: str, method: str, path: str, body: Any = None) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}".encode()}
    return httpx.request(method, f"{server.url}{path}", headers=headers, json=body, timeout=PATIENCE)


def cached_tokens(server: ServerProcess, key: str, **fields: Any) -> int:
    answer = ask(server, key, "POST", "/v1/completions", {"prompt": WORDS} | GREEDY | fields).raise_for_status().json()
    count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


def test_each_key_has_a_cache_of_its_own_and_salts_within_it(locked: ServerProcess) -> None:
    assert cached_tokens(locked, FIRST) == 0
    assert cached_tokens(locked, FIRST) > 100
    assert cached_tokens(locked, SECOND) == 0
    assert cached_tokens(locked, SECOND) > 100
    assert cached_tokens(locked, FIRST, cache_salt="a") == 0
    assert cached_tokens(locked, SECOND, cache_salt="a") == 0
    assert cached_tokens(locked, FIRST, cache_salt="a") > 100


def test_without_the_flag_the_cache_is_shared(checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--dtype", "float32", "--api-key", FIRST, "--api-key", SECOND)
    with ServerProcess(tmp_path / "log", str(checkpoint), *flags) as server:
        assert cached_tokens(server, FIRST) == 0
        assert cached_tokens(server, SECOND) > 100


def test_a_kept_response_is_there_for_its_own_key_alone(locked: ServerProcess) -> None:
    body = {"input": "Remember this", "max_output_tokens": 4, "ignore_eos": True, "store": True}
    kept = ask(locked, FIRST, "POST", "/v1/responses", body).raise_for_status().json()
    path, item = f"/v1/responses/{kept['id']}", kept["output"][0]["id"]
    uses = [
        ("GET", path, None), ("GET", f"{path}/input_items", None), ("POST", f"{path}/cancel", None),
        ("POST", "/v1/responses", {"input": "Continue", "previous_response_id": kept["id"], "max_output_tokens": 4}),
        ("POST", "/v1/responses", {"input": [{"type": "item_reference", "id": item}], "max_output_tokens": 4}),
        ("DELETE", path, None),
    ]  # fmt: skip
    for use in uses:
        answer = ask(locked, SECOND, *use)
        assert answer.status_code in (400, 404), use
        assert "not found" in answer.json()["error"]["message"]
        assert "Remember" not in answer.text
    found = {(use[0], use[1]): ask(locked, FIRST, *use).status_code for use in uses[:2]}
    assert set(found.values()) == {200}
    assert ask(locked, FIRST, *uses[3]).status_code == 200
    assert ask(locked, FIRST, *uses[-1]).status_code == 200


@pytest.mark.parametrize(
    "target",
    [
        "/v1/models", "//v1/models", "/v1/models?/health", "/v1/models#/health", "/v1/models;/health", "/./v1/models",
        "/health/../v1/models", "/health/%2e%2e/v1/models", "/health%2f..%2fv1%2fmodels", "/v1/models/../../health",
        "/HEALTH", "/health/", "/health%00", "/metrics/../version", "/version", "/docs/../version", "/%76%31/models",
        "http://localhost/v1/models", "http://x@localhost/version", "http://health/v1/models", "/v1/models/%2e%2e",
    ],
)  # fmt: skip
def test_no_way_of_writing_a_path_goes_past_the_keys(locked: ServerProcess, target: str) -> None:
    url = httpx.URL(locked.url)
    for host in ("localhost", "localhost/health?", "x/health#"):
        with socket.create_connection((url.host, url.port), timeout=PATIENCE) as connection:
            connection.sendall(f"GET {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        assert int(answer.split()[1]) in (400, 401), answer


def test_wrong_keys_are_refused_however_they_are_given(locked: ServerProcess) -> None:
    wrong = ["", "Bearer", f"Basic {FIRST}", FIRST, f"Bearer {FIRST[:-1]}", f"Bearer {FIRST}x",
             f"Bearer {FIRST.upper()}", f"Bearer {FIRST} {SECOND}", "Bearer \udcff", f"Bearer,{FIRST}"]  # fmt: skip
    for value in wrong:
        headers = {"authorization": value.encode(errors="surrogateescape")}
        assert httpx.get(f"{locked.url}/v1/models", headers=headers).status_code == 401, value
    asked = httpx.get(f"{locked.url}/v1/models?api_key={FIRST}", cookies={"api_key": FIRST})
    assert asked.status_code == 401
    assert FIRST not in asked.text
    assert ask(locked, SECOND, "GET", "/v1/models").status_code == 200


def test_keys_are_not_on_the_engines_command_line(locked: ServerProcess) -> None:
    listing = subprocess.run(["ps", "-o", "args=", "-p", str(locked.engine_pid)], capture_output=True, text=True)
    assert "pyllm.engine" in listing.stdout
    assert FIRST not in listing.stdout


@pytest.mark.parametrize(
    ("words", "yaml"),
    [
        (["model", "--api-key", FIRST, SECOND], ""),
        (["--api-kye", FIRST], ""),
        ([f"--api-kye={FIRST}"], ""),
        (["--config", "flags.yaml"], f"api-key: '{FIRST}\nport: 1"),
        (["--config", "flags.yaml"], f"api-key: [{FIRST}, ]]"),
        (["--config", "flags.yaml"], f"api-key:\n  - {FIRST}: 1"),
    ],
)
def test_errors_about_keys_do_not_show_the_key(tmp_path: Path, words: list[str], yaml: str) -> None:
    (tmp_path / "flags.yaml").write_text(yaml)
    done = run_command("serve", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("pyllm: ")
    assert done.stderr.count("\n") == 1
    for key in (FIRST, SECOND):
        assert key not in done.stderr


@pytest.mark.parametrize(("text", "reason"), [(None, "No such file"), ("sk-one sk-two", "line 1"), ("", "has no keys")])
def test_a_bad_file_of_keys_is_one_sentence(tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / "keys").write_text(text)
    done = run_command("serve", "--api-key-file", "keys", "--port", "0", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert reason in done.stderr
    assert "sk-" not in done.stderr


def test_isolation_without_keys_is_a_mistake(tmp_path: Path) -> None:
    done = run_command("serve", "--isolate-cache-by-key", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--api-key" in done.stderr
