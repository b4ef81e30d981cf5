"""Drawing the next token of every sequence at once, without ever sorting the vocabulary.

A draw depends on its own row, seed and position alone: the random number is a hash of (seed,
position), and it is looked up in the cumulative distribution in the order of token ids. So a seeded
sequence gives the same tokens whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .transfer import upload

FIRST_CANDIDATES = 128
_MASK_53 = (1 << 53) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBatch:
    """What `sample` needs of N rows. Every tensor is [N] unless stated; None means that no row uses it.

    Attributes:
        temperature: FP32; 0 is greedy.
        top_k: int64; 0 keeps all.
        top_p: FP32 in (0, 1].
        min_p: FP32 in [0, 1].
        seed: int64.
        position: int64, tokens before the one to draw; with `seed` the key of the random number.
        repetition_penalty: FP32 [R].
        presence_penalty: FP32 [R].
        frequency_penalty: FP32 [R].
        penalty_rows: int64 [R], the rows that have a penalty.
        token_ids: (tokens so far, how many of them are the prompt) of each such row.
        bias: (rows int64 [B], token ids int64 [B], FP32 [B]), added to single scores.
        masks: (row, FP32 [vocab]) pairs, 0 or -inf: scores to be ruled out whatever is left.
        banned: (rows int64 [K], token ids int64 [K]), scores to be ruled out where that leaves the row anything.
        all_greedy: no row needs a draw.
    """

    temperature: Tensor
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    seed: Tensor
    position: Tensor
    repetition_penalty: Tensor | None
    presence_penalty: Tensor | None
    frequency_penalty: Tensor | None
    penalty_rows: Tensor | None
    token_ids: list[tuple[Sequence[int], int]]
    bias: tuple[Tensor, Tensor, Tensor] | None
    masks: Sequence[tuple[int, Tensor]]
    banned: tuple[Tensor, Tensor] | None
    all_greedy: bool

    @classmethod
    def build(
        cls,
        *,
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        seed: Sequence[int],
        position: Sequence[int],
        device: torch.device,
        min_p: Sequence[float] | None = None,
        repetition_penalty: Sequence[float] | None = None,
        presence_penalty: Sequence[float] | None = None,
        frequency_penalty: Sequence[float] | None = None,
        token_ids: Sequence[tuple[Sequence[int], int]] = (),
        bias: Sequence[tuple[int, Tensor, Tensor]] = (),
        masks: Sequence[tuple[int, Tensor]] = (),
        banned: Sequence[tuple[int, Tensor]] = (),
        full: bool = False,
    ) -> SamplingBatch:
        """Make the tensors of plain lists, one entry per row; what no row uses is left out.

        The last three name the rows that use them, with tensors on `device`: `bias` with different token ids and what
        is added to each, `masks` with an FP32 [vocab], `banned` with token ids (a row may come several times). `full`
        leaves neither top-k nor top-p nor min-p out, for kernels that are compiled anew for every choice of them.
        """
        rows = len(temperature)
        # Of several tokens that tie for the most likely, top-k 1 takes the greedy one.
        temperatures = [0.0 if k == 1 else t for t, k in zip(temperature, top_k, strict=True)]
        repetition = repetition_penalty or [1.0] * rows
        presence = presence_penalty or [0.0] * rows
        frequency = frequency_penalty or [0.0] * rows
        penalised = [i for i in range(rows) if repetition[i] != 1.0 or presence[i] != 0.0 or frequency[i] != 0.0]

        def floats(values: Sequence[float]) -> Tensor:
            return upload(torch.tensor(values, dtype=torch.float32), device)

        def ints(values: Sequence[int]) -> Tensor:
            return upload(torch.tensor(values, dtype=torch.int64), device)

        return cls(
            temperature=floats(temperatures),
            top_k=ints([max(k, 0) for k in top_k]) if full or any(k > 0 for k in top_k) else None,
            top_p=floats(top_p) if full or any(p < 1.0 for p in top_p) else None,
            min_p=floats(min_p) if min_p and (full or any(min_p)) else None,
            seed=ints(seed),
            position=ints(position),
            repetition_penalty=floats([repetition[i] for i in penalised]) if penalised else None,
            presence_penalty=floats([presence[i] for i in penalised]) if penalised else None,
            frequency_penalty=floats([frequency[i] for i in penalised]) if penalised else None,
            penalty_rows=ints(penalised) if penalised else None,
            token_ids=[token_ids[i] for i in penalised],
            bias=(*_flat([(row, ids) for row, ids, _ in bias]), torch.cat([add for *_, add in bias])) if bias else None,
            masks=masks,
            banned=_flat(banned) if banned else None,
            all_greedy=not any(temperatures),
        )


def _flat(pieces: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """(row, token ids) pairs as one list of rows and one of ids."""
    ids = torch.cat([ids for _, ids in pieces])
    rows = torch.tensor([[row, len(ids)] for row, ids in pieces]).to(ids.device)
    return rows[:, 0].repeat_interleave(rows[:, 1], output_size=len(ids)), ids


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Draw one token per row.

    Penalties, bias and bans come first, then temperature, top-k, top-p and min-p, then the draw.

    Args:
        logits: FP32 [N, vocab]; changed in place by penalties, bias and bans only.
        batch: how each row is drawn.

    Returns:
        int64 [N].
    """
    apply_rules(logits, batch)
    return draw(logits, batch)


def apply_rules(logits: Tensor, batch: SamplingBatch) -> None:
    """Put penalties, bias and bans into the scores, FP32 [N, vocab]."""
    if batch.penalty_rows is not None:
        logits[batch.penalty_rows] = _penalised(logits[batch.penalty_rows], batch)
    if batch.bias is not None:
        rows, ids, add = batch.bias
        logits[rows, ids] += add
    for row, mask in batch.masks:  # one at a time costs less than a copy of all
        logits[row].add_(mask)
    if batch.banned is not None:
        # After all that never yields, so that what is left is known.
        scores = logits[batch.banned]
        logits[batch.banned] = -torch.inf
        nothing_left = logits.amax(dim=-1) == -torch.inf
        logits[batch.banned] = torch.where(nothing_left[batch.banned[0]], scores, -torch.inf)


def draw(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """One token for each row of final scores, FP32 [N, vocab] -> int64 [N]."""
    greedy = _argmax(logits)
    if batch.all_greedy:
        return greedy
    random_rows = batch.temperature > 0
    temperature = torch.where(random_rows, batch.temperature, 1.0)
    # The row's maximum is taken out first, so that a tiny temperature overflows to -inf and not to NaN.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]
    probs = scaled.softmax(dim=-1)
    probs = torch.where(probs >= _threshold(probs, batch)[:, None], probs, 0.0)
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    target = uniform(batch.seed, batch.position) * cumulative[:, -1]
    drawn = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)
    return torch.where(random_rows, drawn.clamp(max=logits.shape[-1] - 1), greedy)


def _argmax(logits: Tensor) -> Tensor:
    # NumPy's is vectorised on the CPU and six times as fast as torch's.
    if logits.device.type == "cpu" and not logits.requires_grad:
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def logprobs(logits: Tensor, chosen: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities and ranks of raw scores.

    Args:
        logits: FP32 [N, vocab], before penalties and temperature.
        chosen: int64 [N].
        top: how many of the most likely tokens to report.

    Returns:
        FP32 [N] of the chosen tokens; int64 [N], 1 for each chosen one that none is likelier than; FP32 [N, top] and
        int64 [N, top] of the most likely, best first.
    """
    scores = logits.log_softmax(dim=-1)
    best, ids = scores.topk(min(top, scores.shape[-1]), dim=-1)
    own = chosen[:, None]
    ranks = (logits > logits.gather(1, own)).sum(dim=-1) + 1
    return scores.gather(1, own).squeeze(1), ranks, best, ids


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """FP64 numbers in [0, 1), a hash of int64 (seed, position): SplitMix64 (Steele, Lea, Flood 2014), twice."""
    mixed = _splitmix(_splitmix(seed) + position)
    return (mixed >> 11 & _MASK_53).double() * 2.0**-53


def _splitmix(x: Tensor) -> Tensor:
    # int64 products wrap around as the unsigned ones do; a masked arithmetic shift is a logical one.
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _penalised(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Scores [R, vocab] with repetition, presence and frequency penalties (OpenAI's and CTRL's formulas)."""
    assert batch.repetition_penalty is not None  # for the type checker
    assert batch.presence_penalty is not None
    assert batch.frequency_penalty is not None
    counts = _token_counts([tokens[prompt:] for tokens, prompt in batch.token_ids], logits)
    seen = _token_counts([tokens for tokens, _ in batch.token_ids], logits) > 0
    repetition = batch.repetition_penalty[:, None]
    logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    logits = logits - batch.frequency_penalty[:, None] * counts
    return logits - batch.presence_penalty[:, None] * (counts > 0)


def _token_counts(ids: list[Sequence[int]], like: Tensor) -> Tensor:
    """How often each token occurs in each row's ids: FP32 [R, vocab]."""
    flat = torch.tensor([token for row in ids for token in row], dtype=torch.int64, device=like.device)
    rows = torch.tensor([i for i, row in enumerate(ids) for _ in row], dtype=torch.int64, device=like.device)
    counts = torch.zeros_like(like)
    return counts.index_put_((rows, flat), torch.ones((), device=like.device), accumulate=True)


def _threshold(probs: Tensor, batch: SamplingBatch) -> Tensor:
    """The smallest probability that each row keeps [N], by top-k, then top-p of what that leaves, then min-p.

    Only the most likely tokens are looked at: as many as the largest top-k asks for, or few at first and
    eight times as many while some row's top-p is not yet reached.
    """
    rows, vocab = probs.shape
    threshold = torch.zeros(rows, device=probs.device)
    if batch.min_p is not None:
        threshold = batch.min_p * probs.amax(dim=-1)
    if batch.top_k is None and batch.top_p is None:
        return threshold
    everything = torch.full((rows,), vocab, device=probs.device)
    top_k = everything if batch.top_k is None else torch.where(batch.top_k > 0, batch.top_k, vocab).clamp(max=vocab)
    top_p = torch.ones(rows, device=probs.device) if batch.top_p is None else batch.top_p
    limited = top_k < vocab
    count = min(vocab, max(FIRST_CANDIDATES, int(torch.where(limited, top_k, 0).max())))
    while True:
        best = probs.topk(count, dim=-1).values  # [N, count]
        sums = best.cumsum(dim=-1, dtype=torch.float64)
        total = torch.where(limited, sums.gather(1, top_k.clamp(max=count)[:, None] - 1).squeeze(1), 1.0)
        wanted = top_p * total
        if count == vocab or bool((limited | (top_p >= 1.0) | (sums[:, -1] >= wanted)).all()):
            break
        count = min(vocab, count * 8)
    by_k = torch.where(limited, best.gather(1, top_k.clamp(max=count)[:, None] - 1).squeeze(1), 0.0)
    last = torch.searchsorted(sums, wanted[:, None]).clamp(max=count - 1)
    by_p = torch.where(top_p < 1.0, best.gather(1, last).squeeze(1), 0.0)
    return torch.maximum(threshold, torch.maximum(by_k, by_p))
