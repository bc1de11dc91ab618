"""The attacks, one file each: an attack maximises an objective inside a threat set.

Two ways to call them: as settings inside a run (``PGD(steps=10)(objective, x, threat)``), and as plain functions of a model,
``clead.attacks.pgd(model, x, y, eps=8/255)``, that return adversarial images.
"""

from __future__ import annotations

from typing import Any

from clead.registry import Registry

ATTACKS: Registry[Any] = Registry("attack", "clead.attacks")
OBJECTIVES: Registry[Any] = Registry("objective", "clead.attacks")

from clead.attacks.fgsm import fgsm  # noqa: E402  (the files register themselves in the registries above)
from clead.attacks.pgd import pgd  # noqa: E402

__all__ = ["ATTACKS", "OBJECTIVES", "fgsm", "pgd"]
