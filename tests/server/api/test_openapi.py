"""The OpenAPI document: every route has its group, every field says what it means."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from pyllm.server.api.descriptions import DESCRIPTIONS
from pyllm.server.api.openapi import EXAMPLES, GROUPS
from pyllm.server.app import create_app
from pyllm.server.flags import ServerConfig
from pyllm.server.service import Service


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(Service(ServerConfig())).openapi()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield f"{method} {path}", operation


def bodies(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for route, operation in operations(document):
        for media in operation.get("requestBody", {}).get("content", {}).values():
            yield route, media


def test_every_field_and_argument_says_what_it_means(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"] | {name: media["schema"] for name, media in bodies(document)}
    fields = {
        f"{m}.{name}": field for m, schema in schemas.items() for name, field in schema.get("properties", {}).items()
    }
    for route, operation in operations(document):
        fields |= {f"{route} {parameter['name']}": parameter for parameter in operation.get("parameters", ())}
    assert len(fields) > 600
    assert not [name for name, field in fields.items() if not field.get("description")]


def test_what_a_field_means_is_written_in_one_place(document: dict[str, Any]) -> None:
    shown = {parameter["description"] for _, o in operations(document) for parameter in o.get("parameters", ())}
    for schema in [*document["components"]["schemas"].values(), *(media["schema"] for _, media in bodies(document))]:
        shown |= {field["description"] for field in schema.get("properties", {}).values()}
    assert not [name for name, text in DESCRIPTIONS.items() if text not in shown]
    specific = [name.partition(".")[::2] for name in DESCRIPTIONS if "." in name and name[0] not in "/?"]
    for model, name in specific:
        assert (
            document["components"]["schemas"][model]["properties"][name]["description"]
            == DESCRIPTIONS[f"{model}.{name}"]
        )


def test_routes_are_grouped_in_the_order_of_the_groups(document: dict[str, Any]) -> None:
    names = [group.name for group in GROUPS]
    assert [tag["name"] for tag in document["tags"]] == names
    assert all(tag["description"] for tag in document["tags"])
    places = [[names.index(tag) for tag in operation["tags"]] for _, operation in operations(document)]
    assert places == sorted(places)
    assert {place for (place,) in places} == set(range(len(names)))
    ids = [operation["operationId"] for _, operation in operations(document)]
    assert len(set(ids)) == len(ids)
    assert all(operation["description"] for _, operation in operations(document))


def test_every_body_has_examples_that_its_schema_allows(document: dict[str, Any]) -> None:
    found = {route.removeprefix("post ") for route, _ in bodies(document)}
    assert found == set(EXAMPLES)
    for route, media in bodies(document):
        schema = media["schema"] | {"components": document["components"]}
        for name, example in media["examples"].items():
            problems = list(Draft202012Validator(schema).iter_errors(example["value"]))
            assert not problems, f"{route}, {name}: {problems}"


def test_the_document_says_that_batches_are_off() -> None:
    def shown(**flags: str) -> str:
        tags = create_app(Service(ServerConfig(**flags))).openapi()["tags"]
        return next(tag["description"] for tag in tags if tag["name"] == "Files and batches")

    assert "--batch-dir" in shown()
    assert "--batch-dir" not in shown(batch_dir="somewhere")
