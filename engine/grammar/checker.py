"""Tests grammars in a separate process that can be killed.

The grammar library has limits of its own, but a few bytes can still keep it busy for hours (a `multipleOf` that is a
large prime, thirty patterns that must hold at once) or overflow its stack, and native code cannot be interrupted. A
process can be: a grammar that passes here in time also passes in the engine.

Run as `python -m pyllm.engine.grammar.checker FD`; it ends when the other side of the socket closes.
"""

from __future__ import annotations

import contextlib
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable

import llguidance
import msgspec

from ..client.launch import python
from ..errors import reason_of
from ..messages import encode_frame, read_frames

CPU_SECONDS = 2.0  # processor time to check one grammar
WAIT_SECONDS = 10.0  # elapsed time before a check is abandoned, because the machine has no processor time to spare
START_SECONDS = 30.0
MEMORY_BYTES = 4 << 30
WALK_SECONDS = 0.2
WALK_TOKENS = 64
MAX_MESSAGE = 200
# How a grammar ends the process: stack overflow, out of memory, or out of processor time.
GRAMMAR_EXITS = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGPROF, 1)
TOO_SLOW = f"the grammar is too complex: it did not compile within {CPU_SECONDS:g} seconds"


class Vocabulary(msgspec.Struct, frozen=True):
    """A tokenizer's tokens, in the form that grammars need."""

    tokens: list[bytes]  # the bytes of each id; b"" for unused ids
    special: list[int]  # ids that never appear in text
    ends: list[int]  # ids that end a text; at least one

    def tokenizer(self, encode: Callable[[str], list[int]] | None = None) -> llguidance.LLTokenizer:
        """Build the library's tokenizer.

        Where a grammar leaves only one continuation, `encode` chooses its tokens, so that the model sees the text
        spelled as in training; with None, it chooses the longest tokens.
        """
        source = _Source(self, encode)
        wrapper = llguidance.TokenizerWrapper(source)
        source.library = llguidance.LLTokenizer(wrapper, n_vocab=len(self.tokens), eos_token=list(self.ends))
        return source.library


class _Source:
    """The tokenizer interface that the library expects."""

    def __init__(self, vocabulary: Vocabulary, encode: Callable[[str], list[int]] | None) -> None:
        self._encode = encode
        self.library: llguidance.LLTokenizer | None = None
        self.tokens = vocabulary.tokens
        self.special_token_ids = sorted({*vocabulary.special, *vocabulary.ends})
        self.eos_token_id = vocabulary.ends[0]
        self.bos_token_id = None

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        if self._encode is not None:
            return self._encode(text)
        return [] if self.library is None else self.library.greedy_tokenize(text)


def compile_grammar(tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """Return a matcher; if the grammar is invalid, the matcher is in an error state (see `error_of`)."""
    limits = llguidance.LLParserLimits(  # these bound compile time, and mask time to about 15 ms a token
        step_lexer_fuel=100_000, max_lexer_states=32_768, max_grammar_size=200_000, verbose_errors=False
    )
    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def error_of(matcher: llguidance.LLMatcher) -> str:
    """Return a matcher's error as one short line, without excerpts of the grammar; "" for none."""
    lines = matcher.get_error().replace("<non-verbose/>", "").splitlines()
    text = " ".join(" ".join(line for line in lines if not re.match(r"\s*(\d+ \|.*|[\^ ]*)$", line)).split())
    if re.match("(Parser Error: )?NoExtension", text):
        return "no text satisfies it"
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE // 2]} … {text[3 - MAX_MESSAGE // 2 :]}"


def try_grammar(tokenizer: llguidance.LLTokenizer, grammar: str) -> str:
    """Compile a grammar and write a few random tokens with it; return the problem with it, "" for none."""
    matcher = compile_grammar(tokenizer, grammar)
    draw = random.Random(0)
    started = time.monotonic()
    ends = sum(1 << end for end in set(tokenizer.eos_tokens))
    for _ in range(WALK_TOKENS):
        if matcher.is_error() or matcher.is_stopped() or time.monotonic() > started + WALK_SECONDS:
            break
        allowed = int.from_bytes(matcher.compute_bitmask(), "little") & ~ends
        if matcher.is_error() or not allowed:
            break
        first = draw.randrange(allowed.bit_length())
        rest = allowed >> first  # not zero: it has the highest bit
        matcher.consume_token(first + (rest & -rest).bit_length() - 1)
    return error_of(matcher) if matcher.is_error() else ""


class GrammarChecker:
    """Owns the process: starts it when first needed, and again after it was killed. For one thread at a time."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[[subprocess.Popen[bytes], socket.socket], GrammarChecker] | None = None

    def check(self, grammar: str) -> str:
        """Return the problem with a grammar, "" for none; raise `TimeoutError` if it cannot be checked now."""
        for _ in range(2):
            process = self._process
            if process is None or process.poll() is not None:
                process = self._start()
            answer = self._ask(grammar, WAIT_SECONDS)
            if answer is not None:
                return answer
            if process.wait() in GRAMMAR_EXITS:
                return TOO_SLOW
            # The process ended for another reason: try once more.
        raise TimeoutError("The machine is too busy to check a grammar.")

    def close(self) -> None:
        """End the process."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None

    def _start(self) -> subprocess.Popen[bytes]:
        self.close()
        self._socket, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*python(), "-m", __name__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                    # A stack overflow writes to stderr, and is reported as the grammar's error.
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                self._socket.close()
                raise TimeoutError(f"No process can be started to check a grammar ({reason_of(error)}).") from None
        self._finalizer = weakref.finalize(self, _end, self._process, self._socket)
        if self._ask(self._vocabulary, START_SECONDS) is None:
            raise TimeoutError("The process that checks grammars did not start.")
        return self._process

    def _ask(self, question: str | Vocabulary, seconds: float) -> str | None:
        """Return the reply, None if the process has ended; kill it and raise `TimeoutError` if it is late."""
        self._socket.settimeout(seconds)
        try:
            self._socket.sendall(encode_frame(question))
            with self._socket.makefile("rb") as stream:
                answer = next(read_frames(stream), None)
        except BrokenPipeError:
            answer = None
        except TimeoutError:
            self.close()
            raise TimeoutError("The machine is too busy to check a grammar.") from None
        return None if answer is None else msgspec.msgpack.decode(answer, type=str)


def _end(process: subprocess.Popen[bytes], sock: socket.socket) -> None:
    process.kill()
    sock.close()
    process.wait()


def main() -> None:
    """Read a vocabulary, then grammars; reply to each."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer: llguidance.LLTokenizer | None = None
    with socket.socket(fileno=int(sys.argv[1])) as sock, contextlib.suppress(BrokenPipeError):
        for frame in read_frames(sock.makefile("rb")):
            answer = ""
            if tokenizer is None:
                tokenizer = msgspec.msgpack.decode(frame, type=Vocabulary).tokenizer()
            else:
                signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # ends the process; counts only processor time
                answer = try_grammar(tokenizer, msgspec.msgpack.decode(frame, type=str))
                signal.setitimer(signal.ITIMER_PROF, 0)
            sock.sendall(encode_frame(answer))


if __name__ == "__main__":
    main()
