"""A training that fools itself: robust on its own batches, and not under validation. It is noticed, and its cause is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from clead.attacks.capabilities import capabilities
from clead.attacks.pgd import PGD
from clead.attacks.runner import run_attack
from clead.config import RunConfig
from clead.data.base import shuffle_if_sorted
from clead.data.loaders import make_generator
from clead.evaluation.correctness import correct_mask, to_float
from clead.interfaces import Attack, ImageSet, Search, Threat
from clead.models.seeding import fork_rng as global_seed
from clead.tasks.classification import CLASSIFICATION

_IMAGES = 256  # training images that are looked at
_STREAM = 9  # of random starts, apart from those of training
_GAP, _SIGMAS = 0.15, 4.0


def parted(training: float, n_training: int, validation: float, n_validation: int) -> bool:
    """Say whether a robust accuracy on training images is above one on others by more than 15 points and 4 standard errors.

    Args:
        training: accuracy on ``n_training`` images, in [0, 1]; NaN if it is not known.
        n_training: ≥ 0.
        validation: accuracy on ``n_validation`` images.
        n_validation: ≥ 1.

    >>> parted(0.45, 1280, 0.01, 512), parted(0.6, 1280, 0.5, 512), parted(0.6, 8, 0.3, 512)
    (True, False, False)
    """
    if math.isnan(training) or not n_training:
        return False
    # Shrunk towards a half, so that 0 of 8 images are not known without an error.
    shrunk = ((p * n + 2) / (n + 4) for p, n in ((training, n_training), (validation, n_validation)))
    error = math.sqrt(sum(p * (1 - p) / n for p, n in zip(shrunk, (n_training, n_validation), strict=True)))
    return training - validation > max(_GAP, _SIGMAS * error)


def collapsed(training: float, validation: float, best: float) -> bool:
    """Say whether robust training accuracy soars while validation is lost (Wong 2020, arXiv:2001.03994, section 5), or never came.

    training, validation, best: accuracies in [0, 1]: now, now, and the best validation so far.
    """
    reference = best if best > 0.1 else training
    return training - validation > 0.4 and validation < 0.3 * reference


@dataclass(frozen=True)
class Cause:
    """Why training and validation part: a short name, what was measured in words, and the accuracies behind it."""

    kind: str
    text: str
    measured: dict[str, float]


def cause_of(
    model: nn.Module,
    deployed: nn.Module,
    train: ImageSet,
    config: RunConfig,
    device: torch.device,
    training: float,
    validation: float,
) -> Cause:
    """Attack training images and compare accuracies in which one thing changes at a time; leaves all as it was.

    Args:
        model: what is trained, in train mode.
        deployed: what is validated: the same, or the average of its weights.
        train: training images.
        config: the run's.
        device: where to compute.
        training: robust accuracy on the last batches.
        validation: robust accuracy of ``deployed`` on the validation images.
    """
    images = shuffle_if_sorted(train.labelled_subset()).subset(torch.arange(min(_IMAGES, len(train.labelled_subset()))))
    x, y = to_float(images.images).to(device), images.labels.to(device)
    attack = cast(Attack | Search, config.attack)
    strong = PGD(steps=max(20, config.train.validate_steps), step_schedule="linear")
    with global_seed(config.train.seed):
        x_adv = _attacked(attack, model, x, y, config.threat, "cross_entropy", config.train.seed)
        in_train_mode = _train_mode_accuracy(model, x_adv, y, config.data.batch_size)
        in_eval_mode = _accuracy(model, x_adv, y)
        averaged = in_eval_mode
        if deployed is not model:
            other = _attacked(attack, deployed, x, y, config.threat, "cross_entropy", config.train.seed)
            averaged = _accuracy(deployed, other, y)
        against_strong = _accuracy(
            deployed, _attacked(strong, deployed, x, y, config.threat, "margin", config.train.seed), y
        )
    measured = {
        "training": training,
        "train_mode": in_train_mode,
        "eval_mode": in_eval_mode,
        "averaged": averaged,
        "strong_attack": against_strong,
        "validation": validation,
    }
    return Cause(*_explained(measured, len(y), getattr(attack, "steps", 1)), measured)


def _explained(measured: dict[str, float], n: int, steps: int) -> tuple[str, str]:
    """Return the kind of cause and a sentence: what takes most away on the way from training batches to validation."""
    training, train_mode, eval_mode, averaged, strong, validation = measured.values()
    one_step = (
        "one-step overfitting (catastrophic overfitting)" if steps == 1 else f"the {steps}-step attack is too weak"
    )
    lost = {
        "unstable": training - train_mode,
        "modes": train_mode - eval_mode,
        "average": eval_mode - averaged,
        "weak attack": averaged - strong,
        "overfitting": strong - validation,
    }
    kind = max(lost, key=lambda name: lost[name])
    return kind, {
        "modes": f"attack and forward are in different modes: of {n} adversarial images {train_mode:.1%} are classified right in "
        f"train mode and {eval_mode:.1%} in evaluation mode, in which the model is attacked, validated and used; let batch-norm's "
        "running statistics catch up (--train.batch_norm_images 512, more steps, a lower --optim.lr), or freeze the modes: "
        "--train.forward_mode frozen_batch_norm, or eval, without dropout and stochastic depth, for a pre-trained model",
        "average": f"the averaged weights lag behind: {eval_mode:.1%} robust on {n} training images without the average, "
        f"{averaged:.1%} with it; train longer, or set a smaller --train.ema",
        "weak attack": f"{one_step}: of {n} training images {averaged:.1%} are classified right under the attack of the training "
        f"and {strong:.1%} under multi-step PGD; use more steps (--attack.steps 10), a smaller --attack.step_size, or a random "
        "start (--attack.random_start true)",
        "overfitting": f"the training images are learnt by heart: under the same PGD {strong:.1%} of {n} of them are robust, and "
        f"{validation:.1%} of the validation images; stop earlier (--train.patience 5), or use more images or augmentation "
        "(--data.augment.crop 4)",
        "unstable": f"now only {train_mode:.1%} of {n} training images are robust in train mode: the training is unstable, eps "
        "may be too large at once; let it rise (--train.eps_ramp [0,0.7]), or lower --optim.lr",
    }[kind]


def _attacked(
    attack: Attack | Search, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, objective: str, seed: int
) -> Tensor:
    options: dict[str, Any] = {} if capabilities(attack).searches else {"objective": objective}
    generator = make_generator(x.device, seed, _STREAM)
    return run_attack(attack, model, x, y, threat, generator=generator, checked=True, **options)


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return correct_mask(model, x, y).float().mean().item()


def _train_mode_accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> float:
    """Return the accuracy in the mode that the model is in, that of training, in batches of its size; buffers stay as they are."""
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    count = max(1, len(x) // batch_size)  # of at least its size: batch-norm refuses a single image
    try:
        with torch.no_grad():
            flags = [
                CLASSIFICATION.correct(model(a.clone()), b)
                for a, b in zip(x.tensor_split(count), y.tensor_split(count), strict=True)
            ]
    finally:
        for buffer, value in saved:
            if not torch.equal(buffer, value):
                buffer.copy_(value)
    return torch.cat(flags).float().mean().item()
