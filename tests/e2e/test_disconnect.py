"""A client that goes away takes its work with it, in whatever state that is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import httpx
import pytest
from openai import OpenAI
from support.serving import FOREVER, ServerProcess, posted, wait_for_load


@pytest.fixture(autouse=True)
def _abandoned_work_is_dropped(server: ServerProcess) -> Iterator[None]:
    """Nothing runs on, and that is not because it was all done."""
    before = server.wait_until_idle()
    yield
    after = server.wait_until_idle()
    assert after.engine_step_seconds_count - before.engine_step_seconds_count < FOREVER / 2
    assert after.get(("request_success_total", "length")) == before.get(("request_success_total", "length"))


def test_a_stream_that_is_closed_ends(server: ServerProcess, client: OpenAI) -> None:
    with client.completions.create(
        model="tiny", prompt="Hi", max_tokens=FOREVER, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        assert len(list(islice(stream, 5))) == 5
        wait_for_load(server, running=1)
        assert server.metrics().kv_cache_usage_perc > 0


def test_all_choices_of_a_closed_stream_end(server: ServerProcess, client: OpenAI) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    options = {"max_tokens": FOREVER, "n": 5, "extra_body": {"ignore_eos": True}}
    with client.chat.completions.create(model="tiny", messages=messages, stream=True, **options) as stream:
        next(iter(stream))
        wait_for_load(server, running=5)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("n", [1, 3])
def test_disconnect_while_decoding_aborts_the_request(server: ServerProcess, stream: bool, n: int) -> None:
    with posted(server, stream=stream, n=n):
        wait_for_load(server, running=n)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_disconnect_aborts_with_a_pipelined_request_behind(server: ServerProcess, stream: bool) -> None:
    with posted(server, stream=stream) as connection:
        wait_for_load(server, running=1)  # only then, for a request that has just begun reads on what comes
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        server.metrics()  # what came before is read by now


def test_disconnect_while_prefilling_aborts_the_request(server: ServerProcess) -> None:
    before = server.wait_until_idle()
    with posted(server, prompt="x" * 6000, max_tokens=2000):
        wait_for_load(server, running=1)
    after = server.wait_until_idle()
    assert after.engine_step_seconds_count - before.engine_step_seconds_count < 1000


def test_a_client_that_gives_up_waiting_ends_its_request(server: ServerProcess, http: httpx.Client) -> None:
    body = {"prompt": "Hi", "max_tokens": FOREVER, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.3))


def test_a_request_that_still_waits_in_the_queue_is_dropped(server: ServerProcess) -> None:
    with posted(server, n=24):
        wait_for_load(server, running=24)
        with posted(server), posted(server, stream=True):
            wait_for_load(server, running=24, waiting=2)
        wait_for_load(server, running=24, waiting=0)


def test_many_clients_that_come_and_go_leave_nothing_behind(server: ServerProcess) -> None:
    for round_ in range(5):
        with posted(server, n=3), posted(server, stream=True), posted(server, prompt="yes"), posted(server, n=9):
            if round_ % 2:
                wait_for_load(server, running=14)
