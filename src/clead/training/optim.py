"""Optimisers and learning-rate schedules, PyTorch's own, from settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
)

from clead.config import Optim


def parameter_groups(
    parameters: Sequence[nn.Parameter], depths: Mapping[nn.Parameter, float | None], settings: Optim
) -> list[dict[str, Any]]:
    """Return ``parameters`` in groups of one learning rate each, the highest first.

    depths: see ``clead.training.freezing.depths``; a parameter that is not in it learns as the classifier does.
    """
    rates: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        depth = depths.get(parameter)
        factor = 1.0 if depth is None else settings.encoder_lr * settings.first_layer_lr ** (1 - depth)
        rates.setdefault(settings.lr * factor, []).append(parameter)
    return [{"params": rates[lr], "lr": lr} for lr in sorted(rates, reverse=True)]


def make_optimizer(parameters: Iterable[nn.Parameter] | list[dict[str, Any]], settings: Optim) -> Optimizer:
    """Return SGD with Nesterov momentum or AdamW over the parameters, or over groups of them."""
    if settings.name == "adamw":
        return AdamW(
            parameters,
            lr=settings.lr,
            betas=(settings.momentum, 0.999),
            weight_decay=settings.weight_decay,
            fused=True,
        )
    return SGD(
        parameters,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
        fused=True,
    )


def make_schedule(optimizer: Optimizer, settings: Optim, steps: int) -> LRScheduler:
    """Return the learning rate over ``steps`` optimiser steps.

    one_cycle: Smith 2018, arXiv:1803.09820, cosine up over ``warmup`` and down to 0, momentum fixed. cosine: Loshchilov &
    Hutter 2017, arXiv:1608.03983, without restarts. step: falls by ``decay`` at each milestone. The latter two and constant
    rise linearly over ``warmup`` first.
    """
    rising = round(settings.warmup * steps)
    if settings.schedule == "one_cycle":
        # PyTorch counts the last step in: one more avoids its error when a resumed run steps exactly ``steps`` times.
        # Its rise lasts pct_start · (steps + 1) − 1 steps and is divided by that: never exactly 0.
        rise = settings.warmup * (steps + 1)
        return OneCycleLR(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            total_steps=steps + 1,
            pct_start=max(settings.warmup if abs(rise - 1) > 1e-6 else settings.warmup * (1 - 1e-6), 1e-6),
            cycle_momentum=False,
        )
    main: LRScheduler
    if settings.schedule == "cosine":
        main = CosineAnnealingLR(optimizer, max(steps - rising, 1))
    elif settings.schedule == "step":
        main = MultiStepLR(optimizer, [max(round(m * steps) - rising, 1) for m in settings.milestones], settings.decay)
    else:
        main = ConstantLR(optimizer, factor=1.0)
    if not rising:
        return main
    return SequentialLR(optimizer, [LinearLR(optimizer, 1 / (rising + 1), total_iters=rising), main], [rising])
