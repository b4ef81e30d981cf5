"""Which replica a request goes to: by what they hold and by how busy they are."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

from pyllm.server.replicas.affinity import Owners, Route, decode_route, route_of_body, route_of_session

IDLE = {"a": 0, "b": 0, "c": 0, "d": 0}


def route(**fields: Any) -> Route:
    return route_of_body(json.dumps(fields).encode())


def chat(*contents: str, **fields: Any) -> Route:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    return route(messages=messages, **fields)


def test_turns_of_a_conversation_share_their_marks() -> None:
    first, second = chat("Hi"), chat("Hi", "Hello", "How are you?")
    assert first.marks[-1] in second.marks
    assert first.root == second.root
    assert not set(first.marks) & set(chat("Ho", "Hello", "How are you?").marks)


def test_long_prompts_share_the_marks_of_their_common_beginning() -> None:
    book = "It was the best of times. " * 200
    shared = set(route(prompt=book + "Who?").marks) & set(route(prompt=book + "When?").marks)
    assert len(shared) == 4  # at 512, 1024, 2048 and 4096 bytes
    assert len(set(route(prompt=list(range(3000))).marks) & set(route(prompt=list(range(3010))).marks)) >= 4


def test_tools_and_system_texts_are_part_of_the_beginning() -> None:
    assert not set(chat("Hi", tools=[{"a": 1}]).marks) & set(chat("Hi", tools=[{"a": 2}]).marks)
    assert not set(chat("Hi", system="a").marks) & set(chat("Hi", system="b").marks)


def test_names_of_sessions_win_over_texts() -> None:
    assert chat("Hi", prompt_cache_key="x") == chat("Ho", prompt_cache_key="x") == route_of_session("x")
    assert route_of_body(b'{"messages": []}', "x") == route_of_body(b"not JSON", "x") == route_of_session("x")
    earlier = chat("Hi")
    answers = {"resp_1": earlier}
    pinned = route_of_body(b'{"previous_response_id": "resp_1", "prompt_cache_key": "x"}', "", answers)
    assert (pinned.marks, pinned.pinned) == (earlier.marks, True)


def test_bodies_without_a_text_have_no_marks() -> None:
    for body in (b"", b"[]", b"null", b"{}", b'{"messages": 5', b"[" * 5000, b'{"messages": ' + b"[" * 5000):
        assert route_of_body(body) == Route()


def test_a_route_survives_its_way_through_a_header() -> None:
    for wanted in (chat("Hi", "Hello", "ü" * 3000), Route(), Route(avoid=("a",)), route_of_session("x")):
        text = wanted.encode()
        assert text.isascii()
        assert text.isprintable()
        assert decode_route(text) == wanted
    assert decode_route("someone's session") == route_of_session("someone's session")
    assert decode_route("") == decode_route("pyllm-route:{") == Route()


def test_a_route_stays_short_however_long_the_body_is() -> None:
    assert len(chat(*map(str, range(3000))).encode()) < 2000
    assert len(route(prompt="x" * 2**23).encode()) < 2000


def test_a_conversation_stays_with_its_replica() -> None:
    owners: Owners[str] = Owners()
    first = chat("Hi")
    (owner, *_) = owners.order(first, IDLE)
    owners.record(first, owner)
    later = chat("Hi", "Hello", "How are you?")
    for busy in (0, 2, 4):
        assert owners.order(later, IDLE | {owner: busy})[0] == owner
    assert owners.order(later, IDLE | {owner: 5})[0] != owner  # clearly busier
    assert owners.order(later, dict.fromkeys(IDLE, 10) | {owner: 20})[0] == owner
    assert owners.order(later, dict.fromkeys(IDLE, 10) | {owner: 21})[0] != owner


def test_the_owner_of_a_kept_response_answers_however_busy_it_is() -> None:
    owners: Owners[str] = Owners()
    owners.record(chat("Hi"), "c")
    pinned = route_of_body(b'{"previous_response_id": "resp_1"}', "", {"resp_1": chat("Hi")})
    assert owners.order(pinned, IDLE | {"c": 1000})[0] == "c"


def test_new_conversations_spread_and_avoid_the_busier_one() -> None:
    owners: Owners[str] = Owners()
    counts = Counter(owners.order(chat(f"Question {n}"), IDLE)[0] for n in range(400))
    assert set(counts) == set(IDLE)
    assert max(counts.values()) < 160
    for n in range(50):
        best, *_ = owners.order(chat(f"Question {n}"), IDLE)
        assert owners.order(chat(f"Question {n}"), IDLE | {best: 1})[0] != best


def test_new_conversations_are_placed_alike_by_every_proxy() -> None:
    one, other = Owners[str](), Owners[str]()
    for n in range(50):
        assert one.order(chat(f"Question {n}"), IDLE) == other.order(chat(f"Question {n}"), IDLE)


def test_a_shared_beginning_does_not_crowd_all_into_one_replica() -> None:
    owners: Owners[str] = Owners()
    rules = {"role": "system", "content": "Answer kindly and in one sentence. " * 200}
    counts: Counter[str] = Counter()
    for n in range(400):
        asked = route(messages=[rules, {"role": "user", "content": f"Question {n}"}])
        (owner, *_) = owners.order(asked, IDLE)
        owners.record(asked, owner)
        counts[owner] += 1
    assert set(counts) == set(IDLE)
    assert max(counts.values()) < 200


def test_the_table_is_bounded_and_forgets_ended_replicas() -> None:
    owners: Owners[str] = Owners(max_marks=100)
    draw = random.Random(1)
    for n in range(1000):
        owners.record(chat(f"Question {n}"), draw.choice("abcd"))
        assert len(owners) <= 100
    assert sum(owners._held.values()) == sum(map(len, owners._table.values()))
    for replica in "abc":
        owners.drop(replica)
    assert {owner for found in owners._table.values() for owner in found} == {"d"}
    owners.drop("d")
    assert len(owners) == 0
    assert owners.order(chat("Question 999"), {"x": 0, "y": 0})[0] != "d"
