"""Networks that answer for every pixel: an encoder with maps of several resolutions, a decoder, and a 1×1 classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from clead.models.modes import attack_mode
from clead.models.split import SplitModel
from clead.tasks.segmentation import upsampled


class MapEncoder(Protocol):
    """An encoder whose activations can be had before they are averaged over the image."""

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the last activation of each resolution, (B, C_i, H_i, W_i), finest first."""
        ...


class SegmentationModel(SplitModel):
    """f(x) = g(d(e(x))), upsampled to x: encoder e, decoder d, and a linear classifier g of each cell.

    Features are d(e(x)), (B, D, h, w), logits (B, K, H, W). The encoder's weights have the names that they have in a classifier, so
    that ``train.start_from`` takes them from one; the decoder's begin as they are drawn.
    """

    new_parts = ("decoder",)
    """What has no counterpart in a classifier whose weights it begins with."""

    def __init__(
        self, normalize: nn.Module, encoder: nn.Module, decoder: nn.Module, feature_dim: int, classes: int
    ) -> None:
        super().__init__(classes, feature_dim)
        self.normalize = normalize
        self.encoder = encoder
        self.decoder = decoder
        self.classifier = nn.Conv2d(feature_dim, classes, 1)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.decoder(cast(MapEncoder, self.encoder).maps(self.normalize(x)))
        return features, upsampled(self.classifier(features), x.shape[2:])


def convolution(inputs: int, outputs: int, kernel: int = 3, dilation: int = 1) -> nn.Sequential:
    """Return a convolution that keeps the size, batch-norm and ReLU."""
    padding = dilation * (kernel // 2)
    layer = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def map_channels(encoder: nn.Module, channels: int, size: Sequence[int]) -> list[int]:
    """Return the channels of each of the encoder's maps, from a forward of one image of ``size`` (H, W) in evaluation mode."""
    with attack_mode(encoder), torch.no_grad():
        return [cells.shape[1] for cells in cast(MapEncoder, encoder).maps(torch.zeros(1, channels, *size))]
