"""The routes of the server itself: its states, its OpenAPI schema, and pages of other origins."""

from __future__ import annotations

import json

import httpx
import pytest
from support.answers import error_of

CHAT = "/v1/chat/completions"


def test_unknown_routes_and_methods_have_the_same_shape(harness):
    assert error_of(harness.get("/v2/nothing")).code == "unknown_url"
    response = harness.get(CHAT)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert error_of(response).code == "method_not_allowed"


def test_states_of_the_server_show_in_health_and_ready(harness):
    assert harness.get("/health").status_code == harness.get("/ready").status_code == 200
    harness.service.draining = True
    assert harness.get("/health").status_code == 200
    assert error_of(harness.chat()).code == "shutting_down"
    harness.service.draining, harness.service.model = False, None
    assert harness.get("/health").status_code == harness.get("/metrics").status_code == 200
    for response in (harness.get("/ready"), harness.chat(), harness.get("/v1/models")):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert error_of(response).code == "loading"
    harness.service.model = harness.model
    harness.engine.error = "gone"
    for response in (harness.get("/health"), harness.get("/ready"), harness.complete()):
        assert response.status_code == 503
        assert error_of(response).code == "engine_dead"


def test_web_pages_of_other_origins_are_allowed_only_by_name(harness, make_harness):
    assert "access-control-allow-origin" not in harness.get("/v1/models", origin="http://a.example").headers
    opened = make_harness(allowed_origins=("http://a.example",), api_key=("k",))
    assert opened.get("/v1/models", origin="http://a.example").headers["access-control-allow-origin"]
    assert "access-control-allow-origin" not in opened.get("/v1/models", origin="http://b.example").headers


def test_a_page_of_another_origin_is_refused_in_our_words(make_harness):
    harness = make_harness(allowed_origins=("http://mine",))

    assert preflight(harness, "http://mine").status_code == 200
    refused = preflight(harness, "http://other")
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "cors"
    assert "access-control-allow-origin" not in refused.headers


def preflight(harness, origin: str, method: str = "POST", **headers: str) -> httpx.Response:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    headers |= {"origin": origin, "access-control-request-method": method}
    return harness.run(lambda client: client.options("/v1/chat/completions", headers=headers))


PRIVATE = {"access_control_request_private_network": "true"}


@pytest.mark.parametrize("origins", [("http://mine",), ("*",)])
def test_an_allowed_page_may_call_into_a_private_network(make_harness, origins):
    harness = make_harness(allowed_origins=origins, api_key=("k",))
    allowed = preflight(harness, "http://mine", access_control_request_headers="authorization, x-mine", **PRIVATE)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-private-network"] == "true"
    assert allowed.headers["access-control-allow-origin"] in ("http://mine", "*")
    assert "access-control-allow-private-network" not in preflight(harness, "http://mine").headers


@pytest.mark.parametrize("origins", [("http://mine",), ()])
@pytest.mark.parametrize("headers", [{}, PRIVATE])
def test_the_refusal_of_another_page_names_the_flag(make_harness, origins, headers):
    refused = preflight(make_harness(allowed_origins=origins), "http://other", **headers)
    assert refused.status_code == 400
    assert "--allowed-origins" in error_of(refused).message
    assert not [name for name in refused.headers if name.startswith("access-control-allow")]


def test_a_method_that_pages_may_not_send_is_named(make_harness):
    harness = make_harness(allowed_origins=("http://mine",))
    assert preflight(harness, "http://mine", "HEAD").status_code == 200
    message = error_of(preflight(harness, "http://mine", "PUT")).message
    assert "'PUT'" in message
    assert "origin" not in message


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics", "/", "/docs", "/v1/models"])
def test_whatever_can_be_got_can_be_asked_for_its_head(harness, path):
    answer = harness.run(lambda client: client.head(path))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == harness.get(path).headers["content-type"]


def test_the_version_has_a_route(harness):
    assert harness.get("/version").json()["version"]


def test_openapi_has_the_real_models_and_their_bounds(harness):
    schema = harness.get("/openapi.json").json()
    models = schema["components"]["schemas"]
    reference = schema["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert reference == "#/components/schemas/ChatCompletionRequest"
    temperature = models["ChatCompletionRequest"]["properties"]["temperature"]["anyOf"][0]
    assert (temperature["minimum"], temperature["maximum"]) == (0, 2)
    for model, field in (("ChatCompletionRequest", "n"), ("CompletionRequest", "prompt")):
        assert "1024" in models[model]["properties"][field]["description"]
    text = json.dumps(schema)
    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= models.keys()
    assert "HTTPValidationError" not in models
