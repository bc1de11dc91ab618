"""The gradient that attacks climb: of an objective, to the images only."""

from __future__ import annotations

import torch
from torch import Tensor

from clead.interfaces import Objective


def value_and_gradient(objective: Objective, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return J(x), (B,), and ∂ΣJ/∂x, of the shape of ``x``; also where the caller has switched gradients off."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = objective(x.clone())  # a model that normalises in place may not write into a leaf
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient
