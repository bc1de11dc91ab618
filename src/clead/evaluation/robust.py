"""Attack a fixed model on fixed images, verify every adversarial image, and take the worst case per image."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from clead.attacks.fgsm import FGSM
from clead.attacks.pgd import PGD
from clead.attacks.run import attack_images, check_inputs, logits_of
from clead.checkpoint import command, environment, fingerprint
from clead.config import Eval
from clead.data.loaders import seeded
from clead.errors import UserError
from clead.evaluation.statistics import estimate
from clead.interfaces import Attack, ImageSet, Threat
from clead.models.cost import CostMeter
from clead.models.modes import attack_mode
from clead.models.split import SplitModel, weights
from clead.progress import Tick, progress
from clead.report.record import (
    AttackPart,
    ClassPart,
    CurvePoint,
    DataPart,
    ModelPart,
    Record,
    ThreatPart,
    TrainingPart,
)
from clead.settings import Ratio, validated

_MAP_POINTS = 300
_SHORT = {"cross_entropy": "CE"}


@dataclass(frozen=True)
class NamedAttack:
    """An attack and what it maximises, under the name that tables show."""

    name: str
    attack: Attack
    objective: str = "cross_entropy"


@dataclass(frozen=True)
class Subject:
    """What is evaluated and where it comes from; goes into the record. ``model`` is the architecture's name."""

    name: str
    model: str
    weights: str
    data: str
    split: Literal["train", "val", "test"]
    data_fingerprint: str
    classes: tuple[str, ...]
    training: TrainingPart | None = None


@dataclass(frozen=True)
class Evaluation:
    """A record, and the tensors that its pictures are drawn from (names as in ``report/html.py``)."""

    record: Record
    artifacts: dict[str, Tensor]


def attack_name(attack: Attack, objective: str) -> str:
    """Return the name that tables show, such as ``PGD-50×5 margin``."""
    if isinstance(attack, PGD):
        times = f"×{attack.restarts}" if attack.restarts > 1 else ""
        return f"PGD-{attack.steps}{times} {_SHORT.get(objective, objective)}"
    return f"{type(attack).__name__} {_SHORT.get(objective, objective)}"


def suite(settings: Eval) -> list[NamedAttack]:
    """Return the attacks that ``eval`` asks for: FGSM, and PGD once per objective."""
    attacks = [NamedAttack("FGSM", FGSM())] if settings.fgsm else []
    pgd = PGD(steps=settings.steps, restarts=settings.restarts, keep="best")
    return attacks + [NamedAttack(attack_name(pgd, name), pgd, name) for name in settings.objectives]


def evaluate_model(
    model: nn.Module,
    images: ImageSet,
    threat: Threat,
    settings: Eval,
    subject: Subject,
    *,
    attacks: Sequence[NamedAttack] | None = None,
    device: torch.device | None = None,
    show: bool = True,
) -> Evaluation:
    """Attack ``model`` on ``images`` and return the record: clean, each attack, the worst case per image.

    An image counts as robust only if it is classified right when clean and after every attack. The model is in eval mode and
    left bit-identical; verdicts are in float32; every adversarial image is re-classified and its norm re-measured.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K).
        images: what to attack; all of them.
        threat: norm and radius.
        settings: steps, batch size, seed, curve, gallery.
        subject: names and fingerprints for the record.
        attacks: instead of the suite that ``settings`` describes.
        device: where to compute; that of the model's parameters if None.
        show: whether to show progress.

    Raises UserError if the model's logits are not (B, K), not finite, or the images are not valid.
    """
    start = time.monotonic()
    if not len(images):
        raise UserError("there is no image to evaluate, got 0")
    device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
    attacks = list(suite(settings) if attacks is None else attacks)
    radii = _radii(threat, settings.curve_points)
    curve_images = images.subset(torch.arange(min(settings.curve_images, len(images))))
    total = len(images) * (1 + len(attacks)) + len(curve_images) * len(radii)

    with exact_float32(), progress(f"evaluate {subject.name}", total, show=show) as tick:
        clean = _classify(model, images, settings, device, len(subject.classes), tick)
        labels = images.labels
        clean_flags = clean.argmax(1) == labels
        robust_flags = clean_flags.clone()
        shown = min(max(settings.gallery, _MAP_POINTS), len(images))
        adversarial = _pixels(images.images[:shown])
        parts = []
        for number, named in enumerate(attacks):
            part, found = _attack(
                model, images, clean_flags, threat, named, number, settings, device, tick, robust_flags
            )
            parts.append(part)
            flags = torch.tensor(part.flags)
            # The picture shows, per image, the first attack that broke it, else the last one tried.
            for index in range(shown):
                image = found[index]
                if image is not None and robust_flags[index]:
                    adversarial[index] = image
            robust_flags &= flags
        curve = []
        for radius in radii:
            at = replace(cast(Any, threat), eps=radius)
            pgd = PGD(steps=settings.curve_steps, keep="best")
            named = NamedAttack(f"curve at eps {radius.text}", pgd, "margin")
            flags = clean_flags[: len(curve_images)]
            part, _ = _attack(model, curve_images, flags, at, named, len(attacks), settings, device, tick, flags)
            name = attack_name(pgd, "margin")
            curve.append(CurvePoint(eps=float(radius), eps_text=radius.text, attack=name, robust=part.robust))

    per_class = [
        ClassPart(
            name=name,
            n=int(chosen.sum()),
            clean_accuracy=clean_flags[chosen].float().mean().item(),
            robust_accuracy=robust_flags[chosen].float().mean().item(),
        )
        for k, name in enumerate(subject.classes)
        if (chosen := labels == k).any()
    ]
    eps = Ratio(threat.eps)
    record = Record(
        run=subject.name,
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        command=command(),
        seed=settings.seed,
        model=ModelPart(
            name=subject.model,
            parameters=sum(p.numel() for name, p in model.named_parameters() if not name.startswith("projection.")),
            weights=subject.weights,
            fingerprint=fingerprint(weights(model)),
        ),
        data=DataPart(
            name=subject.data,
            split=subject.split,
            n=len(images),
            classes=list(subject.classes),
            fingerprint=subject.data_fingerprint,
            images=_digest(images),
        ),
        threat=ThreatPart(norm=threat.norm, eps=float(eps), eps_text=eps.text),
        clean=estimate(clean_flags.tolist()),
        clean_flags=clean_flags.tolist(),
        worst=estimate(robust_flags.tolist()),
        robust_flags=robust_flags.tolist(),
        attacks=parts,
        curve=curve,
        per_class=per_class,
        training=subject.training,
        versions=environment(),
        seconds=time.monotonic() - start,
    )
    return Evaluation(record, _artifacts(model, images, adversarial, settings, device))


@contextmanager
def exact_float32() -> Generator[None, None, None]:
    """Compute convolutions in float32 proper on CUDA, whose default rounds their inputs to 10 bits (TF32)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def accuracy_under_attack(
    model: nn.Module,
    images: ImageSet,
    threat: Threat,
    attack: Attack,
    objective: str,
    *,
    seed: int,
    device: torch.device,
) -> tuple[float, float]:
    """Return (clean accuracy, robust accuracy) under one attack; for the validation inside training."""
    right = robust = 0
    for number, (x, y) in enumerate(_batches(images, 256, device)):
        generator = seeded(device, seed, number)
        flags = _right(model, x, y)
        right += int(flags.sum())  # synchronises the device
        if flags.any():
            x, y = x[flags], y[flags]
            x_adv = attack_images(attack, model, x, y, threat, objective=objective, generator=generator, checked=True)
            robust += int(_right(model, x_adv, y).sum())
    return right / len(images), robust / len(images)


def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return which images are classified right, (B,); not if a logit is NaN, which argmax takes for the largest."""
    with attack_mode(model), torch.no_grad():
        logits = model(x)
    return (logits.argmax(1) == y) & torch.isfinite(logits).all(1)


def _attack(
    model: nn.Module,
    images: ImageSet,
    clean_flags: Tensor,
    threat: Threat,
    named: NamedAttack,
    number: int,
    settings: Eval,
    device: torch.device,
    tick: Tick,
    robust_so_far: Tensor,
) -> tuple[AttackPart, list[Tensor | None]]:
    """Run one attack on the images that are right when clean; return its part of the record and the images it made."""
    start = time.monotonic()
    flags = clean_flags.clone()
    found: list[Tensor | None] = [None] * len(images)
    largest, offset = 0.0, 0
    with CostMeter(model) as meter:
        for batch, (x, y) in enumerate(_batches(images, settings.batch_size, device)):
            here = slice(offset, offset + len(y))
            right = clean_flags[here].nonzero()[:, 0]
            if len(right):
                x, y = x[right.to(device)], y[right.to(device)]
                generator = seeded(device, settings.seed, number, batch)
                x_adv = attack_images(
                    named.attack,
                    model,
                    x,
                    y,
                    threat,
                    objective=named.objective,
                    generator=generator,
                    checked=True,
                )
                held = _right(model, x_adv, y).cpu()
                size = threat.size(x_adv - x).max().item()
                if not size <= threat.eps * (1 + 1e-5) + 1e-6 or x_adv.min() < 0 or x_adv.max() > 1:
                    raise AssertionError(f"{named.name} left the threat set: size {size}, eps {threat.eps}")
                largest = max(largest, size)
                flags[offset + right] = held
                for index, image in zip((offset + right).tolist(), x_adv.cpu(), strict=True):
                    found[index] = image if index < _MAP_POINTS or index < settings.gallery else None
            offset = here.stop
            running = (flags & robust_so_far)[:offset].float().mean().item()
            tick(here.stop - here.start, attack=named.name, robust_accuracy=running)
    part = AttackPart(
        name=named.name,
        settings={"objective": named.objective, **_settings(named.attack)},
        robust=estimate(flags.tolist()),
        flags=flags.tolist(),
        seconds=time.monotonic() - start,
        forwards=meter.forwards / len(images),
        backwards=meter.backwards / len(images),
        largest=largest,
    )
    return part, found


def _classify(
    model: nn.Module, images: ImageSet, settings: Eval, device: torch.device, num_classes: int, tick: Tick
) -> Tensor:
    """Return the logits of the clean images, (N, K) on the CPU, having checked images, labels and logits."""
    out = []
    for x, y in _batches(images, settings.batch_size, device):
        check_inputs(x, y, num_classes)
        logits = logits_of(model, x)
        if logits.shape[1] != num_classes:
            raise UserError(f"the model returns {logits.shape[1]} logits, the data has {num_classes} classes")
        broken = (~torch.isfinite(logits).all(1)).nonzero()[:, 0]
        if len(broken):
            first = [len(torch.cat(out)) + int(i) for i in broken[:5]] if out else broken[:5].tolist()
            raise UserError(f"logits must be finite, got NaN or infinity for images {first}")
        out.append(logits.float().cpu())
        tick(len(x), attack="none")
    return torch.cat(out)


def _radii(threat: Threat, points: int) -> list[Ratio]:
    """Return ``points`` radii from eps/… to 2·eps, with eps itself among them when ``points`` is even."""
    eps = Ratio(threat.eps)
    radii = []
    for k in range(1, points + 1):
        part = 2 * k / points
        if eps.text.endswith("/255") and eps.text.count("/") == 1:
            radii.append(Ratio(f"{float(eps.text.split('/')[0]) * part:.4g}/255"))
        else:
            radii.append(Ratio(float(f"{float(eps) * part:.4g}")))
    kept = []
    for radius in radii:
        try:
            validated(type(threat), {"eps": radius})
        except UserError:  # beyond what this norm's scale allows
            continue
        kept.append(radius)
    return kept


def _artifacts(
    model: nn.Module, images: ImageSet, adversarial: Tensor, settings: Eval, device: torch.device
) -> dict[str, Tensor]:
    if not len(adversarial):
        return {}
    x = _pixels(images.images[: len(adversarial)])
    with attack_mode(model), torch.no_grad():
        outputs = []
        for part in (x, adversarial):
            if isinstance(model, SplitModel):
                pairs = [model.features_and_logits(chunk.to(device)) for chunk in part.split(settings.batch_size)]
            else:
                pairs = [
                    (logits, logits)
                    for chunk in part.split(settings.batch_size)
                    for logits in [model(chunk.to(device))]
                ]
            outputs.append(tuple(torch.cat([pair[i].float().cpu() for pair in pairs]) for i in (0, 1)))
    (features, logits), (features_adv, logits_adv) = outputs
    g, m = settings.gallery, _MAP_POINTS
    return {
        "x": x[:g],
        "x_adv": adversarial[:g],
        "labels": images.labels[:g],
        "probabilities": logits.softmax(1)[:g],
        "probabilities_adv": logits_adv.softmax(1)[:g],
        "embedding_clean": features[:m],
        "embedding_adv": features_adv[:m],
        "embedding_labels": images.labels[: len(features[:m])].clone(),  # safetensors refuses shared memory
    }


def _batches(images: ImageSet, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(images), batch_size):
        here = slice(start, start + batch_size)
        yield _pixels(images.images[here].to(device)), images.labels[here].to(device)


def _pixels(images: Tensor) -> Tensor:
    """Return float images in [0, 1]; uint8 is divided by 255, float is taken as it is."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float().clone()


def _digest(images: ImageSet) -> str:
    digest = hashlib.sha256(str((tuple(images.images.shape), images.images.dtype)).encode())
    digest.update(images.images.contiguous().numpy().tobytes())
    digest.update(images.labels.numpy().tobytes())
    return digest.hexdigest()[:32]


def _settings(attack: Attack) -> dict[str, Any]:
    if not is_dataclass(attack) or isinstance(attack, type):
        return {"attack": type(attack).__name__}
    return {key: value.text if isinstance(value, Ratio) else value for key, value in asdict(attack).items()}
