"""A model of two classes whose answer changes at another probability than one half."""

from __future__ import annotations

from torch import Tensor, nn

from clead.models.changed_logits import ChangedLogits
from clead.models.split import wrapped
from clead.tasks import Task
from clead.tasks.binary import Binary


class AtThreshold(ChangedLogits):
    """``model`` with ``shift`` added to its first logit, so that the larger of two logits is the answer at a threshold.

    >>> import torch
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    >>> (AtThreshold(net, 3.0)(torch.zeros(1, 1, 1, 1)) - net(torch.zeros(1, 1, 1, 1))).round().tolist()
    [[3.0, 0.0]]
    """

    def __init__(self, model: nn.Module, shift: float) -> None:
        super().__init__(model)
        self.shift = shift

    def changed(self, logits: Tensor) -> Tensor:
        """Return the logits, (B, 2), the first of them shifted."""
        return logits + logits.new_tensor([self.shift, 0.0])

    def unshifted(self, logits: Tensor) -> Tensor:
        """Return the model's own logits, of which probabilities are made."""
        return logits - logits.new_tensor([self.shift, 0.0])

    def __repr__(self) -> str:
        return f"{self.model!r} at {self.shift}"


def judged(model: nn.Module, task: Task) -> nn.Module:
    """Return ``model`` as its answers count: with the threshold of a binary task in its logits, any other as it is."""
    if not isinstance(task, Binary) or task.threshold == 0.5 or isinstance(model, AtThreshold):
        return model
    return AtThreshold(wrapped(model), task.shift)
