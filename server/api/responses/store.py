"""Responses that are kept: to go on after them, to look at them again, and to be told to forget them."""

from __future__ import annotations

import re
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from ...http.body import LARGE_BODY_BYTES
from ...http.context import RequestContext
from ...http.errors import ApiError, JsonResponse, encode_json, shorten
from ...http.offload import is_large, off_loop_if_large
from .wire import DeletedResponse, InputItemList, ResponseObject

MAX_RESPONSES = 4096
MAX_STORE_BYTES = 64 * 2**20
MAX_PAGE = 100
MAX_PACKED_BYTES = 64 * 2**10
"""Larger ones are kept as they are: packing them would hold up the event loop."""
TYPICAL = (
    b'[{"type":"message","role":"user","content":[{"type":"input_text","text":"'
    b'{"id":"resp_","object":"response","created_at":,"completed_at":null,"status":"completed","error":null,'
    b'"incomplete_details":{"reason":"max_output_tokens"}null,"output":[{"id":"msg_","type":"message","role":"assistant",'
    b'"status":"incomplete","content":[{"type":"output_text","text":"","annotations":[],"logprobs":[]}]}],"usage":'
    b'{"input_tokens":,"input_tokens_details":{"cached_tokens":0,"cache_write_tokens":0},"output_tokens":,'
    b'"output_tokens_details":{"reasoning_tokens":0},"total_tokens":},"model":"","instructions":null,'
    b'"previous_response_id":null,"store":true,"background":false,"temperature":1.0,"top_p":1.0,'
    b'"max_output_tokens":null,"max_tool_calls":null,"truncation":"disabled","tools":[],"tool_choice":"auto",'
    b'"parallel_tool_calls":true,"text":{"format":{"type":"text"},"verbosity":"medium"},"top_logprobs":0,'
    b'"reasoning":{"effort":"none","summary":null},"metadata":{},"user":null,"safety_identifier":null,'
    b'"prompt_cache_key":null,"service_tier":"default"}'
)
"""What most responses say in these words: a packed one refers to them."""
NO_ENDS = {"first_id": None, "last_id": None}

Item = dict[str, Any]
_decode = msgspec.json.Decoder().decode
_split = msgspec.json.Decoder(list[msgspec.Raw]).decode


class _Named(msgspec.Struct):
    """An item, of which nothing but the id is read."""

    id: str


_decode_id = msgspec.json.Decoder(_Named).decode


@dataclass(frozen=True, slots=True)
class KeptResponse:
    """One response and all that the model read for it, as JSON: its size is known, and nobody can change it.

    Small ones are packed, for most of their bytes are the same words in each.

    Attributes:
        item_ids: of the items that the model wrote.
        owner: whose it is.
    """

    item_ids: tuple[str, ...]
    owner: str
    _data: bytes
    _lengths: tuple[int, int, int]

    @classmethod
    def of(cls, response: bytes, input_: bytes, output: bytes, item_ids: tuple[str, ...], owner: str) -> KeptResponse:
        """Keep these; `output` are the response's items without their log-probabilities, which no model reads."""
        lengths, data = (len(response), len(input_), len(output)), response + input_ + output
        if len(data) <= MAX_PACKED_BYTES:
            packer = zlib.compressobj(1, zdict=TYPICAL)
            data = packer.compress(data) + packer.flush()
        return cls(item_ids, owner, data, lengths)

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return len(self._data)

    @property
    def context_size(self) -> int:
        """Bytes of what the model read and wrote."""
        return sum(self._lengths[1:])

    @property
    def output_size(self) -> int:
        """Bytes of what the model wrote."""
        return self._lengths[2]

    @property
    def response(self) -> bytes:
        """The response."""
        return self._part(0)

    @property
    def input(self) -> bytes:
        """The items that the model read, oldest first."""
        return self._part(1)

    def input_items(self) -> list[Item]:
        """The items that the model read, oldest first."""
        return _items(self._part(1))

    def output_items(self) -> list[Item]:
        """The items that the model wrote, without log-probabilities."""
        return _items(self._part(2))

    def _part(self, index: int) -> bytes:
        data = self._data
        if sum(self._lengths) <= MAX_PACKED_BYTES:
            data = zlib.decompressobj(zdict=TYPICAL).decompress(data)
        begin = sum(self._lengths[:index])
        return data[begin : begin + self._lengths[index]]


def _items(data: bytes) -> list[Item]:
    return [_decode(item) for item in _split(data)]  # one by one, so that other threads have their turn between them


def _without_logprobs(item: Item) -> Item:
    if "content" not in item:
        return item
    return item | {"content": [part | {"logprobs": []} for part in item["content"]]}


class ResponseStore:
    """Keeps responses in memory, and forgets the one longest unused when there are too many or too many bytes.

    Each belongs to an owner, and to all others there is none of its name.

    A response is kept with its whole conversation, so it does not need those before it to be kept any longer.
    """

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_STORE_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, KeptResponse] = OrderedDict()
        self._holders: dict[str, str] = {}
        self.size = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, response: dict[str, Any], input_items: bytes, owner: str = "") -> None:
        """Keep a response with the items that the model read, in JSON; one larger than all the room is not kept."""
        output = encode_json([_without_logprobs(item) for item in response["output"]])
        ids = tuple(item["id"] for item in response["output"])
        kept = KeptResponse.of(encode_json(response), input_items, output, ids, owner)
        if kept.size > self._max_bytes:
            return
        self._kept[response["id"]] = kept
        self._holders |= dict.fromkeys(ids, response["id"])
        self.size += kept.size
        while len(self._kept) > self._max_responses or self.size > self._max_bytes:
            self.remove(next(iter(self._kept)))

    def find(self, response_id: str, owner: str = "") -> KeptResponse | None:
        """A response that is kept."""
        kept = self._kept.get(response_id)
        if kept is None or kept.owner != owner:
            return None
        self._kept.move_to_end(response_id)
        return kept

    def find_holder(self, item_id: str, owner: str = "") -> KeptResponse | None:
        """The response that is kept and has this output item."""
        return self.find(self._holders.get(item_id, ""), owner)

    def get(self, response_id: str, owner: str = "") -> KeptResponse:
        """A response that is kept; raise `ApiError` 404 where there is none."""
        if (kept := self.find(response_id, owner)) is None:
            message = f"Response with id {shorten(response_id)!r} not found."
            raise ApiError(404, message, param="response_id", code="response_not_found")
        return kept

    def remove(self, response_id: str) -> None:
        """Forget a response that is kept."""
        kept = self._kept.pop(response_id)
        self.size -= kept.size
        for item_id in kept.item_ids:
            del self._holders[item_id]


def add_store_routes(app: FastAPI, store: ResponseStore) -> None:
    """The routes that show and forget what is kept."""
    path = "/v1/responses/{response_id}"

    @app.get(path, response_model=ResponseObject)
    async def get_response(response_id: str, request: Request) -> Response:
        """A response that is kept."""
        _check_query(request.query_params, include_obfuscation=("false",), stream=("false",))
        kept = store.get(response_id, RequestContext.of(request.scope).owner)
        return Response(kept.response, media_type="application/json")

    @app.delete(path, response_model=DeletedResponse)
    async def delete_response(response_id: str, request: Request) -> Response:
        """Forget a response."""
        store.get(response_id, RequestContext.of(request.scope).owner)
        store.remove(response_id)
        return JsonResponse({"id": response_id, "object": "response", "deleted": True})

    @app.post(f"{path}/cancel", response_model=ResponseObject)
    async def cancel_response(response_id: str, request: Request) -> Response:
        """Refuse: only a response in the background could be cancelled, and there are none."""
        store.get(response_id, RequestContext.of(request.scope).owner)
        raise ApiError(400, "Only a response with background can be cancelled.", param="response_id")

    page = [
        _query("limit", {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": 20}),
        _query("order", {"enum": ["asc", "desc"], "default": "desc"}),
        _query("after", {"type": "string"}),
    ]

    @app.get(f"{path}/input_items", response_model=InputItemList, openapi_extra={"parameters": page})
    async def list_input_items(response_id: str, request: Request) -> Response:
        """What the model read for a response, the newest first, also of the responses before it."""
        query = request.query_params
        _check_query(query, order=("asc", "desc"), limit=None, after=None)
        limit = _limit(query.get("limit", "20"))
        items = store.get(response_id, RequestContext.of(request.scope).owner).input
        is_large.set(len(items) >= LARGE_BODY_BYTES)
        newest_first = query.get("order") != "asc"
        return JsonResponse(await off_loop_if_large(_page, items, newest_first, query.get("after"), limit))


def _query(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema}


def _check_query(query: QueryParams, **known: tuple[str, ...] | None) -> None:
    """Raise `ApiError` 400 for an argument that is not known, or has none of its values."""
    known |= {"include": ("message.output_text.logprobs",)}
    for name, value in query.multi_items():
        field = name.removesuffix("[]") if name == "include[]" else name
        if field not in known:
            raise ApiError(400, f"Unrecognized query argument: {shorten(name)}.", param=name, code="unknown_parameter")
        values = known[field]
        if values is not None and value not in values:
            message = f"{field} should be {' or '.join(values)}, got {shorten(value)!r}."
            raise ApiError(400, message, param=field, code="invalid_value")


def _limit(text: str) -> int:
    """How many items to show; raise `ApiError` 400."""
    limit = int(text) if re.fullmatch("[0-9]{1,3}", text) else 0
    if not 1 <= limit <= MAX_PAGE:
        message = f"limit should be a whole number from 1 to {MAX_PAGE}, got {shorten(text)!r}."
        raise ApiError(400, message, param="limit", code="invalid_value")
    return limit


def _page(data: bytes, newest_first: bool, after: str | None, limit: int) -> dict[str, Any]:
    """At most `limit` items that follow the item `after`; raise `ApiError` 400."""
    items = _split(data)
    if newest_first:
        items.reverse()
    first = 0
    if after is not None:
        place = next((n for n, item in enumerate(items) if _decode_id(item).id == after), None)
        if place is None:
            raise ApiError(400, f"There is no item {shorten(after)!r}.", param="after", code="invalid_value")
        first = place + 1
    page = items[first : first + limit]
    ends = {"first_id": _decode_id(page[0]).id, "last_id": _decode_id(page[-1]).id} if page else NO_ENDS
    return {"object": "list", "data": page, **ends, "has_more": first + len(page) < len(items)}
