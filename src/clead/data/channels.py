"""Mean and standard deviation of the pixels of each channel."""

from __future__ import annotations

import torch

from clead.interfaces import Splits


def mean_std(splits: Splits) -> tuple[list[float], list[float]]:
    """Return per-channel mean and standard deviation of the training images, in [0, 1]; a constant channel gets std 1.

    Of images that are streamed a sample counts, see ``StreamedImages.histogram``.
    """
    # By histogram: exact, and without a float copy of the whole set.
    images = splits.train.images
    if isinstance(images, torch.Tensor):
        counts = torch.stack([torch.bincount(channel.reshape(-1), minlength=256) for channel in images.unbind(1)])
    else:
        counts = images.histogram()
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts * value).sum(1) / counts.sum(1)
    std = ((counts * value**2).sum(1) / counts.sum(1) - mean**2).clamp_min(0).sqrt()
    std = torch.where(std < 1e-6, torch.ones_like(std), std)
    return [round(v, 6) for v in mean.tolist()], [round(v, 6) for v in std.tolist()]
