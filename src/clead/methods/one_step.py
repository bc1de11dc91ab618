"""What methods have in common whose adversarial image is one step away from a starting point of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clead.methods.base import StepContext


def noise(x: Tensor, step: StepContext) -> Tensor:
    """Return η, uniform in the ball of radius eps around 0 and like ``x`` in shape; x + η may leave [0, 1]."""
    if not step.threat.eps:
        return torch.zeros_like(x)
    grey = torch.full_like(x, 0.5)
    return step.threat.random_start(grey, generator=step.generator) - grey


class Turns(nn.Module):
    """How often it was asked, from 0 on; kept with checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def next(self) -> int:
        """Return the number of calls before this one."""
        self.count += 1
        return self.count - 1

    def get_extra_state(self) -> int:
        """Return what a checkpoint keeps besides tensors."""
        return self.count

    def set_extra_state(self, state: int) -> None:
        """Take up what a checkpoint kept."""
        self.count = state
