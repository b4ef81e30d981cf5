"""Fields that no wire model has: which are dropped, silently or with a notice, and which are refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from .errors import ApiError, shorten
from .shapes import ANYTHING, Shape

Kind = Literal["bookkeeping", "hint", "refused"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens to a field, or to some items of a list, that the server cannot act on."""

    kind: Kind
    nothing: tuple[Any, ...] = ()  # values without effect: accepted silently, as null is
    items: tuple[str, ...] = ()  # patterns for the list's strings, or its objects' types, to which the rule applies
    needs_others: bool = False  # the rule applies only to lists that have other items too
    variables: Callable[[Any], dict[str, Any]] | None = None  # the template variables that a hint sets
    advice: str = ""  # ends the message of a refusal

    def asks_for_nothing(self, value: Any) -> bool:
        """Whether a value means the same as leaving the field out; true and 1 are different values."""
        return any(value == nothing and type(value) is type(nothing) for nothing in self.nothing)

    def matches(self, item: Any) -> bool:
        """Whether the rule applies to this item of a list."""
        name = item.get("type") if isinstance(item, dict) else item
        return isinstance(name, str) and any(fnmatchcase(name, pattern) for pattern in self.items)


class Rules:
    """The rules of an endpoint by place, such as `tools[].function.strict`: `[]` is every item of a list."""

    def __init__(self, table: Mapping[str, Rule]) -> None:
        self.table = table
        self.hints = [(place, place.split("."), rule) for place, rule in table.items()
                      if rule.kind == "hint" and "[" not in place]  # fmt: skip
        self.parents = {place[: end.start()] for place in table for end in re.finditer(r"\.|\[", place)}


@dataclass(slots=True)
class Tolerance:
    """Drops from one body the fields that the rules allow it to drop."""

    rules: Rules
    ignore_unknown: bool = False  # unknown fields are dropped too
    variables: frozenset[str] = frozenset()  # those that the chat template reads
    settings: dict[str, Any] = field(default_factory=dict)  # the template variables that hints set
    numbers: dict[str, list[int]] = field(
        default_factory=dict
    )  # the original numbers of the items left in a list, by its path
    ignored: dict[str, None] = field(default_factory=dict)  # the places of dropped hints, in order

    def relax_body(self, fields: dict[str, Any], shape: Shape) -> dict[str, Any]:
        """Return a body without fields that have no effect; raise `ApiError` 400 for a field that is refused."""
        kept: dict[str, Any] = self._relax(fields, shape, "", "")
        if self.settings:
            kept["chat_template_kwargs"] = self.settings | (kept.get("chat_template_kwargs") or {})
        return kept

    def renumber(self, error: ApiError) -> ApiError:
        """Return an error about the remaining body, with items numbered as in the whole body."""
        for path, numbers in self.numbers.items():
            item = re.compile(rf"\b{re.escape(path)}\[(\d{{1,9}})\]")

            def restored(found: re.Match[str], path: str = path, numbers: list[int] = numbers) -> str:
                number = int(found[1])
                return f"{path}[{numbers[number] if number < len(numbers) else number}]"

            error.message = item.sub(restored, error.message)
            error.param = error.param and item.sub(restored, error.param)
        return error

    def acts(self, rule: Rule, value: Any) -> dict[str, Any]:
        """Return the template variables that a hint sets."""
        wanted = rule.variables(value) if rule.variables is not None else {}
        return {name: setting for name, setting in wanted.items() if name in self.variables}

    def _relax(self, value: Any, shape: Shape | None, path: str, place: str) -> Any:
        """Return a value that is at `path`, or at `place` with `[]` for the numbers of items.

        Without a shape, only the rules apply to its members.
        """
        if isinstance(value, list):
            return self._relax_list(value, shape and (shape.items or ANYTHING), path, f"{place}[]")
        if not isinstance(value, dict) or not ((shape and shape.models) or place in self.rules.parents):
            return value
        shape, kept = shape and shape.narrow(value), dict[str, Any]()
        is_free = shape is not None and not shape.models
        for name, member in value.items():
            inner, at = (f"{path}.{name}", f"{place}.{name}") if path else (name, name)
            rule, known = self.rules.table.get(at), shape.member(name) if shape else None
            is_nothing = member is None or (not path and member in ([], {}) and rule is None and known is None)
            if rule is not None and (settings := self.acts(rule, member)):
                self.settings |= settings
            elif (is_nothing and not is_free) or (rule is not None and rule.asks_for_nothing(member)):
                continue
            elif known is not None:
                if rule is not None and rule.kind == "bookkeeping" and isinstance(member, dict):
                    member = {key: item for key, item in member.items() if item is not None}
                kept[name] = self._relax(member, known, inner, at)
            elif at in self.rules.parents and not (rest := self._relax(member, None, inner, at)):
                continue
            elif rule is not None:
                self._apply(rule, inner, at)
            elif is_free or not self.ignore_unknown:
                if at in self.rules.parents and isinstance(rest, dict):
                    raise unknown_field(f"{inner}.{next(iter(rest))}")
                kept[name] = member
            else:
                self.ignored[at] = None
        return kept

    def _relax_list(self, items: list[Any], shape: Shape | None, path: str, place: str) -> list[Any]:
        rule = self.rules.table.get(place)
        if rule is None and not ((shape and (shape.models or shape.items)) or place in self.rules.parents):
            return items
        drops = [rule is not None and rule.matches(item) for item in items]
        if all(drops) and rule is not None and rule.needs_others:
            return items  # the model refuses them by name
        for item, drop in zip(items, drops, strict=True):
            if drop and rule is not None:
                name = item["type"] if isinstance(item, dict) else item
                self._apply(rule, path, f"{place.removesuffix('[]')}.{name}")
        left = [number for number, drop in enumerate(drops) if not drop]
        if len(left) < len(items):
            self.numbers[path] = left
        return [self._relax(items[number], shape, f"{path}[{number}]", place) for number in left]

    def _apply(self, rule: Rule, path: str, place: str) -> None:
        if rule.kind == "refused":
            message = f"{shorten(path)} is not supported by this server.{rule.advice and ' ' + rule.advice}"
            raise ApiError(400, message, param=shorten(path), code="unsupported_parameter")
        if rule.kind == "hint":
            self.ignored[place] = None


def unknown_field(path: str) -> ApiError:
    """Make the error for a field that no model and no rule knows."""
    path = shorten(path)
    return ApiError(400, f"Unrecognized request argument: {path}.", param=path, code="unknown_parameter")
