"""The stores of responses: what they keep, for whom, how much and how long, and what happens when one is down."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sqlite3
import string
import time
import zlib

import httpx
import pytest
from support.response_stores import SHARED, Redis
from support.serving import PATIENCE

from pyllm.server.api.responses import sqlite_store
from pyllm.server.api.responses.choice import make_store
from pyllm.server.api.responses.redis_store import PREFIX
from pyllm.server.api.responses.sqlite_store import VERSION
from pyllm.server.api.responses.store import COMPRESS_UP_TO, DICTIONARY, Bounds, Caller, decode_items
from pyllm.server.flags import ConfigError, ServerConfig
from pyllm.server.http.budget import MemoryBudget
from pyllm.server.http.errors import ApiError

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
async def make(store_url, anyio_backend):
    """Makes stores over the same data, with bounds."""
    made = []

    def make(max_responses=10**6, max_bytes=10**9, seconds=0, budget=None):
        store = make_store(ServerConfig(response_store=store_url), budget or MemoryBudget(2**30))
        store.bounds = Bounds(max_responses, max_bytes, seconds)
        made.append(store)
        return store

    yield make
    for store in made:
        await store.close()


def caller(name):
    return Caller(name, name, name)


def response(number, size=100):
    text = "".join(random.Random(number).choices(string.ascii_letters + string.digits, k=size))
    return {"id": f"resp_{number}", "output": [{"id": f"msg_{number}", "text": text}]}


async def kept(store, numbers, name):
    return [number for number in numbers if await store.find(f"resp_{number}", caller(name))]


@pytest.mark.parametrize("bounds", [{"max_responses": 40}, {"max_bytes": 9000}], ids=["number", "size"])
async def test_a_client_that_fills_the_store_loses_only_its_own(make, bounds):
    store = make(**bounds)
    for number, client in enumerate("abc"):
        await store.put(response(number), b"[]", caller(client))
    for number in range(10, 120):
        await store.put(response(number), b"[]", caller("d"))
    assert [await kept(store, [number], client) for number, client in enumerate("abc")] == [[0], [1], [2]]
    assert await kept(store, [10, 119], "d") == [119]
    for number in range(200, 300):
        await store.put(response(number), b"[]", caller("e"))
    left = [len(await kept(store, range(10, 300), client)) for client in "de"]
    assert max(left) - min(left) <= 1, "two that want everything get the same"
    assert await kept(store, [0], "a") == [0]


async def test_of_equal_clients_the_least_recently_used_loses_first(make):
    store = make(max_responses=3)
    for number, client in enumerate("cab"):
        await store.put(response(number), b"[]", caller(client))
    assert await kept(store, [0], "c") == [0]
    await store.put(response(3), b"[]", caller("d"))
    assert [await kept(store, [number], client) for number, client in enumerate("cabd")] == [[0], [], [2], [3]]


async def test_the_store_evicts_the_least_recently_used_response(make):
    store, me = make(max_responses=3, max_bytes=2000), caller("")
    for number in range(3):
        await store.put(response(number), b"[]", me)
    assert await kept(store, [0], "") == [0]
    await store.put(response(3), b"[]", me)
    assert await kept(store, range(4), "") == [0, 2, 3]
    holders = await store.find_holders(["msg_1", "msg_3"], me)
    assert holders.keys() == {"msg_3"}
    assert decode_items((await store.read(holders["msg_3"])).output) == response(3)["output"]
    await store.put(response(4, size=2200), b"[]", me)
    count, size = await store.count()
    assert (count, size <= 2000) == (2, True)
    await store.put(response(5, size=3000), b"[]", me)
    assert await kept(store, [5], "") == []
    for number in (3, 4):
        assert await store.remove(f"resp_{number}", me)
    assert await store.count() == (0, 0)


async def test_no_owner_finds_reads_or_deletes_what_belongs_to_another(make):
    store = make()
    await store.put(response(1), b"[]", caller("a"))
    found = await store.find("resp_1", caller("a"))
    for other in ("b", "", "A"):
        assert await store.find("resp_1", caller(other)) is None
        assert await store.find_holders(["msg_1"], caller(other)) == {}
        assert await store.read(found._replace(owner=other)) is None
        assert not await store.remove("resp_1", caller(other))
    assert await store.remove("resp_1", caller("a"))
    assert await store.read(found) is None


async def test_a_response_is_deleted_when_its_time_is_over(make):
    store, me = make(seconds=10_000), caller("a")
    await store.put(response(1), b"[]", me)
    store.bounds = Bounds(10, 10**6, seconds=1)
    await store.put(response(2), b"[]", me)
    deadline = time.monotonic() + PATIENCE
    while await store.find("resp_2", me):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    assert (await store.find_holders(["msg_1", "msg_2"], me)).keys() == {"msg_1"}
    assert not await store.remove("resp_2", me)
    await store.purge()
    assert (await store.count())[0] == 1


@pytest.mark.parametrize("size", [10, COMPRESS_UP_TO])
async def test_a_response_is_read_whole_compressed_or_not(make, size):
    store, items = make(), [{"id": "msg_1", "text": "ü" * size}]
    await store.put({"id": "resp_1", "output": items, "usage": None}, b'[{"content":"Hi"}]', caller("a"))
    found = await store.find("resp_1", caller("a"))
    whole, input_, output = await store.read(found)
    assert json.loads(bytes(whole)) == {"id": "resp_1", "output": items, "usage": None}
    assert decode_items(input_) == [{"content": "Hi"}]
    assert decode_items(output) == items
    assert found.sizes == (len(whole), len(input_), len(output))


async def test_the_dictionary_is_that_of_the_stores_of_this_version():
    version = int(PREFIX.split(":")[1])
    assert (VERSION, version, zlib.adler32(DICTIONARY)) == (1, 1, 4067847647), "servers of two versions share a store"


async def test_many_items_are_found_at_once(make):
    store, me = make(), caller("a")
    output = [{"id": f"msg_{number}", "text": ""} for number in range(600)]
    await store.put({"id": "resp_1", "output": output}, b"[]", me)
    await store.put(response(1000), b"[]", caller("b"))
    found = await store.find_holders([f"msg_{number}" for number in range(1001)], me)
    assert found.keys() == {item["id"] for item in output}
    assert {one.id for one in found.values()} == {"resp_1"}
    assert await store.remove("resp_1", me)
    assert await store.find_holders([item["id"] for item in output], me) == {}


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
async def test_responses_in_memory_count_and_give_way_to_requests(make):
    budget = MemoryBudget(100_000)
    store, me = make(budget=budget), caller("a")
    for number in range(200):
        await store.put(response(number), b"[]", me)
    assert 50_000 < budget.by_kind["responses"] == budget.by_owner["a"] <= 100_000
    count, _ = await store.count()
    assert 0 < count < 200
    with budget.hold("requests", 100_000 - budget.used):
        await store.put(response(200), b"[]", me)
        assert 0 < (await store.count())[0] <= count
        assert budget.used <= 100_000
    for number in await kept(store, range(201), "a"):
        await store.remove(f"resp_{number}", me)
    assert (await store.count(), budget.used) == ((0, 0), 0)


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_stored_response_takes_less_room_than_its_json(make, harness, store_url):
    transport = httpx.ASGITransport(app=harness.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        body = (await client.post("/v1/responses", json={"input": "How are you?"})).json()
    size = len(json.dumps(body))
    assert size > 1000
    store, number = make(), 400
    for n in range(number):
        output = [body["output"][0] | {"id": f"msg_{n}"}]
        content = body | {"id": f"resp_{n}", "output": output}
        await store.put(content, b'[{"role":"user","content":"How are you?"}]', caller("a"))
    count, packed = await store.count()
    await store.close()
    assert count == number
    assert packed / count < 0.3 * size
    assert os.stat(store_url.removeprefix("sqlite://")).st_size / count < 0.3 * size + 600


@pytest.mark.parametrize("store_url", SHARED, indirect=True)
async def test_two_servers_share_what_they_keep_and_its_bounds(make):
    first, second = make(max_responses=3), make(max_responses=3)
    await asyncio.gather(*(store.open() for store in (first, second)))
    for number in range(3):
        await first.put(response(number), b"[]", caller("a"))
    assert await kept(second, range(3), "a") == [0, 1, 2]
    await second.put(response(3), b"[]", caller("b"))
    assert await kept(first, range(3), "a") == [1, 2]
    assert await second.remove("resp_1", caller("a"))
    assert await first.find("resp_1", caller("a")) is None


async def unavailable(store):
    with pytest.raises(ApiError) as caught:
        await store.find("resp_1", caller("a"))
    assert (caught.value.status, caught.value.code) == (503, "response_store_unavailable")
    assert caught.value.headers["retry-after"]


async def until_back(store):
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return await store.check()
        except ApiError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)


async def test_a_file_that_is_gone_for_a_while_is_used_again(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "disk"
    folder.mkdir()
    store = make_store(ServerConfig(response_store=f"sqlite://{folder}/responses.db"), MemoryBudget(2**30))
    await store.put(response(1), b"[]", caller("a"))
    assert (folder / "responses.db").stat().st_mode & 0o777 == 0o600
    folder.rename(tmp_path / "away")
    for _ in range(3):
        await unavailable(store)
    assert not store.is_available
    (tmp_path / "away").rename(folder)
    await until_back(store)
    assert await kept(store, [1], "a") == [1]
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]


async def test_servers_of_a_deleted_file_leave_the_new_one_alone(tmp_path):
    """SQLite would mix their logs."""
    config = ServerConfig(response_store=f"sqlite://{tmp_path}/responses.db")
    old, other, new = (make_store(config, MemoryBudget(2**30)) for _ in range(3))
    for number, store in enumerate((old, other)):
        await store.put(response(number), b"[]", caller("a"))
    (tmp_path / "responses.db").unlink()
    await unavailable(old)
    await new.put(response(2), b"[]", caller("a"))
    for store in (old, other):
        await unavailable(store)
        await store.close()
    assert await kept(new, range(3), "a") == [2]
    await new.close()
    again = make_store(config, MemoryBudget(2**30))
    assert await kept(again, range(3), "a") == [2]
    await again.close()


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_locked_file_can_be_read_but_not_written(make, store_url, monkeypatch):
    monkeypatch.setattr(sqlite_store, "LOCK_SECONDS", 0.1)
    store = make()
    await store.put(response(1), b"[]", caller("a"))
    with contextlib.closing(sqlite3.connect(store_url.removeprefix("sqlite://"), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert await kept(store, [1], "a") == [1]
        with pytest.raises(ApiError):
            await store.put(response(2), b"[]", caller("a"))
        with pytest.raises(ApiError):
            await store.check()
    await until_back(store)
    await store.put(response(2), b"[]", caller("a"))


@pytest.mark.needs("redis")
async def test_a_redis_that_stops_is_used_again_when_it_is_back(tmp_path, caplog):
    caplog.set_level("INFO")
    with Redis(tmp_path) as redis:
        store = make_store(ServerConfig(response_store=redis.url), MemoryBudget(2**30))
        await store.put(response(1), b"[]", caller("a"))
        redis.stop()
        await store.check()
        for _ in range(3):
            await unavailable(store)
        with pytest.raises(ApiError):
            await store.check()
        redis.start()
        await until_back(store)
        await store.put(response(2), b"[]", caller("a"))
        assert await kept(store, [1, 2], "a") == [2], "this one keeps nothing when it ends"
        await store.close()
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]


@pytest.mark.needs("redis")
async def test_a_full_redis_is_unavailable_a_wrong_password_refused(tmp_path):
    with Redis(tmp_path, "--requirepass", "hush", "--maxmemory", "1", "--maxmemory-policy", "noeviction") as redis:
        full = make_store(ServerConfig(response_store=redis.url.replace("//", "//:hush@")), MemoryBudget(2**30))
        await full.open()
        with pytest.raises(ApiError):
            await full.put(response(1), b"[]", caller("a"))
        await full.close()
        for url in (redis.url, redis.url.replace("//", "//:wrong@")):
            store = make_store(ServerConfig(response_store=url), MemoryBudget(2**30))
            with pytest.raises(ConfigError, match="refuses this server") as caught:
                await store.open()
            await store.close()
            assert "wrong" not in str(caught.value) + store.name


@pytest.mark.needs("redis")
async def test_redis_over_tls_needs_a_certificate_that_is_trusted(https_pair, tmp_path):
    key, certificate = map(str, https_pair)
    tls = ("--tls-cert-file", certificate, "--tls-key-file", key, "--tls-ca-cert-file", certificate)
    with Redis(tmp_path, "--port", "0", *tls, tls=True) as redis:
        files = f"?ssl_ca_certs={certificate}&ssl_certfile={certificate}&ssl_keyfile={key}"
        for words, works in ((files, True), ("", False), (f"?ssl_ca_certs={certificate}", False)):
            store = make_store(ServerConfig(response_store=redis.url + words), MemoryBudget(2**30))
            await store.open()
            assert store.is_available is works, words
            if works:
                await store.put(response(1), b"[]", caller("a"))
                assert await kept(store, [1], "a") == [1]
            await store.close()


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("Memory", "none of these"),
        ("postgres://u:hush@h/1", "none of these"),
        ("redis://:hush@[h/0", "not a URL"),
        ("redis://:hu/sh@h/0", "not a URL"),
        ("redis://h:99999/0", "not a URL"),
        ("redis://:hush@/0", "the host or the number"),
        ("redis://h/x", "the host or the number"),
        ("redis://h/0?password=hush", "'password' is no option of redis://"),
        ("rediss://h/0?ssl_cert_reqs=none", "'ssl_cert_reqs' is no option of rediss://"),
        ("rediss://h/0?ssl_ca_certs=/nowhere.pem", "files for TLS cannot be used: No such file"),
        ("sqlite://relative.db", "three slashes"),
        ("sqlite:///", "three slashes"),
        ("sqlite:///a?mode=ro", "no options"),
        ("sqlite:////nowhere/x.db", "/nowhere/x.db cannot be used: No such file"),
        ("sqlite:////dev/null", "it is not a file"),
        ("sqlite:///{folder}", "it is not a file"),
        ("sqlite:///{folder}/text", "file is not a database"),
        ("sqlite:///{folder}/other.db", "a database of another program"),
    ],
)
async def test_an_impossible_store_is_refused_without_its_password(tmp_path, url, problem):
    (tmp_path / "text").write_text("x" * 5000)
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE x (y)")
    config = ServerConfig(response_store=url.replace("{folder}", str(tmp_path)))
    with pytest.raises(ConfigError) as caught:
        await make_store(config, MemoryBudget(2**30)).open()
    assert problem in str(caught.value)
    assert str(caught.value).startswith("--response-store")
    assert "hush" not in str(caught.value)
