"""A closed loop of clients for any OpenAI-compatible server, cheap enough not to slow a server on the same machine.

Chunks are only stored with their time of arrival and parsed after the clock has stopped. A chunk takes 22 µs of CPU
time here and 130 µs in httpx, which on two cores would distort the measurement. The HTTP parser is the server's own.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

Piece = tuple[float, bytes]  # when a part of an answer arrived, and its bytes
ATTEMPTS = 3
LIMIT_SECONDS = 1200.0
MAX_ERROR_BYTES = 1 << 16


class LoadError(RuntimeError):
    """The server cannot be reached or used; the message is one sentence to show the user."""


class StatusError(Exception):
    """The server has answered with a status other than 200."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"status {status}")
        self.status, self.body = status, body


@dataclass(slots=True)
class Answer:
    """The answer to one request. Times are seconds of `time.perf_counter()`."""

    sent: float
    chunks: list[float] = field(default_factory=list)  # when each chunk with a token arrived
    output_tokens: int = 0  # as the server reports, else the number of chunks
    prompt_tokens: int = 0  # as the server reports, else 0
    cached_tokens: int = 0  # prompt tokens served from the cache, as the server reports, else 0
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
    """Where requests go: the server's URL, with or without /v1, the model, and the API key if it needs one."""

    base_url: str
    model: str
    api_key: str | None = None

    def body(self, prompt: Sequence[int], output_len: int) -> bytes:
        """Return a streaming, greedy request for exactly `output_len` tokens."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": output_len, "temperature": 0, "stream": True}
        return json.dumps(body | {"stream_options": {"include_usage": True}, "ignore_eos": True}).encode()


class Client:
    """Sends one request at a time, over one connection as long as the server keeps it."""

    def __init__(self, target: Target) -> None:
        try:
            url = urlsplit(target.base_url.rstrip("/").removesuffix("/v1") + "/v1")
            host, port = url.hostname, url.port
        except ValueError:  # an invalid port, or an unclosed bracket
            host = None
        if not host or url.scheme not in ("http", "https"):
            raise LoadError(f"{target.base_url} is not a server's URL: pass one such as http://127.0.0.1:8000.")
        self._address = host, port or (443 if url.scheme == "https" else 80)
        self._tls = url.scheme == "https" or None
        key = f"Authorization: Bearer {target.api_key}\r\n" if target.api_key else ""
        self._path, self._headers = url.path, f"Host: {url.netloc}\r\nContent-Type: application/json\r\n{key}"
        self._stream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._pieces: list[Piece] = []  # of the answer being read
        self._complete = False  # whether the answer has ended

    async def ask(self, body: bytes, path: str = "/completions") -> Answer:
        """Send a request and record its answer, which also holds the error if it fails."""
        sent = time.perf_counter()
        try:
            return _parse(sent, *await self._request("POST", path, body))
        except OSError as error:
            return Answer(sent, error=f"{type(error).__name__}: {error}".rstrip(": "))

    async def get(self, path: str, *, below_v1: bool = True) -> bytes:
        """Fetch `path`; raises `OSError`."""
        status, pieces = await self._request("GET", path, b"", below_v1=below_v1)
        self.close()
        if status != 200:
            raise OSError(f"status {status}")
        return b"".join(body for _, body in pieces)

    async def stream(self, path: str, body: bytes) -> AsyncGenerator[bytes, None]:
        """Send a request over a connection of its own, and yield the answer as it arrives.

        Raises `StatusError`, or `OSError` if it breaks off. Closing the iterator closes the connection.
        """
        self.close()
        reader, writer = self._stream = await asyncio.open_connection(*self._address, ssl=self._tls)
        self._pieces, self._complete, received = [], False, b""
        parser = httptools.HttpResponseParser(self)
        try:
            writer.write(self._head("POST", path, body) + body)
            while not self._complete and (data := await reader.read(2**16)):
                self._now = 0.0
                parser.feed_data(data)
                text, self._pieces = b"".join(piece for _, piece in self._pieces), []
                if parser.get_status_code() == 200:
                    yield text
                else:
                    received += text[: MAX_ERROR_BYTES - len(received)]
            if parser.get_status_code() != 200:
                raise StatusError(parser.get_status_code(), received)
            if not self._complete and parser.should_keep_alive():
                raise ConnectionResetError("the server closed the connection")
        except httptools.HttpParserError as error:
            raise OSError(f"it does not speak HTTP ({error})") from None
        finally:
            self.close()

    def _head(self, method: str, path: str, body: bytes, *, below_v1: bool = True) -> bytes:
        base = self._path if below_v1 else self._path.removesuffix("/v1")
        head = f"{method} {base}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
        return head.encode()

    async def _request(self, method: str, path: str, body: bytes, *, below_v1: bool = True) -> tuple[int, list[Piece]]:
        """Send a request, and again if the server had just closed the connection; raises `OSError`."""
        request = self._head(method, path, body, below_v1=below_v1) + body
        for attempt in range(ATTEMPTS):
            try:
                return await asyncio.wait_for(self._exchange(request), LIMIT_SECONDS)
            except (OSError, httptools.HttpParserError) as error:
                self.close()
                if self._pieces or attempt == ATTEMPTS - 1 or isinstance(error, (ConnectionRefusedError, TimeoutError)):
                    raise OSError(str(error) or type(error).__name__) from None
        raise AssertionError("the last attempt returns or raises")

    async def _exchange(self, request: bytes) -> tuple[int, list[Piece]]:
        self._pieces, self._complete = [], False
        if self._stream is None:
            self._stream = await asyncio.open_connection(*self._address, ssl=self._tls)
        reader, writer = self._stream
        writer.write(request)
        parser = httptools.HttpResponseParser(self)
        while not self._complete and (data := await reader.read(2**16)):
            self._now = time.perf_counter()
            parser.feed_data(data)
        is_kept = parser.should_keep_alive()
        if not self._complete and (is_kept or not self._pieces):  # otherwise, an answer of unknown length has ended
            raise ConnectionResetError("the server closed the connection")
        if not is_kept or writer.is_closing():
            self.close()
        return parser.get_status_code(), self._pieces

    def on_body(self, body: bytes) -> None:  # called by the parser, like the next
        self._pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        self._complete = True

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._stream is not None:
            self._stream[1].close()
            self._stream = None


def _parse(sent: float, status: int, pieces: list[Piece]) -> Answer:
    """Parse an answer; each event has the time of the piece that completed its line."""
    answer = Answer(sent)
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
                    _add_event(answer, at, json.loads(line[5:]))
                except (ValueError, TypeError, AttributeError):
                    answer.error = f"an event cannot be parsed: {line[:120].decode(errors='replace')}"
                    return answer
    answer.output_tokens = answer.output_tokens or len(answer.chunks)
    if not answer.chunks or not complete:
        answer.error = answer.error or ("the answer was cut off" if answer.chunks else "no token arrived")
    return answer


def _add_event(answer: Answer, at: float, event: dict[str, Any]) -> None:
    if "error" in event:
        answer.error = str(event["error"])[:200]
    if usage := event.get("usage"):
        answer.output_tokens = usage.get("completion_tokens") or 0
        answer.prompt_tokens = usage.get("prompt_tokens") or 0
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    for choice in event.get("choices") or ():
        # The chunk that only has the finish reason carries no token, unless it is the only one.
        if choice.get("text") or not (choice.get("finish_reason") and answer.chunks):
            answer.chunks.append(at)


async def closed_loop(target: Target, bodies: Iterable[bytes], clients: int) -> tuple[list[Answer], float]:
    """Send all requests, each client its next one after its last answer; return the answers and the total seconds.

    Raises `LoadError` if the URL is wrong.
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
    """Return the value below which `share` of the values lie; 0 if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] if ordered else 0.0


def summarize(answers: Sequence[Answer], seconds: float) -> dict[str, float]:
    """Return throughput, and times in ms: to the first token, per output token after it, and between chunks.

    Raises `LoadError` if no request succeeded.
    """
    good = [answer for answer in answers if answer.error is None]
    if not good:
        raise LoadError(f"No request succeeded: {answers[0].error if answers else 'none was sent'}.")
    first = [answer.first_token for answer in good]
    several = [answer for answer in good if answer.output_tokens > 1]
    later = [(answer.chunks[-1] - answer.chunks[0]) / (answer.output_tokens - 1) for answer in several]
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
