"""Asks the engine whether it can follow a grammar, before a request with that grammar begins."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable

from ..errors import EngineBusyError, EngineDeadError, RequestError
from ..messages import CheckGrammar, GrammarVerdict

MAX_PENDING = 32
MAX_VERDICTS = 8192  # about 4 MiB: each takes some 500 bytes at most


class GrammarChecks:
    """Sends grammars to the engine and remembers its latest verdicts; `send` sends a message."""

    def __init__(self, send: Callable[[CheckGrammar], None]) -> None:
        self._send = send
        self._pending: dict[bytes, asyncio.Future[GrammarVerdict]] = {}
        self._verdicts: OrderedDict[bytes, GrammarVerdict] = OrderedDict()

    async def check(self, grammar: str, param: str | None) -> None:
        """Return if the engine can follow the grammar; see `AsyncEngine.check_grammar`."""
        key = hashlib.blake2b(grammar.encode(), digest_size=16).digest()
        verdict = self._verdicts.get(key)
        if verdict is None:
            if key not in self._pending:
                if len(self._pending) >= MAX_PENDING:
                    raise EngineBusyError("Too many new grammars are being compiled. Retry later.", retry_after=2)
                self._pending[key] = asyncio.get_running_loop().create_future()
                self._send(CheckGrammar(key=key, grammar=grammar))
            verdict = await asyncio.shield(self._pending[key])  # a cancelled request leaves it to the others
        else:
            self._verdicts.move_to_end(key)
        if verdict.outcome == "refused":
            raise RequestError(verdict.reason, param=param)
        if verdict.outcome == "busy":
            raise EngineBusyError(f"{verdict.reason} Retry later.", retry_after=5)
        if verdict.outcome == "failed":
            raise RuntimeError(verdict.reason)

    def resolve(self, verdict: GrammarVerdict) -> None:
        """Hand a verdict to the requests that wait for it."""
        self._pending.pop(verdict.key).set_result(verdict)
        if verdict.outcome in ("accepted", "refused"):
            self._verdicts[verdict.key] = verdict
            if len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)

    def die(self, reason: str) -> None:
        """Raise `EngineDeadError` in the requests that wait."""
        for future in self._pending.values():
            future.set_exception(EngineDeadError(reason))
            future.exception()  # retrieved here, because its request may have ended
        self._pending.clear()
