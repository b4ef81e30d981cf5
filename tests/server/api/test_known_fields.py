"""Every request field of OpenAI's and Anthropic's own packages, of vLLM and of SGLang acts or is in the table."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_count_tokens_params as beta_count_tokens_params
from anthropic.types.beta import message_create_params as beta_create_params
from openai.types import completion_create_params as completion_params
from openai.types import embedding_create_params as embedding_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params
from typing_extensions import is_typeddict

from pyllm.server.api.rules import RULES
from pyllm.server.app import ENDPOINTS
from pyllm.server.http.shapes import Shape

PARAMETERS: dict[str, list[Any]] = {
    "/v1/chat/completions": [
        chat_params.CompletionCreateParamsNonStreaming, chat_params.CompletionCreateParamsStreaming,
    ],
    "/v1/completions": [
        completion_params.CompletionCreateParamsNonStreaming, completion_params.CompletionCreateParamsStreaming,
    ],
    "/v1/responses": [
        response_params.ResponseCreateParamsNonStreaming, response_params.ResponseCreateParamsStreaming,
    ],
    "/v1/embeddings": [embedding_params.EmbeddingCreateParams],
    "/v1/messages": [
        message_create_params.MessageCreateParamsNonStreaming, message_create_params.MessageCreateParamsStreaming,
        beta_create_params.MessageCreateParamsNonStreaming, beta_create_params.MessageCreateParamsStreaming,
    ],
    "/v1/messages/count_tokens": [
        message_count_tokens_params.MessageCountTokensParams, beta_count_tokens_params.MessageCountTokensParams,
    ],
}  # fmt: skip
OTHERS = json.loads((Path(__file__).parents[2] / "support" / "request_fields.json").read_text(encoding="utf-8"))
WRAPPERS = (typing.Annotated, typing.Required, typing.NotRequired)


def wire_shape(path: str) -> Shape:
    return Shape((next(endpoint.body for endpoint in ENDPOINTS if endpoint.path == path),))


def literals(annotation: Any) -> set[Any]:
    if typing.get_origin(annotation) is typing.Literal:
        return set(typing.get_args(annotation))
    return {value for part in typing.get_args(annotation) for value in literals(part)}


def is_accepted(kind: Any, shape: Shape) -> bool:
    """Whether one of the models takes objects with the type and role of this TypedDict."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for model in shape.models:
        names = [name for name in ("type", "role") if name in hints and name in model.model_fields]
        if all(literals(hints[name]) & literals(model.model_fields[name].annotation) for name in names):
            return True
    return False


def missing(path: str, annotation: Any, shape: Shape | None, place: str) -> Iterator[str]:
    """The places of a parameter's type that neither the table nor the wire model has."""
    table, (origin, arguments) = RULES[path].table, (typing.get_origin(annotation), typing.get_args(annotation))
    if is_typeddict(annotation):
        if shape is None or not is_accepted(annotation, shape):
            return  # free JSON, or an object of another type: refused by its type, or a tool that is in the table
        kinds = {name: literals(hint) for name, hint in typing.get_type_hints(annotation).items()}
        tag = shape.tag and next(iter(kinds.get(shape.tag, ())), None)
        shape = shape.narrow({shape.tag: tag}) if shape.tag else shape
        for name, hint in typing.get_type_hints(annotation, include_extras=True).items():
            at = f"{place}.{name}".lstrip(".")
            if at in table:
                continue
            known = shape.member(name)
            if known is None and at not in RULES[path].parents:
                yield at
            yield from missing(path, hint, known, at)
    elif origin in WRAPPERS:
        yield from missing(path, arguments[0], shape, place)
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from missing(path, argument, shape, place)
    elif origin not in (typing.Literal, dict, None) and arguments:  # some kind of list
        if f"{place}[]" in table and (shape is None or shape.items is None):
            return
        yield from missing(path, arguments[0], shape and shape.items, f"{place}[]")


@pytest.mark.parametrize("path", PARAMETERS)
def test_every_parameter_of_the_packages_is_known(path: str) -> None:
    found = {place for kind in PARAMETERS[path] for place in missing(path, kind, wire_shape(path), "")}
    assert not found


@pytest.mark.parametrize("server", OTHERS)
@pytest.mark.parametrize("path", RULES)
def test_every_field_of_another_server_is_known(server: str, path: str) -> None:
    unknown = []
    for place in OTHERS[server]["fields"][path]:
        shape: Shape | None = wire_shape(path)
        for name in place.split("."):
            shape = shape.member(name.removesuffix("[]")) if shape else None
            shape = shape.items if shape and name.endswith("[]") else shape
        if shape is None and place not in RULES[path].table and place not in RULES[path].parents:
            unknown.append(place)
    assert not unknown
