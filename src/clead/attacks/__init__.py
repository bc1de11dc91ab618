"""The attacks, one file each: an attack maximises an objective inside a threat set.

Two ways to call them: as settings inside a run (``PGD(steps=10)(objective, x, threat)``), and as plain functions of a model,
``clead.attacks.pgd(model, x, y, eps=8/255)``, that return adversarial images.
"""

from __future__ import annotations

from typing import Any

from clead.registry import Registry

ATTACKS: Registry[Any] = Registry("attack", "clead.attacks")
OBJECTIVES: Registry[Any] = Registry("objective", "clead.attacks")
UNRESTRICTED: Registry[Any] = Registry("unrestricted attack", "clead.attacks")

from clead.attacks.apgd import apgd  # noqa: E402
from clead.attacks.cw import cw  # noqa: E402
from clead.attacks.deepfool import deepfool  # noqa: E402
from clead.attacks.eot import eot_pgd, expectation  # noqa: E402
from clead.attacks.external import external  # noqa: E402
from clead.attacks.fab import fab  # noqa: E402
from clead.attacks.fgsm import fgsm  # noqa: E402  (the files register themselves in the registries above)
from clead.attacks.fmn import fmn  # noqa: E402
from clead.attacks.mi_fgsm import mi_fgsm  # noqa: E402
from clead.attacks.patch import patch  # noqa: E402
from clead.attacks.pgd import pgd  # noqa: E402
from clead.attacks.rays import rays  # noqa: E402
from clead.attacks.spatial import spatial  # noqa: E402
from clead.attacks.square import square  # noqa: E402

__all__ = [
    "ATTACKS",
    "OBJECTIVES",
    "UNRESTRICTED",
    "apgd",
    "cw",
    "deepfool",
    "eot_pgd",
    "expectation",
    "external",
    "fab",
    "fgsm",
    "fmn",
    "mi_fgsm",
    "patch",
    "pgd",
    "rays",
    "spatial",
    "square",
]
