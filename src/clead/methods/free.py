"""The joint objective with other defaults: free."""

from __future__ import annotations

from clead.methods import METHODS
from clead.methods.clead import INNER, CLead, Inner
from clead.settings import setting, settings


@METHODS.register("free")
@settings
class Free(CLead):
    """CE(f(x + δ), y), every minibatch m times in a row, δ moved by the same backward (Shafahi et al. 2019, arXiv:1904.12843).

    See ``replayed`` for its algorithm 1. An epoch is N images seen, replays included, and so holds N/m different ones; the paper's
    N_ep/m. A step costs 3 forward-equivalents per image, as plain training does; with ``train.awp`` both gradients are those at the
    perturbed weights, and it costs 6. There is no other attack: ``attack`` and ``inner`` are not used.
    """

    adversarial_weight: float = setting(1.0, "α: weight of the cross-entropy of adversarial images", ge=0)
    clean_weight: float = setting(0.0, "β: weight of the cross-entropy of clean images", ge=0)
    kl_weight: float = setting(0.0, "κ: weight of KL(clean ‖ adversarial), TRADES's 1/λ", ge=0)
    contrastive_weight: float = setting(0.0, "λ: weight of the contrastive term", ge=0)
    inner: Inner = setting("cross_entropy", INNER)
    replays: int = setting(8, "m: steps in a row on each minibatch; 8 in the paper for CIFAR-10, 4 for ImageNet", ge=1)
