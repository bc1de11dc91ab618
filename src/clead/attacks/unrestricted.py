"""Attacks whose images lie in no norm ball: transformations of the whole image, patches that may change some pixels at will.

They have no threat; each carries its own set of allowed images in its settings, can find its worst image in it, and can tell
whether an image belongs to it, so that a caller can verify results. ``clead.attacks.UNRESTRICTED`` finds them by name.
"""

from __future__ import annotations

import zlib
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from clead.attacks.runner import blamed, check_finite, check_inputs, logits_of, marked, optimized
from clead.interfaces import Model
from clead.models.modes import attack_mode
from clead.models.seeding import fork_rng
from clead.models.split import wrapped
from clead.settings import validated


@runtime_checkable
class Unrestricted(Protocol):
    """An attack inside a set of its own instead of a norm ball."""

    def worst(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return x_adv, (B, C, H, W) in [0, 1]: misclassified where the search succeeded, else the worst image that it saw.

        ``model`` is in evaluation mode with frozen parameters, under no_grad. Images misclassified already may be returned.
        """
        ...

    def allows(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return which images of ``x_adv`` are in the set around ``x``, up to rounding, (B,) bool."""
        ...


def attack_unrestricted(
    attack: Unrestricted,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    generator: torch.Generator | None = None,
    checked: bool = False,
) -> Tensor:
    """Run an unrestricted attack on a model, which is left bit-identical.

    Args:
        attack: its settings say which images it may return.
        model: takes pixels in [0, 1], returns logits (B, K).
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        generator: source of randomness, on the device of ``x``; a fixed seed if None, never the global RNG.
        checked: skip the checks of ``x`` and ``y`` because the caller has made them.

    Returns:
        x_adv, (B, C, H, W) in [0, 1]. Raises UserError on wrong shapes, ranges or labels, or if a gradient is not finite.
    """
    model = wrapped(model)
    if not checked:
        check_inputs(x, y)
        with fork_rng(0):  # a randomised model would draw from the caller's stream
            check_inputs(x, y, logits_of(model, x[:1]).shape[1])
    if generator is None:
        generator = torch.Generator(x.device).manual_seed(0)
    # Seeded: a randomised model draws from a stream of its own. A caller's inference mode would refuse any gradient.
    with fork_rng(zlib.crc32(generator.get_state().numpy().tobytes())), torch.inference_mode(False), attack_mode(model):
        x, y = x.detach().clone(), y.detach().clone()
        with torch.no_grad(), blamed(model, x), optimized(model, x) as answer:
            x_adv = attack.worst(answer, x, y, generator=generator)
    if not checked:
        check_finite(x_adv, type(attack).__name__)
        x_adv = marked(model, x_adv, y)
    return x_adv


def call_unrestricted(
    kind: Any, values: dict[str, Any], model: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0
) -> Tensor:
    """Run an attack given by its class and settings: the body of ``clead.attacks.spatial`` and ``patch``.

    Returns x_adv, (B, C, H, W) in [0, 1]. Raises UserError on any value that is out of its range.
    """
    attack = validated(kind, values)
    generator = torch.Generator(x.device).manual_seed(seed) if isinstance(x, Tensor) else None
    return attack_unrestricted(attack, model, x, y, generator=generator)
