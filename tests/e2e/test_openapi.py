"""Our own OpenAPI document, held against the server by schemathesis: requests made from it, right and wrong ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from support.bodies import POSTS
from support.serving import PATIENCE, ServerProcess

from pyllm.server.app import ENDPOINTS, create_app
from pyllm.server.flags import ServerConfig
from pyllm.server.service import Service

CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
EXAMPLES, MORE_EXAMPLES = 15, 60
PATHS = create_app(Service(ServerConfig())).openapi()["paths"]
CASES = [
    (method, path, mode)
    for path, methods in PATHS.items()
    for method, operation in methods.items()
    for mode in ("positive", "negative")
    if mode == "positive" or "requestBody" in operation
]
"""Requests that are right by the document, and wrong ones where there is a body that can be wrong."""


@pytest.fixture(scope="module")
def small(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with so short a context that any answer ends soon."""
    flags = ("--dtype", "float32", "--max-model-len", "48", "--served-model-name", "tiny")
    with ServerProcess(tmp_path_factory.mktemp("small") / "log", str(checkpoint), *flags) as process:
        yield process


@pytest.fixture(scope="module")
def document(small: ServerProcess) -> Any:
    return schemathesis.openapi.from_url(f"{small.url}/openapi.json")


@pytest.mark.parametrize(("method", "path", "mode"), CASES, ids=[" ".join(case) for case in CASES])
def test_every_answer_is_as_documented(document: Any, method: str, path: str, mode: str) -> None:
    operation = document[path][method]
    small = POSTS.get(path) if mode == "positive" else None

    @settings(
        max_examples=EXAMPLES if small is None else MORE_EXAMPLES, deadline=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None,
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)), data=st.data())
    def check(case: Any, data: st.DataObject) -> None:
        if small is not None and case.body:
            # All at once would nearly always be refused for one of them: a few together with what is certainly right.
            chosen = data.draw(st.lists(st.sampled_from(sorted(case.body)), max_size=3))
            case.body = small | {name: case.body[name] for name in chosen if name != "model"}
        statuses.add(case.call_and_validate(checks=CHECKS, timeout=PATIENCE).status_code)

    statuses: set[int] = set()
    check()
    assert small is None or 200 in statuses


@pytest.mark.parametrize("path", [endpoint.path for endpoint in ENDPOINTS if endpoint.chunk is not None])
def test_every_stream_is_as_documented(document: Any, path: str) -> None:
    case = document[path]["post"].Case(body=POSTS[path] | {"stream": True}, media_type="application/json")
    assert case.call_and_validate(checks=CHECKS, timeout=PATIENCE).headers["content-type"][0].startswith("text/event")


def test_the_server_is_as_before_after_all_that(small: ServerProcess) -> None:
    small.wait_until_idle()
    body = {"prompt": "Hi", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    assert httpx.post(f"{small.url}/v1/completions", json=body).json()["usage"]["completion_tokens"] == 4
