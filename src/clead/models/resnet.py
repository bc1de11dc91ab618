"""Residual networks (He et al. 2016, arXiv:1512.03385).

The paper's CIFAR family (ResNet-8, -20), and its ImageNet family (ResNet-18, -34, -50) on a CIFAR stem or its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional

from clead.models import MODELS
from clead.models.build import ModelSettings, initialise
from clead.models.feature_maps import by_resolution
from clead.settings import setting, settings


class Residual(nn.Module):
    """relu(F(x) + shortcut(x)), F two 3×3 convolutions or a bottleneck (He et al. 2016, eq. 2, fig. 5).

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the (first) 3×3 convolution.
        bottleneck: whether F is the 1×1, 3×3, 1×1 bottleneck, ``outputs`` / 4 wide.
        pad: shortcut A of the paper (subsample and pad with zero channels, no parameters), else B (1×1
            convolution).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, bottleneck: bool, pad: bool) -> None:
        super().__init__()
        inner = outputs // 4 if bottleneck else outputs
        # (channels in, channels out, kernel, stride) of each convolution.
        plan = (
            [(inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, outputs, 1, 1)]
            if bottleneck
            else [(inputs, inner, 3, stride), (inner, outputs, 3, 1)]
        )
        layers: list[nn.Module] = []
        for before, after, kernel, step in plan:
            layers += [nn.ReLU()] if layers else []
            layers += [nn.Conv2d(before, after, kernel, step, padding=kernel // 2, bias=False), nn.BatchNorm2d(after)]
        self.residual = nn.Sequential(*layers)
        self.stride, self.padding = stride, outputs - inputs
        self.shortcut: nn.Module | None = None
        if not pad and (stride != 1 or inputs != outputs):
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, H / stride, W / stride)."""
        if self.shortcut is not None:
            identity = self.shortcut(x)
        else:
            # Subsampling as a 1×1 pooling: the backward of a slice is not channels_last, and slows all that comes after it.
            identity = x if self.stride == 1 else functional.avg_pool2d(x, 1, self.stride)
            if self.padding:
                identity = functional.pad(identity, (0, 0, 0, 0, 0, self.padding))
        return functional.relu(self.residual(x) + identity)


class ResNetEncoder(nn.Module):
    """A stem, stages of residual blocks, and the spatial mean.

    The small stem is a 3×3 convolution of stride 1; the large one a 7×7 of stride 2 and 3×3 max-pooling of stride 2 (He et al.
    2016, table 1). Each stage but the first halves height and width. x: (B, C, H, W) -> (B, D), D the width of the last stage.
    """

    def __init__(
        self, channels: int, width: int, depths: Sequence[int], *, bottleneck: bool, pad: bool, stem: str = "small"
    ) -> None:
        super().__init__()
        large = stem == "large"
        convolution = nn.Conv2d(channels, width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        pool = [nn.MaxPool2d(3, 2, 1)] if large else []
        self.stem = nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(), *pool)
        blocks: list[nn.Module] = []
        self.feature_dim = width
        for stage, depth in enumerate(depths):
            outputs = width * 2**stage * (4 if bottleneck else 1)
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(Residual(self.feature_dim, outputs, stride, bottleneck, pad))
                self.feature_dim = outputs
        self.blocks = nn.Sequential(*blocks)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, (B, D)."""
        # Not mean((2, 3)): the layout of its backward is undefined, and slows all that comes after it.
        cells = self.blocks(self.stem(x))
        return functional.avg_pool2d(cells, cells.shape[-2:]).flatten(1)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the output of each stage, finest first."""
        return by_resolution(self.blocks, self.stem(x))


@MODELS.register("resnet8")
@settings
class ResNet8(ModelSettings):
    """ResNet-8 (He et al. 2016, sec. 4.2, n = 1), zero-padded shortcuts (A) as there; 0.08 M parameters."""

    depth: ClassVar[int] = 1
    width: int = setting(16, "channels of the first of three stages; each next one has twice as many", ge=1)

    def encoder(self, channels: int) -> tuple[nn.Module, int]:
        """Return the encoder and its feature dimension, 4 × width."""
        return ResNetEncoder(channels, self.width, 3 * (self.depth,), bottleneck=False, pad=True), 4 * self.width


@MODELS.register("resnet20")
@settings
class ResNet20(ResNet8):
    """ResNet-20 (He et al. 2016, sec. 4.2, n = 3), zero-padded shortcuts (A) as there; 0.27 M parameters."""

    depth = 3


@settings
class ImageNetFamily(ModelSettings):
    """Four stages of residual blocks on either stem (He et al. 2016, table 1), 1×1 shortcuts (B)."""

    depths: ClassVar[tuple[int, int, int, int]]
    bottleneck: ClassVar[bool] = False

    width: int = setting(64, "(bottleneck) channels of the first of four stages; each next one has twice as many", ge=1)
    stem: Literal["small", "large"] = setting(
        "small", "small: 3×3, for images like CIFAR's; large: 7×7 of stride 2 and max-pooling, for 224 pixels."
    )

    def encoder(self, channels: int) -> tuple[nn.Module, int]:
        """Return the encoder and its feature dimension, 8 × width, or 32 × width of bottlenecks."""
        encoder = ResNetEncoder(
            channels, self.width, self.depths, bottleneck=self.bottleneck, pad=False, stem=self.stem
        )
        return encoder, encoder.feature_dim


@MODELS.register("resnet10")
@settings
class ResNet10(ImageNetFamily):
    """ResNet-10: ResNet-18 with one block per stage instead of two, on a CIFAR stem by default; 4.9 M parameters.

    Of width 16 it has 0.3 M parameters, and a training step on a CPU takes as long as ResNet-8's, which has 0.08 M.
    """

    depths = (1, 1, 1, 1)


@MODELS.register("resnet18")
@settings
class ResNet18(ImageNetFamily):
    """ResNet-18 (He et al. 2016, table 1) on a CIFAR stem by default, 1×1 shortcuts (B); 11.2 M parameters."""

    depths = (2, 2, 2, 2)


@MODELS.register("resnet34")
@settings
class ResNet34(ImageNetFamily):
    """ResNet-34 (He et al. 2016, table 1) on a CIFAR stem by default, 1×1 shortcuts (B); 21.3 M parameters."""

    depths = (3, 4, 6, 3)


@MODELS.register("resnet50")
@settings
class ResNet50(ImageNetFamily):
    """ResNet-50 (He et al. 2016, table 1) on a CIFAR stem by default, 1×1 shortcuts (B); 23.5 M parameters.

    The stride of a bottleneck is on its 3×3 convolution, not on the first 1×1 as in the paper: the usual
    variant since 2016.
    """

    depths = (3, 4, 6, 3)
    bottleneck = True
