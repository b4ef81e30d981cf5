"""No field that is accepted is without effect: a walk through the request models, with a proof for each field."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from types import NoneType
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from support.field_probes import BASES, BOOKKEEPING, COMPLETIONS, COUNT, ELSEWHERE, LIMIT, NESTED, PROBES, RESPONSES
from support.serving import ServerProcess

from pyllm.server.app import ENDPOINTS


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models that a type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from models_in(part)


def reachable(bodies: list[type[BaseModel]]) -> dict[str, type[BaseModel]]:
    """The models that are parts of the bodies, by name."""
    found: dict[str, type[BaseModel]] = {}
    waiting = [
        model for body in bodies for field in body.model_fields.values() for model in models_in(field.annotation)
    ]
    while waiting:
        model = waiting.pop()
        if model.__name__ not in found:
            found[model.__name__] = model
            waiting += [part for field in model.model_fields.values() for part in models_in(field.annotation)]
    return found


def asks_for_nothing(model: type[BaseModel], name: str, field: FieldInfo) -> bool:
    """Whether a field takes only null, or a single value: then there is nothing to be without effect."""
    leaves: set[Any] = set()

    def walk(annotation: Any) -> None:
        arguments = typing.get_args(annotation)
        if typing.get_origin(annotation) is typing.Literal:
            leaves.update(arguments)
        elif arguments and typing.get_origin(annotation) is not None:
            for part in arguments:
                walk(part)
        elif annotation is not NoneType and annotation is not None:
            leaves.add(annotation)

    walk(field.annotation)
    values = {leaf for leaf in leaves if isinstance(leaf, (str, bool, int, type))}
    return len(values) <= 1 and not any(isinstance(leaf, type) for leaf in values)


def field_cases() -> list[tuple[str, str]]:
    """(path, field) of every member of a body."""
    return [(e.path, name) for e in ENDPOINTS for name, field in e.body.model_fields.items()
            if not asks_for_nothing(e.body, name, field)]  # fmt: skip


def nested_cases() -> list[str]:
    found = reachable([endpoint.body for endpoint in ENDPOINTS])
    return sorted(f"{name}.{member}" for name, model in found.items() for member, field in model.model_fields.items()
                  if not asks_for_nothing(model, member, field))  # fmt: skip


def idle_cases() -> list[tuple[str, str]]:
    return [(e.path, name) for e in ENDPOINTS for name, field in e.body.model_fields.items()
            if asks_for_nothing(e.body, name, field)]  # fmt: skip


VOLATILE = {"id", "item_id", "call_id", "created", "created_at", "completed_at", "prompt_tokens_details",
            "input_tokens_details", "cache_read_input_tokens", "request_id"}  # fmt: skip


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        if "cache_read_input_tokens" in value:  # Anthropic counts apart what was computed
            value = value | {"input_tokens": value["input_tokens"] + value["cache_read_input_tokens"]}
        return {name: without_ids(item) for name, item in value.items() if name not in VOLATILE}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


def said(answer: httpx.Response) -> Any:
    """An answer without what differs from one to the next. A refusal shows an effect too, but no failure does."""
    assert answer.status_code in (200, 400, 404), answer.text
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return without_ids(answer.json())
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: {")]
    return [without_ids(json.loads(line)) for line in lines]


def differ(http: httpx.Client, path: str, one: dict[str, Any], other: dict[str, Any], *more: dict[str, Any]) -> None:
    """The two answers differ; so do those of each further pair."""
    if more:
        differ(http, path, *more)
    answers = [http.post(path, json=BASES[path] | fields) for fields in (one, other)]
    assert any(answer.status_code == 200 for answer in answers), [answer.text for answer in answers]
    again = http.post(path, json=BASES[path] | one)
    assert said(answers[0]) == said(again), "the probe itself must be repeatable"
    assert said(answers[0]) != said(answers[1])


@pytest.mark.parametrize(("path", "field"), field_cases())
def test_a_field_changes_the_answer_or_is_bookkeeping(http: httpx.Client, path: str, field: str) -> None:
    if f"{path} {field}" in ELSEWHERE or field in ELSEWHERE:
        return
    probe = PROBES.get(f"{path} {field}") or PROBES.get(field)
    if field in BOOKKEEPING and not (path == RESPONSES and field == "metadata"):
        return
    if path == COUNT and field == "output_config":
        return  # it does not change the prompt
    assert probe is not None, f"{field} of {path} has no proof of an effect and is not listed as bookkeeping"
    common, change = probe
    known = next(e.body for e in ENDPOINTS if e.path == path).model_fields
    common = {name: value for name, value in common.items() if name in known or name == "logprobs"}
    if "max_tokens" in common and path in LIMIT:
        common = common | {LIMIT[path]: common["max_tokens"]}
    differ(http, path, common, common | change)


@pytest.mark.parametrize("member", nested_cases())
def test_a_member_changes_the_answer_or_is_bookkeeping(http: httpx.Client, member: str) -> None:
    if member in BOOKKEEPING or member in ELSEWHERE:
        return
    assert member in NESTED, f"{member} has no proof of an effect and is not listed as bookkeeping"
    differ(http, *NESTED[member])


@pytest.mark.parametrize(("path", "field"), idle_cases())
def test_a_field_that_can_only_ask_for_nothing_refuses_all_else(http: httpx.Client, path: str, field: str) -> None:
    for value in ({"a": 1}, "x", 7, [1]):
        answer = http.post(path, json=BASES[path] | {field: value})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith(field)


def test_every_proof_is_of_a_field_that_exists() -> None:
    fields = {name for endpoint in ENDPOINTS for name in endpoint.body.model_fields}
    places = {f"{endpoint.path} {name}" for endpoint in ENDPOINTS for name in endpoint.body.model_fields}
    members = {f"{name}.{field}" for name, model in reachable([e.body for e in ENDPOINTS]).items()
               for field in model.model_fields}  # fmt: skip
    known = fields | places | members
    assert not {name for name in (*PROBES, *NESTED, *BOOKKEEPING, *ELSEWHERE) if name not in known}


def test_a_salt_keeps_a_prompt_to_itself(http: httpx.Client, server: ServerProcess) -> None:
    server.wait_until_idle()
    body = BASES[COMPLETIONS] | {"prompt": "A prompt that is long enough to fill some blocks of the cache."}
    cached = [
        http.post(COMPLETIONS, json=body | {"cache_salt": salt}).json()["usage"]["prompt_tokens_details"]
        for salt in ("left", "left", "right")
    ]
    assert [entry["cached_tokens"] > 0 for entry in cached] == [False, True, False]
