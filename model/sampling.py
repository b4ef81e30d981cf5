"""Draw the next token of every sequence at once, without sorting the vocabulary.

A draw depends on its own row, seed and position alone: the random number is a hash of (seed, position), and it is
looked up in the cumulative distribution in the order of token ids. So a seeded sequence gives the same tokens in any
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .draw_params import DrawParams

FIRST_CANDIDATES = 128
_MASK_53 = (1 << 53) - 1


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy `values` from the host to `device`; a copy to a GPU is queued there, and the host does not wait."""
    if device.type != "cuda":
        return values.to(device)
    # From pageable memory the host would wait until the device has finished all earlier work.
    return values.pin_memory().to(device, non_blocking=True)


def download(values: Tensor) -> Callable[[], Tensor]:
    """Begin to copy `values` to the host; return a function that waits for the copy and returns it."""
    if values.device.type != "cuda":
        copy = values.clone()
        return lambda: copy
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> Tensor:
        arrived.synchronize()
        return host

    return wait


def sampling_rows(params: Sequence[DrawParams], positions: Sequence[int]) -> dict[str, Sequence[float]]:
    """List each row's values for the fields of `SamplingBatch`; `positions` are those of the new tokens."""
    return {
        # If several tokens tie for the most likely, top-k 1 chooses the greedy one.
        "temperature": [0.0 if p.top_k == 1 else p.temperature for p in params],
        "top_k": [max(p.top_k, 0) for p in params],
        "top_p": [p.top_p for p in params],
        "min_p": [p.min_p for p in params],
        "seed": [p.seed or 0 for p in params],
        "position": positions,
    }


@dataclass(frozen=True, slots=True)
class Penalties:
    """The penalties of the R rows that have one."""

    rows: Tensor  # int64 [R]
    strengths: Tensor  # FP32 [R, 3]: repetition, presence, frequency
    token_ids: list[tuple[Sequence[int], int]]  # the row's tokens so far, and how many of those are the prompt

    @classmethod
    def build(
        cls, params: Sequence[DrawParams], token_ids: Sequence[tuple[Sequence[int], int]], device: torch.device
    ) -> Penalties | None:
        """Find the rows that have a penalty; None if no row has."""
        rows = [
            row for row, p in enumerate(params)
            if p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty
        ]  # fmt: skip
        if not rows:
            return None
        found = [params[row] for row in rows]
        strengths = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in found]
        return cls(_ints(rows, device), _floats(strengths, device), [token_ids[row] for row in rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBatch:
    """The input of `sample` for N rows; None where no row uses it."""

    temperature: Tensor  # FP32 [N]; 0 is greedy
    top_k: Tensor | None  # int64 [N]; 0 keeps all
    top_p: Tensor | None  # FP32 [N]
    min_p: Tensor | None  # FP32 [N]
    seed: Tensor  # int64 [N]
    position: Tensor  # int64 [N], tokens before the one to draw; with `seed` the key of the random number
    all_greedy: bool = False
    penalties: Penalties | None = None
    bias: tuple[Tensor, Tensor, Tensor] | None = None  # rows int64 [B], token ids int64 [B], FP32 [B] to add
    masks: Sequence[tuple[int, Tensor]] = ()  # (row, FP32 [vocab] of 0 or -inf), applied even if no token is left
    banned: tuple[Tensor, Tensor] | None = (
        None  # rows and token ids, int64 [K]; banned unless that leaves the row no token
    )

    @classmethod
    def build(
        cls,
        params: Sequence[DrawParams],
        positions: Sequence[int],  # of the new tokens
        device: torch.device,
        *,
        token_ids: Sequence[tuple[Sequence[int], int]] = (),  # (tokens so far, how many are the prompt), for penalties
        bias: Sequence[tuple[int, Tensor, Tensor]] = (),  # (row, different token ids, the value added to each)
        masks: Sequence[tuple[int, Tensor]] = (),
        banned: Sequence[tuple[int, Tensor]] = (),  # (row, token ids); a row may occur several times
        full: bool = False,  # also make tensors that no row uses, so that a kernel needs only one compiled variant
    ) -> SamplingBatch:
        """Make the tensors of N rows."""
        rows = sampling_rows(params, positions)
        return cls(
            temperature=_floats(rows["temperature"], device),
            top_k=_ints(rows["top_k"], device) if full or any(rows["top_k"]) else None,
            top_p=_floats(rows["top_p"], device) if full or any(p < 1.0 for p in rows["top_p"]) else None,
            min_p=_floats(rows["min_p"], device) if full or any(rows["min_p"]) else None,
            seed=_ints(rows["seed"], device),
            position=_ints(positions, device),
            all_greedy=not any(rows["temperature"]),
            penalties=Penalties.build(params, token_ids, device),
            bias=(*_flat([(row, ids) for row, ids, _ in bias]), torch.cat([add for *_, add in bias])) if bias else None,
            masks=masks,
            banned=_flat(banned) if banned else None,
        )


def _floats(values: Sequence[float | tuple[float, ...]], device: torch.device) -> Tensor:
    return upload(torch.tensor(values, dtype=torch.float32), device)


def _ints(values: Sequence[float], device: torch.device) -> Tensor:
    return upload(torch.tensor(values, dtype=torch.int64), device)


def _flat(pieces: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """Flatten (row, token ids) pairs into one tensor of rows and one of ids."""
    ids = torch.cat([ids for _, ids in pieces])
    rows = torch.tensor([[row, len(ids)] for row, ids in pieces]).to(ids.device)
    return rows[:, 0].repeat_interleave(rows[:, 1], output_size=len(ids)), ids


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Draw one token per row of raw scores FP32 [N, vocab], which `apply_rules` changes in place -> int64 [N]."""
    apply_rules(logits, batch)
    return draw(logits, batch)


def apply_rules(logits: Tensor, batch: SamplingBatch) -> None:
    """Apply penalties, bias, masks and bans to the scores FP32 [N, vocab], in place."""
    if batch.penalties is not None:
        rows = batch.penalties.rows
        logits[rows] = _penalise(logits[rows], batch.penalties)
    if batch.bias is not None:
        rows, ids, add = batch.bias
        logits[rows, ids] += add
    for row, mask in batch.masks:  # one at a time costs less than a copy of all
        logits[row].add_(mask)
    if batch.banned is not None:
        # Last, since a ban gives way if it leaves the row no token, unlike the other rules.
        scores = logits[batch.banned]
        logits[batch.banned] = -torch.inf
        nothing_left = logits.amax(dim=-1) == -torch.inf
        logits[batch.banned] = torch.where(nothing_left[batch.banned[0]], scores, -torch.inf)


def draw(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Draw one token for each row of final scores, FP32 [N, vocab] -> int64 [N]."""
    greedy = _argmax(logits)
    if batch.all_greedy:
        return greedy
    random_rows = batch.temperature > 0
    temperature = torch.where(random_rows, batch.temperature, 1.0)
    # The row's maximum is subtracted first, so that a tiny temperature overflows to -inf and not to NaN.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]
    probs = scaled.softmax(dim=-1)
    probs = torch.where(probs >= _threshold(probs, batch)[:, None], probs, 0.0)
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    target = uniform(batch.seed, batch.position) * cumulative[:, -1]
    drawn = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)
    return torch.where(random_rows, drawn.clamp(max=logits.shape[-1] - 1), greedy)


def _argmax(logits: Tensor) -> Tensor:
    # On the CPU, NumPy's argmax is vectorised and six times as fast as torch's.
    if logits.device.type == "cpu" and not logits.requires_grad:
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def logprobs(logits: Tensor, chosen: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find log-probabilities and ranks by raw scores FP32 [N, vocab], from before penalties and temperature.

    Returns log-probabilities FP32 [N] and ranks int64 [N] of the `chosen` tokens int64 [N] (1 if no token is likelier),
    then log-probabilities FP32 [N, top] and ids int64 [N, top] of the `top` most likely tokens, best first.
    """
    scores = logits.log_softmax(dim=-1)
    best, ids = scores.topk(min(top, scores.shape[-1]), dim=-1)
    own = chosen[:, None]
    ranks = (logits > logits.gather(1, own)).sum(dim=-1) + 1
    return scores.gather(1, own).squeeze(1), ranks, best, ids


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """Hash int64 (seed, position) to FP64 numbers in [0, 1): SplitMix64 (Steele, Lea, Flood 2014), twice."""
    mixed = _splitmix(_splitmix(seed) + position)
    return (mixed >> 11 & _MASK_53).double() * 2.0**-53


def _splitmix(x: Tensor) -> Tensor:
    # int64 products wrap around like unsigned ones; a masked arithmetic shift is a logical one.
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _penalise(logits: Tensor, penalties: Penalties) -> Tensor:
    """Apply repetition, presence and frequency penalties to scores [R, vocab] (CTRL's and OpenAI's formulas)."""
    counts = _token_counts([tokens[prompt:] for tokens, prompt in penalties.token_ids], logits)
    seen = _token_counts([tokens for tokens, _ in penalties.token_ids], logits) > 0
    repetition, presence, frequency = penalties.strengths.T[:, :, None].unbind()
    logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - frequency * counts - presence * (counts > 0)


def _token_counts(ids: list[Sequence[int]], like: Tensor) -> Tensor:
    """Count each token in each row's ids: FP32 [R, vocab]."""
    flat = torch.tensor([token for row in ids for token in row], dtype=torch.int64, device=like.device)
    rows = torch.tensor([i for i, row in enumerate(ids) for _ in row], dtype=torch.int64, device=like.device)
    counts = torch.zeros_like(like)
    return counts.index_put_((rows, flat), torch.ones((), device=like.device), accumulate=True)


def _threshold(probs: Tensor, batch: SamplingBatch) -> Tensor:
    """Find the smallest probability that each row keeps [N]: by top-k, then top-p of the remaining tokens, then min-p.

    This reads only the most likely tokens: as many as the largest top-k needs, or few at first and eight times as many
    until every row's top-p is reached.
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
