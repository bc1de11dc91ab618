"""Wide residual networks (Zagoruyko & Komodakis 2016, arXiv:1605.07146)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from clead.models import MODELS
from clead.models.build import ModelSettings
from clead.models.preact_resnet import PreActEncoder
from clead.settings import Probability, setting, settings


@MODELS.register("wrn_28_10")
@settings
class WideResNet28(ModelSettings):
    """WRN-28-10 (Zagoruyko & Komodakis 2016, sec. 3); 36.5 M parameters."""

    blocks: ClassVar[int] = 4  # per stage: (depth − 4) / 6
    widen: int = setting(10, "how many times wider than the basic network (16, 32, 64 channels)", ge=1)
    dropout: Probability = setting(0.0, "probability of dropout between the convolutions of a block")

    def encoder(self, channels: int) -> tuple[nn.Module, int]:
        """Return the encoder and its feature dimension, 64 × widen."""
        widths = (16 * self.widen, 32 * self.widen, 64 * self.widen)
        return PreActEncoder(channels, 16, widths, 3 * (self.blocks,), self.dropout), widths[-1]


@MODELS.register("wrn_34_10")
@settings
class WideResNet34(WideResNet28):
    """WRN-34-10, TRADES's large model (Zhang et al. 2019, arXiv:1901.08573, sec. 5); 46.2 M parameters."""

    blocks = 5
