"""C-LEAD: robust image classifiers by adversarial training joined with contrastive learning, measured honestly.

>>> import clead
>>> config = clead.load_recipe("digits-standard", ["--train.budget", "3", "--eval.steps", "2"])
>>> config.threat.eps
0.15
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from clead import attacks
    from clead.api import (
        compare,
        evaluate,
        evaluate_external,
        evaluate_run,
        export_run,
        inspect_data,
        load,
        measure,
        profile,
        train,
        write_report,
    )
    from clead.config import RunConfig, load_recipe
    from clead.errors import UserError
    from clead.hardening import harden
    from clead.models.split import adapt
    from clead.models.user_model import allow_code
    from clead.training.robust_loss import RobustLoss, robust_loss

# PyTorch takes over a second to import, so the names below are imported when they are first used.
_WHERE = {
    "RobustLoss": "clead.training.robust_loss",
    "RunConfig": "clead.config",
    "UserError": "clead.errors",
    "adapt": "clead.models.split",
    "allow_code": "clead.models.user_model",
    "compare": "clead.api",
    "evaluate": "clead.api",
    "evaluate_external": "clead.api",
    "evaluate_run": "clead.api",
    "export_run": "clead.api",
    "harden": "clead.hardening",
    "inspect_data": "clead.api",
    "load": "clead.api",
    "load_recipe": "clead.config",
    "measure": "clead.api",
    "profile": "clead.api",
    "robust_loss": "clead.training.robust_loss",
    "train": "clead.api",
    "write_report": "clead.api",
}

__all__ = [
    "RobustLoss",
    "RunConfig",
    "UserError",
    "__version__",
    "adapt",
    "allow_code",
    "attacks",
    "compare",
    "evaluate",
    "evaluate_external",
    "evaluate_run",
    "export_run",
    "harden",
    "inspect_data",
    "load",
    "load_recipe",
    "measure",
    "profile",
    "robust_loss",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "attacks":
        return import_module("clead.attacks")
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    if name.endswith("_run"):  # a measurement by its name of version 0.1
        return getattr(import_module("clead.api"), name)
    raise AttributeError(f"module 'clead' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
