"""Run an attack on a model: inputs checked, model untouched in every bit, gradients to inputs only."""

from __future__ import annotations

import zlib
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from clead.attacks import OBJECTIVES
from clead.errors import UserError
from clead.interfaces import Attack, Model, Search, Threat
from clead.models.fold import folded
from clead.models.modes import attack_mode
from clead.models.seeding import seeded
from clead.models.windowed import Prepared
from clead.settings import validated
from clead.threats import THREATS


def check_inputs(x: Tensor, y: Tensor, num_classes: int | None = None) -> None:
    """Raise UserError unless ``x`` is (B, C, H, W) float in [0, 1] without NaN and ``y`` is (B,) int64 in [0, K)."""
    for name, value in (("images", x), ("labels", y)):
        if not isinstance(value, Tensor):
            raise UserError(f"{name} must be a torch.Tensor, got a {type(value).__name__}; use torch.as_tensor")
    if x.dim() != 4 or not x.is_floating_point():
        hint = "; divide by 255" if x.dtype == torch.uint8 else ""
        raise UserError(f"images must be a float tensor (B, C, H, W), got {x.dtype} {tuple(x.shape)}{hint}")
    if y.shape != (len(x),) or y.dtype != torch.int64:
        raise UserError(f"labels must be int64 of shape ({len(x)},), got {y.dtype} {tuple(y.shape)}")
    if not len(x):
        raise UserError("there is no image to attack, got a batch of 0")
    if not torch.isfinite(x).all():  # synchronises the device
        raise UserError("images must be finite, got NaN or infinity")
    low, high = x.min().item(), x.max().item()
    if low < 0 or high > 1:
        hint = (
            "divide by 255"
            if low >= 0
            else "give raw pixels and let the model normalise (clead.models.normalize.Normalize as its first layer)"
        )
        raise UserError(f"pixels must be in [0, 1], got [{low:.4g}, {high:.4g}]; {hint}")
    _check_labels(y, num_classes)


def _check_labels(y: Tensor, num_classes: int | None) -> None:
    least, most = int(y.min()), int(y.max())
    if least < 0 or (num_classes is not None and most >= num_classes):
        bound = "K" if num_classes is None else str(num_classes)
        raise UserError(f"labels must be in [0, {bound}), got {least if least < 0 else most}")


def check_norm(attack: Attack | Search, threat: Threat) -> None:
    """Raise UserError if the attack is not made for this norm."""
    norms = getattr(attack, "norms", None) or getattr(attack, "meant_for", None)
    if norms is not None and threat.norm not in norms:
        name = getattr(attack, "name", None) or type(attack).__name__
        raise UserError(f"{name} is an attack for {', '.join(norms)}, got {threat.norm}")


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits (B, K) of ``model`` in eval mode, without gradients; raises UserError if it fails or returns no such."""
    kind = type(model).__name__
    try:
        with attack_mode(model), torch.no_grad():
            logits = model(x.clone())  # a model that normalises in place would change the caller's images
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{kind} fails on images {x.dtype} {tuple(x.shape)}: {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
        what = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(f"the model must return logits (B, K) for {len(x)} images, got {what}; return them alone")
    if logits.shape[1] < 2:
        raise UserError(f"the model must return at least 2 logits per image, got {logits.shape[1]}; give one per class")
    return logits


def attack_images(
    attack: Attack | Search,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    objective: str = "cross_entropy",
    generator: torch.Generator | None = None,
    checked: bool = False,
    precision: torch.dtype = torch.float32,
    exact: bool = False,
) -> Tensor:
    """Run an attack on a model inside the threat set around ``x``.

    Args:
        attack: how a named objective is maximised, or a search that needs none.
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        threat: the set of allowed images around ``x``.
        objective: a name of ``OBJECTIVES``; a search ignores it.
        generator: source of randomness, on the device of ``x``; a fixed seed if None, never the global RNG.
        checked: skip the checks of ``x`` and ``y`` because the caller has made them.
        precision: what the search computes in (autocast below float32); its result has to be verified in float32 then.
        exact: search with the model as it is, not as ``prepared`` makes it.

    Returns:
        x_adv, (B, C, H, W) in [0, 1] inside the threat set. Raises UserError on wrong shapes, ranges or names, or if the
        attack is not made for this norm.
    """
    searching = isinstance(attack, Search)
    check_norm(attack, threat)
    make = OBJECTIVES.get(objective)
    if generator is None:
        generator = torch.Generator(x.device).manual_seed(0) if isinstance(x, Tensor) else None
    # A randomised model draws from the global generators: from a stream of its own here, not from the caller's.
    with seeded(zlib.crc32(generator.get_state().numpy().tobytes()) if generator else 0):
        if not checked:
            check_inputs(x, y)
            _check_labels(y, logits_of(model, x[:1]).shape[1])
        with torch.inference_mode(False), attack_mode(model):  # a caller's inference mode would refuse any gradient
            x, y = (part.clone() if part.is_inference() else part.detach() for part in (x, y))
            with nullcontext(model) if exact else prepared(model, x, precision) as answer:
                if isinstance(attack, Search):
                    with torch.no_grad():
                        x_adv = attack.search(answer, x, y, threat, generator=generator)
                else:
                    x_adv = attack(make(model, x, y), x, threat, generator=generator)
    if not torch.isfinite(x_adv).all():  # synchronises the device
        what = type(attack).__name__ if searching else f"{objective!r}"
        raise UserError(
            f"the gradient of {what} to the images is NaN or infinite, so the attack says nothing; "
            "look for sqrt, log or division at 0 in the model, or attack in float32"
        )
    return x_adv


@contextmanager
def prepared(model: nn.Module, sample: Tensor, precision: torch.dtype = torch.float32) -> Generator[Model, None, None]:
    """Give ``model`` as a function that answers faster and the same up to rounding; the model is as before on exit.

    Batch-norm is folded into the convolutions, and on a CPU images and weights are laid out channels_last. Call it under
    ``attack_mode(model)``.

    Args:
        model: with frozen parameters, in eval mode.
        sample: (n, C, H, W), a few images, to find what can be folded.
        precision: below float32, the function computes under autocast; its answers are float32 all the same.
    """
    device = sample.device.type
    convolutional = any(isinstance(layer, nn.Conv2d) for layer in model.modules())
    lower = precision != torch.float32
    if sample.dtype != torch.float32 or not (convolutional or lower):
        yield model
        return
    with torch.autocast(device, precision) if lower else nullcontext():
        last = device == "cpu" and _takes_channels_last(model, sample[:1])
        layout = torch.channels_last if last else torch.contiguous_format
        with folded(model, sample, channels_last=last, again=True):
            if lower:
                yield lambda x: model(x.contiguous(memory_format=layout)).float()
            else:
                yield Prepared(lambda x: model(x.contiguous(memory_format=layout)))


def _takes_channels_last(model: nn.Module, image: Tensor) -> bool:
    """Try one image: ``x.view(len(x), -1)`` inside a model, for one, needs contiguous activations."""
    try:
        with seeded(0), torch.enable_grad(), folded(model, image, channels_last=True, again=True):
            x = image.expand(2, -1, -1, -1).contiguous(memory_format=torch.channels_last).requires_grad_()
            logits = model(x)
            if logits.requires_grad:
                torch.autograd.grad(logits.sum(), x)
    except RuntimeError:
        return False
    return True


def call(
    kind: Any,
    values: dict[str, Any],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str,
    eps: float | str,
    seed: int,
    objective: str = "cross_entropy",
) -> Tensor:
    """Run an attack given by its class and settings: the body of every ``clead.attacks.NAME(model, x, y, …)``.

    Returns x_adv, (B, C, H, W) in [0, 1] inside the threat set. Raises UserError on any value that is out of its range.
    """
    attack, threat = validated(kind, values), validated(THREATS.get(norm), {"eps": eps})
    generator = torch.Generator(x.device).manual_seed(seed) if isinstance(x, Tensor) else None
    return attack_images(attack, model, x, y, threat, objective=objective, generator=generator)
