"""Drawing tokens: against plain sorted references, and against the statistics that a draw must have."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyllm.model.draw_params import DrawParams
from pyllm.model.sampling import SamplingBatch, logprobs, sample, uniform

CPU = torch.device("cpu")


def batch(rows: int, **given_values) -> SamplingBatch:
    """A batch whose rows are all alike where a single value is given."""
    lists = {name: value if isinstance(value, list) else [value] * rows for name, value in given_values.items()}
    positions = lists.pop("position", list(range(rows)))
    prompts = lists.pop("prompt_ids", [[]] * rows)
    outputs = lists.pop("output_ids", [[]] * rows)
    rules = {name: lists.pop(name) for name in ("bias", "masks") if name in lists}
    if "banned" in lists:
        rules["banned"] = [(row, torch.tensor([token])) for row, token in lists.pop("banned")]
    token_ids = [(prompt + output, len(prompt)) for prompt, output in zip(prompts, outputs, strict=True)]
    params = [DrawParams(**{name: values[row] for name, values in lists.items()}) for row in range(rows)]
    return SamplingBatch.build(params, positions, CPU, token_ids=token_ids, **rules)


def draws(logits: Tensor, count: int, **params) -> Tensor:
    """Many draws from one row's distribution."""
    return sample(logits.repeat(count, 1), batch(count, **params))


def kept(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[set[int], set[int]]:
    """What may be drawn, by sorting: tokens that must be kept, and those that may be (FP32 leaves the border unsure).

    A tie with the last token kept is kept as well, but for top-k 1, which is greedy.
    """
    if top_k == 1:
        return ({int(logits.argmax())},) * 2
    probs = ((logits.double() - logits.max().double()) / temperature).softmax(-1)
    ordered = probs.sort(descending=True).values[: top_k or None]

    def survivors(slack: float) -> set[int]:
        reached = (ordered.cumsum(0) >= top_p * ordered.sum() * (1 + slack)).nonzero()
        last = ordered[reached[0, 0]] if top_p < 1.0 and len(reached) else ordered[-1]
        enough = (probs >= last * (1 - max(slack, 0.0))) & (probs >= min_p * probs.max() * (1 - slack))
        return set((enough & (probs > 0)).nonzero().flatten().tolist())

    return survivors(-1e-5), survivors(1e-5)


def shapes(vocab: int, generator: torch.Generator) -> list[Tensor]:
    """Logits of every kind: spread, peaked, flat, nearly flat, full of ties, with ruled-out tokens."""
    spread = torch.randn(vocab, generator=generator) * 3
    peaked = torch.randn(vocab, generator=generator)
    peaked[vocab // 2] = 30.0
    ties = torch.randint(-2, 3, (vocab,), generator=generator).float()
    holes = spread.clone()
    holes[torch.rand(vocab, generator=generator) < 0.5] = -torch.inf
    holes[vocab // 3] = 1.0
    nearly_flat = torch.randn(vocab, generator=generator) * 1e-3
    return [spread, peaked, torch.zeros(vocab), nearly_flat, ties, holes, spread * 10]


FILTERS = [
    (1, 1.0, 0.0), (3, 1.0, 0.0), (100_000, 1.0, 0.0), (0, 0.9, 0.0), (0, 0.1, 0.0), (0, 1e-6, 0.0), (0, 1.0, 0.05),
    (0, 1.0, 1.0), (4, 0.7, 0.0), (200, 0.99, 0.01), (0, 0.999, 0.001), (2, 0.5, 0.9),
]  # fmt: skip


@pytest.mark.parametrize("vocab", [5, 130, 1100, 5000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.9])
def test_filters_keep_exactly_the_set_that_sorting_keeps(vocab, temperature, monkeypatch):
    generator = torch.Generator().manual_seed(vocab)
    rows, wanted, params = [], [], []
    for logits in shapes(vocab, generator):
        for top_k, top_p, min_p in FILTERS:
            rows.append(logits)
            params.append((top_k, top_p, min_p))
            wanted.append(kept(logits, temperature, top_k, top_p, min_p))
    top_k, top_p, min_p = (list(values) for values in zip(*params, strict=True))
    settings_ = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    stacked = torch.stack(rows)
    # What can be drawn is seen by drawing with every random number of a fine grid, with those at its ends too.
    cells = 40 if vocab > 1000 else 300
    points = torch.tensor([i / cells for i in range(cells)] + [1e-15, 1 - 2.0**-53], dtype=torch.float64)
    drawn: list[set[int]] = [set() for _ in rows]
    for point in points:
        monkeypatch.setattr("pyllm.model.sampling.uniform", lambda seed, position, at=point: at.expand(len(seed)))
        for found, token in zip(drawn, sample(stacked.clone(), batch(len(rows), **settings_)).tolist(), strict=True):
            found.add(token)
    for i, (found, (must, may)) in enumerate(zip(drawn, wanted, strict=True)):
        assert found <= may, f"row {i}, {params[i]}: drew {sorted(found - may)[:5]} which are filtered out"
        probs = (rows[i].double() / temperature).softmax(-1)
        total = sum(probs[token].item() for token in may)
        # The grid sees each token that is wider than its step; the first and the last are seen whatever they weigh.
        wide = {token for token in must if probs[token].item() / total > 1.01 / cells}
        assert wide <= found, f"row {i}, {params[i]}: {sorted(wide - found)[:5]} are never drawn"
        positive = [token for token in sorted(must) if probs[token].item() / total > 1e-6]
        if positive:
            assert min(found) <= positive[0]
            assert max(found) >= positive[-1]


@settings(max_examples=150, deadline=None)
@given(
    scores=st.lists(st.integers(-40, 40), min_size=2, max_size=40),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    temperature=st.floats(0.1, 2.0),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_a_draw_is_always_of_the_kept_set(scores, top_k, top_p, min_p, temperature, seed):
    logits = torch.tensor(scores) / 4
    _, may = kept(logits, temperature, top_k, top_p, min_p)
    found = set(draws(logits, 30, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed).tolist())
    assert found <= may


def test_greedy_is_the_argmax():
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(1))
    expected = logits.argmax(-1)
    assert sample(logits.clone(), batch(40, temperature=0.0)).equal(expected)
    mixed = sample(logits.clone(), batch(40, temperature=[0.0, 1.0] * 20))
    assert mixed[::2].equal(expected[::2])
    assert not mixed[1::2].equal(expected[1::2])
    filtered = batch(40, temperature=0.0, top_k=5, top_p=0.3, min_p=0.2, seed=9)
    assert sample(logits.clone(), filtered).equal(expected)


@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-30, 1e-44, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(1)) * 50
    found = sample(logits.clone(), batch(40, temperature=temperature, seed=list(range(40))))
    assert found.equal(logits.argmax(-1))


def test_top_k_of_one_is_greedy():
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(2))
    assert sample(logits.clone(), batch(40, top_k=1, seed=3)).equal(logits.argmax(-1))


def chi_square(found: Tensor, probs: Tensor) -> float:
    """The statistic as a number of standard deviations, tokens too rare for it joined to one."""
    counts = torch.bincount(found, minlength=len(probs)).double()
    expected = probs * len(found)
    rare = expected < 10
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    used = expected > 0
    assert not counts[~used].any()
    freedom = int(used.sum()) - 1
    value = ((counts - expected)[used] ** 2 / expected[used]).sum().item()
    return (value - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"temperature": 0.8, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.2, "min_p": 0.1},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 123456789])
def test_frequencies_are_those_of_the_filtered_softmax(params, seed):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 1.5
    filters = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    must, may = kept(logits, **(filters | params))
    assert must == may
    probs = (logits.double() / params["temperature"]).softmax(-1)
    probs = torch.where(torch.tensor([token in must for token in range(50)]), probs, 0.0)
    probs /= probs.sum()
    by_position = draws(logits, 40_000, seed=seed, **params)
    assert chi_square(by_position, probs) < 4
    keys = {"seed": [seed + i for i in range(40_000)], "position": [17] * 40_000}
    by_seed = sample(logits.repeat(40_000, 1), batch(40_000, **params, **keys))
    assert chi_square(by_seed, probs) < 4


def test_random_numbers_are_flat_and_independent():
    count = 200_000
    at = torch.arange(count)
    for numbers in (uniform(torch.zeros(count, dtype=torch.int64), at), uniform(at, torch.full((count,), 5))):
        assert numbers.dtype == torch.float64
        assert (numbers >= 0).all()
        assert (numbers < 1).all()
        assert len(numbers.unique()) == count
        bins = (numbers * 100).long()
        assert abs(chi_square(bins, torch.full((100,), 0.01, dtype=torch.float64))) < 4
        assert abs(numbers.mean().item() - 0.5) < 4 * math.sqrt(1 / 12 / count)
        for lag in (1, 2, 16, 1000):
            correlation = torch.corrcoef(torch.stack((numbers[lag:], numbers[:-lag])))[0, 1].item()
            assert abs(correlation) < 4 / math.sqrt(count)
        pairs = bins[:-1] // 10 * 10 + bins[1:] // 10
        assert abs(chi_square(pairs, torch.full((100,), 0.01, dtype=torch.float64))) < 4


def test_neighbouring_seeds_and_positions_differ():
    seeds = torch.tensor([0, 1, -1, 2**62, -(2**63), 2**63 - 1, 2**32, 2**32 + 1])
    numbers = torch.stack([uniform(seeds, torch.full_like(seeds, position)) for position in range(50)])
    assert len(numbers.unique()) == numbers.numel()
    again = torch.stack([uniform(seeds, torch.full_like(seeds, position)) for position in range(50)])
    assert numbers.equal(again)
    # Position p of one seed must not be position p + 1 of its neighbour.
    one = uniform(torch.zeros(1000, dtype=torch.int64), torch.arange(1000))
    other = uniform(torch.ones(1000, dtype=torch.int64), torch.arange(1000))
    assert not set(one.tolist()) & set(other.tolist())


def test_a_row_is_drawn_alike_in_any_company():
    generator = torch.Generator().manual_seed(4)
    rows, vocab = 33, 1500
    logits = torch.randn(rows, vocab, generator=generator) * torch.rand(rows, 1, generator=generator) * 4
    logits[5] = 0.0  # flat: its top-p makes everyone's candidates many
    params = {
        "temperature": [0.0 if i % 7 == 0 else 0.2 + i / 20 for i in range(rows)],
        "top_k": [0 if i % 3 else i for i in range(rows)],
        "top_p": [1.0 if i % 2 else 0.6 + i / 100 for i in range(rows)],
        "min_p": [0.0 if i % 5 else 0.03 for i in range(rows)],
        "seed": [i * 31 for i in range(rows)],
        "position": [3 * i for i in range(rows)],
        "repetition_penalty": [1.0 if i % 4 else 1.3 for i in range(rows)],
        "presence_penalty": [0.0 if i % 4 else 0.5 for i in range(rows)],
        "frequency_penalty": [0.0 if i % 6 else 0.2 for i in range(rows)],
        "prompt_ids": [list(range(i, 2 * i)) for i in range(rows)],
        "output_ids": [[i, i, i + 1] for i in range(rows)],
    }
    crowd = sample(logits.clone(), batch(rows, **params, banned=[(i, i + 7) for i in range(rows)]))
    for i in range(rows):
        own = {name: values[i : i + 1] for name, values in params.items()}
        assert sample(logits[i : i + 1].clone(), batch(1, **own, banned=[(0, i + 7)]))[0] == crowd[i]
    order = torch.randperm(rows, generator=generator).tolist()
    shuffled = {name: [values[i] for i in order] for name, values in params.items()}
    banned = [(row, i + 7) for row, i in enumerate(order)]
    assert sample(logits[order].clone(), batch(rows, **shuffled, banned=banned)).equal(crowd[order])


def slow_penalties(row: list[float], prompt: list[int], output: list[int], repetition, presence, frequency):
    """The formulas, one token at a time."""
    found = []
    for token, score in enumerate(row):
        if token in prompt or token in output:
            score = score / repetition if score > 0 else score * repetition
        count = output.count(token)
        found.append(score - frequency * count - (presence if count else 0.0))
    return found


@settings(max_examples=100, deadline=None)
@given(data=st.data(), vocab=st.integers(2, 12), rows=st.integers(1, 4))
def test_penalties_follow_their_formulas(data, vocab, rows):
    ids = st.lists(st.integers(0, vocab - 1), max_size=12)
    numbers = st.lists(st.floats(-8, 8, width=32), min_size=vocab, max_size=vocab)
    logits = [data.draw(numbers) for _ in range(rows)]
    values = [
        {
            "repetition_penalty": data.draw(st.sampled_from([1.0, 0.5, 1.1, 2.0])),
            "presence_penalty": data.draw(st.sampled_from([0.0, -1.5, 0.4, 2.0])),
            "frequency_penalty": data.draw(st.sampled_from([0.0, -0.5, 0.3, 2.0])),
            "prompt_ids": data.draw(ids),
            "output_ids": data.draw(ids),
        }
        for _ in range(rows)
    ]
    lists = {name: [own[name] for own in values] for name in values[0]}
    changed = torch.tensor(logits)
    token = sample(changed, batch(rows, temperature=0.0, **lists))
    for i, own in enumerate(values):
        expected = slow_penalties(
            logits[i], own["prompt_ids"], own["output_ids"],
            own["repetition_penalty"], own["presence_penalty"], own["frequency_penalty"],
        )  # fmt: skip
        assert changed[i].tolist() == pytest.approx(expected, abs=1e-5)
        assert expected[token[i]] == pytest.approx(max(expected), abs=1e-5)


def test_repetition_penalty_lowers_logits_of_either_sign():
    logits = torch.tensor([[4.0, -4.0, 4.0, -4.0]])
    penalties = {"repetition_penalty": 2.0, "prompt_ids": [[0]], "output_ids": [[1]]}
    sample(logits, batch(1, temperature=0.0, **penalties))
    assert logits.tolist() == [[2.0, -8.0, 4.0, -4.0]]


def test_presence_and_frequency_look_at_the_output_alone():
    logits = torch.zeros(1, 4)
    penalties = {"presence_penalty": 1.0, "frequency_penalty": 0.5, "prompt_ids": [[0, 0]], "output_ids": [[1, 2, 2]]}
    sample(logits, batch(1, temperature=0.0, **penalties))
    assert logits.tolist() == [[0.0, -1.5, -2.0, 0.0]]


def test_banned_tokens_are_never_drawn():
    logits = torch.zeros(6)
    logits[2] = 50.0
    for params in ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 2.0, "top_p": 0.9, "top_k": 4}):
        rows = 500
        banned = [(row, token) for row in range(rows) for token in (0, 2, 5)]
        found = sample(logits.repeat(rows, 1), batch(rows, **params, banned=banned))
        assert set(found.tolist()) <= {1, 3, 4}
        one = sample(logits.repeat(2, 1), batch(2, temperature=0.0, banned=[(0, 2)]))
        assert one[0] != 2
        assert one[1] == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bans_that_leave_a_row_nothing_do_not_count_there(temperature):
    logits = torch.zeros(3, 6)
    mask = torch.tensor([-torch.inf, -torch.inf, 0.0, 0.0, -torch.inf, -torch.inf])
    banned = [(0, 2), (0, 3), (1, 2), *((2, token) for token in range(6))]
    rules = {"masks": [(0, mask), (1, mask)], "banned": banned, "temperature": temperature}
    seen = [set(), set(), set()]
    for seed in range(60):
        tokens = sample(logits.clone(), batch(3, seed=seed, **rules))
        for found, token in zip(seen, tokens.tolist(), strict=True):
            found.add(token)
    assert seen[0] <= {2, 3}
    assert seen[1] == {3}
    assert len(seen[2]) == (6 if temperature else 1)


def test_bias_is_added_after_the_penalties():
    logits = torch.tensor([[4.0, -4.0, 1.0], [4.0, -4.0, 1.0]])
    bias = [(1, torch.tensor([2, 0]), torch.tensor([5.0, -1.0]))]
    penalties = {"repetition_penalty": 2.0, "prompt_ids": [[0], [0]], "output_ids": [[2], [2]]}
    sample(logits, batch(2, temperature=0.0, bias=bias, **penalties))
    assert logits.tolist() == [[2.0, -4.0, 0.5], [1.0, -4.0, 5.5]]


def test_logprobs_are_the_log_softmax():
    logits = torch.randn(9, 700, generator=torch.Generator().manual_seed(6)) * 3
    chosen = torch.arange(9) * 70
    own, ranks, best, ids = logprobs(logits, chosen, 5)
    reference = logits.double().log_softmax(-1)
    torch.testing.assert_close(own.double(), reference[torch.arange(9), chosen], atol=1e-5, rtol=0)
    torch.testing.assert_close(best.double(), reference.sort(descending=True).values[:, :5], atol=1e-5, rtol=0)
    assert ids.equal(reference.argsort(descending=True)[:, :5])
    assert all(high >= low for row in best.tolist() for high, low in pairwise(row))
    order = logits.argsort(dim=-1, descending=True)
    assert ranks.tolist() == [row.index(token) + 1 for row, token in zip(order.tolist(), chosen.tolist(), strict=True)]
    own, _, best, ids = logprobs(logits, chosen, 0)
    assert own.shape == (9,)
    assert best.shape == ids.shape == (9, 0)
    assert logprobs(logits[:, :3], torch.zeros(9, dtype=torch.int64), 20)[2].shape == (9, 3)


def test_tokens_that_tie_share_the_better_rank():
    ranks = logprobs(torch.tensor([[1.0, 3.0, 3.0, 2.0]]).repeat(4, 1), torch.arange(4), 0)[1]
    assert ranks.tolist() == [4, 1, 1, 3]
