"""A head for segmentation, after DeepLabv3+ (Chen et al. 2018, arXiv:1802.02611), on any encoder of this package."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clead.models import MODELS
from clead.models.build import ModelSettings, first_layer, initialise
from clead.models.segmentation import SegmentationModel, convolution, map_channels
from clead.models.split import SplitModel
from clead.settings import setting, settings, validated


class DeepLabHead(nn.Module):
    """Atrous spatial pyramid pooling of the coarsest map, enlarged to a finer one and joined with it, and a 3×3 convolution.

    The pyramid has a 1×1 convolution, 3×3 ones of dilation 2 and 4 (the paper's 6, 12, 18 are for larger maps), and the mean of
    the image.

    Args:
        channels: of the maps that it gets, finest first.
        width: channels inside, and D of the features.
        skip: which map the pyramid is joined with, by its place among ``channels``; the last one: none.
    """

    def __init__(self, channels: Sequence[int], width: int, skip: int) -> None:
        super().__init__()
        coarse = channels[-1]
        self.skip = skip
        self.pyramid = nn.ModuleList(
            [convolution(coarse, width, 1), *(convolution(coarse, width, 3, d) for d in (2, 4))]
        )
        self.image = nn.Sequential(nn.Conv2d(coarse, width, 1), nn.ReLU())  # of one cell: nothing to normalise
        self.project = convolution(width * 4, width, 1)
        joined = skip < len(channels) - 1
        self.fine = convolution(channels[skip], max(1, width // 4), 1) if joined else None
        self.merge = convolution(width + (max(1, width // 4) if joined else 0), width)
        initialise(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return features at the resolution of the finer map, (B, width, h, w)."""
        cells = maps[-1]
        mean = self.image(functional.avg_pool2d(cells, cells.shape[-2:])).expand(-1, -1, *cells.shape[-2:])
        cells = self.project(torch.cat([*(branch(cells) for branch in self.pyramid), mean], 1))
        if self.fine is None:
            return self.merge(cells)
        finer = maps[self.skip]
        enlarged = functional.interpolate(cells, size=finer.shape[2:], mode="bilinear", align_corners=False)
        return self.merge(torch.cat([enlarged, self.fine(finer)], 1))


@MODELS.register("deeplab")
@settings
class DeepLab(ModelSettings):
    """DeepLabv3+'s head on the encoder of another model of this package, for segmentation.

    ``train.start_from`` a robust classifier of the same encoder is how PIR-AT begins (Croce, Singh & Hein 2023, arXiv:2306.12941).
    """

    backbone: str = setting("resnet10", "the model whose encoder it is, such as resnet10, preact_resnet18 or small_cnn")
    backbone_args: dict[str, Any] = setting(
        default_factory=dict,
        doc="settings of that model, each also as --model.backbone_args.KEY, such as --model.backbone_args.width 16",
    )
    width: int = setting(64, "channels of the head, and size of the features of a cell", ge=4)
    skip: int = setting(
        2,
        "the answer has the resolution of this one of the encoder's activations, 0 being the finest; of the coarsest if there are "
        "fewer",
        ge=0,
    )

    def __post_init__(self) -> None:
        """Refuse a backbone that has no encoder, and arguments that are not its settings."""
        known = [name for name, kind in MODELS.items() if issubclass(kind, ModelSettings) and kind is not DeepLab]
        if self.backbone not in known:
            raise ValueError(
                f"must be one of {', '.join(known)}, got {self.backbone!r}; give --model.backbone resnet10"
            )
        self._backbone_settings()

    def untrained(self) -> DeepLab:
        """Return the settings that make the same network without published weights."""
        published = hasattr(MODELS.get(self.backbone), "untrained")
        return dataclasses.replace(
            self, backbone_args={**self.backbone_args, **({"pretrained": False} if published else {})}
        )

    def encoder(self, channels: int) -> tuple[nn.Module, int]:
        """Return the encoder and its feature dimension in a classifier."""
        return self._backbone_settings().encoder(channels)

    def build(
        self,
        channels: int,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        sample_shape: tuple[int, int, int] | None = None,
    ) -> SplitModel:
        """Return the model of (B, ``channels``, H, W) images -> logits (B, K, H, W)."""
        encoder, _ = self.encoder(channels)
        sizes = map_channels(encoder, channels, (64, 64) if sample_shape is None else sample_shape[1:])
        head = DeepLabHead(sizes, self.width, min(self.skip, len(sizes) - 1))
        return SegmentationModel(first_layer(self.normalize, mean, std), encoder, head, self.width, num_classes)

    def _backbone_settings(self) -> Any:
        return validated(MODELS.get(self.backbone), self.backbone_args, "model.backbone_args")
