"""FGSM-PGI: one step that starts where the momentum of earlier epochs has led each image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clead.interfaces import Batch
from clead.methods import METHODS
from clead.methods.base import StepContext, Views
from clead.methods.clead import INNER, CLead, Inner
from clead.methods.one_step import Turns, noise
from clead.methods.view_forward import Outputs
from clead.models.split import SplitModel
from clead.settings import setting, settings
from clead.threats.geometry import flat, per_image

_STORED = torch.bfloat16
_SHORT = 1e-6  # of a reset: 0.8 / 0.4 is below 2


@METHODS.register("fgsm_pgi")
@settings
class FGSMPGI(CLead):
    """E[CE(f(x_adv), y)] + λ·‖f(x_adv) − f(x + η)‖² / K, x_adv one step of eps from x + η, η that image's perturbation of before.

    Source: prior-guided FGSM with momentum of all previous epochs, FGSM-MEP (Jia et al. 2022, arXiv:2207.08859, eq. 6-9):
    m ← μ·m + g/‖g‖₁, g = ∇_x CE(f(x + η), y); x_adv = x + Π(η + eps·sign g); and, for the next epoch, η ← Π(η + eps·sign m). At
    first, and again after each ``reset`` of the training, η = ±eps with random signs and m = 0. ``attack`` is not used.

    η and m of every training image are kept in bfloat16, in memory and in checkpoints: 4 bytes per value of a pixel.
    Departures: an image's perturbation stays where it is though its crop and mirroring change, as in the FastAT benchmark, not as
    in the authors' code; what of η leads out of [0, 1] is lost before the steps, not after them; the gradient is taken in
    evaluation mode (``train.attack_mode``); both points go forward in one batch; the steps are the threat's own, so that they exist
    in every norm.
    """

    adversarial_weight: float = setting(1.0, "α: weight of the cross-entropy of adversarial images", ge=0)
    clean_weight: float = setting(0.0, "β: weight of the cross-entropy of clean images", ge=0)
    kl_weight: float = setting(0.0, "κ: weight of KL(clean ‖ adversarial), TRADES's 1/λ", ge=0)
    contrastive_weight: float = setting(0.0, "λ: weight of the contrastive term", ge=0)
    inner: Inner = setting("cross_entropy", INNER)
    smoothness_weight: float = setting(10.0, "λ: weight of the squared distance of the logits; 10 in the paper", ge=0)
    decay: float = setting(0.3, "μ: what remains of the momentum from epoch to epoch; 0.3 in the paper", ge=0, lt=1)
    reset: float = setting(
        0.4,
        "when perturbations begin anew; 40 of 100 epochs in the paper",
        gt=0,
        le=1,
        unit="fraction of training",
    )

    remembers_images = True

    def problems(self, data: Any, train: Any) -> list[str]:
        """Return what of the settings of data and training does not go with this method, one line each."""
        if data.cutmix:
            return [
                f"data.cutmix: a mixed image is none whose perturbation is remembered, got {data.cutmix:g}; set it to 0"
            ]
        if awp := getattr(train, "awp", 0):
            return [
                f"train.awp: would copy the perturbations of all images at every step, got {awp:g}; set it to 0, or take another "
                "method (method.name n_fgsm)"
            ]
        return super().problems(data, train)

    def state(self, model: SplitModel, shape: tuple[int, ...]) -> nn.Module | None:
        """Return the memory of perturbations, empty until it knows the number of images."""
        return Perturbations(shape)

    def adversaries(self, model: SplitModel, batch: Batch, y: Tensor, step: StepContext) -> dict[str, Tensor]:
        """Return the adversarial images and where they started, both in the threat set, and note where they start next."""
        x, threat = batch.images, step.threat
        if not threat.eps:
            return {"adversarial": x, "start": x}
        delta = threat.ascend(x, noise(x, step), threat.eps) - x
        momentum, memory = torch.zeros_like(x), None
        if isinstance(step.state, Perturbations) and batch.index is not None and len(step.state.seen):
            memory = step.state
            memory.begin_anew(int(step.progress / self.reset + _SHORT))
            seen = per_image(memory.seen[batch.index], x)
            delta = torch.where(seen, memory.delta[batch.index].to(x), delta)
            momentum = torch.where(seen, memory.momentum[batch.index].to(x), momentum)
        start = threat.project(x + delta, x)
        _, gradient = self.inner_gradient(model, batch, y, start, step)
        length = flat(gradient).abs().sum(1)
        momentum = self.decay * momentum + gradient / per_image(length.clamp_min(torch.finfo(x.dtype).tiny), x)
        if memory is not None and batch.index is not None:
            memory.keep(batch.index, threat.project(threat.ascend(start, momentum, threat.eps), x) - x, momentum, step)
        return {"adversarial": threat.project(threat.ascend(start, gradient, threat.eps), x), "start": start}

    def more_terms(
        self, outputs: dict[str, Outputs], views: Views, step: StepContext
    ) -> dict[str, tuple[float, Tensor]]:
        """Return the mean squared distance of the logits of both points."""
        change = outputs["adversarial"].logits.float() - outputs["start"].logits.float()
        return {"smoothness": (self.smoothness_weight, change.square().mean())}


class Perturbations(Turns):
    """η and m of every training image, (N, C, H, W) bfloat16, where ``seen``, (N,) bool; ``count`` is how often they began anew."""

    delta: Tensor
    momentum: Tensor
    seen: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("delta", torch.zeros(0, *shape, dtype=_STORED))
        self.register_buffer("momentum", torch.zeros(0, *shape, dtype=_STORED))
        self.register_buffer("seen", torch.zeros(0, dtype=torch.bool))

    def for_images(self, count: int) -> None:
        """Make room for ``count`` images, none of which was seen."""
        for name, values in list(self.named_buffers()):
            setattr(self, name, values.new_zeros(count, *values.shape[1:]))

    def begin_anew(self, turn: int) -> None:
        """Forget all images if ``turn`` is another than before."""
        if turn != self.count:
            self.count = turn
            self.seen.zero_()

    def keep(self, index: Tensor, delta: Tensor, momentum: Tensor, step: StepContext) -> None:
        """Note what belongs to images ``index``, (b,), of all processes; of an image that comes twice, the last."""
        every = step.world.all_gather(index)
        last = ((every[:, None] == every) * torch.arange(len(every), device=every.device)).amax(1)
        for memory, values in ((self.delta, delta), (self.momentum, momentum)):
            whole = step.world.all_gather(values.to(_STORED, memory_format=torch.contiguous_format).view(torch.uint8))
            memory[every] = whole.view(_STORED)[last]
        self.seen[every] = True
