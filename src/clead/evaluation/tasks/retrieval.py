"""Retrieval under attack: recall@1 as the accuracy of a classifier, and what is measured besides it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clead.attacks.pgd import PGD
from clead.attacks.runner import finite_images, verified
from clead.config import Eval
from clead.data.loaders import make_generator, to_float
from clead.evaluation.evaluator import evaluate_model
from clead.evaluation.plan import EvaluationOptions, further_state
from clead.evaluation.processes import rank
from clead.evaluation.recording import Evaluation
from clead.evaluation.state import ResumableResults
from clead.evaluation.suites import NamedAttack
from clead.evaluation.tasks import EVALUATORS
from clead.interfaces import ImageSet, Objective, Threat
from clead.losses.precision import exact_float32
from clead.models.modes import attack_mode
from clead.models.nearest import NearestItem, OutputEncoder
from clead.models.split import wrapped
from clead.progress import progress
from clead.results.record import Metric
from clead.results.statistics import estimate
from clead.results.target import EvaluationTarget, digest
from clead.runs.gallery import encoder_of, make_gallery, nearest_item
from clead.tasks.classification import CLASSIFICATION
from clead.tasks.retrieval import Retrieval, average_precision, verification_roc

_STEPS = 50
_BATCH = 256


@EVALUATORS.register("retrieval")
def evaluate(
    model: nn.Module,
    images: ImageSet,
    threat: Threat,
    settings: Eval,
    target: EvaluationTarget,
    *,
    attacks: Sequence[NamedAttack] | None = None,
    more: Sequence[NamedAttack] = (),
    options: EvaluationOptions | None = None,
) -> Evaluation | None:
    """Return the record of a model that answers by its gallery: accuracies are recall@1, ``metrics`` the other figures.

    Arguments are those of ``evaluate_model``. Of a model without a gallery one is made of the images, which are the queries and
    the items then. Attacks that are given make a record of recall@1 alone, as they do not ask for more.
    """
    options = options or EvaluationOptions()
    notes: tuple[str, ...] = ()
    if not isinstance(model, NearestItem):
        assert isinstance(target.task, Retrieval)
        encoder, compared = encoder_of(wrapped(model), target.task, images)
        # Numbers of an embedding are no classes; logits are, and count though no image may be of them.
        least = 0 if isinstance(encoder, OutputEncoder) else encoder.num_classes
        count = max(int(images.labels.max()) + 1, 0 if target.classes else least)
        known = [*target.classes, *map(str, range(len(target.classes), count))]
        items, images, classes, notes = make_gallery(target.task, images, known)
        device = options.device or next((p.device for p in model.parameters()), torch.device("cpu"))
        model, notes = nearest_item(encoder, items, classes, device), (*notes, *compared)
        target = dataclasses.replace(target, classes=tuple(classes))
    plain = dataclasses.replace(target, task=CLASSIFICATION)
    wanted = dataclasses.replace(options, keep_adversarial=True)
    evaluation = evaluate_model(model, images, threat, settings, plain, attacks=attacks, more=more, options=wanted)
    if evaluation is None:
        return None
    update: dict[str, Any] = {"task": "retrieval", "notes": [*evaluation.record.notes, *notes]}
    if attacks is None and rank() == 0:
        assert evaluation.adversarial is not None
        attack = GalleryAttack(model, threat, PGD(steps=settings.steps or _STEPS, keep="best"))
        made = digest(ImageSet(evaluation.adversarial, images.labels))
        state = further_state("gallery", model, images, threat, settings, options, adversarial=made)
        clean = sum(evaluation.record.clean_flags) / len(images)
        figures = measure_gallery(attack, images, evaluation.adversarial, state, settings.seed, show=options.show)
        update |= {"metrics": metrics(figures, clean), "seconds": evaluation.record.seconds + state.seconds}
        update["notes"] += state.notes[1:]
        evaluation.artifacts.update(_scores(figures))
    return dataclasses.replace(evaluation, record=evaluation.record.model_copy(update=update))


def _scores(figures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what the report draws the ROC of verification from: pairs of one class first."""
    labels = torch.cat([torch.ones(len(figures["same"])), torch.zeros(len(figures["different"]))])
    return {
        "score_clean": torch.cat([figures["same"], figures["different"]]),
        "score_worst": torch.cat([figures["robust_same"], figures["robust_different"]]),
        "score_labels": labels,
    }


@dataclasses.dataclass(frozen=True)
class GalleryAttack:
    """Attacks on single similarities: of a query to an item, of an item to a query, of a query to all items.

    Attributes:
        model: encoder and gallery.
        threat: what may be changed of one image.
        attack: how.
    """

    model: NearestItem
    threat: Threat
    attack: PGD = PGD(steps=_STEPS, keep="best")

    def attacked(self, x: Tensor, value: Objective, generator: torch.Generator) -> Tensor:
        """Return the largest value found, (B,), in the threat set around images (B, C, H, W): at least that of ``x`` itself.

        Args:
            x: (B, C, H, W).
            value: of embeddings (B, d), (B,).
            generator: of the random starts.

        It is infinite where the gradient is not finite: nothing is known of such an image, so it counts as broken.
        """

        def objective(images: Tensor) -> Tensor:
            return value(self.model.features(images))

        with attack_mode(self.model):
            x_adv = verified(self.attack(objective, x, self.threat, generator=generator), x, self.threat, "PGD")
            with torch.no_grad():
                best = torch.maximum(objective(x), objective(x_adv.nan_to_num(0)))
        return torch.where(finite_images(x_adv), best, torch.inf)

    def measure(self, x: Tensor, y: Tensor, x_adv: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the figures of queries, (B,) each; ``x_adv`` are theirs from the attacks on recall@1."""
        gallery, labels = self.model.gallery, self.model.labels
        with attack_mode(self.model), torch.no_grad():
            z, z_adv = self.model.features(x), self.model.features(x_adv)
        similarity, right = z @ gallery.T, labels == y[:, None]
        nearest_right = similarity.masked_fill(~right, -torch.inf).amax(1)
        nearest_wrong, rival = similarity.masked_fill(right, -torch.inf).max(1)
        chance = torch.rand(similarity.shape, generator=generator, device=x.device)
        same, different = (chance.masked_fill(~fits, -1).max(1).indices for fits in (right, ~right))
        items = to_float(self.model.items[rival.cpu()]).to(x.device)

        def towards(vectors: Tensor) -> Objective:
            return lambda z: (z * vectors).sum(1)

        def lead(z: Tensor) -> Tensor:
            """How much nearer the item is than the nearest other one."""
            similarity = z @ gallery.T
            nearest_other = similarity.scatter(1, different[:, None], -torch.inf).amax(1)
            return similarity.gather(1, different[:, None])[:, 0] - nearest_other

        return {
            "precision": average_precision(similarity, right),
            "robust_precision": average_precision(z_adv @ gallery.T, right),
            "same": similarity.gather(1, same[:, None])[:, 0],
            "different": similarity.gather(1, different[:, None])[:, 0],
            "robust_same": -self.attacked(x, towards(-gallery[same]), generator),
            "robust_different": self.attacked(x, towards(gallery[different]), generator),
            "elsewhere": lead(z) <= 0,
            "robust_elsewhere": self.attacked(x, lead, generator) <= 0,
            "holds": (nearest_right > nearest_wrong) & (self.attacked(items, towards(z), generator) < nearest_right),
        }


def measure_gallery(
    attack: GalleryAttack,
    queries: ImageSet,
    adversarial: Tensor,
    state: ResumableResults,
    seed: int,
    *,
    batch_size: int = _BATCH,
    show: bool = False,
) -> dict[str, Tensor]:
    """Return the figures of all queries, (Q,) each; batches that ``state`` has are not computed again.

    Args:
        attack: model with gallery, and threat.
        queries: all of classes that the gallery has.
        adversarial: (Q, C, H, W), what the attacks on recall@1 left of them.
        state: keeps what is finished.
        seed: of all randomness.
        batch_size: queries at once.
        show: whether to show progress.
    """
    device, figures = attack.model.gallery.device, []
    with exact_float32(), state.opened(), progress("gallery", len(queries), show=show) as tick:
        for number, start in enumerate(range(0, len(queries), batch_size)):
            key, rows = f"batch-{number:06d}", slice(start, start + batch_size)
            if key not in state.parts:
                begun = time.monotonic()
                x, y = to_float(queries.images[rows]).to(device), queries.labels[rows].to(device)
                values = attack.measure(x, y, adversarial[rows].to(device), make_generator(device, seed, number))
                tensors = {name: value.cpu() for name, value in values.items()}
                state.save(key, tensors, {"seconds": time.monotonic() - begun})
            figures.append(state.parts[key][0])
            tick(len(queries.labels[rows]))
    return {name: torch.cat([each[name] for each in figures]) for name in figures[0]}


def metrics(figures: dict[str, Tensor], recall: float) -> list[Metric]:
    """Return what a record says of a gallery besides recall@1, ``recall`` when clean."""
    n = len(figures["precision"])
    curves = verification_roc(figures["same"], figures["different"])
    attacked = verification_roc(figures["robust_same"], figures["robust_different"])
    pairs = "of a pair of either kind for each query, items drawn at random; each pair attacked through its query"
    elsewhere, holds = (estimate(figures[key].tolist()) for key in ("robust_elsewhere", "holds"))
    return [
        Metric(
            name="mean average precision",
            about="the gallery ranked by similarity; in the worst case, of the images made against recall@1",
            n=n,
            clean=figures["precision"].mean().item(),
            robust=figures["robust_precision"].mean().item(),
        ),
        Metric(name="verification: area under the ROC", about=pairs, n=2 * n, clean=curves.area, robust=attacked.area),
        Metric(
            name="verification: equal error rate, low is good",
            about=pairs,
            n=2 * n,
            clean=curves.equal_error,
            robust=attacked.equal_error,
        ),
        Metric(
            name="verification: accepted where 1 % of strangers are",
            about=pairs,
            n=2 * n,
            clean=curves.accepted,
            robust=attacked.accepted,
        ),
        Metric(
            name="not led to one item",
            about="the nearest item is not one of another class, drawn at random, which the attack on the query aims at",
            n=n,
            clean=figures["elsewhere"].double().mean().item(),
            robust=elsewhere.accuracy,
            robust_interval=(elsewhere.low, elsewhere.high),
        ),
        Metric(
            name="recall@1 with an attacked item",
            about="the query is clean, and the nearest item of another class is attacked",
            n=n,
            clean=recall,
            robust=holds.accuracy,
            robust_interval=(holds.low, holds.high),
        ),
    ]
