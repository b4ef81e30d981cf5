"""Which replica holds the beginning of a request: the marks of a request's text, and the table of their owners.

A mark is the hash of a beginning of the text, made without a tokenizer. A request has marks at the ends of its messages
and at growing distances from its start, so two requests share the marks of their common beginning.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Final, Generic, TypeVar

import msgspec

Replica = TypeVar("Replica")

MAX_HASHED_BYTES = 2**18  # of a request's text: what follows cannot change its owner
DISTANCES = tuple(512 << n for n in range(9))  # bytes from the start
MAX_ENDS = 16  # messages whose ends are marks: the last ones
MAX_MARKS = 50_000  # in the table; the least recently used go first
SLACK = 4  # more requests than another replica has, up to which a replica is not clearly busier
CROWD = 64  # more marks than the average, up to which a replica does not hold clearly more than its share
PREFIX: Final = "pyllm-route:"
USER = re.compile(rb'"role"\s*:\s*"user"')


class Route(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the router knows of a request.

    Attributes:
        marks: hashes of growing beginnings; the last one is of the whole request.
        sizes: how many bytes each mark covers.
        root: the mark at the end of the first user's message, which all requests of a conversation share.
        pinned: whether only the owner of the last mark can answer, as with a response that it keeps.
        avoid: replicas that have just failed to take the request.
    """

    marks: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    root: str = ""
    pinned: bool = False
    avoid: tuple[str, ...] = ()

    def encode(self) -> str:
        """Write as the value of a header."""
        return PREFIX + msgspec.json.encode(self).decode()


class _Body(msgspec.Struct):
    prompt_cache_key: Any = None
    previous_response_id: Any = None
    messages: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    system: msgspec.Raw = msgspec.Raw(b"")
    instructions: msgspec.Raw = msgspec.Raw(b"")
    tools: msgspec.Raw = msgspec.Raw(b"")


_BODY = msgspec.json.Decoder(_Body)
_PARTS = msgspec.json.Decoder(list[msgspec.Raw])
_ROUTE = msgspec.json.Decoder(Route)


def decode_route(text: str) -> Route:
    """Read what `Route.encode` wrote; any other text is the name of a session."""
    if text.startswith(PREFIX):
        try:
            return _ROUTE.decode(text.removeprefix(PREFIX))
        except msgspec.DecodeError:
            return Route()
    return route_of_session(text)


def route_of_session(name: str) -> Route:
    """Return the route of all requests of a session, or of a conversation that has a name."""
    if not name:
        return Route()
    mark = blake2b(name.encode(errors="replace"), digest_size=8, person=b"session").hexdigest()
    return Route((mark,), (1,), mark)


def route_of_body(body: bytes, session: str = "", answers: Mapping[str, Route] | None = None) -> Route:
    """Return the route of a request.

    Args:
        body: what the client sent.
        session: its session, if a header names one.
        answers: the routes of earlier responses, by their id.
    """
    try:
        fields = _BODY.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return route_of_session(session)
    previous = fields.previous_response_id
    if isinstance(previous, str) and answers and (earlier := answers.get(previous)):
        return msgspec.structs.replace(earlier, pinned=True)
    if name := fields.prompt_cache_key if isinstance(fields.prompt_cache_key, str) else session:
        return route_of_session(name)
    parts = [bytes(fields.tools), bytes(fields.system), bytes(fields.instructions)]
    for field in map(bytes, (fields.messages, fields.input, fields.prompt)):
        try:
            parts += map(bytes, _PARTS.decode(field)) if field.startswith(b"[") else [field]
        except (msgspec.DecodeError, RecursionError):
            parts.append(field)
    return _marks([part for part in parts if part])


def _marks(parts: list[bytes]) -> Route:
    text = b"".join(parts)[:MAX_HASHED_BYTES]
    ends: list[int] = []
    root = 0
    for part in parts:
        ends.append(min((ends[-1] if ends else 0) + len(part), len(text)))
        if not root and USER.search(part[:4096]):
            root = ends[-1]
    root = root or len(text)
    hashed, marks, done = blake2b(digest_size=8), dict[int, str](), 0
    for end in sorted({*ends[-MAX_ENDS:], root, *(distance for distance in DISTANCES if distance < len(text))}):
        hashed.update(text[done:end])
        marks[end], done = hashed.copy().hexdigest(), end
    return Route(tuple(marks.values()), tuple(marks), marks[root]) if text else Route()


class Owners(Generic[Replica]):
    """The table of what each replica has computed, and the choice of a replica for a request."""

    def __init__(self, max_marks: int = MAX_MARKS) -> None:
        self._max_marks = max_marks
        self._table: OrderedDict[str, dict[Replica, bool]] = OrderedDict()  # True: the mark is of a whole request
        self._held: Counter[Replica] = Counter()  # marks

    def __len__(self) -> int:
        return len(self._table)

    def order(self, route: Route, loads: Mapping[Replica, int]) -> list[Replica]:
        """Return the replicas, the best one for a request first; `loads` counts the requests that each has now.

        The owner of its prefix comes first unless it is clearly busier than another one. For a new conversation, two
        replicas are drawn by its root's hash, which each proxy draws alike, and the less busy one comes first.
        """
        drawn = sorted(loads, key=lambda replica: self._draw(route.root, replica))
        best = self._owner(route, loads) or self._less_busy(drawn[:2], loads)
        return [best, *sorted((replica for replica in drawn if replica != best), key=loads.__getitem__)]

    @staticmethod
    def _draw(root: str, replica: Replica) -> bytes:
        return blake2b(f"{root} {replica}".encode(), digest_size=8).digest()

    def _owner(self, route: Route, loads: Mapping[Replica, int]) -> Replica | None:
        for mark, size in zip(reversed(route.marks), reversed(route.sizes), strict=True):
            owners = {replica: whole for replica, whole in self._table.get(mark, {}).items() if replica in loads}
            if not owners:
                continue
            best = min(owners, key=lambda replica: (not owners[replica], loads[replica]))
            if route.pinned:
                return best
            least = min(loads.values())
            if loads[best] > max(least + SLACK, 2 * least):
                return None
            is_conversation = owners[best]  # which has grown since; else another request only begins alike
            is_worth_it = 2 * size >= route.sizes[-1] and not self._is_crowded(best, loads)
            return best if is_conversation or is_worth_it else None
        return None

    def _less_busy(self, drawn: list[Replica], loads: Mapping[Replica, int]) -> Replica:
        return min(drawn, key=lambda replica: (loads[replica], self._is_crowded(replica, loads)))

    def _is_crowded(self, replica: Replica, loads: Mapping[Replica, int]) -> bool:
        """Whether it holds clearly more than its share: its cache would evict what others have space for."""
        mean = sum(self._held[other] for other in loads) / len(loads)
        return self._held[replica] > max(1.25 * mean, mean + CROWD)

    def record(self, route: Route, replica: Replica) -> None:
        """Note that `replica` computes this request."""
        for mark in route.marks:
            owners = self._table.setdefault(mark, {})
            self._held[replica] += replica not in owners
            owners[replica] = owners.get(replica, False) or mark == route.marks[-1]
            self._table.move_to_end(mark)
        while len(self._table) > self._max_marks:
            for owner in self._table.popitem(last=False)[1]:
                self._held[owner] -= 1

    def drop(self, replica: Replica) -> None:
        """Forget a replica that has ended."""
        if self._held.pop(replica, 0):
            for mark in [mark for mark, owners in self._table.items() if owners.pop(replica, None) is not None]:
                if not self._table[mark]:
                    del self._table[mark]
