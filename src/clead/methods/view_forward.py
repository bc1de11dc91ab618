"""What a contrastive term is computed from: the forward of the views, and the unit vectors that are contrasted."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clead.errors import UserError, did_you_mean
from clead.losses.precision import at_least_float32
from clead.models.modes import attack_mode
from clead.models.seeding import fork_rng
from clead.models.split import SplitModel

Level = Literal["embedding", "features", "logits"]


class Outputs(NamedTuple):
    """What a forward of one view gives: features (B, D), logits (B, K), and an inner layer's output, (B, C, …), or None."""

    features: Tensor
    logits: Tensor
    inner: Tensor | None = None


def forward(
    model: SplitModel, views: dict[str, Tensor], *, separate: bool = False, layer: str | None = None
) -> dict[str, Outputs]:
    """Return the outputs of each view, name -> Outputs.

    Args:
        model: in any mode.
        views: name -> images (B, C, H, W).
        separate: forward each view by itself, instead of all in one batch.
        layer: the module whose output is kept too; raises UserError if there is none of that name.
    """
    with _captured(model, layer) as kept:

        def run(images: Tensor) -> list[Tensor]:
            outputs = model.features_and_logits(images)
            inner = kept.pop(images) if kept is not None else []
            return [*outputs, *(inner if model._join is None else map(model._join, inner))]

        if separate or len(views) == 1:
            return {name: Outputs(*run(view)) for name, view in views.items()}
        parts = [part.chunk(len(views)) for part in run(torch.cat(list(views.values())))]
        return {name: Outputs(*of_view) for name, *of_view in zip(views, *parts, strict=True)}


def unit_vectors(model: SplitModel, outputs: Outputs, level: Level) -> Tensor:
    """Return what is contrasted, (B, d) of unit length: the inner layer's means over space if it was kept, else ``level``.

    embedding is z = p(h)/‖p(h)‖₂, features is h/‖h‖₂, logits is g(h)/‖g(h)‖₂.
    """
    if outputs.inner is None and level == "embedding":
        return model.embedding(outputs.features)
    with torch.autocast(outputs.logits.device.type, enabled=False):
        if outputs.inner is not None:
            inner = at_least_float32(outputs.inner)
            return F.normalize(inner.flatten(2).mean(2) if inner.dim() > 2 else inner, dim=1)
        return F.normalize(at_least_float32(outputs.features if level == "features" else outputs.logits), dim=1)


def dimension(model: SplitModel, shape: tuple[int, ...], level: Level, layer: str | None) -> int:
    """Return d, the length of ``unit_vectors`` of images of ``shape``, (C, H, W), by a forward of two blank images."""
    blank = next(model.parameters()).new_zeros(2, *shape)
    with fork_rng(0), attack_mode(model), torch.no_grad():
        return unit_vectors(model, forward(model, {"blank": blank}, layer=layer)["blank"], level).shape[1]


def find_layer(model: SplitModel, name: str) -> nn.Module:
    """Return the module of that name; raises UserError with the closest names if there is none."""
    known = {key: part for key, part in model.named_modules() if key and key.split(".")[0] != "projection"}
    if name not in known:
        raise UserError(
            f"method.contrastive_layer: the model has no layer {name!r} before its projection; {did_you_mean(name, known)}"
        )
    return known[name]


class _Kept:
    """The last output of a layer that runs in a forward."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.output: object = None

    def hook(self, module: nn.Module, inputs: object, output: object) -> None:
        self.output = output

    def pop(self, images: Tensor) -> list[Tensor]:
        output, self.output = self.output, None
        if not isinstance(output, Tensor) or output.dim() < 2 or len(output) != len(images):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(
                f"method.contrastive_layer: {self.layer!r} must give one tensor (B, C, …) in the forward of B = {len(images)} "
                f"images, got {got}; name another layer"
            )
        return [output]


@contextmanager
def _captured(model: SplitModel, layer: str | None) -> Generator[_Kept | None, None, None]:
    if layer is None:
        yield None
        return
    kept = _Kept(layer)
    handle = find_layer(model, layer).register_forward_hook(kept.hook)
    # A compiled forward would not see the hook: this one is run uncompiled.
    compiled, model._compiled = model._compiled, None
    try:
        yield kept
    finally:
        model._compiled = compiled
        handle.remove()
