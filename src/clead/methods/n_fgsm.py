"""N-FGSM: one step from strong noise around the image, without clipping to the ball."""

from __future__ import annotations

from torch import Tensor

from clead.interfaces import Batch
from clead.methods import METHODS
from clead.methods.base import StepContext
from clead.methods.clead import INNER, CLead, Inner
from clead.methods.one_step import noise
from clead.models.split import SplitModel
from clead.settings import setting, settings


@METHODS.register("n_fgsm")
@settings
class NFGSM(CLead):
    """E[CE(f(x_adv), y)], x_adv = x + η + α·eps·sign ∇_x CE(f(x + η), y), η uniform in a ball of k·eps.

    Source: de Jorge et al. 2022, arXiv:2202.01181, eq. 4: noise stronger than eps and no projection onto the ball prevent
    catastrophic overfitting at the cost of one step. Both points are clipped to [0, 1]. ``attack`` is not used. Departures: the
    gradient is taken in evaluation mode (``train.attack_mode``), and the step is the threat's own, so it exists in every norm.
    """

    adversarial_weight: float = setting(1.0, "α: weight of the cross-entropy of adversarial images", ge=0)
    clean_weight: float = setting(0.0, "β: weight of the cross-entropy of clean images", ge=0)
    kl_weight: float = setting(0.0, "κ: weight of KL(clean ‖ adversarial), TRADES's 1/λ", ge=0)
    contrastive_weight: float = setting(0.0, "λ: weight of the contrastive term", ge=0)
    inner: Inner = setting("cross_entropy", INNER)
    noise_radius: float = setting(2.0, "k: radius of the noise; 2 in the paper", ge=0, unit="multiples of eps")
    step_size: float = setting(1.0, "α: length of the step; 1 in the paper", gt=0, unit="multiples of eps")

    def adversaries(self, model: SplitModel, batch: Batch, y: Tensor, step: StepContext) -> dict[str, Tensor]:
        """Return the adversarial images, up to (k + α)·eps away."""
        x = batch.images
        start = (x + self.noise_radius * noise(x, step)).clamp(0, 1)
        _, gradient = self.inner_gradient(model, batch, y, start, step)
        return {"adversarial": step.threat.ascend(start, gradient, self.step_size * step.threat.eps).clamp(0, 1)}
