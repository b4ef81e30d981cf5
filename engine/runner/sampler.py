"""Draw the next tokens of several requests at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ...model.backend import Backend
from ...model.sampling import SamplingBatch, apply_rules
from ..messages import TokenLogprobs
from ..step.request import Request, SampledToken
from .logit_rules import LogitRules

Draw = tuple[Request, Sequence[int]]  # a request, and the draft tokens before the drawn one


def sample_tokens(ops: Backend, logits: Tensor, draws: Sequence[Draw], allowed: Iterable[Tensor]) -> list[SampledToken]:
    """Draw a token for each of N `draws` from logits FP32 [N, vocab], which are changed in place.

    `allowed` has, for each request with a grammar, in order, FP32 [vocab]: 0 for tokens that may come next, else -inf.
    """
    asking = [row for row, (request, _) in enumerate(draws) if request.params.logprobs is not None]
    raw = logits[asking] if asking else None  # a copy, from before the penalties
    batch = _batch(ops, draws, allowed, logits)
    apply_rules(logits, batch)
    tokens = ops.draw(logits, batch)
    found: dict[int, TokenLogprobs] = {}
    if raw is not None:
        wanted = [draws[row][0].params.logprobs or 0 for row in asking]
        found = dict(zip(asking, token_logprobs(ops, raw, tokens[asking], wanted), strict=True))
    return [SampledToken(token, found.get(row)) for row, token in enumerate(tokens.tolist())]


def _batch(ops: Backend, draws: Sequence[Draw], allowed: Iterable[Tensor], logits: Tensor) -> SamplingBatch:
    ruled: list[tuple[int, Request, LogitRules]] = []
    for row, (request, _) in enumerate(draws):
        if request.has_logit_rules:
            if not isinstance(rules := request.logit_rules, LogitRules):
                rules = request.logit_rules = LogitRules(request, logits.shape[-1], logits.device)
            ruled.append((row, request, rules))
    masks = {row: rules.mask for row, _, rules in ruled if rules.mask is not None}
    constrained = [row for row, (request, _) in enumerate(draws) if request.grammar is not None]
    for row, mask in zip(constrained, allowed, strict=True):
        both = mask + masks[row] if row in masks else mask
        masks[row] = mask if both.amax() == -torch.inf else both  # the grammar wins over allowed_token_ids
    return SamplingBatch.build(
        [request.params for request, _ in draws],
        [request.num_tokens + len(ahead) for request, ahead in draws],
        logits.device,
        token_ids=[
            ([*request.token_ids, *ahead] if ahead else request.token_ids, request.num_prompt_tokens)
            for request, ahead in draws
        ],
        bias=[(row, *rules.bias) for row, _, rules in ruled if rules.bias is not None],
        masks=list(masks.items()),
        banned=[(row, ids) for row, request, rules in ruled for ids in rules.banned(request)],
        full=ops.capturable,
    )


def token_logprobs(ops: Backend, raw: Tensor, chosen: Tensor, wanted: Sequence[int]) -> list[TokenLogprobs]:
    """Report chosen tokens int64 [N] by raw scores FP32 [N, vocab], each with as many top tokens as `wanted`."""
    of_chosen, ranks, best, ids = ops.logprobs(raw, chosen, max(wanted))
    columns = zip(wanted, chosen.tolist(), of_chosen.tolist(), ranks.tolist(), best.tolist(), ids.tolist(), strict=True)
    return [
        TokenLogprobs(token_id=token, logprob=logprob, rank=rank, top=list(zip(top_ids, scores, strict=True))[:count])
        for count, token, logprob, rank, scores, top_ids in columns
    ]
