"""One of several labels as a classifier of two classes: without it, and with it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from clead.models.split import SplitModel, has_features


class OneLabel(SplitModel):
    """``model`` with the logits [0, z] of its label number ``label``; state, parameters and features are those of ``model``.

    >>> OneLabel(nn.Flatten(), 1)(Tensor([[[[3.0, 2.0]]]])).tolist()
    [[0.0, 2.0]]
    """

    def __init__(self, model: nn.Module, label: int) -> None:
        super().__init__(2, getattr(model, "feature_dim", 2))
        self.model, self.label = model, label
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
        pair = functional.pad(logits[:, self.label : self.label + 1], (1, 0))
        return (features if self.has_features else pair), pair

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's own state."""
        return self.model.state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Yield the model's parameters by the names that it gives them."""
        return self.model.named_parameters(*args, **kwargs)

    def __repr__(self) -> str:
        return f"{self.model!r} label {self.label}"
