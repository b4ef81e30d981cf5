"""Sends hostile requests as bytes over sockets of their own, and judges what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from support.checkpoints import TINY

from pyllm.model.cpu.backend import available

LATEST = 10.0
"""Seconds within which every answer must have come."""
GIVE_UP = 4 * LATEST
INSIDE = re.compile(r"Traceback|\.py\b|site-packages|File \"|0x[0-9a-f]{8}")
"""What an error must not show."""
FAILED = re.compile(r'"type":"(server_error|api_error)"')


@dataclass(frozen=True, slots=True)
class Case:
    """A hostile request.

    Attributes:
        name: what is hostile about it.
        data: all that is sent.
        path: where to, if it is any path at all; Anthropic's have errors of their own shape.
        replies: how many must come; with 0 the connection is closed as soon as all is sent.
        optional: whether the server may also close the connection without a word.
    """

    name: str
    data: bytes
    path: str = ""
    replies: int = 1
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer."""

    status: int
    headers: dict[str, str]
    body: bytes


def post(path: str, body: bytes, *headers: str, name: str = "", kind: str = "application/json") -> Case:
    """A request with this body."""
    lines = [f"POST {path} HTTP/1.1", "host: x", "connection: close", f"content-length: {len(body)}"]
    lines += [f"content-type: {kind}"] if kind else []
    return Case(name or path, "\r\n".join([*lines, *headers, "", ""]).encode("latin-1") + body, path)


def _whole_chunks(data: bytes) -> tuple[bytes, int] | None:
    """The content of chunks, and where they end; None while there are more to come."""
    pieces, at = list[bytes](), 0
    while (end := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:end].split(b";")[0], 16)
        pieces.append(data[end + 2 : end + 2 + size])
        at = end + 4 + size
        if not size:
            return b"".join(pieces), at
    return None


def _is_partial(data: bytearray) -> bool:
    """Whether the first answer is certainly partial, without reading again all that has come of it."""
    head = bytes(data[:4096]).partition(b"\r\n\r\n")[0]
    if b"transfer-encoding" in head:
        return not data.endswith(b"0\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return length is not None and len(data) < int(length[1])


def parse_replies(data: bytes, ended: bool) -> list[Reply]:
    """The whole answers in `data`; the last one counts as whole when the connection has `ended`."""
    replies = []
    while b"\r\n\r\n" in data:
        head, _, rest = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        status, size = int(first.split()[1]), len(rest)
        body = rest
        if status == 100:
            size, body = 0, b""
        elif "content-length" in headers and len(rest) >= int(headers["content-length"]):
            size = int(headers["content-length"])
            body = rest[:size]
        elif (chunks := _whole_chunks(rest) if "transfer-encoding" in headers else None) is not None:
            body, size = chunks
        elif not ended:
            return replies
        if status != 100:
            replies.append(Reply(status, headers, body))
        data = rest[size:]
    return replies


@dataclass(slots=True)
class Outcome:
    """What many requests came to.

    Attributes:
        tried: requests that were sent.
        statuses: how often each status was answered; 0: closed without a word.
        slowest: seconds that the slowest answer took, and what it was for.
        seconds: status and time of each answer.
        faults: what must not be, one sentence each.
    """

    tried: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    slowest: tuple[float, str] = (0.0, "")
    seconds: list[tuple[int, float]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def take(self, case: Case, replies: list[Reply], seconds: float) -> None:
        """Count what came for a request."""
        self.tried += 1
        self.slowest = max(self.slowest, (seconds, case.name))
        self.seconds += [(reply.status, seconds) for reply in replies]
        self.statuses.update([reply.status for reply in replies] or ([0] if case.replies else []))
        found = [fault for reply in replies for fault in faults_of(reply, case.path)]
        if seconds > LATEST:
            found.append(f"took {seconds:.1f} s")
        if len(replies) < case.replies and not (case.optional and not replies):
            found.append(f"{len(replies)} of {case.replies} answers")
        self.faults += [f"{case.name}: {fault}" for fault in found]


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def faults_of(reply: Reply, path: str) -> Iterator[str]:
    """What is wrong with an answer, whatever the request was."""
    text = reply.body.decode("utf-8", "surrogateescape")
    if reply.status >= 500:
        yield f"status {reply.status}: {text[:300]}"
    kind = reply.headers.get("content-type", "")
    try:
        content = json.loads(reply.body, parse_constant=_refuse_constant) if "json" in kind and reply.body else None
    except ValueError as error:
        yield f"status {reply.status}, and no JSON ({error}): {text[:300]}"
        return
    if reply.status >= 400:
        yield from _faults_of_error(content, path, text)
    if kind.startswith("text/event-stream") and (not text.endswith("\n\n") or FAILED.search(text)):
        yield f"a stream that ended in {text[-300:]!r}"


def _faults_of_error(content: Any, path: str, text: str) -> Iterator[str]:
    error = content.get("error") if isinstance(content, dict) else None
    anthropic = re.match(r"/v1/messages(/|$)", path) and {"error", "type", "request_id"}
    if not isinstance(error, dict) or error.keys() != {"message", "type", "param", "code"}:
        yield f"no error object: {text[:300]}"
        return
    if content.keys() != (anthropic or {"error"}):
        yield f"another shape than this route's: {text[:300]}"
    if not (isinstance(error["message"], str) and 0 < len(error["message"]) < 1000 and isinstance(error["type"], str)):
        yield f"no message for people: {text[:300]}"
    if not all(error[name] is None or isinstance(error[name], str) for name in ("param", "code")):
        yield f"param and code are texts: {text[:300]}"
    if INSIDE.search(error["message"]):
        yield f"it shows the inside: {text[:300]}"


async def _exchange(host: str, port: int, case: Case) -> tuple[list[Reply], float]:
    reader, writer = await asyncio.open_connection(host, port, limit=2**24)
    began, data, replies = time.monotonic(), bytearray(), list[Reply]()
    try:
        with contextlib.suppress(ConnectionError):  # an answer may come before all is sent
            writer.write(case.data)
            if not case.replies:
                return [], 0.0
            while len(replies) < case.replies:
                piece = await asyncio.wait_for(reader.read(2**20), GIVE_UP)
                data += piece
                if not piece or case.replies > 1 or not _is_partial(data):
                    replies = parse_replies(bytes(data), ended=not piece)
                if not piece:
                    break
        return replies or parse_replies(bytes(data), ended=True), time.monotonic() - began
    except TimeoutError:
        return replies, time.monotonic() - began
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def send_all(url: str, cases: Iterable[Case], concurrency: int = 8) -> Outcome:
    """Send each on a connection of its own, so many at a time."""
    address, outcome, waiting = httpx.URL(url), Outcome(), iter(cases)

    async def work() -> None:
        for case in waiting:
            outcome.take(case, *await _exchange(address.host, address.port or 80, case))

    async def run() -> None:
        await asyncio.gather(*(work() for _ in range(concurrency)))

    asyncio.run(run())
    return outcome


class Prober:
    """Asks for /health ten times a second while it is entered.

    Attributes:
        seconds: how long each answer took; infinity where there was none, or another than 200.
    """

    def __init__(self, url: str) -> None:
        self.seconds: list[float] = []
        self._url = f"{url}/health"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        while not self._over.wait(0.1):
            began, status = time.monotonic(), 0
            with contextlib.suppress(httpx.HTTPError):
                status = httpx.get(self._url, timeout=GIVE_UP).status_code
            self.seconds.append(time.monotonic() - began if status == 200 else float("inf"))

    def __enter__(self) -> Prober:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def p99(self) -> float:
        """The 99th percentile in seconds."""
        return sorted(self.seconds)[int(0.99 * len(self.seconds))]


CANARY = {"prompt": "The canary sings", "max_tokens": 24, "temperature": 0, "ignore_eos": True, "logprobs": 3}


def canary(url: str) -> bytes:
    """The bytes of a greedy answer but for its id and time."""
    answer = httpx.post(f"{url}/v1/completions", json=CANARY, timeout=GIVE_UP)
    fields = {name: value for name, value in comparable(answer).items() if name in ("choices", "error")}
    return json.dumps([answer.status_code, fields]).encode()


def comparable(answer: httpx.Response) -> Any:
    """An answer's content; on plain torch without log-probabilities, whose last bits depend on the step's shape."""
    return json.loads(answer.text, parse_float=float if available(TINY) else lambda _: 0.0)


def same(vector: list[float]) -> Any:
    """What must equal the vector: its bits, or its numbers on plain torch, which rounds by the shape of a step."""
    return vector if available(TINY) else pytest.approx(vector, abs=1e-5)
