"""Stored responses: what is kept of one, what a store does, and the routes that read and delete them."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from ...http.body import LARGE_BODY_BYTES, is_large, off_loop_if_large
from ...http.errors import ApiError, JsonResponse, encode_json, shorten, unavailable
from ...http.middleware import RequestContext
from ..rules import RULES
from .wire import DeletedResponse, InputItemList, Item, ResponseObject

logger = logging.getLogger("pyllm.server")

MAX_PAGE = 100
MAX_IDS = 256  # to look up at once, since others wait for it
OPERATION_SECONDS = 5.0  # after which a store that has not answered counts as unavailable
RETRY_SECONDS = 1.0  # between two attempts to reach a store that is unavailable
COMPRESS_UP_TO = 64 * 2**10  # bytes; compressing larger responses would take too long
DICTIONARY = (
    b'[{"type":"message","role":"user","content":[{"type":"input_text","text":"'
    b'{"id":"resp_","object":"response","created_at":,"status":"completed","completed_at":null,"error":null,'
    b'"incomplete_details":{"reason":"max_output_tokens"}null,"usage":{"input_tokens":,"input_tokens_details":'
    b'{"cached_tokens":0,"cache_write_tokens":0},"output_tokens":,"output_tokens_details":{"reasoning_tokens":0},'
    b'"total_tokens":},"model":"","instructions":null,"previous_response_id":null,"max_output_tokens":null,"user":null,'
    b'"safety_identifier":null,"output":[{"id":"msg_","type":"message","role":"assistant","status":"incomplete",'
    b'"content":[{"type":"output_text","text":"","annotations":[],"logprobs":[]}]}],"store":true,"temperature":1.0,'
    b'"top_p":1.0,"truncation":"disabled","tools":[],"tool_choice":"auto","parallel_tool_calls":true,"text":{"format":'
    b'{"type":"text"},"verbosity":"medium"},"top_logprobs":0,"metadata":{},"prompt_cache_key":null,'
    b'"service_tier":"default","background":false,"max_tool_calls":null,"reasoning":{"effort":"none","summary":null}}'
)
"""Preset zlib dictionary: text that most responses share. It belongs to the format of stores: a change makes what they
have unreadable, so it needs other numbers in `sqlite_store.VERSION` and `redis_store.PREFIX`."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_decode = msgspec.json.Decoder().decode
_split = msgspec.json.Decoder(list[msgspec.Raw]).decode


def decode_items(data: memoryview) -> list[Item]:
    """Decode items one by one, so that other threads can run in between."""
    return [_decode(item) for item in _split(data)]


class Parts(NamedTuple):
    """A stored response as JSON."""

    response: memoryview
    input: memoryview  # the items that the model read, oldest first
    output: memoryview  # the items that it wrote, without log-probabilities


class Caller(NamedTuple):
    """Who stores or reads a response."""

    owner: str = ""  # names the API key, and is the same in all servers that share a store; "" without keys
    client: str = ""  # whose share of the store the response takes
    account: str = ""  # names the key in this process's `MemoryBudget`

    @classmethod
    def of(cls, context: RequestContext) -> Caller:
        """Return the caller of a request."""
        owner = context.account.shared_owner if context.account else ""
        return cls(owner, owner or context.client, context.owner)


class StoredResponse(NamedTuple):
    """One response in a store, with everything that the model read for it."""

    id: str
    owner: str
    sizes: tuple[int, int, int]  # bytes of each of the `Parts`


class Packed(NamedTuple):
    """What a store keeps of a response, besides its owner and client."""

    id: str
    item_ids: tuple[str, ...]  # of the output
    sizes: tuple[int, int, int]
    data: bytes  # all parts, compressed if they are small


def pack(response: dict[str, Any], input_items: bytes) -> Packed:
    """Prepare a response, and its input items in JSON, for a store."""
    encoded = encode_json(response)
    output = encode_json([_without_logprobs(item) for item in response["output"]])
    sizes = len(encoded), len(input_items), len(output)
    data = encoded + input_items + output
    if len(data) <= COMPRESS_UP_TO:
        compressor = zlib.compressobj(1, zdict=DICTIONARY)
        data = compressor.compress(data) + compressor.flush()
    return Packed(response["id"], tuple(item["id"] for item in response["output"]), sizes, data)


def unpack(data: bytes, sizes: tuple[int, int, int]) -> Parts:
    """Return the parts of a packed response; raise `ValueError` if they are damaged."""
    response, input_, _ = sizes
    if sum(sizes) <= COMPRESS_UP_TO:
        try:
            data = zlib.decompressobj(zdict=DICTIONARY).decompress(data, COMPRESS_UP_TO)
        except zlib.error as error:
            raise ValueError(str(error)) from None
    if len(data) != sum(sizes):
        raise ValueError(f"{len(data)} bytes instead of {sum(sizes)}")
    view, end = memoryview(data), response + input_
    return Parts(view[:response], view[response:end], view[end:])


def _without_logprobs(item: Item) -> Item:
    parts = [part | {"logprobs": []} for part in item.get("content", ())]
    return item | {"content": parts} if parts and item.get("type") != "reasoning" else item


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much a store keeps, and how long."""

    max_responses: int
    max_bytes: int  # of packed data
    seconds: int = 0  # after which a response is deleted; 0 keeps it until its space is needed


class ResponseStore(ABC):
    """Stores responses, up to a number and a total size, and for some time.

    Beyond them, the client that has stored the most loses its own least recently used response, so a client that has
    stored less than an equal share loses none. Each response belongs to an owner; for all others it does not exist. It
    is stored with its whole conversation, so it does not need the responses before it.

    A store that several servers share may be unavailable for a while. Then each method raises `ApiError` 503.
    """

    failures: tuple[type[Exception], ...] = (OSError,)
    """What its operations raise if it is unavailable."""

    def __init__(self, name: str, bounds: Bounds) -> None:
        """`name` is what logs call the store."""
        self.name = name
        self.bounds = bounds
        self.is_available = True  # as the last operation found it
        self._retry_at = 0.0

    @abstractmethod
    async def open(self) -> None:
        """Prepare the store; raise `ConfigError` if it can never be used as configured."""

    @abstractmethod
    async def close(self) -> None:
        """Release connections and files; the next operation opens them again."""

    async def put(self, response: dict[str, Any], input_items: bytes, caller: Caller) -> None:
        """Store a response with its input items in JSON, unless it is larger than the whole store."""
        packed = await off_loop_if_large(pack, response, input_items)
        if len(packed.data) <= self.bounds.max_bytes:
            await self._attempt(self._put, packed, caller)

    async def find(self, response_id: str, caller: Caller) -> StoredResponse | None:
        """Return a response of the caller's."""
        return await self._attempt(self._find, response_id, caller)

    async def find_holders(self, item_ids: Collection[str], caller: Caller) -> dict[str, StoredResponse]:
        """Return the caller's responses that have these output items, by the items' ids."""
        ids, found = list(item_ids), dict[str, StoredResponse]()
        for start in range(0, len(ids), MAX_IDS):
            found |= await self._attempt(self._find_holders, ids[start : start + MAX_IDS], caller)
            await asyncio.sleep(0)
        return found

    async def read(self, stored: StoredResponse) -> Parts | None:
        """Return the parts of a response that was found; None if it was deleted since."""
        data = await self._attempt(self._read, stored)
        try:
            return None if data is None else unpack(data, stored.sizes)
        except ValueError as error:
            logger.error("The stored response %s is damaged (%s), so it counts as deleted.", stored.id, error)
            return None

    async def remove(self, response_id: str, caller: Caller) -> bool:
        """Delete a response of the caller's; return whether there was one."""
        return await self._attempt(self._remove, response_id, caller)

    async def purge(self) -> None:
        """Delete the responses whose time is over."""
        await self._attempt(self._purge)

    async def count(self) -> tuple[int, int]:
        """Return how many responses are stored, and how many bytes of packed data."""
        return await self._attempt(self._count)

    async def check(self) -> None:
        """Raise `ApiError` 503 if the store was unavailable a moment ago, and still is."""
        if not self.is_available:
            await self._attempt(self._probe)

    async def _attempt(
        self, operation: Callable[Arguments, Awaitable[Result]], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Do an operation within a limited time; raise `ApiError` 503 if it fails.

        While the store is unavailable, only one attempt a second is made.
        """
        if not self.is_available:
            if (now := time.monotonic()) < self._retry_at:
                raise self._unavailable()
            self._retry_at = now + RETRY_SECONDS
        try:
            async with asyncio.timeout(OPERATION_SECONDS):
                result = await operation(*args, **kwargs)
        except self.failures as error:
            self.note_failure(error)
            raise self._unavailable() from None
        if not self.is_available:
            self.is_available = True
            logger.info("The response store %s is available again.", self.name)
        return result

    def note_failure(self, error: Exception) -> None:
        """Count the store as unavailable, and log why, once."""
        if self.is_available:
            self.is_available = False
            reason = (str(error).splitlines() or [""])[0] or f"no answer within {OPERATION_SECONDS:g} s"
            message = "The response store %s is unavailable (%s): requests that need it get a 503 until it is back."
            logger.error(message, self.name, reason)
        self._retry_at = time.monotonic() + RETRY_SECONDS

    @staticmethod
    def _unavailable() -> ApiError:
        message = "The store of responses is unavailable: retry later, or send store: false without earlier responses."
        return unavailable(message, "response_store_unavailable")

    @abstractmethod
    async def _put(self, packed: Packed, caller: Caller) -> None: ...

    @abstractmethod
    async def _find(self, response_id: str, caller: Caller) -> StoredResponse | None: ...

    @abstractmethod
    async def _find_holders(self, item_ids: Sequence[str], caller: Caller) -> dict[str, StoredResponse]: ...

    @abstractmethod
    async def _read(self, stored: StoredResponse) -> bytes | None: ...

    @abstractmethod
    async def _remove(self, response_id: str, caller: Caller) -> bool: ...

    @abstractmethod
    async def _purge(self) -> None: ...

    @abstractmethod
    async def _count(self) -> tuple[int, int]: ...

    @abstractmethod
    async def _probe(self) -> None: ...  # writes something


def add_store_routes(app: FastAPI, store: ResponseStore) -> None:
    """Add the routes that read and delete stored responses."""
    path = "/v1/responses/{response_id}"

    @app.get(path, response_model=ResponseObject)
    async def get_response(response_id: str, request: Request) -> Response:
        """A stored response."""
        _check_query(request, include_obfuscation=("false",), stream=("false",))
        return Response(bytes((await _read(store, response_id, request)).response), media_type="application/json")

    @app.delete(path, response_model=DeletedResponse)
    async def delete_response(response_id: str, request: Request) -> Response:
        """Delete a response."""
        if not await store.remove(response_id, Caller.of(RequestContext.of(request.scope))):
            raise _missing(response_id)
        return JsonResponse({"id": response_id, "object": "response", "deleted": True})

    @app.post(f"{path}/cancel", response_model=ResponseObject)
    async def cancel_response(response_id: str, request: Request) -> Response:
        """Refuse: only background responses can be cancelled, and this server has none."""
        await _find(store, response_id, request)
        raise ApiError(400, "Only a background response can be cancelled.", param="response_id")

    query = {
        "limit": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": 20},
        "order": {"enum": ["asc", "desc"], "default": "desc"},
        "after": {"type": "string"},
    }
    page = [{"name": name, "in": "query", "required": False, "schema": schema} for name, schema in query.items()]

    @app.get(f"{path}/input_items", response_model=InputItemList, openapi_extra={"parameters": page})
    async def list_input_items(response_id: str, request: Request) -> Response:
        """The items that the model read for a response, newest first, including those of earlier responses."""
        query = request.query_params
        _check_query(request, order=("asc", "desc"), limit=None, after=None)
        text = query.get("limit", "20")
        limit = int(text) if re.fullmatch("[0-9]{1,3}", text) else 0
        if not 1 <= limit <= MAX_PAGE:
            message = f"limit should be a whole number from 1 to {MAX_PAGE}, but got {shorten(text)!r}."
            raise ApiError(400, message, param="limit", code="invalid_value")
        items = (await _read(store, response_id, request)).input
        is_large.set(len(items) >= LARGE_BODY_BYTES)
        newest_first = query.get("order") != "asc"
        return JsonResponse(await off_loop_if_large(_page, items, newest_first, query.get("after"), limit))


def _missing(response_id: str) -> ApiError:
    message = f"Response with id {shorten(response_id)!r} not found."
    return ApiError(404, message, param="response_id", code="response_not_found")


async def _find(store: ResponseStore, response_id: str, request: Request) -> StoredResponse:
    if (stored := await store.find(response_id, Caller.of(RequestContext.of(request.scope)))) is None:
        raise _missing(response_id)
    return stored


async def _read(store: ResponseStore, response_id: str, request: Request) -> Parts:
    stored = await _find(store, response_id, request)
    RequestContext.of(request.scope).hold("answers", sum(stored.sizes))
    if (parts := await store.read(stored)) is None:
        raise _missing(response_id)
    return parts


def _check_query(request: Request, **known: tuple[str, ...] | None) -> None:
    """Raise `ApiError` 400 for an unknown argument or a value that is not listed for it; note ignored ones."""
    known |= {"include": ("message.output_text.logprobs",)}
    includes, ignored = RULES["/v1/responses"].table["include[]"], dict[str, None]()
    RequestContext.of(request.scope).ignored = ignored
    for name, value in request.query_params.multi_items():
        field = name.removesuffix("[]") if name == "include[]" else name
        if field not in known:
            raise ApiError(400, f"Unrecognized query argument: {shorten(name)}.", param=name, code="unknown_parameter")
        if field == "include" and includes.matches(value):
            ignored[f"include.{value}"] = None
        elif (values := known[field]) is not None and value not in values:
            message = f"{field} should be {' or '.join(values)}, but got {shorten(value)!r}."
            raise ApiError(400, message, param=field, code="invalid_value")


def _page(data: memoryview, newest_first: bool, after: str | None, limit: int) -> dict[str, Any]:
    """Return at most `limit` items that follow the item `after`; raise `ApiError` 400."""
    items = _split(data)
    if newest_first:
        items.reverse()
    first = 0
    if after is not None:
        first = next((n for n, item in enumerate(items, 1) if _decode(item)["id"] == after), 0)
        if not first:
            raise ApiError(400, f"There is no item {shorten(after)!r}.", param="after", code="invalid_value")
    page = items[first : first + limit]
    first_id, last_id = (_decode(page[n])["id"] if page else None for n in (0, -1))
    more = first + len(page) < len(items)
    return {"object": "list", "data": page, "first_id": first_id, "last_id": last_id, "has_more": more}
