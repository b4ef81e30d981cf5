"""Compiles grammars in a few threads, off the step loop, and keeps the most recently used ones.

A grammar is llguidance's: its variant of Lark, or its JSON form with schemas and regular expressions. Each is tested in
a separate process first (see `checker`), so that no grammar can block the engine.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import llguidance
import numpy as np

from ...model.tokenizer import Tokenizer
from ..errors import RequestError
from ..host import start_pool
from .checker import GrammarChecker, Vocabulary, compile_grammar, error_of
from .object_keys import KeyTokens, KeyTracker, tracker_for
from .state import GrammarState

COMPILERS = 2
CACHE_BYTES = 256 << 20
Ticket = TypeVar("Ticket")
Compiled = tuple[llguidance.LLMatcher, KeyTracker | None] | Exception


def grammar_bytes(text: str) -> int:
    """Estimate the memory of a compiled grammar: large ones took 25 to 120 bytes per byte of text."""
    return 65536 + 128 * len(text)


class GrammarCompiler(Generic[Ticket]):
    """Compiles the grammars of tickets (requests and checks). For use from one thread."""

    def __init__(
        self,
        load: Callable[[], Tokenizer] | None = None,  # reads the tokenizer, for the first grammar; None refuses all
        vocab_size: int = 0,  # width of the logits
        eos_token_ids: Sequence[int] = (),  # the model's; a model without one gets an end id that is never drawn
        cache_bytes: int = CACHE_BYTES,  # maximum memory of cached grammars, as estimated by `grammar_bytes`
    ) -> None:
        self._wakeup = threading.Event()
        self.on_ready = self._wakeup.set  # called from another thread when `drain` may have something
        self.cached_bytes = 0  # estimated memory of the cached grammars
        self._load = load
        self._ends = list(eos_token_ids) or [vocab_size]
        self._num_tokens = max(vocab_size, max(self._ends) + 1)
        self._mask_bytes = -(-self._num_tokens // 32) * 4
        end_bits = np.zeros(8 * self._mask_bytes, np.uint8)
        end_bits[list(eos_token_ids)] = 1
        self._end_bits = np.packbits(end_bits, bitorder="little") if eos_token_ids else None
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._key_tokens = KeyTokens([])
        self._checkers: queue.SimpleQueue[GrammarChecker] = queue.SimpleQueue()
        self._pool = start_pool(COMPILERS, "grammar")
        self._lock = threading.Lock()
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[str, Compiled] = OrderedDict()
        self._waiting: dict[str, list[tuple[Ticket, bool]]] = {}  # with each ticket's `ignore_eos`, as in `_ready`
        self._done: deque[tuple[str, Compiled]] = deque()
        self._ready: list[tuple[Ticket, bool, Compiled]] = []

    def __contains__(self, ticket: Ticket) -> bool:
        """Whether `ticket` was submitted and neither drained nor discarded."""
        return any(entry[0] is ticket for entry in itertools.chain(self._ready, *self._waiting.values()))

    @property
    def has_ready(self) -> bool:
        """Whether `drain` returns anything."""
        return bool(self._ready or self._done)

    def submit(self, ticket: Ticket, grammar: str, *, ignore_eos: bool = False) -> None:
        """Begin to compile a grammar, unless it is cached or already begun.

        With `ignore_eos`, the state avoids the model's end ids as long as the grammar allows another token.
        """
        if self._load is None:
            raise RequestError("This engine has no tokenizer, so it cannot follow a grammar.", param="grammar")
        if grammar in self._cache:
            self._cache.move_to_end(grammar)
            self._ready.append((ticket, ignore_eos, self._cache[grammar]))
        elif grammar in self._waiting:
            self._waiting[grammar].append((ticket, ignore_eos))
        else:
            self._waiting[grammar] = [(ticket, ignore_eos)]
            self._pool.submit(self._compile, grammar, self._load)

    def discard(self, ticket: Ticket) -> None:
        """Forget a ticket that was submitted and not drained."""
        for grammar, entries in self._waiting.items():
            self._waiting[grammar] = [entry for entry in entries if entry[0] is not ticket]
        self._ready = [entry for entry in self._ready if entry[0] is not ticket]

    def drain(self) -> list[tuple[Ticket, GrammarState | Exception]]:
        """Return the tickets whose grammars are compiled.

        A `RequestError` says why a grammar is refused, a `TimeoutError` that the machine is too busy; any other
        exception is an internal error.
        """
        while self._done:
            grammar, result = self._done.popleft()
            if not isinstance(result, Exception) or isinstance(result, RequestError):
                self._cache[grammar] = result
                self.cached_bytes += grammar_bytes(grammar)
            self._ready += [(*entry, result) for entry in self._waiting.pop(grammar)]
        while self.cached_bytes > self._cache_bytes:
            self.cached_bytes -= grammar_bytes(self._cache.popitem(last=False)[0])
        ready, self._ready = self._ready, []
        return [(ticket, self._new_state(result, ignore_eos)) for ticket, ignore_eos, result in ready]

    def wait(self) -> None:
        """Block until there is something to `drain`, unless `on_ready` was replaced."""
        while not self.has_ready:
            self._wakeup.wait()
            self._wakeup.clear()

    def _new_state(self, result: Compiled, ignore_eos: bool) -> GrammarState | Exception:
        if isinstance(result, Exception):
            return result
        try:
            matcher, keys = result
            avoided = self._end_bits if ignore_eos else None
            return GrammarState(matcher.deep_copy(), avoided, self._mask_bytes, keys=keys.copy() if keys else None)
        except Exception as error:
            return error

    def _compile(self, grammar: str, load: Callable[[], Tokenizer]) -> None:
        """Compile a grammar, in a thread of the pool."""
        result: Compiled
        try:
            tokenizer = self._prepare(load)
            checker = self._checkers.get()
            try:
                reason = checker.check(grammar)
            finally:
                self._checkers.put(checker)
            if not reason:
                matcher = compile_grammar(tokenizer, grammar)
                reason = error_of(matcher)
                result = matcher, tracker_for(grammar, self._key_tokens)
        except UnicodeEncodeError:
            reason = "it has half a character (a lone surrogate)"
        except Exception as error:
            result, reason = error, ""
        if reason:
            result = RequestError(f"The requested format cannot be enforced: {reason}.")
        self._done.append((grammar, result))
        self.on_ready()

    def _prepare(self, load: Callable[[], Tokenizer]) -> llguidance.LLTokenizer:
        """Load the vocabulary and make the checkers, once."""
        with self._lock:
            if self._tokenizer is None:
                tokenizer = load()
                special = [id_ for id_ in tokenizer.special_ids if id_ < self._num_tokens]
                tokens = [tokenizer.token_bytes(id_) for id_ in range(self._num_tokens)]
                vocabulary = Vocabulary(tokens, special, self._ends)
                self._key_tokens = KeyTokens(tokens)
                self._tokenizer = vocabulary.tokenizer(tokenizer.encode)
                for _ in range(COMPILERS):
                    self._checkers.put(GrammarChecker(vocabulary))
            return self._tokenizer
