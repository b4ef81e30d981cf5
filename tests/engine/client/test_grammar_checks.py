"""The client's side of grammar checks: what it remembers, bounds and raises."""

from __future__ import annotations

import asyncio

import pytest

from pyllm.engine.client import grammar_checks
from pyllm.engine.client.grammar_checks import GrammarChecks
from pyllm.engine.errors import EngineBusyError, EngineDeadError, RequestError
from pyllm.engine.messages import CheckGrammar, GrammarVerdict

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Engine:
    """Answers checks, as long as `holds` is not set; a grammar's text may be the outcome."""

    def __init__(self) -> None:
        self.checks = GrammarChecks(self.send)
        self.sent: list[CheckGrammar] = []
        self.holds = False

    def send(self, check: CheckGrammar) -> None:
        self.sent.append(check)
        if not self.holds:
            asyncio.get_running_loop().call_soon(self.answer, check)

    def answer(self, check: CheckGrammar) -> None:
        outcome = check.grammar if check.grammar in ("refused", "busy", "failed") else "accepted"
        self.checks.resolve(GrammarVerdict(key=check.key, outcome=outcome, reason=f"It is {outcome}."))

    async def ask(self, *grammars: str) -> None:
        for grammar in grammars:
            await self.checks.check(grammar, "field")


async def test_verdicts_are_kept_within_bounds_the_last_ones_longest(monkeypatch):
    monkeypatch.setattr(grammar_checks, "MAX_VERDICTS", 3)
    engine = Engine()
    await engine.ask("one", "two", "three", "four", "four")
    assert len(engine.sent) == 4
    await engine.ask("four", "three", "one")
    assert len(engine.sent) == 5, "the first is forgotten"


async def test_too_many_new_grammars_are_refused_for_now(monkeypatch):
    monkeypatch.setattr(grammar_checks, "MAX_PENDING", 3)
    engine = Engine()
    engine.holds = True
    asked = [asyncio.create_task(engine.ask(f"busy{n}")) for n in range(5)]
    asked.append(asyncio.create_task(engine.ask("busy0")))
    await asyncio.sleep(0.01)
    for check in engine.sent:
        engine.answer(check)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert [isinstance(answer, EngineBusyError) for answer in answers] == [False] * 3 + [True] * 2 + [False]
    assert len(engine.sent) == 3


@pytest.mark.parametrize(
    ("outcome", "error", "checks"),
    [("refused", RequestError, 1), ("busy", EngineBusyError, 2), ("failed", RuntimeError, 2)],
)
async def test_each_outcome_has_its_error_and_only_verdicts_are_kept(outcome, error, checks):
    engine = Engine()
    for _ in range(2):
        with pytest.raises(error, match=f"It is {outcome}"):
            await engine.ask(outcome)
    assert len(engine.sent) == checks


async def test_a_refusal_names_the_field():
    with pytest.raises(RequestError) as refusal:
        await Engine().ask("refused")
    assert refusal.value.param == "field"


async def test_a_client_that_is_gone_takes_the_verdict_from_no_other():
    engine = Engine()
    engine.holds = True
    first, second = (asyncio.create_task(engine.ask("same")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    engine.answer(engine.sent[0])
    await second
    assert first.cancelled()


async def test_a_dead_engine_fails_the_checks_that_wait():
    engine = Engine()
    engine.holds = True
    waiting, gone = (asyncio.create_task(engine.ask(name)) for name in ("waiting", "gone"))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0)
    engine.checks.die("The engine process has ended.")
    with pytest.raises(EngineDeadError):
        await waiting
