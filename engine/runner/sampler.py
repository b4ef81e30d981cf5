"""Turns the requests of a step into one vectorised draw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ...model.backend import Backend
from ...model.sampling import SamplingBatch, apply_rules
from ..messages import TokenLogprobs
from ..step.request import Request
from ..step.runner import SampledToken
from .logit_rules import LogitRules

Draw = tuple[Request, Sequence[int]]


class Sampler:
    """Draws the next token of several requests from their logits.

    Args:
        ops: the device's way of doing so.
    """

    def __init__(self, ops: Backend) -> None:
        self._ops = ops

    def __call__(self, logits: Tensor, draws: Sequence[Draw], allowed: Iterable[Tensor] = ()) -> list[SampledToken]:
        """Draw one token per row.

        Args:
            logits: FP32 [N, vocab], which may be changed in place.
            draws: N requests, each with the tokens that are guessed to stand between its own and the drawn one.
            allowed: for each request with a grammar, in order, FP32 [vocab]: 0 for what may come next, else -inf.
        """
        requests = [request for request, _ in draws]
        asking = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
        raw = logits[asking] if asking else None  # a copy, from before the penalties
        batch = self._batch(draws, allowed, logits.shape[-1], logits.device)
        apply_rules(logits, batch)
        tokens = self._ops.draw(logits, batch)
        found: dict[int, TokenLogprobs] = {}
        if raw is not None:
            wanted = [requests[row].params.logprobs or 0 for row in asking]
            found = dict(zip(asking, token_logprobs(self._ops, raw, tokens[asking], wanted), strict=True))
        return [SampledToken(token, found.get(row)) for row, token in enumerate(tokens.tolist())]

    def _batch(
        self, draws: Sequence[Draw], allowed: Iterable[Tensor], vocab_size: int, device: torch.device
    ) -> SamplingBatch:
        requests = [request for request, _ in draws]
        params = [request.params for request in requests]
        ruled: list[tuple[int, Request, LogitRules]] = []
        for row, request in enumerate(requests):
            if request.has_logit_rules:
                if not isinstance(rules := request.logit_rules, LogitRules):
                    rules = request.logit_rules = LogitRules(request, vocab_size, device)
                ruled.append((row, request, rules))
        masks = {row: rules.mask for row, _, rules in ruled if rules.mask is not None}
        constrained = [row for row, request in enumerate(requests) if request.grammar is not None]
        for row, mask in zip(constrained, allowed, strict=True):
            both = mask + masks[row] if row in masks else mask
            masks[row] = mask if both.amax() == -torch.inf else both  # no grammar can be broken
        return SamplingBatch.build(
            temperature=[p.temperature for p in params],
            top_k=[p.top_k for p in params],
            top_p=[p.top_p for p in params],
            min_p=[p.min_p for p in params],
            seed=[p.seed or 0 for p in params],
            position=[request.num_tokens + len(ahead) for request, ahead in draws],
            repetition_penalty=[p.repetition_penalty for p in params],
            presence_penalty=[p.presence_penalty for p in params],
            frequency_penalty=[p.frequency_penalty for p in params],
            token_ids=[
                ([*request.token_ids, *ahead] if ahead else request.token_ids, request.num_prompt_tokens)
                for request, ahead in draws
            ],
            bias=[(row, *rules.bias) for row, _, rules in ruled if rules.bias is not None],
            masks=list(masks.items()),
            banned=[(row, ids) for row, request, rules in ruled for ids in rules.banned(request)],
            device=device,
            full=self._ops.capturable,
        )


def token_logprobs(ops: Backend, raw: Tensor, chosen: Tensor, wanted: Sequence[int]) -> list[TokenLogprobs]:
    """Of chosen tokens int64 [N] by raw scores FP32 [N, vocab], each with as many of the most likely as wanted."""
    of_chosen, ranks, best, ids = ops.logprobs(raw, chosen, max(wanted))
    columns = zip(wanted, chosen.tolist(), of_chosen.tolist(), ranks.tolist(), best.tolist(), ids.tolist(), strict=True)
    return [
        TokenLogprobs(
            token_id=token,
            logprob=logprob,
            top=list(zip(top_ids[:count], top_scores[:count], strict=True)),
            rank=rank,
        )
        for count, token, logprob, rank, top_scores, top_ids in columns
    ]
