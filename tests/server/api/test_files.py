"""Files on disk: uploads, their bounds, pages, and the checks of a new batch."""

from __future__ import annotations

import asyncio

import pytest
from support.answers import error_of
from support.batches import COMPLETIONS, Batches, ended, line, make_batch

from pyllm.server.api.batches.wire import BatchList, FileList, FileObject

UNFINISHED = (
    b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{}\r\n'
)


@pytest.fixture
def batches(harness, tmp_path):
    return Batches(harness, tmp_path / "batches")


class TestUploads:
    def test_a_file_comes_back_byte_for_byte(self, batches):
        data = bytes(range(256)) * 500 + b"\r\n--not-the-boundary\r\n"
        form = {"files": {"file": ("../../etc/übel\u202e.jsonl", data)}, "data": {"purpose": "batch"}}
        record = batches.run(lambda client: client.post("/v1/files", **form), works=False)
        file = FileObject.model_validate(record.json())
        assert (file.bytes, file.purpose, file.filename) == (len(data), "batch", "übel.jsonl")
        content = batches.harness.get(f"/v1/files/{file.id}/content")
        assert content.content == data
        assert content.headers["content-disposition"].startswith("attachment")

    @pytest.mark.parametrize(
        ("given", "part"),
        [
            ("bytes=0-0", slice(0, 1)), ("bytes=3-", slice(3, None)), ("bytes=-2", slice(-2, None)),
            ("bytes=2-" + "9" * 18, slice(2, None)), ("bytes=-" + "9" * 18, slice(None)),
            *((bad, None) for bad in ("", "bytes", "bytes=", "bytes=-", "bytes=-0", "bytes=5-2", "bytes=900-")),
            *((bad, None) for bad in ("lines=0-1", "bytes=0-0,2-2", "bytes=0-" + "9" * 5000, "bytes=" + "0-," * 5000)),
        ],
    )  # fmt: skip
    def test_one_part_of_a_file_can_be_read(self, batches, given, part):
        id_ = batches.upload(line()).json()["id"]
        response = batches.harness.get(f"/v1/files/{id_}/content", range=given)
        if part is not None:
            assert (response.status_code, response.text) == (206, line()[part])
        else:
            assert (response.status_code, error_of(response).code) == (416, "invalid_range")
            assert response.headers["content-range"].startswith("bytes */")

    def test_content_that_is_gone_from_the_disk_is_a_404(self, batches, tmp_path):
        id_ = batches.upload(line()).json()["id"]
        next(tmp_path.rglob(id_)).unlink()
        response = batches.harness.get(f"/v1/files/{id_}/content")
        assert (response.status_code, error_of(response).code) == (404, "file_not_found")

    @pytest.mark.parametrize(
        ("fields", "status", "param"),
        [
            ({"purpose": "fine-tune"}, 400, "purpose"),
            ({"purpose": ""}, 400, "purpose"),
            ({"purpose": "b" * 300}, 400, "purpose"),
            ({"colour": "1"}, 400, "colour"),
            ({"expires_after[anchor]": "created_at"}, 400, "expires_after"),
            ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "5"}, 400, "expires_after"),
            ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}, 200, None),
        ],
    )
    def test_fields_are_checked(self, batches, fields, status, param):
        response = batches.upload("{}", **fields)
        assert response.status_code == status
        if param is None:
            assert response.json()["expires_at"] - response.json()["created_at"] == 3600
        else:
            assert error_of(response).param == param

    @pytest.mark.parametrize(
        ("kind", "body", "status"),
        [
            ("application/json", b"{}", 415),
            ("multipart/form-data", b"--x--", 415),
            ("multipart/form-data; boundary=x", b"", 400),
            ("multipart/form-data; boundary=x", b"--x\r\n\r\n\r\n--x--", 400),
            ("multipart/form-data; boundary=x", b"--y\r\nno form", 400),
            ("multipart/form-data; boundary=x", b"--x\r\n" + b"a: b\r\n" * 9999, 400),
            ("multipart/form-data; boundary=x", b"--x\r\n" + b"a" * 10**6, 400),
            ("multipart/form-data; boundary=" + "x" * 5000, b"", 400),
            ("multipart/form-data; boundary=x", UNFINISHED, 400),
            ("multipart/form-data; boundary=x",
             b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\ncut off', 400),
        ],
    )  # fmt: skip
    def test_what_is_no_form_is_refused(self, batches, kind, body, status, tmp_path):
        response = batches.harness.post("/v1/files", content=body, headers={"content-type": kind})
        assert response.status_code == status, response.text
        error_of(response)
        assert not list((tmp_path / "batches" / "files").iterdir())

    def test_size_number_and_room_are_bounded(self, harness, tmp_path, monkeypatch):
        batches = Batches(harness, tmp_path, max_bytes=5000)
        monkeypatch.setattr("pyllm.server.api.batches.upload.MAX_FILE_BYTES", 1000)
        monkeypatch.setattr("pyllm.server.api.batches.route.MAX_FILE_BYTES", 1000)
        monkeypatch.setattr("pyllm.server.api.batches.store.MAX_FILES", 3)
        assert error_of(batches.upload("x" * 1001)).code == "body_too_large"
        assert [batches.upload("x" * 900).status_code for _ in range(3)] == [200] * 3
        assert "at most 3 files" in error_of(batches.upload("x")).message
        monkeypatch.setattr("pyllm.server.api.batches.store.MAX_FILES", 99)
        while (response := batches.upload("x" * 900)).status_code == 200:
            pass
        assert (error_of(response).code, response.status_code) == ("storage_full", 400)
        assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) == batches.store.used <= 5000
        for file in batches.harness.get("/v1/files").json()["data"]:
            assert batches.run(lambda client, id=file["id"]: client.delete(f"/v1/files/{id}"), works=False).json()[
                "deleted"
            ]
        assert batches.store.used == 0

    def test_only_a_few_arrive_at_a_time(self, batches):
        batches.store.uploads = [""] * 4
        response = batches.upload("x")
        assert (response.status_code, error_of(response).code) == (429, "too_many_uploads")


KEYS = {name: {"authorization": f"Bearer {name}"} for name in ("one", "two")}


class TestShares:
    """With several keys, one may have as much as is left for the others."""

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch):
        for place in ("upload", "route", "store"):
            monkeypatch.setattr(f"pyllm.server.api.batches.{place}.MAX_FILE_BYTES", 4000)

    @pytest.fixture
    def shared(self, make_harness, tmp_path):
        return Batches(make_harness(api_key=tuple(KEYS)), tmp_path / "batches", max_bytes=40_000, shared=True)

    @staticmethod
    def fill(batches, key, size):
        """Upload until it is refused; return the ids, and the refusal."""
        ids = []
        while (response := batches.upload("x" * size, headers=KEYS[key])).status_code == 200:
            ids.append(response.json()["id"])
        return ids, response

    def test_one_key_cannot_take_all_bytes(self, shared):
        first, refusal = self.fill(shared, "one", 2000)
        assert 6 <= len(first) <= 10
        assert (refusal.status_code, error_of(refusal).code) == (400, "storage_full")
        assert len(self.fill(shared, "two", 2000)[0]) >= 2
        for name in first:
            path = f"/v1/files/{name}"
            assert shared.run(lambda c, path=path: c.delete(path, headers=KEYS["one"]), works=False).status_code == 200
        assert len(self.fill(shared, "one", 2000)[0]) >= 2, "what is deleted can be used again"
        shared.close()
        again = Batches(shared.harness, shared.store._folder, max_bytes=40_000, shared=True)
        assert again.store.owned == +shared.store.owned, "counted again after a restart"

    def test_one_key_cannot_take_all_files_and_batches(self, shared, monkeypatch):
        monkeypatch.setattr("pyllm.server.api.batches.store.MAX_FILES", 8)
        monkeypatch.setattr("pyllm.server.api.batches.store.MAX_BATCHES", 8)
        for key, count in (("one", 4), ("two", 2)):
            ids, refusal = self.fill(shared, key, 10)
            assert (len(ids), error_of(refusal).code) == (count, "storage_full")
            body = {"endpoint": COMPLETIONS, "completion_window": "24h", "input_file_id": ids[0]}

            def start(client, key=key, body=body):
                return client.post("/v1/batches", json=body, headers=KEYS[key])

            assert [shared.run(start, works=False).status_code for _ in range(count)] == [200] * count
            refusal = shared.run(start, works=False)
            assert (refusal.status_code, error_of(refusal).code) == (429, "too_many_batches")

    def test_one_key_cannot_take_all_places_for_uploads(self, shared):
        name = shared.upload("x", headers=KEYS["one"]).json()["id"]
        shared.store.uploads = [shared.store.files[name].owner] * 2
        assert error_of(shared.upload("x", headers=KEYS["one"])).code == "too_many_uploads"
        assert shared.upload("x", headers=KEYS["two"]).status_code == 200

    def test_the_key_with_the_most_ended_batches_loses_its_oldest(self, shared, monkeypatch):
        monkeypatch.setattr("pyllm.server.api.batches.store.MAX_BATCHES", 5)

        async def run(client, key):
            batch = await make_batch(client, "bad", headers=KEYS[key])
            return (await ended(client, batch["id"], headers=KEYS[key]))[0]["id"]

        keys = ("two", "one", "one", "one", "one", "one")
        made = [shared.run(lambda client, key=key: run(client, key)) for key in keys]
        assert [name in shared.store.batches for name in made] == [True, False, True, True, True, True]


def test_pages_of_files_and_batches(batches):
    ids = [batches.upload(line()).json()["id"] for _ in range(5)]
    get = batches.harness.get
    page = FileList.model_validate(get("/v1/files?limit=2").json())
    assert ([file.id for file in page.data], page.has_more) == (ids[:2:-1], True)
    page = FileList.model_validate(get(f"/v1/files?limit=2&after={page.last_id}&order=desc").json())
    assert [file.id for file in page.data] == [ids[2], ids[1]]
    last = get(f"/v1/files?order=asc&after={ids[3]}&purpose=batch").json()
    assert ([file["id"] for file in last["data"]], last["has_more"]) == ([ids[4]], False)
    assert get("/v1/files?purpose=batch_output").json()["data"] == []
    for query, param in (
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("after=x", "after"),
        ("order=up", "order"),
        ("x=1", "x"),
    ):
        assert error_of(get(f"/v1/files?{query}")).param == param
    body = {"endpoint": COMPLETIONS, "completion_window": "24h"}
    made = [batches.harness.post("/v1/batches", body | {"input_file_id": id_}).json()["id"] for id_ in ids[:3]]
    listed = BatchList.model_validate(get("/v1/batches?limit=2").json())
    assert ([batch.id for batch in listed.data], listed.has_more) == (made[:0:-1], True)
    assert error_of(get("/v1/batches?order=asc")).param == "order"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input_file_id": "file-none"}, 404, "input_file_id"),
        ({"input_file_id": "x" * 65}, 400, "input_file_id"),
        ({"completion_window": "1h"}, 400, "completion_window"),
        ({"endpoint": "/v1/messages"}, 400, "endpoint"),
        ({"metadata": {str(n): "" for n in range(17)}}, 400, "metadata"),
        ({"colour": 1}, 400, "colour"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "output_expires_after.seconds"),
    ],
)
def test_a_batch_is_checked(batches, fields, status, param):
    file = batches.upload(line()).json()
    body = {"input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "24h"}
    response = batches.harness.post("/v1/batches", body | fields)
    assert response.status_code == status
    assert error_of(response).param == param


def test_old_files_and_batches_are_deleted(batches):
    batch, _ = batches.batch(line(), output_expires_after={"anchor": "created_at", "seconds": 3600})
    store = batches.store
    assert store.files[batch["output_file_id"]].expires_at - batch["created_at"] in range(3600, 3700)
    for record in store.files.values():
        record.expires_at = 1
    store.batches[batch["id"]].created_at = 1
    asyncio.run(store.purge())
    assert (store.files, store.batches, store.used) == ({}, {}, 0)


def test_without_a_folder_the_flag_is_named(harness):
    for response in (harness.get("/v1/files"), harness.post("/v1/batches", {}), harness.get("/v1/batches/x")):
        assert (response.status_code, error_of(response).code) == (404, "batches_disabled")
        assert "--batch-dir" in error_of(response).message
