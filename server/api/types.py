"""Types with their bounds, for the fields of wire models."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from ..http.body import is_large

MAX_IDS = 2**20
MAX_INT = 2**31 - 1
MAX_TOKENS = 2**63 - 1  # of an answer, which is limited to the context anyway
MAX_PROMPTS = 256
MAX_TOOLS = 128


def _move_off_loop(schema: dict[str, Any]) -> dict[str, Any]:
    """Treat the request as large: even a short schema may take long to turn into a grammar."""
    is_large.set(True)
    return schema


Name = Annotated[str, StringConstraints(max_length=512)]
Salt = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Text = Annotated[str, StringConstraints(max_length=4 * 2**20)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)]
ToolName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
SchemaName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Description = Annotated[str, StringConstraints(max_length=2**16)]
JsonSchema = Annotated[dict[str, Any], AfterValidator(_move_off_loop)]
TemplateVariables = Annotated[
    dict[Name, Any] | None, Field(max_length=32, description="Values for variables of the checkpoint's chat template.")
]
Priority = Annotated[
    int | None, Field(ge=-(2**31), le=MAX_INT, description="Lower goes first, under policy `priority`.")
]
KeptTokens = Annotated[int | None, Field(ge=-1, le=MAX_INT, description="Keep the last N tokens; -1: all that fit.")]


class StrictModel(BaseModel):
    """A model without unknown fields, conversions or infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
