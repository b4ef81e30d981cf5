"""An engine in this process, set up as the server sets up its own, and what this machine can do at best."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyllm.benchmarks.checkpoint import write_shape
from pyllm.engine.client.launch import THREAD_SETTINGS

# OpenMP reads its settings when torch loads it, so they come first.
if "OMP_WAIT_POLICY" not in os.environ:
    for name, value in THREAD_SETTINGS.items():
        os.environ.setdefault(name, value)

import torch
import torch.nn.functional as F

from pyllm.engine.llm import LLM
from pyllm.engine.messages import SamplingParams

READ_BYTES = 1 << 30
"""Far more than any cache holds."""


@contextlib.contextmanager
def open_llm(shape: str, **engine_args: Any) -> Iterator[LLM]:
    """An engine with random weights of a shape."""
    with tempfile.TemporaryDirectory() as name:
        write_shape(Path(name) / shape, shape)
        settings = {"load_format": "dummy", "seed": 0, "quiet": True} | engine_args
        yield LLM(str(Path(name) / shape), **settings)


def greedy(tokens: int) -> SamplingParams:
    """Exactly so many tokens, the most likely ones."""
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """The times of a piece of work, after one run that does not count."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """The median of its times."""
    return statistics.median(seconds(work, repeats))


@torch.inference_mode()
def read_bandwidth(repeats: int = 8) -> float:
    """Bytes per second that all threads together read from memory: the best of several ways to read a large tensor."""
    numbers = torch.ones(READ_BYTES // 4)
    matrix = torch.ones(READ_BYTES // 2, dtype=torch.bfloat16).view(-1, 4096)
    row = torch.ones(1, 4096, dtype=torch.bfloat16)
    ways: list[Callable[[], object]] = [
        numbers.sum, numbers.view(torch.int64).sum, numbers.amax, lambda: F.linear(row, matrix),
    ]  # fmt: skip
    return READ_BYTES / min(min(seconds(way, repeats)) for way in ways)


@torch.inference_mode()
def matmul_rate(dtype: torch.dtype, repeats: int = 5) -> float:
    """Multiplications and additions per second in products of square matrices, at the best of several sizes."""

    def rate(size: int) -> float:
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        return 2 * size**3 / min(seconds(lambda: F.linear(a, b), repeats))

    return max(map(rate, (1024, 2048, 4096)))
