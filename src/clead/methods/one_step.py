"""What methods have in common whose adversarial image is one step away from a starting point of their own."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from clead.attacks.gradient import value_and_gradient
from clead.methods.base import Method, StepContext
from clead.methods.pgd_at import PGDAT
from clead.models.fold_batch_norm import folded
from clead.models.modes import attack_mode
from clead.models.split import SplitModel
from clead.settings import settings


@settings
class OneStep(PGDAT):
    """Adversarial training with one step of ascent; a subclass says where it starts. ``attack`` is not used."""

    def __post_init__(self) -> None:
        """Refuse replays, which have no attack."""
        super().__post_init__()
        if self.replays > 1:
            raise ValueError(f"replays go with no attack of one step, got replays {self.replays}; set it to 1")

    gather_state = Method.gather_state  # all processes have the same, and no δ of their own
    shard_state = Method.shard_state

    def noise(self, x: Tensor, step: StepContext) -> Tensor:
        """Return η, uniform in the ball of radius eps around 0 and like ``x`` in shape; x + η may leave [0, 1]."""
        if not step.threat.eps:
            return torch.zeros_like(x)
        grey = torch.full_like(x, 0.5)
        return step.threat.random_start(grey, generator=step.generator) - grey

    def gradient(self, model: SplitModel, x: Tensor, y: Tensor, start: Tensor, step: StepContext) -> Tensor:
        """Return the gradient of J for ``x`` and ``y`` at ``start``, (B, C, H, W)."""
        with attack_mode(model, step.attack_mode), folded(model, x) if self.fold_batch_norm else nullcontext():
            return value_and_gradient(self.inner_objective(model, x, y, step), start)[1]


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
