"""`pyllm generate` and `pyllm chat` with a scripted engine: how long answers may be, and talks that grow too long."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from pyllm.server.cli import terminal
from pyllm.server.flags import GenerateConfig, TerminalConfig

PROCESS: Any = None  # the engine is scripted


@pytest.fixture
def engine(harness, monkeypatch):
    async def load(config, process):
        return harness.model

    monkeypatch.setattr(terminal, "load", load)
    return harness.engine


def talk(monkeypatch, *lines, **flags):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    return terminal.chat(TerminalConfig(**flags), PROCESS)


def prompts(engine):
    return [engine.tokenizer.decode(ids) for _, ids, _ in engine.requests]


def test_answer_may_use_the_rest_of_the_context(engine, monkeypatch, capsys):
    assert terminal.generate(GenerateConfig(prompt="Hi"), PROCESS) == 0
    engine.error = None
    assert terminal.generate(GenerateConfig(prompt="Hi", chat=True, max_tokens=3), PROCESS) == 0
    engine.error = None
    talk(monkeypatch, "Hi")
    assert [params.max_tokens for _, _, params in engine.requests] == [None, 3, None]
    assert capsys.readouterr().out == "Hello, wörld!\nHel\nHello, wörld!\n"


@pytest.mark.parametrize("flags", [{}, {"max_tokens": 40}])
def test_long_chat_drops_its_oldest_turns_with_one_note(engine, monkeypatch, capsys, flags):
    questions = [f"Question {n}" + "?" * 30 for n in range(8)]
    assert talk(monkeypatch, *questions, **flags) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hello, wörld!\n" * 8
    assert captured.err.count("dropping its oldest") == 1
    assert "Question 0" in prompts(engine)[1]
    assert prompts(engine)[-1].startswith("User: Question 6")
    assert prompts(engine)[-1].endswith(questions[7] + "\n\nAssistant:")


def test_question_that_cannot_fit_is_refused_and_chat_continues(engine, monkeypatch, capsys):
    assert talk(monkeypatch, "one", "x" * 300, "three") == 0
    assert "context is 200 tokens" in capsys.readouterr().err
    assert prompts(engine)[1].startswith("User: one\n\nAssistant: Hello, wörld!\n\nUser: three")
