"""Batches with a scripted engine: rows, bad lines, ends of all kinds, and what survives a restart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import threading
import tracemalloc
from collections.abc import Iterator

import pytest
from support.answers import error_of
from support.batches import COMPLETIONS, UNFINISHED, Batches, ended, line, make_batch, post_file, until

from pyllm.server.api.batches.lines import Line, execute
from pyllm.server.api.batches.store import BatchStore
from pyllm.server.flags import ConfigError
from pyllm.server.http.middleware import BATCH_OWNER


@pytest.fixture
def batches(harness, tmp_path):
    return Batches(harness, tmp_path / "batches")


def test_each_line_gets_one_row(batches):
    lines = [line(f"n{n}", max_tokens=n + 1) for n in range(5)]
    batch, rows = batches.batch(*lines, line("bad", temperature=9), metadata={"job": "1"})
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 6, "completed": 5, "failed": 1}
    assert batch["usage"]["output_tokens"] == 1 + 2 + 3 + 4 + 5
    assert batch["metadata"] == {"job": "1"}
    assert rows.keys() == {"n0", "n1", "n2", "n3", "n4", "bad"}
    good, bad = rows["n3"], rows["bad"]
    assert good["response"]["status_code"] == 200
    assert good["response"]["body"]["choices"][0]["text"] == "Hell"
    assert good["error"] is None
    assert good["response"]["request_id"] in good["response"]["body"]["id"]
    assert bad["response"]["status_code"] == 400
    assert bad["response"]["body"]["error"]["param"] == "temperature"


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/embeddings", {"input": "Hi"}),
        ("/v1/responses", {"input": "Hi"}),
    ],
)
def test_other_endpoints(batches, url, body):
    data = json.dumps({"custom_id": "x", "method": "POST", "url": url, "body": body})
    batch, rows = batches.batch(data, endpoint=url)
    assert batch["status"] == "completed"
    assert rows["x"]["response"]["status_code"] == 200
    assert batch["usage"]["input_tokens"] > 0


def test_lines_run_in_the_background(batches):
    seen = []
    submit = batches.harness.engine.submit
    batches.harness.engine.submit = lambda *a, **k: seen.append(k["background"]) or submit(*a, **k)
    batches.batch(line())
    batches.harness.complete()
    assert seen == [True, False]


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        ("no JSON", "invalid_json_line", None),
        ("[]", "invalid_json_line", None),
        ("[" * 100_000, "invalid_json_line", None),
        (line(url="/v1/chat/completions"), "invalid_line", "url"),
        (line(url="/v1/files"), "invalid_line", "url"),
        (line(method="GET"), "invalid_line", "method"),
        (line(custom_id=""), "invalid_line", "custom_id"),
        (line(custom_id=5), "invalid_line", "custom_id"),
        (line(custom_id="x" * 513), "invalid_line", "custom_id"),
        (line("ok"), "duplicate_custom_id", "custom_id"),
        (line(stream=True), "invalid_line", "body.stream"),
        (line().replace('"body"', '"bodi"'), "invalid_line", "bodi"),
        ('{"custom_id": "a", "method": "POST", "url": "/v1/completions"}', "invalid_line", "body"),
        (line(user="x" * (9 * 2**20)), "invalid_line", None),
        ("", "empty_file", None),
    ],
)  # fmt: skip
def test_a_file_with_a_bad_line_fails_as_a_whole_and_names_it(batches, bad, code, param):
    batch, rows = batches.batch(*([line("ok"), "", bad] if bad else [bad]))
    assert (batch["status"], rows) == ("failed", {})
    (error,) = batch["errors"]["data"]
    assert (error["code"], error["param"], error["line"]) == (code, param, 3 if bad else None)
    assert len(error["message"]) < 400


def test_the_list_of_bad_lines_is_bounded(batches, monkeypatch):
    assert len(batches.batch(*["x"] * 1000)[0]["errors"]["data"]) == 100
    monkeypatch.setattr("pyllm.server.api.batches.worker.MAX_LINES", 3)
    errors = batches.batch(*[line(str(n)) for n in range(9)])[0]["errors"]["data"]
    assert [error["code"] for error in errors] == ["too_many_lines"]


def test_cancel_keeps_the_answers_so_far(batches):
    engine = batches.harness.engine
    engine.hold_after = 3

    async def work(client):
        batch = await make_batch(client, line("short", max_tokens=3), *[line(f"n{n}") for n in range(9)])
        record, file = batches.store.batches[batch["id"]], f"/v1/files/{batch['input_file_id']}"
        await until(lambda: record.completed)
        refused = await client.delete(file)
        assert error_of(refused).code == "file_in_use"
        cancelled = await client.post(f"/v1/batches/{batch['id']}/cancel")
        assert cancelled.json()["status"] == "cancelling"
        batch, rows = await ended(client, batch["id"])
        again = await client.post(f"/v1/batches/{batch['id']}/cancel")
        assert (again.status_code, error_of(again).code) == (409, "batch_has_ended")
        assert (await client.delete(file)).json()["deleted"]
        return batch, rows

    batch, rows = batches.run(work)
    assert batch["status"] == "cancelled"
    assert batch["request_counts"] == {"total": 10, "completed": 1, "failed": 0}
    assert rows.keys() == {"short"}
    assert not engine.running


def test_a_batch_expires(batches, monkeypatch):
    monkeypatch.setattr("pyllm.server.api.batches.route.WINDOW", -1)
    batch, rows = batches.batch(line("a"), line("b"))
    assert (batch["status"], batch["request_counts"]["failed"]) == ("expired", 2)
    assert {row["error"]["code"] for row in rows.values()} == {"batch_expired"}


def test_a_torn_row_is_repaired_and_no_line_is_computed_twice(harness, make_harness, tmp_path):
    before = Batches(harness, tmp_path)
    lines = [line(f"n{n}", max_tokens=2) for n in range(6)]
    batch = before.run(lambda client: make_batch(client, *lines), works=False)
    record = before.store.batches[batch["id"]]
    record.enter("in_progress")
    record.total = 6
    asyncio.run(before.store.save(record))
    response = {"status_code": 200, "request_id": "r", "body": {"usage": {"completion_tokens": 2}}}
    row = {"id": "batch_req_1", "custom_id": "n0", "error": None, "response": response}
    before.store.rows(record, "output").write_text(json.dumps(row) + "\n" + json.dumps(row)[:50])
    (tmp_path / "files" / "left.tmp").write_text("x")
    before.close()
    after = Batches(make_harness(), tmp_path)
    batch, rows = after.run(lambda client: ended(client, batch["id"]))
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 6, "completed": 6, "failed": 0}
    assert batch["usage"]["output_tokens"] == 12
    assert rows["n0"]["response"]["request_id"] == "r"
    assert len(after.harness.engine.requests) == 5
    assert not (tmp_path / "files" / "left.tmp").exists()


@pytest.mark.parametrize("moved", [False, True])
def test_a_crash_while_finalizing_is_finished(harness, make_harness, tmp_path, moved):
    before = Batches(harness, tmp_path)
    batch = before.run(lambda client: make_batch(client, line()), works=False)
    record, store = before.store.batches[batch["id"]], before.store
    record.output_file_id = "file-x"
    record.enter("finalizing")
    asyncio.run(store.save(record))
    path = store.content("file-x") if moved else store.rows(record, "output")
    path.write_text('{"custom_id": "a", "response": {"status_code": 200}}\n')
    before.close()
    after = Batches(make_harness(), tmp_path)
    batch, rows = after.run(lambda client: ended(client, batch["id"]))
    assert (batch["status"], rows.keys()) == ("completed", {"a"})
    assert not after.harness.engine.requests


def test_a_batch_with_which_the_server_keeps_dying_fails(batches):
    async def work(client):
        batch = await make_batch(client, line())
        batches.store.batches[batch["id"]].crashes = 3
        return await ended(client, batch["id"])

    batch, _ = batches.run(work)
    assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "server_died")


def test_a_slow_disk_delays_only_what_must_be_on_it(batches, monkeypatch):
    """A batch is accepted once its record is on the disk; until then it neither runs nor keeps others waiting."""
    ready, sync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: ready.wait(60) and sync(number))

    async def work(client):
        ready.set()
        file = (await post_file(client, line())).json()
        ready.clear()
        body = {"input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "24h"}
        accepted = asyncio.ensure_future(client.post("/v1/batches", json=body))
        await until(lambda: batches.store.accepting)
        assert (await client.get("/health")).status_code == 200
        assert (await client.delete(f"/v1/files/{file['id']}")).status_code == 400, "the batch will read it"
        await asyncio.sleep(0.3)
        assert not accepted.done()
        assert not batches.harness.engine.requests
        ready.set()
        return await ended(client, (await accepted).json()["id"])

    batch, rows = batches.run(work)
    assert (batch["status"], rows.keys()) == ("completed", {"a"})


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse to make a file longer, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_full_disk_does_not_take_is_refused_whole(batches, tmp_path):
    file = batches.upload(line()).json()
    body = {"input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "24h"}
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with files_of_at_most(10):
        refused = [batches.upload(line("b")), batches.harness.post("/v1/batches", body)]
    for response in refused:
        assert response.status_code == 507
        assert response.json()["error"]["code"] == "storage_full"
        assert "disk" in response.json()["error"]["message"]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept
    assert not batches.store.batches
    assert len(batches.store.files) == 1


def test_one_folder_has_one_server(batches, tmp_path):
    with pytest.raises(ConfigError, match="in use by another server"):
        BatchStore(tmp_path / "batches", 10**7)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        BatchStore(tmp_path / "file" / "x", 10**7)


def test_what_belongs_to_another_key_does_not_exist(make_harness, tmp_path):
    batches = Batches(make_harness(api_key=("one", "two")), tmp_path)
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))

    async def work(client):
        file = (await post_file(client, line(), headers=one)).json()
        body = {"input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "24h"}
        assert (await client.post("/v1/batches", json=body, headers=two)).status_code == 404
        batch = (await client.post("/v1/batches", json=body, headers=one)).json()
        paths = [f"/v1/files/{file['id']}", f"/v1/files/{file['id']}/content", f"/v1/batches/{batch['id']}"]
        for path in paths:
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, headers=two)).status_code == 404
            assert (await client.get(path, headers=one)).status_code == 200
        assert (await client.post(f"{paths[2]}/cancel", headers=two)).status_code == 404
        assert (await client.delete(paths[0], headers=two)).status_code == 404
        for path in ("/v1/files", "/v1/batches"):
            assert (await client.get(path, headers=two)).json()["data"] == []
        return await ended(client, batch["id"], headers=one)

    batch, rows = batches.run(work)
    assert (batch["status"], rows["a"]["response"]["status_code"]) == ("completed", 200)


@pytest.mark.parametrize("seconds", [600.0, 0.0], ids=["batches", "parts"])
def test_keys_take_turns(make_harness, tmp_path, monkeypatch, seconds):
    """With whole batches, or parts of them where one takes long."""
    monkeypatch.setattr("pyllm.server.api.batches.worker.TURN_SECONDS", seconds)
    batches = Batches(make_harness(api_key=("one", "two")), tmp_path, concurrency=1)
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))

    async def work(client):
        keys = [one, one, one, two]
        made = [await make_batch(client, *[line(f"{n}") for n in range(6)], headers=key) for key in keys]
        return [await ended(client, batch["id"], headers=key) for batch, key in zip(made, keys, strict=True)]

    found = [batch for batch, _ in batches.run(work)]
    assert [(batch["status"], batch["request_counts"]["completed"]) for batch in found] == [("completed", 6)] * 4
    order = sorted(range(4), key=lambda n: found[n]["output_file_id"])  # ids sort by time
    assert order.index(3) <= 1, "the second key's batch does not wait for all of the first's"


def test_a_file_of_blank_lines_is_refused(batches, monkeypatch):
    monkeypatch.setattr("pyllm.server.api.batches.worker.MAX_LINES", 3)
    batch, _ = batches.batch("\n" * 1000, line())
    assert [error["code"] for error in batch["errors"]["data"]] == ["too_many_lines"]
    assert batches.batch(line("a"), "", line("b"), "")[0]["status"] == "completed"


def test_long_ids_take_little_memory(batches):
    lines = [*[line(f"{n}" + "i" * 500) for n in range(10_000)], "bad"]

    async def work(client):
        batch = await make_batch(client, *lines)
        tracemalloc.start()
        return await ended(client, batch["id"])

    try:
        batch, _ = batches.run(work)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert batch["status"] == "failed"
    assert peak < 4_000_000


def test_a_revoked_key_answers_no_more_lines(make_harness, tmp_path):
    before = Batches(make_harness(api_key=("old",)), tmp_path)
    old = {"authorization": "Bearer old"}

    batch = before.run(lambda client: make_batch(client, line(), headers=old), works=False)
    before.close()
    after = Batches(make_harness(api_key=("new",)), tmp_path)

    record = after.store.batches[batch["id"]]
    after.run(lambda _: until(lambda: record.status not in UNFINISHED))
    assert (record.completed, record.failed) == (0, 1)
    assert b'"status_code":401' in after.store.content(record.error_file_id).read_bytes()


def test_rows_that_do_not_fit_end_the_batch(harness, tmp_path):
    batches = Batches(harness, tmp_path, max_bytes=6000)
    batch, rows = batches.batch(*[line(f"n{n}", max_tokens=100) for n in range(20)])
    assert batch["status"] == "failed"
    assert batch["errors"]["data"][0]["code"] == "storage_full"
    assert 0 < len(rows) < 20


def test_only_a_few_lines_run_at_a_time(harness, tmp_path):
    batches, running = Batches(harness, tmp_path, concurrency=3), harness.engine.running
    harness.engine.hold_after = 1

    async def work(client):
        await make_batch(client, *[line(f"n{n}", max_tokens=3) for n in range(40)])
        await until(lambda: len(running) == 3)
        await asyncio.sleep(0.3)
        return len(running)

    assert batches.run(work) == 3


@pytest.mark.parametrize(
    ("failures", "sent", "status"),
    [
        ([(429, "queue_full"), (503, "loading"), (429, "queue_full"), (503, "engine_restarting")], 5, 200),
        ([(503, "engine_dead"), (503, "aborted")], 3, 200),
        ([(503, "aborted")] * 9, 4, 503),
        ([(500, "internal_error")], 1, 500),
    ],
)
def test_a_line_is_sent_again_while_the_server_cannot_answer(monkeypatch, failures, sent, status):
    monkeypatch.setattr("pyllm.server.api.batches.lines.FIRST_PAUSE", 0.001)
    owners = []

    async def app(scope, receive, send):
        assert (await receive())["body"] == b"{}"
        code, name = dict(enumerate(failures)).get(len(owners), (200, ""))
        owners.append(scope[BATCH_OWNER])
        await send({"type": "http.response.start", "status": code})
        for part in (b'{"error":{"code"', b':"%s"}}' % name.encode()):
            await send({"type": "http.response.body", "body": part, "more_body": part.startswith(b"{")})

    outcome = asyncio.run(execute(app, Line("a", COMPLETIONS, b"{}"), "me"))
    assert (len(owners), set(owners), outcome.status) == (sent, {"me"}, status)
