"""Run an attack on a model: inputs checked, model untouched in every bit, gradients to inputs only."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from clead.attacks import ATTACKS, OBJECTIVES
from clead.attacks.capabilities import capabilities, check_norm, name_of
from clead.attacks.objectives import OF_THE_TASK
from clead.attacks.square_cache import Prepared
from clead.devices import keep_freed_memory
from clead.errors import UserError, out_of_memory
from clead.interfaces import Attack, MinimumNorm, Model, Search, Threat, Unrestricted
from clead.models.external import ModelError, backward_of
from clead.models.fold_batch_norm import folded
from clead.models.modes import attack_mode
from clead.models.seeding import fork_rng
from clead.models.split import wrapped
from clead.tasks import Task, task_name
from clead.tasks.classification import CLASSIFICATION, TOWARDS_CLASS
from clead.threats import THREATS
from clead.threats.geometry import contains

_log = logging.getLogger("clead")
TARGETED_OBJECTIVES = ("cross_entropy", "margin")
"""Objectives that can lead towards a class."""
_MARKS = 64
"""Images that are tried as one that a model takes for another class than a given one."""


class AttackError(UserError):
    """An attack returned something else than an image of its threat set."""


def check_inputs(x: Tensor, y: Tensor, num_classes: int | None = None, task: Task = CLASSIFICATION) -> None:
    """Raise UserError unless ``x`` is (B, C, H, W) float in [0, 1] without NaN and ``y`` is the task's targets of B images."""
    for name, value in (("images", x), ("labels", y)):
        if not isinstance(value, Tensor):
            raise UserError(f"{name} must be a torch.Tensor, got a {type(value).__name__}; use torch.as_tensor")
    if x.dim() != 4 or not x.is_floating_point():
        hint = "" if x.is_floating_point() else "; give x.float() / 255 for pixels in [0, 255]"
        if x.dim() == 3:
            hint += "; give x[None] for one image (C, H, W), x[:, None] for grey images (N, H, W)"
        elif x.dim() != 4:
            hint += "; give x.reshape(-1, C, H, W)"
        raise UserError(f"images must be a float tensor (B, C, H, W), got {x.dtype} {tuple(x.shape)}{hint}")
    if not len(x):
        raise UserError("there is no image to attack, got a batch of 0; give x of shape (B, C, H, W) with B at least 1")
    if not torch.isfinite(x).all():  # synchronises the device
        raise UserError(
            "images must be finite, got NaN or infinity; mend them, or leave out those with x[x.flatten(1).isfinite().all(1)]"
        )
    low, high = x.min().item(), x.max().item()
    if low < 0 or high > 1:
        hint = (
            "divide by 255"
            if low >= 0
            else "give raw pixels and let the model normalise (clead.models.normalize.Normalize as its first layer)"
        )
        raise UserError(f"pixels must be in [0, 1], got [{low:.4g}, {high:.4g}]; {hint}")
    task.check_target(y, len(x), num_classes)
    if y.dim() == 3 and y.shape[1:] != x.shape[2:]:
        raise UserError(
            f"masks must have the images' size, got masks of {tuple(y.shape[1:])} for images of {tuple(x.shape[2:])}; resize both "
            'alike: F.interpolate(masks[:, None].float(), images.shape[2:], mode="nearest-exact")[:, 0].long()'
        )


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits (B, K) of ``model`` in eval mode, without gradients; raises UserError if it fails or returns no such."""
    model = wrapped(model)
    with attack_mode(model), torch.no_grad():
        return model(x)


def image_gradient(model: nn.Module, x: Tensor) -> Tensor | None:
    """Return the gradient of a projection of the logits to ``x``, (B, C, H, W); None if autograd finds no way to the images."""
    model = wrapped(model)
    if any(type(module).__module__.startswith("torch.ao.nn.quantized") for module in model.modules()):
        return None  # autograd goes through their operations, with wrong numbers
    with attack_mode(model), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        logits = model(x)
        if not logits.requires_grad:
            return None
        projection = torch.arange(1, logits.shape[1] + 1, device=logits.device).sin()
        with backward_of(model):
            return torch.autograd.grad((logits.movedim(1, -1) * projection).sum(), x, allow_unused=True)[0]


def run_attack(
    attack: Attack | Search | MinimumNorm | Unrestricted,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat | str | None,
    *,
    objective: str = "cross_entropy",
    task: Task = CLASSIFICATION,
    generator: torch.Generator | None = None,
    checked: bool = False,
    precision: torch.dtype | None = torch.float32,
) -> Tensor:
    """Run an attack of any kind on a model; ``capabilities(attack)`` says which kind it is.

    Args:
        attack: how a named objective is maximised, or a search that needs none.
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K); of a targeted ``task`` the class to aim at.
        threat: the set of allowed images around ``x``; or the name of a norm, for an attack that looks for the smallest
            perturbation in it; or None, for an attack that has a set of its own.
        objective: a name of ``OBJECTIVES``; a search ignores it.
        task: what is right. ``TOWARDS_CLASS`` makes the attack a targeted one.
        generator: source of randomness, on the device of ``x``; a fixed seed if None, never the global RNG.
        checked: skip the checks of ``x`` and ``y`` because the caller has made them, and looks for images that are NaN.
        precision: what the search computes in (autocast below float32); its result has to be verified in float32 then. None:
            search with the model as it is, not as ``optimized`` makes it.

    Returns:
        x_adv, (B, C, H, W) in [0, 1]; verified to be inside a threat set. An attack for the smallest perturbation returns x
        where it found nothing. An image at which the gradient is not finite counts as broken: it is NaN, or far outside [0, 1]
        where argmax of its NaN logits would be its label (see ``marked``). Raises UserError on wrong shapes, ranges or names,
        if the attack cannot do what is asked or returns an image outside, or if the gradient is finite at no image.
    """
    able, name = capabilities(attack), name_of(attack)
    check_applicable(attack, threat, task, objective)
    ball = not (threat is None or isinstance(threat, str))
    # Handed over only where it is not the plain one, so that a search which takes no task serves that.
    aim: dict[str, Any] = {} if task == CLASSIFICATION else {"task": task}
    model = wrapped(model)
    if generator is None:
        generator = torch.Generator(x.device).manual_seed(0) if isinstance(x, Tensor) else None
    # A randomised model draws from the global generators: from a stream of its own here, not from the caller's.
    with fork_rng(zlib.crc32(generator.get_state().numpy().tobytes()) if generator else 0):
        if not checked:
            check_inputs(x, y, task=task)
            task.check(logits_of(model, x[:1]), y)
        with torch.inference_mode(False), attack_mode(model):  # a caller's inference mode would refuse any gradient
            # The attack's own copies: a library's attack may write into its images, and they are compared with afterwards.
            x, y = x.detach().clone(), y.detach().clone()
            given = x.clone()
            with (
                blamed(model, x),
                nullcontext(model) if precision is None else optimized(model, x, precision) as answer,
            ):
                if not ball or able.searches:
                    with torch.no_grad():
                        x_adv = _search(attack, answer, x, y, threat, generator=generator, **aim)
                else:
                    value = OBJECTIVES.get(objective)(model, x, y, **aim)
                    x_adv = cast(Attack, attack)(value, x, threat, generator=generator)
    keep_freed_memory(x.device)
    if ball:
        x_adv = verified(x_adv, given, threat, name)
    if not checked:
        check_finite(x_adv, name if not ball or able.searches else repr(objective))
        if task == CLASSIFICATION:
            x_adv = marked(model, x_adv, y)
    return x_adv


def _search(attack: Any, model: Model, x: Tensor, y: Tensor, threat: Threat | str | None, **options: Any) -> Tensor:
    """Return what the attack finds by the method of its kind."""
    if threat is None:
        return attack.worst(model, x, y, **options)
    if isinstance(threat, str):
        return attack.minimal(model, x, y, norm=threat, **options)
    return attack.perturb(model, x, y, threat, **options)


def check_applicable(attack: Any, threat: Threat | str | None, task: Task, objective: str) -> None:
    """Raise UserError if the attack cannot be made in this norm, without a radius, or towards a class."""
    able, name = capabilities(attack), name_of(attack)
    if able.unrestricted != (threat is None):
        needs = "keeps to images of its own, without a norm" if able.unrestricted else "needs a norm and a radius"
        raise UserError(f"{name} {needs}, got threat {threat}; give threat=None for attacks such as Spatial only")
    if isinstance(threat, str):
        THREATS.get(threat)
        if not able.minimum_norm:
            raise UserError(
                f"{name} looks for no smallest perturbation, got norm {threat} without a radius; give a threat such as "
                'Linf(eps="8/255"), or an attack such as FMN'
            )
    if threat is not None:
        check_norm(attack, threat if isinstance(threat, str) else threat.norm)
    if task == CLASSIFICATION:
        return
    towards = task == TOWARDS_CLASS
    if not able.targeted:
        usable = ", ".join(key for key, kind in ATTACKS.items() if capabilities(kind).targeted)
        cannot, remedy = "aim at a class", "leave out the target, or use"
        if not towards:
            cannot, remedy = f"attack the task {task_name(task)}, it compares classes", "use"
        raise UserError(f"{name} cannot {cannot}; {remedy} one of {usable}")
    if not towards and not able.searches and objective not in OF_THE_TASK:
        raise UserError(
            f"objective {objective!r} knows no {task_name(task)}; give --objective {' or '.join(OF_THE_TASK)}"
        )
    if towards and not able.searches and objective not in TARGETED_OBJECTIVES:
        raise UserError(
            f"objective {objective!r} knows no target; give --objective {TARGETED_OBJECTIVES[0]} or {TARGETED_OBJECTIVES[1]}"
        )


@contextmanager
def blamed(model: nn.Module, x: Tensor) -> Generator[None, None, None]:
    """Run an attack in the block; if it fails because no gradient can be taken through ``model``, a ModelError says that."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if not isinstance(error, UserError) and not out_of_memory(error):
            image_gradient(model, x[:1])
        raise


def marked(model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
    """Return ``x_adv`` so that ``model(x_adv).argmax(1) == y`` counts no image as robust whose gradient is not finite.

    Such images are NaN, and so are their logits, of which argmax takes the first: class 0. Where that is the label, the image is
    filled with values far outside [0, 1] that the model takes for another class. Raises AttackError if there are none.
    """
    lost = (~finite_images(x_adv)).nonzero()[:, 0]
    if not len(lost):  # synchronises the device
        return x_adv
    x_adv = x_adv.clone()
    with fork_rng(0):
        lost = lost[CLASSIFICATION.predict(logits_of(model, x_adv[lost])) == y[lost]]
        if not len(lost):
            return x_adv
        candidates = torch.empty(_MARKS, *x_adv.shape[1:]).uniform_(2, 1000)
        candidates[_MARKS // 2 :] *= (
            torch.randint_like(candidates[_MARKS // 2 :], 2) * 2 - 1
        )  # a root or a logarithm refuses these
        candidates = candidates.to(x_adv)
        classes = CLASSIFICATION.predict(logits_of(model, candidates))
    for index in lost.tolist():
        wrong_classes = (classes != y[index]).nonzero()
        if not len(wrong_classes):
            raise AttackError(
                f"the gradient at image {index} is NaN or infinite, and the model takes whatever is not an image for its label, "
                f"class {int(y[index])}, so it would count as robust; leave it out: x[torch.arange(len(x)) != {index}]"
            )
        x_adv[index] = candidates[int(wrong_classes[0, 0])]
    return x_adv


def verified(x_adv: Tensor, x: Tensor, threat: Threat, attack: str) -> Tensor:
    """Return ``x_adv`` if it lies inside the threat set around ``x`` and the pixel box [0, 1].

    Images on which the attack met a gradient that is not finite are NaN, and stay so. Raises AttackError for an image outside,
    naming ``attack`` and the distance.
    """
    if x_adv.shape != x.shape:
        raise AttackError(f"{attack} must return images of shape {tuple(x.shape)}, got {tuple(x_adv.shape)}")
    x_adv = x_adv.detach()
    allowed = contains(threat, x_adv, x)
    if allowed.all():  # synchronises the device
        return x_adv
    if (outside := finite_images(x_adv) & ~allowed).any():
        index = int(outside.nonzero()[0, 0])
        low, high = x_adv[index].min().item(), x_adv[index].max().item()
        size = threat.distance((x_adv - x)[index : index + 1]).item()
        raise AttackError(
            f"{attack} left the threat set on {int(outside.sum())} of {len(x)} images: image {index} is {size:.6g} "
            f"from the clean one ({threat.norm}, eps {threat.eps:.6g}), with pixels in [{low:.6g}, {high:.6g}]"
        )
    return x_adv


def finite_images(x_adv: Tensor) -> Tensor:
    """Return which images are finite in all pixels, (B,): on the others an attack met a gradient that is not."""
    return torch.isfinite(x_adv).flatten(1).all(1)


def check_finite(x_adv: Tensor, what: str) -> None:
    """Warn of the images of ``x_adv`` that are NaN because the gradient of ``what`` was; raises UserError if all are."""
    if torch.isfinite(x_adv).all():  # synchronises the device
        return
    finite = finite_images(x_adv)
    lost = (~finite).nonzero()[:, 0].tolist()
    remedy = "look for sqrt, log or division at 0 in the model, or attack in float32"
    if len(lost) == len(finite):
        raise UserError(
            f"the gradient of {what} to the images is NaN or infinite, so the attack says nothing; {remedy}"
        )
    if lost:
        more = f" and {len(lost) - 10} more" if len(lost) > 10 else ""
        _log.warning(
            "the gradient of %s to the images %s%s is NaN or infinite, so no attack on them says anything: they count as broken, "
            "and no images (NaN, or far outside [0, 1]) in what comes back; %s",
            *(what, lost[:10], more, remedy),
        )


@contextmanager
def optimized(model: nn.Module, sample: Tensor, precision: torch.dtype = torch.float32) -> Generator[Model, None, None]:
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
        with fork_rng(0), torch.enable_grad(), folded(model, image, channels_last=True, again=True):
            x = image.expand(2, -1, -1, -1).contiguous(memory_format=torch.channels_last).requires_grad_()
            logits = model(x)
            if logits.requires_grad:
                torch.autograd.grad(logits.sum(), x)
    except RuntimeError as error:
        if isinstance(error.__cause__, RuntimeError) or not isinstance(error, ModelError):
            return False
        raise  # a forward that fails for another reason than the layout
    return True
