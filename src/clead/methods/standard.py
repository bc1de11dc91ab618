"""The joint objective with other defaults: standard."""

from __future__ import annotations

from clead.methods import METHODS
from clead.methods.clead import INNER, CLead, Inner
from clead.settings import setting, settings


@METHODS.register("standard")
@settings
class Standard(CLead):
    """Plain training: CE(f(x), y), no attack."""

    adversarial_weight: float = setting(0.0, "α: weight of the cross-entropy of adversarial images", ge=0)
    clean_weight: float = setting(1.0, "β: weight of the cross-entropy of clean images", ge=0)
    kl_weight: float = setting(0.0, "κ: weight of KL(clean ‖ adversarial), TRADES's 1/λ", ge=0)
    contrastive_weight: float = setting(0.0, "λ: weight of the contrastive term", ge=0)
    inner: Inner = setting("cross_entropy", INNER)
