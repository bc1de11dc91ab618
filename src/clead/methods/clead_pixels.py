"""C-LEAD for masks: the joint objective, its contrastive term between pixels that are drawn from each image."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.interfaces import Batch
from clead.losses.contrastive import supcon
from clead.losses.pixels import VOID
from clead.methods import METHODS
from clead.methods.base import StepContext
from clead.methods.clead import CLead
from clead.methods.labels import distinct, mean_of
from clead.settings import setting, settings
from clead.tasks import Task
from clead.tasks.segmentation import Segmentation


@METHODS.register("clead_pixels")
@settings
class CLeadPixels(CLead):
    """TRADES per pixel, with SupCon between pixels of all images of the batch, clean and adversarial: same class, near features.

    Pixels here are the cells of the decoder's features, each of the class of the nearest pixel of the mask. Of each image
    ``pixels`` of them are drawn, as many of a rare class as of a frequent one as far as there are so many; the same of the clean
    and the adversarial image. Void is drawn last, and pulls nothing. Source: Wang et al. 2021 (arXiv:2101.11939) contrast pixels
    of clean images; the adversarial ones are C-LEAD's. There is no second augmentation.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)
    contrastive_loss: Literal["supcon"] = setting(
        "supcon", "form of the contrastive term: SupCon by the pixels' classes"
    )
    augmented_view: bool = setting(False, "not here: a second augmentation has no mask; false")
    pixels: int = setting(
        64, "how many pixels of each image are contrasted; cost and memory grow with its square", ge=2
    )

    def __post_init__(self) -> None:
        """Refuse a second augmentation."""
        if self.augmented_view:
            raise ValueError(
                "must be false: a second augmentation has no mask of its own, got augmented_view true; leave it out"
            )
        CLead.__post_init__(self)

    def task_problem(self, task: Task) -> str | None:
        """Return why this method cannot train for ``task``: it is for masks alone."""
        return (
            self.inner_problem() if isinstance(task, Segmentation) else "method.name: clead_pixels is for masks alone"
        )

    def contrast(self, z: list[Tensor], batch: Batch, step: StepContext) -> Tensor:
        """Return SupCon between the drawn cells of the views, which are (B, d, h, w) of unit length."""
        height, width = z[0].shape[2:]
        cells = F.interpolate(batch.labels[:, None].float(), (height, width), mode="nearest-exact")[:, 0].long()
        drawn = balanced_cells(cells, min(self.pixels, height * width), step)  # (B, P)
        labels = cells.flatten(1).gather(1, drawn).flatten()
        known = labels != VOID
        vectors = [each.flatten(2).movedim(1, 2) for each in z]  # (B, h·w, d)
        rows = torch.arange(len(drawn), device=drawn.device)[:, None]
        chosen = [each[rows, drawn].flatten(0, 1) for each in vectors]
        return mean_of(supcon(chosen, distinct(labels.masked_fill(~known, -1)), self.temperature), known)


def balanced_cells(cells: Tensor, count: int, step: StepContext) -> Tensor:
    """Draw ``count`` cells of each image without replacement, each with a weight of 1 / how many its class has there.

    cells: (B, h, w) int64 classes, ``VOID`` last of all -> (B, count) int64, indices into h·w. The draw is by exponential clocks
    (Efraimidis & Spirakis 2006), from a copy of the step's generator: to compute the loss twice is to draw the same.
    """
    generator = torch.Generator(cells.device)
    generator.set_state(step.generator.get_state())
    flat = cells.flatten(1)
    frequency = torch.zeros(len(flat), VOID + 1, device=flat.device).scatter_add_(
        1, flat, torch.ones_like(flat, dtype=torch.float32)
    )
    clocks = torch.empty(flat.shape, device=flat.device).exponential_(generator=generator) * frequency.gather(1, flat)
    return clocks.masked_fill(flat == VOID, torch.inf).topk(count, dim=1, largest=False).indices
