"""The joint objective with other defaults: trades."""

from __future__ import annotations

from clead.methods import METHODS
from clead.methods.clead import INNER, CLead, Inner
from clead.settings import setting, settings


@METHODS.register("trades")
@settings
class TRADES(CLead):
    """CE(f(x), y) + κ·KL(f(x) ‖ f(x_adv)), x_adv maximising the KL (Zhang et al. 2019, arXiv:1901.08573, eq. 5).

    Departures from the authors' code: the attack starts as ``attack`` says, not from Gaussian noise of 0.001; clean and adversarial
    images go forward in one batch, unless ``separate_forwards`` is set.
    """

    adversarial_weight: float = setting(0.0, "α: weight of the cross-entropy of adversarial images", ge=0)
    clean_weight: float = setting(1.0, "β: weight of the cross-entropy of clean images", ge=0)
    kl_weight: float = setting(6.0, "κ: weight of KL(clean ‖ adversarial), TRADES's 1/λ", ge=0)
    contrastive_weight: float = setting(0.0, "λ: weight of the contrastive term", ge=0)
    inner: Inner = setting("kl", INNER)

    @property
    def uses_unlabelled(self) -> bool:
        """False as in the paper, unless some other term is added; the clead method takes the KL of unlabelled images too."""
        return self.contrastive_weight > 0
