"""Between host and device without either waiting for the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """`values`, made on the host, on `device`; a copy to a GPU takes its turn there, and the host continues at once."""
    if device.type != "cuda":
        return values.to(device)
    # From pageable memory the host would wait until the device has done all it was given before.
    return values.pin_memory().to(device, non_blocking=True)


def download(values: Tensor) -> Callable[[], Tensor]:
    """Begin to copy `values` to the host; what is returned waits for that, and gives the copy."""
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
