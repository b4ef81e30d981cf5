"""Drawing and log-probabilities on Triton kernels against plain torch."""

from __future__ import annotations

import pytest
import torch

from pyllm.model.cuda import sampling as ours
from pyllm.model.draw_params import DrawParams
from pyllm.model.sampling import SamplingBatch, logprobs, sample

VOCAB = 3000
"""More than one block, and no multiple of it."""


def scores(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows)) * 3


def batch(rows: int, **how: list[float]) -> SamplingBatch:
    lists = {"temperature": [0.9] * rows, "seed": list(range(rows)), **how}
    params = [DrawParams(**{name: values[row] for name, values in lists.items()}) for row in range(rows)]
    return SamplingBatch.build(params, [7 * n for n in range(rows)], torch.device("cpu"))


@pytest.mark.parametrize("how", [
    {}, {"temperature": [0.0, 1e-6, 0.3, 1.0, 2.5, 30.0]}, {"top_k": [0, 1, 2, 50, 2999, 5000]},
    {"top_p": [1.0, 1e-9, 0.1, 0.5, 0.9, 0.9999]}, {"min_p": [0.0, 1.0, 0.5, 0.1, 0.01, 1e-6]},
    {"top_k": [0, 3, 40, 7, 0, 2000], "top_p": [0.8, 0.7, 1.0, 0.95, 1.0, 0.3], "min_p": [0.0, 0.0, 0.2, 0.1, 0, 0]},
    {"seed": [2**63 - 1, -1, -(2**63), 0, 12345678901234567, 5]},
], ids=lambda how: "-".join(how) or "temperature alone")  # fmt: skip
def test_a_draw_takes_the_token_that_plain_torch_takes(how):
    logits, settings = scores(6), batch(6, **how)
    assert torch.equal(ours.draw(logits, settings), sample(logits.clone(), settings))


def test_greedy_takes_the_first_of_equals():
    logits = torch.zeros(2, VOCAB)
    logits[0, [2500, 17, 2100]] = 4.0
    assert ours.draw(logits, batch(2, temperature=[0.0, 0.0])).tolist() == [17, 0]


def test_ruled_out_tokens_are_never_drawn():
    logits = torch.full((8, VOCAB), -torch.inf)
    logits[:, [5, 2999]] = 0.0
    drawn = ours.draw(logits, batch(8, top_p=[0.999] * 8, top_k=[100] * 8))
    assert set(drawn.tolist()) == {5, 2999}
    assert torch.equal(drawn, sample(logits, batch(8)))


def test_logprobs_ranks_and_the_most_likely():
    logits = scores(3)
    logits[1, 9] = logits[1, 2800] = 20.0
    chosen = torch.tensor([4, 2800, int(logits[2].argmin())])
    of_chosen, ranks, best, ids = ours.logprobs(logits, chosen, 4)
    expected = logprobs(logits, chosen, 4)
    assert torch.allclose(of_chosen, expected[0], atol=1e-5)
    assert torch.equal(ranks, expected[1])
    assert torch.allclose(best, expected[2], atol=1e-5)
    assert ids[1, :2].tolist() == [9, 2800]
    assert torch.equal(ids[[0, 2]], expected[3][[0, 2]])
