"""Batch normalisation with the statistics of all processes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clead.distributed.collectives import SumWithGrad, count_traffic, gathered


class _Normalised(torch.autograd.Function):
    """Batch normalisation by statistics of all processes: PyTorch's fused passes, one gather forward, one sum backward.

    The gradient is that of the sum of all processes' losses (Ioffe and Szegedy 2015, section 3, with sums over all images).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, mean, variance)
        ctx.eps = eps
        return nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, variance = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted: only plain operations have one
            y = _plain(x, weight, bias, ctx.eps)
            gradients = torch.autograd.grad(y, (x, weight, bias), grad_outputs[0], create_graph=True, allow_unused=True)
            return *gradients, None, None, None
        grad = grad_outputs[0].contiguous(memory_format=_layout(x))
        back = torch.ops.aten.native_batch_norm_backward
        dx, dweight, dbias = back(grad, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True])
        sums = torch.stack([dbias, dweight])  # of the gradient, and of its product with the normalised values
        count_traffic("sums", sums)
        dist.all_reduce(sums)
        images = dist.get_world_size() * (x.numel() // x.shape[1])
        inverse = (variance + ctx.eps).rsqrt()
        slope = -weight * inverse.square() * sums[1] / images
        offset = -weight * inverse * sums[0] / images - slope * mean
        shape = [1, -1, *([1] * (x.dim() - 2))]
        return torch.addcmul(dx.add_(offset.view(shape)), x, slope.view(shape)), dweight, dbias, None, None, None


def _layout(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _plain(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return x normalised by operations that can be differentiated any number of times."""
    over = [0, *range(2, x.dim())]
    shape = [1, -1, *([1] * (x.dim() - 2))]
    mean = SumWithGrad.apply(x.mean(over)) / dist.get_world_size()
    centred = x - mean.view(shape)
    variance = SumWithGrad.apply((centred * centred).mean(over)) / dist.get_world_size()
    return centred * (variance + eps).rsqrt().view(shape) * weight.view(shape) + bias.view(shape)


class _Synchronised:
    """Batch normalisation with the statistics of all processes' images, as many each; PyTorch's own is for GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x, (B, C, …)."""
        norm = cast(_BatchNorm, self)
        if not norm.training and norm.running_mean is not None:
            return _BatchNorm.forward(norm, x)
        norm._check_input_dim(x)
        weight = norm.weight if norm.affine else torch.ones(x.shape[1], device=x.device)
        bias = norm.bias if norm.affine else torch.zeros(x.shape[1], device=x.device)
        with torch.no_grad():
            over = [0, *range(2, x.dim())]
            values = x.detach().float()
            centre = values.mean(over, keepdim=True)
            local_sums = torch.stack(
                [centre.flatten(), (values - centre).square_().mean(over)]
            )  # var_mean is 20 times slower on CPUs
            count_traffic("statistics", local_sums)
            means, variances = gathered(local_sums, dist.get_world_size()).unbind(1)
            mean = means.mean(0)
            variance = (variances + (means - mean).square()).mean(0)  # as many images each
            if norm.training and norm.track_running_stats and norm.running_mean is not None:
                _move(norm, mean, variance, dist.get_world_size() * (x.numel() // x.shape[1]))
        return cast(Tensor, _Normalised.apply(x.float(), weight, bias, mean, variance, norm.eps)).to(x.dtype)


def _move(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    factor = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    with torch.no_grad():
        norm.running_mean.lerp_(mean.to(norm.running_mean), factor)
        norm.running_var.lerp_((variance * count / max(1, count - 1)).to(norm.running_var), factor)


@contextmanager
def synchronised(model: nn.Module) -> Generator[None, None, None]:
    """Let all batch normalisations in ``model``, and in copies of it made inside, take the statistics of all processes."""
    norms = [(norm, norm.__class__) for norm in model.modules() if isinstance(norm, _BatchNorm)]
    try:
        for norm, kind in norms:
            norm.__class__ = _kinds(kind)
        yield
    finally:
        for norm, kind in norms:
            norm.__class__ = kind


@contextmanager
def unsynchronised(model: nn.Module) -> Generator[None, None, None]:
    """Let batch normalisations take the statistics of their own images inside the block, although ``synchronised`` holds."""
    norms = [(norm, norm.__class__) for norm in model.modules() if isinstance(norm, _Synchronised)]
    try:
        for norm, kind in norms:
            cast(Any, norm).__class__ = kind.__mro__[2]
        yield
    finally:
        for norm, kind in norms:
            norm.__class__ = kind


_KINDS: dict[type, type] = {}


def _kinds(kind: type) -> type:
    if kind not in _KINDS:
        _KINDS[kind] = type(f"Synchronised{kind.__name__}", (_Synchronised, kind), {})
    return _KINDS[kind]
