"""Clients that are slow on purpose: each is closed within its timeout, and no other client waits for them."""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.serving import FOREVER, ServerProcess, wait_for
from support.together import Together

HEADER, BODY, WRITE = 1.5, 2.0, 2.0
"""The limits of the server here, in seconds; as long as that again may pass before it looks."""
CONNECTIONS = 150
START = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"

REST = 0.7
"""Seconds after which an idle connection may be evicted."""
EVICTED = r"Closed \d+ connection\(s\): idle, and a new connection needed the slot"
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(scope="module")
def strict(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with little patience, and a key."""
    limits = {"--header-timeout": HEADER, "--body-timeout": BODY, "--write-timeout": WRITE}
    flags = [str(word) for pair in limits.items() for word in pair]
    flags += ["--max-connections", str(CONNECTIONS), "--dtype", "float32"]
    with ServerProcess(tmp_path_factory.mktemp("strict") / "log", str(checkpoint), *flags) as server:
        yield server


at_once = Together()


@pytest.fixture(scope="module")
def outcomes(strict: ServerProcess, request: pytest.FixtureRequest) -> dict[str, Future[None]]:
    return at_once.run(strict, request)


def connect(server: ServerProcess, data: bytes = b"", receive_bytes: int | None = None) -> socket.socket:
    """A connection on which this has been sent."""
    url = httpx.URL(server.url)
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(20)
    connection.connect((url.host, url.port))
    connection.sendall(data)
    return connection


def rest(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(2**16):
            data += piece
    return data


def status_of(connection: socket.socket) -> int:
    """The status of a whole answer, which is taken from the connection."""
    data = b""
    while not (found := re.search(rb"content-length: (\d+).*?\r\n\r\n", data, re.DOTALL)) or len(
        data
    ) < found.end() + int(found[1]):
        data += connection.recv(2**16)
    return int(data.split()[1])


def error_code(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    assert int(re.search(rb"content-length: (\d+)", head)[1]) == len(body)  # type: ignore[index]
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def post(**fields: Any) -> bytes:
    body = json.dumps({"prompt": "Hi", "max_tokens": 2} | fields).encode()
    return START + b"content-length: %d\r\n\r\n" % len(body) + body


def canary(server: ServerProcess) -> float:
    """Seconds that an ordinary request takes."""
    begun = time.monotonic()
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 2}, timeout=20)
    assert answer.status_code == 200
    return time.monotonic() - begun


@at_once
def test_half_open_connections_delay_no_one_and_are_closed(strict: ServerProcess) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(strict)) for _ in range(34)]
        begun = [stack.enter_context(connect(strict, START)) for _ in range(33)]
        dripping = [stack.enter_context(connect(strict, START + b"x: ")) for _ in range(33)]
        since = time.monotonic()
        while waiting := [each for each in dripping if not select.select([each], [], [], 0)[0]]:
            for connection in waiting:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.sendall(b"a")
            assert canary(strict) < 10
            assert time.monotonic() - since < 3 * HEADER + 5, "what drips does not win time"
        assert [rest(connection) for connection in silent] == [b""] * 34
        assert {error_code(rest(connection)) for connection in begun} == {(408, "request_timeout")}
        assert {rest(connection)[:13] for connection in dripping} <= {b"HTTP/1.1 408 ", b""}
        assert time.monotonic() - since < 3 * HEADER + 5
    assert re.search(r"Closed \d+ connection\(s\): the request's header did not arrive within 1.5 s", strict.log)
    assert " 500 " not in strict.log


@at_once
def test_a_body_that_stops_coming_is_given_up(strict: ServerProcess) -> None:
    head = START + b"x-request-id: stopped\r\ncontent-length: 100000\r\n\r\n"
    with connect(strict, head + b" " * 1000) as connection:
        since = time.monotonic()
        assert error_code(rest(connection)) == (408, "request_timeout")
        assert 0.9 * BODY <= time.monotonic() - since < 3 * BODY + 5
    wait_for(lambda: "POST /v1/completions 499 id=stopped" in strict.log, "the request's line in the log")


@at_once
def test_stalled_body_is_rejected_and_a_slow_one_is_read(strict: ServerProcess) -> None:
    body = json.dumps({"prompt": "Hi", "max_tokens": 2}).encode() + b" " * 80_000
    head = START + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
    with connect(strict, head) as slow, connect(strict, head) as dripping:
        sent, since = 0, time.monotonic()
        while sent < len(body):  # for twice as long as a body may stand still
            slow.sendall(body[sent : sent + 4000])
            sent += 4000
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                dripping.sendall(b" ")
            time.sleep(0.2)
        assert time.monotonic() - since > 1.9 * BODY
        assert b" 200 OK" in rest(slow).partition(b"\r\n")[0]
        dripping.settimeout(0.3)  # it has been closed long since
        assert rest(dripping)[:13] in (b"HTTP/1.1 408 ", b"")


def test_large_bodies_that_drip_leave_their_room_to_others(strict: ServerProcess) -> None:
    head = START + b"content-length: %d\r\n\r\n" % (8 * 2**20)
    with contextlib.ExitStack() as stack:
        dripping = [stack.enter_context(connect(strict, head + b" " * 70_000)) for _ in range(4)]
        body = json.dumps({"prompt": "Hi", "max_tokens": 2}).encode() + b" " * 80_000
        other = stack.enter_context(connect(strict, START + b"content-length: %d\r\n\r\n" % len(body) + body))
        while not select.select([other], [], [], 0.2)[0]:
            for connection in dripping:  # so much that none stands still
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.sendall(b" " * 1000)
        assert status_of(other) == 200


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        # The answers are so long that all buffers are full while thousands of tokens are still to come.
        ({"stream": True, "logprobs": 5, "max_tokens": FOREVER}, "the client read nothing of its response for 2 s"),
        (
            {"stream": False, "logprobs": 20, "max_tokens": 120, "n": 16},
            "the client read nothing of its response for 2 s",
        ),
        (
            {"stream": True, "logprobs": 20, "max_tokens": FOREVER, "n": 24},
            "the client was more than 65536 tokens behind its stream",
        ),
    ],
    ids=["stream", "whole", "far behind"],
)
def test_unread_answer_is_stopped_and_its_memory_freed(
    strict: ServerProcess, fields: dict[str, Any], reason: str
) -> None:
    before = strict.wait_until_idle()
    known = strict.log.count(f"Closed 1 connection(s): {reason}")
    with connect(strict, post(**fields, ignore_eos=True), receive_bytes=4096) as connection:
        answer = b""

        def closed() -> bool:
            nonlocal answer
            if "behind" in reason:  # reads just enough not to time out, however slow the engine is
                answer += connection.recv(8192)
                time.sleep(0.2)
            return strict.log.count(f"Closed 1 connection(s): {reason}") > known

        wait_for(closed, "the connection to be closed")
        answer += rest(connection)
        assert answer.startswith(b"HTTP/1.1 200")
        if fields["stream"]:
            assert not answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        else:
            head, _, body = answer.partition(b"\r\n\r\n")
            promised = re.search(rb"content-length: (\d+)", head)
            assert promised is not None
            assert len(body) < int(promised[1])
    after = strict.wait_until_idle()
    if fields["stream"]:
        aborted = ("request_success_total", "abort")
        assert after[aborted] == before[aborted] + fields.get("n", 1)
        assert after.generation_tokens_total - before.generation_tokens_total < FOREVER


@at_once
def test_a_slow_reader_gets_all_of_its_stream(strict: ServerProcess) -> None:
    """It is behind all the time, and takes longer than an answer may stand still."""
    data = post(stream=True, ignore_eos=True, logprobs=20, max_tokens=400)
    with connect(strict, data.replace(b"host: x", b"host: x\r\nconnection: close"), receive_bytes=4096) as connection:
        answer, since = b"", time.monotonic()
        while piece := connection.recv(8192):
            answer += piece
            time.sleep(0.0 if time.monotonic() > since + 1.5 * WRITE else 0.05)
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@at_once
def test_a_reader_with_a_small_window_gets_all_of_its_answer(strict: ServerProcess) -> None:
    """What it reads comes from the system's buffers, which take more from the server only once they are half empty."""
    ask = HEALTH.replace(b"/health", b"/docs/swagger-ui-bundle.js").replace(b"host", b"connection: close\r\nhost")
    with connect(strict, ask, receive_bytes=4096) as connection:
        answer, since = b"", time.monotonic()
        while time.monotonic() < since + 4 * WRITE:
            answer += connection.recv(2**11)
            time.sleep(0.4)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        answer += rest(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert len(body) == int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
    assert len(body) > 1_000_000, "more than the system's buffers hold"


def test_headers_that_are_too_large_are_refused(strict: ServerProcess) -> None:
    for length, code in ((30_000, 200), (200_000, 431)):
        header = b"x-long: " + b"a" * length + b"\r\n"
        with connect(strict, START + header + b"connection: close\r\n" + post().removeprefix(START)) as connection:
            answer = rest(connection)
            assert int(answer.split()[1]) == code
    with connect(strict, START + b"".join(b"h%d: 1\r\n" % n for n in range(12_000))) as connection:
        assert error_code(rest(connection)) == (431, "headers_too_large")


def test_connections_over_the_limit_are_refused(strict: ServerProcess) -> None:
    endless = post(max_tokens=FOREVER, ignore_eos=True)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(strict, endless)) for _ in range(CONNECTIONS - 1)]
        for _ in range(5):  # on a busy machine time may pass between the two, as if the first one rested
            with connect(strict), connect(strict) as refused:
                if answer := rest(refused):
                    break
        assert error_code(answer) == (503, "too_many_connections")
        assert b"retry-after: " in answer
        assert not select.select(held, [], [], 0)[0]
    wait_for(lambda: b" 200 " in probe(strict), "connections to be taken again")


def test_longest_idle_connection_is_evicted_for_a_new_one(strict: ServerProcess) -> None:
    """A thousand idle connections keep no new one out, and none in use is closed for them."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(connect(strict, HEALTH))
        assert status_of(first) == 200
        held = [stack.enter_context(connect(strict, HEALTH)) for _ in range(CONNECTIONS - 1)]
        for connection in held:
            assert status_of(connection) == 200
        time.sleep(REST)
        assert b" 200 " in probe(strict)
        assert rest(first) == b""
        assert not select.select(held, [], [], 0)[0]
        stream = stack.enter_context(connect(strict, post(max_tokens=FOREVER, ignore_eos=True, stream=True)))
        pieces: list[bytes] = []

        def read() -> None:
            with contextlib.suppress(ConnectionResetError):
                while piece := stream.recv(2**16):
                    pieces.append(piece)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            wait_for(lambda: pieces, "the stream to begin")
            for _ in range(1000):
                stack.enter_context(connect(strict))
            time.sleep(REST)
            assert canary(strict) < 10
            seen = len(pieces)
            wait_for(lambda: len(pieces) > seen + 20, "the stream to continue")
        finally:
            stream.shutdown(socket.SHUT_RDWR)
            reader.join()
    wait_for(lambda: re.search(EVICTED, strict.log), "the log to tell it")


def test_stalled_readers_do_not_block_eviction_of_idle_ones(strict: ServerProcess) -> None:
    ask = HEALTH.replace(b"/health", b"/openapi.json")
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(connect(strict, ask, receive_bytes=4096))
        time.sleep(0.5)  # so that they are the first to rest
        for _ in range(CONNECTIONS - 20):
            stack.enter_context(connect(strict))
        evictions = len(re.findall(EVICTED, strict.log))
        wait_for(lambda: b" 200 " in probe(strict), "a slot")
        # Without an eviction, slots are free once the time for headers is over, and the log has only that.
        wait_for(lambda: len(re.findall(EVICTED, strict.log)) > evictions, "the log to tell of an eviction")


def probe(server: ServerProcess) -> bytes:
    with connect(server, HEALTH.replace(b"host", b"connection: close\r\nhost")) as connection:
        return rest(connection)


@at_once
def test_a_connection_that_rests_between_two_requests_stays_open(strict: ServerProcess) -> None:
    with connect(strict, post()) as connection:
        assert status_of(connection) == 200
        time.sleep(2 * max(HEADER, BODY, WRITE))
        connection.sendall(post())
        assert status_of(connection) == 200
        connection.sendall(b"\r\n")  # no request, and neither is it rest
        assert rest(connection) == b""


@at_once
def test_rest_of_an_answered_body_is_not_awaited(strict: ServerProcess) -> None:
    with connect(strict, START + b"content-length: 999999999\r\n\r\n") as connection:
        assert b" 413 " in connection.recv(2000)
        since = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() < since + 3 * BODY + 5:
                connection.sendall(b" " * 10_000)
                time.sleep(0.1)
        assert time.monotonic() - since < 3 * BODY + 5
