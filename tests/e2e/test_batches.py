"""Files and batches through OpenAI's client, and `pyllm run-batch`."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Batch
from openai.types.chat import ChatCompletion
from support.serving import FOREVER, PATIENCE, ServerProcess, run_command, wait_for

CHAT = "/v1/chat/completions"
FLAGS = ("--dtype", "float32", "--max-num-seqs", "4", "--served-model-name", "tiny")
USER = {"role": "user", "content": "Hi"}


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [USER], "max_tokens": 4, "ignore_eos": True} | body
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def as_bytes(lines: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in lines).encode()


def client_of(server: ServerProcess, key: str = "one") -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)


@pytest.fixture(scope="module")
def serving(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("batches")
    flags = ("--batch-dir", str(folder / "kept"), "--batch-concurrency", "4", "--api-key", "one", "--api-key", "two")
    with ServerProcess(folder / "log", str(checkpoint), *FLAGS, *flags) as server:
        yield server


@pytest.fixture(scope="module")
def client(serving: ServerProcess) -> Iterator[OpenAI]:
    with client_of(serving) as client:
        yield client


def start(client: OpenAI, lines: list[dict[str, Any]]) -> Batch:
    file = client.files.create(file=("in.jsonl", as_bytes(lines)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"job": "7"})


def ended(client: OpenAI, batch: Batch) -> Batch:
    def found() -> Batch | None:
        now = client.batches.retrieve(batch.id)
        return now if now.status in ("completed", "failed", "expired", "cancelled") else None

    return wait_for(found, "the batch to end")


def completed(client: OpenAI, batch: Batch) -> int:
    counts = client.batches.retrieve(batch.id).request_counts
    return counts.completed if counts is not None else 0


def rows_of(client: OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    rows = [] if file_id is None else [json.loads(row) for row in client.files.content(file_id).text.splitlines()]
    assert len({row["custom_id"] for row in rows}) == len(rows)
    return {row["custom_id"]: row for row in rows}


def test_the_way_of_a_batch(client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    lines = [line(f"n{n}", max_tokens=n + 1, temperature=0) for n in range(6)]
    path.write_bytes(as_bytes([*lines, line("wrong", temperature=9), line("other", model="gpt-4o")]))
    with path.open("rb") as source:
        file = client.files.create(file=source, purpose="batch")
    assert (file.filename, file.purpose, file.bytes) == ("requests.jsonl", "batch", path.stat().st_size)
    assert client.files.content(file.id).read() == path.read_bytes()
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"job": "7"})
    assert (batch.status, batch.metadata) == ("validating", {"job": "7"})
    batch = ended(client, batch)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 8, "completed": 6, "failed": 2}
    rows, errors = rows_of(client, batch.output_file_id), rows_of(client, batch.error_file_id)
    live = client.post(CHAT.removeprefix("/v1"), body=lines[3]["body"], cast_to=ChatCompletion)
    assert rows["n3"]["response"]["body"]["choices"][0]["message"]["content"] == live.choices[0].message.content
    assert batch.usage is not None
    assert batch.usage.output_tokens == sum(range(1, 7))
    assert {name: row["response"]["status_code"] for name, row in errors.items()} == {"wrong": 400, "other": 404}
    assert errors["wrong"]["response"]["body"]["error"]["param"] == "temperature"
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_lists_are_paged_by_the_client(client: OpenAI) -> None:
    made = [ended(client, start(client, [line("a")])).id for _ in range(3)]
    assert [batch.id for batch in client.batches.list(limit=1)][:3] == made[::-1], "the client turns the pages"
    files = list(client.files.list(limit=2, purpose="batch_output"))
    assert {batch.output_file_id for batch in client.batches.list()} <= {file.id for file in files} | {None}


def test_another_key_sees_nothing(serving: ServerProcess, client: OpenAI) -> None:
    batch = ended(client, start(client, [line("a")]))
    with client_of(serving, "two") as other:
        assert (list(other.batches.list()), list(other.files.list())) == ([], [])
        for look in (lambda: other.batches.retrieve(batch.id), lambda: other.files.content(batch.output_file_id or "")):
            with pytest.raises(openai.NotFoundError):
                look()


def test_a_cancelled_batch_keeps_its_answers(serving: ServerProcess, client: OpenAI) -> None:
    batch = start(client, [line("short"), *(line(f"n{n}", max_tokens=FOREVER) for n in range(9))])
    wait_for(lambda: completed(client, batch), "the first answer")
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch)
    assert batch.status == "cancelled"
    assert rows_of(client, batch.output_file_id).keys() == {"short"}
    assert serving.wait_until_idle().num_requests_running == 0


def test_a_client_does_not_wait_for_a_batch(serving: ServerProcess, client: OpenAI) -> None:
    """The lines hold every place of the engine and would run for minutes."""
    batch = start(client, [line(f"n{n}", max_tokens=FOREVER) for n in range(8)])
    wait_for(lambda: serving.metrics().num_requests_running == 4, "the lines to take every place")
    for _ in range(3):
        answer = client.chat.completions.create(model="tiny", messages=[USER], max_tokens=5)  # type: ignore[list-item]
        assert answer.usage is not None
    assert completed(client, batch) == 0
    assert serving.metrics().num_preemptions_total >= 1
    client.batches.cancel(batch.id)
    assert ended(client, batch).status == "cancelled"


def test_lines_that_waited_for_clients_answer_the_same(client: OpenAI) -> None:
    """In steps with a client's request, all lines but one pause."""
    lines = [
        line(f"n{n}", messages=[{"role": "user", "content": f"Hi {n}"}], max_tokens=60, temperature=0) for n in range(4)
    ]
    batch = start(client, lines)
    live = []
    while (now := client.batches.retrieve(batch.id)).status != "completed":
        assert now.status != "failed", now.errors
        live.append(client.chat.completions.create(model="tiny", messages=[USER], max_tokens=9, temperature=0))  # type: ignore[list-item]
    assert len({answer.choices[0].message.content for answer in live}) == 1
    rows = rows_of(client, now.output_file_id)
    for each in lines:
        alone = client.post(CHAT.removeprefix("/v1"), body=each["body"], cast_to=ChatCompletion)
        found = rows[each["custom_id"]]["response"]["body"]["choices"][0]["message"]["content"]
        assert found == alone.choices[0].message.content


def test_a_killed_server_continues_where_it_was(checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--batch-dir", str(tmp_path / "kept"), "--batch-concurrency", "2")
    lines = [line(f"n{n}", max_tokens=40) for n in range(20)]
    with ServerProcess(tmp_path / "first", str(checkpoint), *FLAGS, *flags, exit_code=-signal.SIGKILL) as server:
        client = client_of(server)
        batch = start(client, lines)
        wait_for(lambda: completed(client, batch) >= 3, "some answers")
        server.process.kill()
        client.close()
    (rows,) = (tmp_path / "kept" / "batches").glob("*.output")
    before = [json.loads(row) for row in rows.read_text().splitlines(keepends=True) if row.endswith("\n")]
    assert 3 <= len(before) < 20
    with rows.open("ab") as file:
        file.write(b'{"id": "torn')
    with ServerProcess(tmp_path / "second", str(checkpoint), *FLAGS, *flags) as server, client_of(server) as client:
        batch = ended(client, batch)
        found = rows_of(client, batch.output_file_id)
        assert batch.status == "completed"
        assert found.keys() == {f"n{n}" for n in range(20)}
        assert [found[row["custom_id"]] for row in before] == before, "no line is computed twice"
        assert server.metrics()["request_success_total", "length"] == 20 - len(before)


def test_without_a_folder_the_client_reads_how_to_get_one(client: OpenAI, demo: ServerProcess) -> None:
    with client_of(demo) as client, pytest.raises(openai.NotFoundError, match="--batch-dir"):
        client.files.create(file=b"{}", purpose="batch")


def run_batch(*arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[str]:
    return run_command("run-batch", *arguments, typed=data.decode())


def test_run_batch_answers_every_line(checkpoint: Path, tmp_path: Path) -> None:
    others = {"/v1/completions": {"prompt": "Hi"}, "/v1/embeddings": {"input": "Hi"}, "/v1/responses": {"input": "Hi"}}
    lines = [line("chat"), line("wrong", temperature=9), line("get") | {"method": "GET"}]
    lines += [{"custom_id": url, "method": "POST", "url": url, "body": body} for url, body in others.items()]
    source, sink = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(as_bytes(lines) + b"no JSON\n\n")
    flags = (str(checkpoint), "--dtype", "float32", "--served-model-name", "tiny")
    done = run_batch("-i", str(source), "-o", str(sink), *flags)
    assert done.returncode == 0, done.stderr
    assert "7 lines: 4 answered, 3 failed." in done.stderr
    rows = {row["custom_id"]: row for row in map(json.loads, sink.read_text().splitlines())}
    status = {name: row["response"]["status_code"] for name, row in rows.items()}
    assert status == {"chat": 200, "wrong": 400, "get": 400, None: 400} | dict.fromkeys(others, 200)
    assert all(row["response"]["request_id"] for row in rows.values())
    assert {name for name, row in rows.items() if row["response"]["body"].get("error")} == {"wrong", "get", None}
    piped = run_batch("-i", "-", "-o", "-", *flags, data=as_bytes(lines[:1]))
    assert json.loads(piped.stdout)["custom_id"] == "chat"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--input-file is needed"),
        (("-i", "a"), "--output-file is needed"),
        (("-i", "missing.jsonl", "-o", "-"), "missing.jsonl cannot be opened"),
        (("-i", __file__, "-o", __file__), "same file"),
    ],
)
def test_run_batch_says_what_is_wrong_with_its_files(arguments: tuple[str, ...], words: str) -> None:
    done = run_batch(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
