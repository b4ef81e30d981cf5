"""Processes that train together: each takes some of a step's passes, and all have the same weights after it.

Without a group of processes, each function does what one process alone needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def join(rank: int, processes: int, meeting: str) -> None:
    """Become one of the processes that meet at the file `meeting`, which must not exist before."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@torch.no_grad()
def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, the same to the last bit in all of them."""
    if processes() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        _fill(tensors, flat)


@torch.no_grad()
def hand_out(tensors: Sequence[Tensor], sender: int) -> None:
    """Replace each tensor by the one that the process `sender` has."""
    if processes() > 1 and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.broadcast(flat, sender)
        _fill(tensors, flat)


def gather(value: T) -> list[T]:
    """What each process passed, in their order."""
    if processes() == 1:
        return [value]
    values: list[T | None] = [None] * processes()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def _fill(tensors: Sequence[Tensor], flat: Tensor) -> None:
    for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))
