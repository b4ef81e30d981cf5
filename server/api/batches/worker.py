"""Runs the batches one after another, each with a few lines at a time, in the background of other requests."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import ASGIApp

from .lines import Line, LineError, answer_row, error_row, execute, parse_line, read_lines
from .store import MAX_LINES, ROWS, UNFINISHED, BatchRecord, BatchStore, repair_rows, sync

logger = logging.getLogger("pyllm.server")

POLL_SECONDS = 0.1
PURGE_SECONDS = 3600.0
MAX_CRASHES = 3
MAX_ERRORS = 100  # of an invalid file, in the batch's record
TURN_SECONDS = 600.0  # that a batch may run while another key's waits
EXPIRED = LineError("This request was not executed before the completion window expired.", code="batch_expired")


class _Usage(msgspec.Struct, frozen=True):
    """The token counts of either API; `msgspec` ignores other fields."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: dict[str, int] = {}
    input_tokens_details: dict[str, int] = {}


class _Body(msgspec.Struct, frozen=True):
    usage: _Usage | None = None


class _Response(msgspec.Struct, frozen=True):
    status_code: int
    body: _Body = _Body()


class _Row(msgspec.Struct, frozen=True):
    custom_id: str
    response: _Response | None


_row = msgspec.json.Decoder(_Row).decode
_body = msgspec.json.Decoder(_Body).decode


class DiskFull(Exception):  # noqa: N818 - an end, not an error
    """The rows of a batch do not fit on the disk, or within the bound."""


@dataclass(slots=True)
class _Run:
    """A batch whose lines are running."""

    batch: BatchRecord
    files: dict[str, FileIO]
    since: float = field(default_factory=time.monotonic)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class BatchWorker:
    """Answers the batches of a store through the application itself."""

    def __init__(self, store: BatchStore, app: ASGIApp, concurrency: int, is_alive: Callable[[], bool]) -> None:
        """At most `concurrency` lines run at a time; `is_alive` says whether the engine does."""
        self._store, self._app = store, app
        self._concurrency = concurrency
        self._is_alive = is_alive
        self._turns: dict[str, int] = {}  # by owner, the number of its last turn

    async def run(self) -> None:
        """Run until cancelled; the next run continues unfinished batches."""
        purged = 0.0
        while True:
            if time.monotonic() - purged >= PURGE_SECONDS:
                await self._store.purge()
                purged = time.monotonic()
            if (batch := self._next_batch()) is None:
                await asyncio.sleep(POLL_SECONDS)
                continue
            self._turns[batch.owner] = max(self._turns.values(), default=0) + 1
            try:
                await self._process(batch)
            except (OSError, DiskFull) as error:
                await self._fail(batch, "storage_full", f"The batch's results could not be written: {error}.")
            except Exception:
                logger.exception("Batch %s failed because of an internal error.", batch.id)
                await self._fail(batch, "internal_error", "The server failed to run this batch.")

    def _next_batch(self) -> BatchRecord | None:
        """Return the oldest unfinished batch of the owner whose last turn is the longest ago."""
        waiting = (batch for batch in self._store.batches.values() if batch.id not in self._store.accepting)
        unfinished = (batch for batch in waiting if batch.status in UNFINISHED)
        return min(unfinished, key=lambda batch: self._turns.get(batch.owner, 0), default=None)

    def _is_turn_over(self, run: _Run) -> bool:
        """Whether a batch has run for long enough while another owner's waits."""
        if time.monotonic() < run.since + TURN_SECONDS:
            return False
        return any(b.owner != run.batch.owner and b.status in UNFINISHED for b in self._store.batches.values())

    async def _process(self, batch: BatchRecord) -> None:
        if batch.status == "validating":
            errors = await asyncio.to_thread(_validate, self._store.content(batch.input_file_id), batch)
            if errors:
                batch.errors = errors
                batch.enter("failed")
                await self._store.save(batch)
                logger.info("Batch %s failed: its file has lines that are not requests", batch.id)
                return
            if batch.status == "validating":  # not cancelled meanwhile
                batch.enter("in_progress")
                await self._store.save(batch)
                logger.info("Batch %s runs: %d lines for %s", batch.id, batch.total, batch.endpoint)
        if batch.status != "finalizing":
            if batch.crashes >= MAX_CRASHES:
                await self._fail(
                    batch, "server_died", f"The server died {batch.crashes} times while running this batch."
                )
                return
            batch.crashes += 1
            await self._store.save(batch)
            try:
                is_done = await self._run_lines(batch)
            finally:
                if self._is_alive():
                    batch.crashes -= 1
                    await self._store.save(batch)
            if not is_done:
                return
        for kind in ROWS:  # many bytes may be left to write
            await asyncio.to_thread(sync, self._store.rows(batch, kind))
        await self._store.finalize(batch)
        counts = batch.completed, batch.failed, batch.total
        logger.info("Batch %s %s: %d answered, %d failed of %d lines", batch.id, batch.status, *counts)

    async def _fail(self, batch: BatchRecord, code: str, message: str) -> None:
        """End a batch with the rows written so far."""
        batch.errors = [{"code": code, "message": message, "line": None, "param": None}]
        batch.ends_as = "failed"
        try:
            for kind in ROWS:
                await asyncio.to_thread(deque, repair_rows(self._store.rows(batch, kind)), 0)
            await self._store.finalize(batch)
        except OSError as error:
            batch.status = "failed"  # at least until the next start
            logger.error("The end of batch %s could not be written: %s", batch.id, error.strerror)

    async def _run_lines(self, batch: BatchRecord) -> bool:
        """Answer the lines that have no row yet, until the batch ends, is cancelled or expires; False: until later."""
        done = await asyncio.to_thread(self._recount, batch)
        with contextlib.ExitStack() as stack:
            files = {kind: stack.enter_context(self._store.rows(batch, kind).open("ab", buffering=0)) for kind in ROWS}
            lines = stack.enter_context(self._store.content(batch.input_file_id).open("rb"))
            run, is_done, has_begun = _Run(batch, files), True, False
            try:
                for data in lines:
                    if self._is_over(batch):
                        break
                    if has_begun and self._is_turn_over(run):
                        is_done = False
                        break
                    if not data.strip() or _digest((line := parse_line(data, batch.endpoint)).custom_id) in done:
                        await asyncio.sleep(0)  # many such lines must not keep clients waiting
                        continue
                    await self._wait(run, self._concurrency)
                    if self._is_over(batch):
                        break
                    run.tasks.add(asyncio.create_task(self._answer(run, line)))
                    has_begun = True
                await self._wait(run, 1)
            finally:
                for task in run.tasks:
                    task.cancel()
                await asyncio.gather(*run.tasks, return_exceptions=True)
            if batch.ends_as == "expired":
                await asyncio.to_thread(self._expire, run)
            return is_done or batch.ends_as != "completed"

    async def _wait(self, run: _Run, count: int) -> None:
        """Wait until fewer than `count` lines run, or the batch is over; raises the error of a line."""
        while len(run.tasks) >= count and not self._is_over(run.batch):
            done, run.tasks = await asyncio.wait(run.tasks, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    @staticmethod
    def _is_over(batch: BatchRecord) -> bool:
        """Whether a batch is cancelled or has expired; note which in `ends_as`."""
        if batch.status == "cancelling":
            batch.ends_as = "cancelled"
        elif time.time() > batch.expires_at:
            batch.ends_as = "expired"
        return batch.ends_as != "completed"

    async def _answer(self, run: _Run, line: Line) -> None:
        outcome = await execute(self._app, line, run.batch.owner)
        self._write(run, "output" if outcome.status < 400 else "errors", answer_row(line.custom_id, outcome))
        _count(run.batch, outcome.status, _body(outcome.body).usage)

    def _write(self, run: _Run, kind: str, row: bytes) -> None:
        if len(row) > self._store.room(run.batch.owner):
            whose = "one API key's share of them is used up" if self._store.shared else "they are used up"
            raise DiskFull(f"files may have {self._store.max_bytes} bytes in all (--batch-dir-size), and {whose}")
        if run.files[kind].write(row) != len(row):
            raise DiskFull("the disk is full")
        self._store.grow(run.batch.owner, len(row))

    def _recount(self, batch: BatchRecord) -> set[bytes]:
        """Count a batch's rows again, and return the digests of the ids of the lines that have one."""
        done: set[bytes] = set()
        batch.completed = batch.failed = 0
        batch.usage = {}
        for kind in ROWS:
            for data in repair_rows(self._store.rows(batch, kind)):
                row = _row(data)
                done.add(_digest(row.custom_id))
                response = row.response or _Response(400)
                _count(batch, response.status_code, response.body.usage)
        return done

    def _expire(self, run: _Run) -> None:
        """Write a row for each line that was not executed in time."""
        done = self._recount(run.batch)
        with self._store.content(run.batch.input_file_id).open("rb") as lines:
            for data in lines:
                if data.strip() and _digest((line := parse_line(data, run.batch.endpoint)).custom_id) not in done:
                    self._write(run, "errors", error_row(line.custom_id, EXPIRED))
                    run.batch.failed += 1


def _count(batch: BatchRecord, status: int, usage: _Usage | None) -> None:
    usage = usage or _Usage()
    if status >= 400:
        batch.failed += 1
        return
    batch.completed += 1
    read, written = usage.prompt_tokens + usage.input_tokens, usage.completion_tokens + usage.output_tokens
    details = usage.prompt_tokens_details | usage.input_tokens_details
    new = {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
    new["cached_tokens"] = details.get("cached_tokens", 0)
    batch.usage = {name: batch.usage.get(name, 0) + count for name, count in new.items()}


def _validate(path: Path, batch: BatchRecord) -> list[dict[str, Any]]:
    """Count the lines of an input file, and return the errors of the first bad ones."""
    errors: list[dict[str, Any]] = []
    seen: set[bytes] = set()
    total = 0
    with path.open("rb") as file:
        for number, data in read_lines(file):
            total += bool(data)
            try:
                if total > MAX_LINES or number > 2 * MAX_LINES:
                    raise LineError(f"The file has more than {MAX_LINES} lines.", code="too_many_lines")
                if not data:
                    continue
                line = parse_line(data, batch.endpoint)
                if (digest := _digest(line.custom_id)) in seen:
                    raise LineError("Another line has the same custom_id.", "custom_id", "duplicate_custom_id")
                seen.add(digest)
            except LineError as error:
                errors.append({"code": error.code, "message": str(error), "param": error.param, "line": number})
                if len(errors) == MAX_ERRORS or error.code == "too_many_lines":
                    break
    batch.total = total
    if not total and not errors:
        errors.append({"code": "empty_file", "message": "The file has no lines.", "param": None, "line": None})
    return errors


def _digest(custom_id: str) -> bytes:
    """Return a digest of an id of up to 512 characters, so that a set of all ids of a batch stays small."""
    return hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
