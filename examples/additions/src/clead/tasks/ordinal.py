"""Ordered classes: an answer that misses by a little is right."""

from __future__ import annotations

import torch
from torch import Tensor

from clead.settings import setting, settings
from clead.tasks import TASKS
from clead.tasks.classification import Classification


@TASKS.register("ordinal")
@settings
class Ordinal(Classification):
    """Classes 0 … K−1 in an order, such as ages: the largest logit may lie up to ``tolerance`` classes beside the label."""

    tolerance: int = setting(1, "how many classes an answer may miss by", ge=0, unit="classes")

    def _near(self, outputs: Tensor, target: Tensor) -> Tensor:
        classes = torch.arange(outputs.shape[1], device=outputs.device)
        return (classes - target[:, None]).abs() <= self.tolerance

    def margin(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the largest far logit minus the largest near one, (B,); above 0 iff wrong."""
        near = self._near(outputs, target)
        far, close = (outputs.masked_fill(hidden, -torch.inf).amax(1) for hidden in (near, ~near))
        return far - close

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """−log of the probability of all near classes, (B,)."""
        near = outputs.masked_fill(~self._near(outputs, target), -torch.inf)
        return outputs.logsumexp(1) - near.logsumexp(1)

    def correct(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return where the largest logit is near the label's and all logits are finite, (B,) bool."""
        return ((outputs.argmax(1) - target).abs() <= self.tolerance) & torch.isfinite(outputs).all(1)

    def rival(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the far class of the largest logit, (B,) int64."""
        return outputs.masked_fill(self._near(outputs, target), -torch.inf).argmax(1)

    def describe(self) -> str:
        """Return in one line what is right."""
        return f"an image is right if the class of the largest logit is at most {self.tolerance} beside its label"
