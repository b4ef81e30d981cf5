"""No field that is accepted is without effect: a walk through the request models, with a proof for each field."""

from __future__ import annotations

import contextlib
import json
import typing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import NoneType
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from support.answers import close
from support.field_probes import BASES, COMPLETIONS, COUNT, ELSEWHERE, LIMIT, NESTED, PROBES, RESPONSES
from support.serving import PATIENCE, ServerProcess

from pyllm.server.api.rules import REFUSED, RULES
from pyllm.server.app import ENDPOINTS
from pyllm.server.http.shapes import Shape

AT_ONCE = 16


def places(shape: Shape, place: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    """Every member of a shape: its place in the body, the model that has it, and its name there."""
    for model in shape.models:
        for name, field in model.model_fields.items():
            at = f"{place}.{field.alias or name}".lstrip(".")
            yield at, model, name
            inner = Shape((model,)).member(field.alias or name) or Shape()
            yield from places(inner, at)
            items = inner.items
            while items is not None:
                at = f"{at}[]"
                yield from places(items, at)
                items = items.items


def asks_for_nothing(field: FieldInfo) -> bool:
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


ALL = [(e.path, *place) for e in ENDPOINTS for place in places(Shape((e.body,)))]
"""(endpoint, place, model, member) of everything that a request may contain."""


def without_effect(path: str, place: str) -> bool:
    """Whether the table has the place, or one that it is part of."""
    parts = place.split(".")
    known = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return any(RULES[path].table.get(name, REFUSED).kind != "refused" for name in known)


def field_cases() -> list[tuple[str, str]]:
    """(path, field) of every member of a body."""
    return [(path, place) for path, place, model, member in ALL
            if "." not in place and not asks_for_nothing(model.model_fields[member])]  # fmt: skip


def nested_cases() -> list[str]:
    return sorted({f"{model.__name__}.{member}" for path, place, model, member in ALL
                   if "." in place and not without_effect(path, place)
                   and not asks_for_nothing(model.model_fields[member])})  # fmt: skip


def idle_cases() -> list[tuple[str, str]]:
    return [(path, place) for path, place, model, member in ALL
            if "." not in place and asks_for_nothing(model.model_fields[member])]  # fmt: skip


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


Pair = tuple[str, dict[str, Any], dict[str, Any]]
"""A path, and two bodies whose answers must differ."""


def pairs_of(path: str = "", field: str = "", member: str = "") -> list[Pair]:
    """What proves the effect of a field or member; nothing where it is proved elsewhere, or the table has the field."""
    if member in ELSEWHERE or field in ELSEWHERE or f"{path} {field}" in ELSEWHERE:
        return []
    if member:
        assert member in NESTED, f"{member} has no proof of an effect and is not in the table of those without"
        path, *bodies = NESTED[member]
        pairs = zip(bodies[::2], bodies[1::2], strict=True)
        return [(path, BASES[path] | one, BASES[path] | other) for one, other in pairs]
    if without_effect(path, field) and not (path == RESPONSES and field == "metadata"):
        return []
    if path == COUNT and field == "output_config":
        return []  # it does not change the prompt
    probe = PROBES.get(f"{path} {field}") or PROBES.get(field)
    assert probe is not None, f"{field} of {path} has no proof of an effect and is not in the table of those without"
    common, change = probe
    known = next(e.body for e in ENDPOINTS if e.path == path).model_fields
    common = {name: value for name, value in common.items() if name in known or name == "logprobs"}
    if "max_tokens" in common and path in LIMIT:
        common = common | {LIMIT[path]: common["max_tokens"]}
    return [(path, BASES[path] | common, BASES[path] | common | change)]


Answers = dict[tuple[str, str], list[httpx.Response]]
"""What came for each path and body: as many answers as requests."""


@pytest.fixture(scope="module")
def answers(server: ServerProcess, request: pytest.FixtureRequest) -> Answers:
    """The answers to all that the selected tests ask, which the engine computes together in few steps."""
    asked: Counter[tuple[str, str]] = Counter()
    for item in request.session.items:
        if item.path == request.path and isinstance(item, pytest.Function) and "answers" in item.fixturenames:
            with contextlib.suppress(AssertionError):  # the test itself fails of it
                for path, one, other in pairs_of(**item.callspec.params):
                    asked |= Counter((path, json.dumps(body)) for body in (one, other, one))
    found: Answers = {each: [] for each in asked}
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as http, ThreadPoolExecutor(AT_ONCE) as pool:

        def send(each: tuple[str, str]) -> None:
            found[each].append(http.post(each[0], content=each[1], headers={"content-type": "application/json"}))

        list(pool.map(send, (each for each in asked.elements() if '"stream": true' not in each[1])))
        for each in asked.elements():  # one by one, since a slow reader gets several tokens at a time
            if '"stream": true' in each[1]:
                send(each)
    return found


def check(answers: Answers, pairs: list[Pair]) -> None:
    """The answers to the two bodies of each pair differ, and those to the same body do not."""
    for path, one, other in pairs:
        first, again = answers[path, json.dumps(one)][:2]
        second = answers[path, json.dumps(other)][0]
        assert 200 in (first.status_code, second.status_code), [first.text, second.text]
        assert close(said(first), said(again)), "the probe itself must be repeatable"
        assert not close(said(first), said(second))


@pytest.mark.parametrize(("path", "field"), field_cases())
def test_a_field_changes_the_answer_or_is_in_the_table(answers: Answers, path: str, field: str) -> None:
    check(answers, pairs_of(path, field))


@pytest.mark.parametrize("member", nested_cases())
def test_a_member_changes_the_answer_or_is_in_the_table(answers: Answers, member: str) -> None:
    check(answers, pairs_of(member=member))


@pytest.mark.parametrize(("path", "field"), idle_cases())
def test_a_field_that_can_only_ask_for_nothing_refuses_all_else(http: httpx.Client, path: str, field: str) -> None:
    for value in ({"a": 1}, "x", 7, [1]):
        answer = http.post(path, json=BASES[path] | {field: value})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith(field)


def test_every_proof_is_of_a_field_that_exists() -> None:
    known = {name for path, place, model, member in ALL for name in (place, f"{path} {place}")}
    known |= {f"{model.__name__}.{member}" for _, _, model, member in ALL}
    assert not {name for name in (*PROBES, *NESTED, *ELSEWHERE) if name not in known}


def test_a_salt_keeps_a_prompt_to_itself(http: httpx.Client, server: ServerProcess) -> None:
    server.wait_until_idle()
    body = BASES[COMPLETIONS] | {"prompt": "A prompt that is long enough to fill some blocks of the cache."}
    cached = [
        http.post(COMPLETIONS, json=body | {"cache_salt": salt}).json()["usage"]["prompt_tokens_details"]
        for salt in ("left", "left", "right")
    ]
    assert [entry["cached_tokens"] > 0 for entry in cached] == [False, True, False]
