"""Turns the requests of a step into one vectorised draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.sampling import SamplingBatch, logprobs, sample
from .messages import TokenLogprobs
from .request import Request


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of one request."""

    token_id: int
    logprobs: TokenLogprobs | None


class Sampler:
    """Draws the next token of several requests from their logits."""

    def __call__(self, logits: Tensor, requests: Sequence[Request]) -> list[SampledToken]:
        """Draw one token per request from FP32 logits [N, vocab], which may be changed in place."""
        asking = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
        raw = logits[asking] if asking else None  # a copy, from before the penalties
        tokens = sample(logits, self._batch(requests, logits.device))
        found: dict[int, TokenLogprobs] = {}
        if raw is not None:
            found = self._logprobs(raw, tokens[asking], asking, requests)
        return [SampledToken(token, found.get(row)) for row, token in enumerate(tokens.tolist())]

    @staticmethod
    def _batch(requests: Sequence[Request], device: torch.device) -> SamplingBatch:
        params = [request.params for request in requests]
        return SamplingBatch.build(
            temperature=[p.temperature for p in params],
            top_k=[p.top_k for p in params],
            top_p=[p.top_p for p in params],
            min_p=[p.min_p for p in params],
            seed=[p.seed or 0 for p in params],
            position=[request.num_tokens for request in requests],
            repetition_penalty=[p.repetition_penalty for p in params],
            presence_penalty=[p.presence_penalty for p in params],
            frequency_penalty=[p.frequency_penalty for p in params],
            token_ids=[(request.token_ids, request.num_prompt_tokens) for request in requests],
            banned=[
                (row, token)
                for row, request in enumerate(requests)
                if request.num_output_tokens < request.params.min_tokens
                for token in request.stop_token_ids
            ],
            device=device,
        )

    @staticmethod
    def _logprobs(
        raw: Tensor, chosen: Tensor, rows: list[int], requests: Sequence[Request]
    ) -> dict[int, TokenLogprobs]:
        wanted = [requests[row].params.logprobs or 0 for row in rows]
        of_chosen, best, ids = logprobs(raw, chosen, max(wanted))
        columns = zip(rows, wanted, chosen.tolist(), of_chosen.tolist(), best.tolist(), ids.tolist(), strict=True)
        return {
            row: TokenLogprobs(
                token_id=token, logprob=logprob, top=list(zip(top_ids[:count], top_scores[:count], strict=True))
            )
            for row, count, token, logprob, top_scores, top_ids in columns
        }
