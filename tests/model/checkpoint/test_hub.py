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
from urllib.parse import unquote

import pytest

from pyllm.model.checkpoint.hub import resolve_model
from pyllm.model.config import CheckpointError

COMMIT, OLD = "0123456789abcdef0123456789abcdef01234567", "fedcba9876543210fedcba9876543210fedcba98"
REVISIONS = {"main": COMMIT, COMMIT: COMMIT, "v1.0": OLD, "experiment/long": OLD, OLD: OLD}
REPOSITORY = {
    "config.json": b"{}",
    "model-00001-of-00001.safetensors": b"weights",
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "pytorch_model.bin": b"pickle",
    "checkpoint.pt": b"pickle",
    "modeling_deep.py": b"raise SystemExit",
    "training/optimizer.safetensors": b"moments",
    "training/config.json": b"{}",
    "README.md": b"card",
}
PACKS = {
    "config.json": b"{}",
    "token_pack_011_11B.json": b"{}",
    "token_pack_009_9B/model.safetensors": b"old",
    "token_pack_010_10B/model.safetensors": b"weights",
    "token_pack_010_10B/config.json": b"{}",
    "token_pack_010_10B/optimizer/state.safetensors": b"moments",
}
REPOSITORIES = {"deep": REPOSITORY, "packs": PACKS}
FETCHED = set(list(REPOSITORY)[:7])


class FakeHub(BaseHTTPRequestHandler):
    """Speaks as much of the hub's protocol as a snapshot needs, for one repository."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        name = "packs" if "/org/packs" in path else "deep"
        repository, api = REPOSITORIES[name], f"/api/models/org/{name}"
        kind, _, rest = path.removeprefix(api).removeprefix(f"/org/{name}").strip("/").partition("/")
        commit = REVISIONS.get(unquote(rest) or "main", rest.partition("/")[0])
        headers = {"X-Repo-Commit": commit}
        status = 200
        if path.startswith(api) and kind in ("", "revision") and commit in REVISIONS:
            content = json.dumps({"id": f"org/{name}", "sha": commit, "siblings": []}).encode()
        elif path.startswith(f"{api}/revision/"):
            status, content = 404, b"{}"
            headers["X-Error-Code"] = "RevisionNotFound"
        elif kind == "tree":
            files = [{"type": "file", "path": p, "size": len(c), "oid": p} for p, c in repository.items()]
            content = json.dumps(files).encode()
        elif kind == "resolve":
            file = rest.partition("/")[2]
            content = b'{"old": 1}' if (file, commit) == ("config.json", OLD) else repository[file]
            headers["ETag"] = f'"{file} {len(content)}"'
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


def resolve_in_process(name: str, home: Path, revision: str = "", **environment: str) -> tuple[str, float]:
    """What `resolve_model` returns or refuses with, and its seconds; the library reads its settings at import."""
    code = (
        "import sys\n"
        "from pyllm.model.config import CheckpointError\n"
        "from pyllm.model.checkpoint.hub import resolve_model\n"
        "try:\n    print(resolve_model(sys.argv[1], sys.argv[2] or None))\n"
        "except CheckpointError as error:\n    print('refused:', error)\n"
    )
    kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HTTP", "ALL_PROXY"))}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code, name, revision],
        env=kept | {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"} | environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.strip(), time.monotonic() - started


def test_a_path_that_exists_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert resolve_model(str(tmp_path)) == tmp_path
    file = tmp_path / "model.safetensors"
    file.touch()
    assert resolve_model(str(file)) == file


def test_a_folder_named_like_a_hub_id_is_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "deep").mkdir(parents=True)
    (tmp_path / "org" / "deep" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/deep") == Path("org/deep")


NEEDED = "pass the folder that holds config.json, *.safetensors and tokenizer.json."
GGUF = "in llama.cpp's format, which PyLLM does not read: pass the folder of the model from which it was made, with "
WRONG: dict[str, tuple[tuple[str, ...], str, str]] = {
    # what is in the folder, what is passed, and what is said of it
    "nothing": ((), ".", f"is not a checkpoint, since it has no config.json: {NEEDED}"),
    "source code": (("model/config.py",), ".", f"is not a checkpoint, since it has no config.json: {NEEDED}"),
    "README": (("README.md",), "README.md", f"is not a model: {NEEDED}"),
    "no config": (("model.safetensors",), ".", "has no config.json: copy it there from the checkpoint's source."),
    "weights without config": (("x.safetensors",), "x.safetensors", "has no config.json: copy it there"),
    "config": (("config.json",), "config.json", "is one file of a checkpoint: pass its folder, "),
    "tokenizer": (("config.json", "tokenizer.json"), "tokenizer.json", "is one file of a checkpoint: pass"),
    "index": (("config.json", "m.safetensors.index.json"), "m.safetensors.index.json", "is one file of a checkpoint"),
    "GGUF": (("m-Q4_K_M.gguf",), "m-Q4_K_M.gguf", f"is a GGUF file, {GGUF}config.json, *.safetensors"),
    "GGUF without ending": (("blobs/sha256-1",), "blobs/sha256-1", f"is a GGUF file, {GGUF}"),
    "GGUF next to config": (("config.json", "m.GGUF"), "m.GGUF", f"is a GGUF file, {GGUF}"),
    "GGUF folder": (("README.md", "m.gguf", "n.gguf"), ".", f"holds no config.json but m.gguf, a GGUF file {GGUF}"),
    "adapter": (("adapter_config.json", "adapter_model.safetensors"), ".", "holds an adapter (adapter_config.json)"),
    "training run": (("step-1/config.json", "step-1/x.safetensors", "step-2/config.json", "step-2/x.safetensors"), ".",
                     "is not a checkpoint, but holds several: pass {}/step-2."),
    "hub's cache": (("refs/main", "snapshots/c0ffee/config.json", "snapshots/c0ffee/model.safetensors"), ".",
                    "is not a checkpoint, but holds one: pass {}/snapshots/c0ffee."),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_checkpoint_is_named_with_what_to_pass(tmp_path: Path, kind: str) -> None:
    files, passed, says = WRONG[kind]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"GGUF\x03" if "GGUF" in kind else b"{}")
    with pytest.raises(CheckpointError) as refused:
        resolve_model(str(tmp_path / passed))
    assert str(refused.value).startswith(f"{tmp_path / passed} {says.format(tmp_path)}")


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=r"pipe is a device, pipe or socket: pass the folder that holds"):
        resolve_model(str(tmp_path / "pipe"))


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


def test_only_the_newest_of_many_checkpoints_is_fetched(tmp_path: Path) -> None:
    with serving() as url:
        folder = Path(resolve_in_process("org/packs", tmp_path, HF_ENDPOINT=url)[0])
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {
        "config.json", "token_pack_010_10B/model.safetensors", "token_pack_010_10B/config.json"
    }  # fmt: skip


def test_a_revision_is_a_branch_a_tag_or_a_commit(tmp_path: Path) -> None:
    with serving() as url:
        folders = {
            revision: Path(resolve_in_process("org/deep", tmp_path, revision, HF_ENDPOINT=url)[0])
            for revision in ("", "v1.0", "experiment/long", OLD)
        }
        refused, _ = resolve_in_process("org/deep", tmp_path, "v2.0", HF_ENDPOINT=url)
    texts = {revision: (folder / "config.json").read_text() for revision, folder in folders.items()}
    assert texts == {"": "{}", "v1.0": '{"old": 1}', "experiment/long": '{"old": 1}', OLD: '{"old": 1}'}
    assert refused.startswith(
        "refused: org/deep has no revision 'v2.0': pass a branch, a tag or a commit as --revision"
    )
    offline, _ = resolve_in_process("org/deep", tmp_path, "v1.0", HF_HUB_OFFLINE="1")
    assert Path(offline) == folders["v1.0"]


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is on this machine, and --revision is for hub ids: leave it out"):
        resolve_model(str(tmp_path), "main")


@pytest.mark.parametrize(
    "name", ["x" * 5000, "~no-such-user/x", "a\0b", "/proc/self/mem/x", os.fsdecode(b"/tmp/\xff"), "/tmp/" + "x" * 300]
)
def test_a_path_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        resolve_model(name)
    assert len(str(refused.value)) < 500


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
