"""The 15 common corruptions at 5 severities, as functions of an image.

Source: Hendrycks & Dietterich 2019, arXiv:1903.12261, with the severities of CIFAR-10-C. Computed from NumPy, SciPy and Pillow, so
that any images can be corrupted and nothing is downloaded. Constants in pixels are for a smaller side of 32; larger images
multiply them by side / 32 (about what ImageNet-C does), smaller ones keep them, since a blur below a pixel would do nothing.
(Zooms are relative: on 8×8 pixels zoom blur of severity 1 changes nothing.) The authors' constants of glass blur, frost and elastic
transform do not make the pixels' change grow with every step of severity.

Figures are comparable between models measured here, and close to, not the same as, those of the published files. Departures:

- frost: the authors lay photographs of frozen windows over the image; here the frost is drawn (a ridged plasma fractal);
- glass blur swaps pixels, as the paper says; the authors' code copies one over the other for colour images;
- motion blur and snow use ImageMagick's kernel (one-sided, nearest pixel) but are computed here;
- values are rounded to the nearest of 256 levels, where the authors cut them off;
- the images are as they are: the random numbers are other ones.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from clead.errors import UserError, did_you_mean

Pixels = NDArray[np.uint8]
Values = NDArray[np.float64]
Corruption = Callable[[Pixels, int, np.random.Generator], Pixels]
"""Maps an image (H, W, C) uint8, C 1 or 3, a severity in 1 … 5 and a source of randomness to an image of the same shape."""

SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST_SIDE = 8


def gaussian_noise(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Add N(0, c²) to each value."""
    c = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return _bytes(_unit(image) + rng.normal(scale=c, size=image.shape))


def shot_noise(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Poisson(c·x) / c per value: photons counted."""
    c = (500, 250, 100, 75, 50)[severity - 1]
    return _bytes(rng.poisson(_unit(image) * c) / c)


def impulse_noise(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """A fraction c of the values becomes 0 or 1 at even odds."""
    c = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    struck, salt = rng.random(image.shape) < c, rng.random(image.shape) < 0.5
    return np.where(struck, np.where(salt, 255, 0), image).astype(np.uint8)


def defocus_blur(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Convolution with a disk, its edge softened; mirrored borders."""
    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    radius, alias = radius * _scale(image), alias * _scale(image)
    soft = 1 if radius <= 8 else 2
    reach = math.ceil(radius) + soft
    along = np.arange(-reach, reach + 1)
    disk = (along[:, None] ** 2 + along**2 <= radius**2).astype(float)
    kernel = ndimage.gaussian_filter(disk / disk.sum(), alias, mode="constant", radius=soft)
    return _bytes(ndimage.convolve(_unit(image), kernel[:, :, None], mode="mirror"))


def glass_blur(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Blur, swap each pixel with a random one up to δ up and left of it, several times, blur again."""
    sigma, delta, times = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))[severity - 1]
    sigma, delta = sigma * _scale(image), max(1, round(delta * _scale(image)))
    height, width, channels = image.shape
    blurred = _gaussian(_unit(image), sigma)
    order = np.arange(height * width).reshape(height, width).tolist()  # a list: swaps one by one are slow in NumPy
    for _ in range(times):
        moves = rng.integers(-delta, delta, (height, width, 2)).tolist()
        for h in range(height - delta, delta, -1):
            for w in range(width - delta, delta, -1):
                down, right = moves[h][w]
                other = order[h + down]
                order[h][w], other[w + right] = other[w + right], order[h][w]
    swapped = blurred.reshape(-1, channels)[np.asarray(order)]
    return _bytes(_gaussian(swapped, sigma))


def motion_blur(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """The mean along a line in a random direction within 45° of the horizontal, its weights half a Gaussian."""
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity - 1]
    scale = _scale(image)
    return _bytes(_along_a_line(_unit(image), radius * scale, sigma * scale, rng.uniform(-45, 45)))


def zoom_blur(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """The mean of the image and of its enlargements by 1, 1.01, … about the centre."""
    x = _unit(image)
    zooms = 1 + np.arange((7, 12, 16, 21, 26)[severity - 1]) / 100  # as many as the authors' arange gives
    return _bytes((x + sum(_zoomed(x, zoom) for zoom in zooms)) / (len(zooms) + 1))


def snow(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Enlarged bright dots blurred along a steep line, twice (once upside down), over an image made paler."""
    mean, spread, zoom, least, radius, sigma, keep = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]
    scale, x = _scale(image), _unit(image)
    flakes = _zoomed(rng.normal(mean, spread, (*image.shape[:2], 1)), zoom * scale)
    flakes = np.where(flakes < least, 0, flakes).clip(0, 1)
    flakes = _along_a_line(flakes, radius * scale, sigma * scale, rng.uniform(-135, -45))
    pale = np.maximum(x, _luminance(x) * 1.5 + 0.5)
    return _bytes(keep * x + (1 - keep) * pale + flakes + np.rot90(flakes, 2))


def frost(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """A drawn texture of ice crystals laid over a darkened image: a·x + b·frost."""
    keep, ice = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    height, width, channels = image.shape
    ridges = (
        1 - np.abs(2 * _plasma(max(height, width), 1.6, rng) - 1)[:height, :width, None]
    )  # sharp lines, like crystals
    clouds = _plasma(max(height, width), 2.5, rng)[:height, :width, None]
    tint = np.array([0.85, 0.95, 1.0]) if channels == 3 else np.ones(channels)
    return _bytes(keep * _unit(image) + ice * (0.6 * ridges**3 + 0.6 * clouds).clip(0, 1) * tint)


def fog(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """(x + a·plasma) · max(x) / (max(x) + a), the plasma a fractal of the diamond-square algorithm."""
    amount, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    x, (height, width) = _unit(image), image.shape[:2]
    largest = x.max()
    mist = _plasma(max(height, width), decay, rng)[:height, :width, None]
    return _bytes((x + amount * mist) * largest / (largest + amount))


def brightness(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """V + c in HSV: hue and saturation stay, so the channels grow by the factor that their maximum does."""
    c = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    x = _unit(image)
    value = x.max(2, keepdims=True)
    brighter = np.minimum(value + c, 1)
    return _bytes(np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter))


def contrast(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """(x − mean)·c + mean, the mean of each channel."""
    c = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    x = _unit(image)
    mean = x.mean((0, 1), keepdims=True)
    return _bytes((x - mean) * c + mean)


def elastic_transform(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """A random affine map of three points, then a smooth random displacement of every pixel."""
    push, smooth, jitter = ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))[
        severity - 1
    ]
    height, width = image.shape[:2]
    side = min(height, width)
    middle, arm = np.array([height // 2, width // 2]), side // 3
    points = middle + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = points + rng.uniform(-jitter * side, jitter * side, points.shape)
    back = np.linalg.solve(np.c_[moved, np.ones(3)], points)  # (row, column, 1) of the result -> of the source
    rows, columns = np.indices((height, width)).astype(float)
    source = np.stack([rows, columns, np.ones_like(rows)], -1) @ back
    x = _sampled(_unit(image), source[..., 0], source[..., 1], "mirror")
    shifts = [
        push * side * ndimage.gaussian_filter(rng.uniform(-1, 1, (height, width)), smooth * side, truncate=3)
        for _ in range(2)
    ]
    return _bytes(_sampled(x, rows + shifts[0], columns + shifts[1], "reflect"))


def pixelate(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Shrink to a fraction c of the side and enlarge again, both by box filters."""
    c = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    height, width = image.shape[:2]
    small = _picture(image).resize((int(width * c), int(height * c)), Image.Resampling.BOX)
    return _pixels(small.resize((width, height), Image.Resampling.BOX))


def jpeg_compression(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Encode as JPEG of quality c and decode."""
    file = io.BytesIO()
    _picture(image).save(file, "JPEG", quality=(80, 65, 58, 50, 40)[severity - 1])
    return _pixels(Image.open(file))


CORRUPTIONS: dict[str, Corruption] = {
    corruption.__name__: corruption
    for corruption in (
        *(
            gaussian_noise,
            shot_noise,
            impulse_noise,
            defocus_blur,
            glass_blur,
            motion_blur,
            zoom_blur,
            snow,
            frost,
            fog,
        ),
        *(brightness, contrast, elastic_transform, pixelate, jpeg_compression),
    )
}
"""In the order of the paper's tables. A random stream belongs to the position, so names are added at the end only."""


def corrupt(image: Pixels, name: str, severity: int, rng: np.random.Generator) -> Pixels:
    """Return one corrupted image.

    Args:
        image: (H, W, C) uint8, C 1 or 3, sides of at least 8 pixels; left as it is.
        name: a name of ``CORRUPTIONS``.
        severity: 1 to 5.
        rng: source of randomness.

    Returns:
        (H, W, C) uint8. Raises UserError on another shape, type, name or severity.

    >>> grey = np.full((8, 8, 1), 51, np.uint8)  # 0.2
    >>> int(corrupt(grey, "brightness", 5, np.random.default_rng(0))[0, 0, 0])  # 0.2 + 0.3 = 127.5 / 255
    128
    """
    check_choice([name], [severity])
    if (
        image.dtype != np.uint8
        or image.ndim != 3
        or image.shape[2] not in (1, 3)
        or min(image.shape[:2]) < SMALLEST_SIDE
    ):
        raise UserError(
            f"an image to corrupt must be uint8 (H, W, 1 or 3) with sides of at least {SMALLEST_SIDE} pixels, "
            f"got {image.dtype} {image.shape}; "
            "give np.uint8((255 * image).round()) of shape (H, W, C)"
        )
    return CORRUPTIONS[name](image, severity, rng)


def check_choice(names: Sequence[str], severities: Sequence[Any]) -> None:
    """Raise UserError for names or severities that are unknown, repeated or none."""
    if not names or not severities:
        raise UserError(
            "at least one corruption and one severity are needed, got none; give names=['fog'], severities=[1, 3, 5]"
        )
    for name in names:
        if name not in CORRUPTIONS:
            raise UserError(f"unknown corruption {name!r}; {did_you_mean(name, CORRUPTIONS)}")
    for severity in severities:
        if severity not in SEVERITIES:
            raise UserError(
                f"a severity must be 1, 2, 3, 4 or 5, got {severity!r}; give whole numbers, such as severities=[1, 3, 5]"
            )
    if len(set(names)) < len(names) or len(set(severities)) < len(severities):
        raise UserError(
            f"each corruption and severity may be named once, got {list(names)} and {list(severities)}; take out the repeated"
        )


def _unit(image: Pixels) -> Values:
    return image / 255.0


def _bytes(x: Values) -> Pixels:
    return np.rint(x.clip(0, 1) * 255).astype(np.uint8)


def _scale(image: Pixels) -> float:
    return max(1.0, min(image.shape[:2]) / 32)


def _picture(image: Pixels) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _pixels(picture: Image.Image) -> Pixels:
    array = np.asarray(picture)
    return array[:, :, None].copy() if array.ndim == 2 else array.copy()


def _luminance(x: Values) -> Values:
    return x if x.shape[2] == 1 else (x @ np.array([0.299, 0.587, 0.114]))[:, :, None]


def _gaussian(x: Values, sigma: float) -> Values:
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def _sampled(x: Values, rows: Values, columns: Values, border: str) -> Values:
    """Return ``x`` (H, W, C) read bilinearly at the given coordinates."""
    channels = [ndimage.map_coordinates(x[:, :, c], [rows, columns], order=1, mode=border) for c in range(x.shape[2])]
    return np.stack(channels, -1)


def _along_a_line(x: Values, radius: float, sigma: float, degrees: float) -> Values:
    """Return Σ_i w_i x(p + i·d), i = 0 … 2·⌈radius⌉, w half a Gaussian that sums to 1, d the direction; edges repeated.

    As ImageMagick's motion blur: each step is rounded to the nearest pixel.
    """
    steps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    turn = math.radians(degrees)
    height, width = x.shape[:2]
    rows, columns = np.arange(height), np.arange(width)
    out = np.zeros_like(x)
    for step, weight in zip(steps, weights, strict=True):
        down, right = round(step * math.sin(turn)), round(step * math.cos(turn))
        out += weight * x[(rows + down).clip(0, height - 1)[:, None], (columns + right).clip(0, width - 1)]
    return out


def _zoomed(x: Values, zoom: float) -> Values:
    """Return the centre of ``x`` (H, W, C) enlarged by ``zoom`` ≥ 1 to the same size, bilinearly."""
    height, width = x.shape[:2]
    inner = [math.ceil(height / zoom), math.ceil(width / zoom)]
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    large = ndimage.zoom(x[top : top + inner[0], left : left + inner[1]], (zoom, zoom, 1), order=1)
    top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    return large[top : top + height, left : left + width]


def _plasma(side: int, decay: float, rng: np.random.Generator) -> Values:
    """Return a cloudy height map in [0, 1] by the diamond-square algorithm (Fournier et al. 1982), periodic.

    side: of the smallest map wanted; the map's own is the next power of two. decay: how fast finer detail grows fainter.
    """
    size = 1 << max(1, math.ceil(math.log2(side)))
    grid = np.zeros((size, size))
    step, swing = size, 100.0
    while step >= 2:
        half = step // 2

        def around(total: Values, swing: float = swing) -> Values:
            return total / 4 + swing * rng.uniform(-swing, swing, total.shape)

        corners = grid[::step, ::step]
        below = corners + np.roll(corners, -1, 0)
        grid[half::step, half::step] = around(below + np.roll(below, -1, 1))
        centres = grid[half::step, half::step]
        sides = corners + np.roll(corners, -1, 1)
        grid[::step, half::step] = around(centres + np.roll(centres, 1, 0) + sides)
        grid[half::step, ::step] = around(centres + np.roll(centres, 1, 1) + below)
        step, swing = half, swing / decay
    grid -= grid.min()
    return grid / grid.max()
