"""Read a prompt's own hidden states: log-probabilities of its tokens, or one vector for the whole prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...model.network import DeepNetwork
from ..step.request import Request, ScheduledSequence
from .sampler import token_logprobs

ROWS = 256  # maximum rows of scores at a time, each as wide as the vocabulary


def read_prompts(model: DeepNetwork, sequences: Sequence[ScheduledSequence], hidden: Tensor) -> None:
    """Store results from a step's hidden states FP32 [T, H] for requests that read their prompt.

    Call it before the step's progress is added to `num_computed_tokens`.
    """
    end = 0
    for request, count, *_ in sequences:
        start, end = end, end + count
        if request.pooling is not None:
            _pool(request, hidden[start:end])
        elif request.reads_prompt:
            _score(model, request, hidden[start:end])


def _pool(request: Request, hidden: Tensor) -> None:
    if request.pooling == "last":
        request.pooled = hidden[-1].double()
        return
    # States recomputed after a preemption or a failed step are already in the sum.
    known = max(request.num_pooled_tokens - request.num_computed_tokens, 0)
    total = hidden[known:].sum(dim=0, dtype=torch.float64)
    request.pooled = total if request.pooled is None else request.pooled + total
    request.num_pooled_tokens = max(request.num_pooled_tokens, request.num_computed_tokens + len(hidden))


def _score(model: DeepNetwork, request: Request, hidden: Tensor) -> None:
    """Score each token at the position before it, except those scored before a preemption."""
    first = request.num_computed_tokens
    end = min(first + len(hidden), request.num_prompt_tokens - 1)
    for start in range(max(first, len(request.prompt_logprobs)), end, ROWS):
        stop = min(start + ROWS, end)
        chosen = torch.tensor(request.token_ids[start + 1 : stop + 1], device=hidden.device)
        wanted = [request.params.prompt_logprobs or 0] * (stop - start)
        scores = model.logits(hidden[start - first : stop - first])
        request.prompt_logprobs += token_logprobs(model.ops, scores, chosen, wanted)
