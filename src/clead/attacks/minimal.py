"""What attacks for the smallest perturbation share: how they are called, and how the best image so far is kept.

Such an attack has no radius: it looks for the nearest adversarial image. It serves as a search inside a threat set too: what
it finds there counts, the rest is dropped.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from clead.attacks.runner import call, check_finite, check_inputs, logits_of, optimized
from clead.errors import UserError
from clead.interfaces import Model
from clead.models.modes import attack_mode
from clead.models.split import wrapped
from clead.settings import validated
from clead.threats import THREATS
from clead.threats.geometry import per_image


@runtime_checkable
class MinimumNorm(Protocol):
    """An attack that looks for the nearest adversarial image, whatever its distance."""

    def minimal(
        self, model: Model, x: Tensor, y: Tensor, *, norm: str, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the nearest misclassified image found in [0, 1], (B, C, H, W), and x itself where none was found."""
        ...


class BestAdversarial:
    """The smallest adversarial image found so far of each of ``x``: ``images``, and their ``sizes``, infinite where there is none.

    Args:
        x: (B, C, H, W) in [0, 1].
        norm: a name of ``THREATS``, which measures.
    """

    def __init__(self, x: Tensor, norm: str) -> None:
        self._x = x
        self._measure = THREATS.get(norm)(eps=0).distance
        self.images = x.clone()
        self.sizes = torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)

    def offer(self, index: Tensor, x_adv: Tensor, margin: Tensor) -> Tensor:
        """Keep those of ``x_adv``, images of x[index], that are misclassified and smaller than before; returns which are wrong.

        margin: max_{k≠y} z_k − z_y of ``x_adv``. NaN counts as wrong, and an image that is NaN itself replaces any other:
        ``run_attack`` then says that the gradient is broken instead of taking the model for robust.
        """
        wrong = ~(margin <= 0)
        size = self._measure(x_adv - self._x[index])
        smaller = wrong & ~(size >= self.sizes[index])
        self.images[index[smaller]] = x_adv[smaller]
        self.sizes[index[smaller]] = size[smaller].to(self.sizes.dtype)
        return wrong

    def left(self, enough: float) -> Tensor:
        """Return the index, (n,) int64, of the images whose best is larger than ``enough``, so that the search goes on."""
        return (self.sizes > enough).nonzero()[:, 0]  # synchronises the device

    def within(self, eps: float) -> Tensor:
        """Return the images no larger than ``eps``, and x itself for the others."""
        return torch.where(per_image(self.sizes > eps, self._x), self._x, self.images)


def run_minimum_norm(
    attack: MinimumNorm,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: str,
    *,
    generator: torch.Generator | None = None,
    checked: bool = False,
) -> Tensor:
    """Look for the nearest adversarial image of each ``x``; the counterpart of ``run_attack`` without a radius.

    Args:
        attack: an attack for the smallest perturbation.
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        norm: one of the attack's norms.
        generator: source of randomness, on the device of ``x``; a fixed seed if None, never the global RNG.
        checked: skip the checks of ``x`` and ``y`` because the caller has made them.

    Returns:
        x_adv, (B, C, H, W) in [0, 1]; x itself where nothing was found or the image is wrong already. Raises UserError on wrong
        shapes or ranges, a norm that the attack is not made for, or a gradient that is NaN.
    """
    name = repr(type(attack).__name__)
    check_norm(attack, norm)
    model = wrapped(model)
    if not checked:
        check_inputs(x, y)
        check_inputs(x, y, logits_of(model, x[:1]).shape[1])
    if generator is None:
        generator = torch.Generator(x.device).manual_seed(0)
    with torch.inference_mode(False), attack_mode(model):  # a caller's inference mode would refuse any gradient
        x, y = x.detach().clone(), y.detach().clone()
        with torch.no_grad(), optimized(model, x) as answer:
            x_adv = attack.minimal(answer, x, y, norm=norm, generator=generator)
    if not checked:
        check_finite(x_adv, name)
    return x_adv


def check_norm(attack: MinimumNorm, norm: str) -> None:
    """Raise UserError unless ``norm`` is a threat's name and one of the attack's ``norms``, if it names any."""
    THREATS.get(norm)
    norms = getattr(attack, "norms", None)
    if norms is not None and norm not in norms:
        raise UserError(
            f"{type(attack).__name__} is an attack for {', '.join(norms)}, got {norm}; give norm {norms[0]}, or another attack"
        )


def call_minimal(
    kind: Any, values: dict[str, Any], model: nn.Module, x: Tensor, y: Tensor, *, norm: str, eps: float | str | None
) -> Tensor:
    """Run an attack given by its class and settings: within ``eps`` if that is given, else for the smallest perturbation."""
    if eps is None:
        return run_minimum_norm(validated(kind, values), model, x, y, norm)
    return call(kind, values, model, x, y, norm=norm, eps=eps, seed=0)
