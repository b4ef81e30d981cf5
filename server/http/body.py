"""Parses request bodies into validated models, or an error that names the field; large ones in threads."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from decimal import Decimal
from functools import partial
from typing import Any, ParamSpec, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from .budget import MAX_BODY_BYTES
from .errors import ApiError, shorten
from .middleware import RequestContext
from .shapes import ANYTHING, Shape, shape_of
from .tolerance import Tolerance, unknown_field

LARGE_BODY_BYTES = 64 * 2**10
MAX_CONTAINERS = 2**18  # objects and arrays in a body
PARSED_BYTES = {b"{": 320, b"[": 72, b":": 64, b",": 40}
"""The most memory that an object, an array, a name and a value take."""
REQUEST_BYTES = 8 * 2**10  # of memory that a request takes in addition to its body's
SMALL_BYTES = 16 * 2**10  # of memory that a request may take from its connection's share
MAX_EXACT = 2**53  # up to here, every integer is exactly representable as a float
MAX_WHOLE = 2**64  # a larger whole number with a point stays a float
MAX_MESSAGE = 600
MAX_ERRORS = 1000
QUOTES = "'"
SUBJECT = re.compile("^(Input|String|List|Dictionary|Value error,) ")
"""The subject of pydantic's messages, which ours replace with the field's name."""

is_large: ContextVar[bool] = ContextVar("is_large", default=False)
"""Whether all work on the current request belongs off the event loop: its body is large, or has a schema."""

POOL_THREADS = 4
POOL = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="read-request")
"""Separate from asyncio's default executor, so that a flood of large requests blocks only large requests."""
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Body = TypeVar("Body", bound=BaseModel)


async def off_loop(call: Callable[Arguments, Result], /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Call in a thread."""
    return await asyncio.get_running_loop().run_in_executor(POOL, partial(call, *args, **kwargs))


async def off_loop_if_large(
    call: Callable[Arguments, Result], /, *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """Call in a thread if the request is large."""
    return await off_loop(call, *args, **kwargs) if is_large.get() else call(*args, **kwargs)


async def read_body(request: Request, model: type[Body], tolerance: Tolerance) -> Body:
    """Read and check the body; raise `ApiError` (400, 408, 413, 415, 503) or `EngineBusyError`.

    The context then holds the parsed body's memory and, for a large body, more, which the caller releases.
    """
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if not re.fullmatch(r"application/(.*\+)?json", kind):
        raise ApiError(
            415, f"The content-type must be application/json, but got {shorten(kind)!r}.", code="content_type"
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "Compressed bodies are not supported.", code="content_encoding")
    length = request.headers.get("content-length", "")
    data = await _read_bytes(request, int(length[:20]) if length.isdecimal() else MAX_BODY_BYTES)
    is_large.set(len(data) >= LARGE_BODY_BYTES)
    if (size := await off_loop_if_large(parsed_bytes, data)) > SMALL_BYTES:
        RequestContext.of(request.scope).hold("requests", size)
    return await off_loop_if_large(parse_body, data, model, tolerance)


async def _read_bytes(request: Request, size: int) -> bytes:
    """Read the body; if it turns out to be large, reserve its `size` before reading the rest."""
    data, context = bytearray(), RequestContext.of(request.scope)
    too_large = ApiError(
        413, f"The body is larger than {MAX_BODY_BYTES} bytes.", code="body_too_large", headers={"connection": "close"}
    )
    if size > MAX_BODY_BYTES:
        raise too_large
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise too_large
        if len(data) >= LARGE_BODY_BYTES:
            await context.reserve(max(size, len(data)))
        if context.body_hold is not None and context.body_hold.is_overdue:
            raise ApiError(408, "The request body is arriving too slowly.", code="request_timeout")
    return bytes(data)


def parsed_bytes(data: bytes) -> int:
    """Return how many bytes of memory a request with this body takes at most once it is parsed."""
    # One character outside ASCII can make a whole text four times as wide, and then its UTF-8 is kept too.
    width = 2 if data.isascii() and b"\\u" not in data else 5
    return REQUEST_BYTES + width * len(data) + sum(size * data.count(mark) for mark, size in PARSED_BYTES.items())


def _number(text: str) -> float:
    """Convert a number with a point or an exponent; a whole one is an integer, as in JSON Schema."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("Number out of range")
    if not value.is_integer() or abs(value) > (MAX_EXACT if "e" in text.lower() else MAX_WHOLE):
        return value
    # A double has no more than 53 bits, and an id of 64 bits may be written with a point too.
    exact = Decimal(text) if abs(value) > MAX_EXACT else value
    return int(exact) if exact == int(exact) else value


_decode = msgspec.json.Decoder(float_hook=_number).decode


def parse_body(data: bytes, model: type[Body], tolerance: Tolerance) -> Body:
    """Check bytes of JSON against `model`, without the fields that `tolerance` drops; raise `ApiError` 400."""
    if len(data) > 2 * MAX_CONTAINERS and data.count(b"[") + data.count(b"{") > MAX_CONTAINERS:
        raise _invalid(f"has more than {MAX_CONTAINERS} objects and arrays")
    try:
        fields = _decode(data)
    except UnicodeDecodeError:
        raise _invalid("is not valid UTF-8") from None
    except RecursionError:
        raise _invalid("is nested too deeply") from None
    except ValueError as error:
        raise _invalid(f"is not valid JSON: {shorten(str(error))}") from None
    if not isinstance(fields, dict):
        raise _invalid("must be a JSON object")
    if not _has_hints(fields, tolerance) and fields.keys() <= model.model_fields.keys():
        with contextlib.suppress(ValidationError):  # else it may need tolerance
            return model.model_validate(fields)
    shape = shape_of(model)
    fields = tolerance.relax_body(fields, shape)
    for name in fields:
        if shape.member(name) is None:
            raise unknown_field(name)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        if error.error_count() > MAX_ERRORS:  # listing them would take longer than finding them
            path = max(fields, key=lambda name: len(fields[name]) if isinstance(fields[name], dict | list | str) else 0)
            message = f"{shorten(path)} has {error.error_count()} invalid values or field names."
            raise ApiError(400, message, param=shorten(path), code="invalid_value") from None
        raise tolerance.renumber(_describe(error, fields, shape)) from None


def _has_hints(fields: dict[str, Any], tolerance: Tolerance) -> bool:
    """Note which hints in a body have no effect, including those its model knows; return whether it has hints."""
    found = False
    for place, names, rule in tolerance.rules.hints:
        value: Any = fields
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            found = True
            if not rule.asks_for_nothing(value) and not tolerance.acts(rule, value):
                tolerance.ignored[place] = None
    return found


def _invalid(problem: str) -> ApiError:
    return ApiError(400, f"The body {problem}.", code="invalid_json")


def _locate(steps: tuple[int | str, ...], kind: str, data: Any, shape: Shape) -> tuple[str, int, Any]:
    """Write an error's location as a path, its depth and its value, without pydantic's names of union members."""
    path, depth = "", 0
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        if isinstance(step, int) and isinstance(data, list) and step < len(data):
            path, data, depth = f"{path}[{step}]", data[step], depth + 1
            shape = shape.items or ANYTHING
        elif isinstance(step, str) and isinstance(data, dict):
            if shape.tag is not None and step == data.get(shape.tag):  # the member of a union, which may share a
                shape = Shape(shape.narrow(data).models)  # field's name
            elif step in data or (last and kind == "missing"):
                path, depth = f"{path}.{shorten(step)}" if path else shorten(step), depth + 1
                data, shape = data.get(step), shape.narrow(data).member(step) or ANYTHING
    return path, depth, data


def _describe(error: ValidationError, data: dict[str, Any], shape: Shape) -> ApiError:
    """Report the most deeply nested error of the first invalid field; for a union, that of each member."""
    found = []
    for entry in error.errors(include_url=False, include_input=False):
        path, depth, value = _locate(entry["loc"], entry["type"], data, shape)
        kind = entry["type"]
        if kind.startswith("union_tag"):
            path, depth = f"{path}.{entry['ctx']['discriminator'].strip(QUOTES)}", depth + 1
        if kind == "literal_error" and isinstance(value, dict | list):
            kind = "literal_type"
        found.append((path, depth, kind, entry["msg"], entry.get("ctx", {}).get("expected_tags", "")))
    field = re.split(r"[.\[]", found[0][0])[0]
    found = [item for item in found if re.split(r"[.\[]", item[0])[0] == field]
    path, _, kind, _, tags = max(found, key=lambda item: (item[1], not item[2].endswith("_type")))
    if kind == "extra_forbidden":
        return unknown_field(path)
    if kind in ("missing", "union_tag_not_found"):
        return ApiError(400, f"Missing required parameter: {path}.", param=path, code="missing_required_parameter")
    if kind == "union_tag_invalid":
        choices = " or ".join(", ".join(tag.strip(QUOTES) for tag in tags.split(", ")).rsplit(", ", 1))
        whole = path.rpartition(".")[0]  # at fault if it could be a word too
        param = whole if any(item[0] == whole for item in found) else path
        return ApiError(400, f"{path} should be {choices}.", param=param, code="invalid_value")
    same = [item for item in found if item[0] == path and item[2].endswith("_type") == kind.endswith("_type")]
    texts = list(dict.fromkeys(SUBJECT.sub("", message).replace(" after validation", "") for *_, message, _ in same))
    text = " or ".join([texts[0], *(other.removeprefix("should be ") for other in texts[1:])])
    return ApiError(400, f"{path} {text}."[:MAX_MESSAGE], param=path, code="invalid_value")
