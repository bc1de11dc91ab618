"""Batch-norm folded into the convolutions of a frozen model, so that an inner attack pays for convolutions only."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from clead.models.seeding import fork_rng

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]
_PAIRS: WeakKeyDictionary[nn.Module, list[Pair]] = WeakKeyDictionary()


@contextmanager
def folded(
    model: nn.Module, sample: Tensor, *, channels_last: bool = False, again: bool = False
) -> Generator[None, None, None]:
    """Fold w' = w·γ/σ, b' = (b − μ)·γ/σ + β of each convolution before a batch-norm (Jacob et al. 2018, arXiv:1712.05877, eq. 14).

    The outputs are the same up to rounding; gradients go to inputs only. Inside a bfloat16 or float16 autocast the folded weights
    are cast once. Everything is restored bit-exactly on exit, also on exception. Call it under ``attack_mode(model)``.

    Args:
        model: in eval mode, parameters frozen.
        sample: (n, C, H, W), a few images; used once per model to find the pairs and to check that folding changes nothing; a pair
            where it would (a convolution whose output is used twice) is left as it is.
        channels_last: lay the weights of all convolutions out for channels_last images, whatever their own layout is.
        again: look for the pairs again, because layers may have been replaced since.
    """
    # The compiler fuses these layers itself, and would not see the swap; weights that are shared out cannot be swapped.
    if getattr(model, "_compiled", None) is not None or getattr(model, "is_sharded", False):
        yield
        return
    if again or model not in _PAIRS:
        _PAIRS[model] = _find(model, sample[:2])
    with _fold(_PAIRS[model], _autocast_dtype(sample), channels_last):
        if not channels_last:
            yield
            return
        pairs = {conv for conv, _ in _PAIRS[model]}
        with _in_channels_last([m for m in model.modules() if _plain(m) and m not in pairs]):
            yield


@contextmanager
def _in_channels_last(convs: list[nn.Module]) -> Generator[None, None, None]:
    saved = [(conv, conv._parameters["weight"]) for conv in convs]
    try:
        for conv, weight in saved:
            if weight is not None:
                conv._parameters["weight"] = _frozen(weight.contiguous(memory_format=torch.channels_last))
        yield
    finally:
        for conv, weight in saved:
            conv._parameters["weight"] = weight


@contextmanager
def _fold(pairs: list[Pair], dtype: torch.dtype | None, channels_last: bool = False) -> Generator[None, None, None]:
    saved: list[tuple[nn.Conv2d, nn.BatchNorm2d, Any, Any]] = []
    try:
        for conv, norm in pairs:
            assert norm.running_mean is not None and norm.running_var is not None
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            saved.append((conv, norm, conv._parameters["weight"], conv._parameters["bias"]))
            layout = (
                torch.channels_last
                if channels_last or conv.weight.is_contiguous(memory_format=torch.channels_last)
                else torch.contiguous_format
            )
            conv._parameters["weight"] = _frozen(weight.to(dtype or weight.dtype).contiguous(memory_format=layout))
            conv._parameters["bias"] = _frozen(bias.to(dtype or bias.dtype))
            norm.forward = _identity  # ty: ignore[invalid-assignment]
        yield
    finally:
        for conv, norm, weight, bias in saved:
            conv._parameters["weight"], conv._parameters["bias"] = weight, bias
            norm.__dict__.pop("forward", None)


def _plain(layer: nn.Module) -> bool:
    """Say whether it is a convolution with a weight of its own: weight and spectral normalisation compute it at every use."""
    return isinstance(layer, nn.Conv2d) and layer._parameters.get("weight") is not None


def _find(model: nn.Module, sample: Tensor) -> list[Pair]:
    """Return the (convolution, batch-norm) pairs seen in one forward pass, or none if folding them changed the output."""
    made: dict[int, nn.Conv2d] = {}
    alive: list[Tensor] = []  # keeps every output alive, so that an id is never used twice
    pairs: list[Pair] = []
    calls: dict[nn.Module, int] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[layer] = calls.get(layer, 0) + 1
        if isinstance(layer, nn.Conv2d) and _plain(layer):
            made[id(output)] = layer
            alive.append(output)
        elif isinstance(layer, nn.BatchNorm2d) and layer.track_running_stats and id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])], layer))

    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d))]
    handles = [layer.register_forward_hook(note) for layer in layers]
    # Past the observers: looking for pairs is no part of what a training step costs.
    inner: Callable[[Tensor], Any] = getattr(model, "_split", model)

    def run(images: Tensor) -> Any:
        with fork_rng(0):  # a randomised model: the same noise every time, and the caller's stream left where it was
            return inner(images)

    try:
        with torch.no_grad(), torch.autocast(sample.device.type, enabled=False):
            run(sample)
    finally:
        for handle in handles:
            handle.remove()
    pairs = [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1]
    with _unlike_the_identity([norm for _, norm in pairs]):
        return _harmless(run, sample, pairs)


def _harmless(run: Callable[[Tensor], Any], sample: Tensor, pairs: list[Pair]) -> list[Pair]:
    """Return the pairs whose folding leaves the output as it is."""
    with torch.no_grad(), torch.autocast(sample.device.type, enabled=False):
        plain = run(sample)

    def harmless(chosen: list[Pair]) -> bool:
        with torch.no_grad(), torch.autocast(sample.device.type, enabled=False), _fold(chosen, None):
            changed = run(sample)
        before, after = (out if isinstance(out, tuple) else (out,) for out in (plain, changed))
        return all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))
            for a, b in zip(before, after, strict=True)
        )

    if not harmless(pairs):  # say, a convolution whose output also goes past its batch-norm: leave out just that one
        pairs = [pair for pair in pairs if harmless([pair])]
    return pairs if harmless(pairs) else []


@contextmanager
def _unlike_the_identity(norms: list[nn.BatchNorm2d]) -> Generator[None, None, None]:
    """Give batch-norms other statistics inside the block: a new one is the identity, and folding it anywhere changes nothing."""
    saved = [(norm, norm._buffers["running_mean"], norm._buffers["running_var"]) for norm in norms]
    try:
        for norm, mean, var in saved:
            assert mean is not None and var is not None
            spread = torch.linspace(0.5, 2, len(var), device=var.device, dtype=var.dtype)
            norm._buffers["running_mean"] = mean + spread * (var + norm.eps).sqrt()
            norm._buffers["running_var"] = var * spread + 0.1 * var.mean()
        yield
    finally:
        for norm, mean, var in saved:
            norm._buffers["running_mean"], norm._buffers["running_var"] = mean, var


def _autocast_dtype(sample: Tensor) -> torch.dtype | None:
    device = sample.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _identity(x: Tensor) -> Tensor:
    return x
