"""The OpenAPI document and the checks behind it: every field refuses what its schema refuses, and is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from pyllm.server.app import ENDPOINTS

USER = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/messages": {"model": "org/tiny", "messages": USER, "max_tokens": 3},
    "/v1/messages/count_tokens": {"model": "org/tiny", "messages": USER},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [5]},
}
LONGEST = 5000
"""Longest text or list that is worth sending: of larger bounds one test is enough."""


def branches(schema: dict[str, Any], definitions: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The alternatives of a field's schema."""
    schema = definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if "anyOf" in schema or "oneOf" in schema:
        for part in schema.get("anyOf", schema.get("oneOf")):
            yield from branches(part, definitions)
    else:
        yield schema


def beyond(branch: dict[str, Any]) -> Iterator[Any]:
    """Values of the right type, just outside of what an alternative allows."""
    step = 1 if branch.get("type") == "integer" else 0.25
    for name, value in branch.items():
        match name:
            case "minimum":
                yield value - step if abs(value) < 2**53 else int(value) - 1
            case "maximum":
                yield value + step if abs(value) < 2**53 else int(value) + 1
            case "exclusiveMinimum" | "exclusiveMaximum":
                yield value
            case "minLength" if value > 0:
                yield ""
            case "maxLength" if value <= LONGEST:
                yield "x" * (value + 1)
            case "minItems" if value > 0:
                yield []
            case "maxItems" if 0 < value <= LONGEST:
                yield [None] * (value + 1)
            case "maxProperties":
                yield {str(n): "1" for n in range(value + 1)}
            case "enum" | "const" | "pattern":
                yield "no such value"


def wrong_values() -> Iterator[tuple[str, str, Any]]:
    """(path, field, value) of every member of every body: one of a type that none takes, and those out of range."""
    for endpoint in ENDPOINTS:
        schema = endpoint.body.model_json_schema()
        definitions = schema.get("$defs", {})
        for name, field in schema["properties"].items():
            yield endpoint.path, name, [{"no": 1}]
            found = [branch for branch in branches(field, definitions) if branch.get("type") != "null"]
            # Most are refused without a look at the items of a list that is too long.
            whole = [{key: value for key, value in branch.items() if key != "items"} for branch in found]
            checks = [
                Draft202012Validator({"anyOf": [*kinds, {"type": "null"}], "$defs": definitions})
                for kinds in (whole, found)
            ]
            for value in (value for branch in found for value in beyond(branch)):
                if not all(accepts.is_valid(value) for accepts in checks):
                    yield endpoint.path, name, value


CASES = list(wrong_values())


@pytest.fixture(scope="module")
def shared(make_harness: Any) -> Any:
    """One application for all of these requests; none reaches the engine."""
    return make_harness()


@pytest.mark.parametrize(("path", "field", "value"), CASES, ids=[f"{p} {f} {str(v)[:20]}" for p, f, v in CASES])
def test_a_wrong_value_is_a_400_that_names_its_field(shared: Any, path: str, field: str, value: Any) -> None:
    answer = shared.post(path, BODIES[path] | {field: value})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith(field)
    assert field in error["message"]


def test_every_field_was_tried() -> None:
    assert {(path, field) for path, field, _ in CASES} == {(e.path, f) for e in ENDPOINTS for f in e.body.model_fields}
    assert len([value for *_, value in CASES if value != [{"no": 1}]]) > 100


def test_every_count_and_free_text_has_a_cap() -> None:
    """A number, text or list without an upper end invites attacks that fill the memory."""
    free = set()
    for endpoint in ENDPOINTS:
        schema = endpoint.body.model_json_schema()
        definitions = schema.get("$defs", {})
        for owner, members in [(endpoint.body.__name__, schema), *definitions.items()]:
            for name, field in members.get("properties", {}).items():
                for branch in branches(field, definitions):
                    capped = {
                        "string": {"maxLength", "enum", "const", "pattern"},
                        "integer": {"maximum", "exclusiveMaximum"},
                        "number": {"maximum", "exclusiveMaximum"},
                        "array": {"maxItems"},
                    }.get(branch.get("type", ""), set())
                    if capped and not capped & branch.keys():
                        free.add(f"{owner}.{name}")
    assert not free


def test_the_document_describes_every_route(shared: Any) -> None:
    page = shared.get("/openapi.json").json()
    for endpoint in ENDPOINTS:
        operation = page["paths"][endpoint.path]["post"]
        reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert reference.rpartition("/")[2] == endpoint.body.__name__
        assert {"200", "4XX", "5XX"} <= operation["responses"].keys()
        assert operation["description"]
    for name, schema in page["components"]["schemas"].items():
        Draft202012Validator.check_schema(schema)
        assert "description" in schema or "title" in schema, name
