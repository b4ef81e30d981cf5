"""The process that checks grammars: what ends it, and what it may use."""

from __future__ import annotations

import gc
import re
import threading
from pathlib import Path

import pytest
from support.grammars import byte_checker

from pyllm.engine.grammar.checker import MEMORY_BYTES

DIGITS = "start: /[0-9]{3,8}/"
TOO_COMPLEX = '{"grammars": [{"json_schema": {"type": "integer", "multipleOf": 215656441}}]}'


def test_the_checker_survives_what_kills_its_process(monkeypatch):
    monkeypatch.setattr("pyllm.engine.grammar.checker.WAIT_SECONDS", 60.0)  # only the processor's time counts
    checker = byte_checker()
    assert checker.check(DIGITS) == ""
    assert "too complex" in checker.check(TOO_COMPLEX)
    assert checker.check(DIGITS) == ""
    threading.Timer(0.5, checker._process.kill).start()  # not the grammar's error: it is tried once more
    assert "too complex" in checker.check(TOO_COMPLEX)
    checker.close()
    assert checker.check(DIGITS) == ""
    checker._process.kill()
    checker._process.wait()
    assert checker.check(DIGITS) == "", "it had ended before it was asked"
    del checker
    gc.collect()


def test_a_busy_machine_is_not_the_grammar_s_error(monkeypatch):
    checker = byte_checker()
    assert checker.check(DIGITS) == ""
    monkeypatch.setattr("pyllm.engine.grammar.checker.WAIT_SECONDS", 0.2)
    with pytest.raises(TimeoutError):
        checker.check(TOO_COMPLEX)
    monkeypatch.undo()
    assert checker.check(DIGITS) == ""
    checker.close()


def test_a_checker_that_does_not_start_says_so(monkeypatch):
    for program, words in (("false", "did not start"), ("/nowhere", "No process can be started")):
        monkeypatch.setattr("pyllm.engine.grammar.checker.python", lambda program=program: [program])
        with pytest.raises(TimeoutError, match=words):
            byte_checker().check(DIGITS)


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="limits are read from Linux's /proc")
def test_the_process_that_checks_grammars_has_little_memory():
    checker = byte_checker()
    assert checker.check(DIGITS) == ""
    limits = Path(f"/proc/{checker._process.pid}/limits").read_text()
    checker.close()
    assert re.search(rf"Max address space +{MEMORY_BYTES} +{MEMORY_BYTES} ", limits)
