"""The optimizer of the demo model's matrices."""

from __future__ import annotations

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal (five Newton-Schulz rounds): matrices learn from few tokens."""

    def __init__(self, parameters: list[nn.Parameter], hidden: int, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "initial_lr": lr})
        self.hidden = hidden

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all matrices, stacked ones each for itself."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:  # the first layer has no velocity to weigh
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 0.05)
                update = parameter.grad.lerp(momentum, 0.95)
                # The two halves of kqv_proj read different inputs: each is a matrix of its own.
                blocks = 2 if update.dim() == 2 and update.shape[1] > self.hidden else 1
                x = torch.stack(update.chunk(blocks, dim=-1))
                tall = x.shape[-2] > x.shape[-1]
                x = x.mT if tall else x
                x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = x.mT if tall else x
                scale = max(1.0, x.shape[-2] / x.shape[-1]) ** 0.5
                x = torch.cat(x.unbind(), dim=-1)
                parameter.mul_(1 - 0.02 * group["lr"]).add_(x, alpha=-group["lr"] * scale)
