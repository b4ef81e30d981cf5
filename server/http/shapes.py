"""What JSON a wire model takes, member by member, for code that follows a body along its model."""

from __future__ import annotations

import types
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


@dataclass(frozen=True, slots=True)
class Shape:
    """What a value may be: an object of one of the models, or a list of `items`; neither for all other JSON."""

    models: tuple[type[BaseModel], ...] = ()
    tag: str | None = None  # the member that tells which of the models an object is
    items: Shape | None = None

    def narrow(self, value: dict[str, Any]) -> Shape:
        """Return the shape of the model that the object says it is; all models if it does not say."""
        if self.tag is None or len(self.models) < 2:
            return self
        chosen = tuple(model for model in self.models if value.get(self.tag) in _tags(model, self.tag))
        return Shape(chosen or self.models, self.tag)

    def member(self, name: str) -> Shape | None:
        """Return the shape of a member; None if no model has it."""
        found = [members[name] for model in self.models if name in (members := _members(model))]
        return _merge(found) if found else None


ANYTHING = Shape()
"""The shape of free JSON, such as a schema."""


def _merge(shapes: list[Shape]) -> Shape:
    models = tuple(dict.fromkeys(model for shape in shapes for model in shape.models))
    lists = [shape.items for shape in shapes if shape.items is not None]
    tag = next((shape.tag for shape in shapes if shape.tag is not None), None)
    return Shape(models, tag, _merge(lists) if lists else None)


@cache
def _members(model: type[BaseModel]) -> dict[str, Shape]:
    return {field.alias or name: _shape(field.annotation, field) for name, field in model.model_fields.items()}


@cache
def _tags(model: type[BaseModel], tag: str) -> frozenset[Any]:
    return frozenset(_literals(model.model_fields[tag].annotation))


def _literals(annotation: Any) -> tuple[Any, ...]:
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return arguments
    return tuple(value for argument in arguments for value in _literals(argument))


def _shape(annotation: Any, *metadata: Any) -> Shape:
    tag = next((own.discriminator for own in metadata if isinstance(own, FieldInfo) and own.discriminator), None)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return Shape((annotation,))
    if origin is Annotated:
        found = _shape(arguments[0], *arguments[1:])
    elif origin in (Union, types.UnionType):
        found = _merge([_shape(argument) for argument in arguments])
    elif origin is list:
        found = Shape(items=_shape(arguments[0]))
    else:
        return ANYTHING
    return Shape(found.models, tag, found.items) if isinstance(tag, str) else found
