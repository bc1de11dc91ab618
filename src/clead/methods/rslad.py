"""Robust soft-label adversarial distillation: ``ARD`` with other defaults."""

from __future__ import annotations

from typing import Literal

from clead.methods import METHODS
from clead.methods.ard import ARD
from clead.settings import setting, settings


@METHODS.register("rslad")
@settings
class RSLAD(ARD):
    """α·KL(T(x) ‖ S(x_adv)) + (1 − α)·KL(T(x) ‖ S(x)), x_adv maximising the first (Zi et al. 2021, arXiv:2108.07969, eq. 8).

    The teacher, ``train.teacher``, should be robust. α is 5/6 in the paper; no label is looked at.
    """

    adversarial_weight: float = setting(5 / 6, "α: weight of the distance between x_adv and the teacher's x", ge=0)
    clean_weight: float = setting(1 / 6, "1 − α: weight of the distance between x and the teacher's x", ge=0)
    temperature: float = setting(1.0, "t: divides the logits inside the KL, which is multiplied by t²", gt=0)
    inner: Literal["cross_entropy", "kl", "teacher"] = setting(
        "teacher",
        "J, what the inner attack maximises: cross-entropy, KL to the student's clean prediction or to the teacher's",
    )
