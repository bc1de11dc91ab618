"""The attacks, one file each: an attack maximises an objective inside a threat set, or looks for a mistake by itself.

Two ways to call them: as settings inside a run (``PGD(steps=10)(objective, x, threat)``), and as plain functions of a model,
``clead.attacks.pgd(model, x, y, eps="8/255")``, that return adversarial images. The functions are derived from the settings.

>>> import torch, clead
>>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
>>> x = torch.full((1, 1, 2, 2), 0.5)
>>> x_adv = clead.attacks.pgd(model, x, torch.tensor([0]), eps="8/255", steps=5)
>>> bool((x_adv - x).abs().max() <= 8 / 255 + 1e-6)
True
"""

from __future__ import annotations

from typing import Any

from clead.registry import Registry

ATTACKS: Registry[Any] = Registry(
    "attack", "clead.attacks", {"search": "perturb", "doubt": "weakness_warning", "meant_for": "norms"}
)
OBJECTIVES: Registry[Any] = Registry("objective", "clead.attacks")
UNRESTRICTED: Registry[Any] = Registry("unrestricted attack", "clead.attacks")

# Below the registries, in which the files register themselves.
from clead.attacks.eot import expectation  # noqa: E402
from clead.attacks.external import external  # noqa: E402
from clead.attacks.functions import functions  # noqa: E402
from clead.attacks.runner import run_attack  # noqa: E402

_FUNCTIONS = functions()  # a name such as pgd is the function from here on, not the module
globals().update(_FUNCTIONS)

__all__ = ["ATTACKS", "OBJECTIVES", "UNRESTRICTED", "expectation", "external", "run_attack"]
__all__ += list(_FUNCTIONS)
