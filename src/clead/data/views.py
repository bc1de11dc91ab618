"""Random views of a batch, on its device, drawn per image.

The functions transform a batch by given parameters, one per image, and draw nothing; `Augmentation` draws.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import field_validator, model_validator
from torch import Tensor

from clead.losses.pixels import VOID
from clead.settings import Probability, setting, settings

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's "L"
_ASPECT = math.log(4 / 3)
_JITTER_PROBABILITY = 0.8
_SHORT = 1e-6  # of one step of the annealing: 0.15 / 0.05 is below 3


@settings
class Augmentation:
    """Random views: crop, flip, colour jitter, greyscale, cutout and Gaussian noise, in this order; all off by default.

    Calling it maps (B, C, H, W) float in [0, 1] to the same shape, and to the same range unless ``gaussian`` is on; all
    randomness comes from the given generator, which lives on the images' device. With everything off, the input itself is
    returned.

    ``anneal`` says how the random box, jitter and greyscale weaken in the course of training; see ``strength``.

    One-channel images: ``color_jitter`` changes brightness and contrast only, and ``greyscale`` does nothing.

    >>> images = torch.rand(4, 3, 32, 32)
    >>> Augmentation(crop=4, flip=True)(images, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([4, 3, 32, 32])
    >>> Augmentation()(images, generator=torch.Generator()) is images
    True
    """

    crop: int = setting(
        0, "Shift each image by up to so many pixels; what comes in is black (zero padding).", unit="pixels", ge=0
    )
    flip: bool = setting(False, "Mirror each image left to right with probability 1/2.")
    random_resized_crop: tuple[float, float] | None = setting(
        None,
        "Zoom into a random box with an area in [min, max] and an aspect ratio in [3/4, 4/3]; excludes crop.",
        unit="fraction of the area",
    )
    color_jitter: float = setting(
        0.0,
        "SimCLR's colour jitter on 4 of 5 images: brightness, contrast, saturation by ±0.8, hue by ±0.2.",
        unit="strength",
        ge=0,
        le=2.5,
    )
    greyscale: Probability = setting(0.0, "Probability that an image loses its colour.", unit="probability")
    cutout: int = setting(
        0, "Side of a black square at a random place, cut off by the image's edge.", unit="pixels", ge=0
    )
    gaussian: float = setting(
        0.0,
        "Standard deviation of the noise added to every pixel, not clipped, as randomised smoothing adds it; for methods "
        "without an attack.",
        unit="pixels in [0, 1]",
        ge=0,
        le=2,
    )
    anneal: float | None = setting(
        None,
        "K/T of DynACL: random_resized_crop, color_jitter and greyscale weaken over training towards nothing, in steps this long; "
        "0.05 in the paper; none: they stay.",
        unit="fraction of training",
        gt=0,
        lt=1,
    )

    @field_validator("random_resized_crop")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1] <= 1:
            raise ValueError(f"must be two areas with 0 < min <= max <= 1, got {value}; SimCLR takes 0.08 and 1")
        return value

    @model_validator(mode="after")
    def _one_crop(self) -> Augmentation:
        if self.crop and self.random_resized_crop:
            raise ValueError(
                f"crop and random_resized_crop exclude each other, got {self.crop} and "
                f"{self.random_resized_crop}; set crop to 0 or random_resized_crop to null"
            )
        return self

    @model_validator(mode="after")
    def _something_to_anneal(self) -> Augmentation:
        if self.anneal and not (self.random_resized_crop or self.color_jitter or self.greyscale):
            raise ValueError(
                "anneal weakens random_resized_crop, color_jitter and greyscale, and all three are off, got "
                f"anneal {self.anneal:g}; set one of them, or anneal to null"
            )
        return self

    def strength(self, progress: float) -> float:
        """Return s(t) = 1 − ⌊t/K⌋·K/T, in (0, 1] (DynACL, Luo et al. 2023, arXiv:2303.01289); 1 without ``anneal``.

        The paper counts t in epochs; here t/T = ``progress``, so a change may fall inside an epoch.

        Args:
            progress: part of the training that lies behind, in [0, 1).

        >>> [round(Augmentation(greyscale=1, anneal=0.25).strength(t / 8), 2) for t in range(8)]
        [1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
        """
        return 1 - math.floor(progress / self.anneal + _SHORT) * self.anneal if self.anneal else 1.0

    def __call__(self, images: Tensor, *, generator: torch.Generator, strength: float = 1.0) -> Tensor:
        """Return random views of the images, (B, C, H, W) float in [0, 1], or beyond where ``gaussian`` leads out of it.

        Args:
            images: (B, C, H, W) float in [0, 1].
            generator: of all draws, on the device of the images.
            strength: s in [0, 1]: boxes have an area in [1 − s·(1 − min), 1 − s·(1 − max)], jitter has s times its strength and
                probability, and greyscale s times its probability, as in DynACL's code; the logarithm of a box's aspect ratio is s
                times as large too, so that with s = 0 nothing of the three is left. The others stay, as flips do there.

        Raises:
            ValueError: the images are not a floating batch (B, C, H, W).
        """
        return self._views(images, None, generator, strength)[0]

    def with_masks(
        self, images: Tensor, masks: Tensor, *, generator: torch.Generator, strength: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return the same views of the images, and their masks, (B, H, W) int64, moved alike; what nothing is known of is void.

        Boxes are enlarged by the nearest pixel in masks. Cut-out squares are void. Arguments otherwise as of a call.
        """
        # Void is 0 in between: what comes in and what is cut out is 0 in images, too.
        shifted = ((masks + 1) % (VOID + 1))[:, None].to(images.dtype)
        images, moved = self._views(images, shifted, generator, strength)
        assert moved is not None
        return images, (moved[:, 0].long() - 1) % (VOID + 1)

    def _views(
        self, images: Tensor, masks: Tensor | None, generator: torch.Generator, strength: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return the views, and ``masks``, (B, 1, H, W) with 0 for void, moved as they are."""
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(f"views need a float batch (B, C, H, W), got {images.dtype} {tuple(images.shape)}")
        count, channels, height, width = images.shape

        def uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
            draw = torch.rand(count, generator=generator, device=images.device, dtype=torch.float32)
            return (draw * (high - low) + low).to(images.dtype)

        def integer(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (count,), generator=generator, device=images.device)

        if self.crop:
            down, right = integer(-self.crop, self.crop + 1), integer(-self.crop, self.crop + 1)
            images = shift(images, down, right, self.crop)
            masks = None if masks is None else shift(masks, down, right, self.crop)
        if self.random_resized_crop:
            # Not 1 − s·(1 − area), which rounds where s = 1: views of published runs must not change.
            smallest, largest = (strength * area + (1 - strength) for area in self.random_resized_crop)
            area, ratio = uniform(smallest, largest), uniform(-strength * _ASPECT, strength * _ASPECT).exp()
            # A box that would stick out is cut to the image, where torchvision draws again: no loop.
            box_h, box_w = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
            top, left = uniform() * (1 - box_h), uniform() * (1 - box_w)
            images = zoom(images, top, left, box_h, box_w)
            masks = None if masks is None else zoom(masks, top, left, box_h, box_w, mode="nearest")
        if self.flip:
            mirrored = uniform() < 0.5
            images = mirror(images, mirrored)
            masks = None if masks is None else mirror(masks, mirrored)
        if self.color_jitter:
            jittering = strength * self.color_jitter
            spread = 0.8 * jittering
            factors = [uniform(max(0.0, 1 - spread), 1 + spread) for _ in range(3)]
            hue, chosen = uniform(-0.2, 0.2) * jittering, uniform() < strength * _JITTER_PROBABILITY
            images = torch.where(_each(chosen), jitter(images, *factors, hue), images)
        if self.greyscale and channels == 3:
            images = torch.where(_each(uniform() < strength * self.greyscale), grey(images), images)
        if self.cutout:
            row, column = integer(0, height), integer(0, width)
            images = cut(images, row, column, self.cutout)
            masks = None if masks is None else cut(masks, row, column, self.cutout)
        if self.gaussian:
            # Not clipped: certification does not clip either (Cohen et al. 2019, arXiv:1902.02918, sections 3.2 and 3.3).
            noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
            images = images + self.gaussian * noise
        return images, masks


def shift(images: Tensor, down: Tensor, right: Tensor, most: int) -> Tensor:
    """Move each image by (down, right) pixels, (B,) int64 in [-most, most]; what comes in is 0."""
    height, width = images.shape[2:]
    windows = F.pad(images, (most, most, most, most)).unfold(2, height, 1).unfold(3, width, 1)  # a view
    return windows[torch.arange(len(images), device=images.device), :, most - down, most - right]


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the chosen images, (B,) bool, left to right."""
    return torch.where(_each(chosen), images.flip(3), images)


def zoom(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, *, mode: str = "bilinear") -> Tensor:
    """Enlarge each image's box, (B,) float as fractions of the image, to the whole; ``mode`` nearest leaves values as they are."""
    zero = torch.zeros_like(top)
    theta = torch.stack(
        [torch.stack([width, zero, 2 * left + width - 1], 1), torch.stack([zero, height, 2 * top + height - 1], 1)], 1
    )
    grid = F.affine_grid(theta.to(images.dtype), list(images.shape), align_corners=False)
    zoomed = F.grid_sample(images, grid, mode=mode, padding_mode="border", align_corners=False)
    return zoomed.clamp_(0, 1) if mode == "bilinear" else zoomed  # rounding may exceed 1 by an ulp


def jitter(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Change colours per image (SimCLR, Chen et al. 2020, arXiv:2002.05709, appendix A), in this fixed order.

    The paper draws the order anew for every image; a fixed order keeps the batch in one piece.

    Args:
        images: (B, C, H, W) float in [0, 1]; with C = 1 only brightness and contrast change.
        brightness: (B,) factor on the pixels.
        contrast: (B,) factor on the distance to the image's mean grey.
        saturation: (B,) factor on the distance to the pixel's grey.
        hue: (B,) turn of the hue, in full turns.
    """
    images = (images * _each(brightness)).clamp_(0, 1)
    images = torch.lerp(_luma(images).mean((1, 2, 3), keepdim=True), images, _each(contrast)).clamp_(0, 1)
    if images.shape[1] != 3:
        return images
    images = torch.lerp(_luma(images), images, _each(saturation)).clamp_(0, 1)
    return turn_hue(images, hue)


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of RGB images in HSV space, keeping saturation and value; turns (B,), 1 a full circle."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    divisor = chroma.clamp(min=torch.finfo(images.dtype).tiny)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    hue = hue + 6 * turns[:, None, None]
    # Channel of hue h in sixths: value - chroma · clamp(min(k, 4 - k), 0, 1), k = (n + h) mod 6, n = 5, 3, 1.
    n = torch.tensor([5.0, 3.0, 1.0], device=images.device, dtype=images.dtype)[:, None, None]
    k = (hue[:, None] + n).remainder_(6)
    fall = torch.minimum(k, 4 - k).clamp_(0, 1)
    return torch.addcmul(value[:, None], chroma[:, None], fall, value=-1).clamp_(0, 1)


def grey(images: Tensor) -> Tensor:
    """Return RGB images without colour, still with three channels."""
    return _luma(images).expand_as(images)


def cut(images: Tensor, row: Tensor, column: Tensor, side: int) -> Tensor:
    """Black out a square at (row, column), (B,) int64 (Cutout, DeVries and Taylor 2017, arXiv:1708.04552).

    The square starts ``side // 2`` above and left of the centre and is cut off by the edge. The paper fills
    with the data's mean (it cuts after normalisation); here pixels are not normalised yet and 0 is black, as
    in the crop's padding.
    """
    height, width = images.shape[2:]
    ys = torch.arange(height, device=images.device) - (row - side // 2)[:, None]
    xs = torch.arange(width, device=images.device) - (column - side // 2)[:, None]
    inside = ((ys >= 0) & (ys < side))[:, :, None] & ((xs >= 0) & (xs < side))[:, None, :]
    return images.masked_fill(inside[:, None], 0)


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _luma(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.unbind(1)
    return (_GREY[0] * red + _GREY[1] * green + _GREY[2] * blue).unsqueeze(1)
