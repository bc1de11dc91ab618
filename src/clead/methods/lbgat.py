"""Guidance by the logits of a clean model: ``ARD`` with other defaults."""

from __future__ import annotations

from typing import Literal

from clead.methods import METHODS
from clead.methods.ard import ARD
from clead.settings import setting, settings


@METHODS.register("lbgat")
@settings
class LBGAT(ARD):
    """MSE(S(x_adv), T(x)) + κ·KL(S(x) ‖ S(x_adv)), x_adv maximising the KL (LBGAT: Cui et al. 2021, arXiv:2011.11164, eq. 7).

    The teacher, ``train.teacher``, is trained plainly. Departure: in the paper it learns beside the student; here it is fixed.
    """

    kl_weight: float = setting(
        6.0, "κ: weight of KL(clean ‖ adversarial) of the student, as in TRADES; 0 or 6 in the paper", ge=0
    )
    distance: Literal["kl", "squared"] = setting(
        "squared", "between answers: KL(teacher ‖ student), or the mean squared difference of logits"
    )
    temperature: float = setting(1.0, "t: divides the logits inside the KL, which is multiplied by t²", gt=0)
    inner: Literal["cross_entropy", "kl", "teacher"] = setting(
        "kl",
        "J, what the inner attack maximises: cross-entropy, KL to the student's clean prediction or to the teacher's",
    )
