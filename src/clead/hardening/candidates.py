"""The networks that a plan chooses between, and the recipe of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clead.data.survey import Survey
from clead.models.library import is_kind

_DIGITS = 28  # grey images up to so many pixels a side are like MNIST's


@dataclass(frozen=True)
class Candidate:
    """A network, before it was timed.

    Attributes:
        name: as users read it.
        model: the ``model`` group of its recipe.
        pretrained: whether it begins with weights that were learnt on other images.
    """

    name: str
    model: Mapping[str, Any]
    pretrained: bool


def candidates(data: Survey, model: str | None, *, has_weights: bool | None) -> list[Candidate]:
    """Return what could be trained: the user's network alone, if there is one; else networks from scratch, the smallest first.

    A pre-trained one has to be named: it is not shown to be better (docs/harden.md).

    Args:
        data: what is known of the images.
        model: that the user named, if any.
        has_weights: whether the user has it begin with weights; None: not said, so that the network's name says it.
    """
    if model is not None:
        return [Candidate(model, {"name": model}, _brings_weights(model) if has_weights is None else has_weights)]
    if max(data.sides) <= _DIGITS and data.channels == 1:
        return [
            Candidate(f"small_cnn of width {width}", {"name": "small_cnn", "width": width}, False) for width in (16, 32)
        ]
    choices = [
        Candidate(f"resnet10 of width {width}", {"name": "resnet10", "width": width}, False) for width in (16, 32, 64)
    ]
    choices.append(Candidate("resnet18", {"name": "resnet18"}, False))
    return choices


def _brings_weights(model: str) -> bool:
    """Say whether a network is known to come with weights: one of ours that does, a folder, or one of a hub."""
    library, _, name = model.partition(":")
    return model == "efficientnet_lite0" or (library == "hf" and not is_kind(name))


def training(candidate: Candidate, *, one_step: bool, robust: bool) -> dict[str, dict[str, Any]]:
    """Return the groups ``attack``, ``method``, ``optim`` and part of ``train``.

    What is chosen for a pre-trained network, and why, stands in docs/harden.md: frozen in evaluation mode, a radius that rises.

    Args:
        candidate: the network.
        one_step: whether one from scratch is trained by one-step attacks, as suffices in the L∞ norm, not by three-step PGD.
        robust: for the robust training, not the plain one.
    """
    if candidate.pretrained:
        optim = {"name": "adamw", "lr": 1e-3, "weight_decay": 5e-4, "schedule": "one_cycle", "warmup": 0.1}
        modes = {"forward_mode": "eval", "channels_last": True}
        if not robust:
            return {"method": {"name": "standard"}, "optim": {**optim, "lr": 3e-4}, "train": modes}
        return {
            "attack": {"name": "pgd", "steps": 3},
            "method": {"name": "pgd_at", "fold_batch_norm": True},
            "optim": optim,
            "train": {**modes, "eps_ramp": [0.05, 0.6]},
        }
    optim = {"name": "sgd", "lr": 0.1, "weight_decay": 5e-4, "schedule": "one_cycle", "warmup": 0.3}
    if not robust:
        return {"method": {"name": "standard"}, "optim": optim, "train": {"channels_last": True}}
    if one_step:
        attack: dict[str, Any] = {"name": "fgsm", "random_start": True, "step_size": 1.25}
        method = {"name": "fgsm_rs", "fold_batch_norm": True}
    else:
        attack, method = {"name": "pgd", "steps": 3}, {"name": "pgd_at", "fold_batch_norm": True}
    return {"attack": attack, "method": method, "optim": optim, "train": {"channels_last": True}}
