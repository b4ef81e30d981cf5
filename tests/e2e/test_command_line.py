"""The commands as a user types them: help, mistakes, one-shot generation and a talk in the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from openai import OpenAI
from support.serving import PATIENCE, environment, run_command, wait_for
from support.warm import Process

import pyllm

SHORT = ("--dtype", "float32", "--temperature", "0")


def run(*words: str, typed: str = "", setting: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command to its end; `typed` is its standard input, `setting` a line `NAME=value` of its environment."""
    return run_command(*words, typed=typed, **dict([setting.split("=", 1)] if setting else []))


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """It ended with code 2 and said why, in one line."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("pyllm: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize("words", [(), ("serve",), ("generate",), ("chat",), ("check",), ("bench",)])
def test_help_is_given_for_every_command(words: tuple[str, ...]) -> None:
    done = run(*words, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    expected = {"serve": "--max-model-len", "generate": "--repetition-penalty", "chat": "--temperature",
                "check": "--skip-self-test", "bench": "--concurrency"}  # fmt: skip
    for part in [expected[word] for word in words] or expected:
        assert part in done.stdout


def test_check_reports_the_demo_model_as_one_object() -> None:
    done = run("check", "--json", "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["model"], found["verdict"]) == ("pyllm-demo", "passed")
    assert found["tokens"]["stop"] == [{"id": 0, "text": "</s>", "file": "config.json"}]


def test_version_is_printed_with_what_computes() -> None:
    first, second, third = run("--version").stdout.splitlines()
    assert first == f"pyllm {pyllm.__version__}"
    assert second == f"torch {version('torch')}, Python {platform.python_version()}"
    assert re.fullmatch(
        r"CPU kernels: (avx\w+|none, since (the kernels were not compiled|this processor lacks).*)", third
    )
    forced = run("--version", setting="PYLLM_CPU_ISA=none").stdout.splitlines()[-1]
    assert forced.startswith("CPU kernels: none, since")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("serve", "/nonexistent"), ("/nonexistent",)),
        (("serve", "not-a-model"), ("not-a-model",)),
        (("generate", "Hi", "--model", "/nonexistent"), ("/nonexistent",)),
        (("chat", "/nonexistent"), ("/nonexistent",)),
        (("check", "/nonexistent"), ("/nonexistent",)),
        (("serve", "--max-modl-len", "9"), ("--max-modl-len", "did you mean --max-model-len?")),
        (("serve", "--prt=9"), ("--prt", "did you mean --port?")),
        (("generate", "Hi", "--temprature", "1"), ("did you mean --temperature?",)),
        (("serve", "--port", "99999"), ("--port", "65535", "99999")),
        (("serve", "--port", "many"), ("--port", "'many'")),
        (("serve", "--dtype", "float23"), ("--dtype", "did you mean float32?")),
        (("serve", "a", "b"), ("'b'",)),
        (("generate",), ("prompt",)),
        (("server",), ("server", "serve")),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    assert_refused(run(*words), *parts)


def test_a_setting_in_the_environment_is_checked_as_a_flag_is() -> None:
    assert_refused(run("serve", setting="PYLLM_MAX_NUM_SEQS=0"), "PYLLM_MAX_NUM_SEQS")


def test_an_unknown_variable_is_one_warning_and_a_service_none(checkpoint: Path) -> None:
    words = ("generate", "Hi", "--model", str(checkpoint), "--max_tokens", "1", *SHORT)
    done = run(*words, setting="PYLLM_PROT=1")
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.endswith(
        "PyLLM has no environment variable PYLLM_PROT, so it has no effect; did you mean PYLLM_PROMPT?"
    )
    assert run(*words, setting="PYLLM_PORT=tcp://10.96.12.3:8000").stderr == ""


def test_a_context_beyond_the_models_is_refused(checkpoint: Path) -> None:
    done = run("serve", "--model", str(checkpoint), "--max-model-len", "9000", "--port", "0")
    assert_refused(done, "9000", "8192", "--allow-long-max-model-len", "PYLLM_ALLOW_LONG_MAX_MODEL_LEN=1")


def test_a_port_in_use_is_named_before_anything_is_loaded(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert_refused(run("serve", str(checkpoint), "--port", port), f"127.0.0.1:{port}", "--port")


def broken_copy(checkpoint: Path, folder: Path, kind: str) -> Path:
    """A copy of the checkpoint that cannot be served."""
    copy = folder / kind
    shutil.copytree(checkpoint, copy)
    weights = copy / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif kind == "pickle":
        weights.rename(copy / "pytorch_model.bin")
    elif kind == "no tokenizer":
        (copy / "tokenizer.json").unlink()
    elif kind == "pipe":
        (copy / "tokenizer.json").unlink()
        os.mkfifo(copy / "tokenizer.json")
    elif kind == "deep":
        (copy / "config.json").write_text("[" * 100_000)
    elif kind == "template":
        (copy / "tokenizer_config.json").write_text('{"chat_template": ["x"]}')
    elif kind == "ends":
        (copy / "generation_config.json").write_text('{"eos_token_id": [[0]]}')
    elif kind == "not UTF-8":
        copy = copy.rename(folder / os.fsdecode(b"\xff"))
    return copy


@pytest.mark.parametrize(
    ("kind", "part"),
    [("truncated", "model.safetensors"), ("pickle", "safetensors"), ("no tokenizer", "tokenizer.json")],
)
def test_unusable_checkpoint_is_refused_in_one_sentence(checkpoint: Path, tmp_path: Path, kind: str, part: str) -> None:
    assert_refused(run("serve", str(broken_copy(checkpoint, tmp_path, kind)), "--port", "0"), part)


@pytest.mark.parametrize(
    ("words", "kind", "part"),
    [
        (("serve", "--port", "0"), "pipe", "tokenizer.json is a device, pipe or socket where a file must be"),
        (("generate", "Hi"), "deep", "config.json cannot be read as JSON (it is nested too deeply)"),
        (("chat",), "template", "tokenizer_config.json: chat_template must be a template, or templates by name"),
        (("serve", "--port", "0"), "ends", "generation_config.json: eos_token_id must be ids below 272"),
        (("serve", "--port", "0"), "not UTF-8", "--model is not UTF-8 text"),
    ],
)  # fmt: skip
def test_odd_files_are_refused_by_every_command(
    checkpoint: Path, tmp_path: Path, words: tuple[str, ...], kind: str, part: str
) -> None:
    assert_refused(run(*words, "--model", str(broken_copy(checkpoint, tmp_path, kind))), part)


def test_a_measured_server_says_alone_why_it_cannot_start(checkpoint: Path, tmp_path: Path) -> None:
    done = run("bench", "--model", str(broken_copy(checkpoint, tmp_path, "deep")))
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("pyllm: "))
    assert "config.json cannot be read as JSON (it is nested too deeply)" in line
    assert "Traceback" not in done.stderr


def test_generate_writes_the_text_that_the_server_gives(checkpoint: Path, client: OpenAI) -> None:
    done = run("generate", "Hello", "--model", str(checkpoint), "--max-tokens", "5", *SHORT)
    assert (done.returncode, done.stderr) == (0, "")
    expected = client.completions.create(model="tiny", prompt="Hello", max_tokens=5, temperature=0).choices[0].text
    assert done.stdout == expected + "\n"


def test_a_piped_talk_remembers_what_was_said(checkpoint: Path, client: OpenAI) -> None:
    done = run("chat", "--model", str(checkpoint), "--max-tokens", "12", *SHORT, typed="Hi\n\nSay more.\n")
    assert done.returncode == 0
    assert "Chatting with tiny" in done.stderr
    messages = []
    expected = ""
    for question in ("Hi", "Say more."):
        messages.append({"role": "user", "content": question})
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        expected += answer.choices[0].message.content + "\n"
    assert done.stdout == expected


class Terminal:
    """The other end of a process's terminal."""

    def __init__(self, *words: str) -> None:
        self._ours, theirs = pty.openpty()
        os.set_blocking(self._ours, False)
        with os.fdopen(theirs, "wb") as end:
            self.process = Process(
                [sys.executable, "-m", "pyllm", *words], stdin=end, stdout=end, stderr=subprocess.PIPE,
                env=environment() | {"TERM": "dumb"},
            )  # fmt: skip
        self._seen = b""

    def read_until(self, mark: bytes) -> None:
        """Wait until `mark` is shown, and forget all up to it."""

        def shown() -> bool:
            with contextlib.suppress(BlockingIOError):
                self._seen += os.read(self._ours, 4096)
            return mark in self._seen

        wait_for(shown, f"{mark!r} on the terminal")
        self._seen = self._seen.partition(mark)[2]

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._ours, keys)

    def close(self) -> bytes:
        """End the process, and give what it wrote to its standard error."""
        self.process.kill()
        _, errors = self.process.communicate()
        os.close(self._ours)
        return errors


def test_a_talk_in_a_terminal_can_be_interrupted_and_ended(checkpoint: Path, client: OpenAI) -> None:
    """Ctrl-C stops the answer, not the talk; Ctrl-D ends the talk."""
    messages = [{"role": "user", "content": "Hi"}]
    begin = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=400)
    assert begin.choices[0].finish_reason == "length", "this answer does not end by itself"
    shown = begin.choices[0].message.content[:8].replace("\n", "\r\n").encode()
    terminal = Terminal("chat", "--model", str(checkpoint), "--max-tokens", "8000", *SHORT)
    try:
        terminal.read_until(b"> ")
        terminal.type(b"Hi\n")
        terminal.read_until(shown)
        terminal.process.send_signal(signal.SIGINT)
        terminal.read_until(b"\r\n> ")
        terminal.type(b"\x04")
        assert terminal.process.wait(PATIENCE) == 0
    finally:
        errors = terminal.close()
    assert b"Traceback" not in errors
