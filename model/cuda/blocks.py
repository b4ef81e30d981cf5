"""How much of an operation one program of a kernel computes at once on a GPU, and by how many warps.

The shapes for BF16 were found on an H200 with `benchmarks/gpu/gpu_tune.py`.

The block's shape chooses a matrix unit's instruction, and the instruction the order of the sum. So where results must
not depend on the number of tokens in a step, no block may depend on it either.
"""

from __future__ import annotations

import torch

BUSY = 264  # programs that keep a large GPU busy: two for each multiprocessor of an H100
WIDE = 64 * BUSY  # from this many columns of weights, the programs that run at once cannot request them all
ONE_BLOCK = 64  # up to this many tokens, each expert runs over all of them and keeps its own, instead of sorting
Shape = dict[str, int]  # constants and launch options of a kernel


def power_of_two(least: int, value: int) -> int:
    """The smallest power of two that is neither below `value` nor below `least`."""
    return max(least, 1 << max(0, value - 1).bit_length())


class Blocks:
    """Blocks by the number of tokens: with few the weights are read at full speed, with many the products are."""

    def __init__(self, exact: bool, generation: int | None) -> None:
        self._exact = exact  # products are FP32, for which matrix units have no instructions
        self._generation = generation  # of the GPU that the kernels are made for: 8, 9, 10 or 12; None is unknown

    def linear(self, tokens: int, columns: int, inner: int, dtype: torch.dtype) -> Shape:
        """The block of a product [tokens, inner] x [columns, inner], whose first factor has this dtype."""
        rows, depth = 16 if tokens <= 16 else 32, power_of_two(16, inner)
        if self._exact:
            return _linear(rows, 32, min(32, depth))
        if columns >= WIDE:
            return _linear(rows, 64, min(128, depth), 2, 3) if rows == 16 else _linear(rows, 128, min(128, depth), 4, 3)
        if tokens > 1024:
            return _linear(64, 64, min(64, depth))
        if tokens > 32:
            return _linear(16, 32, min(256, depth), 4, 3)
        if dtype == torch.float32:
            return _linear(rows, 32, min(4096 // rows, depth), 4, 3 if rows == 16 else 5)
        return _linear(rows, 32 if rows == 16 or columns >= 4096 else 16, min(512, depth), 4, 3)

    def gemv(self, inner: int, matrices: int = 1) -> Shape:
        """The block of a product of rows of `inner` numbers with single tokens, from this many matrices at once."""
        block_k = power_of_two(16, inner)
        held = (8192 if self._exact else 16384) // matrices
        return {"BLOCK_N": max(2, held // block_k), "BLOCK_K": block_k, "num_warps": 4}

    def dynamics(self, few: bool) -> Shape:
        """The block of the dynamics: tokens and columns."""
        block_m, block_n = (16, 32) if self._exact else (16, 16) if few else (64, 32)
        return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4}

    def experts(self, tokens: int) -> tuple[int, int, Shape]:
        """The blocks of the experts' products: columns of gate and of up each, columns of down, and the rest."""
        if self._exact:
            return 32, 32, {"BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
        if tokens <= 32:
            rows, columns = (16, 32) if tokens <= 16 else (32, 16)
            return columns, columns, {"BLOCK_M": rows, "BLOCK_K": 128, "num_warps": 2, "num_stages": 5}
        if tokens <= ONE_BLOCK:
            return 32, 32, {"BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
        if tokens <= 256:
            return 64, 64, {"BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 4}
        if tokens <= 1024:
            return 64, 64, {"BLOCK_M": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
        return 64, 128, {"BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}

    def decode(self, splits: int, programs: int) -> Shape:
        """The block of attention of single new tokens, with keys in `splits` runs, in this many programs: keys."""
        if self._exact:
            return {"BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
        if splits > 4:  # short runs
            return {"BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
        if splits > 1 or programs > 2 * BUSY:
            return {"BLOCK_N": 64, "num_warps": 2, "num_stages": 3}
        # Few programs each read ahead as much as many do together.
        return {"BLOCK_N": 64, "num_warps": 8 if programs <= BUSY else 2, "num_stages": 5}

    def prompt(self) -> Shape:
        """The block of attention over prompts: queries and keys."""
        if self._exact:
            return _prompt(32, 16, 8)
        # Where matrix units do not read from shared memory, more would not fit in registers.
        return _prompt(64, 32 if self._generation in (8, 12) else 64, 4)


class FixedBlocks(Blocks):
    """One shape for each operation; products take 64 tokens, the fewest that a matrix unit of sm_90 takes.

    At batch 1 most of them are padding, whose arithmetic costs nothing while weights are read; prompts are slower than
    with blocks of their own.
    """

    def linear(self, tokens: int, columns: int, inner: int, dtype: torch.dtype) -> Shape:
        """See `Blocks`; the weights' shape may decide, because it is the same in every step."""
        if self._exact:
            return _linear(32, 32, 32)
        return _linear(64, 32 if columns < 64 * 64 else 64, min(64, power_of_two(16, inner)))

    def dynamics(self, few: bool) -> Shape:
        return {"BLOCK_M": 16 if self._exact else 32, "BLOCK_N": 32, "num_warps": 4}

    def experts(self, tokens: int) -> tuple[int, int, Shape]:
        if self._exact:
            return super().experts(tokens)
        return 32, 32, {"BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 6}

    def prompt(self) -> Shape:
        """See `Blocks`; decodes are computed with it as well."""
        return _prompt(32, 16, 8) if self._exact else _prompt(64, 32, 4)


def _linear(block_m: int, block_n: int, block_k: int, warps: int = 4, stages: int = 4) -> Shape:
    shape = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return shape | {"num_warps": warps, "num_stages": stages}


def _prompt(block_m: int, block_n: int, warps: int) -> Shape:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": 2}
