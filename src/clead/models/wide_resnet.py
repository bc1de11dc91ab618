"""Wide residual networks (Zagoruyko & Komodakis 2016, arXiv:1605.07146)."""

from __future__ import annotations

from torch import nn

from clead.models import MODELS
from clead.models.build import ModelSettings
from clead.models.preact_resnet import PreActEncoder
from clead.settings import Probability, setting, settings


def wide_encoder(channels: int, depth: int, widen: int, dropout: float) -> tuple[nn.Module, int]:
    """Return the encoder of WRN-``depth``-``widen`` and its feature dimension, 64 × ``widen``."""
    blocks = (depth - 4) // 6
    widths = (16 * widen, 32 * widen, 64 * widen)
    return PreActEncoder(channels, 16, widths, (blocks, blocks, blocks), dropout), widths[-1]


@MODELS.register("wrn_28_10")
@settings
class WideResNet28(ModelSettings):
    """WRN-28-10 (Zagoruyko & Komodakis 2016, sec. 3); 36.5 M parameters."""

    widen: int = setting(10, "how many times wider than the basic network (16, 32, 64 channels)", ge=1)
    dropout: Probability = setting(0.0, "probability of dropout between the convolutions of a block")

    def encoder(self, channels: int) -> tuple[nn.Module, int]:
        """Return the encoder and its feature dimension, 64 × widen."""
        return wide_encoder(channels, 28, self.widen, self.dropout)


@MODELS.register("wrn_34_10")
@settings
class WideResNet34(ModelSettings):
    """WRN-34-10, TRADES's large model (Zhang et al. 2019, arXiv:1901.08573, sec. 5); 46.2 M parameters."""

    widen: int = setting(10, "how many times wider than the basic network (16, 32, 64 channels)", ge=1)
    dropout: Probability = setting(0.0, "probability of dropout between the convolutions of a block")

    def encoder(self, channels: int) -> tuple[nn.Module, int]:
        """Return the encoder and its feature dimension, 64 × widen."""
        return wide_encoder(channels, 34, self.widen, self.dropout)
