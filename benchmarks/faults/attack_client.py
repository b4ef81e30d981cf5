"""A client without manners for `attack_kinds.py`: bytes over sockets of its own, in bounded pieces."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

KEYS = ("key-of-honest-clients", "key-of-the-hostile-one")
HEAD = "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\n"
WORDS = ("sun", "river", "Paris", "forty-two", "été", "dog", "the", "of", "and", "question", "whether", "1234", "x")
PIECE = 2**16


@dataclass(frozen=True, slots=True)
class To:
    """The server under attack, and when to stop."""

    host: str
    port: int
    until: float  # by `time.monotonic`
    key: str = KEYS[1]

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.until


Seen = Counter[str]
Play = Callable[[To], Awaitable[Seen]]


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack: what it sends, the flags of the server that it is meant for, and for how long it may run."""

    sends: str
    play: Play
    flags: tuple[str, ...] = ()
    seconds: float = 60.0


ATTACKS: dict[str, Attack] = {}


def attack(sends: str, *flags: str, seconds: float = 60.0) -> Callable[[Play], Play]:
    def add(play: Play) -> Play:
        ATTACKS[getattr(play, "__name__", "")] = Attack(sends, play, flags, seconds)
        return play

    return add


@dataclass(slots=True)
class Connection:
    """One connection; reading discards all but a head's status."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    buffer: bytes = field(default=b"")

    async def send(self, pieces: Iterable[bytes], *, heed: bool = False) -> int:
        """Send until the server closes, or answers if its answers are heeded; return the bytes that went out."""
        sent = 0
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                if heed and self.reader._buffer:  # type: ignore[attr-defined] # an early answer
                    break
                self.writer.write(piece)
                await self.writer.drain()
                sent += len(piece)
        return sent

    async def status(self, *, drain: bool = True) -> str:
        """Return the answer's status, or "closed"; read the rest of it, and keep nothing."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
            if drain:
                await self.drain(head)
            return head.split(b" ", 2)[1].decode()
        except (ConnectionError, asyncio.IncompleteReadError, IndexError):
            return "closed"

    async def drain(self, head: bytes, bytes_a_second: float = 0.0) -> None:
        """Read an answer's body, perhaps slowly."""
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        left = int(fields.get(b"content-length", b"-1"))
        tail = b""
        while left:
            piece = await self.reader.read(min(PIECE, left) if left > 0 else PIECE)
            if not piece:
                return
            left -= len(piece) if left > 0 else 0
            tail = (tail + piece)[-8:]
            if left < 0 and tail.endswith(b"0\r\n\r\n"):
                return
            if bytes_a_second:
                await asyncio.sleep(len(piece) / bytes_a_second)


@contextlib.asynccontextmanager
async def connected(to: To) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection(to.host, to.port, limit=PIECE)
    try:
        yield Connection(reader, writer)
    finally:
        writer.transport.abort()


def head(to: To, path: str, length: int | None, *lines: str, key: str | None = None, method: str = "POST") -> bytes:
    """Return a request's headers: with a length, or chunked; without a key where it is empty."""
    text = HEAD.format(method=method, path=path, kind="application/json")
    text += f"authorization: Bearer {key or to.key}\r\n" if key != "" else ""
    text += "transfer-encoding: chunked\r\n" if length is None else f"content-length: {length}\r\n"
    return (text + "".join(f"{line}\r\n" for line in lines) + "\r\n").encode()


async def ask(to: To, path: str, body: Any, *, key: str | None = None, drain: bool = True) -> str:
    """Post, read the whole answer and return its status."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + max(1.0, to.until - time.monotonic())):
            async with connected(to) as connection:
                await connection.send((head(to, path, len(data), key=key), *pieces_of(data)), heed=True)
                return await connection.status(drain=drain)
    except TimeoutError:
        return "no answer"
    except OSError:
        return "closed"


def pieces_of(data: bytes) -> Iterable[bytes]:
    return (data[at : at + PIECE] for at in range(0, len(data), PIECE))


async def crowd(to: To, clients: int, play: Callable[[int], Awaitable[str]], rounds: int = 10**9) -> Seen:
    """Play over and over in so many tasks, until the time or the rounds are over."""
    seen, numbers = Seen(), iter(range(rounds))

    async def client() -> None:
        for number in numbers:
            if to.is_over:
                return
            try:
                async with asyncio.timeout(max(0.1, to.until - time.monotonic()) + 1):
                    outcome = await play(number)
            except TimeoutError:
                outcome = "held back"
            except (OSError, EOFError):
                outcome = "closed"
            seen[outcome] += 1
            if outcome == "closed":
                await asyncio.sleep(0.05)

    await asyncio.gather(*(client() for _ in range(clients)))
    return seen


def words(count: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choices(WORDS, k=count))


def megabytes(size: float) -> str:
    """Return words, as many megabytes as asked."""
    text = words(60_000, 1)
    return (text * (int(size * 1e6) // len(text.encode()) + 1))[: int(size * 1e6 * 0.98)]


async def hold(to: To, connection: Connection) -> str:
    """Keep a connection open until the server answers or closes it, or the time is over."""
    try:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + max(0.0, to.until - time.monotonic())):
            return await connection.status()
    except TimeoutError:
        return "held open"
