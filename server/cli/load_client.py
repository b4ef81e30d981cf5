"""A closed loop of clients for any OpenAI-compatible server, so cheap that it hardly slows the server beside it.

Chunks are only noted with their time of arrival; what they say is read when the clock has stopped. The HTTP parser is
the one that the server uses, so measuring needs no dependency of its own.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

Piece = tuple[float, bytes]
"""When a part of an answer came, and what it holds."""
ATTEMPTS = 3
LIMIT_SECONDS = 1200.0


class LoadError(RuntimeError):
    """The server cannot be reached or does not answer as it should; one plain sentence."""


@dataclass(slots=True)
class Answer:
    """What came back for one request. Times are seconds of `time.perf_counter()`.

    Attributes:
        sent: when the request was sent.
        ended: when the answer was complete.
        chunks: when each chunk with a token arrived.
        output_tokens: by the server's own count, else the number of chunks.
        prompt_tokens: by the server's own count, else 0.
        cached_tokens: of the prompt, by the server's own count.
        error: why it failed; None when all is well.
    """

    sent: float
    ended: float
    chunks: list[float] = field(default_factory=list)
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None

    @property
    def first_token(self) -> float:
        """Seconds from the request to its first token."""
        return self.chunks[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between one chunk with a token and the next."""
        return [after - before for before, after in zip(self.chunks, self.chunks[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go.

    Attributes:
        base_url: of the server, with or without /v1 at its end.
        model: name to ask for.
        api_key: sent as a bearer token; None sends none.
    """

    base_url: str
    model: str
    api_key: str | None = None

    def body(self, prompt: Sequence[int], output_len: int) -> bytes:
        """A streaming, greedy request for exactly `output_len` tokens."""
        asked = {"model": self.model, "prompt": prompt, "max_tokens": output_len, "temperature": 0, "stream": True,
                 "stream_options": {"include_usage": True}, "ignore_eos": True}  # fmt: skip
        return json.dumps(asked).encode()


class _Connection(asyncio.Protocol):
    """One connection, used by one request at a time."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[None] | None = None
        self._transport: asyncio.WriteTransport

    async def exchange(self, request: bytes) -> int:
        """Send a request and wait for the whole answer, which is then in `pieces`; return its status."""
        self.pieces = []
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._done
        return self._parser.get_status_code()

    @property
    def is_reusable(self) -> bool:
        """Whether another request may be sent."""
        return self._parser.should_keep_alive() and not self._transport.is_closing()

    def close(self) -> None:
        """Close it."""
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(error)

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop. An answer of no stated length ends so."""
        by_close = exc is None and self.pieces and not self._parser.should_keep_alive()
        self._end(None if by_close else exc or ConnectionResetError("the server closed the connection"))

    def _end(self, error: Exception | None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)


class Client:
    """Sends one request at a time, over one connection as long as the server keeps it."""

    def __init__(self, target: Target) -> None:
        try:
            url = urlsplit(target.base_url.rstrip("/").removesuffix("/v1") + "/v1")
            host, port = url.hostname, url.port
        except ValueError:  # a port that is none, a bracket that is not closed
            host = None
        if not host or url.scheme not in ("http", "https"):
            raise LoadError(f"{target.base_url} is no URL of a server: pass one like http://127.0.0.1:8000.")
        self._address = host, port or (443 if url.scheme == "https" else 80)
        self._tls = url.scheme == "https" or None
        key = f"Authorization: Bearer {target.api_key}\r\n" if target.api_key else ""
        self._path, self._headers = url.path, f"Host: {url.netloc}\r\nContent-Type: application/json\r\n{key}"
        self._connection: _Connection | None = None

    async def ask(self, body: bytes, path: str = "/completions") -> Answer:
        """Send a request and note its answer; failures are told in it and never raised."""
        sent = time.perf_counter()
        try:
            return _read(sent, *await self._request("POST", path, body))
        except OSError as error:
            return Answer(sent, time.perf_counter(), error=f"{type(error).__name__}: {error}".rstrip(": "))

    async def get(self, path: str) -> bytes:
        """Fetch what is at `path` under /v1; raise `LoadError` if it cannot be had."""
        try:
            status, pieces = await self._request("GET", path, b"")
        except OSError as error:
            raise LoadError(f"{path} cannot be fetched: {error}.") from None
        finally:
            self.close()
        if status != 200:
            raise LoadError(f"{path} answers with status {status}.")
        return b"".join(body for _, body in pieces)

    async def _request(self, method: str, path: str, body: bytes) -> tuple[int, list[Piece]]:
        """Send, again when the server had closed the connection just then; raise `OSError`."""
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
        for attempt in range(ATTEMPTS):
            try:
                status = await asyncio.wait_for(self._send(head.encode() + body), LIMIT_SECONDS)
            except (OSError, httptools.HttpParserError) as error:
                begun = self._connection is not None and self._connection.pieces
                self.close()
                if begun or attempt == ATTEMPTS - 1 or isinstance(error, (ConnectionRefusedError, TimeoutError)):
                    raise OSError(str(error) or type(error).__name__) from None
            else:
                assert self._connection is not None  # for the type checker
                pieces = self._connection.pieces
                if not self._connection.is_reusable:
                    self.close()
                return status, pieces
        raise AssertionError("the last attempt returns or raises")

    async def _send(self, request: bytes) -> int:
        if self._connection is None:
            loop = asyncio.get_running_loop()
            _, self._connection = await loop.create_connection(_Connection, *self._address, ssl=self._tls)
        return await self._connection.exchange(request)

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _read(sent: float, status: int, pieces: list[Piece]) -> Answer:
    """Understand an answer: each event has the time of the piece that completed its line."""
    answer = Answer(sent, pieces[-1][0] if pieces else time.perf_counter())
    if status != 200:
        answer.error = f"status {status}: {b''.join(body for _, body in pieces)[:200].decode(errors='replace')}"
        return answer
    rest, complete = b"", False
    for at, body in pieces:
        *lines, rest = (rest + body).split(b"\n")
        for line in lines:
            if line[5:].strip() == b"[DONE]":
                complete = True
            elif line.startswith(b"data:"):
                try:
                    _take(answer, at, json.loads(line[5:]))
                except (ValueError, TypeError, AttributeError):
                    answer.error = f"an event that cannot be understood: {line[:120].decode(errors='replace')}"
                    return answer
    answer.output_tokens = answer.output_tokens or len(answer.chunks)
    if not answer.chunks:
        answer.error = answer.error or "no token arrived"
    elif not complete:
        answer.error = answer.error or "the answer was cut off"
    return answer


def _take(answer: Answer, at: float, event: dict[str, Any]) -> None:
    if "error" in event:
        answer.error = str(event["error"])[:200]
    if usage := event.get("usage"):
        answer.output_tokens = usage.get("completion_tokens") or 0
        answer.prompt_tokens = usage.get("prompt_tokens") or 0
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    for choice in event.get("choices") or ():
        # The chunk that only says how it ended carries no token, unless it is the only one.
        if choice.get("text") or not (choice.get("finish_reason") and answer.chunks):
            answer.chunks.append(at)


async def closed_loop(target: Target, bodies: Iterable[bytes], clients: int) -> tuple[list[Answer], float]:
    """Send all requests, each client its next one when its last is answered -> the answers and the seconds of it all.

    Raises:
        LoadError: the URL is none.
    """
    todo, answers = iter(bodies), list[Answer]()
    connections = [Client(target) for _ in range(clients)]

    async def work(client: Client) -> None:
        for body in todo:
            answers.append(await client.ask(body))

    started = time.perf_counter()
    await asyncio.gather(*(work(client) for client in connections))
    seconds = time.perf_counter() - started
    for client in connections:
        client.close()
    return answers, seconds


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] if ordered else 0.0


def summarize(answers: Sequence[Answer], seconds: float) -> dict[str, float]:
    """Throughput, and times in milliseconds: to the first token, per output token after it, and between chunks.

    Raises:
        LoadError: no request succeeded.
    """
    good = [answer for answer in answers if answer.error is None]
    if not good:
        raise LoadError(f"No request succeeded: {answers[0].error if answers else 'none was sent'}.")
    first = [answer.first_token for answer in good]
    later = [(answer.chunks[-1] - answer.chunks[0]) / (answer.output_tokens - 1)
             for answer in good if answer.output_tokens > 1]  # fmt: skip
    gaps = [gap for answer in good for gap in answer.gaps]
    output = sum(answer.output_tokens for answer in good)
    return {
        "requests": len(good),
        "failed": len(answers) - len(good),
        "seconds": round(seconds, 5),
        "output_tokens": output,
        "prompt_tokens": sum(answer.prompt_tokens for answer in good),
        "cached_tokens": sum(answer.cached_tokens for answer in good),
        "output_tok_s": round(output / seconds, 1),
        "ttft_mean_ms": round(1000 * statistics.fmean(first), 1),
        "ttft_p50_ms": round(1000 * statistics.median(first), 1),
        "ttft_p99_ms": round(1000 * quantile(first, 0.99), 1),
        "tpot_p50_ms": round(1000 * quantile(later, 0.5), 2),
        "itl_p50_ms": round(1000 * quantile(gaps, 0.5), 2),
        "itl_p99_ms": round(1000 * quantile(gaps, 0.99), 2),
    }
