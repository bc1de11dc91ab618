"""A small U-Net (Ronneberger et al. 2015, arXiv:1505.04597) for segmentation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from clead.errors import UserError
from clead.models import MODELS
from clead.models.build import ModelSettings, first_layer, initialise
from clead.models.segmentation import SegmentationModel, convolution
from clead.models.split import SplitModel
from clead.settings import setting, settings


class UNetEncoder(nn.Module):
    """Levels of two convolutions each; every level but the first begins with 2×2 max-pooling."""

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        before = [channels, *widths]
        self.levels = nn.ModuleList(
            nn.Sequential(convolution(inputs, width), convolution(width, width))
            for inputs, width in zip(before, widths, strict=False)
        )
        initialise(self)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the output of each level, finest first."""
        maps = [self.levels[0](x)]
        for level in list(self.levels)[1:]:
            maps.append(level(functional.max_pool2d(maps[-1], 2)))
        return maps


class UNetDecoder(nn.Module):
    """From the coarsest level up: enlarged to the next finer level, joined with it, and two convolutions."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(convolution(coarse + fine, fine), convolution(fine, fine))
            for fine, coarse in zip(widths, widths[1:], strict=False)
        )
        initialise(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return features at the resolution of the first of ``maps``, (B, D, H, W)."""
        *finer, cells = maps
        for level, skip in zip(reversed(self.levels), reversed(finer), strict=True):
            enlarged = functional.interpolate(cells, size=skip.shape[2:], mode="nearest")
            cells = level(torch.cat([enlarged, skip], 1))
        return cells


@MODELS.register("unet")
@settings
class UNet(ModelSettings):
    """U-Net for segmentation, of width 16 and 4 levels: 0.5 M parameters; images of 8×8 and more, of any shape.

    Departures from the paper: batch-norm, padding instead of cropped borders, and nearest enlargement instead of up-convolutions.
    """

    width: int = setting(16, "channels of the first level; each next one has twice as many", ge=1)
    levels: int = setting(4, "resolutions, each half the one before", ge=2, le=8)

    def encoder(self, channels: int) -> tuple[nn.Module, int]:
        """Return the encoder and the channels of its coarsest level."""
        widths = self._widths()
        return UNetEncoder(channels, widths), widths[-1]

    def build(
        self,
        channels: int,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        sample_shape: tuple[int, int, int] | None = None,
    ) -> SplitModel:
        """Return the model of (B, ``channels``, H, W) images -> logits (B, K, H, W); UserError where they are too small."""
        if sample_shape is not None and (side := min(sample_shape[1:])) < 2 ** (self.levels - 1):
            raise UserError(
                f"model.levels: {self.levels} levels halve an image {self.levels - 1} times, got images of "
                f"{sample_shape[2]}x{sample_shape[1]} pixels; give --model.levels {max(2, side.bit_length())}, or larger images"
            )
        encoder, _ = self.encoder(channels)
        layer, decoder = first_layer(self.normalize, mean, std), UNetDecoder(self._widths())
        return SegmentationModel(layer, encoder, decoder, self.width, num_classes)

    def _widths(self) -> list[int]:
        return [self.width * 2**level for level in range(self.levels)]
