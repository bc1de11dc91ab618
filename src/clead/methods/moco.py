"""What the contrastive terms remember from step to step: a momentum encoder with a queue of keys, and class prototypes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clead.distributed import SINGLE_PROCESS, World
from clead.losses.contrastive import Keys
from clead.models.split import SplitModel, copied

_NOBODY = torch.iinfo(torch.int64).min  # the label of a key without one: no image has it


class MomentumQueue(nn.Module):
    """A moving average k of the model q, θ_k ← m·θ_k + (1 − m)·θ_q, and the last ``size`` embeddings that k made.

    Source: MoCo (He et al. 2020, arXiv:1911.05722, eq. 2 and algorithm 1). k starts as q, projection head included; its
    batch-norms keep statistics of their own, of the clean images. It departs in that the labels are queued too, and in that
    batches are not shuffled over devices.

    Attributes:
        encoder: k, a frozen copy of the model.
        fresh: the keys of the batch at hand, and the queue before it; None before the first ``update``. It is made anew in
            every step, so no checkpoint holds it.
    """

    keys: Tensor
    labels: Tensor
    seen: Tensor

    def __init__(self, model: SplitModel, size: int, dim: int, momentum: float) -> None:
        super().__init__()
        self.encoder = copied(model).requires_grad_(False)
        self.momentum = momentum
        self.fresh: Keys | None = None
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("labels", torch.full((size,), _NOBODY))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # keys ever queued

    @torch.no_grad()
    def update(
        self,
        model: SplitModel,
        images: Tensor,
        labels: Tensor,
        embed: Callable[[SplitModel, Tensor], Tensor],
        world: World = SINGLE_PROCESS,
    ) -> None:
        """Move k towards ``model``, make the keys of ``images``, and queue them for the next step.

        Args:
            model: q.
            images: (B, C, H, W).
            labels: (B,) int64; −1: none.
            embed: (model, images) -> (B, d) of unit length.
            world: the processes whose keys are queued.
        """
        for own, new in zip(self.encoder.parameters(), model.parameters(), strict=True):
            own.lerp_(new, 1 - self.momentum)
        made, labels = world.all_gather(embed(self.encoder, images)), world.all_gather(labels)
        size, seen = len(self.keys), int(self.seen)
        held = min(seen, size)
        self.fresh = Keys(made, self.keys[:held].clone(), self.labels[:held].clone())
        # Of a batch longer than the queue its last keys.
        place = torch.arange(seen, seen + len(made), device=self.keys.device)[-size:] % size
        self.keys[place] = made[-size:].to(self.keys.dtype)
        self.labels[place] = labels[-size:].masked_fill(labels[-size:] < 0, _NOBODY)
        self.seen += len(made)


class Prototypes(nn.Module):
    """One learnt vector per class, (K, d); drawn from N(0, 1) by a seed of its own, the same for every run."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(0)))
