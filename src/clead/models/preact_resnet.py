"""Pre-activation residual networks for small images (He et al. 2016b, arXiv:1603.05027)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from clead.models import MODELS
from clead.models.build import ModelSettings, initialise
from clead.models.feature_maps import by_resolution
from clead.settings import setting, settings


class PreActivation(nn.Module):
    """F(a) + shortcut, a = relu(bn(x)), F = conv · relu · bn · conv (He et al. 2016b, fig. 4e).

    Where the shape changes, the shortcut is a 1×1 convolution of a, else it is x. ``dropout`` is the
    probability between the two convolutions (Zagoruyko & Komodakis 2016, arXiv:1605.07146, sec. 2.4).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, H / stride, W / stride)."""
        active = functional.relu(self.norm1(x))
        identity = x if self.shortcut is None else self.shortcut(active)
        inner = functional.relu(self.norm2(self.conv1(active)))
        return self.conv2(self.dropout(inner)) + identity


class PreActEncoder(nn.Module):
    """A 3×3 stem of stride 1, stages of pre-activation blocks, a final batch-norm and ReLU, the spatial mean.

    Each stage after the first halves height and width. x: (B, C, H, W) -> (B, D), D = the last of ``widths``.
    """

    def __init__(
        self, channels: int, stem: int, widths: Sequence[int], depths: Sequence[int], dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, stem, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        before = stem
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for index in range(depth):
                blocks.append(PreActivation(before, width, 2 if stage and not index else 1, dropout))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(before)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, (B, D)."""
        cells = functional.relu(self.norm(self.blocks(self.stem(x))))
        return functional.avg_pool2d(cells, cells.shape[-2:]).flatten(1)  # as in resnet.py: keeps channels_last

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the output of each stage, finest first; the last one after batch-norm and ReLU."""
        *finer, last = by_resolution(self.blocks, self.stem(x))
        return [*finer, functional.relu(self.norm(last))]


@MODELS.register("preact_resnet18")
@settings
class PreActResNet18(ModelSettings):
    """PreAct ResNet-18 (He et al. 2016b) on a CIFAR stem; 11.2 M parameters.

    It ends in a batch-norm and ReLU, as the paper says and as Rice et al. 2020 (arXiv:2002.11569)
    and Wong et al. 2020 (arXiv:2001.03994) train it: 11,172,170 parameters; without that layer there would be
    11,171,146.
    """

    width: int = setting(64, "channels of the first of four stages; each next one has twice as many", ge=1)

    def encoder(self, channels: int) -> tuple[nn.Module, int]:
        """Return the encoder and its feature dimension, 8 × width."""
        widths = [self.width * 2**stage for stage in range(4)]
        return PreActEncoder(channels, self.width, widths, (2, 2, 2, 2)), widths[-1]
