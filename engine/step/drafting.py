"""Drafts of a sequence's next tokens, found in the sequence itself: prompt lookup (Saxena 2023).

Where the last few tokens have occurred before, what followed them then is a good guess of what follows now: in code,
in quotations, in tables. The network checks a whole draft in one step. Since a token's draw hangs on its seed and
position alone, the draws at the draft's positions are the very ones that would have been made one by one: drafts
change when tokens come, never which.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..config import SpeculativeConfig

MAX_PAUSE = 64


class Drafter:
    """Proposes the next tokens of one sequence.

    Every n-gram of the sequence is kept with the place behind its last occurrence, so that a proposal costs the same
    however long the sequence is. After drafts of which nothing was right it pauses, twice as long each time, so that
    text that does not repeat itself costs next to nothing.
    """

    __slots__ = ("_behind", "_indexed", "_pause", "_settings", "_wait")

    def __init__(self, settings: SpeculativeConfig) -> None:
        self._settings = settings
        self._behind: dict[tuple[int, ...], int] = {}
        self._indexed = 0
        self._pause = 0
        self._wait = 0

    @property
    def max_batch_size(self) -> int:
        """Most sequences in a step for which a guess is worth its cost."""
        return self._settings.disable_by_batch_size

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `token_ids`, a sequence that has only grown since the last call."""
        lengths = range(self._settings.prompt_lookup_min, self._settings.prompt_lookup_max + 1)
        for end in range(self._indexed + 1, len(token_ids)):
            for length in lengths:
                if length <= end:
                    self._behind[tuple(token_ids[end - length : end])] = end
        self._indexed = max(len(token_ids) - 1, 0)
        if self._wait:
            self._wait -= 1
            return []
        for length in reversed(lengths):
            start = self._behind.get(tuple(token_ids[-length:]))
            if start is not None and length <= len(token_ids):
                following = token_ids[start:]  # where it is short, it goes round: the text is in a loop
                return [following[n % len(following)] for n in range(min(most, self._settings.num_speculative_tokens))]
        return []

    def learn(self, num_accepted: int) -> None:
        """How much of the last draft was right."""
        self._pause = 0 if num_accepted else min(max(2 * self._pause, 1), MAX_PAUSE)
        self._wait = self._pause
