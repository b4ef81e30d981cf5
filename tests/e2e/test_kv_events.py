"""A router with ZeroMQ follows a server's KV cache, and foretells what each request finds in it."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.kv_subscriber import END, CacheView
from support.serving import PATIENCE, ServerProcess, run_command, wait_for

pytestmark = pytest.mark.needs("pyzmq")
TOPIC = b"kv@10.0.0.1@tiny"
SIZE, BLOCKS = 4, 60
FLAGS = ("--dtype", "float32", "--block-size", str(SIZE), "--num-kv-blocks", str(BLOCKS), "--max-model-len", "128")


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


def settings(**others: Any) -> str:
    return json.dumps({"enable_kv_cache_events": True, "publisher": "zmq", "topic": TOPIC.decode()} | others)


class Router:
    """Follows the events of one server, and requests those that it has missed."""

    def __init__(self, context: Any, events: int, replay: int) -> None:
        import zmq

        self.view = CacheView(SIZE)
        self._sub, self._replay = context.socket(zmq.SUB), context.socket(zmq.DEALER)
        self._sub.subscribe("kv@")
        self._sub.connect(f"tcp://127.0.0.1:{events}")
        self._replay.connect(f"tcp://127.0.0.1:{replay}")

    def request(self, first: int) -> None:
        """Take all messages from number `first` on that the server still has."""
        self._replay.send_multipart([b"", first.to_bytes(8, "big")])
        while True:
            assert self._replay.poll(int(PATIENCE * 1000))
            delimiter, *frames = self._replay.recv_multipart()
            assert delimiter == b""
            if frames[1] == END:
                assert frames[2] == b""
                return
            self.view.receive(frames, TOPIC)

    def follow(self, *, until: int) -> None:
        """Take messages as they come, and those in between that did not, until number `until`."""
        while self.view.last < until:
            assert self._sub.poll(int(PATIENCE * 1000))
            frames = self._sub.recv_multipart()
            number = int.from_bytes(frames[1], "big")
            if number == 0 or number == self.view.last + 1:
                self.view.receive(frames, TOPIC)
            elif number > self.view.last:
                self.request(self.view.last + 1)

    def close(self) -> None:
        self._sub.close(linger=0)
        self._replay.close(linger=0)

    def skip(self, count: int) -> None:
        """Lose messages."""
        for _ in range(count):
            assert self._sub.poll(int(PATIENCE * 1000))
            self._sub.recv_multipart()


@pytest.fixture
def router() -> Iterator[Callable[[int, int], Router]]:
    """Start routers that read from these ports."""
    import zmq

    context, routers = zmq.Context(), []

    def start(events: int, replay: int) -> Router:
        routers.append(Router(context, events, replay))
        return routers[-1]

    yield start
    for opened in routers:
        opened.close()
    context.term()


def complete(server: ServerProcess, prompt: list[int], **fields: Any) -> int:
    """Ask for a completion; return how many tokens of the prompt were cached."""
    body = {"prompt": prompt, "max_tokens": 6, "ignore_eos": True} | fields
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE).raise_for_status().json()
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def last_number(server: ServerProcess) -> int:
    """The number of the last message."""
    return int(server.wait_until_idle().kv_event_batches_total) - 1


def test_a_router_knows_what_the_cache_holds(
    checkpoint: Path, tmp_path: Path, router: Callable[[int, int], Router]
) -> None:
    events, replay = free_ports()
    config = settings(endpoint=f"tcp://127.0.0.1:{events}", replay_endpoint=f"tcp://127.0.0.1:{replay}")
    flags = (*FLAGS, "--restart-engine", "1", "--kv-events-config", config)
    draw = random.Random(11)
    with ServerProcess(tmp_path / "log", str(checkpoint), *flags) as server:
        assert (
            f"events are published on tcp://127.0.0.1:{events}, with replay on tcp://127.0.0.1:{replay}" in server.log
        )
        assert "Every program that can reach" not in server.log
        first = router(events, replay)
        first.request(0)
        assert first.view.restarts == 1
        hits = 0
        for number in range(60):
            salt = draw.choice((None, None, "tenant"))
            prompt = [5 + draw.randrange(3)] * draw.randrange(1, 20) + [draw.randrange(5, 9) for _ in range(9)]
            expected = first.view.num_cached(prompt, salt)
            hits += expected
            assert complete(server, prompt, **({"cache_salt": salt} if salt else {})) == expected
            last = last_number(server)
            if number % 10 == 5 and last > first.view.last + 1:
                first.skip(1)  # what follows shows the gap, and is requested again
            first.follow(until=last)
        assert hits > 100
        assert len(first.view.prefixes) > BLOCKS // 2
        late = router(events, replay)
        late.request(0)
        assert late.view.prefixes == first.view.prefixes, "a late subscriber learns the same"
        text = "The same tokens as the engine's: a router hashes what /tokenize returns."
        tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"]
        httpx.post(f"{server.url}/v1/completions", json={"prompt": text, "max_tokens": 1}).raise_for_status()
        first.follow(until=last_number(server))
        assert first.view.num_cached(tokens) == (len(tokens) - 1) // SIZE * SIZE > 0
        os.kill(server.engine_pid, signal.SIGKILL)
        wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 503, "the engine's death to show")
        wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 200, "another engine")
        assert complete(server, tokens) == 0
        first.view.last = -1  # the new engine counts from 0
        first.request(0)
        assert first.view.restarts == 2
        assert first.view.num_cached(tokens) == (len(tokens) - 1) // SIZE * SIZE


@pytest.mark.parametrize(
    ("config", "flags", "sentence"),
    [
        (settings(endpoint="tcp://127.0.0.1:{busy}"), (), "endpoint tcp://127.0.0.1:{busy} cannot be bound (address"),
        (settings(), ("--no-enable-prefix-caching",), "--kv-events-config needs the prefix cache: leave out"),
        (settings(endpont="tcp://*:1"), (), "Unknown setting 'endpont' in --kv-events-config; did you mean endpoint?"),
        (settings(endpoint="inproc://events"), (), "endpoint must be tcp://HOST:PORT or ipc://PATH, but got 'inproc:"),
        (settings(replay_endpoint=""), (), "replay_endpoint in --kv-events-config must not be empty."),
        (settings(publisher="kafka"), (), "publisher in --kv-events-config must be one of zmq, null, but got 'kafka'"),
        (settings(hwm=0), (), "hwm in --kv-events-config must be a whole number between 1 and"),
        ("true", (), "--kv-events-config must be a JSON object such as"),
    ],
)
def test_what_cannot_be_published_is_refused_in_one_sentence(
    checkpoint: Path, config: str, flags: tuple[str, ...], sentence: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        words = (*FLAGS, *flags, "--port", "0", "--kv-events-config", config.replace("{busy}", port))
        done = run_command("serve", str(checkpoint), *words)
    assert done.returncode == 2, done.stderr
    assert sentence.replace("{busy}", port) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("config", "says", "is_open"),
    [
        (settings(endpoint="tcp://*:*"), "can reach tcp://*:* can read the tokens of all prompts", True),
        ('{"publisher": "zmq"}', "publishes nothing, since it does not set enable_kv_cache_events to true", False),
    ],
)
def test_the_log_says_whether_others_can_read_the_events(
    checkpoint: Path, tmp_path: Path, config: str, says: str, is_open: bool
) -> None:
    with ServerProcess(tmp_path / "log", str(checkpoint), *FLAGS, "--kv-events-config", config) as server:
        assert says in server.log
        assert ("are published on tcp://" in server.log) == is_open
        complete(server, [5] * 9)
        assert (server.wait_until_idle().kv_event_batches_total > 0) == is_open
