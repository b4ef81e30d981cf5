"""Failures on Anthropic's routes: their shape, the fields that they name, and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from pyllm.server.api.messages.wire import MessagesError

Harness = Any  # of conftest.py

HI = [{"role": "user", "content": "Hi"}]
WEATHER = {"name": "get_weather", "description": "Weather", "input_schema": {"type": "object", "properties": {}}}
SCHEMA = {"type": "json_schema", "schema": {"type": "object"}}
CALL = {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {"city": "Zürich"}}


def send(harness: Harness, **fields: Any) -> httpx.Response:
    return harness.post("/v1/messages", {"model": "alias", "max_tokens": 50, "messages": HI} | fields)


def failure(response: httpx.Response) -> dict[str, Any]:
    """The body, held against its model."""
    MessagesError.model_validate(response.json())
    return response.json()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"nonsense": 1}, "nonsense"),
        ({"n": 2}, "n"),
        ({"temperature": 2.5}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": ["a"] * 65}, "stop_sequences"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers"),
        ({"context_management": {"edits": [1]}}, "context_management"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 2}]}, "tools[0].type"),
        ({"tools": [WEATHER | {"name": "a b"}]}, "tools[0].name"),
        ({"tools": [WEATHER | {"input_examples": [{}]}]}, "tools[0].input_examples"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [CALL]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_9"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
        ({"messages": [*HI, {"role": "assistant", "content": [CALL]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
    ],
)
def test_a_refusal_names_the_field_in_both_shapes(harness: Harness, fields: dict[str, Any], param: str) -> None:
    response = send(harness, **fields)
    assert response.status_code == 400
    body = failure(response)
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == param
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind"),
    [
        ("POST", "/v1/messages", {"model": "no", "max_tokens": 1, "messages": HI}, 404, "not_found_error"),
        ("POST", "/v1/messages/count_tokens", {"model": "no", "messages": HI}, 404, "not_found_error"),
        ("POST", "/v1/messages/batches", {}, 404, "not_found_error"),
        ("GET", "/v1/messages", None, 405, "invalid_request_error"),
        ("POST", "/v1/messages", {"model": "alias", "x": "y" * 9 * 2**20}, 413, "request_too_large"),
    ],
)
def test_every_failure_has_anthropics_type(
    harness: Harness, method: str, path: str, body: Any, status: int, kind: str
) -> None:
    response = harness.run(lambda client: client.request(method, path, json=body))
    assert response.status_code == status
    assert failure(response)["error"]["type"] == kind


def test_states_of_the_server_have_anthropics_types(harness: Harness) -> None:
    harness.engine.most = 0
    response = send(harness)
    assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")
    assert "retry-after" in response.headers
    harness.service.draining = True
    response = send(harness)
    assert (response.status_code, response.json()["error"]["type"]) == (503, "overloaded_error")


def test_other_routes_keep_openais_shape(harness: Harness) -> None:
    response = harness.chat(nonsense=1)
    assert set(response.json()) == {"error"}
    assert "request-id" not in response.headers
    assert "type" not in harness.get("/v1/messages_of_mine").json()


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions"])
def test_a_key_may_come_as_x_api_key(make_harness: Callable[..., Harness], path: str) -> None:
    harness = make_harness(api_key=("secret", "other"))
    body = {"model": "alias", "max_tokens": 5, "messages": HI}

    def status(**headers: str) -> int:
        return harness.post(path, body, headers={name.replace("_", "-"): value for name, value in headers.items()})

    for good in ({"x_api_key": "secret"}, {"x_api_key": "other"}, {"authorization": "Bearer other"}):
        assert status(**good).status_code == 200
    for bad in ({}, {"x_api_key": ""}, {"x_api_key": "Bearer secret"}, {"authorization": "secret"}):
        response = status(**bad)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert harness.post("/v1/messages", body).json()["error"]["type"] == "authentication_error"
