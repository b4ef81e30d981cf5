"""Responses that are kept: to go on after them, to look at them again, and to be told to forget them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from .errors import ApiError, JsonResponse, encode_json, shorten
from .protocol.responses import DeletedResponse, InputItemList, ResponseObject

MAX_RESPONSES = 4096
MAX_STORE_BYTES = 64 * 2**20
MAX_PAGE = 100

Item = dict[str, Any]
_decode = msgspec.json.Decoder().decode


@dataclass(frozen=True, slots=True)
class KeptResponse:
    """One response and all that the model read for it, as JSON: its size is known, and nobody can change it."""

    response: bytes
    input: bytes
    item_ids: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.response) + len(self.input)

    def input_items(self) -> list[Item]:
        """The items that the model read, oldest first."""
        items: list[Item] = _decode(self.input)
        return items

    def output_items(self) -> list[Item]:
        """The items that the model wrote."""
        items: list[Item] = _decode(self.response)["output"]
        return items


class ResponseStore:
    """Keeps responses in memory, and forgets the one longest unused when there are too many or too many bytes.

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

    def put(self, response: dict[str, Any], input_items: list[Item]) -> None:
        """Keep a response with the items that the model read; one that is larger than all the room is not kept."""
        ids = tuple(item["id"] for item in response["output"])
        kept = KeptResponse(encode_json(response), encode_json(input_items), ids)
        if kept.size > self._max_bytes:
            return
        self._kept[response["id"]] = kept
        self._holders |= dict.fromkeys(ids, response["id"])
        self.size += kept.size
        while len(self._kept) > self._max_responses or self.size > self._max_bytes:
            self.remove(next(iter(self._kept)))

    def find(self, response_id: str) -> KeptResponse | None:
        """A response that is kept."""
        if (kept := self._kept.get(response_id)) is not None:
            self._kept.move_to_end(response_id)
        return kept

    def find_item(self, item_id: str) -> Item | None:
        """An output item of a response that is kept."""
        if (kept := self.find(self._holders.get(item_id, ""))) is None:
            return None
        return next(item for item in kept.output_items() if item["id"] == item_id)

    def get(self, response_id: str) -> KeptResponse:
        """A response that is kept; raise `ApiError` 404 where there is none."""
        if (kept := self.find(response_id)) is None:
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
        return Response(store.get(response_id).response, media_type="application/json")

    @app.delete(path, response_model=DeletedResponse)
    async def delete_response(response_id: str) -> Response:
        """Forget a response."""
        store.get(response_id)
        store.remove(response_id)
        return JsonResponse({"id": response_id, "object": "response", "deleted": True})

    @app.post(f"{path}/cancel", response_model=ResponseObject)
    async def cancel_response(response_id: str) -> Response:
        """Refuse: only a response in the background could be cancelled, and there are none."""
        store.get(response_id)
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
        items = store.get(response_id).input_items()
        if query.get("order", "desc") == "desc":
            items.reverse()
        return JsonResponse(_page(items, query.get("after"), query.get("limit", "20")))


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
        if values is not None and value.lower() not in values:
            message = f"{field} should be {' or '.join(values)}, got {shorten(value)!r}."
            raise ApiError(400, message, param=field, code="invalid_value")


def _page(items: list[Item], after: str | None, limit: str) -> dict[str, Any]:
    """At most `limit` items that follow the item `after`; raise `ApiError` 400."""
    if not limit.isdecimal() or not 1 <= int(limit[:9]) <= MAX_PAGE:
        message = f"limit should be a whole number from 1 to {MAX_PAGE}, got {shorten(limit)!r}."
        raise ApiError(400, message, param="limit", code="invalid_value")
    first = 0
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise ApiError(400, f"There is no item {shorten(after)!r}.", param="after", code="invalid_value")
        first = ids.index(after) + 1
    data = items[first : first + int(limit)]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": first + len(data) < len(items)}
