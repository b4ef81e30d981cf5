"""How a URL may be written, and what a wrong one is answered."""

from __future__ import annotations

import pytest
from support.answers import error_of

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions/", "//v1/chat/completions", "/v1//chat/completions", "///v1///chat//completions//"]
)
def test_doubled_and_trailing_slashes_lead_to_the_same_route(harness, path):
    response = harness.post(f"http://test{path}", CHAT)
    assert response.status_code == 200
    assert response.json()["object"] == "chat.completion"
    assert error_of(harness.get(f"http://test{path}")).code == "method_not_allowed"


@pytest.mark.parametrize("path", ["/v1/models/", "//v1/models", "/health/", "/version/", "/metrics//"])
def test_routes_that_show_something_take_them_too(harness, path):
    tidy = "/" + "/".join(filter(None, path.split("/")))
    response = harness.get(f"http://test{path}")
    assert response.status_code == 200
    assert response.headers["content-type"] == harness.get(tidy).headers["content-type"]


@pytest.mark.parametrize("path", ["//v1/models", "/health/", "//health", "/v1/chat/completions/", "/v1/models/"])
def test_no_slash_goes_past_the_keys(make_harness, path):
    harness = make_harness(api_key=("k",))
    assert harness.get(f"http://test{path}").status_code == 401
    assert harness.get(f"http://test{path}", authorization="Bearer k").status_code in (200, 405)


def test_a_root_path_keeps_its_slashes_apart(make_harness):
    harness = make_harness(root_path="/llm")
    for path in ("/llm/v1/models/", "/llm//v1/models", "/v1/models/", "/llm/"):
        assert harness.get(path).status_code == 200, path


def test_messages_keep_their_own_error_shape(harness):
    response = harness.post("http://test//v1/messages", {})
    assert response.status_code == 400
    assert response.json()["type"] == "error"


def test_a_model_name_may_hold_such_slashes(harness):
    for name in ("a//b", "tiny/"):
        error = error_of(harness.get(f"/v1/models/{name}"))
        assert (error.code, name in error.message) == ("model_not_found", True)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/api/v1/models", "/v1/models"),
        ("/v1/completions/chat/completions", "/v1/chat/completions"),
        ("/V1/models", "/v1/models"),
        ("/v1/tokenize", "/tokenize"),
        ("/v1/health", "/health"),
        ("/models", "/v1/models"),
        ("/v1/message", "/v1/messages"),
        ("/docs/", "/docs"),
    ],
)
def test_an_unknown_route_hints_at_the_one_that_is_meant(harness, path, meant):
    error = error_of(harness.post(path, CHAT))
    assert error.code == "unknown_url"
    assert f" {meant}" in error.message


@pytest.mark.parametrize("path", ["/x", "/v1/images/generations", "/" + "a" * 5000, "/.env"])
def test_other_routes_get_the_list_of_routes(harness, path):
    error = error_of(harness.get(path))
    assert "GET /v1" in error.message
    assert len(error.message) < 500


@pytest.mark.parametrize("path", ["/v1", "/v1/"])
class TestTheBaseUrl:
    def test_shows_a_client_where_things_are(self, make_harness, path):
        response = make_harness(api_key=("k",)).get(path)
        assert response.status_code == 200
        assert {"POST /v1/chat/completions", "GET /v1/models"} <= set(response.json()["endpoints"])

    def test_tells_a_browser_what_is_where(self, make_harness, path):
        for root in ("", "/llm"):
            harness = make_harness(root_path=root)
            response = harness.get(path, **BROWSER)
            assert response.status_code == 200
            assert response.headers["content-type"] == "application/json"
            places = response.json()
            for name, kind in (("chat_page", "text/html"), ("reference", "text/html"), ("models", "application/json")):
                assert places[name].startswith(root + "/")
                assert harness.get(places[name]).headers["content-type"].startswith(kind)

    def test_refuses_what_belongs_to_an_endpoint(self, harness, path):
        error = error_of(harness.post(path, CHAT))
        assert error.code == "method_not_allowed"
        assert "GET" in error.message


def test_the_refusal_of_a_method_names_the_right_ones(harness):
    response = harness.get("/v1/chat/completions")
    assert response.headers["allow"] == "POST"
    assert "POST" in error_of(response).message
    for method in ("PUT", "POST"):
        response = harness.run(lambda client, method=method: client.request(method, "/v1/responses/resp_1"))
        assert response.headers["allow"] == "DELETE, GET, HEAD"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/v1/chat/completions", "POST"), ("/v1/models", "GET, HEAD"), ("/", "GET, HEAD"), ("/v1/models/x", "GET, HEAD"),
     ("/v1/responses/resp_1", "DELETE, GET, HEAD")],
)  # fmt: skip
def test_options_lists_the_methods(harness, path, allowed):
    response = harness.run(lambda client: client.options(path))
    assert (response.status_code, response.content) == (204, b"")
    assert response.headers["allow"] == f"{allowed}, OPTIONS"


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/models", "/v1/models/alias", "/health", "/metrics", "/docs"])
def test_head_is_answered_like_get(harness, path):
    head, get = (harness.run(lambda client, m=m: client.request(m, path)) for m in ("HEAD", "GET"))
    assert head.status_code == get.status_code == 200
    assert head.headers["content-length"] == get.headers["content-length"] or path == "/metrics"
