"""One perturbation for all images: how often a single δ, fitted on some images, changes the answers to others."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from clead.attacks.runner import check_inputs, logits_of, verified
from clead.data.label_sampling import stratified
from clead.data.loaders import make_generator
from clead.errors import UserError
from clead.evaluation.correctness import exact_float32, to_float
from clead.evaluation.state import ResumableResults
from clead.interfaces import ImageSet, Threat
from clead.measurements import MEASUREMENTS
from clead.measurements.base import (
    Computation,
    Measured,
    Measurement,
    MeasurementRecord,
    MeasurementTarget,
    Result,
    cells,
    check_classes,
    new_table,
    span,
)
from clead.models.modes import attack_mode
from clead.models.split import wrapped
from clead.progress import Tick, progress
from clead.results.format import norm_of, percent
from clead.results.record import Estimate, Flags
from clead.results.section import Picture, Row, Section, Table
from clead.results.statistics import estimate
from clead.settings import Ratio, setting, settings
from clead.tasks.classification import CLASSIFICATION
from clead.threats import THREATS

if TYPE_CHECKING:
    from rich.table import Table as TerminalTable

NORMS = ("linf", "l2", "l1")
ENOUGH = 100
"""With so many validation images δ is fitted on them, else on half of the evaluated images."""
_SAVED = 50  # steps after which δ is kept in the state


class UniversalResult(Result):
    """What one perturbation does to images that it was not fitted on; flags are in the order of the ``n`` images.

    ``robust``: right when clean and with δ. ``fooled``: the answer is another than to the clean image, right or wrong. ``indices``
    are places among the evaluated images. ``picture`` is δ as PNG in base64, mid-grey where it is 0, its largest value white or
    black; ``max_distance`` the size of the largest change of an image, measured after the pixels were clipped to [0, 1].
    """

    norm: str
    eps: float
    eps_text: str
    seed: int
    fitted: int = Field(ge=1)
    fitted_on: str
    n: int = Field(ge=1)
    indices: list[int]
    clean: Estimate
    clean_flags: Flags
    robust: Estimate
    robust_flags: Flags
    fooled: Estimate
    fooled_flags: Flags
    max_distance: float
    picture: str = Field(pattern=r"^[A-Za-z0-9+/]*={0,2}$")
    seconds: float

    def table(self, record: MeasurementRecord) -> TerminalTable:
        """Return accuracy without and with δ, and the fooling rate."""
        table = new_table(record, f"one perturbation, {self.norm} {self.eps_text}", "", "fraction", "95 % interval")
        table.add_row("right when clean", *cells(self.clean))
        table.add_row("right when clean and with δ", *cells(self.robust), style="bold")
        table.add_row("answer changed by δ", *cells(self.fooled))
        return table

    def sentence(self, record: MeasurementRecord) -> str:
        """Return the fooling rate and the accuracies."""
        return (
            f"{record.run}, {self.n} {record.data.split} images: one perturbation within {self.norm} {self.eps_text}, fitted on "
            f"{self.fitted} {self.fitted_on}, changes {self.fooled.accuracy:.1%} of the answers (95 % interval "
            f"{span(self.fooled)}); {self.robust.accuracy:.1%} stay right, {self.clean.accuracy:.1%} are right when clean."
        )

    @classmethod
    def section(cls, measured: Sequence[Measured]) -> Section:
        """Return δ as a picture and one row of each run."""
        rows, pictures = [], []
        for one in measured:
            result = cast(UniversalResult, one.record.result)
            size = f"{norm_of(result.norm)} ε = {result.eps_text}"
            images = f"{result.n:,} ({one.record.data.split})"
            fitted = f"{result.fitted:,} {result.fitted_on}"
            rows.append([one.name, size, fitted, images, result.clean, result.robust, result.fooled])
            caption = (
                f"{one.name}, {size}: the perturbation, mid-grey where it changes nothing; it changes "
                f"{percent(result.fooled.accuracy)} of the answers."
            )
            pictures.append(Picture(result.picture, f"Universal perturbation of {one.name}", caption))
        table = Table(
            ["Run", "Threat", "Fitted on", "images", "clean", "with the perturbation", "answer changed"],
            rows,
            caption="One perturbation, on images that it was not fitted on, with 95\N{NO-BREAK SPACE}% intervals",
            label="Universal perturbations, table",
            text=["Threat", "Fitted on"],
            strong=["with the perturbation"],
        )
        intro = (
            "A single perturbation is added to every image: whoever has it needs no gradient and no time. Within the same threat, "
            "an attacker who chooses a perturbation for each image can break at least as many."
        )
        return Section("universal", "One perturbation for all images", 35, intro, [Row(pictures=pictures), table])


@MEASUREMENTS.register("universal")
@settings
class UniversalPerturbation(Measurement):
    """Fit one perturbation for all images, and try it on others: ``clead universal RUN ... [--threat.eps 8/255]``.

    max over ‖δ‖ ≤ eps of the mean over images of min(cross-entropy(x + δ), clip), by ascent on mini-batches (Shafahi et al. 2020,
    arXiv:1811.11304, section 3; the clipped loss keeps single images from outweighing the rest). δ is fitted on the validation
    images, or on half of the evaluated images where there are fewer than 100 or they are evaluated; what is measured is always of
    other images. ``--eval.steps`` is the number of steps, 200 if not given. Departure: steps fall from eps/5 to 0.
    """

    result: ClassVar = UniversalResult
    keys: ClassVar = ("threat", "eval.steps", "eval.batch_size")
    steps: ClassVar = 200

    clip: float = setting(9.0, "Largest loss of an image that counts, in nats; 0: not clipped.", ge=0)

    def run(self, target: MeasurementTarget, state: ResumableResults) -> UniversalResult:
        """Fit on some images, measure on others."""
        images, indices, source = target.images, torch.arange(len(target.images)), target.splits.val
        fitted_on = "validation images"
        if target.about.split != "test" or len(source) < ENOUGH:
            first, indices = stratified(images.labels, len(images) // 2, target.seed)
            source, images, fitted_on = (
                images.subset(first),
                images.subset(indices),
                f"other {target.about.split} images",
            )
        return evaluate_universal(
            target.model,
            source,
            images,
            target.threat,
            target.computation(state),
            clip=self.clip,
            steps=target.steps or 200,
            num_classes=target.num_classes,
        ).model_copy(update={"fitted_on": fitted_on, "indices": indices.tolist()})


def evaluate_universal(
    model: nn.Module,
    source: ImageSet,
    images: ImageSet,
    threat: Threat,
    how: Computation | None = None,
    *,
    clip: float = 9.0,
    steps: int = 200,
    num_classes: int | None = None,
) -> UniversalResult:
    """Fit δ on ``source`` and measure it on ``images``, which should have no image in common.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); in eval mode, left bit-identical.
        source: what δ is fitted on.
        images: what is measured; all of them.
        threat: norm and radius of δ.
        how: images per mini-batch, seed of the mini-batches, device; its state has δ every 50 steps, and finished batches.
        clip: largest loss of an image that counts; 0: not clipped.
        steps: mini-batches that δ is fitted on.
        num_classes: K of the data, to be checked against the model's; None: as many as the model has.

    Raises UserError without images to fit on or to measure, or on invalid images or gradients.
    """
    how = how or Computation()
    if not len(images) or not len(source) or min(how.batch_size, steps) < 1:
        raise UserError(
            f"a universal perturbation needs images to fit on and others to measure, steps and a batch size of at least 1, got "
            f"{len(source)}, {len(images)}, {steps} and {how.batch_size}; give --eval.images 100"
        )
    if threat.norm not in NORMS:
        raise UserError(
            f"δ is fitted in {', '.join(NORMS)}, got {threat.norm}; give --threat.norm linf --threat.eps 8/255"
        )
    model = wrapped(model)
    device = how.device_of(model)
    first = to_float(images.images[:1].to(device))
    logits = logits_of(model, first).shape[1]
    check_classes(num_classes, logits)
    for each in (source, images):
        check_inputs(first, each.labels[:1].to(device), logits)
    total = steps + -(-len(images) // how.batch_size)
    with how.state.opened(), exact_float32(), attack_mode(model), progress("universal", total, show=how.show) as tick:
        objective = _Fit(model, threat, clip, steps, how.seed, device)
        delta = objective.fit(source, how.batch_size, how.state, tick)
        flags, max_distance = _apply(objective, delta, images, how.batch_size, how.state, tick)
    eps = Ratio(threat.eps)
    return UniversalResult(
        norm=threat.norm,
        eps=float(eps),
        eps_text=eps.text,
        seed=how.seed,
        fitted=len(source),
        fitted_on="other images",
        n=len(images),
        indices=list(range(len(images))),
        clean=estimate(flags["clean"]),
        clean_flags=flags["clean"],
        robust=estimate(flags["robust"]),
        robust_flags=flags["robust"],
        fooled=estimate(flags["fooled"]),
        fooled_flags=flags["fooled"],
        max_distance=max_distance,
        picture=_png(delta),
        seconds=how.seconds,
    )


class _Fit:
    """The search for δ; the model is in attack mode."""

    def __init__(
        self, model: nn.Module, threat: Threat, clip: float, steps: int, seed: int, device: torch.device
    ) -> None:
        self.model, self.threat, self.clip = model, threat, clip
        self.steps, self.seed, self.device = steps, seed, device
        # δ / 2 around mid-grey: the box [0, 1] then allows pixels of δ in [-1, 1], beyond which clipping undoes them.
        self.half: Threat = THREATS.get(threat.norm)(eps=float(threat.eps) / 2)

    def fit(self, source: ImageSet, batch_size: int, state: ResumableResults, tick: Tick) -> Tensor:
        """Return δ, (C, H, W)."""
        done = [key for key in state.parts if key.startswith("fit-")]
        start = max((int(key[4:]) for key in done), default=0)
        delta = state.parts[f"fit-{start:06d}"][0]["delta"].to(self.device) if start else None
        tick(start)
        begun = time.monotonic()
        for step in range(start, self.steps):
            index = torch.randperm(len(source), generator=make_generator(torch.device("cpu"), self.seed, step))
            batch = source.subset(index[:batch_size])
            x, y = to_float(batch.images.to(self.device)), batch.labels.to(self.device)
            delta = torch.zeros_like(x[0]) if delta is None else delta
            loss, gradient = self._gradient(x, y, delta)
            middle = torch.full_like(delta[None], 0.5)
            moved = self.half.ascend(middle + delta / 2, gradient[None], self.half.eps / 5 * (1 - step / self.steps))
            delta = 2 * (self.half.project(moved, middle)[0] - 0.5)
            tick(1, loss=loss.item())  # synchronises the device
            if (step + 1) % _SAVED == 0 or step + 1 == self.steps:
                state.save(f"fit-{step + 1:06d}", {"delta": delta}, {"seconds": time.monotonic() - begun})
                begun = time.monotonic()
        assert delta is not None
        return delta

    def _gradient(self, x: Tensor, y: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean clipped loss of a mini-batch and its gradient to δ; raises UserError if that is not finite."""
        with torch.enable_grad():
            delta = delta.detach().requires_grad_()
            losses = CLASSIFICATION.loss(self.model((x + delta).clamp(0, 1)), y)
            loss = (losses.clamp_max(self.clip) if self.clip else losses).mean()
            (gradient,) = torch.autograd.grad(loss, delta)
        if not torch.isfinite(gradient).all():  # synchronises the device
            raise UserError(
                "the gradient of the loss to the perturbation is NaN or infinite, so the attack says nothing; "
                "look for sqrt, log or division at 0 in the model"
            )
        return loss.detach(), gradient


def _apply(
    search: _Fit, delta: Tensor, images: ImageSet, batch_size: int, state: ResumableResults, tick: Tick
) -> tuple[dict[str, list[bool]], float]:
    """Return the flags clean, robust and fooled of each image, and the largest change in the threat's norm."""
    flags: dict[str, list[bool]] = {"clean": [], "robust": [], "fooled": []}
    max_distance = 0.0
    for batch, start in enumerate(range(0, len(images), batch_size)):
        key = f"batch-{batch:06d}"
        if key not in state.parts:
            begun = time.monotonic()
            rows = slice(start, start + batch_size)
            x, y = to_float(images.images[rows].to(search.device)), images.labels[rows].to(search.device)
            x_adv = (x + delta).clamp(0, 1)
            verified(x_adv, x, search.threat, "the universal perturbation")
            with torch.no_grad():
                before, after = search.model(x), search.model(x_adv)
            clean = CLASSIFICATION.correct(before, y)
            verdicts = {
                "clean": clean,
                "robust": clean & CLASSIFICATION.correct(after, y),
                "fooled": CLASSIFICATION.predict(after) != CLASSIFICATION.predict(before),
            }
            change = search.threat.distance(x_adv - x).max().item()
            state.save(key, verdicts, {"largest": change, "seconds": time.monotonic() - begun})
        tensors, data = state.parts[key]
        max_distance = max(max_distance, data["largest"])
        for name, values in flags.items():
            values += tensors[name].tolist()
        tick(1, fooled=sum(flags["fooled"]) / len(flags["fooled"]))
    return flags, max_distance


def _png(delta: Tensor) -> str:
    """Return δ (C, H, W) as PNG in base64: mid-grey where it is 0, its largest value white or black."""
    scaled = 0.5 + 0.5 * delta.cpu() / delta.abs().max().clamp_min(1e-12).cpu()
    pixels = (255 * scaled).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
