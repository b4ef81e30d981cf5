"""The routes of files and batches."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from ...http.body import read_body
from ...http.errors import ApiError, JsonResponse, shorten
from ...http.middleware import RequestContext
from ...http.tolerance import Rules, Tolerance
from .store import KEEP, MAX_FILE_BYTES, UNFINISHED, WINDOW, BatchRecord, BatchStore, FileRecord, new_id
from .upload import Upload, receive_upload
from .wire import (
    MAX_KEEP,
    MIN_KEEP,
    BatchList,
    BatchObject,
    BatchRequest,
    DeletedFile,
    FileList,
    FileObject,
)

MAX_LISTED_FILES, MAX_LISTED_BATCHES = 10_000, 100
Record = TypeVar("Record", FileRecord, BatchRecord)
PAGE = ("after", "limit")
RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def add_batch_routes(app: FastAPI, find_store: Callable[[], BatchStore | None]) -> None:
    """Add the routes; without a store, their error says how to get one."""

    def store() -> BatchStore:
        if (found := find_store()) is None:
            message = "Files and batches are off on this server: start it with --batch-dir FOLDER."
            raise ApiError(404, message, code="batches_disabled")
        return found

    _add_upload_route(app, store)
    _add_file_routes(app, store)
    _add_batch_routes(app, store)


def _add_upload_route(app: FastAPI, store: Callable[[], BatchStore]) -> None:
    form = {"type": "object", "required": ["file", "purpose"], "properties": {
        "file": {"type": "string", "format": "binary"}, "purpose": {"const": "batch"},
        "expires_after[anchor]": {"const": "created_at"}, "expires_after[seconds]": {
            "type": "integer", "minimum": MIN_KEEP, "maximum": MAX_KEEP, "default": KEEP}}}  # fmt: skip
    upload = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}}}

    @app.post("/v1/files", response_model=FileObject, openapi_extra=upload)
    async def create_file(request: Request) -> Response:
        """Upload a file for a batch: one request a line, as JSON."""
        files, owner = store(), _owner(request)
        length = request.headers.get("content-length", "")
        size = min(int(length[:20]), MAX_FILE_BYTES) if length.isdecimal() else MAX_FILE_BYTES
        with _storing(), files.receiving(size, owner) as path:
            received = await receive_upload(request, path)
            keep = _check_upload(received)
            record = await files.add_file(path, owner, received.filename, keep)
        return JsonResponse(record.show())


def _add_file_routes(app: FastAPI, store: Callable[[], BatchStore]) -> None:
    @app.get("/v1/files", response_model=FileList, openapi_extra=_page_schema(MAX_LISTED_FILES, "order", "purpose"))
    async def list_files(request: Request) -> Response:
        """The files, newest first."""
        query = _check_query(request.query_params, *PAGE, order=("asc", "desc"), purpose=None)
        purpose, owner = query.get("purpose"), _owner(request)
        found = [f for f in store().files.values() if f.owner == owner and purpose in (None, f.purpose)]
        return JsonResponse(_page(found, query, MAX_LISTED_FILES, MAX_LISTED_FILES))

    @app.get("/v1/files/{file_id}", response_model=FileObject)
    async def get_file(file_id: str, request: Request) -> Response:
        """A file's record."""
        return JsonResponse(store().find_file(file_id, _owner(request)).show())

    @app.delete("/v1/files/{file_id}", response_model=DeletedFile)
    async def delete_file(file_id: str, request: Request) -> Response:
        """Delete a file."""
        files = store()
        with _storing():
            await files.delete_file(files.find_file(file_id, _owner(request)))
        return JsonResponse({"id": file_id, "object": "file", "deleted": True})

    @app.get("/v1/files/{file_id}/content", response_class=FileResponse)
    async def get_content(file_id: str, request: Request) -> Response:
        """A file's content."""
        files = store()
        record = files.find_file(file_id, _owner(request))
        try:
            found = files.content(record.id).stat()
        except OSError as error:
            message = f"The content of {record.id} cannot be read from the server's disk ({error.strerror})."
            raise ApiError(404, message, param="file_id", code="file_not_found") from error
        _check_range(request.headers.get("range"), found.st_size)
        return FileResponse(
            files.content(record.id), media_type="application/octet-stream", filename=record.filename,
            headers={"x-content-type-options": "nosniff"}, stat_result=found,
        )  # fmt: skip


def _add_batch_routes(app: FastAPI, store: Callable[[], BatchStore]) -> None:
    reference = {"$ref": f"#/components/schemas/{BatchRequest.__name__}"}
    body_schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}

    @app.post("/v1/batches", response_model=BatchObject, openapi_extra=body_schema)
    async def create_batch(request: Request) -> Response:
        """Start a batch: the lines of a file are answered while the server has room, within a day."""
        files, owner = store(), _owner(request)
        try:
            body = await read_body(request, BatchRequest, Tolerance(Rules({})))
        finally:
            RequestContext.of(request.scope).release()
        files.find_file(body.input_file_id, owner, "input_file_id")
        now, expires = int(time.time()), body.output_expires_after
        batch = BatchRecord(
            id=new_id("batch_"), owner=owner, endpoint=body.endpoint, input_file_id=body.input_file_id,
            created_at=now, expires_at=now + WINDOW, metadata=body.metadata,
            keep_seconds=KEEP if expires is None else expires.seconds,
        )  # fmt: skip
        with _storing():
            await files.add_batch(batch)
        return JsonResponse(batch.show())

    @app.get("/v1/batches", response_model=BatchList, openapi_extra=_page_schema(MAX_LISTED_BATCHES))
    async def list_batches(request: Request) -> Response:
        """The batches, newest first."""
        query, owner = _check_query(request.query_params, *PAGE), _owner(request)
        found = [batch for batch in store().batches.values() if batch.owner == owner]
        return JsonResponse(_page(found, query, 20, MAX_LISTED_BATCHES))

    @app.get("/v1/batches/{batch_id}", response_model=BatchObject)
    async def get_batch(batch_id: str, request: Request) -> Response:
        """A batch, with its counts so far."""
        return JsonResponse(store().find_batch(batch_id, _owner(request)).show())

    @app.post("/v1/batches/{batch_id}/cancel", response_model=BatchObject)
    async def cancel_batch(batch_id: str, request: Request) -> Response:
        """Stop a batch; the answers so far become its output."""
        files = store()
        batch = files.find_batch(batch_id, _owner(request))
        if batch.status not in UNFINISHED:
            message = f"The batch is {batch.status} and cannot be cancelled."
            raise ApiError(409, message, param="batch_id", code="batch_has_ended")
        if batch.status in ("validating", "in_progress"):
            batch.enter("cancelling")
            with _storing():
                await files.save(batch)
        return JsonResponse(batch.show())


def _check_range(text: str | None, size: int) -> None:
    """Raise `ApiError` 416 for a `Range` header that is not one part of a file of this size."""
    if text is None:
        return
    found = RANGE.fullmatch(text)
    first, last = found.groups() if found else ("", "")
    begin = int(first) if first else size - int(last or 0)
    if begin >= size or (first and last and int(last) < begin):
        message = f"Range should be one range of bytes of the file, which has {size}, but got {shorten(text)!r}."
        raise ApiError(416, message, code="invalid_range", headers={"content-range": f"bytes */{size}"})


@contextlib.contextmanager
def _storing() -> Iterator[None]:
    """Raise `ApiError` 507 if the disk is full or fails."""
    try:
        yield
    except OSError as error:
        message = f"The server could not write this to its disk ({error.strerror}): delete files, or try again later."
        raise ApiError(507, message, code="storage_full") from error


def _owner(request: Request) -> str:
    return RequestContext.of(request.scope).owner


def _check_upload(upload: Upload) -> int:
    """Return for how many seconds to keep a file; raise `ApiError` 400."""
    if (purpose := upload.fields.get("purpose")) != "batch":
        got = "it is missing" if purpose is None else f"got {shorten(purpose)!r}"
        message = f"purpose must be 'batch', the only use that this server has for files, but {got}."
        raise ApiError(400, message, param="purpose", code="invalid_value")
    anchor, seconds = (upload.fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return KEEP
    keep = int(seconds) if seconds and re.fullmatch("[0-9]{1,9}", seconds) else 0
    if anchor != "created_at" or not MIN_KEEP <= keep <= MAX_KEEP:
        message = f"expires_after needs anchor 'created_at' and {MIN_KEEP} to {MAX_KEEP} seconds."
        raise ApiError(400, message, param="expires_after", code="invalid_value")
    return keep


def _page_schema(most: int, *more: str) -> dict[str, Any]:
    schemas: dict[str, Any] = {"after": {"type": "string"}, "limit": {"type": "integer", "minimum": 1, "maximum": most}}
    schemas |= {"order": {"enum": ["asc", "desc"]}} if "order" in more else {}
    schemas |= {"purpose": {"type": "string"}} if "purpose" in more else {}
    return {"parameters": [{"name": n, "in": "query", "required": False, "schema": s} for n, s in schemas.items()]}


def _check_query(query: QueryParams, *names: str, **known: tuple[str, ...] | None) -> dict[str, str]:
    """Return the arguments; raise `ApiError` 400 for an unknown one, or a value that is not listed for it."""
    allowed = dict.fromkeys(names) | known
    for name, value in query.multi_items():
        if name not in allowed:
            raise ApiError(400, f"Unrecognized query argument: {shorten(name)}.", param=name, code="unknown_parameter")
        if (values := allowed[name]) is not None and value not in values:
            message = f"{name} should be {' or '.join(values)}, but got {shorten(value)!r}."
            raise ApiError(400, message, param=name, code="invalid_value")
    return dict(query)


def _page(records: list[Record], query: dict[str, str], default: int, most: int) -> dict[str, Any]:
    """Return at most `limit` records that follow `after`; raise `ApiError` 400."""
    text = query.get("limit", str(default))
    limit = int(text) if re.fullmatch("[0-9]{1,6}", text) else 0
    if not 1 <= limit <= most:
        message = f"limit should be a whole number from 1 to {most}, but got {shorten(text)!r}."
        raise ApiError(400, message, param="limit", code="invalid_value")
    ordered = records if query.get("order") == "asc" else records[::-1]
    first = 0
    if (after := query.get("after")) is not None:
        first = next((n for n, record in enumerate(ordered, 1) if record.id == after), 0)
        if not first:
            raise ApiError(
                400, f"There is nothing with the id {shorten(after)!r}.", param="after", code="invalid_value"
            )
    page = ordered[first : first + limit]
    ids = [page[n].id if page else None for n in (0, -1)]
    data = [record.show() for record in page]
    more = first + len(page) < len(ordered)
    return {"object": "list", "data": data, "first_id": ids[0], "last_id": ids[1], "has_more": more}
