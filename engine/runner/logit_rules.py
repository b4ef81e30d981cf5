"""Rules for single tokens' scores, turned into tensors once per request and applied in every step."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ..step.request import Request


class LogitRules:
    """The rules of one request: `logit_bias`, `allowed_token_ids`, `bad_words` and `min_tokens`."""

    def __init__(self, request: Request, vocab_size: int, device: torch.device) -> None:
        params = request.params
        self._device = device
        self.bias: tuple[Tensor, Tensor] | None = None  # int64 ids, and FP32 values to add to them
        if params.logit_bias:
            values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
            self.bias = self._ids(params.logit_bias), values
        self.mask: Tensor | None = None  # FP32 [vocab], 0 for the allowed tokens and -inf for the others
        if params.allowed_token_ids is not None:
            self.mask = torch.full((vocab_size,), -torch.inf, device=device)
            self.mask[self._ids(params.allowed_token_ids)] = 0.0
        stops = request.stop_token_ids if params.min_tokens else ()
        self._stops = self._ids(stops) if stops else None
        singles = [word[0] for word in params.bad_words if len(word) == 1]
        self._bad = self._ids(singles) if singles else None
        longer: dict[tuple[int, ...], list[int]] = {}
        for *before, last in params.bad_words:
            if before:
                longer.setdefault(tuple(before), []).append(last)
        # Keyed by the token before the last, so that a step compares few of them.
        self._endings: dict[int, list[tuple[list[int], Tensor]]] = {}
        for beginning, lasts in longer.items():
            self._endings.setdefault(beginning[-1], []).append((list(beginning), self._ids(lasts)))

    def banned(self, request: Request) -> list[Tensor]:
        """Return token ids, int64, that may come next only if no other token can."""
        found = [] if self._bad is None else [self._bad]
        if self._stops is not None and request.num_output_tokens < request.params.min_tokens:
            found.append(self._stops)
        if self._endings and request.num_output_tokens:
            tokens, count = request.token_ids, request.num_output_tokens
            for before, lasts in self._endings.get(tokens[-1], ()):
                if len(before) <= count and tokens[-len(before) :] == before:
                    found.append(lasts)
        return found

    def _ids(self, tokens: Iterable[int]) -> Tensor:
        # Several times as fast as `torch.tensor` of a list.
        return torch.from_numpy(np.fromiter(tokens, np.int64)).to(self._device)
