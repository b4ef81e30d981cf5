"""Details of single tokens in the formats of the APIs: log-probabilities, and the network's dynamics."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import msgspec

from ...engine.messages import TokenDynamics, TokenLogprobs
from ...model.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # replaces minus infinity, which JSON lacks; OpenAI uses the same number


class ShownLogprobs:
    """Writes one text's log-probabilities in the chat format.

    An entry's bytes are the part of its token that the text shows, so that joined they are the text: a special token
    that is left out and the hidden part of a stop string have none. An entry waits until its text is shown.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting: deque[tuple[TokenLogprobs, int, int, tuple[bytes, int]]] = deque()
        self._tokens_end = self._text_end = 0  # in characters

    def whole(self, positions: Sequence[TokenLogprobs], text: str) -> Iterator[dict[str, Any]]:
        """Yield all entries of a finished text."""
        for start in range(0, len(positions), 64):
            yield from self.add(positions[start : start + 64], text if not start else "")
        yield from self.add((), "" if positions else text)
        yield from self.finish()

    def add(self, positions: Sequence[TokenLogprobs], text: str) -> list[dict[str, Any]]:
        """Return the entries that are complete after more tokens and more of their shown text."""
        for position in positions:
            start, state = self._tokens_end, self._decoder.getstate()
            self._tokens_end += len(self._decoder.decode(self._bytes(position.token_id)))
            end = self._tokens_end + bool(self._decoder.getstate()[0])  # an unfinished character is not shown yet
            self._waiting.append((position, start, end, state))
        self._text_end += len(text)
        entries = []
        while self._waiting and self._waiting[0][2] <= self._text_end:
            position = self._waiting.popleft()[0]
            entries.append(self._entry(position, self._bytes(position.token_id)))
        return entries

    def finish(self) -> list[dict[str, Any]]:
        """Return the other entries, since the text has ended."""
        entries = [
            self._entry(position, self._shown(position, start, state)) for position, start, _, state in self._waiting
        ]
        self._waiting.clear()
        return entries

    def _shown(self, position: TokenLogprobs, start: int, state: tuple[bytes, int]) -> bytes:
        """Return the first bytes of a token that begins at `start`: those of characters before the end of the text."""
        data, count, room = self._bytes(position.token_id), 0, self._text_end - start
        self._decoder.setstate(state)
        while room > 0 and count < len(data):
            room -= len(self._decoder.decode(data[count : count + 1]))
            count += room >= 0
        return data[: max(count - len(self._decoder.getstate()[0]), 0)]

    @property
    def is_inside_character(self) -> bool:
        """Whether all text is shown except for a character that is unfinished."""
        return bool(self._decoder.getstate()[0]) and self._text_end == self._tokens_end

    def _bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._hidden else self._tokenizer.token_bytes(token_id)

    def _entry(self, position: TokenLogprobs, shown: bytes) -> dict[str, Any]:
        def candidate(token_id: int, logprob: float, data: bytes) -> dict[str, Any]:
            text = self._tokenizer.token_text(token_id)
            return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(data)}

        top = [candidate(token_id, logprob, self._bytes(token_id)) for token_id, logprob in position.top]
        return candidate(position.token_id, position.logprob, shown) | {"top_logprobs": top}


class LegacyLogprobs:
    """Writes one choice's log-probabilities in the older format.

    All parts of a character have its `text_offset`, and hidden tokens the end of the text. A token waits until the text
    before it is shown.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._waiting: deque[tuple[TokenLogprobs, int]] = deque()
        self._tokens_end = self._text_end = 0  # in characters

    def write(self, positions: Sequence[TokenLogprobs], text: str = "") -> dict[str, Any]:
        """Return the object for the tokens that begin in the text so far, after more tokens and more text."""
        self._text_end += len(text)
        for position in positions:
            self._waiting.append((position, self._tokens_end))
            if position.token_id not in self._hidden:
                self._tokens_end += len(self._decode(self._tokenizer.token_bytes(position.token_id)))
        ready = []
        while self._waiting and self._waiting[0][1] <= self._text_end:
            ready.append(self._waiting.popleft())
        return self._object(ready)

    def finish(self) -> dict[str, Any] | None:
        """Return the object for the other tokens, since the text has ended; None if there are none."""
        return self._object(self._waiting) if self._waiting else None

    def write_prompt(self, prompt: Sequence[int], positions: Iterable[TokenLogprobs], text: str) -> dict[str, Any]:
        """Return the object for a whole prompt, whose first token has no log-probabilities; call it first."""
        shown = self.write([TokenLogprobs(token_id=prompt[0], logprob=0.0, top=[]), *positions], text)
        shown["token_logprobs"][0] = shown["top_logprobs"][0] = None
        self._tokens_end += len(self._decode(b"", True))  # the prompt's unfinished character ends with it
        return shown

    def _object(self, ready: Collection[tuple[TokenLogprobs, int]]) -> dict[str, Any]:
        return {
            "tokens": [self._tokenizer.token_text(position.token_id) for position, _ in ready],
            "token_logprobs": [max(position.logprob, LOWEST_LOGPROB) for position, _ in ready],
            "top_logprobs": [self._candidates(position) for position, _ in ready],
            "text_offset": [min(start, self._text_end) for _, start in ready],
        }

    def _candidates(self, position: TokenLogprobs) -> dict[str, float]:
        shown: dict[str, float] = {}
        for id_, logprob in [*position.top, (position.token_id, position.logprob)]:
            # Of tokens with the same text, such as parts of characters, keep the likeliest, which comes first.
            shown.setdefault(self._tokenizer.token_text(id_), max(logprob, LOWEST_LOGPROB))
        return shown


def show_prompt_logprobs(
    prompt: Sequence[int], positions: Iterable[TokenLogprobs], tokenizer: Tokenizer
) -> Iterator[dict[str, dict[str, Any]] | None]:
    """Yield the log-probabilities of a prompt's tokens as vLLM does, by token id; the first token has none."""
    yield from [None] * min(len(prompt), 1)
    for position in positions:
        candidates = [(rank, id_, logprob) for rank, (id_, logprob) in enumerate(position.top, 1)]
        entry = {}
        for rank, id_, logprob in [*reversed(candidates), (position.rank, position.token_id, position.logprob)]:
            text = tokenizer.token_text(id_)
            entry[str(id_)] = {"logprob": max(logprob, LOWEST_LOGPROB), "rank": rank, "decoded_token": text}
        yield entry


def show_dynamics(
    token_ids: Sequence[int], dynamics: Sequence[TokenDynamics], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Return the network's dynamics for each generated token."""
    return [
        {"token_id": token_id, "token": tokenizer.token_text(token_id), **msgspec.structs.asdict(entry)}
        for token_id, entry in zip(token_ids, dynamics, strict=True)
    ]
