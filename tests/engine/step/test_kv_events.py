"""The events of the KV cache tell a router exactly which blocks it holds, at any time."""

from __future__ import annotations

import random
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from support.kv_subscriber import END, CacheView
from support.paged_runner import finish, make_core, message

from pyllm.engine.config import KVEventsConfig
from pyllm.engine.errors import EngineStartError
from pyllm.engine.step.kv_cache import KVCacheManager
from pyllm.engine.step.kv_events import KVEventLog, KVEventPublisher
from pyllm.engine.step.request import Request

SIZE = 4
REQUESTS, AT_ONCE = 10_000, 6
HERE = "tcp://127.0.0.1:*"
TOPIC = b"kv@pod@m"


def decoded(log: KVEventLog) -> list[Any]:
    """The changes as a router reads them."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode([event.as_array() for event in log.take()]))


def recorded(num_blocks: int = 40) -> tuple[KVCacheManager, KVEventLog]:
    cache, log = KVCacheManager(num_blocks, SIZE), KVEventLog(SIZE, "CPU")
    cache.record(log)
    return cache, log


def computed(cache: KVCacheManager, tokens: list[int], salt: str | None = None) -> Request:
    """A request whose prompt is in the cache."""
    request = Request(message("r", tokens, cache_salt=salt))
    assert cache.admit(request, cache.find_prefix(request))
    cache.advance(request, len(tokens) - request.num_computed_tokens)
    return request


def test_a_router_rebuilds_the_cache_from_its_events():
    """10,000 requests with common beginnings, three salts and too few blocks, computed and ended in random order."""
    draw = random.Random(5)
    cache, log = recorded()
    view, running, evicted = CacheView(SIZE), [], 0
    truth: dict[int, tuple[str | None, list[int]]] = {}
    for number in range(REQUESTS):
        start = [draw.randrange(3)] * draw.randrange(12)
        salt = draw.choice((None, None, None, "a", "b"))
        request = Request(message(str(number), [*start, *(draw.randrange(9) for _ in range(8))], cache_salt=salt))
        while not cache.admit(request, cache.find_prefix(request)) or len(running) == AT_ONCE:
            if request.block_ids:
                cache.free(request)
            cache.free(running.pop(draw.randrange(len(running))))
        running.append(request)
        for other in draw.sample(running, draw.randrange(len(running)) + 1):
            cache.advance(other, draw.randint(0, len(other.token_ids) - other.num_computed_tokens))
            if other.num_computed_tokens == len(other.token_ids):
                other.append(draw.randrange(9))
                if not cache.allocate(other):
                    cache.free(other)
                    running.remove(other)
            for place, block in enumerate(other.block_hashes):
                truth[int.from_bytes(block[-8:], "big")] = other.cache_salt, other.token_ids[: (place + 1) * SIZE]
        if events := decoded(log):
            evicted += sum(len(event[1]) for event in events if event[0] == "BlockRemoved")
            view.apply(events)
        if number % 50 == 0 or number == REQUESTS - 1:
            assert view.prefixes.keys() == {int.from_bytes(block[-8:], "big") for block in cache.pool.cached}
            known = {block: prefix for block, prefix in view.prefixes.items() if prefix is not None}
            assert known == {block: truth[block] for block in known}
    assert evicted > REQUESTS
    assert len(known) > 20


def test_blocks_that_follow_each_other_are_one_event():
    cache, log = recorded()
    tokens = list(range(1, 14))
    computed(cache, tokens)
    (stored,) = decoded(log)
    assert stored[:1] + stored[2:] == ["BlockStored", None, tokens[:12], SIZE, None, "CPU", None]
    computed(cache, [*tokens[:8], 99, 98, 97, 96, 95])
    ((_, blocks, parent, *_),) = decoded(log)
    assert (len(blocks), parent) == (1, stored[1][1])


def test_an_event_is_a_map_for_routers_that_want_one():
    cache, log = recorded(2)
    computed(cache, [1, 2, 3, 4, 5])
    stored = log.take()[0]
    shown = msgspec.msgpack.decode(msgspec.msgpack.encode(stored))
    assert shown.pop("type") == "BlockStored"
    assert shown == {
        "block_hashes": stored.block_hashes, "parent_block_hash": None, "token_ids": [1, 2, 3, 4], "block_size": 4,
        "lora_id": None, "medium": "CPU", "lora_name": None,
    }  # fmt: skip


def test_the_salt_is_in_the_first_block_of_its_prompt():
    cache, log = recorded()
    computed(cache, list(range(13)), "tenant")
    ((*_, extra),) = decoded(log)
    assert extra == [["tenant"], None, None]


def test_without_a_router_no_event_is_made(monkeypatch):
    made = []
    monkeypatch.setattr(KVEventLog, "__init__", lambda *_: made.append(1))
    core = make_core(num_blocks=8)
    for number in range(9):
        core.add_request(message("r", [number] * 20, max_tokens=3, ignore_eos=True))
        finish(core)
    assert not made
    assert core.scheduler.kv_cache.pool.on_evicted is None
    assert core.stats().num_kv_event_batches == 0


def publisher(**settings: Any) -> KVEventPublisher:
    config = {"enable_kv_cache_events": True, "endpoint": HERE, "replay_endpoint": HERE, "topic": TOPIC.decode()}
    return KVEventPublisher(KVEventsConfig(**config | settings))


def replayed(dealer: Any, first: int, last: int) -> list[list[bytes]]:
    """The kept messages from number `first` on, once number `last` is among them."""
    while True:
        dealer.send_multipart([b"", first.to_bytes(8, "big")])
        found: list[list[bytes]] = []
        while not found or found[-1][1] != END:
            assert dealer.poll(20_000)
            delimiter, *frames = dealer.recv_multipart()
            assert delimiter == b""
            found.append(frames)
        assert found.pop() == [b"", END, b""]
        if last < first or (found and found[-1][1] == last.to_bytes(8, "big")):
            return found


def numbers_of(found: list[list[bytes]]) -> list[int]:
    return [int.from_bytes(number, "big") for _, number, _ in found]


@pytest.fixture
def closing() -> Iterator[Callable[[KVEventPublisher], KVEventPublisher]]:
    """Close publishers, however the test ends: an open one would keep the interpreter from ending."""
    opened: list[KVEventPublisher] = []
    yield lambda events: opened.append(events) or events
    for events in opened:
        events.close()


@pytest.fixture
def connected() -> Iterator[Callable[[int], Any]]:
    """Open sockets of a subscriber."""
    import zmq

    context, opened = zmq.Context(), []

    def connect(kind: int) -> Any:
        opened.append(context.socket(kind))
        return opened[-1]

    yield connect
    for sock in opened:
        sock.close(linger=0)
    context.term()


@pytest.mark.needs("pyzmq")
def test_batches_that_find_no_room_are_counted_and_leave_a_gap(connected: Any, closing: Any) -> None:
    import zmq

    cache, log = recorded()
    events, view = closing(publisher(max_queue_size=3)), CacheView(SIZE)
    dealer = connected(zmq.DEALER)
    dealer.connect(events.endpoints[1])
    events.follow(log)
    for number in range(10):  # nothing is sent yet, as when the thread is held up
        computed(cache, [number] * 5)
        events.publish()
    assert (events.num_published, events.num_dropped) == (11, 8)
    events.start()
    for frames in replayed(dealer, 0, 2):
        view.receive(frames, TOPIC)
    assert (view.last, len(view.prefixes)) == (2, 2)
    computed(cache, [77] * 5)
    events.publish()
    found = replayed(dealer, 3, 11)
    assert numbers_of(found) == numbers_of(replayed(dealer, 0, 11)) == [11], "what is kept has no gap"
    view.receive(found[0], TOPIC)
    assert view.restarts == 2, "after the gap the cache counts as empty"
    assert list(view.prefixes.values()) == [(None, [77] * 4)]


@pytest.mark.needs("pyzmq")
def test_a_subscriber_that_does_not_read_delays_nothing(connected: Any, closing: Any) -> None:
    import zmq

    cache, log = recorded(500)
    events = closing(publisher(hwm=1, buffer_steps=10))
    sub, dealer = connected(zmq.SUB), connected(zmq.DEALER)
    sub.rcvhwm, sub.rcvbuf = 1, 4096
    sub.subscribe("kv@")
    sub.connect(events.endpoints[0])
    dealer.connect(events.endpoints[1])
    events.follow(log)
    events.start()
    for number in range(3000):
        cache.free(computed(cache, [1000 + number] * 400))
        events.publish()
    assert events.num_dropped == 0
    assert numbers_of(replayed(dealer, 2995, 3000)) == list(range(2995, 3001))
    received = []
    while sub.poll(200):
        received.append(int.from_bytes(sub.recv_multipart()[1], "big"))
    assert received == sorted(set(received))
    assert len(received) < 3000, "ZeroMQ has dropped what it had no room for"


@pytest.mark.needs("pyzmq")
def test_replay_begins_at_the_requested_number(connected: Any, closing: Any) -> None:
    import zmq

    cache, log = recorded()
    events = closing(publisher(buffer_steps=6))
    req, dealer = connected(zmq.REQ), connected(zmq.DEALER)
    for sock in (req, dealer):
        sock.connect(events.endpoints[1])
    events.follow(log)
    events.start()
    for number in range(8):
        computed(cache, [number] * 5)
        events.publish()
    for first, expected in ((0, range(3, 9)), (5, range(5, 9)), (9, range(0)), (2**64 - 1, range(0))):
        assert numbers_of(replayed(dealer, first, 8)) == list(expected)
    for nonsense in ([b""], [b"", b"7"], [b"", b"", b"1" * 8], [b"x", b"1" * 8]):
        dealer.send_multipart(nonsense)
    req.send((8).to_bytes(8, "big"))
    assert req.poll(20_000), "the nonsense before it did no harm"
    assert req.recv_multipart()[:2] == [TOPIC, (8).to_bytes(8, "big")]
    dealer.send((8).to_bytes(8, "big"))  # without the empty frame, as AIBrix does
    assert dealer.poll(20_000)
    assert dealer.recv_multipart()[:2] == [TOPIC, (8).to_bytes(8, "big")]


@pytest.mark.needs("pyzmq")
def test_an_address_in_use_is_refused_in_one_sentence(closing: Any) -> None:
    events = closing(publisher())
    for setting in ("endpoint", "replay_endpoint"):
        with pytest.raises(EngineStartError, match=rf"the {setting} tcp://\S+ cannot be bound \(address .* in use\)"):
            publisher(**{setting: events.endpoints[0]})


@pytest.mark.needs("pyzmq")
def test_a_router_on_another_host_may_listen(connected: Any, closing: Any) -> None:
    import zmq

    cache, log = recorded()
    sub = connected(zmq.SUB)
    sub.subscribe("kv@")
    port = sub.bind_to_random_port("tcp://*")
    events = closing(publisher(endpoint=f"tcp://{socket.gethostname()}:{port}", replay_endpoint=None))
    events.follow(log)
    events.start()
    for number in range(1000):  # until it has connected
        computed(cache, [number] * 5)
        events.publish()
        if sub.poll(20):
            break
    assert sub.recv_multipart()[0] == TOPIC


def test_without_pyzmq_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(EngineStartError, match=r"needs pyzmq: pip install 'pyllm-deep\[kv-events\]'\.$"):
        publisher()
