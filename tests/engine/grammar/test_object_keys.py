"""Which tokens would repeat a key of a JSON object."""

from __future__ import annotations

import time

import numpy as np
import pytest

from pyllm.engine.grammar.object_keys import CALL_OPENING, UNIQUE_KEYS, KeyTokens, KeyTracker, tracker_for

BYTES = [bytes((byte,)) for byte in range(256)]
MORE = [b'a"', b'b":', b'","a":', b'{"a":1,"a":', b'":{"', b'": "', b'ab"']
TOKENS = KeyTokens(BYTES + MORE)


def forbidden(text: str, opening: str = "") -> set[bytes]:
    """The tokens that may not follow a text."""
    tracker = KeyTracker(TOKENS, opening.encode())
    for byte in text.encode():
        tracker.consume(byte)
    bits = np.full(-(-len(TOKENS.tokens) // 8), 255, np.uint8)
    tracker.forbid(bits)
    allowed = np.unpackbits(bits, bitorder="little")
    return {token for id_, token in enumerate(TOKENS.tokens) if not allowed[id_]} - {b'{"a":1,"a":', b'","a":'}


@pytest.mark.parametrize(("text", "tokens"), [
    ("", set()),
    ('{"a', set()),
    ('{"a":1,"', {b'a"'}),
    ('{"a":1,"a', {b'"', b'":{"', b'": "'}),
    ('{"a":1,"b', set()),
    ('{"a":1,"b":{"', set()),  # an object of its own
    ('{"a":1,"b":{"a":2},"', {b'a"', b'b":'}),
    ('{"a":1,"b":[{"a":2},{"', set()),
    ('{"a":1,"b":["', set()),  # an item is no key
    ('{"a":"x\\","', set()),  # an escaped quote
    ('{"a":"x\\\\","', {b'a"'}),
    ('{"a{[":1,"b":"}],"', set()),
    ('{"ab":1,"', {b'ab"'}),
    ('{"ab":1,"a', {b'b":'}),
    ('{"é":1,"é', {b'"', b'":{"', b'": "'}),
])  # fmt: skip
def test_tokens_that_repeat_a_key_are_ruled_out(text: str, tokens: set[bytes]) -> None:
    assert forbidden(text) == tokens


def test_a_token_that_repeats_a_key_by_itself_is_ruled_out() -> None:
    tracker = KeyTracker(TOKENS)
    bits = np.full(40, 255, np.uint8)
    tracker.forbid(bits)
    for text, token in (("", b'{"a":1,"a":'), ('{"a":"x', b'","a":')):
        for byte in text.encode():
            tracker.consume(byte)
        tracker.forbid(bits)
        id_ = TOKENS.tokens.index(token)
        assert not bits[id_ >> 3] >> (id_ & 7) & 1


def test_an_object_with_many_keys_takes_no_longer() -> None:
    """Copying all keys for each long token, or looking for each key, took seconds for one token of a large object."""
    long = [b'","%d":"' % number for number in range(300)]
    tokens = KeyTokens(BYTES + MORE + long)
    tracker = KeyTracker(tokens)
    for byte in b"{" + b",".join(b'"%d":1' % number for number in range(20_000)) + b',"':
        tracker.consume(byte)
    bits = np.full(-(-len(tokens.tokens) // 8), 255, np.uint8)
    started = time.process_time()
    for _ in range(100):
        tracker.forbid(bits.copy())
    assert time.process_time() - started < 5


def test_text_between_calls_is_free() -> None:
    opening = "<call>"
    assert forbidden(f'So {{"a {opening}{{"a":1,"', opening) == {b'a"'}
    assert forbidden(f'{opening}{{"a":1}}</call> {{"a":1,"', opening) == set()
    assert forbidden('{"a":1,"', opening) == {b'a"'}, "an answer in JSON"


def test_a_grammar_asks_for_it() -> None:
    assert tracker_for('{"grammars": [{"lark_grammar": "start: /a/"}]}', TOKENS) is None
    assert tracker_for(f'{{"grammars": [{{"lark_grammar": "{UNIQUE_KEYS}"}}]}}', TOKENS) is not None
    calls = f'{{"grammars": [{{"lark_grammar": "{CALL_OPENING}\\"<x>\\"\\n{UNIQUE_KEYS}"}}]}}'
    tracker = tracker_for(calls, TOKENS)
    assert tracker is not None
    for byte in b'x<x>{"a":1,"a':
        tracker.consume(byte)
    bits = np.full(40, 255, np.uint8)
    tracker.forbid(bits)
    assert not bits[ord('"') >> 3] >> (ord('"') & 7) & 1
