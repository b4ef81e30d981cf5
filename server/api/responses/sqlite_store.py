"""Stored responses in SQLite: in this process's memory, or in a file that servers on one machine share.

In memory, SQLite packs the rows into pages of its own. As objects of Python's, thousands of responses would lie
scattered over the heap, and keep pages of it that are otherwise free. An operation takes a fraction of a millisecond,
so it is done on the event loop; with a file, a thread does it, since a disk may be slow.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from ....engine.host import start_threads
from ...flags import ConfigError
from ...http.budget import Hold, MemoryBudget
from .store import Bounds, Caller, Packed, ResponseStore, StoredResponse

RESPONSE_BYTES = 1024  # of memory for each stored response, in addition to its data
LOCK_SECONDS = 4.0  # to wait for other processes; less than `OPERATION_SECONDS`
FOREVER = 2**62  # as a time
SOME = 100  # responses to delete at a time
APPLICATION_ID, VERSION = 0x50794C4D, 1  # of the file
SCHEMA = f"""
CREATE TABLE responses (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    client TEXT NOT NULL,
    used INTEGER NOT NULL,  -- when it was last used, in ns
    ends INTEGER NOT NULL,  -- when it is deleted, in s
    response_size INTEGER NOT NULL,
    input_size INTEGER NOT NULL,
    output_size INTEGER NOT NULL,
    data BLOB NOT NULL
)

CREATE INDEX responses_by_use ON responses (client, used)

CREATE INDEX responses_by_end ON responses (ends)

CREATE TABLE items (id TEXT PRIMARY KEY, response INTEGER NOT NULL) WITHOUT ROWID  -- of the output

CREATE INDEX items_by_response ON items (response)

CREATE TABLE shares (  -- what each client has stored
    client TEXT PRIMARY KEY, count INTEGER NOT NULL, size INTEGER NOT NULL, used INTEGER NOT NULL
) WITHOUT ROWID

CREATE TRIGGER response_added AFTER INSERT ON responses BEGIN
    INSERT OR IGNORE INTO shares VALUES (new.client, 0, 0, 0);
    UPDATE shares SET count = count + 1, size = size + length(new.data), used = new.used WHERE client = new.client;
END

CREATE TRIGGER response_used AFTER UPDATE OF used ON responses BEGIN
    UPDATE shares SET used = new.used WHERE client = new.client;
END

CREATE TRIGGER response_deleted AFTER DELETE ON responses BEGIN
    UPDATE shares SET count = count - 1, size = size - length(old.data) WHERE client = old.client;
    DELETE FROM shares WHERE client = old.client AND count = 0;
    DELETE FROM items WHERE response = old.number;
END

CREATE TABLE probe (id INTEGER PRIMARY KEY, time REAL NOT NULL)

PRAGMA application_id = {APPLICATION_ID}

PRAGMA user_version = {VERSION}
"""
MARKS = ("user_version", "application_id")
SIZES = "response_size, input_size, output_size"

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class SqliteStore(ResponseStore):
    """Responses in one SQLite database."""

    failures = (sqlite3.Error, OSError)

    def __init__(self, path: Path | None, bounds: Bounds, budget: MemoryBudget | None = None) -> None:
        """With a path, the database is a file; without one it is in memory, which counts against the budget."""
        super().__init__("in memory" if path is None else str(path), bounds)
        self._path = path
        self._budget = budget
        self._thread = None if path is None else ThreadPoolExecutor(1, thread_name_prefix="store-responses")
        self._database: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # device and inode of the open file
        self._holds: dict[str, Hold] = {}  # memory, by client
        self._changed: dict[str, str] = {}
        """Clients whose share the present operation has changed, with the account of the one that stores."""

    async def open(self) -> None:
        """Open or make the file; raise `ConfigError` if that is impossible."""
        if self._thread is None:
            return
        start_threads(self._thread, 1)
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._connect)
        except (sqlite3.Error, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"--response-store: {self.name} cannot be used: {reason}.") from None

    async def close(self) -> None:
        """Close the file."""
        if self._thread is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)

    async def _put(self, packed: Packed, caller: Caller) -> None:
        await self._run(self._insert, packed, caller)
        while self._budget is not None and self._budget.is_exceeded and self._holds:
            await self._run(self._free, self._budget.used - self._budget.limit)
            await asyncio.sleep(0)

    async def _find(self, response_id: str, caller: Caller) -> StoredResponse | None:
        return (await self._run(self._select, "id = ?", [response_id], caller.owner)).get(response_id)

    async def _find_holders(self, item_ids: Sequence[str], caller: Caller) -> dict[str, StoredResponse]:
        condition = "number = (SELECT response FROM items WHERE id = ?)"
        return await self._run(self._select, condition, item_ids, caller.owner)

    async def _read(self, stored: StoredResponse) -> bytes | None:
        def read(database: sqlite3.Connection) -> bytes | None:
            query = "SELECT data FROM responses WHERE id = ? AND owner = ?"
            row = database.execute(query, (stored.id, stored.owner)).fetchone()
            return row[0] if row else None

        return await self._run(read)

    async def _remove(self, response_id: str, caller: Caller) -> bool:
        def remove(database: sqlite3.Connection) -> bool:
            with _transaction(database):
                condition = "id = ? AND owner = ? AND ends > ?"
                return self._delete(database, condition, response_id, caller.owner, int(time.time()))

        return await self._run(remove)

    async def _purge(self) -> None:
        has_more = True
        while has_more:
            has_more = await self._run(self._expire)
            await asyncio.sleep(0)

    async def _count(self) -> tuple[int, int]:
        return await self._run(_totals)

    async def _probe(self) -> None:
        def write(database: sqlite3.Connection) -> None:
            database.execute("INSERT OR REPLACE INTO probe VALUES (1, ?)", (time.time(),))

        await self._run(write)

    async def _run(
        self,
        work: Callable[Concatenate[sqlite3.Connection, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Work on the database, in its thread if it has one."""
        loop = asyncio.get_running_loop()

        def run() -> Result:
            database = self._connect()
            try:
                return work(database, *args, **kwargs)
            except sqlite3.Error:
                if self._path is not None:
                    self._disconnect()  # a new connection may do better
                raise
            finally:
                if self._budget is not None:
                    self._charge(self._budget, database)
                self._changed.clear()

        return run() if self._thread is None else await loop.run_in_executor(self._thread, run)

    def _charge(self, budget: MemoryBudget, database: sqlite3.Connection) -> None:
        """Charge the accounts for the memory of responses."""
        for client, account in self._changed.items():
            size = _memory(database, client)
            self._holds.setdefault(client, Hold(budget, "responses", account)).record(size)
            if not size:
                del self._holds[client]

    def _connect(self) -> sqlite3.Connection:
        """Return the connection to the database, which is opened if there is none."""
        if self._has_lost_file():
            raise FileNotFoundError("its file was moved, removed or replaced")
        if self._database is None:
            self._database = _open(self._path)
            self._file = None if self._path is None else _identify(self._path)
        return self._database

    def _has_lost_file(self) -> bool:
        """Whether the file that was opened no longer has its name."""
        return self._path is not None and self._file is not None and _identify(self._path) != self._file

    def _disconnect(self) -> None:
        # The end of a last connection deletes the file's log by its name, which may be another file's now.
        if self._database is not None and not self._has_lost_file():
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    def _insert(self, database: sqlite3.Connection, packed: Packed, caller: Caller) -> None:
        now, bounds = time.time(), self.bounds
        ends = int(now) + bounds.seconds if bounds.seconds else FOREVER
        with _transaction(database):
            self._expire(database)
            values = (packed.id, caller.owner, caller.client, time.time_ns(), ends, *packed.sizes, packed.data)
            columns = f"id, owner, client, used, ends, {SIZES}, data"
            number = database.execute(f"INSERT INTO responses ({columns}) VALUES (?,?,?,?,?,?,?,?,?)", values).lastrowid
            items = ((item_id, number) for item_id in packed.item_ids)
            database.executemany("INSERT OR REPLACE INTO items VALUES (?, ?)", items)
            self._changed[caller.client] = caller.account
            while True:
                count, size = _totals(database)
                if count <= bounds.max_responses and size <= bounds.max_bytes:
                    break
                self._evict(database, "count" if count > bounds.max_responses else "size")

    def _evict(self, database: sqlite3.Connection, measure: str) -> None:
        """Delete the least recently used response of the client that has stored the most."""
        query = f"SELECT client FROM shares ORDER BY {measure} DESC, used LIMIT 1"
        (client,) = database.execute(query).fetchone()
        oldest = "number = (SELECT number FROM responses WHERE client = ? ORDER BY used LIMIT 1)"
        self._delete(database, oldest, client)

    def _free(self, database: sqlite3.Connection, size: int) -> None:
        """Evict some responses, up to `size` bytes of memory."""
        with _transaction(database):
            before = after = _memory(database)
            for _ in range(SOME):
                if not after or before - after >= size:
                    break
                self._evict(database, "size")
                after = _memory(database)

    def _expire(self, database: sqlite3.Connection) -> bool:
        """Delete some responses whose time is over; return whether there were any."""
        some = f"number IN (SELECT number FROM responses WHERE ends <= ? LIMIT {SOME})"
        return self._delete(database, some, int(time.time()))

    def _delete(self, database: sqlite3.Connection, condition: str, *values: str | int) -> bool:
        """Delete responses; return whether there was one."""
        clients = database.execute(f"SELECT DISTINCT client FROM responses WHERE {condition}", values).fetchall()
        if clients:
            database.execute(f"DELETE FROM responses WHERE {condition}", values)
        for (client,) in clients:
            self._changed.setdefault(client, "")
        return bool(clients)

    def _select(
        self, database: sqlite3.Connection, condition: str, names: Collection[str], owner: str
    ) -> dict[str, StoredResponse]:
        """Return the owner's responses that a condition selects by these names, and note that they were used."""
        query = f"SELECT number, id, owner, {SIZES} FROM responses WHERE {condition} AND owner = ? AND ends > ?"
        found: dict[str, StoredResponse] = {}
        used: set[int] = set()
        for name in names:
            if (row := database.execute(query, (name, owner, int(time.time()))).fetchone()) is not None:
                number, response_id, owner, first, second, third = row
                found[name] = StoredResponse(response_id, owner, (first, second, third))
                used.add(number)
        if not used:
            return found
        with contextlib.suppress(sqlite3.OperationalError):  # the disk is full, or another process is writing now
            database.execute("PRAGMA busy_timeout = 0")
            with _transaction(database):
                update = "UPDATE responses SET used = ? WHERE number = ?"
                database.executemany(update, ((time.time_ns(), number) for number in used))
        database.execute(f"PRAGMA busy_timeout = {LOCK_SECONDS * 1000:.0f}")
        return found


def _open(path: Path | None) -> sqlite3.Connection:
    """Open a database; raise `sqlite3.Error` or `OSError` if that is impossible, or it is another program's."""
    if path is not None:
        _make_file(path)
    name = ":memory:" if path is None else str(path)
    database = sqlite3.connect(name, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        if path is None:
            database.execute("PRAGMA auto_vacuum = FULL")  # so that deleted responses leave no empty pages
        else:
            database.execute("PRAGMA journal_mode = WAL")  # readers do not wait for a writer
            database.execute("PRAGMA synchronous = NORMAL")
        with _transaction(database):
            (version,), (program,) = (database.execute(f"PRAGMA {name}").fetchone() for name in MARKS)
            if version == program == 0 and database.execute("SELECT * FROM sqlite_master").fetchone() is None:
                for statement in SCHEMA.split("\n\n"):
                    database.execute(statement)
            elif (version, program) != (VERSION, APPLICATION_ID):
                raise sqlite3.DatabaseError("it is a database of another program, or of another version of PyLLM")
    except BaseException:
        database.close()
        raise
    return database


def _make_file(path: Path) -> None:
    """Make the file if it does not exist, without what is left of a deleted one."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # another server may start now, too
        if not path.exists():
            for name in (f"{path}-wal", f"{path}-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # others must not read what clients wrote
        elif not path.is_file():
            raise OSError(errno.EINVAL, "it is not a file")
    finally:
        os.close(folder)


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            database.execute("ROLLBACK")
        raise


def _identify(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _totals(database: sqlite3.Connection) -> tuple[int, int]:
    """Return how many responses there are, and how many bytes of data."""
    count, size = database.execute("SELECT COALESCE(SUM(count), 0), COALESCE(SUM(size), 0) FROM shares").fetchone()
    return count, size


def _memory(database: sqlite3.Connection, client: str | None = None) -> int:
    """Return how many bytes of memory the responses of one client, or of all, take."""
    which = "" if client is None else "WHERE client = ?"
    query = f"SELECT COALESCE(SUM(size + {RESPONSE_BYTES} * count), 0) FROM shares {which}"
    (size,) = database.execute(query, () if client is None else (client,)).fetchone()
    return int(size)
