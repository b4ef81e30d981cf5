"""A process in which grammars are tried before anybody relies on them.

The library that compiles grammars has limits of its own, but a few bytes can still keep it busy for hours (a
`multipleOf` that is a large prime, thirty patterns that must hold at once) or overflow its stack, and native code
cannot be stopped from outside. A process can: whatever passes here in time passes in the engine too.

Run as `python -m pyllm.engine.grammar.checker`; it ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import random
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import IO, Any

import llguidance
import msgspec

from ..client.launch import python
from ..messages import LENGTH_BYTES

TRY_SECONDS = 2.0
"""What a grammar may take here of a processor's time, until the verdict."""
WAIT_SECONDS = 10.0
"""How long a verdict is waited for where the machine has no time for it."""
OUR_ENDS = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGPROF, 1)
"""How the process ends by a grammar's fault: no stack or no memory left, or too much time taken."""
START_SECONDS = 30.0
MEMORY_BYTES = 4 << 30
WALK_SECONDS = 0.2
WALK_TOKENS = 64
MAX_MESSAGE = 200
TOO_SLOW = f"the grammar is too complex: it is not ready within {TRY_SECONDS:g} seconds"


class Vocabulary(msgspec.Struct, frozen=True):
    """What a grammar must know of the tokens.

    Attributes:
        tokens: the bytes of each id; b"" for ids that no token has.
        special: ids that no text has.
        ends: ids that end a text; at least one.
    """

    tokens: list[bytes]
    special: list[int]
    ends: list[int]

    def tokenizer(self, encode: Callable[[str], list[int]] | None = None) -> llguidance.LLTokenizer:
        """The library's own view of it; `encode` says which tokens spell a text that must come, None takes long ones.

        Only those are allowed where a grammar leaves one text, so that the model finds it spelled as in its training.
        """
        source = _Source(self, encode)
        wrapper = llguidance.TokenizerWrapper(source)
        source.library = llguidance.LLTokenizer(wrapper, n_vocab=len(self.tokens), eos_token=list(self.ends))
        return source.library


BYTES = Vocabulary([bytes([byte]) for byte in range(256)] + [b"</s>"], [256], [256])
"""A token for each byte: enough to see whether a grammar is any good, whatever the model."""


class _Source:
    """What the library wants to be given."""

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


def parser_limits() -> llguidance.LLParserLimits:
    """Bounds on one grammar's compilation, and on each token's mask (about 15 ms at worst)."""
    return llguidance.LLParserLimits(
        step_lexer_fuel=100_000, max_lexer_states=32_768, max_grammar_size=200_000, verbose_errors=False
    )


def compile_grammar(tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """A matcher, which is in an error state where the grammar is wrong; see `fault_of`."""
    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())


def fault_of(matcher: llguidance.LLMatcher) -> str:
    """What a matcher's error says, in one short line for people; "" for none."""
    lines = matcher.get_error().replace("<non-verbose/>", "").splitlines()
    # Excerpts of the grammar are left out.
    text = " ".join(" ".join(line for line in lines if not re.match(r"\s*(\d+ \|.*|[\^ ]*)$", line)).split())
    if re.match("(Parser Error: )?NoExtension", text):
        return "no text satisfies it"
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE // 2]} … {text[3 - MAX_MESSAGE // 2 :]}"


def try_grammar(tokenizer: llguidance.LLTokenizer, grammar: str) -> str:
    """Compile, and write a few random tokens by the grammar; what is wrong with it, "" for nothing."""
    matcher = compile_grammar(tokenizer, grammar)
    draw = random.Random(0)
    started = time.monotonic()
    for _ in range(WALK_TOKENS):
        if matcher.is_error() or matcher.is_stopped() or time.monotonic() > started + WALK_SECONDS:
            break
        allowed = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error():
            break
        go_on = allowed & ~sum(1 << end for end in set(tokenizer.eos_tokens))
        if not go_on:
            break
        first = draw.randrange(go_on.bit_length())
        rest = go_on >> first  # has a bit at least, the highest
        matcher.consume_token(first + (rest & -rest).bit_length() - 1)
    return fault_of(matcher) if matcher.is_error() else ""


class GrammarChecker:
    """Our side of the process: started when first needed, killed when it takes too long, then started anew.

    Args:
        vocabulary: of the model, or `BYTES`.
    """

    def __init__(self, vocabulary: Vocabulary = BYTES) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[[subprocess.Popen[bytes]], Any] | None = None
        self._lock = threading.Lock()
        self._code: int | None = None
        """How the last process ended; None for one that was killed since no answer came."""

    def check(self, grammar: str) -> str:
        """What is wrong with a grammar, "" for nothing; one at a time, within `TRY_SECONDS` once the process runs.

        Raises `TimeoutError` where that cannot be said now, since the machine is too busy.
        """
        with self._lock:
            for _ in range(2):
                if self._process is None or self._process.poll() is not None:
                    self._start()
                answer = self._ask(grammar, WAIT_SECONDS)
                if answer is not None:
                    return answer
                if self._code in OUR_ENDS:
                    return TOO_SLOW
                if self._code is None:
                    break
                # Somebody else has ended it: once more.
        raise TimeoutError("The machine is too busy to try a grammar.")

    def close(self) -> None:
        """End the process."""
        self._process = None
        if self._end is not None:
            self._end()

    def _start(self) -> None:
        self.close()
        command = [*python(), "-m", __name__]
        # stderr is dropped: a stack that overflows there is a grammar's fault and told as such.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._end = weakref.finalize(self, _kill, self._process)
        if self._ask(self._vocabulary, START_SECONDS) is None:
            raise RuntimeError("the process that tries grammars does not start")

    def _ask(self, question: str | Vocabulary, seconds: float) -> str | None:
        """The answer, None when there is none in time; the process is gone then."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError, EOFError):
            self._process.stdin.write(_frame(question))
            self._process.stdin.flush()
            if select.select([self._process.stdout], [], [], seconds)[0]:
                return msgspec.msgpack.decode(_read_frame(self._process.stdout), type=str)
            self._code = None
            self.close()
            return None
        self._code = self._process.wait()  # the pipe is broken, so it has ended
        self.close()
        return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with contextlib.suppress(BrokenPipeError):
            stream.close()
    process.wait()


def _frame(content: str | Vocabulary) -> bytes:
    body = msgspec.msgpack.encode(content)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def _read_frame(stream: IO[bytes]) -> bytes:
    head = stream.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        raise EOFError
    return stream.read(int.from_bytes(head, "little"))


def main() -> None:
    """Read a vocabulary, then grammars; answer each."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    with contextlib.suppress(EOFError, BrokenPipeError):
        tokenizer = msgspec.msgpack.decode(_read_frame(source), type=Vocabulary).tokenizer()
        answer = ""
        while True:
            sink.write(_frame(answer))
            sink.flush()
            grammar = msgspec.msgpack.decode(_read_frame(source), type=str)
            # What is not done in time ends the process. Only the time that it really had counts.
            signal.setitimer(signal.ITIMER_PROF, TRY_SECONDS)
            answer = try_grammar(tokenizer, grammar)
            signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
