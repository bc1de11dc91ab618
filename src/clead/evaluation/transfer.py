"""Adversarial images of another model, tried on this one: made for the purpose, or stored by the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clead.attacks.pgd import PGD
from clead.attacks.runner import run_attack
from clead.evaluation.correctness import correct_mask, exact_float32, to_float
from clead.evaluation.state import read_header
from clead.evaluation.suites import NamedAttack
from clead.interfaces import ImageSet, Model, Threat
from clead.models.split import weights
from clead.results.record import TransferResult
from clead.results.statistics import estimate
from clead.weights.files import fingerprint, load_weights

PART = 256
"""Images that a training attacks and keeps together."""
STORED_TEST = "test_images"
"""Where the header of a folder of stored images says how many test images are in it."""


class Transfer:
    """Attack a source model by PGD with all its steps, and hope (Papernot et al. 2016, arXiv:1605.07277)."""

    needs_gradient = False  # of the model that is evaluated

    def __init__(self, name: str, source: nn.Module, steps: int = 50) -> None:
        self.source = source
        # Not APGD, which leaves an image as soon as the source is wrong: a point beyond the boundary transfers better.
        self.pgd = PGD(steps=steps)
        self.label = f"transfer from {name}"
        self.description = {"source": name, "fingerprint": fingerprint(weights(source)), "steps": steps}

    def perturb(
        self, model: Model, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the source's adversarial images, (B, C, H, W) in the threat set around ``x``."""
        with torch.enable_grad():
            return run_attack(
                self.pgd, self.source, x, y, threat, objective="margin", generator=generator, checked=True
            )


def transfer(name: str, source: nn.Module) -> NamedAttack:
    """Return the attack that takes its images from ``source``, a model on the same classes."""
    attack: Any = Transfer(name, source)
    return NamedAttack(attack.label, attack, cost=2.0 * attack.pgd.steps)


class StoredTest(NamedTuple):
    """Stored images of the first test images, (N, C, H, W), and which were wrong for the model they were made for, (N,)."""

    x_adv: Tensor
    wrong: Tensor
    attack: dict[str, Any]


def stored_test(folder: Path, data: str) -> StoredTest | None:
    """Return the adversarial test images that a training has stored in ``folder``; None if there are none, or of other data.

    data: fingerprint of the data set. Raises UserError if they are damaged.
    """
    header = read_header(folder)
    if header is None or header["data"] != data:
        return None
    parts = [
        load_weights(folder / f"test-{number:06d}.safetensors")[0] for number in range(-(-header[STORED_TEST] // PART))
    ]
    x_adv, wrong = (torch.cat([saved[name] for saved in parts]) for name in ("x_adv", "wrong"))
    return StoredTest(x_adv.float(), wrong, {**header["attack"], "clip": header["clip"]})


def transferred(
    model: nn.Module, images: ImageSet, stored: StoredTest, threat: Threat, device: torch.device
) -> TransferResult:
    """Return how many of ``images`` the model has right, clean and as stored; of the first, as far as there are stored ones."""
    n = min(len(images), len(stored.x_adv))
    flags, sizes = [], []
    with exact_float32():
        for start in range(0, n, PART):
            rows = slice(start, min(start + PART, n))
            x, y = to_float(images.images[rows].to(device)), images.labels[rows].to(device)
            x_adv = stored.x_adv[rows].to(device)
            flags += (correct_mask(model, x, y) & correct_mask(model, x_adv, y)).tolist()
            sizes.append(threat.distance(x_adv - x).max().item())
    return TransferResult(
        settings=stored.attack,
        fooled=stored.wrong[:n].float().mean().item(),
        robust=estimate(flags),
        flags=flags,
        max_distance=max(sizes),
    )
