"""A server that cannot start says why in one sentence, ends with code 2, and leaves no process behind."""

from __future__ import annotations

import json
import os
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.serving import PATIENCE, children, environment, is_running, wait_for
from support.warm import Process

Make = Callable[[Path], object]


def bound(path: Path) -> None:
    """Make a socket's file."""
    here = os.getcwd()
    os.chdir(path.parent)  # its path may be too long for a socket's
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def holding(content: str | bytes) -> Make:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def link(target: str) -> Make:
    return lambda path: path.symlink_to(target)


def tensors(header: Any, *, length: int | None = None, data: int = 64) -> Make:
    """A safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return holding(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))


def tensor(dtype: str = "F32", shape: Sequence[float] = (16,), ends: tuple[int, int] = (0, 64)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": ends}


def index(weight_map: Any) -> Make:
    return holding(json.dumps({"weight_map": weight_map}))


WEIGHTS, INDEX, TOKENIZER = "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
FILES: list[tuple[str, Make, str]] = [
    ("config.json", Path.mkdir, "is a folder where a file must be"),
    ("config.json", os.mkfifo, "is a device, pipe or socket"),
    ("config.json", bound, "is a device, pipe or socket"),
    ("config.json", link("config.json"), "Too many levels of symbolic links"),
    ("config.json", holding('{"a": ' * 200_000), "nested too deeply"),
    ("config.json", holding('{"vocab_size": NaN, "hidden_size": 64}'), "vocab_size"),
    (TOKENIZER, link("/dev/zero"), "is a device, pipe or socket"),
    (TOKENIZER, holding('{"model": '), "cannot be read as a tokenizer"),
    ("chat_template.jinja", holding("{% for x in %}"), "template"),
    (WEIGHTS, Path.touch, "truncated or not a safetensors file"),
    (WEIGHTS, tensors({}, length=2**63 - 1), "truncated or not a safetensors file"),
    (WEIGHTS, tensors({"a": tensor(), "b": tensor()}), "truncated or not a safetensors file"),
    (WEIGHTS, tensors({"a": tensor(ends=(-64, 0))}), "truncated or not a safetensors file"),
    (WEIGHTS, tensors({"a": tensor(shape=(2**62, 2**62))}), "truncated or not a safetensors file"),
    (WEIGHTS, tensors({"a": tensor("F99")}), "truncated or not a safetensors file"),
    (WEIGHTS, tensors(b"[" * 100_000), "truncated or not a safetensors file"),
    (INDEX, index({"a": "../model.safetensors"}), "which is not the name of a .safetensors file"),
    (INDEX, index({f"layers.{n}.x": f"m-{n}.safetensors" for n in range(100_000)}), "lacks m-"),
]


def run(*words: str, **more: Any) -> tuple[int, list[str]]:
    """Start a server that must fail; return its code and what it wrote, once all its processes have ended."""
    variables = more.pop("variables", {})
    command = [sys.executable, "-m", "pyllm", "serve", *words]
    with (subprocess.Popen if more else Process)(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment() | variables, **more,
    ) as process:  # fmt: skip
        family: list[int] = []

        def ended() -> bool:
            family.extend(children(process.pid))
            return process.poll() is not None

        try:
            wait_for(ended, "the server to give up")
            text, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        wait_for(lambda: not any(map(is_running, family)), "its engine to end")
    return process.returncode, text.splitlines()


def assert_one_sentence(outcome: tuple[int, list[str]], words: str) -> None:
    code, lines = outcome
    assert (code, len(lines)) == (2, 1), lines
    assert lines[0].startswith("pyllm: ")
    assert words in lines[0]


@pytest.mark.parametrize(("name", "make", "words"), FILES, ids=[f"{n}-{name}" for n, (name, *_) in enumerate(FILES)])
def test_a_broken_file_is_one_sentence(checkpoint: Path, tmp_path: Path, name: str, make: Make, words: str) -> None:
    for file in checkpoint.iterdir():
        if file.name != name and not (name == INDEX and file.name == WEIGHTS):
            (tmp_path / file.name).symlink_to(file)
    make(tmp_path / name)
    assert_one_sentence(run(str(tmp_path), "--port", "0"), words)


CONFIGS: dict[str, tuple[Make, str]] = {
    "folder": (Path.mkdir, "cannot be read: Is a directory"),
    "FIFO": (os.mkfifo, "cannot be read: nothing was written to it for 5 s"),
    "socket": (bound, "cannot be read: No such device or address"),
    "missing": (lambda path: None, "cannot be read: No such file or directory"),
    "link to itself": (link("c.yaml"), "cannot be read: Too many levels of symbolic links"),
    "endless": (link("/dev/zero"), "is not valid YAML"),
    "sparse": (lambda path: (path.touch(), os.truncate(path, 10**10)), "is not valid YAML"),
    "aliases": (
        holding("a: &a [x]\n" + "\n".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}' if n else '*a'] * 9)}]"
                                          for n in range(12))),
        "is too large for a file of flags",
    ),
    "tag": (holding("host: !!python/object/apply:os.system [ls]"), "could not determine a constructor"),
    "date": (holding("host: 2024-01-01"), "must be text"),
    "twice": (holding("port: 1\nport: 2"), "has the flag port twice"),
    "list": (holding("- port"), "must hold lines of the form `flag: value`"),
    "deep": (holding("host: " + "[" * 5_000), "nested too deeply"),
    "UTF-16": (holding("port: 1".encode("utf-16")), "cannot be read"),
    "merge": (holding("<<: {port: 1}"), "has an unknown flag '<<'"),
    "number as a flag": (holding("1: 2"), "has an unknown flag '1'"),
    "alias of nothing": (holding("port: *x"), "found undefined alias"),
    "two documents": (holding("port: 1\n---\nport: 2"), "found another document"),
    "infinity": (holding("port: .inf"), "port in"),
    "word as a number": (holding("port: yes"), "port in"),
    "no keys": (holding("api_key: []"), "must be one or more strings, none of them empty"),
    "null keys": (holding("api_key: ~"), "must be one or more strings, none of them empty"),
    "null certificate": (holding("ssl_keyfile:"), "must be text, but got None"),
    "itself": (holding("config: c.yaml"), "has an unknown flag 'config'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_broken_file_of_flags_is_one_sentence(tmp_path: Path, kind: str) -> None:
    make, words = CONFIGS[kind]
    make(tmp_path / "c.yaml")
    assert_one_sentence(run("--config", str(tmp_path / "c.yaml")), words)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PORT", "abc", "PYLLM_PORT must be a whole number"),
        ("PORT", "9" * 100_000, "PYLLM_PORT must be a whole number"),
        ("MAX_NUM_SEQS", "-1", "PYLLM_MAX_NUM_SEQS"),
        ("DTYPE", "int3", "PYLLM_DTYPE must be one of"),
        ("API_KEY", "", "PYLLM_API_KEY must be one or more strings"),
        ("DETERMINISTIC", "perhaps", "PYLLM_DETERMINISTIC must be true or false"),
        ("SPECULATIVE_CONFIG", "{", "PYLLM_SPECULATIVE_CONFIG must be a JSON object"),
        ("MODEL", os.fsdecode(b"\xff"), "PYLLM_MODEL is not UTF-8 text"),
        ("SSL_CERTFILE", "", "PYLLM_SSL_CERTFILE must not be empty"),
        ("GPU_MEMORY_UTILIZATION", "nan", "PYLLM_GPU_MEMORY_UTILIZATION must be a number"),
        ("KV_CACHE_MEMORY_BYTES", "9PB", "PYLLM_KV_CACHE_MEMORY_BYTES must be a number of bytes"),
    ],
)
def test_a_nonsensical_variable_is_one_sentence(name: str, value: str, words: str) -> None:
    assert_one_sentence(run(variables={f"PYLLM_{name}": value}), words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--host", "no.such.host.invalid"), "Cannot listen on no.such.host.invalid:"),
        (("--host", "a" * 300), "Cannot listen on aaaa"),
        (("--host", "fe80::1%nope"), "Cannot listen on fe80::1%nope:"),
        (("--ssl-keyfile", "/dev/zero", "--ssl-certfile", "/dev/zero"), "--ssl-keyfile /dev/zero is not a file"),
        (("--uds", "/nowhere/socket"), "Cannot listen on the socket /nowhere/socket (no such file or directory)"),
        (("--kv-cache-memory-bytes", "900TB"), "--kv-cache-memory-bytes asks for"),
        (("--chat-template", "/dev/zero"), "/dev/zero is a device, pipe or socket"),
    ],
)
def test_a_flag_that_cannot_be_met_is_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    assert_one_sentence(run("--port", "0", *words), sentence)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits mean something else on other systems")
@pytest.mark.parametrize("size", [200 << 20, 400 << 20])
def test_a_machine_with_too_little_memory_is_named(checkpoint: Path, size: int) -> None:
    """Libraries may write a line of their own before they give up."""

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    code, lines = run(str(checkpoint), "--port", "0", preexec_fn=restrict)
    assert code == 2
    assert lines[-1].startswith("pyllm: ")
    assert "Traceback" not in "".join(lines)


def as_a_user_with(num_threads: int) -> list[str]:
    """What runs a command as a user without other processes, who may have so many threads."""
    user = str(40_000 + os.getpid() % 20_000)
    capability = "+dac_read_search"  # the libraries may belong to root only
    return [
        *("setpriv", "--reuid", user, "--regid", user, "--clear-groups"),
        *("--inh-caps", capability, "--ambient-caps", capability, "prlimit", f"--nproc={num_threads}"),
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without other processes")
@pytest.mark.needs("setpriv")
@pytest.mark.parametrize("limit", [4, 6, 17, 20, 22])
def test_with_too_few_threads_it_says_so_or_works(checkpoint: Path, limit: int) -> None:
    command = [*as_a_user_with(limit), sys.executable, "-m", "pyllm", "serve", str(checkpoint), "--port", "0"]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    ) as process:
        try:
            assert process.stdout
            lines = []
            while (line := process.stdout.readline()) and "Ready after" not in line:
                lines.append(line)
            family = children(process.pid)
            if line:
                url = line.split()[-1]
                bodies: list[dict[str, Any]] = [{}, {"structured_outputs": {"regex": "[0-9]+"}}]
                statuses = [
                    httpx.post(f"{url}/completions", json={"prompt": "Hi"} | body, timeout=PATIENCE).status_code
                    for body in bodies
                ]
                assert statuses[0] == 200
                assert statuses[1] in (200, 429), "a grammar needs more processes"
                assert httpx.get(url.replace("/v1", "/docs/swagger-ui.css")).status_code in (200, 503)
                process.terminate()
                assert "Traceback" not in process.stdout.read()
            code = process.wait(PATIENCE)
        finally:
            process.kill()
    if line:
        assert code == 0
    else:
        assert_one_sentence((code, lines), "the system allows no more processes or threads: raise the limit")
    wait_for(lambda: not any(map(is_running, family)), "its engine to end")


@pytest.mark.parametrize("limit", [8, 12, 40])
def test_a_machine_with_too_few_files_is_one_sentence(checkpoint: Path, limit: int) -> None:
    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    assert_one_sentence(run(str(checkpoint), preexec_fn=restrict), f"allows only {limit} open files: raise the limit")
