"""What goes wrong with one request is its own affair: all others get, to the byte, what they get without it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from e2e.conftest import FLAGS
from support.hostile import comparable
from support.serving import PATIENCE, ServerProcess

pytestmark = pytest.mark.anyio
INSIDE = ("Traceback", "Planted", "planted", ".py", "RuntimeError", "allocate")
KINDS = ("prepare", "sample", "append", "text", "memory")
GENERAL: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "return_token_ids": True}
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", GENERAL | {"prompt": "What the others ask", "temperature": 0}),
    ("/v1/completions", GENERAL | {"prompt": "and with a seed", "temperature": 1.0, "seed": 5, "logprobs": 3}),
    ("/v1/completions", GENERAL | {"prompt": "by rules", "seed": 6, "logit_bias": {"70": 5}, "frequency_penalty": 1}),
    ("/v1/completions", GENERAL | {"prompt": "n", "seed": 7, "structured_outputs": {"regex": "[a-z ]{60}"}}),
    ("/v1/completions", GENERAL | {"prompt": "a long one " * 30, "seed": 8, "echo": True, "logprobs": 0}),
    ("/v1/embeddings", {"input": "or only reads " * 20}),
]  # fmt: skip


@pytest.fixture(scope="module")
def faulty(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    faults = ",".join(f"{kind}@bad-{kind}" for kind in (*KINDS, "once"))
    with ServerProcess(tmp_path_factory.mktemp("faulty") / "log", str(checkpoint), *FLAGS, faults=faults) as server:
        yield server


async def ask_others(http: httpx.AsyncClient) -> list[Any]:
    """What each of the others gets: its text, tokens and log-probabilities, or its vector."""
    answers = await asyncio.gather(*(http.post(path, json=body) for path, body in OTHERS))
    assert [answer.status_code for answer in answers] == [200] * len(OTHERS), [answer.text for answer in answers]
    contents = map(comparable, answers)
    return [content.get("choices") or content["data"] for content in contents]


async def ask_bad(http: httpx.AsyncClient, kind: str, **fields: Any) -> httpx.Response:
    body = {"prompt": "The one that fails", "max_tokens": 4000, "ignore_eos": True} | fields
    return await http.post("/v1/completions", json=body, headers={"x-request-id": f"bad-{kind}"})


def check_untouched(server: ServerProcess) -> None:
    """Nothing runs, nothing is held, and the engine has found its books in order since it came to rest."""
    server.wait_until_idle()
    time.sleep(0.3)
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert server.process.poll() is None


@pytest.mark.parametrize("kind", KINDS)
async def test_failing_request_fails_alone_without_internals(faulty: ServerProcess, kind: str) -> None:
    engine = faulty.engine_pid
    async with httpx.AsyncClient(base_url=faulty.url, timeout=PATIENCE) as http:
        expected = await ask_others(http)
        others, whole, streamed = await asyncio.gather(
            ask_others(http), ask_bad(http, kind), ask_bad(http, kind, stream=True)
        )
        assert others == expected
        assert await ask_others(http) == expected
    assert whole.status_code == 500
    error = whole.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    events = [line for line in streamed.text.splitlines() if line]
    assert '"server_error"' in events[-2]
    assert events[-1] == "data: [DONE]"
    for sign in INSIDE:
        assert sign not in whole.text + streamed.text
    check_untouched(faulty)
    assert faulty.engine_pid == engine
    assert f"Request bad-{kind}-0" in faulty.log, "the log names the failed request"


async def test_step_that_fails_once_is_retried(faulty: ServerProcess) -> None:
    async with httpx.AsyncClient(base_url=faulty.url, timeout=PATIENCE) as http:
        expected = await ask_others(http)
        others, alike = await asyncio.gather(ask_others(http), ask_bad(http, "once", max_tokens=40, seed=3))
        assert others == expected
        again = await ask_bad(http, "once", max_tokens=40, seed=3)
    assert (alike.status_code, again.status_code) == (200, 200), alike.text + again.text
    assert alike.json()["choices"] == again.json()["choices"]
    check_untouched(faulty)


async def test_failures_without_end_leave_the_engine_as_it_was(faulty: ServerProcess) -> None:
    engine, before = faulty.engine_pid, faulty.wait_until_idle()
    async with httpx.AsyncClient(base_url=faulty.url, timeout=PATIENCE) as http:
        kinds = [kind for kind in KINDS if kind != "memory"]
        answers = await asyncio.gather(*(ask_bad(http, kinds[n % len(kinds)]) for n in range(60)))
    assert {answer.status_code for answer in answers} == {500}
    check_untouched(faulty)
    assert faulty.engine_pid == engine
    after = faulty.metrics()
    assert after["request_success_total", "error"] - before["request_success_total", "error"] == 60
