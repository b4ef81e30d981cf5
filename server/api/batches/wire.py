"""The wire models of files and batches, in OpenAI's shapes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from ..types import StrictModel

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MIN_KEEP, MAX_KEEP = 3600, 30 * 86400  # seconds that a client may ask to keep a file
FileId = Annotated[str, StringConstraints(max_length=64)]


class ExpiresAfter(StrictModel):
    """When a file is deleted."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_KEEP, le=MAX_KEEP)


class BatchRequest(StrictModel):
    """Body of `POST /v1/batches`."""

    input_file_id: FileId
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: ExpiresAfter | None = None


class FileObject(StrictModel):
    """One file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]


class FileList(StrictModel):
    """Response body of `GET /v1/files`."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(StrictModel):
    """Response body of `DELETE /v1/files/{id}`."""

    id: str
    object: Literal["file"]
    deleted: bool


class BatchObject(StrictModel):
    """One batch."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: dict[str, Any] | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: dict[str, int]
    usage: dict[str, Any]
    metadata: dict[str, str] | None


class BatchList(StrictModel):
    """Response body of `GET /v1/batches`."""

    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
