"""Adversarial images of another model, tried on this one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clead.attacks.pgd import PGD
from clead.attacks.run import attack_images
from clead.checkpoint import fingerprint
from clead.evaluation.suites import NamedAttack
from clead.interfaces import Model, Threat
from clead.models.split import weights


class Transfer:
    """Attack a source model by PGD with all its steps, and hope (Papernot et al. 2016, arXiv:1605.07277)."""

    needs_gradient = False  # of the model that is evaluated

    def __init__(self, name: str, source: nn.Module, steps: int = 50) -> None:
        self.source = source
        # Not APGD, which leaves an image as soon as the source is wrong: a point beyond the boundary transfers better.
        self.pgd = PGD(steps=steps)
        self.label = f"transfer from {name}"
        self.description = {"source": name, "fingerprint": fingerprint(weights(source)), "steps": steps}

    def search(
        self, model: Model, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the source's adversarial images, (B, C, H, W) in the threat set around ``x``."""
        with torch.enable_grad():
            return attack_images(
                self.pgd, self.source, x, y, threat, objective="margin", generator=generator, checked=True
            )


def transfer(name: str, source: nn.Module) -> NamedAttack:
    """Return the attack that takes its images from ``source``, a model on the same classes."""
    attack: Any = Transfer(name, source)
    return NamedAttack(attack.label, attack, cost=2.0 * attack.pgd.steps)
