"""A model of two classes whose answer changes at another probability than one half."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from clead.models.split import SplitModel, has_features, wrapped
from clead.tasks import Task
from clead.tasks.binary import Binary


class AtThreshold(SplitModel):
    """``model`` with ``shift`` added to its first logit, so that the larger of two logits is the answer at a threshold.

    State, names of the parameters and features are those of ``model``.

    >>> import torch
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    >>> (AtThreshold(net, 3.0)(torch.zeros(1, 1, 1, 1)) - net(torch.zeros(1, 1, 1, 1))).round().tolist()
    [[3.0, 0.0]]
    """

    def __init__(self, model: nn.Module, shift: float) -> None:
        super().__init__(2, getattr(model, "feature_dim", 2))
        self.model, self.shift = model, shift
        self.has_features = has_features(model)
        self.train(model.training)

    @property
    def notes(self) -> list[str]:
        """What was decided for the user about inputs and outputs."""
        return getattr(self.model, "notes", [])

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.model, SplitModel):
            features, logits = self.model.features_and_logits(x)
        else:
            features = logits = self.model(x)
        shifted = logits + logits.new_tensor([self.shift, 0.0])
        return (features if self.has_features else shifted), shifted

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's own state."""
        return self.model.state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Yield the model's parameters by the names that it gives them."""
        return self.model.named_parameters(*args, **kwargs)

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
