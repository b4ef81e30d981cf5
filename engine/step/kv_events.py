"""Tells routers which blocks the KV cache holds, over ZeroMQ, in the frames that vLLM's consumers read.

Each step that stores or evicts blocks is one message of three frames: the topic, a sequence number of 8 bytes (big
endian), and msgpack: `[time, events, 0]`. A subscriber that has missed numbers requests them from the replay socket
by the first one, and gets the same three frames for each step that is still kept, then a message numbered -1 without a
payload. A gap that cannot be filled is followed by `AllBlocksCleared`: the subscriber knows less than the cache holds,
but nothing false.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from ..config import KVEventsConfig
from ..errors import EngineStartError
from .request import Request

if TYPE_CHECKING:
    import zmq

END = (-1).to_bytes(8, "big", signed=True)  # the number of the message after a replay
MAX_REQUEST_BYTES = 1024  # of a message from a subscriber; a longer one closes its connection
CLOSE_SECONDS = 1.0


class Event(msgspec.Struct, omit_defaults=True, tag=True):
    """A change of the cache: a map with the name of its class as `type`, or an array that begins with that name."""

    def as_array(self) -> list[Any]:
        """Return the name and the fields in their order."""
        return [type(self).__name__, *msgspec.structs.astuple(self)]


class BlockStored(Event):
    """Blocks that follow each other have been computed; they can be found until they are removed."""

    block_hashes: list[int]
    parent_block_hash: int | None  # of the block before the first one
    token_ids: list[int]  # of all the blocks
    block_size: int
    lora_id: None
    medium: str
    lora_name: None
    extra_keys: list[list[str] | None] | None = None  # for each block; the first of a prompt with a salt has the salt

    def as_array(self) -> list[Any]:
        """Return the name and the fields in their order, the last one only if it is used."""
        fields = super().as_array()
        return fields[:-1] if self.extra_keys is None else fields


class BlockRemoved(Event):
    """These blocks have been evicted."""

    block_hashes: list[int]
    medium: str


class AllBlocksCleared(Event):
    """The cache is empty."""


class KVEventLog:
    """The changes of the cache since they were last taken, in order."""

    def __init__(self, block_size: int, medium: str) -> None:
        self._block_size, self._medium = block_size, medium
        self._events: list[Event] = []

    def on_stored(self, request: Request, index: int) -> None:
        """Note that block `index` of a request can be found now."""
        block_hash, size = _short(request.block_hashes[index]), self._block_size
        tokens = request.token_ids[index * size : (index + 1) * size]
        parent = _short(request.block_hashes[index - 1]) if index else None
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockStored) and last.block_hashes[-1] == parent:
            last.block_hashes.append(block_hash)
            last.token_ids += tokens
            if last.extra_keys is not None:
                last.extra_keys.append(None)
            return
        salt: list[list[str] | None] | None = [[request.cache_salt]] if request.cache_salt and not index else None
        self._events.append(BlockStored([block_hash], parent, tokens, size, None, self._medium, None, salt))

    def on_removed(self, block_hash: bytes) -> None:
        """Note that a block was evicted."""
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved):
            last.block_hashes.append(_short(block_hash))
        else:
            self._events.append(BlockRemoved([_short(block_hash)], self._medium))

    def take(self) -> list[Event]:
        """Return the changes, and forget them."""
        events, self._events = self._events, []
        return events


def _short(block_hash: bytes) -> int:
    """Return the last 64 bits of a hash, as vLLM does: a router may know no longer numbers."""
    return int.from_bytes(block_hash[-8:], "big")


class KVEventPublisher:
    """Publishes batches of events from a thread of its own, so that no subscriber can delay a step."""

    def __init__(self, config: KVEventsConfig) -> None:
        """Open the sockets; raise `EngineStartError` if pyzmq is missing or an address cannot be used."""
        try:
            import zmq
        except ImportError:
            raise EngineStartError("--kv-events-config needs pyzmq: pip install 'pyllm-deep[kv-events]'.") from None
        self.num_published = 0  # batches, those dropped included
        self.num_dropped = 0  # batches that the queue had no room for
        self._config, self._topic = config, config.topic.encode()
        self._context = zmq.Context()
        self._queue: deque[tuple[int, float, list[Event]]] = deque()  # number, time and changes of each step
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        self._next_sent = 0
        self._encode = msgspec.msgpack.Encoder().encode
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._closing = False
        self._thread: threading.Thread | None = None
        try:
            self._pub = self._open(zmq.PUB, "endpoint", config.endpoint, config.hwm)
            self._replay: zmq.Socket[bytes] | None = None
            if config.replay_endpoint is not None:
                # A whole replay fits into a subscriber's queue. Twice, because ZeroMQ learns of messages that were read
                # only when half of the queue was.
                room = 2 * (config.buffer_steps + 2)
                self._replay = self._open(zmq.ROUTER, "replay_endpoint", config.replay_endpoint, room)
                self._replay.router_mandatory = True  # fail, rather than drop silently, if there is no room
        except EngineStartError:
            self.close()
            raise

    def _open(self, kind: int, name: str, endpoint: str, room: int) -> zmq.Socket[bytes]:
        import zmq

        sock: zmq.Socket[bytes] = self._context.socket(kind)
        sock.linger, sock.sndhwm, sock.maxmsgsize = 0, room, MAX_REQUEST_BYTES
        sock.ipv6 = "[" in endpoint
        binds = kind == zmq.ROUTER or self._config.binds
        try:
            (sock.bind if binds else sock.connect)(endpoint.replace("//localhost:", "//127.0.0.1:"))
        except zmq.ZMQError as error:
            verb = "bound" if binds else "connected to"
            reason = zmq.strerror(error.errno or 0).lower()
            raise EngineStartError(
                f"--kv-events-config: the {name} {endpoint} cannot be {verb} ({reason}): choose another one."
            ) from None
        return sock

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The addresses in use: that of the events, and that of the replay if there is one."""
        import zmq

        sockets = [self._pub] if self._replay is None else [self._pub, self._replay]
        return tuple(sock.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0") for sock in sockets)

    def follow(self, log: KVEventLog) -> None:
        """Publish what is in `log`, after telling subscribers of an earlier engine that its blocks are gone."""
        self._log = log
        self._queue_batch([AllBlocksCleared()])

    def start(self) -> None:
        """Send what is published, in a thread."""
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def publish(self) -> None:
        """Publish what has changed since the last call."""
        if events := self._log.take():
            self._queue_batch(events)

    def _queue_batch(self, events: list[Event]) -> None:
        """Queue a batch; if the queue is full, drop it, which leaves a gap in the numbers."""
        number = self.num_published
        self.num_published += 1
        if len(self._queue) >= self._config.max_queue_size:
            self.num_dropped += 1
            return
        self._queue.append((number, time.time(), events))
        with contextlib.suppress(BlockingIOError):  # it has been woken often enough
            self._wake.send(b"\0")

    def close(self) -> None:
        """Close the sockets; what has not been sent is lost."""
        self._closing = True
        if self._thread is not None:
            self._wake.close()
            self._thread.join(CLOSE_SECONDS)
        self._context.destroy(linger=0)
        self._wake.close()
        self._woken.close()

    def _run(self) -> None:
        import zmq

        poller = zmq.Poller()
        poller.register(self._woken, zmq.POLLIN)
        if self._replay is not None:
            poller.register(self._replay, zmq.POLLIN)
        while not self._closing:
            ready = dict(poller.poll())
            if self._woken.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
            while self._queue:
                self._send(*self._queue.popleft())
            if self._replay is not None and self._replay in ready:
                with contextlib.suppress(zmq.ZMQError):  # the subscriber has left, or does not read
                    self._answer(self._replay, zmq.NOBLOCK)

    def _send(self, number: int, moment: float, events: list[Event]) -> None:
        if number != self._next_sent:  # batches were dropped: what is kept is no longer the whole story
            events.insert(0, AllBlocksCleared())
            self._kept.clear()
        self._next_sent = number + 1
        shown = [event.as_array() for event in events] if self._config.event_encoding == "array" else events
        payload = self._encode([moment, shown, 0])  # 0: the rank of the only engine
        self._pub.send_multipart((self._topic, number.to_bytes(8, "big"), payload))
        self._kept.append((number, payload))

    def _answer(self, replay: zmq.Socket[bytes], flags: int) -> None:
        """Send the kept batches from the requested number on; other messages are ignored."""
        peer, *delimiter, number = replay.recv_multipart(flags)
        if len(number) != 8 or delimiter not in ([], [b""]):
            return
        first = int.from_bytes(number, "big")
        found = [(self._topic, kept.to_bytes(8, "big"), payload) for kept, payload in self._kept if kept >= first]
        for frames in (*found, (b"", END, b"")):
            replay.send_multipart((peer, *delimiter, *frames), flags)
