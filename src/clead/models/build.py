"""From settings to an initialised model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from clead.models.normalize import Normalize
from clead.models.seeding import fork_rng
from clead.models.split import Classifier, SplitModel
from clead.settings import setting, settings


@settings
class ModelSettings(ABC):
    """What the settings of every model have in common."""

    normalize: Literal["data", "none"] = setting(
        "data", "data: the first layer standardises by the training set's mean and std; none: pixels as they are"
    )

    @abstractmethod
    def encoder(self, channels: int) -> tuple[nn.Module, int]:
        """Return the initialised encoder of (B, ``channels``, H, W) images, and its feature dimension D."""

    def build(
        self,
        channels: int,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        sample_shape: tuple[int, int, int] | None = None,
    ) -> SplitModel:
        """Return the model of (B, ``channels``, H, W) images.

        mean, std: the training set's, one number per channel. sample_shape: (C, H, W), for models that must
        run once to be built. Initialisation draws from the global generator; ``build_model`` seeds it.
        """
        encoder, feature_dim = self.encoder(channels)
        return Classifier(first_layer(self.normalize, mean, std), encoder, nn.Linear(feature_dim, num_classes))


def first_layer(normalize: str, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """Return the normalisation that the setting ``normalize`` asks for."""
    return Normalize(mean, std) if normalize == "data" else nn.Identity()


def build_model(
    settings: Any,
    channels: int,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    seed: int,
    sample_shape: tuple[int, int, int],
    pretrained: bool = True,
) -> SplitModel:
    """Return the model of ``settings`` on the CPU, its weights a function of ``seed``.

    sample_shape: (C, H, W) of one image. mean, std: C numbers each, in pixel units. The global
    random state stays untouched. pretrained: False where all weights are loaded afterwards, so that published ones, if
    ``settings`` ask for them, are not. Raises UserError for a model that cannot take these images.
    """
    if not pretrained and hasattr(settings, "untrained"):
        settings = settings.untrained()
    with fork_rng(seed):
        return settings.build(channels, num_classes, mean, std, sample_shape)


def initialise(module: nn.Module) -> None:
    """Draw convolutions from N(0, 2 / fan_out) (He et al. 2015, arXiv:1502.01852, eq. 14).

    It is the robustness field's usual start. Batch-norm has weight 1 and bias 0, and linear layers keep
    PyTorch's initialisation.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
