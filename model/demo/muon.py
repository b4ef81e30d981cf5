"""The optimizer of the demo model's matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyllm.model.demo import parallel


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal (five Newton-Schulz rounds): matrices learn from few tokens."""

    def __init__(self, parameters: list[nn.Parameter], hidden: int, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "initial_lr": lr})
        self.hidden = hidden

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all matrices, stacked ones each for itself; processes that train together share the work."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]  # the first layer has no velocity to weigh
            for number, parameter in enumerate(trained):
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 0.05)
                if number % parallel.processes() == parallel.rank():
                    x, scale = self.orthogonal(parameter.grad.lerp(momentum, 0.95))
                    parameter.mul_(1 - 0.02 * group["lr"]).add_(x, alpha=-group["lr"] * scale)
            for rank in range(parallel.processes()):
                parallel.hand_out(trained[rank :: parallel.processes()], rank)

    def orthogonal(self, update: Tensor) -> tuple[Tensor, float]:
        """The orthogonal matrix nearest to the update, about, and the factor for its shape."""
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
        return torch.cat(x.unbind(), dim=-1), float(scale)
