"""Long texts: what it costs the API process to tokenise them."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.serving import ServerProcess, wait_for

TEXT = "Hello, long words! " * 100_000


def kib(pid: int, name: str) -> int:
    """A field of a process's status in KiB: VmRSS, or VmHWM for the peak."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1])  # type: ignore[index]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": TEXT}),
        ("/tokenize", {"messages": [{"role": "user", "content": TEXT}]}),
        ("/v1/messages/count_tokens", {"model": "tiny", "messages": [{"role": "user", "content": TEXT}]}),
    ],
    ids=["tokenize", "chat", "count"],
)
def test_tokenizing_takes_ten_bytes_for_each_and_returns_them(
    server: ServerProcess, http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    pid = server.process.pid
    assert http.post(path, json={**body, **({"prompt": "x" * 50_000} if "prompt" in body else {})}).status_code == 200
    before = kib(pid, "VmRSS")
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")  # the peak starts again
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda _: http.post(path, json=body), range(2)))
    assert [answer.status_code for answer in answers] == [200, 200]
    counts = {answer.json().get("count", answer.json().get("input_tokens")) for answer in answers}
    assert min(counts) >= len(TEXT)  # a token a byte
    assert kib(pid, "VmHWM") - before < 10 * 2 * len(TEXT) / 1024
    wait_for(lambda: kib(pid, "VmRSS") - before < 16_000, "the memory to be returned")


def test_a_prompt_far_too_long_is_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": TEXT})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_detokenizing_answers_in_pieces(http: httpx.Client) -> None:
    ids = http.post("/tokenize", json={"prompt": "né🎉 " * 5000}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "né🎉 " * 5000}
    assert http.post("/detokenize", json={"tokens": ids[:-2]}).json() == {"prompt": ("né🎉 " * 5000)[:-2] + "\ufffd"}
