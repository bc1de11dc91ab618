"""Losses of masks against slow NumPy loops over the pixels, and what attacks rely on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from torch.autograd import gradcheck

from clead.losses.pixels import PIXEL_LOSSES, VOID

G = torch.Generator().manual_seed(0)
LOGITS = 2 * torch.randn(3, 4, 5, 6, generator=G, dtype=torch.float64)
TARGET = torch.randint(3, (3, 5, 6), generator=G)  # class 3 is in no mask
TARGET[0, :2], TARGET[1, 0, 0] = VOID, VOID
ALL_VOID = torch.full((1, 5, 6), VOID)


def slow(name: str, logits: np.ndarray, target: np.ndarray) -> float:
    """Return the loss of one image, written from the formula."""
    pixels = [(y, x) for y in range(target.shape[0]) for x in range(target.shape[1]) if target[y, x] != VOID]
    sizes = {c: sum(target[at] == c for at in pixels) for c in set(target[at] for at in pixels)}
    total = 0.0
    for y, x in pixels:
        p, c = softmax(logits[:, y, x]), target[y, x]
        right = logits[:, y, x].argmax() == c
        if name == "cross_entropy":
            total += -math.log(p[c]) / len(pixels)
        elif name == "masked_cross_entropy":
            total += right * -math.log(p[c]) / len(pixels)
        elif name == "balanced_masked_cross_entropy":
            total += right * -math.log(p[c]) / (sizes[c] * len(sizes))
        else:
            total += jensenshannon(p, np.eye(len(p))[c]) ** 2 / len(pixels)
    return total


@pytest.mark.parametrize("name", PIXEL_LOSSES)
def test_a_loss_is_its_formula(name):
    expected = [slow(name, *pair) for pair in zip(LOGITS.numpy(), TARGET.numpy(), strict=True)]
    np.testing.assert_allclose(PIXEL_LOSSES[name](LOGITS, TARGET).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("name", PIXEL_LOSSES)
def test_void_has_no_value_and_no_gradient(name):
    logits = LOGITS.clone().requires_grad_()
    PIXEL_LOSSES[name](logits, TARGET).sum().backward()
    assert (logits.grad.abs().sum(1)[TARGET == VOID] == 0).all()
    assert PIXEL_LOSSES[name](LOGITS[:1], ALL_VOID).tolist() == [0]
    if not name.endswith("masked_cross_entropy"):  # those jump where a pixel changes sides
        assert gradcheck(lambda z: PIXEL_LOSSES[name](z, TARGET), logits)


def test_pixels_that_are_wrong_leave_the_masked_losses():
    logits = LOGITS.clone().requires_grad_()
    wrong = (LOGITS.argmax(1) != TARGET) & (TARGET != VOID)
    for name in ("masked_cross_entropy", "balanced_masked_cross_entropy"):
        (gradient,) = torch.autograd.grad(PIXEL_LOSSES[name](logits, TARGET).sum(), logits)
        assert (gradient.abs().sum(1)[wrong] == 0).all() and (
            gradient.abs().sum(1)[~wrong & (TARGET != VOID)] > 0
        ).all()


def test_pixels_that_are_wrong_for_certain_have_no_js_gradient():
    logits = torch.tensor([30.0, 0.0]).reshape(1, 2, 1, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(PIXEL_LOSSES["js_divergence"](logits, torch.ones(1, 1, 1).long()).sum(), logits)
    assert gradient.abs().max() < 1e-10


def test_half_precision_is_computed_in_float32():
    for loss in PIXEL_LOSSES.values():
        low = loss(LOGITS.bfloat16(), TARGET)
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, loss(LOGITS.bfloat16().float(), TARGET))
