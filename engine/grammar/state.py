"""Structured output: which tokens a request's grammar allows next.

A grammar is llguidance's: its variant of Lark, or its JSON form with schemas and regular expressions. It is compiled
off the step loop, and its request waits for that outside of the scheduler. Then the request has a matcher of its own,
which is told each token that is drawn and makes the mask of the next one while the network runs.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import llguidance
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...model.tokenizer import Tokenizer
from .checker import TOO_SLOW, GrammarChecker, Vocabulary, compile_grammar, fault_of

if TYPE_CHECKING:
    from ..step.request import Request

COMPILERS = 2
CACHE_BYTES = 256 << 20
MASK_SECONDS = 2.0
"""A mask that takes so long ends its request. The limits of the parser should end it long before."""
Bits = npt.NDArray[np.uint8]
MASK_TABLE = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf
).astype(np.float32)
"""FP32 [256, 8]: what each byte of a bit mask adds to the scores of its eight tokens."""


def grammar_bytes(text: str) -> int:
    """Estimated memory of a compiled grammar: large ones were measured at 25 to 120 bytes for each of their text's."""
    return 65536 + 128 * len(text)


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> Vocabulary:
    """The tokens as a grammar sees them, for logits of `vocab_size`.

    A model that has no end of its own is given an id past all others, which is never drawn.
    """
    ends = list(eos_token_ids) or [vocab_size]
    size = max(vocab_size, max(ends) + 1)
    special = [id_ for id_ in tokenizer.special_ids if id_ < size]
    return Vocabulary([tokenizer.token_bytes(id_) for id_ in range(size)], special, ends)


class GrammarState:
    """How far one sequence has come in its grammar.

    Args:
        matcher: becomes this object's own.
        avoided: bits of the tokens that are for where nothing else is left; None for none.
        mask_bytes: length of a bit mask.

    Attributes:
        error: why the grammar cannot be followed any further; "" while it can.
        finished: nothing can follow what has been written.
    """

    __slots__ = ("_avoided", "_matcher", "error", "finished", "mask_bytes")

    def __init__(self, matcher: llguidance.LLMatcher, avoided: Bits | None, mask_bytes: int) -> None:
        self._matcher = matcher
        self._avoided = avoided
        self.mask_bytes = mask_bytes
        self.error = ""
        self.finished = False

    def fill(self, bits: Bits) -> None:
        """Set the bits of the tokens that may come next, uint8 [mask_bytes]; all of them after an error."""
        if not self.error:
            self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
            if self._matcher.is_error():
                self.fail(fault_of(self._matcher))
        if self.error:
            bits[:] = 255
        elif self._avoided is not None and (rest := bits & ~self._avoided).any():
            bits[:] = rest

    def take(self, token_id: int) -> None:
        """Move on by a token that has been drawn."""
        if not self.error:
            if not self._matcher.consume_token(token_id):
                self.fail(fault_of(self._matcher))
            else:
                self.finished = self._matcher.is_stopped()

    def fail(self, reason: str) -> None:
        """Give up."""
        self.error = f"The grammar could not be followed: {reason}."


class MaskOrder:
    """The masks of one step, in the making.

    Attributes:
        states: of the sequences, in order.
        masks: FP32 [len(states), 8 * mask_bytes]; the first `done` rows are made.
        fault: what went wrong in the making, by a fault of ours.
        finished: set when all are, or none will be any more.
    """

    def __init__(self, states: Sequence[GrammarState], first: int = 0) -> None:
        """`first`: how many of the states to leave out."""
        self.states = states
        self.done = first
        self.masks = np.zeros((len(states), 8 * states[0].mask_bytes), np.float32)
        self.abandoned = False
        self.fault: Exception | None = None
        self.finished = threading.Event()

    def work(self) -> None:
        """Make them, as long as somebody wants them."""
        try:
            bits = np.empty(self.states[0].mask_bytes, np.uint8)
            while self.done < len(self.states) and not self.abandoned:
                self.states[self.done].fill(bits)
                if not self.abandoned:
                    np.take(MASK_TABLE, bits, axis=0, out=self.masks[self.done].reshape(-1, 8))
                    self.done += 1
        except Exception as error:
            self.fault = error
        self.finished.set()


class MaskMaker:
    """Makes masks in a thread of its own while the network runs; the library does without Python's lock meanwhile."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[MaskOrder] | None = None

    def start(self, states: Sequence[GrammarState]) -> MaskOrder:
        """Begin with the masks of `states`, which belong to the order until `finish`."""
        order = MaskOrder(states)
        self._give(order)
        return order

    def finish(self, order: MaskOrder) -> Tensor:
        """Wait for the masks: FP32 [len(states), vocab or more], 0 for what may come next and -inf for the rest.

        Raises what went wrong in the making.
        """
        done = order.done
        while not order.finished.wait(MASK_SECONDS):
            if order.done == done:
                # Native code cannot be stopped: its thread is left to itself, and a new one does the rest.
                order.abandoned, self._orders = True, None
                order.states[done].fail(TOO_SLOW)
                rest = MaskOrder(order.states, first=done + 1)
                rest.masks[:done] = order.masks[:done]
                order = rest
                self._give(order)
            done = order.done
        if order.fault is not None:
            raise order.fault
        return torch.from_numpy(order.masks)

    def _give(self, order: MaskOrder) -> None:
        if self._orders is None:
            self._orders = queue.SimpleQueue()
            threading.Thread(target=_serve_orders, args=(self._orders,), name="masks", daemon=True).start()
        self._orders.put(order)


def _serve_orders(orders: queue.SimpleQueue[MaskOrder]) -> None:
    order = None
    while order is None or not order.abandoned:
        order = orders.get()
        order.work()


class GrammarCompiler:
    """Compiles the grammars of requests in threads, and keeps the last ones. For use from one thread.

    Each is tried in a process of its own first (see `grammar_check`), so that none can hold this one up.

    Args:
        load: reads the vocabulary; called when the first grammar comes.
        vocab_size: width of the logits.
        eos_token_ids: the model's.
        cache_bytes: most memory of grammars that are kept (by `grammar_bytes`).

    Attributes:
        on_ready: called, from another thread, when there may be something to `take`.
        cached_bytes: estimated memory of the grammars that are kept.
    """

    def __init__(
        self,
        load: Callable[[], Tokenizer],
        vocab_size: int,
        eos_token_ids: Sequence[int],
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.on_ready: Callable[[], None] | None = None
        self._load = load
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._checkers: queue.SimpleQueue[GrammarChecker] = queue.SimpleQueue()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._cache_bytes = cache_bytes
        self._compiled: OrderedDict[str, llguidance.LLMatcher | str] = OrderedDict()
        self.cached_bytes = 0
        self._waiting: dict[str, list[Request]] = {}
        self._done: deque[tuple[str, llguidance.LLMatcher | str | Exception]] = deque()
        self._ready: list[tuple[Request, llguidance.LLMatcher | str | Exception]] = []
        self._news = threading.Event()

    def __len__(self) -> int:
        """Number of requests that were submitted and neither taken nor discarded."""
        return len(self._ready) + sum(map(len, self._waiting.values()))

    @property
    def has_ready(self) -> bool:
        """Whether `take` has something to do."""
        return bool(self._ready or self._done)

    def submit(self, request: Request) -> None:
        """Begin to compile the grammar of a request, unless it is known or begun already."""
        text = request.params.grammar
        assert text is not None
        if text in self._compiled:
            self._compiled.move_to_end(text)
            self._ready.append((request, self._compiled[text]))
        elif text in self._waiting:
            self._waiting[text].append(request)
        else:
            self._pool = self._pool or ThreadPoolExecutor(COMPILERS, thread_name_prefix="grammar")
            self._pool.submit(self._compile, text)
            self._waiting[text] = [request]  # after what may fail; what is done is looked at in this thread only

    def discard(self, request: Request) -> None:
        """Forget a request that was submitted and not taken."""
        for waiting in self._waiting.values():
            if request in waiting:
                waiting.remove(request)
        self._ready = [entry for entry in self._ready if entry[0] is not request]

    def take(self) -> list[tuple[Request, str | Exception]]:
        """The requests that need wait no longer, each with what is wrong with its grammar, "" for nothing.

        Those with nothing wrong have got their `grammar`. An exception is a fault of ours.
        """
        while self._done:
            text, result = self._done.popleft()
            if not isinstance(result, Exception):
                self._keep(text, result)
            self._ready += [(request, result) for request in self._waiting.pop(text)]
        ready, self._ready = self._ready, []
        return [(request, self._equip(request, result)) for request, result in ready]

    def wait(self) -> None:
        """Block until there is something to `take`."""
        while not self.has_ready:
            self._news.wait()
            self._news.clear()

    def _equip(self, request: Request, result: llguidance.LLMatcher | str | Exception) -> str | Exception:
        if isinstance(result, str | Exception):
            return result
        assert self._tokenizer is not None  # it has compiled the grammar
        mask_bytes = -(-self._tokenizer.vocab_size // 32) * 4
        avoided = None
        if request.params.ignore_eos and self._eos_token_ids:
            ends = np.zeros(8 * mask_bytes, np.uint8)
            ends[list(self._eos_token_ids)] = 1
            avoided = np.packbits(ends, bitorder="little")
        try:
            request.grammar = GrammarState(result.deep_copy(), avoided, mask_bytes)
        except Exception as error:
            return error
        return ""

    def _keep(self, text: str, result: llguidance.LLMatcher | str) -> None:
        self._compiled[text] = result
        self.cached_bytes += grammar_bytes(text)
        while self.cached_bytes > self._cache_bytes:
            self.cached_bytes -= grammar_bytes(self._compiled.popitem(last=False)[0])

    def _compile(self, text: str) -> None:
        result: llguidance.LLMatcher | str | Exception
        try:
            result = self._try(text)
        except UnicodeEncodeError:
            result = "it has half a character"
        except Exception as error:
            result = error
        self._done.append((text, result))
        self._news.set()
        if self.on_ready is not None:
            self.on_ready()

    def _try(self, text: str) -> llguidance.LLMatcher | str:
        with self._lock:
            if self._tokenizer is None:
                tokenizer = self._load()
                vocabulary = vocabulary_of(tokenizer, self._vocab_size, self._eos_token_ids)
                self._tokenizer = vocabulary.tokenizer(tokenizer.encode)
                for _ in range(COMPILERS):
                    self._checkers.put(GrammarChecker(vocabulary))
        checker = self._checkers.get()
        try:
            fault = checker.check(text)
        finally:
            self._checkers.put(checker)
        if fault:
            return fault
        matcher = compile_grammar(self._tokenizer, text)
        return fault_of(matcher) or matcher
