"""Grammars without a model: a vocabulary of bytes, and what may be written."""

from __future__ import annotations

import asyncio
import threading

from pyllm.engine.errors import RequestError
from pyllm.engine.grammar.checker import GrammarChecker, Vocabulary, compile_grammar

BYTES = Vocabulary([bytes([byte]) for byte in range(256)] + [b"</s>"], [256], [256])


def accepts(grammar: str, text: str) -> bool:
    """Whether the grammar lets exactly this text be written."""
    matcher = compile_grammar(BYTES.tokenizer(), grammar)
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


async def check_grammar(grammar: str, param: str | None = None) -> None:
    """Replace `AsyncEngine.check_grammar`, without an engine."""

    def check() -> str:
        with _lock:
            return _checker.check(grammar)

    if reason := await asyncio.to_thread(check):
        raise RequestError(f"The requested format cannot be enforced: {reason}.", param=param)


def byte_checker() -> GrammarChecker:
    """A checker with one token per byte."""
    return GrammarChecker(BYTES)


_checker, _lock = byte_checker(), threading.Lock()
