"""Accuracy under an attack that keeps to no norm ball: rotations and shifts, or a patch.

As in ``evaluate_model``, every adversarial image is verified: it must be in the attack's own set, and the plain model classifies it
again in float32.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clead.attacks import UNRESTRICTED
from clead.attacks.patch import Patch
from clead.attacks.runner import (
    AttackError,
    check_finite,
    check_inputs,
    finite_images,
    logits_of,
    optimized,
    run_attack,
)
from clead.data.loaders import make_generator
from clead.errors import UserError
from clead.evaluation.correctness import correct_mask, exact_float32, to_float
from clead.evaluation.state import ResumableResults
from clead.interfaces import ImageSet, Unrestricted
from clead.measurements import MEASUREMENTS
from clead.measurements.attack_accuracy import AttackedResult, FlagPair, attack_accuracy
from clead.measurements.base import Computation, Measurement, MeasurementTarget, check_classes, plain_settings
from clead.measurements.mask_patch import evaluate_mask_patch
from clead.models.modes import attack_mode
from clead.models.split import wrapped
from clead.progress import progress
from clead.settings import setting, settings
from clead.tasks.classification import CLASSIFICATION
from clead.tasks.segmentation import SEGMENTATION


@MEASUREMENTS.register("attack")
@settings
class UnrestrictedAttack(Measurement):
    """Attack runs by images that keep to no norm ball: ``clead attack RUN ... --attack.name spatial``.

    The attack's own settings say which images it may make.
    """

    result: ClassVar = AttackedResult
    tasks: ClassVar = ("segmentation",)
    keys: ClassVar = ("attack", "eval.batch_size")

    attack: Unrestricted = setting(..., "The attack, such as ``clead.attacks.spatial.Spatial()``.")

    def run(self, target: MeasurementTarget, state: ResumableResults) -> AttackedResult:
        """Attack each image that is right when clean; of masks all."""
        if target.about.task == SEGMENTATION:
            if not isinstance(self.attack, Patch):
                raise UserError(
                    f"attack.name: {described(self.attack)[0]} moves the image and not its mask; give --attack.name patch"
                )
            return evaluate_mask_patch(self.attack, target, state)
        return evaluate_unrestricted(
            target.model, target.images, self.attack, target.computation(state), classes=target.num_classes
        )

    @property
    def kind(self) -> str:
        """``attack-`` and the attack's name."""
        return f"attack-{described(self.attack)[0]}"

    def decides(self, target: MeasurementTarget) -> dict[str, Any]:
        """Return the attack with its settings."""
        name, values = described(self.attack)
        return {"attack": {"name": name, **values}, "batch_size": target.batch_size}


def evaluate_unrestricted(
    model: nn.Module,
    images: ImageSet,
    attack: Unrestricted,
    how: Computation | None = None,
    *,
    classes: int | None = None,
) -> AttackedResult:
    """Attack ``model`` on ``images``; robust are those that are classified right when clean and after the attack.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); in eval mode, left bit-identical.
        images: what to attack; all of them.
        attack: such as ``Spatial()`` or ``Patch(size="1/10")``.
        how: batch size, seed, device, saved state.
        classes: K, to check the labels by; the number of logits if None.

    Raises UserError on invalid images, an attack that does not fit them, or logits that are not (B, K).
    """
    how = how or Computation()
    if not len(images) or how.batch_size < 1:
        raise UserError(
            f"need at least one image and a batch_size of at least 1, got {len(images)} and {how.batch_size}; "
            "leave batch_size out for 256"
        )
    name, values = described(attack)
    model = wrapped(model)
    device = how.device_of(model)
    first = to_float(images.images[:1].to(device))
    check_inputs(first, images.labels[:1].to(device))
    k = logits_of(model, first).shape[1]
    check_classes(classes, k)
    attack.allows(first, first)  # raises if the attack does not fit into the image

    def verdicts(stored: Tensor, labels: Tensor, batch: int) -> FlagPair:
        x, y = to_float(stored.to(device)), labels.to(device)
        check_inputs(x, y, k)
        right = correct_mask(model, x, y)
        held = right.clone()
        if right.any():  # synchronises the device
            held[right] = _holds(attack, model, x[right], y[right], make_generator(device, how.seed, batch), name)
        return right, held

    with how.state.opened(), exact_float32(), progress(f"attack {name}", len(images), show=how.show) as tick:
        return attack_accuracy(images, verdicts, how, attack=name, settings=values, tick=tick)


def described(attack: Unrestricted) -> tuple[str, dict[str, Any]]:
    """Return the attack's registered name and its settings as plain data."""
    name = next((name for name, kind in UNRESTRICTED.items() if kind is type(attack)), type(attack).__name__)
    return name, plain_settings(attack)


def _holds(
    attack: Unrestricted, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator, name: str
) -> Tensor:
    """Return which images, all right when clean, are right after the attack too, (B,)."""
    x_adv = run_attack(attack, model, x, y, None, generator=generator, checked=True)
    # The search leaves an image as soon as the folded model is wrong about it, which may be rounding only: search again.
    with attack_mode(model), torch.no_grad():
        with optimized(model, x) as answer:
            seen = ~CLASSIFICATION.correct(answer(x_adv), y)
        again = seen & correct_mask(model, x_adv, y)
        if again.any():
            x_adv[again] = attack.worst(model, x[again], y[again], generator=generator)
    check_finite(x_adv, name)
    finite = finite_images(x_adv)
    inside = attack.allows(x_adv, x) & ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
    if not (inside | ~finite).all():
        raise AttackError(f"{name} left the images that it allows")
    return correct_mask(model, x_adv, y)
