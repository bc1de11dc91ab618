"""Adversarial weight perturbation: the loss is taken where nearby weights are worst."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_TINY = 1e-20


@contextmanager
def perturbed_weights(
    model: nn.Module,
    loss: Callable[[], Tensor],
    gamma: float,
    average: Callable[[Sequence[Tensor | None]], object] | None = None,
) -> Generator[None, None, None]:
    """Hold w + γ·‖w‖·g / ‖g‖ in every layer, g the gradient of the loss at w (Wu et al. 2020, arXiv:2004.05884, eq. 10).

    One step of ascent, layer by layer, of weights with two dimensions or more, as in the authors' code; biases and batch-norm
    stay; the ascent leaves the buffers as they are. A gradient computed inside is taken there, and belongs to the weights that are
    back on exit. Departures: w is restored before the optimiser's step, not after it, so that weight decay sees w; the first step
    is perturbed already, where their script of TRADES-AWP begins with epoch 10.

    Args:
        model: with gradients switched on.
        loss: computes the loss (a scalar) of the model as it is; called once, if γ > 0.
        gamma: γ ≥ 0, the size of the perturbation relative to the weights.
        average: averages gradients over processes, in place, if there are several.
    """
    if not gamma:
        yield
        return
    layers = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.dim() > 1]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = torch.autograd.grad(loss(), layers, allow_unused=True)
    if average is not None:
        average(gradients)
    originals = [layer.detach().clone() for layer in layers]
    try:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
            for layer, gradient in zip(layers, gradients, strict=True):
                # One that overflows in float16 moves nothing: the step is then left out, as it is without AWP.
                if gradient is not None and torch.isfinite(length := gradient.norm()):
                    layer.add_(gradient, alpha=float(gamma * layer.norm() / length.clamp_min(_TINY)))
        yield
    finally:
        with torch.no_grad():
            for layer, before in zip(layers, originals, strict=True):
                layer.copy_(before)
