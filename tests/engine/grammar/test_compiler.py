"""The compiler's cache and queue, without an engine around it."""

from __future__ import annotations

import pytest

from pyllm.engine.errors import RequestError
from pyllm.engine.grammar.compiler import GrammarCompiler, grammar_bytes
from pyllm.engine.grammar.state import GrammarState, MaskMaker
from pyllm.model.tokenizer import Tokenizer

DIGITS = "start: /[0-9]{3,8}/"


@pytest.fixture
def compiler(tiny_checkpoint) -> GrammarCompiler[str]:
    return GrammarCompiler(lambda: Tokenizer.from_folder(tiny_checkpoint), 272, [0], 4 * grammar_bytes(DIGITS))


def drain(compiler: GrammarCompiler[str]) -> dict[str, GrammarState | Exception]:
    compiler.wait()
    return dict(compiler.drain())


def test_the_cache_is_bounded_in_bytes(compiler):
    for i in range(9):
        ticket, grammar = str(i), f"start: /[a-z]{{{i + 1}}}/"
        compiler.submit(ticket, grammar)
        assert ticket in compiler
        assert isinstance(drain(compiler)[ticket], GrammarState)
        assert ticket not in compiler
        assert compiler.cached_bytes <= 4 * grammar_bytes(DIGITS)
    compiler.submit("again", grammar)
    assert compiler.has_ready, "the last one is known"
    assert isinstance(drain(compiler)["again"], GrammarState)


def test_a_refusal_is_cached_and_a_busy_machine_is_not(compiler, monkeypatch):
    checked = []

    def check(self, grammar):
        checked.append(grammar)
        if grammar == DIGITS and len(checked) == 1:
            raise TimeoutError("busy")
        return "" if grammar == DIGITS else "it is wrong"

    monkeypatch.setattr("pyllm.engine.grammar.checker.GrammarChecker.check", check)
    for ticket, grammar, kind in (
        ("busy", DIGITS, TimeoutError), ("fine", DIGITS, GrammarState), ("wrong", "x", RequestError),
        ("still wrong", "x", RequestError),
    ):  # fmt: skip
        compiler.submit(ticket, grammar)
        assert type(drain(compiler)[ticket]) is kind
    assert checked == [DIGITS, DIGITS, "x"]


def test_no_thread_must_start_for_a_grammar(compiler, monkeypatch):
    def fail(*args):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", fail)
    compiler.submit("a", DIGITS)
    state = drain(compiler)["a"]
    assert isinstance(state, GrammarState)
    masks = MaskMaker()
    (mask,) = masks.finish(masks.start([state]))
    assert {*mask.tolist()} == {0, float("-inf")}
    monkeypatch.undo()
    (again,) = masks.finish(masks.start([state]))
    assert again.equal(mask)


def test_a_discarded_ticket_is_not_drained(compiler):
    for ticket in ("a", "b"):
        compiler.submit(ticket, DIGITS)
    compiler.discard("a")
    assert "a" not in compiler
    assert list(drain(compiler)) == ["b"]
    compiler.submit("c", DIGITS)
    compiler.discard("c")
    assert "c" not in compiler
    assert compiler.drain() == []
