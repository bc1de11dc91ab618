"""Adversarial contrastive pre-training: the encoder learns from a clean and an adversarial pair of views, without a label."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clead.interfaces import Batch, Objective, StepOutput
from clead.losses.contrastive import nt_xent
from clead.methods import METHODS
from clead.methods.base import Method, StepContext, Views, over_whole_batch
from clead.methods.view_forward import forward
from clead.models.fold_batch_norm import folded
from clead.models.modes import attack_mode
from clead.models.split import SplitModel
from clead.settings import Ratio, setting, settings

_SHORT = 1e-6  # of one change of the weights: 0.15 / 0.05 is below 3


@METHODS.register("acl")
@settings
class ACL(Method):
    """½ mean_i [(1 − ω)·l_i(v_1, v_2) + (1 + ω)·l_i(v_1', v_2')], l the symmetric NT-Xent of two views; v_1' and v_2' maximise it.

    Source: ACL, dual stream (Jiang et al. 2020, arXiv:2010.13337), with ω = 0, τ = 0.5 and d = 512; DynACL (Luo et al. 2023,
    arXiv:2303.01289) with ω(t) = ν·(1 − s(t)), s(t) = 1 − ⌊t/K⌋·K/T, and views whose strength is s(t) (``data.augment.anneal``).
    The factor ½ is that of the authors' code of both. v_1 and v_2 are two augmentations of an image, as strong as SimCLR's
    (``data.augment`` and ``data.view``, alike); both are perturbed at once, each in its own threat set, on the adversarial stream's
    batch-norms in evaluation mode. No label is looked at and the classifier does not learn: a stage after trains it on frozen
    features with clean images (SLF) or adversarial ones (ALF), or fine-tunes everything (AFF); recipes ``cifar10-small-acl-*``.

    Departures: the projection head has two layers and no batch-norm (three with, in the authors' code); t counts steps, not epochs,
    from 0 on, where DynACL's code counts epochs from 1; and both views go through the model itself, one of DynACL's code through a
    momentum encoder.
    """

    temperature: float = setting(0.5, "τ of the NT-Xent, in both terms and in the attack", gt=0)
    embedding_dim: int = setting(128, "size of the projected embedding", ge=2)
    dual_batch_norm: bool = setting(
        True,
        "clean views have batch-norms of their own, weights and statistics, dropped after the training; the model's own, which are "
        "deployed, are those of the adversarial views",
    )
    reweight: Ratio = setting(
        Ratio(0),
        "ν of DynACL: over training the weight of the adversarial term rises towards 1 + ν and that of the clean one falls towards "
        "1 − ν; 2/3 in the authors' code; 0: ACL",
        ge=0,
        le=1,
    )
    reweight_step: float = setting(
        0.05,
        "K/T of DynACL, if reweight: how long the weights stay as they are, as data.augment.anneal says for the views",
        gt=0,
        lt=1,
        unit="fraction of training",
    )
    fold_batch_norm: bool = setting(
        False, "fold batch-norm into the convolutions during the inner attack: faster, same up to rounding"
    )

    uses_embedding = uses_second_view = uses_unlabelled = True
    uses_classifier = False

    def state(self, model: SplitModel, shape: tuple[int, ...]) -> nn.Module | None:
        """Return the clean views' batch-norms, or None if they share the model's."""
        return CleanNorms(model) if self.dual_batch_norm else None

    def views(self, model: SplitModel, batch: Batch, step: StepContext) -> Views:
        """Return the two views and their adversaries."""
        assert batch.second_view is not None, "the loader was built without a second view"
        x = torch.cat([batch.images, batch.second_view])
        with attack_mode(model, step.attack_mode), folded(model, x) if self.fold_batch_norm else nullcontext():
            objective = over_whole_batch(
                lambda: joint_nt_xent(model, self.temperature), model, len(batch.images), step.world, views=2
            )
            x_adv = step.attack(objective, x, step.threat, generator=step.generator)
        names = ("first", "second", "first_adversarial", "second_adversarial")
        return Views(dict(zip(names, (*x.chunk(2), *x_adv.chunk(2)), strict=True)), batch)

    def loss(self, model: SplitModel, views: Views, step: StepContext) -> StepOutput:
        """Return the weighted mean of both terms, and each term; without memory both streams share the model's batch-norms."""

        def contrast(suffix: str) -> Tensor:
            pair = {name + suffix: views.images[name + suffix] for name in ("first", "second")}
            z = [model.embedding(outputs.features) for outputs in forward(model, pair).values()]
            return nt_xent(z, self.temperature).mean()

        with step.state.lent_to(model) if isinstance(step.state, CleanNorms) else nullcontext():
            clean = contrast("")
        adversarial = contrast("_adversarial")
        changes = math.floor(step.progress / self.reweight_step + _SHORT)
        omega = self.reweight * changes * self.reweight_step
        loss = ((1 - omega) * clean + (1 + omega) * adversarial) / 2
        metrics = {"clean_contrastive": clean.detach(), "adversarial_contrastive": adversarial.detach()}
        return StepOutput(loss, metrics)


def joint_nt_xent(model: SplitModel, temperature: float) -> Objective:
    """Return x ↦ l_i(v_1, v_2) of a stack x of both views, (2B, C, H, W), for each of its images: (2B,), that of v_1 and v_2 alike.

    Called under ``attack_mode(model)``; B ≥ 2.
    """

    def value(x: Tensor) -> Tensor:
        first, second = model.embedding(model.features(x)).chunk(2)
        return nt_xent([first, second], temperature).repeat(2)

    return value


class CleanNorms(nn.Module):
    """Batch-norms of a second stream: copies of the model's as they are at the start, each with weights and statistics of its own.

    Source: dual batch-norm (Xie et al. 2020, arXiv:1911.09665, section 4), with the auxiliary one for the clean images instead.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(copy.deepcopy(norm) for norm in _norms(model))

    @contextmanager
    def lent_to(self, model: SplitModel) -> Generator[None, None, None]:
        """Let the batch-norms of ``model`` compute with these weights and update these statistics.

        Inside the block the forward runs uncompiled: a compiled one would not see them. On exit, also through an exception, each
        layer has its own tensors again, which were not touched.
        """
        compiled, model._compiled = model._compiled, None
        attributes = [(norm, norm._parameters, norm._buffers) for norm in _norms(model)]
        try:
            for (norm, _, _), lent in zip(attributes, self.norms, strict=True):
                norm._parameters, norm._buffers = lent._parameters, lent._buffers
            yield
        finally:
            for norm, parameters, buffers in attributes:
                norm._parameters, norm._buffers = parameters, buffers
            model._compiled = compiled


def _norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
