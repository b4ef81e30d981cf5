"""Drafts of a sequence's next tokens, found in the sequence itself: prompt lookup (Saxena 2023).

If the last few tokens have occurred before, the tokens that followed then are a good guess of those that follow now:
in code, quotations and tables. The network computes a whole draft in one step, a token is drawn after each of its
tokens, and `Drafter.verify` counts the correct guesses before the first wrong one. A token's draw depends on its seed
and position alone, so drafts change when tokens are drawn, but never which tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..config import SpeculativeConfig

MAX_PAUSE = 64


class Drafter:
    """Proposes the next tokens of one sequence, and verifies them once they are drawn.

    The position after each n-gram's last occurrence is kept, so that the cost of a proposal does not depend on the
    sequence's length. After a draft with no correct token it skips one proposal, after the next
    such draft two, then four, up to `MAX_PAUSE`; a correct token resets this.
    """

    __slots__ = ("_indexed", "_next_of", "_pause", "_wait", "settings")

    def __init__(self, settings: SpeculativeConfig) -> None:
        self.settings = settings
        self._next_of: dict[tuple[int, ...], int] = {}
        self._indexed = self._pause = self._wait = 0

    def propose(self, token_ids: Sequence[int], limit: int) -> list[int]:
        """Return up to `limit` tokens that may follow `token_ids`, which has only grown since the last call."""
        lengths = range(self.settings.prompt_lookup_min, self.settings.prompt_lookup_max + 1)
        for end in range(self._indexed + 1, len(token_ids)):
            for length in lengths:
                if length <= end:
                    self._next_of[tuple(token_ids[end - length : end])] = end
        self._indexed = max(len(token_ids) - 1, 0)
        if self._wait:
            self._wait -= 1
            return []
        for length in reversed(lengths):
            start = self._next_of.get(tuple(token_ids[-length:]))
            if start is not None and length <= len(token_ids):
                following = token_ids[start:]  # repeated if short: the text is in a loop
                return [following[n % len(following)] for n in range(min(limit, self.settings.num_speculative_tokens))]
        return []

    def verify(self, draft: Sequence[int], drawn: Sequence[int]) -> int:
        """Count how many leading draft tokens were drawn; pause if none were."""
        pairs = enumerate(zip(draft, drawn, strict=False))
        correct = next((n for n, (guess, token) in pairs if guess != token), len(draft))
        self._pause = 0 if correct else min(max(2 * self._pause, 1), MAX_PAUSE)
        self._wait = self._pause
        return correct
