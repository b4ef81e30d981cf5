"""Receives a form with one file, piece by piece, so that the file is never in memory as a whole."""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from ...http.errors import ApiError, shorten
from .store import MAX_FILE_BYTES

FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
MAX_FIELD_BYTES = 256
MAX_FORM_BYTES = MAX_FILE_BYTES + 2**16
MAX_FILENAME = 255  # characters


@dataclass(slots=True)
class Upload:
    """A received form."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str = ""
    has_file: bool = False
    size: int = 0  # bytes of the file


class _Form:
    """Reads the parts of a form; raises `ApiError` 400 and 413."""

    def __init__(self, boundary: bytes, sink: BinaryIO) -> None:
        names = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end", "end")
        callbacks = {f"on_{name}": getattr(self, f"_on_{name}") for name in (*names, "headers_finished")}
        self.parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]
        self.upload = Upload()
        self.has_ended = False
        self._sink = sink
        self._name: str | None = None  # of the part
        self._header = self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._data = bytearray()

    def _on_part_begin(self) -> None:
        self._headers, self._data = {}, bytearray()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = name = options.get(b"name", b"").decode("utf-8", "replace")
        if name == "file" and not self.upload.has_file:
            filename = options.get(b"filename", b"").decode("utf-8", "replace")
            plain = "".join(c for c in re.split(r"[/\\]", filename)[-1] if c.isprintable())
            self.upload.has_file, self.upload.filename = True, plain[:MAX_FILENAME] or "file"
        elif name not in FIELDS or name in self.upload.fields:
            problem = "given twice" if name in (*FIELDS, "file") else "unknown"
            message = f"The form has a field that is {problem}: {shorten(name)!r}."
            raise ApiError(400, message, param=shorten(name), code="unknown_parameter")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._sink.write(data[start:end])
            self.upload.size += end - start
            if self.upload.size > MAX_FILE_BYTES:
                raise too_large()
        elif len(self._data) + end - start > MAX_FIELD_BYTES:
            raise ApiError(400, f"{self._name} is too long.", param=self._name, code="invalid_value")
        else:
            self._data += data[start:end]

    def _on_end(self) -> None:
        self.has_ended = True

    def _on_part_end(self) -> None:
        if self._name != "file" and self._name is not None:
            self.upload.fields[self._name] = self._data.decode("utf-8", "replace")


def too_large() -> ApiError:
    """Return the error for a file over the limit."""
    return ApiError(413, f"The file is larger than {MAX_FILE_BYTES} bytes.", param="file", code="body_too_large")


async def receive_upload(request: Request, path: Path) -> Upload:
    """Write the file of a form to `path`; raise `ApiError` 400, 413 or 415."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not (boundary := options.get(b"boundary")):
        got = shorten(kind.decode("latin-1"))
        message = f"The content-type must be multipart/form-data with a boundary, but got {got!r}."
        raise ApiError(415, message, code="content_type")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > MAX_FORM_BYTES:
        raise too_large()
    with path.open("wb") as sink:
        try:
            form = _Form(boundary, sink)
            async for chunk in request.stream():
                form.parser.write(chunk)
                await asyncio.sleep(0)  # a fast client must not keep others waiting
            form.parser.finalize()
            sink.flush()
            await asyncio.to_thread(os.fsync, sink.fileno())
        except FormParserError as error:
            raise ApiError(400, f"The form cannot be read: {shorten(str(error))}.", code="invalid_form") from None
    if not form.has_ended:
        raise ApiError(400, "The form has no end: its last boundary is missing.", code="invalid_form")
    if not form.upload.has_file:
        raise ApiError(400, "Missing required parameter: file.", param="file", code="missing_required_parameter")
    return form.upload
