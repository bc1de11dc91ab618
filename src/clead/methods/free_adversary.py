"""Perturbations that go on from step to step: one backward serves the weights and the perturbation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clead.methods.base import StepContext


class PersistentDelta(nn.Module):
    """δ of the minibatch before, and the gradient of the loss by it that its backward left; both (B, C, H, W), at first empty."""

    delta: Tensor
    gradient: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("delta", torch.zeros(0, *shape))
        self.register_buffer("gradient", torch.zeros(0, *shape))

    def fit(self, x: Tensor) -> None:
        """Begin with δ = 0 for as many images as ``x`` has, unless there is a δ for so many."""
        if self.delta.shape != x.shape:
            self.delta, self.gradient = torch.zeros_like(x), torch.zeros_like(x)

    def keep(self, gradient: Tensor) -> None:
        """Remember the gradient; where it overflowed in half precision (the optimiser skips that step too) it counts as 0."""
        self.gradient.copy_(gradient.nan_to_num(0, 0, 0))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **keys: Any) -> None:
        for name in ("delta", "gradient"):  # a saved state knows how many images a batch has
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.delta.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **keys)


def replayed(x: Tensor, step: StepContext) -> Tensor:
    """Return x + δ, (B, C, H, W) with a gradient to come, after the ascent that the backward before has left to do.

    Source: free adversarial training (Shafahi et al. 2019, arXiv:1904.12843, algorithm 1): each backward gives ∇_θ and ∇_δ, then
    δ ← Π(δ + eps·sign ∇_δ). δ starts at 0 and goes on from minibatch to minibatch in ``step.state``; without one it is 0.

    Departures: the ascent step is the threat's, for every norm, of length eps; Π is onto ball ∩ [0, 1] around x, where the paper
    clips δ to the ball and x + δ to [0, 1], so what left the box is forgotten before the next minibatch. The gradient is taken in
    train mode, as in the paper and unlike that of an inner attack here.
    """
    persistent = (
        step.state if isinstance(step.state, PersistentDelta) else PersistentDelta(tuple(x.shape[1:])).to(x.device)
    )
    persistent.fit(x)
    x_adv = step.threat.project(
        step.threat.ascend(x + persistent.delta, persistent.gradient, float(step.threat.eps)), x
    )
    persistent.delta = x_adv - x
    x_adv.requires_grad_().register_hook(persistent.keep)
    return x_adv.clone()  # a model that normalises in place may not write into a leaf
