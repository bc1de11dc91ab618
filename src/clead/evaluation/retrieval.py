"""Retrieval under attack: the gallery of an evaluation, and what is measured besides recall@1."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clead.attacks.capabilities import attack_name
from clead.attacks.pgd import PGD
from clead.attacks.runner import finite_images, verified
from clead.data.loaders import make_generator
from clead.errors import UserError
from clead.evaluation.correctness import exact_float32, to_float
from clead.evaluation.state import ResumableResults
from clead.interfaces import ImageSet, Objective, Threat
from clead.models.modes import attack_mode
from clead.models.nearest import NearestItem, unit_features
from clead.models.split import SplitModel
from clead.progress import progress
from clead.results.retrieval import RetrievalResult, Verification
from clead.results.statistics import estimate
from clead.tasks.retrieval import Roc, average_precision, verification_roc

_ORDER = 0  # of the images of a class; which are items does not depend on the seed
_POINTS = 100
_STEPS = 50


def cut_gallery(images: ImageSet, per_class: int) -> tuple[ImageSet, ImageSet]:
    """Return ``per_class`` images of each class, drawn at random, as gallery, and the others as queries, in their order.

    Raises UserError if there are fewer than two classes or no query.
    """
    order = torch.randperm(len(images), generator=make_generator(torch.device("cpu"), _ORDER))
    item = torch.zeros(len(images), dtype=torch.bool)
    for label in images.labels.unique().tolist():
        item[order[images.labels[order] == label][:per_class]] = True
    if item.all():
        raise UserError(
            f"no image is left to ask with: no class has more than {per_class} images, got {len(images)} images in all; "
            "put fewer into the gallery: --task.items 1"
        )
    return images.subset(item.nonzero()[:, 0]), images.subset((~item).nonzero()[:, 0])


def embed(model: SplitModel, images: ImageSet, device: torch.device, batch_size: int = 256) -> Tensor:
    """Return the unit features of all images, (N, d), on the device; the model is left as it is."""
    with attack_mode(model), torch.no_grad(), exact_float32():
        chunks = (to_float(images.images[start : start + batch_size]) for start in range(0, len(images), batch_size))
        return torch.cat([unit_features(model, chunk.to(device)) for chunk in chunks])


@dataclass(frozen=True)
class GalleryAttack:
    """Attacks on single similarities: of a query to an item, of an item to a query, of a query to all items.

    Attributes:
        model: encoder and gallery.
        items: the images of the gallery, in its order.
        threat: what may be changed of one image.
        attack: how.
    """

    model: NearestItem
    items: ImageSet
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
        items = to_float(self.items.images[rival.cpu()]).to(x.device)

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
            "not_led": self.attacked(x, lead, generator) <= 0,
            "holds": (nearest_right > nearest_wrong) & (self.attacked(items, towards(z), generator) < nearest_right),
        }


def measure_gallery(
    attack: GalleryAttack,
    queries: ImageSet,
    adversarial: Tensor,
    *,
    about: tuple[str, list[str]],
    state: ResumableResults,
    seed: int,
    batch_size: int = 256,
    show: bool = False,
) -> RetrievalResult:
    """Return what a record says of a gallery besides recall@1; batches that ``state`` has are not computed again.

    Args:
        attack: model, gallery and threat.
        queries: all of classes that the gallery has.
        adversarial: (Q, C, H, W), what the attacks on recall@1 left of them.
        about: what the gallery is, and which of its classes training saw.
        state: keeps what is finished.
        seed: of all randomness.
        batch_size: queries at once.
        show: whether to show progress.
    """
    device, figures = attack.model.gallery.device, []
    with exact_float32(), state.opened(), progress("retrieval", len(queries), show=show) as tick:
        for number, start in enumerate(range(0, len(queries), batch_size)):
            key, rows = f"batch-{number:06d}", slice(start, start + batch_size)
            if key not in state.parts:
                begun = time.monotonic()
                x, y = to_float(queries.images[rows]).to(device), queries.labels[rows].to(device)
                generator = make_generator(device, seed, number)
                values = attack.measure(x, y, adversarial[rows].to(device), generator)
                state.save(
                    key, {name: value.cpu() for name, value in values.items()}, {"seconds": time.monotonic() - begun}
                )
            figures.append(state.parts[key][0])
            tick(len(queries.labels[rows]))
    return _result(attack, {name: torch.cat([each[name] for each in figures]) for name in figures[0]}, about, state)


def _result(
    attack: GalleryAttack, figures: dict[str, Tensor], about: tuple[str, list[str]], state: ResumableResults
) -> RetrievalResult:
    settings: dict[str, Any] = {"steps": attack.attack.steps, "restarts": attack.attack.restarts}
    return RetrievalResult(
        items=len(attack.items),
        gallery=about[0],
        seen=about[1],
        attack=attack_name(attack.attack, "similarity"),
        settings=settings,
        precision=figures["precision"].mean().item(),
        robust_precision=figures["robust_precision"].mean().item(),
        verification=_verification(verification_roc(figures["same"], figures["different"])),
        robust_verification=_verification(verification_roc(figures["robust_same"], figures["robust_different"])),
        towards_item=estimate(figures["not_led"].tolist()),
        gallery_item=estimate(figures["holds"].tolist()),
        seconds=sum(data["seconds"] for _, data in state.parts.values()),
    )


def _verification(roc: Roc) -> Verification:
    """Return the curve with a hundred of its points."""
    chosen = sorted({round(number * (len(roc.points) - 1) / _POINTS) for number in range(_POINTS + 1)})
    points = [roc.points[index] for index in chosen]
    return Verification(area=roc.area, equal_error=roc.equal_error, accepted=roc.accepted, points=points)
