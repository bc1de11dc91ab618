"""How useful and how robust a run's features are elsewhere: a linear classifier on them, for other data, attacked through both."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from clead.attacks.pgd import PGD
from clead.attacks.runner import run_attack
from clead.data.loaders import make_generator
from clead.errors import MissingExtra, UserError
from clead.evaluation.correctness import correct_mask, exact_float32, to_float
from clead.evaluation.state import ResumableResults
from clead.interfaces import ImageSet, Splits, Threat
from clead.measurements import MEASUREMENTS
from clead.measurements.attack_accuracy import AttackedResult, FlagPair, attack_accuracy
from clead.measurements.base import Computation, Measurement, MeasurementTarget
from clead.models.modes import attack_mode
from clead.models.split import SplitModel
from clead.progress import progress
from clead.settings import Ratio, setting, settings
from clead.tasks.classification import CLASSIFICATION

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""C, the inverse strengths of the penalty, of which the validation images choose."""
OBJECTIVES = ("cross_entropy", "margin")
_CHUNK = 512  # images forwarded at once


@MEASUREMENTS.register("probe")
@settings
class LinearProbe(Measurement):
    """Fit a linear classifier on runs' frozen features, and attack through both: ``clead probe RUN ... [--data.path OTHER]``.

    The data may be of other classes than the run's, if the images have the same shape: its training images are fitted, its
    validation images choose C, its test images are measured. ``--eval.steps`` is the length of PGD, 50 if not given.
    """

    result: ClassVar = AttackedResult
    keys: ClassVar = ("threat", "eval.steps", "eval.batch_size")
    steps: ClassVar = 50
    other_classes: ClassVar[bool] = True
    validation_images: ClassVar[str] = "choose C"

    strengths: tuple[float, ...] = setting(
        STRENGTHS, "C of the logistic regression, with commas; validation images choose."
    )

    def run(self, target: MeasurementTarget, state: ResumableResults) -> AttackedResult:
        """Fit, choose C, and attack."""
        return evaluate_linear_probe(
            cast(SplitModel, target.model),
            target.splits,
            target.images,
            target.threat,
            target.computation(state),
            steps=target.steps or 50,
            strengths=self.strengths,
        )

    def decides(self, target: MeasurementTarget) -> dict[str, Any]:
        """Return also how many labels are known: what is fitted on decides as much as the images that are measured."""
        return {**super().decides(target), **target.labels}


class Probe(nn.Module):
    """g(e(x)): a frozen encoder e and a linear layer g of its own; x (B, C, H, W) in [0, 1] -> logits (B, K)."""

    def __init__(self, encoder: SplitModel, linear: nn.Linear) -> None:
        super().__init__()
        self.encoder = encoder
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (B, K)."""
        return self.linear(self.encoder.features(x))


def fit_linear(features: Tensor, labels: Tensor, num_classes: int, strength: float) -> nn.Linear:
    """Return the layer (D -> K) that minimises ½·‖W‖² + C·Σᵢ CE(W·h̃ᵢ + b, yᵢ), h̃ being features of mean 0 and deviation 1.

    Multinomial logistic regression by L-BFGS, as in Kornblith et al. 2019, arXiv:1805.08974, section 3, who do not rescale the
    features; so C means the same for every encoder, and the rescaling is part of the layer that is returned. Of two classes it is
    the binary form, whose logits are 0 and w·h̃ + b. A class without an image gets a logit of −10⁶.

    Args:
        features: (N, D) float.
        labels: (N,) int64 in [0, K), of at least 2 classes.
        num_classes: K.
        strength: C > 0.

    Raises MissingExtra without scikit-learn.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingExtra("scikit-learn", "data", "a linear probe") from None
    h = features.double().cpu().numpy()
    mean, deviation = h.mean(0), h.std(0)
    deviation[deviation < 1e-8] = 1  # a feature that is constant says nothing
    regression = LogisticRegression(C=strength, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 1000 steps: what is left is far below what C decides
        regression.fit((h - mean) / deviation, labels.cpu().numpy())
    weight, bias = regression.coef_, regression.intercept_
    if len(weight) == 1:
        weight, bias = np.vstack([0 * weight, weight]), np.append(0, bias)
    linear = nn.Linear(h.shape[1], num_classes)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.fill_(-1e6)
        linear.weight[regression.classes_] = torch.from_numpy(weight / deviation).float()
        linear.bias[regression.classes_] = torch.from_numpy(bias - (weight / deviation) @ mean).float()
    return linear


def evaluate_linear_probe(
    model: SplitModel,
    splits: Splits,
    images: ImageSet,
    threat: Threat,
    how: Computation | None = None,
    *,
    steps: int = 50,
    strengths: Sequence[float] = STRENGTHS,
) -> AttackedResult:
    """Fit a linear classifier on the frozen features, and attack encoder and classifier together (white-box).

    As Salman et al. 2020 (arXiv:2007.08489) and Shafahi et al. 2020 (arXiv:1905.08232) ask how adversarially trained features
    transfer. Robust are the images that are right when clean, after PGD on the cross-entropy, and after PGD on the margin, from a
    random start each. That is an upper bound, as every attack gives, and not AutoAttack.

    Args:
        model: the encoder; in eval mode, left bit-identical.
        splits: the data to transfer to: training images with a label (``labelled``) are fitted; the validation images choose C
            among ``strengths`` by clean accuracy, of equals the smaller.
        images: what is measured.
        threat: the set of allowed perturbations.
        how: batch size, seed of the attack's random starts, device; its state has the classifier and finished batches.
        steps: of PGD, ≥ 1.
        strengths: values of C to choose from.

    Returns:
        Clean and robust accuracy per image; ``settings`` has C, the numbers of images fitted and attack steps, and the clean
        accuracy on the training images. Raises UserError if a number is out of range, or too few images or classes are labelled.
    """
    how = how or Computation()
    if not len(images) or min(how.batch_size, steps) < 1:
        raise UserError(
            f"need at least one image, step and image per batch, got {len(images)} images, {steps} steps, batches of "
            f"{how.batch_size}; give images, steps=20 and batch_size=256"
        )
    if not strengths or min(strengths) <= 0:
        raise UserError(f"C must be above 0, got {', '.join(map(str, strengths)) or 'none'}; give --strengths 0.1,1,10")
    device, seed, num_classes, state = how.device_of(model), how.seed, len(splits.classes), how.state
    train = splits.train.labelled_subset()
    if len(train.labels.unique()) < 2:
        raise UserError("a linear probe needs labelled training images of at least 2 classes; raise data.labelled")
    attack = PGD(steps=steps, random_start=True, keep="best")
    with (
        state.opened(),
        exact_float32(),
        attack_mode(model),
        progress("linear probe", len(images), show=how.show) as tick,
    ):
        if "probe" not in state.parts:
            begun = time.monotonic()
            linear, about = _chosen(model, train, splits.val, num_classes, strengths, device)
            about["seconds"] = time.monotonic() - begun
            state.save("probe", linear.state_dict(), about)
        tensors, about = state.parts["probe"]
        linear = nn.Linear(tensors["weight"].shape[1], num_classes)
        linear.load_state_dict(tensors)
        probe = Probe(model, linear).to(device).eval()

        def verdicts(stored: Tensor, labels: Tensor, batch: int) -> FlagPair:
            x, y = to_float(stored.to(device)), labels.to(device)
            streams = [make_generator(device, seed, number, batch) for number in range(len(OBJECTIVES))]
            return _withstands(probe, x, y, attack, threat, streams)

        return attack_accuracy(
            images,
            verdicts,
            how,
            attack=f"PGD-{steps}, {threat.norm} {Ratio(threat.eps).text}, through encoder and linear probe",
            settings={key: about[key] for key in ("C", "fitted", "training_accuracy", "validation_accuracy")},
            tick=tick,
        )


def _withstands(
    probe: Probe, x: Tensor, y: Tensor, attack: PGD, threat: Threat, streams: Sequence[torch.Generator]
) -> FlagPair:
    """Return which images are right when clean, and which after PGD on each objective too, (B,)."""
    right = correct_mask(probe, x, y)
    robust = right.clone()
    for objective, generator in zip(OBJECTIVES, streams, strict=True):
        if robust.any():  # synchronises the device
            x_adv = run_attack(
                attack, probe, x[robust], y[robust], threat, objective=objective, generator=generator, checked=True
            )
            robust[robust.clone()] = correct_mask(probe, x_adv, y[robust])
    return right, robust


def _chosen(
    model: SplitModel,
    train: ImageSet,
    validation: ImageSet,
    num_classes: int,
    strengths: Sequence[float],
    device: torch.device,
) -> tuple[nn.Linear, dict[str, float]]:
    train_features, validation_features = (_features(model, images, device) for images in (train, validation))

    def accuracy(linear: nn.Linear, features: Tensor, truth: Tensor) -> float:
        with torch.no_grad():
            return CLASSIFICATION.correct(linear(features), truth).double().mean().item()

    best: tuple[float, float, nn.Linear] | None = None
    for strength in sorted(strengths):
        linear = fit_linear(train_features, train.labels, num_classes, strength)
        score = accuracy(linear, validation_features, validation.labels)
        if best is None or score > best[0]:
            best = (score, strength, linear)
    assert best is not None
    score, strength, linear = best
    return linear, {
        "C": strength,
        "fitted": len(train),
        "training_accuracy": round(accuracy(linear, train_features, train.labels), 4),
        "validation_accuracy": round(score, 4),
    }


def _features(model: SplitModel, images: ImageSet, device: torch.device) -> Tensor:
    with torch.no_grad():
        return torch.cat(
            [model.features(to_float(chunk.to(device))).float().cpu() for chunk in images.images.split(_CHUNK)]
        )
