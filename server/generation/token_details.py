"""Details of single tokens in the formats of the APIs: log-probabilities, and what the network did."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

import msgspec

from ...engine.messages import TokenDynamics, TokenLogprobs
from ...model.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # replaces minus infinity, which JSON lacks; OpenAI uses the same number


def chat_logprobs(positions: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return log-probabilities in the chat format."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text, data = tokenizer.token_text(token_id), tokenizer.token_bytes(token_id)
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(data)}

    return {
        "content": [
            entry(position.token_id, position.logprob) | {"top_logprobs": [entry(*pair) for pair in position.top]}
            for position in positions
        ]
    }


class LegacyLogprobs:
    """Writes one choice's log-probabilities in the older format; all parts of a character have its `text_offset`."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._offset = 0

    def write(self, positions: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Return the object for the next positions."""
        text = self._tokenizer.token_text
        return {
            "tokens": [text(position.token_id) for position in positions],
            "token_logprobs": [max(position.logprob, LOWEST_LOGPROB) for position in positions],
            "top_logprobs": [self._candidates(position) for position in positions],
            "text_offset": [self._advance(position.token_id) for position in positions],
        }

    def write_prompt(self, prompt: Sequence[int], positions: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Return the object for a whole prompt, whose first token has no log-probabilities; to be called first."""
        shown = self.write([TokenLogprobs(token_id=prompt[0], logprob=0.0, top=[]), *positions])
        shown["token_logprobs"][0] = shown["top_logprobs"][0] = None
        self._offset += len(self._decode(b"", True))  # the prompt's unfinished character ends with it
        return shown

    def _candidates(self, position: TokenLogprobs) -> dict[str, float]:
        shown: dict[str, float] = {}
        for id_, logprob in [*position.top, (position.token_id, position.logprob)]:
            # Of tokens with the same text, such as parts of characters, keep the likeliest, which comes first.
            shown.setdefault(self._tokenizer.token_text(id_), max(logprob, LOWEST_LOGPROB))
        return shown

    def _advance(self, token_id: int) -> int:
        """Move past a token; return where it begins."""
        offset = self._offset
        if token_id not in self._hidden:
            self._offset += len(self._decode(self._tokenizer.token_bytes(token_id)))
        return offset


def show_prompt_logprobs(
    prompt: Sequence[int], positions: Sequence[TokenLogprobs], tokenizer: Tokenizer
) -> list[dict[str, dict[str, Any]] | None]:
    """Return the log-probabilities of a prompt's tokens as vLLM does, by token id; the first token has none."""
    shown: list[dict[str, dict[str, Any]] | None] = [None] * min(len(prompt), 1)
    for position in positions:
        candidates = [(rank, id_, logprob) for rank, (id_, logprob) in enumerate(position.top, 1)]
        entry = {}
        for rank, id_, logprob in [*reversed(candidates), (position.rank, position.token_id, position.logprob)]:
            text = tokenizer.token_text(id_)
            entry[str(id_)] = {"logprob": max(logprob, LOWEST_LOGPROB), "rank": rank, "decoded_token": text}
        shown.append(entry)
    return shown


def show_dynamics(
    token_ids: Sequence[int], dynamics: Sequence[TokenDynamics], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Return what the network did for each generated token."""
    return [
        {"token_id": token_id, "token": tokenizer.token_text(token_id), **msgspec.structs.asdict(entry)}
        for token_id, entry in zip(token_ids, dynamics, strict=True)
    ]
