"""Models by name: what is a path, what is fetched from the hub, and what is said when it cannot be."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pyllm.model.checkpoint.hub import resolve_model
from pyllm.model.config import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = {
    "config.json": b"{}",
    "model-00001-of-00001.safetensors": b"weights",
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"pickle",
    "checkpoint.pt": b"pickle",
    "modeling_deep.py": b"raise SystemExit",
    "training/optimizer.safetensors": b"moments",
    "README.md": b"card",
}
FETCHED = set(list(REPOSITORY)[:6])


class FakeHub(BaseHTTPRequestHandler):
    """Speaks as much of the hub's protocol as a snapshot needs, for one repository."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        headers = {"X-Repo-Commit": COMMIT}
        status = 200
        if path in ("/api/models/org/deep", "/api/models/org/deep/revision/main"):
            content = json.dumps({"id": "org/deep", "sha": COMMIT, "siblings": []}).encode()
        elif path == f"/api/models/org/deep/tree/{COMMIT}":
            files = [{"type": "file", "path": p, "size": len(c), "oid": p} for p, c in REPOSITORY.items()]
            content = json.dumps(files).encode()
        elif path.startswith(f"/org/deep/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/org/deep/resolve/{COMMIT}/")
            content = REPOSITORY[name]
            headers["ETag"] = f'"{name}"'
        elif "org/gated" in path:
            status, content = 403, b"{}"
            headers["X-Error-Code"] = "GatedRepo"
        else:
            status, content = 404, b"{}"
            headers["X-Error-Code"] = "RepoNotFound"
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def serving() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def resolve_in_process(name: str, home: Path, **environment: str) -> tuple[str, float]:
    """What `resolve_model` returns or refuses with, and its seconds; the library reads its settings at import."""
    code = (
        "import sys\n"
        "from pyllm.model.config import CheckpointError\n"
        "from pyllm.model.checkpoint.hub import resolve_model\n"
        "try:\n    print(resolve_model(sys.argv[1]))\n"
        "except CheckpointError as error:\n    print('refused:', error)\n"
    )
    kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HTTP", "ALL_PROXY"))}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code, name],
        env=kept | {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"} | environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.strip(), time.monotonic() - started


def test_a_path_that_exists_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    file = tmp_path / "model.safetensors"
    file.touch()
    assert resolve_model(str(file)) == file


def test_a_folder_named_like_a_hub_id_is_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/deep") == Path("org/deep")


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "../x/y", "missing", "a/b/c", "a/model.safetensors"])
def test_a_missing_path_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither a path that exists nor a hub id.*pyllm serve /path/to/folder"):
        resolve_model(name)


def test_only_weights_configuration_and_tokenizer_are_fetched(tmp_path: Path) -> None:
    with serving() as url:
        answer, _ = resolve_in_process("org/deep", tmp_path, HF_ENDPOINT=url)
    folder = Path(answer)
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == FETCHED
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == b"weights"
    # The server is gone now; the cache serves.
    again, _ = resolve_in_process("org/deep", tmp_path, HF_ENDPOINT=url)
    assert again == answer
    offline, _ = resolve_in_process("org/deep", tmp_path, HF_HUB_OFFLINE="1")
    assert offline == answer


@pytest.mark.parametrize(("name", "says"), [("org/missing", "is not on the hub"), ("org/gated", "is gated")])
def test_a_model_that_may_not_be_had_is_refused_in_one_sentence(name: str, says: str, tmp_path: Path) -> None:
    with serving() as url:
        answer, _ = resolve_in_process(name, tmp_path, HF_ENDPOINT=url)
    assert answer.startswith(f"refused: {name} {says}")
    assert answer.endswith("or pass a folder: pyllm serve /path/to/folder.")


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached (ConnectError"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set: unset it, or pass"),
    ],
)
def test_without_a_network_the_refusal_comes_quickly(environment: dict[str, str], says: str, tmp_path: Path) -> None:
    answer, seconds = resolve_in_process("org/deep", tmp_path, **environment)
    assert answer.startswith("refused: org/deep is not in the hub's cache, and " + says)
    assert answer.endswith("or pass a folder: pyllm serve /path/to/folder.")
    assert "\n" not in answer
    assert seconds < 30


def test_a_hub_that_takes_the_call_and_says_nothing_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        answer, seconds = resolve_in_process("org/deep", tmp_path, HF_ENDPOINT=endpoint, HF_HUB_ETAG_TIMEOUT="1")
    assert "the hub cannot be reached (ReadTimeout" in answer
    assert seconds < 30
