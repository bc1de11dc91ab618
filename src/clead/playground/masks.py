"""Masks in the playground: an image attacked on each model by itself, and the answers painted in the report's colours."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from torch import Tensor

from clead.attacks.masks import MaskAPGD
from clead.errors import UserError
from clead.evaluation.correctness import exact_float32, to_float
from clead.losses.pixels import VOID
from clead.playground import pictures
from clead.playground.choices import ATTACK_OPTIONS, AttackSettings
from clead.playground.comparison import CountedModel, PlaygroundModel, Report
from clead.report.sections.masks import colours, palette
from clead.results.format import duration, percent
from clead.tasks.segmentation import SEGMENTATION
from clead.threats import THREATS

MASK_OPTIONS = {
    "pgd": ATTACK_OPTIONS["pgd"],
    "apgd": dataclasses.replace(
        ATTACK_OPTIONS["apgd"],
        label="APGD – as in SEA",
        about="PGD that adapts its step size, in a ball that shrinks from 2ε to ε; it climbs the Jensen–Shannon divergence.",
        make=lambda steps: MaskAPGD(loss="js_divergence", steps=steps),
    ),
    "fgsm": ATTACK_OPTIONS["fgsm"],
}
"""The attacks of ``ATTACK_OPTIONS`` that climb a loss of pixels."""


@dataclass(frozen=True, kw_only=True)
class MaskOutcome:
    """One model of masks under one attack.

    Attributes:
        model: the model.
        clean: the class of each pixel, (H, W) uint8.
        adversarial: the same of ``x_adv``.
        right: share of right pixels, clean and under attack; void pixels do not count.
        x_adv: (C, H, W) in [0, 1].
        seconds: that the attack took.
        passes: how often the model was asked.
    """

    model: PlaygroundModel
    clean: np.ndarray
    adversarial: np.ndarray
    right: tuple[float, float]
    x_adv: Tensor
    seconds: float
    passes: int


def attack_mask(
    models: Sequence[PlaygroundModel],
    image: Tensor,
    mask: Tensor,
    settings: AttackSettings,
    report: Report | None = None,
) -> list[MaskOutcome]:
    """Attack ``image`` (C, H, W) uint8 with its ``mask`` (H, W) on each model by itself; UserError after a minute."""
    x, y = to_float(image[None]), mask.long()[None]
    threat, option = THREATS.get(settings.norm)(eps=settings.eps), MASK_OPTIONS[settings.attack]
    outcomes = []
    for i, model in enumerate(models):
        started = time.monotonic()
        share = (i, len(models))
        counted = CountedModel(model, report, f"attacking {model.name}", option.passes(settings.steps), share)
        clean = _answers(model, x, y)
        x_adv = counted.attack(option.make(settings.steps), x, y, threat, settings.seed, SEGMENTATION)
        adversarial = _answers(model, x_adv, y)
        right = [float(SEGMENTATION.accuracy(answer == y, y)) for answer in (clean, adversarial)]
        outcome = MaskOutcome(
            model=model,
            clean=clean[0].byte().numpy(),
            adversarial=adversarial[0].byte().numpy(),
            right=(right[0], right[1]),
            x_adv=x_adv[0],
            seconds=time.monotonic() - started,
            passes=counted.passes,
        )
        outcomes.append(outcome)
    return outcomes


def _answers(model: PlaygroundModel, x: Tensor, y: Tensor) -> Tensor:
    with exact_float32(), torch.inference_mode():
        logits = model.model(x.to(model.device)).cpu()
    if not torch.isfinite(logits).all():
        raise UserError(f"{model.name} answers NaN or infinity to this image; choose another one")
    return SEGMENTATION.answers(logits, y)


def verdict(outcomes: Sequence[MaskOutcome], settings: AttackSettings) -> str:
    """Return one sentence per model: the share of right pixels, now and before."""
    sentences = " ".join(
        f"<b>{escape(each.model.name)}</b> has {percent(each.right[1])} of the pixels right, {percent(each.right[0])} before."
        for each in outcomes
    )
    return (
        f'<div class="clead" role="status"><p class="verdict">Under {escape(pictures.attack_text(settings))}: {sentences}</p>'
        '<p class="muted">The attack was run on each model by itself, with full access to it (white-box). A stronger attack may '
        "leave fewer.</p></div>"
    )


def cards(outcomes: Sequence[MaskOutcome], image: Tensor, mask: Tensor, classes: Sequence[str]) -> str:
    """Return the colours of the classes that are seen, and each model's images and painted answers."""
    true = mask.byte().numpy()
    seen = np.unique(
        np.concatenate([true.ravel(), *(each for o in outcomes for each in (o.clean.ravel(), o.adversarial.ravel()))])
    )
    legend = "".join(
        f'<span><b style="background:rgb{tuple(palette()[k].tolist())}"></b>{escape(classes[k])}</span>'
        for k in seen.tolist()
        if k != VOID
    )
    key = f'<div class="key">{legend}<span><b style="background:#000"></b>void: does not count</span></div>'
    return f'<div class="clead">{key}{"".join(_card(each, image, true) for each in outcomes)}</div>'


def _card(outcome: MaskOutcome, image: Tensor, true: np.ndarray) -> str:
    drawn, k = pictures.change(outcome.x_adv - image.float() / 255)
    name = escape(outcome.model.name)
    work = f"{outcome.passes} passes through the model, {duration(outcome.seconds)}"
    clean, adversarial = (
        _figure(title, pixels, true, answer, right)
        for title, pixels, answer, right in (
            ("clean", image, outcome.clean, outcome.right[0]),
            ("adversarial", outcome.x_adv, outcome.adversarial, outcome.right[1]),
        )
    )
    middle = (
        f"<figure><figcaption>change ×{k:g}, and the true mask</figcaption>{pictures.picture(drawn, 'what the attack changed')}"
        f"{_painted(true, 'the true mask')}<p class=muted>{escape(work)}</p></figure>"
    )
    return (
        f'<section class="card" aria-label="{name}"><h3>{name}</h3><p class="muted">{escape(pictures.trained(outcome.model))}</p>'
        f'<div class="three">{clean}{middle}{adversarial}</div></section>'
    )


def _figure(title: str, pixels: Tensor, true: np.ndarray, answer: np.ndarray, right: float) -> str:
    """Return an image above the answer to it, with the share of right pixels."""
    painted = _painted(np.where(true == VOID, VOID, answer), f"the answer to the {title} image")
    shown = pictures.picture(pixels, f"the {title} image")
    return (
        f"<figure><figcaption>{title}</figcaption>{shown}{painted}<p>{percent(right)} of the pixels right</p></figure>"
    )


def _painted(mask: np.ndarray, alt: str) -> str:
    return pictures.picture(torch.from_numpy(colours(mask)).permute(2, 0, 1), alt)
