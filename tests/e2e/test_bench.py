"""`pyllm bench`: on a server that runs, on one of its own, and when there is nothing to measure."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvloop
from support.serving import ServerProcess, run_command

from pyllm.server.cli.load_client import Answer, LoadError, Target, closed_loop, summarize

SMALL = ("--num-requests", "6", "--input-len", "5", "--output-len", "7", "--vocab-size", "200")


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    return run_command("bench", *words)


def test_a_running_server_is_measured_and_every_token_counted(server: ServerProcess) -> None:
    before = server.wait_until_idle()
    done = bench("--base-url", server.url, "--concurrency", "1,3", "--json", *SMALL)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["model"] == "tiny"
    assert [result["clients"] for result in report["results"]] == [1, 3]
    for result in report["results"]:
        assert (result["requests"], result["failed"]) == (6, 0)
        assert (result["prompt_tokens"], result["output_tokens"]) == (30, 42)
        assert result["output_tok_s"] == pytest.approx(42 / result["seconds"], rel=0.02)
        assert 0 < result["ttft_p50_ms"] <= result["ttft_p99_ms"]
        assert 0 <= result["itl_p50_ms"] <= result["itl_p99_ms"]  # chunks of a tiny model may arrive together
    after = server.wait_until_idle()
    warm_up = 7
    assert after.generation_tokens_total - before.generation_tokens_total == 2 * (42 + warm_up)


def test_bench_starts_a_server_with_the_model_flags(checkpoint: Path) -> None:
    done = bench(str(checkpoint), "--dtype", "float32", "--concurrency", "2", *SMALL)
    assert done.returncode == 0, done.stderr
    head, row = done.stdout.splitlines()
    assert head.split()[:3] == ["clients", "output", "tok/s"]
    clients, rate, first, *_, failed = (float(cell) for cell in row.split())
    assert (clients, failed) == (2, 0)
    assert rate > 0
    assert first > 0


def test_what_cannot_be_measured_is_said_in_one_sentence(server: ServerProcess) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        unused = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for words, part in [
            (("--base-url", unused), "cannot be measured"),
            (("--base-url", "localhost"), "http://"),
            (("--base-url", "http://localhost:port"), "is not a server's URL"),
            (("--base-url", server.url, "--model", "other", *SMALL), "status 404"),
            (("--base-url", server.url, "--concurrency", "1,x"), "--concurrency"),
            (("--base-url", server.url, "--concurrency", "0"), "--concurrency"),
        ]:
            done = bench(*words)
            assert (done.returncode, done.stdout) == (2, ""), done.stderr
            (line,) = done.stderr.splitlines()
            assert part in line


def test_the_prompts_have_the_ids_that_the_model_has(server: ServerProcess) -> None:
    """It has 272, fewer than nearly every other model."""
    words = ("--concurrency", "1", "--num-requests", "3", "--input-len", "60", "--output-len", "2", "--json")
    done = bench("--base-url", server.url, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["results"][0]["prompt_tokens"] == 180


def test_failing_request_among_others_is_counted(server: ServerProcess) -> None:
    target = Target(f"{server.url}/v1", "tiny")
    answers, seconds = uvloop.run(closed_loop(target, [target.body([1, 2], 3), b"{", target.body([3], 4)], 1))
    result = summarize(answers, seconds)
    assert (result["requests"], result["failed"], result["output_tokens"]) == (2, 1, 7)
    assert answers[1].error is not None
    assert "400" in answers[1].error


@contextmanager
def scripted(answer: Callable[[socket.socket, int], None]) -> Iterator[str]:
    """A server that reads a request and lets `answer` write to the connection; it gets the request's number."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for number in range(2):
                connection, _ = listener.accept()
                with connection:
                    if not connection.recv(65536):
                        return
                    answer(connection, number)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            socket.create_connection(listener.getsockname()).close()  # it may wait for a request that does not come
            thread.join()


HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
EVENT = b'data: {"choices":[{"text":"a"}]}\r\n\r\n'
DONE = b"data: [DONE]\r\n\r\n"


def ask(answer: Callable[[socket.socket, int], None]) -> Answer:
    with scripted(answer) as url:
        target = Target(url, "m")
        answers, _ = uvloop.run(closed_loop(target, [target.body([1], 2)], 1))
    return answers[0]


def test_events_cut_anywhere_and_without_usage_are_counted() -> None:
    stream = HEAD + EVENT + b": ping\r\n\r\n" + EVENT + DONE

    def answer(connection: socket.socket, number: int) -> None:
        for at in range(0, len(stream), 7):
            connection.sendall(stream[at : at + 7])

    got = ask(answer)
    assert got.error is None
    assert (len(got.chunks), got.output_tokens) == (2, 2)


def test_an_answer_that_breaks_off_is_a_failure() -> None:
    def answer(connection: socket.socket, number: int) -> None:
        connection.sendall(HEAD + EVENT)

    assert ask(answer).error == "the answer was cut off"


def test_a_connection_closed_before_any_answer_is_tried_again() -> None:
    def answer(connection: socket.socket, number: int) -> None:
        if number:
            connection.sendall(HEAD + EVENT + DONE)

    assert ask(answer).error is None


def test_nothing_but_failures_is_an_error() -> None:
    with pytest.raises(LoadError, match="No request succeeded: broken"):
        summarize([Answer(0.0, error="broken")], 1.0)
