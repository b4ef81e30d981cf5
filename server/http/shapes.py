"""The JSON that a wire model accepts, member by member, for code that follows a body along its model."""

from __future__ import annotations

import types
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


@dataclass(frozen=True, eq=False)
class Shape:
    """What a value may be: an object of one of the models, or a list of `items`; neither for all other JSON."""

    models: tuple[type[BaseModel], ...] = ()
    tag: str | None = None  # the member whose value decides which of the models describes an object
    items: Shape | None = None

    def narrow(self, value: dict[str, Any]) -> Shape:
        """Return the shape of the model that the object's tag names; of all models if it has no known tag."""
        kind = value.get(self.tag) if self.tag is not None else None
        return self._kinds.get(kind, self) if isinstance(kind, str) else self

    def member(self, name: str) -> Shape | None:
        """Return the shape of a member; None if no model has it."""
        return self._all_members.get(name)

    @cached_property
    def _kinds(self) -> dict[str, Shape]:
        kinds: dict[str, list[type[BaseModel]]] = {}
        for model in self.models:
            for kind in _literals(model.model_fields[self.tag].annotation) if self.tag else ():
                kinds.setdefault(kind, []).append(model)
        return {kind: Shape(tuple(models), self.tag) for kind, models in kinds.items()}

    @cached_property
    def _all_members(self) -> dict[str, Shape]:
        found: dict[str, list[Shape]] = {}
        for model in self.models:
            for name, shape in _members(model).items():
                found.setdefault(name, []).append(shape)
        return {name: shapes[0] if len(shapes) == 1 else _merge(shapes) for name, shapes in found.items()}


ANYTHING = Shape()
"""The shape of free JSON, such as a schema."""


@cache
def shape_of(model: type[BaseModel]) -> Shape:
    """Return the shape of a model's objects."""
    return Shape((model,))


def _merge(shapes: list[Shape]) -> Shape:
    models = tuple(dict.fromkeys(model for shape in shapes for model in shape.models))
    lists = [shape.items for shape in shapes if shape.items is not None]
    tag = next((shape.tag for shape in shapes if shape.tag is not None), None)
    return Shape(models, tag, _merge(lists) if lists else None)


@cache
def _members(model: type[BaseModel]) -> dict[str, Shape]:
    return {field.alias or name: _shape(field.annotation, field) for name, field in model.model_fields.items()}


def _literals(annotation: Any) -> tuple[Any, ...]:
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return arguments
    return tuple(value for argument in arguments for value in _literals(argument))


def _shape(annotation: Any, *metadata: Any) -> Shape:
    tag = next((own.discriminator for own in metadata if isinstance(own, FieldInfo) and own.discriminator), None)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return shape_of(annotation)
    if origin is Annotated:
        found = _shape(arguments[0], *arguments[1:])
    elif origin in (Union, types.UnionType):
        found = _merge([_shape(argument) for argument in arguments])
    elif origin is list:
        found = Shape(items=_shape(arguments[0]))
    else:
        return ANYTHING
    return Shape(found.models, tag, found.items) if isinstance(tag, str) else found
