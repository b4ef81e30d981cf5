"""Files and batches on disk, in a folder that one server owns.

    secret                     names the owners of API keys
    files/ID, files/ID.json    a file's content and its record
    batches/ID.json            a batch's record
    batches/ID.output, .errors rows of an unfinished batch, as they come; files once it has ended
    *.tmp                      being written

A record is replaced as a whole, in a thread that does one task at a time. Rows are appended: the last one may be
torn by a crash, and is then cut off. All ids of a kind sort by time of creation.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from ....engine.host import start_pool
from ...flags import ConfigError
from ...http.errors import ApiError, encode_json, shorten

logger = logging.getLogger("pyllm.server")

MAX_FILE_BYTES = 200 * 10**6
MAX_FILES = MAX_BATCHES = 1000
MAX_UPLOADS = 4  # at a time
MAX_LINES = 50_000
WINDOW = 86400  # seconds in which a batch must end
KEEP = 30 * 86400  # seconds until a file, or the record of a batch that has ended, is deleted
SECRET_BYTES = 32

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
ROWS = ("output", "errors")


class FileRecord(msgspec.Struct, kw_only=True):
    """A file."""

    id: str
    owner: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str

    def show(self) -> dict[str, Any]:
        """Return OpenAI's object."""
        fields = msgspec.structs.asdict(self)
        del fields["owner"]
        return fields | {"object": "file", "status": "processed"}


class BatchRecord(msgspec.Struct, kw_only=True):
    """A batch; its counts and usage are saved only when its status changes, and counted again from its rows."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str = "24h"
    status: Status = "validating"
    created_at: int
    expires_at: int
    metadata: dict[str, str] | None = None
    keep_seconds: int = KEEP  # for its output
    crashes: int = 0  # how often the server ended without warning while the batch ran
    moments: dict[str, int] = {}  # Unix times such as `completed_at`
    ends_as: Status = "completed"  # once it is finalized
    errors: list[dict[str, Any]] = []
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: dict[str, int] = {}

    def enter(self, status: Status) -> None:
        """Change the status, and note when."""
        self.status = status
        self.moments[f"{status}_at"] = int(time.time())

    def show(self) -> dict[str, Any]:
        """Return OpenAI's object."""
        names = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        fields = {name: getattr(self, name) for name in (
            "id", "endpoint", "input_file_id", "completion_window", "status", "created_at", "expires_at", "metadata"
        )}  # fmt: skip
        is_over = self.status not in UNFINISHED
        usage = {name: self.usage.get(name, 0) for name in ("input_tokens", "output_tokens", "total_tokens")}
        return fields | {f"{name}_at": self.moments.get(f"{name}_at") for name in names} | {
            "object": "batch",
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "output_file_id": self.output_file_id if is_over else None,
            "error_file_id": self.error_file_id if is_over else None,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "usage": usage | {
                "input_tokens_details": {"cached_tokens": self.usage.get("cached_tokens", 0)},
                "output_tokens_details": {"reasoning_tokens": 0},
            },
        }  # fmt: skip


def new_id(prefix: str) -> str:
    """Make an id that sorts after all earlier ones with this prefix."""
    return f"{prefix}{time.time_ns():016x}{secrets.token_hex(4)}"


class BatchStore:
    """Files and batches by id, oldest first; an owner does not see those of others.

    With several owners, each may have at most as many files, batches and bytes as are left for the others: the first
    to ask gets up to half.
    """

    def __init__(self, folder: Path, max_bytes: int, *, shared: bool = False) -> None:
        """Open or make the folder; raise `ConfigError` if that is impossible, or another server has it open."""
        self._folder = folder
        self.max_bytes = max_bytes
        self.shared = shared  # there are several owners
        self.files: dict[str, FileRecord] = {}
        self.batches: dict[str, BatchRecord] = {}
        self.owned: Counter[str] = Counter()  # bytes of each owner's files, rows and arriving uploads
        self.uploads: list[str] = []  # the owners of arriving uploads
        self.accepting: set[str] = set()  # batches that are not on the disk yet, so not accepted
        self._disk = start_pool(1, "write-batches")
        try:
            for part in (folder, folder / "files", folder / "batches"):
                part.mkdir(mode=0o700, parents=part == folder, exist_ok=True)
            self._lock = os.open(folder / "secret", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.secret = os.read(self._lock, SECRET_BYTES)
            if len(self.secret) < SECRET_BYTES:
                self.secret = secrets.token_bytes(SECRET_BYTES)
                os.pwrite(self._lock, self.secret, 0)
            self._load()
        except BlockingIOError:
            raise ConfigError(f"--batch-dir {folder} is in use by another server: choose another folder.") from None
        except OSError as error:
            raise ConfigError(f"--batch-dir {folder} cannot be used: {error.strerror}.") from None

    def _load(self) -> None:
        for path in self._folder.glob("*/*.tmp"):
            path.unlink()
        for path in sorted(self._folder.glob("files/*.json")):
            record = _read(path, FileRecord)
            if record is not None and self.content(record.id).is_file():
                self.files[record.id] = record
        for path in sorted(self._folder.glob("batches/*.json")):
            if (batch := _read(path, BatchRecord)) is not None:
                self.batches[batch.id] = batch
        self.used = sum(path.stat().st_size for path in self._folder.glob("*/*"))
        for record in self.files.values():
            self.owned[record.owner] += record.bytes
        for batch in self.batches.values():
            paths = (self.rows(batch, kind) for kind in ROWS)
            self.owned[batch.owner] += sum(path.stat().st_size for path in paths if path.exists())

    def content(self, file_id: str) -> Path:
        """Return the path of a file's content."""
        return self._folder / "files" / file_id

    def rows(self, batch: BatchRecord, kind: str) -> Path:
        """Return the path of an unfinished batch's rows: `output` or `errors`."""
        return self._folder / "batches" / f"{batch.id}.{kind}"

    def check_room(self, size: int, owner: str) -> None:
        """Raise `ApiError` 400 if `size` more bytes, or one more file, exceed the bounds or the owner's share."""
        if self.used + size > self.max_bytes:
            message = f"The server's files would exceed {self.max_bytes} bytes (--batch-dir-size): delete some first."
            raise ApiError(400, message, param="file", code="storage_full")
        owners = [*(record.owner for record in self.files.values()), *self.uploads]
        if len(owners) >= MAX_FILES:
            message = f"The server keeps at most {MAX_FILES} files: delete some first."
            raise ApiError(400, message, param="file", code="storage_full")
        if size > self.room(owner):
            left = self.max_bytes - self.used
            message = f"This API key's files have {self.owned[owner]} bytes, and {left} are left for all keys"
            message += f": {size} more would be over its share. Delete some first."
            raise ApiError(400, message, param="file", code="storage_full")
        if not self._may_add(owner, owners, MAX_FILES):
            message = "This API key has as many files as are left for all others: delete some first."
            raise ApiError(400, message, param="file", code="storage_full")

    def room(self, owner: str) -> int:
        """Return how many more bytes an owner may have."""
        free = self.max_bytes - self.used
        return (free - self.owned[owner]) // 2 if self.shared else free

    def _may_add(self, owner: str, owners: Iterable[str], most: int) -> bool:
        """Whether an owner may have one more of the things of `owners`: at most as many as are left for the others."""
        counts = Counter(owners)
        left = most - counts.total()
        return counts[owner] < left if self.shared else left > 0

    def grow(self, owner: str, size: int) -> None:
        """Count `size` more bytes of an owner's content."""
        self.used += size
        self.owned[owner] += size

    @contextlib.contextmanager
    def receiving(self, size: int, owner: str) -> Iterator[Path]:
        """Reserve `size` bytes for an upload and yield a path for it; raise `ApiError` 400 or 429."""
        if not self._may_add(owner, self.uploads, MAX_UPLOADS):
            message = f"Too many files are being uploaded, at most {MAX_UPLOADS} at a time for all keys: retry later."
            raise ApiError(429, message, code="too_many_uploads", headers={"retry-after": "5"})
        self.check_room(size, owner)
        path = self._folder / "files" / f"{new_id('')}.tmp"
        self.uploads.append(owner)
        self.grow(owner, size)
        try:
            yield path
        finally:
            self.uploads.remove(owner)
            self.grow(owner, -size)
            path.unlink(missing_ok=True)

    async def add_file(self, path: Path, owner: str, filename: str, keep_seconds: int) -> FileRecord:
        """Take over the uploaded content at `path`."""
        record = await self._keep(path, new_id("file-"), owner, filename, "batch", keep_seconds)
        self.grow(owner, record.bytes)
        return record

    async def _keep(
        self, path: Path, file_id: str, owner: str, filename: str, purpose: str, keep_seconds: int
    ) -> FileRecord:
        size, now = await self._in_order(_move, path, self.content(file_id)), int(time.time())
        record = FileRecord(
            id=file_id, owner=owner, bytes=size, created_at=now, expires_at=now + keep_seconds, filename=filename,
            purpose=purpose,
        )  # fmt: skip
        await self._write(self.content(f"{file_id}.json"), record)
        self.files[file_id] = record
        return record

    def find_file(self, file_id: str, owner: str, param: str = "file_id") -> FileRecord:
        """Return an owner's file; raise `ApiError` 404."""
        record = self.files.get(file_id)
        if record is None or record.owner != owner:
            raise ApiError(404, f"There is no file {shorten(file_id)!r}.", param=param, code="file_not_found")
        return record

    async def delete_file(self, record: FileRecord) -> None:
        """Delete a file; raise `ApiError` 400 while a batch reads it."""
        if (batch := self._reader_of(record)) is not None:
            message = f"The file is in use by {batch.id}, which has not ended: cancel it first."
            raise ApiError(400, message, param="file_id", code="file_in_use")
        del self.files[record.id]
        await self._remove(self.content(f"{record.id}.json"))
        await self._remove(self.content(record.id))
        self.owned[record.owner] -= record.bytes

    async def add_batch(self, batch: BatchRecord) -> None:
        """Store a new batch; raise `ApiError` 429 if too many are unfinished."""
        unfinished = [one.owner for one in self.batches.values() if one.status in UNFINISHED]
        if not self._may_add(batch.owner, unfinished, MAX_BATCHES):
            message = f"{len(unfinished)} batches are unfinished; this server keeps at most {MAX_BATCHES}"
            message += ", and of one API key as many as are left for the others" if self.shared else ""
            raise ApiError(429, f"{message}: retry later.", code="too_many_batches", headers={"retry-after": "60"})
        ended = [one for one in self.batches.values() if one.status not in UNFINISHED]
        self.batches[batch.id] = batch
        self.accepting.add(batch.id)
        try:
            if len(self.batches) > MAX_BATCHES:
                counts = Counter(one.owner for one in ended)
                await self._forget(max(ended, key=lambda one: counts[one.owner]))  # the oldest of the one with the most
            await self.save(batch)
        except OSError:
            del self.batches[batch.id]
            raise
        finally:
            self.accepting.remove(batch.id)

    def find_batch(self, batch_id: str, owner: str) -> BatchRecord:
        """Return an owner's batch; raise `ApiError` 404."""
        batch = self.batches.get(batch_id)
        if batch is None or batch.owner != owner:
            raise ApiError(404, f"There is no batch {shorten(batch_id)!r}.", param="batch_id", code="batch_not_found")
        return batch

    async def save(self, batch: BatchRecord) -> None:
        """Write a batch's record, as it is now."""
        await self._write(self._folder / "batches" / f"{batch.id}.json", batch)

    async def finalize(self, batch: BatchRecord) -> None:
        """Make files of a batch's rows, and end it; may be repeated after a crash at any point."""
        ids = {"output": batch.output_file_id, "errors": batch.error_file_id}
        for kind, file_id in ids.items():
            path = self.rows(batch, kind)
            if file_id is None and path.exists():
                if path.stat().st_size:
                    ids[kind] = new_id("file-")
                else:
                    path.unlink()
        batch.output_file_id, batch.error_file_id = ids["output"], ids["errors"]
        if batch.status != "finalizing":
            batch.enter("finalizing")
        await self.save(batch)
        for kind, file_id in ids.items():
            if file_id is not None and file_id not in self.files:
                name = f"{batch.id}_{kind.removesuffix('s')}.jsonl"
                await self._keep(self.rows(batch, kind), file_id, batch.owner, name, "batch_output", batch.keep_seconds)
        batch.enter(batch.ends_as)
        await self.save(batch)

    async def purge(self) -> None:
        """Delete the files and the batches that have expired."""
        now = time.time()
        for record in [record for record in self.files.values() if record.expires_at < now]:
            if record.id in self.files and self._reader_of(record) is None:
                await self.delete_file(record)
        for batch in [batch for batch in self.batches.values() if batch.created_at + KEEP < now]:
            if batch.id in self.batches and batch.status not in UNFINISHED:
                await self._forget(batch)

    def _reader_of(self, record: FileRecord) -> BatchRecord | None:
        """Return an unfinished batch that reads a file."""
        return next((b for b in self.batches.values() if b.input_file_id == record.id and b.status in UNFINISHED), None)

    async def _forget(self, batch: BatchRecord) -> None:
        del self.batches[batch.id]
        await self._remove(self._folder / "batches" / f"{batch.id}.json")

    async def _remove(self, path: Path) -> None:
        self.used -= await self._in_order(_delete, path)

    async def _write(self, path: Path, record: FileRecord | BatchRecord) -> None:
        self.used += await self._in_order(_replace, path, encode_json(record))

    async def _in_order(self, work: Callable[..., int], *args: Any) -> int:
        """Do slow work on the disk, after all earlier work there."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, work, *args)


def _move(path: Path, target: Path) -> int:
    """Sync a file and give it another name, unless that is done already; return its bytes."""
    if path.exists():
        sync(path).replace(target)
    return target.stat().st_size


def _delete(path: Path) -> int:
    """Delete a file, and return how many bytes it had."""
    size = path.stat().st_size if path.exists() else 0
    path.unlink(missing_ok=True)
    return size


def _replace(path: Path, data: bytes) -> int:
    """Replace a file's content as a whole, also through a crash of the machine; return by how much it has grown."""
    temporary = path.with_suffix(".tmp")
    before = path.stat().st_size if path.exists() else 0
    try:
        temporary.write_bytes(data)
        sync(temporary).replace(path)
        return len(data) - before
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.MsgspecError, ValueError) as error:
        logger.error("%s is left alone, since it is not a record: %s", path, error)
        return None


def sync(path: Path) -> Path:
    """Wait until a file's content, if there is one, is on the disk; return its path."""
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return path


def repair_rows(path: Path) -> Iterator[bytes]:
    """Cut off a torn last row, and yield the others."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = 0
        for row in file:
            if not row.endswith(b"\n"):
                file.truncate(end)
                return
            end += len(row)
            yield row
