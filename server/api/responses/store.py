"""Stored responses: a conversation continues from one, and clients read and delete them."""

from __future__ import annotations

import re
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from ...http.body import LARGE_BODY_BYTES, is_large, off_loop_if_large
from ...http.budget import Hold, MemoryBudget
from ...http.errors import ApiError, JsonResponse, encode_json, shorten
from ...http.middleware import RequestContext
from ..rules import RULES
from .wire import DeletedResponse, InputItemList, Item, ResponseObject

MAX_RESPONSES = 4096
MAX_STORE_BYTES = 64 * 2**20
RESPONSE_BYTES = 1024  # of memory for each stored response, in addition to its data
MAX_PAGE = 100
COMPRESS_UP_TO = 64 * 2**10  # bytes; compressing larger responses would block the event loop for too long
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
"""Preset zlib dictionary: text that most responses share."""

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


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response and everything that the model read for it, in immutable bytes."""

    owner: str
    client: str  # the client whose share holds it
    item_ids: tuple[str, ...]  # of the output
    sizes: tuple[int, int, int]  # bytes of each of the `Parts`
    data: bytes  # all parts, compressed if they are small

    def read(self) -> Parts:
        """Return the parts."""
        data, (response, input_, _) = self.data, self.sizes
        if sum(self.sizes) <= COMPRESS_UP_TO:
            data = zlib.decompressobj(zdict=DICTIONARY).decompress(data)
        view, end = memoryview(data), response + input_
        return Parts(view[:response], view[response:end], view[end:])


def _without_logprobs(item: Item) -> Item:
    parts = [part | {"logprobs": []} for part in item.get("content", ())]
    return item | {"content": parts} if parts and item.get("type") != "reasoning" else item


@dataclass(slots=True)
class _Share:
    """The responses that one client has stored."""

    hold: Hold
    ids: OrderedDict[str, None] = field(default_factory=OrderedDict)  # the least recently used first
    size: int = 0

    def add(self, response_id: str, size: int) -> None:
        """Count a response."""
        self.ids[response_id] = None
        self.size += size
        self._record()

    def remove(self, response_id: str, size: int) -> None:
        """Forget a response."""
        del self.ids[response_id]
        self.size -= size
        self._record()

    def _record(self) -> None:
        self.hold.record(self.size + RESPONSE_BYTES * len(self.ids))


class ResponseStore:
    """Stores responses in memory, up to a number and a total size.

    Beyond them, the client that has stored the most loses its own least recently used response, so a client that has
    stored less than an equal share loses none. Each response belongs to an owner; for all others it does not exist. It
    is stored with its whole conversation, so it does not need the responses before it.
    """

    def __init__(
        self, budget: MemoryBudget, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_STORE_BYTES
    ) -> None:
        self._budget = budget
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._stored: dict[str, StoredResponse] = {}
        self._shares: OrderedDict[str, _Share] = OrderedDict()  # by client, the least recently used first
        self._holders: dict[str, str] = {}  # the response of each output item, by their ids
        self.size = 0

    def __len__(self) -> int:
        return len(self._stored)

    def put(self, response: dict[str, Any], input_items: bytes, owner: str = "", client: str = "") -> None:
        """Store a response with its input items in JSON, in the client's share, unless it is too large for it."""
        ids = tuple(item["id"] for item in response["output"])
        output = encode_json([_without_logprobs(item) for item in response["output"]])
        encoded = encode_json(response)
        sizes = len(encoded), len(input_items), len(output)
        data = encoded + input_items + output
        if len(data) <= COMPRESS_UP_TO:
            compressor = zlib.compressobj(1, zdict=DICTIONARY)
            data = compressor.compress(data) + compressor.flush()
        if len(data) > self._max_bytes:
            return
        if client not in self._shares:
            self._shares[client] = _Share(self._budget.hold("responses", 0, owner))
        self._shares[client].add(response["id"], len(data))
        self._stored[response["id"]] = StoredResponse(owner, client, ids, sizes, data)
        self._holders |= dict.fromkeys(ids, response["id"])
        self.size += len(data)
        self._use(response["id"])
        while len(self._stored) > self._max_responses:
            self._evict(max(self._shares.values(), key=lambda share: len(share.ids)))
        while self.size > self._max_bytes or (self._budget.is_exceeded and self._stored):
            self._evict(max(self._shares.values(), key=lambda share: share.size))

    def _evict(self, share: _Share) -> None:
        self.remove(next(iter(share.ids)))

    def _use(self, response_id: str) -> None:
        """Note that a response was used."""
        client = self._stored[response_id].client
        self._shares[client].ids.move_to_end(response_id)
        self._shares.move_to_end(client)

    def find(self, response_id: str, owner: str = "") -> StoredResponse | None:
        """Return a response of this owner."""
        stored = self._stored.get(response_id)
        if stored is None or stored.owner != owner:
            return None
        self._use(response_id)
        return stored

    def find_holder(self, item_id: str, owner: str = "") -> StoredResponse | None:
        """Return the response that has this output item."""
        return self.find(self._holders.get(item_id, ""), owner)

    def remove(self, response_id: str) -> None:
        """Delete a stored response."""
        stored = self._stored.pop(response_id)
        self.size -= len(stored.data)
        share = self._shares[stored.client]
        share.remove(response_id, len(stored.data))
        if not share.ids:
            del self._shares[stored.client]
        for item_id in stored.item_ids:
            del self._holders[item_id]


def add_store_routes(app: FastAPI, store: ResponseStore) -> None:
    """Add the routes that read and delete stored responses."""
    path = "/v1/responses/{response_id}"

    def find(response_id: str, request: Request) -> StoredResponse:
        if (stored := store.find(response_id, RequestContext.of(request.scope).owner)) is None:
            message = f"Response with id {shorten(response_id)!r} not found."
            raise ApiError(404, message, param="response_id", code="response_not_found")
        return stored

    @app.get(path, response_model=ResponseObject)
    async def get_response(response_id: str, request: Request) -> Response:
        """A stored response."""
        _check_query(request, include_obfuscation=("false",), stream=("false",))
        return Response(bytes(find(response_id, request).read().response), media_type="application/json")

    @app.delete(path, response_model=DeletedResponse)
    async def delete_response(response_id: str, request: Request) -> Response:
        """Delete a response."""
        find(response_id, request)
        store.remove(response_id)
        return JsonResponse({"id": response_id, "object": "response", "deleted": True})

    @app.post(f"{path}/cancel", response_model=ResponseObject)
    async def cancel_response(response_id: str, request: Request) -> Response:
        """Refuse: only background responses can be cancelled, and this server has none."""
        find(response_id, request)
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
        items = find(response_id, request).read().input
        is_large.set(len(items) >= LARGE_BODY_BYTES)
        newest_first = query.get("order") != "asc"
        return JsonResponse(await off_loop_if_large(_page, items, newest_first, query.get("after"), limit))


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
