"""Why a clean accuracy may be low though the model is right: classes in another order, or pixels in another range."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clead.data.classes import class_order
from clead.results.statistics import mcnemar

PIXELS = 256
_FEW = 8
"""Images on which other ranges of pixels are tried."""
_LOW = 0.5  # a clean accuracy above this (and above chance) is not looked into by other pixels
_GAIN, _P_VALUE = 0.15, 1e-3
_MOST_CLASSES = 2000  # an assignment takes K³ steps
_SHORT = 20  # classes whose order fits on a line
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CAFFE = (103.939, 116.779, 123.68)  # blue, green, red, of 255


def near_chance(flags: Tensor, num_classes: int) -> bool:
    """Tell whether an accuracy is below three standard errors above 1/K."""
    chance = 1 / num_classes
    return flags.double().mean().item() <= chance + 3 * (chance * (1 - chance) / len(flags)) ** 0.5


def order_hint(predicted: Tensor, labels: Tensor, classes: Sequence[str]) -> str | None:
    """Say under which order of the classes the predictions would be right, or None if under no other order.

    Known orders (as text, as numbers, shifted by one, reversed) are tried on all images. Any other permutation is fitted to the
    confusion matrix of one half of the images (the assignment problem, Kuhn 1955) and judged on the other, both ways.

    Args:
        predicted: (N,) int64 in [0, K).
        labels: (N,) int64 in [0, K).
        classes: the K names of the data.

    >>> labels = torch.arange(40) % 4
    >>> print(order_hint((labels + 1) % 4, labels, ("a", "b", "c", "d")).split(":")[0])
    clean accuracy would be 100.0 % instead of 0.0 % (40 images) if the labels were shifted by one
    """
    answers, truth, k = predicted.numpy(), labels.numpy(), len(classes)
    if not len(answers) or answers.max() >= k:
        return None
    before = answers == truth
    best: tuple[float, str, np.ndarray] | None = None
    for text, numbers in _orders(classes):
        after = answers == numbers[truth]
        if _is_better(before, after, numbers[truth] != truth) and (best is None or after.mean() > best[0]):
            best = (float(after.mean()), text, numbers)
    if k <= _MOST_CLASSES:
        fitted = _assignment(answers, truth, k)
        after = np.empty(len(truth), dtype=bool)
        half = _halves(truth)
        for side in (False, True):
            after[half == side] = (answers == _assignment(answers[half != side], truth[half != side], k)[truth])[
                half == side
            ]
        better = _is_better(before, after, fitted[truth] != truth)
        if better and (best is None or (answers == fitted[truth]).mean() > best[0] + 0.05):
            best = (float(after.mean()), _swaps(fitted, classes), fitted)
    if best is None:
        return None
    accuracy, text, numbers = best
    return (
        f"clean accuracy would be {100 * accuracy:.1f} % instead of {100 * before.mean():.1f} % ({len(truth)} images) if {text}: "
        f"{_remedy(numbers, classes)}"
    )


def _is_better(before: np.ndarray, after: np.ndarray, moved: np.ndarray) -> bool:
    """Tell whether images of the classes that move are mostly right in the other order, and were not; not by accident."""
    if not moved.any():
        return False
    old, new = before[moved].mean(), after[moved].mean()
    high = new >= 0.5 or new >= 4 * max(old, 0.01)
    return bool(
        high
        and new >= 2 * old
        and mcnemar(after.tolist(), before.tolist()).p_value < _P_VALUE
        and after.sum() > before.sum()
    )


def _orders(classes: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what a model's outputs may be in, and for each class of the data the number of its output then."""
    k = len(classes)
    numbers = np.arange(k)

    def by(order: Sequence[int]) -> np.ndarray:
        rank = np.empty(k, dtype=np.int64)
        rank[np.asarray(order)] = numbers
        return rank

    def listed(order: Sequence[int]) -> str:
        return ", ".join(classes[j] for j in order[:5]) + (", …" if k > 5 else "")

    text = sorted(range(k), key=lambda j: classes[j])
    position = {name: j for j, name in enumerate(classes)}
    numeric = [position[name] for name in class_order(classes)]
    lower = sorted(range(k), key=lambda j: classes[j].lower())
    index = sorted(range(k), key=str)
    for name, order in (
        ("in text order", text),
        ("in numeric order", numeric),
        ("in alphabetical order", lower),
        ("numbered in text order", index),
    ):
        yield f"the model's classes were {name} ({listed(order)})", by(order)
    yield "the labels' numbers were in text order (0, 1, 10, …, 2)", np.asarray(index)
    for step in (1, -1):
        yield "the labels were shifted by one", (numbers + step) % k
    yield f"the model's classes were reversed ({listed(numbers[::-1].tolist())})", numbers[::-1].copy()


def _assignment(answers: np.ndarray, truth: np.ndarray, k: int) -> np.ndarray:
    """Return for each class the output that fits it best, each output once; its own number where nothing speaks against it."""
    from scipy.optimize import linear_sum_assignment  # a quarter of a second of every start

    confusion = np.zeros((k, k))
    np.add.at(confusion, (truth, answers), 1)
    return linear_sum_assignment(confusion + 0.01 * np.eye(k), maximize=True)[1]


def _halves(truth: np.ndarray) -> np.ndarray:
    """Return every second image of each class, (N,) bool."""
    half = np.empty(len(truth), dtype=bool)
    for label in np.unique(truth):
        rows = np.flatnonzero(truth == label)
        half[rows] = np.arange(len(rows)) % 2 == 0
    return half


def _swaps(numbers: np.ndarray, classes: Sequence[str]) -> str:
    moved = np.flatnonzero(numbers != np.arange(len(numbers)))
    shown = ", ".join(f"output {numbers[j]} meant {classes[j]!r}" for j in moved[:4])
    return shown + (f" and {len(moved) - 4} more were in other places" if len(moved) > 4 else "")


def _remedy(numbers: np.ndarray, classes: Sequence[str]) -> str:
    order = [classes[j] for j in np.argsort(numbers)]
    if len(order) <= _SHORT and all(name and name == name.strip() and "," not in name for name in order):
        return f"if that is the model's order, add --data.classes {_quoted(','.join(order))}"
    return "write the names in the model's order, one a line, into a file, and add --data.classes FILE"


def _quoted(text: str) -> str:
    return (
        text if all(letter.isalnum() or letter in ",._-" for letter in text) else "'" + text.replace("'", "'\\''") + "'"
    )


class Pixels(NamedTuple):
    """Pixels in [0, 1] as a model may want them: what they are called, the function, and how to ask for them."""

    text: str
    change: Callable[[Tensor], Tensor]
    remedy: str


def pixel_ranges(x: Tensor) -> list[Pixels]:
    """Return what else than [0, 1] a model may take, for images like x, (B, C, H, W)."""
    c = x.shape[1]

    def scaled(low: float, high: float) -> Callable[[Tensor], Tensor]:
        return lambda x: x * (high - low) + low

    def normalized(mean: Sequence[float], std: Sequence[float], unit: float = 1) -> Callable[[Tensor], Tensor]:
        shift, size = (torch.tensor(values)[:, None, None] for values in (mean, std))
        return lambda x: (x * unit - shift.to(x.device)) / size.to(x.device)

    def option(mean: Sequence[float], std: Sequence[float]) -> str:
        return "mean=" + ",".join(f"{m:.4g}" for m in mean) + " std=" + ",".join(f"{s:.4g}" for s in std)

    ranges = [
        Pixels("in [0, 255]", scaled(0, 255), _input("range=0..255")),
        Pixels("in [-1, 1]", scaled(-1, 1), _input("range=-1..1")),
    ]
    if c == 3:
        ranges.append(
            Pixels("standardised by ImageNet's mean and std", normalized(*_IMAGENET), _input(option(*_IMAGENET)))
        )
    mean, std = x.mean((0, 2, 3)).tolist(), x.std((0, 2, 3)).clamp_min(1e-3).tolist()
    mean, std = ([float(f"{value:.4g}") for value in values] for values in (mean, std))
    ranges.append(
        Pixels("standardised by the mean and std of these images", normalized(mean, std), _input(option(mean, std)))
    )
    ranges.append(
        Pixels(
            "standardised image by image",
            lambda x: (
                (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), correction=0, keepdim=True).clamp_min(1e-3)
            ),
            "put a first layer before it that subtracts each image's mean and divides by its standard deviation",
        )
    )
    ranges.append(
        Pixels("inverted (black for white)", lambda x: 1 - x, "put a first layer before it that returns 1 - x")
    )
    if c == 3:
        blue = [Pixels("in the order blue, green, red", lambda x: x.flip(1), _input("channels=bgr"))]
        for one, key in ((ranges[0], "range=0..255"), (ranges[1], "range=-1..1")):
            blue.append(
                Pixels(
                    f"blue, green, red {one.text}",
                    lambda x, one=one: one.change(x.flip(1)),
                    _input(f"channels=bgr {key}"),
                )
            )
        caffe = normalized(_CAFFE, (1.0, 1.0, 1.0), 255)
        key = "channels=bgr mean=" + ",".join(map(str, _CAFFE)) + " std=1"
        ranges += [
            *blue,
            Pixels("blue, green, red in [0, 255] less Caffe's mean", lambda x: caffe(x.flip(1)), _input(key)),
        ]
    return ranges


def _input(text: str) -> str:
    return f'add --model.input "{text}"'


def pixel_hint(answer: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, num_classes: int) -> str | None:
    """Say with which other pixels a model would be right, or None if with no others, or if it is right enough as it is.

    Args:
        answer: the model: images (B, C, H, W) -> what they are taken for, (B,) int64.
        x: images in [0, 1].
        labels: (B,) int64 in [0, K).
        num_classes: K.
    """
    before = answer(x) == labels
    accuracy = before.double().mean().item()
    if accuracy > _LOW and not near_chance(before, num_classes):
        return None
    best: tuple[float, Pixels] | None = None
    for pixels in pixel_ranges(x):
        after = answer(pixels.change(x)) == labels
        right = after.double().mean().item()
        known = mcnemar(after.tolist(), before.tolist()).p_value < _P_VALUE
        # The first of those that are about as good: it is the commoner one.
        if (
            right > accuracy + _GAIN
            and right > 2 / num_classes * (num_classes > 3)
            and known
            and (best is None or right > best[0] + 0.05)
        ):
            best = (right, pixels)
    if best is None:
        return None
    return (
        f"clean accuracy would be {100 * best[0]:.1f} % instead of {100 * accuracy:.1f} % ({len(labels)} images) if pixels were "
        f"given {best[1].text}: {best[1].remedy}"
    )


def sigmoid_hint(z: Tensor) -> str | None:
    """Say that a model gives probabilities where one logit belongs, or None if it does not.

    z: (B,), the one output per image.

    >>> sigmoid_hint(torch.tensor([0.1, 0.9])) is None, sigmoid_hint(torch.rand(20)) is None
    (True, False)
    """
    if len(z) < _FEW or not ((z >= 0) & (z <= 1)).all():
        return None
    return (
        f"the one output per image lies between 0 and 1 for all of {len(z)} images, as after a sigmoid, so each is taken for "
        "class 1; let the model return the value before the sigmoid, or in Python: return z.logit()"
    )
