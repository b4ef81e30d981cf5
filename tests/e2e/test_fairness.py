"""One client with all it can ask for, and one with little: what the second one waits for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from support.serving import FOREVER, PATIENCE, ServerProcess, posted, wait_for

GREEDY, OTHER = "greedy-key", "other-key"
SEQS, QUEUE = 4, 12
LONG = "word " * 600


@pytest.fixture(scope="module")
def shared(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with few places, and two keys in a file."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "keys").write_text(f"{GREEDY} name=greedy\n{OTHER} name=other\n")
    (folder / "keys").chmod(0o600)
    flags = ("--dtype", "float32", "--max-num-seqs", str(SEQS), "--max-num-queued-reqs", str(QUEUE))
    flags += ("--max-num-batched-tokens", "64", "--api-key-file", "keys", "--num-kv-blocks", "2000")
    with ServerProcess(folder / "log", str(checkpoint), *flags) as server:
        yield server


def ask(server: ServerProcess, key: str = OTHER, **fields: Any) -> httpx.Response:
    body = {"prompt": "Hi", "max_tokens": 3, "temperature": 0, "ignore_eos": True} | fields
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=PATIENCE)


def count(server: ServerProcess, name: str, key: str) -> float:
    text = httpx.get(f"{server.url}/metrics").raise_for_status().text
    return sum(float(row.split()[1]) for row in text.splitlines() if row.startswith(f'pyllm:{name}{{key="{key}"'))


def idle(server: ServerProcess) -> None:
    server.wait_until_idle()
    wait_for(
        lambda: not count(server, "key_running", "greedy") + count(server, "key_waiting", "greedy"), "no sequences"
    )


@pytest.mark.parametrize(
    "fields",
    [{"max_tokens": FOREVER}, {"max_tokens": 4000, "n": SEQS + QUEUE}, {"prompt": LONG, "max_tokens": FOREVER - 4000}],
    ids=["long answers", "many choices", "long prompts"],
)
def test_a_greedy_client_does_not_hold_up_another(shared: ServerProcess, fields: dict[str, Any]) -> None:
    with contextlib.ExitStack() as stack:
        for n in range((SEQS + QUEUE) // fields.get("n", 1)):
            stack.enter_context(posted(shared, GREEDY, **({"prompt": f"{n} Hi"} | fields)))
        wait_for(lambda: count(shared, "key_running", "greedy") >= 1, "the greedy client's first token")
        wait_for(
            lambda: count(shared, "key_running", "greedy") + count(shared, "key_waiting", "greedy") == SEQS + QUEUE,
            "all of its sequences",
        )
        refused = ask(shared, GREEDY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        before = shared.metrics()["request_success_total", "length"]
        for _ in range(3):
            assert ask(shared).raise_for_status().json()["usage"]["completion_tokens"] == 3
        ended = shared.metrics()["request_success_total", "length"] - before
        assert ended <= 3 + 1, "the greedy client's sequences did not have to end"
    idle(shared)
    assert count(shared, "key_refused_total", "greedy") >= 1
    assert count(shared, "key_refused_total", "other") == 0


def test_a_paused_answer_is_the_same(shared: ServerProcess) -> None:
    prompts = [f"Count from {n}" for n in range(SEQS + 2)]
    alone = [ask(shared, GREEDY, prompt=prompt, max_tokens=50).json()["choices"][0]["text"] for prompt in prompts]

    async def together() -> list[str]:
        texts = [""] * len(prompts)
        async with (
            httpx.AsyncClient(base_url=shared.url, timeout=PATIENCE) as client,
            anyio.create_task_group() as group,
        ):

            async def one(n: int) -> None:
                body = {"prompt": prompts[n], "max_tokens": 50, "temperature": 0, "ignore_eos": True}
                headers = {"authorization": f"Bearer {GREEDY}"}
                texts[n] = (await client.post("/v1/completions", json=body, headers=headers)).json()["choices"][0][
                    "text"
                ]

            for n in range(len(prompts)):
                group.start_soon(one, n)
            body = {"prompt": "Hi", "max_tokens": 2}
            while not all(texts):
                answer = await client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {OTHER}"})
                assert answer.status_code == 200
        return texts

    assert anyio.run(together) == alone
    idle(shared)
