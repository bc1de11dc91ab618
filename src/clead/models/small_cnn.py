"""A small convolutional network for small grey images (8×8 digits, 28×28 MNIST) and quick runs on a CPU."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from clead.errors import UserError
from clead.models import MODELS
from clead.models.build import ModelSettings, initialise
from clead.models.feature_maps import by_resolution
from clead.settings import setting, settings


class SmallEncoder(nn.Module):
    """Four 3×3 convolutions, strides 1 2 1 2, with batch-norm; a ``pool`` × ``pool`` mean; one linear layer.

    x: (B, C, H, W) -> (B, features). A grid of means, not one mean, is kept because where a stroke is matters
    on digits. Raises UserError if the images are so small that fewer than ``pool`` × ``pool`` cells are left.
    """

    def __init__(self, channels: int, width: int, pool: int, features: int) -> None:
        super().__init__()
        self.pool = pool
        layers: list[nn.Module] = []
        before = channels
        for after, stride in ((width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        self.convolutions = nn.Sequential(*layers)
        self.linear = nn.Linear(before * pool * pool, features)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, (B, features), ≥ 0."""
        cells = self.convolutions(x)
        rows, columns = cells.shape[-2:]
        if min(rows, columns) < self.pool:
            raise UserError(
                f"small_cnn leaves {rows}x{columns} cells of a {x.shape[-2]}x{x.shape[-1]} image, fewer than "
                f"pool = {self.pool} a side; lower pool or use larger images"
            )
        # avg_pool2d with windows that meet the border: as adaptive_avg_pool2d, but with a deterministic
        # backward on CUDA.
        stride = (rows // self.pool, columns // self.pool)
        window = (rows - (self.pool - 1) * stride[0], columns - (self.pool - 1) * stride[1])
        return functional.relu(self.linear(functional.avg_pool2d(cells, window, stride).flatten(1)))

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the last activation of each resolution, finest first."""
        return by_resolution(self.convolutions, x)


@MODELS.register("small_cnn")
@settings
class SmallCNN(ModelSettings):
    """Four convolutions and a linear layer, 0.2 M parameters; images of 5×5 and more."""

    width: int = setting(32, "channels of the first convolution; the others have 2, 2 and 4 times as many", ge=1)
    pool: int = setting(2, "cells per side that the last convolution's output is averaged to", ge=1)
    features: int = setting(128, "dimension of the features", ge=1)

    def encoder(self, channels: int) -> tuple[nn.Module, int]:
        """Return the encoder and its feature dimension."""
        return SmallEncoder(channels, self.width, self.pool, self.features), self.features
