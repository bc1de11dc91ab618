"""N-FGSM: one step from strong noise around the image, without clipping to the ball."""

from __future__ import annotations

from torch import Tensor

from clead.interfaces import Batch
from clead.methods import METHODS
from clead.methods.base import StepContext
from clead.methods.one_step import OneStep
from clead.models.split import SplitModel
from clead.settings import setting, settings


@METHODS.register("n_fgsm")
@settings
class NFGSM(OneStep):
    """E[CE(f(x_adv), y)], x_adv = x + η + α·eps·sign ∇_x CE(f(x + η), y), η uniform in a ball of k·eps.

    Source: de Jorge et al. 2022, arXiv:2202.01181, eq. 4: noise stronger than eps and no projection onto the ball prevent
    catastrophic overfitting at the cost of one step. Both points are clipped to [0, 1]. ``attack`` is not used. Departures: the
    gradient is taken in evaluation mode (``train.attack_mode``), and the step is the threat's own, so it exists in every norm.
    """

    noise_radius: float = setting(2.0, "k: radius of the noise; 2 in the paper", ge=0, unit="multiples of eps")
    step_size: float = setting(1.0, "α: length of the step; 1 in the paper", gt=0, unit="multiples of eps")

    def adversaries(self, model: SplitModel, batch: Batch, y: Tensor, step: StepContext) -> dict[str, Tensor]:
        """Return the adversarial images, up to (k + α)·eps away."""
        x = batch.images
        start = (x + self.noise_radius * self.noise(x, step)).clamp(0, 1)
        gradient = self.gradient(model, x, y, start, step)
        return {"adversarial": step.threat.ascend(start, gradient, self.step_size * step.threat.eps).clamp(0, 1)}
