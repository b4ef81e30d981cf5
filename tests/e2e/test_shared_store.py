"""Several servers that keep responses in one store: a file of SQLite's, or Redis."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.response_stores import SHARED, Redis
from support.serving import PATIENCE, ServerProcess, run_command, wait_for

FIRST, SECOND = "first-key-81d0", "second-key-77aa"
PASSWORD = "hush-4f9c"
BODY: dict[str, Any] = {"max_output_tokens": 4, "ignore_eos": True, "temperature": 0}


def ask(server: ServerProcess, method: str, path: str, body: Any = None, key: str = FIRST) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.request(method, f"{server.url}{path}", headers=headers, json=body, timeout=PATIENCE)


def create(server: ServerProcess, key: str = FIRST, **fields: Any) -> httpx.Response:
    return ask(server, "POST", "/v1/responses", BODY | {"input": "Remember this"} | fields, key)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two servers on one store, and what makes that unusable until its end."""

    servers: tuple[ServerProcess, ServerProcess]
    outage: Callable[[], contextlib.AbstractContextManager[None]]
    keeps: bool  # what it had before


@contextlib.contextmanager
def hidden(folder: Path) -> Iterator[None]:
    away = folder.with_name("away")
    folder.rename(away)
    try:
        yield
    finally:
        away.rename(folder)


@contextlib.contextmanager
def stopped(redis: Redis) -> Iterator[None]:
    redis.stop()
    try:
        yield
    finally:
        redis.start()


@pytest.fixture(scope="module", params=SHARED)
def pair(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two servers with the same two keys."""
    folder = tmp_path_factory.mktemp("pair")
    with contextlib.ExitStack() as stack:
        if request.param == "redis":
            redis = stack.enter_context(Redis(folder, "--requirepass", PASSWORD))
            url, outage = redis.url.replace("//", f"//:{PASSWORD}@"), lambda: stopped(redis)
        else:
            disk = folder / "disk"
            disk.mkdir()
            url, outage = f"sqlite://{disk}/responses.db", lambda: hidden(disk)
        flags = (str(checkpoint), "--dtype", "float32", "--api-key", FIRST, "--api-key", SECOND)
        variables = {"PYLLM_RESPONSE_STORE": url}
        servers = [stack.enter_context(ServerProcess(folder / name, *flags, **variables)) for name in ("one", "two")]
        yield Pair((servers[0], servers[1]), outage, keeps=request.param == "sqlite")
        assert PASSWORD not in servers[0].settled_log() + servers[1].settled_log()


def test_a_conversation_continues_at_any_server(pair: Pair) -> None:
    one, two = pair.servers
    first = create(one).raise_for_status().json()
    assert ask(two, "GET", f"/v1/responses/{first['id']}").json() == first
    second = create(two, input="And this", previous_response_id=first["id"]).raise_for_status().json()
    item = {"type": "item_reference", "id": second["output"][0]["id"]}
    third = create(one, input=[item], previous_response_id=second["id"]).raise_for_status().json()
    listed = ask(two, "GET", f"/v1/responses/{third['id']}/input_items?order=asc").json()["data"]
    assert [entry["role"] for entry in listed] == ["user", "assistant", "user", "assistant", "assistant"]
    assert ask(two, "DELETE", f"/v1/responses/{first['id']}").json()["deleted"]
    assert ask(one, "GET", f"/v1/responses/{first['id']}").status_code == 404
    streamed = create(one, stream=True).raise_for_status().text.strip().split("\n")[-1].removeprefix("data: ")
    response = json.loads(streamed)["response"]
    assert ask(two, "GET", f"/v1/responses/{response['id']}").json() == response


def test_another_key_never_reads_it_at_any_server(pair: Pair) -> None:
    kept = create(pair.servers[0]).raise_for_status().json()
    path = f"/v1/responses/{kept['id']}"
    for server in pair.servers:
        for method, place, body in (
            ("GET", path, None), ("GET", f"{path}/input_items", None), ("POST", f"{path}/cancel", None),
            ("DELETE", path, None), ("POST", "/v1/responses", BODY | {"previous_response_id": kept["id"]}),
            ("POST", "/v1/responses", BODY | {"input": [{"type": "item_reference", "id": kept["output"][0]["id"]}]}),
        ):  # fmt: skip
            answer = ask(server, method, place, body, SECOND)
            assert answer.status_code in (400, 404)
            assert "not found" in answer.json()["error"]["message"]
    assert ask(pair.servers[1], "GET", path).json() == kept


def test_a_store_that_is_down_is_a_503_and_heals(pair: Pair) -> None:
    one, two = pair.servers
    kept = create(one).raise_for_status().json()
    with pair.outage():
        for method, path, body in (
            ("GET", f"/v1/responses/{kept['id']}", None), ("DELETE", f"/v1/responses/{kept['id']}", None),
            ("POST", "/v1/responses", BODY | {"input": "x", "previous_response_id": kept["id"]}),
            ("POST", "/v1/responses", BODY | {"input": "x"}),
            ("POST", "/v1/responses", BODY | {"input": "x", "stream": True}),
        ):  # fmt: skip
            answer = ask(one, method, path, body)
            assert answer.status_code == 503, (method, body)
            assert answer.json()["error"]["code"] == "response_store_unavailable"
            assert answer.headers["retry-after"]
        assert create(one, store=False).status_code == 200
        assert httpx.get(f"{one.url}/health").status_code == httpx.get(f"{one.url}/ready").status_code == 200
        assert one.metrics().response_store_up == 0
        end = create(two, stream=True)  # this one knows only if it has just looked for responses to delete
        assert end.text.count("event: response.failed") == 1 or end.status_code == 503
        assert "response.completed" not in end.text
        assert "response.incomplete" not in end.text
    for server in pair.servers:
        wait_for(lambda server=server: create(server).status_code == 200, "the store to be used again")
        assert server.metrics().response_store_up == 1
    assert ask(two, "GET", f"/v1/responses/{kept['id']}").status_code == (200 if pair.keeps else 404)
    for server in pair.servers:
        assert server.settled_log().count(" is unavailable (") == 1
        assert "is available again" in server.log


def test_the_file_names_no_key_and_other_users_cannot_read_it(pair: Pair, tmp_path: Path) -> None:
    for key in (FIRST, SECOND):
        create(pair.servers[0], key).raise_for_status()
    if not pair.keeps:
        return
    (file,) = pair.servers[0]._log.parent.glob("disk/*.db")
    with contextlib.closing(sqlite3.connect(file)) as database:
        owners = {owner for (owner,) in database.execute("SELECT DISTINCT owner FROM responses")}
    assert len(owners) == 2
    assert not [key for key in (FIRST, SECOND) for owner in owners if key in owner]
    assert {os.stat(path).st_mode & 0o777 for path in file.parent.iterdir()} == {0o600}


@pytest.mark.needs("redis")
def test_a_server_starts_without_redis_but_not_without_password(checkpoint: Path, tmp_path: Path, redis: Redis) -> None:
    with Redis(tmp_path, "--requirepass", PASSWORD) as strict:
        wrong = {"PYLLM_RESPONSE_STORE": strict.url.replace("//", "//:wrong-one@")}
        done = run_command("serve", str(checkpoint), "--port", "0", **wrong)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(f"pyllm: --response-store: {strict.url} refuses this server")
        assert "wrong-one" not in done.stderr
        url = strict.url
    with ServerProcess(tmp_path / "log", str(checkpoint), "--response-store", url) as server:
        assert "is unavailable (" in server.settled_log()
        assert create(server).status_code == 503
    done = run_command("serve", "--response-store", f"redis://:{PASSWORD}@127.0.0.1:{redis.port}/0")
    assert (done.returncode, done.stdout, PASSWORD in done.stderr) == (2, "", False)
    assert "PYLLM_RESPONSE_STORE" in done.stderr
