"""A model whose logits are changed before they count, and which is else the model itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from clead.models.split import SplitModel, has_features


class ChangedLogits(SplitModel):
    """``model`` with two logits made of its own; state, names of the parameters and features are those of ``model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(2, getattr(model, "feature_dim", 2))
        self.model = model
        self.has_features = has_features(model)
        self.train(model.training)

    def changed(self, logits: Tensor) -> Tensor:
        """Return the two logits, (B, 2), that count, made of the model's own, (B, K): here those two."""
        return logits

    @property
    def notes(self) -> list[str]:
        """What was decided for the user about inputs and outputs."""
        return getattr(self.model, "notes", [])

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.model, SplitModel):
            features, logits = self.model.features_and_logits(x)
        else:
            features = logits = self.model(x)
        pair = self.changed(logits)
        return (features if self.has_features else pair), pair

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's own state."""
        return self.model.state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Yield the model's parameters by the names that it gives them."""
        return self.model.named_parameters(*args, **kwargs)
