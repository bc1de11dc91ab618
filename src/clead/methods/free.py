"""Free adversarial training: one backward serves the weights and the perturbation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clead.interfaces import Batch, StepOutput
from clead.methods import METHODS
from clead.methods.base import Method, Step, Views, require_labels
from clead.models.split import SplitModel
from clead.settings import setting, settings


class Perturbation(nn.Module):
    """δ of the minibatch before, and the gradient of the loss by it that its backward left; both (B, C, H, W), at first empty."""

    delta: Tensor
    gradient: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("delta", torch.zeros(0, *shape))
        self.register_buffer("gradient", torch.zeros(0, *shape))

    def fit(self, x: Tensor) -> None:
        """Begin with δ = 0 for as many images as ``x`` has, unless there is a δ for so many."""
        if self.delta.shape != x.shape:
            self.delta, self.gradient = torch.zeros_like(x), torch.zeros_like(x)

    def keep(self, gradient: Tensor) -> None:
        """Remember the gradient; where it overflowed in half precision (the optimiser skips that step too) it counts as 0."""
        self.gradient.copy_(gradient.nan_to_num(0, 0, 0))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **keys: Any) -> None:
        for name in ("delta", "gradient"):  # a saved state knows how many images a batch has
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.delta.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **keys)


@METHODS.register("free")
@settings
class Free(Method):
    """CE(f(x + δ), y), every minibatch m times in a row; each backward gives ∇_θ and ∇_δ, then δ ← Π(δ + eps·sign ∇_δ).

    Source: Shafahi et al. 2019, arXiv:1904.12843, algorithm 1. δ starts at 0 and goes on from minibatch to minibatch. An epoch is
    N images seen, replays included, and so holds N/m different ones; the paper's N_ep/m. A step costs 3 forward-equivalents per
    image, as plain training does. There is no other attack: ``attack`` is not used.

    Departures: the ascent step is the threat's, for every norm, of length eps; Π is onto ball ∩ [0, 1] around x, where the paper
    clips δ to the ball and x + δ to [0, 1], so what left the box is forgotten before the next minibatch. The gradient is taken in
    train mode, as in the paper and unlike the other methods here. With ``train.awp`` both gradients are those at the perturbed
    weights, and a step costs 6.
    """

    replays: int = setting(8, "m: steps in a row on each minibatch; 8 in the paper for CIFAR-10, 4 for ImageNet", ge=1)
    label_smoothing: float = setting(0.0, "of the cross-entropy, and so of δ's gradient too", ge=0, lt=1)

    def memory(self, model: SplitModel, *, images: int, num_classes: int, shape: tuple[int, ...]) -> Perturbation:
        """Return δ and its pending gradient."""
        return Perturbation(shape)

    def views(self, model: SplitModel, batch: Batch, step: Step) -> Views:
        """Return x + δ after the update that the backward before has left to do; without a memory δ is 0."""
        require_labels(batch, "free")
        x = batch.images
        kept = step.memory if isinstance(step.memory, Perturbation) else Perturbation(tuple(x.shape[1:])).to(x.device)
        kept.fit(x)
        x_adv = step.threat.project(step.threat.ascend(x + kept.delta, kept.gradient, float(step.threat.eps)), x)
        kept.delta = x_adv - x
        x_adv.requires_grad_().register_hook(kept.keep)
        return Views({"adversarial": x_adv}, batch)

    def loss(self, model: SplitModel, views: Views, step: Step) -> StepOutput:
        """Return the cross-entropy of x + δ."""
        y, soft = views.batch.labels, views.batch.soft_labels
        # A model that normalises in place may not write into a leaf.
        logits = model(views.images["adversarial"].clone())
        loss = F.cross_entropy(logits.float(), y if soft is None else soft, label_smoothing=self.label_smoothing)
        metrics = {
            "adversarial_cross_entropy": loss.detach(),
            "robust_accuracy": (logits.argmax(1) == y).float().mean(),
        }
        return StepOutput(loss, metrics)
