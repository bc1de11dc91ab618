"""One of several labels as a classifier of two classes: without it, and with it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from clead.models.changed_logits import ChangedLogits


class OneLabel(ChangedLogits):
    """``model`` with the logits [0, z] of its label number ``label``.

    >>> OneLabel(nn.Flatten(), 1)(Tensor([[[[3.0, 2.0]]]])).tolist()
    [[0.0, 2.0]]
    """

    def __init__(self, model: nn.Module, label: int) -> None:
        super().__init__(model)
        self.label = label

    def changed(self, logits: Tensor) -> Tensor:
        """Return [0, z] of each image, (B, 2)."""
        return functional.pad(logits[:, self.label : self.label + 1], (1, 0))

    def __repr__(self) -> str:
        return f"{self.model!r} label {self.label}"
