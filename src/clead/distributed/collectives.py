"""Collectives of several processes: rows gathered with and without gradient, sums, and how many bytes they moved."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

TRAFFIC: Counter[str] = Counter()
"""Bytes that this process has given into collectives: outputs joined, labels and statistics gathered, gradients and
the backward's statistics summed; and the number of ``calls``."""


def count_traffic(kind: str, tensor: Tensor) -> None:
    """Count the bytes of ``tensor`` in ``TRAFFIC``, and the call."""
    TRAFFIC[kind] += tensor.numel() * tensor.element_size()
    TRAFFIC["calls"] += 1


class GatherWithGrad(torch.autograd.Function):
    """The rows of all processes, view by view; the backward keeps this process's rows, times the number of processes."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, rank: int, size: int, images: int) -> Tensor:
        """Return (V·b·size, …) of (V·b, …) each."""
        ctx.rank, ctx.size, ctx.images = rank, size, images
        views = len(outputs) // images
        every = gathered(outputs.contiguous(), size).unflatten(1, (views, images))  # (size, V, b, …)
        return every.transpose(0, 1).flatten(0, 2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None, None]:
        """Return the gradient of this process's rows."""
        by_view = grad_outputs[0].unflatten(0, (-1, ctx.size, ctx.images))
        return (by_view[:, ctx.rank] * ctx.size).flatten(0, 1), None, None, None


def gathered(values: Tensor, size: int) -> Tensor:
    """Return (size, *values.shape)."""
    every = [torch.empty_like(values) for _ in range(size)]
    dist.all_gather(every, values.contiguous())
    return torch.stack(every)


class SumWithGrad(torch.autograd.Function):
    """The sum over all processes; what is differentiated is the sum of their losses, so the backward is a sum, too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        count_traffic("sums", values)
        total = values.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Tensor:
        """Return the sum of all processes' gradients."""
        return cast(Tensor, SumWithGrad.apply(grad_outputs[0]))
