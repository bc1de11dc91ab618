"""Batch-norm's running statistics, measured anew."""

from __future__ import annotations

import torch
from torch import nn

from clead.attacks.pgd import PGD
from clead.attacks.runner import run_attack
from clead.data.loaders import make_generator
from clead.distributed.batch_norm import unsynchronised
from clead.evaluation.correctness import to_float
from clead.interfaces import ImageSet, Threat
from clead.models.modes import attack_mode, batch_norms
from clead.models.seeding import fork_rng
from clead.tasks import Task
from clead.tasks.classification import CLASSIFICATION

_ATTACK = PGD(steps=3)
_STREAM = 11  # of random starts, apart from those of training


def measure_statistics(
    model: nn.Module,
    images: ImageSet,
    threat: Threat,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    task: Task = CLASSIFICATION,
) -> None:
    """Replace the running statistics of ``model`` by the means over batches, each of clean images and their adversarial images.

    Statistics kept by momentum lag behind the weights, and a network with few images per epoch may never catch up. Nothing else of
    the model changes.

    Args:
        model: attacked as it is, by PGD of 3 steps on the cross-entropy.
        images: labelled; the last ones are left out if they do not fill a batch.
        threat: of the attack.
        batch_size: images of a batch.
        seed: of the random starts.
        device: where to compute.
        task: whose cross-entropy that is.
    """
    norms = batch_norms(model)
    batch_size = min(batch_size, len(images))
    if not norms or batch_size < 2:
        return
    batches = []
    with fork_rng(seed):
        for start in range(0, len(images) - batch_size + 1, batch_size):
            batch = images.subset(torch.arange(start, start + batch_size))
            x, y = to_float(batch.images).to(device), batch.labels.to(device)
            generator = make_generator(device, seed, start, _STREAM)
            batches.append((x, run_attack(_ATTACK, model, x, y, threat, task=task, generator=generator, checked=True)))
        with attack_mode(model), unsynchronised(model), torch.no_grad():
            momenta = [norm.momentum for norm in norms]
            try:
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum, norm.training = None, True
                for pair in batches:
                    model(torch.cat(pair))
            finally:
                for norm, momentum in zip(norms, momenta, strict=True):
                    norm.momentum = momentum
