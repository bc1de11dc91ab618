"""What the callbacks have in common: accuracy under attack on validation images, and the best weights in a file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clead.api.batches import images_and_labels
from clead.attacks.pgd import PGD
from clead.attacks.runner import check_inputs, logits_of
from clead.errors import UserError
from clead.evaluation.correctness import accuracy_under_attack, exact_float32, to_float
from clead.interfaces import ImageSet
from clead.models.external import ExternalModel, unwrapped
from clead.models.seeding import fork_rng
from clead.models.split import wrapped
from clead.settings import validated
from clead.tasks import TASKS, Task
from clead.tasks.segmentation import SEGMENTATION
from clead.threats import THREATS
from clead.weights.files import save_weights

_log = logging.getLogger("clead")


class Validation:
    """Measures a classifier by PGD with falling steps on its margin, as ``clead train`` validates, and keeps the best weights.

    Args:
        eps: radius in pixel units of [0, 1], a number or text such as ``"8/255"``.
        norm: linf, l2, l1 or l0.
        steps: of PGD.
        images: so many validation images at most, the first.
        seed: of the random starts.
        best: a safetensors file for the weights of the best robust accuracy, which ``clead evaluate --model … --weights`` takes.
        task: what is right: a name of ``clead list`` or a task's settings object. Of masks and several labels an accuracy is the
            mean part of each image that is right.
    """

    def __init__(
        self,
        *,
        eps: float | str,
        norm: str = "linf",
        steps: int = 10,
        images: int = 512,
        seed: int = 0,
        best: str | Path = "best.safetensors",
        task: Any = "classification",
    ) -> None:
        self.task: Task = TASKS.get(task)() if isinstance(task, str) else task
        self.threat = validated(THREATS.get(norm), {"eps": eps})
        self.attack = validated(PGD, {"steps": steps, "step_schedule": "linear"}, "PGD")
        if images < 1:
            raise UserError(f"images must be at least 1, got {images}; give such as images=512")
        self.images, self.seed, self.path = images, seed, Path(best)
        self.best = -1.0
        self._set: ImageSet | None = None

    def measure(self, model: nn.Module, data: Any) -> dict[str, float]:
        """Return clean and robust accuracy of ``model`` (pixels in [0, 1] → logits), of masks the mIoU, too; it is left as it is.

        Args:
            model: on any device, in any mode.
            data: batches of images and labels, such as a DataLoader; read once.
        """
        with torch.inference_mode(False):
            if self._set is None:
                self._set = self._read(data)
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            model = wrapped(model)
            if isinstance(model, ExternalModel):
                model.io.per_pixel = self.task == SEGMENTATION
            with fork_rng(self.seed):
                self.task.check(logits_of(model, self._set.images[:1].to(device)), self._set.labels)
            with exact_float32():
                return accuracy_under_attack(
                    *(model, self._set, self.threat, self.attack, "margin"),
                    **{"seed": self.seed, "device": device, "task": self.task},
                )

    def keep(self, model: nn.Module, accuracies: dict[str, float], write: bool = True) -> None:
        """Write the weights if no robust accuracy before was larger: of equals the later one, which has learnt longer.

        Args:
            model: whose ``state_dict`` is written.
            accuracies: what ``measure`` returned.
            write: False where another process writes.
        """
        if accuracies["robust_accuracy"] < self.best:
            return
        self.best = accuracies["robust_accuracy"]
        if write:
            content = {
                name: value.detach().to("cpu", copy=True) for name, value in unwrapped(model).state_dict().items()
            }
            assert self._set is not None
            how = {"norm": self.threat.norm, "eps": self.threat.eps.text, "attack": self.attack.label("margin")}
            save_weights(self.path, content, {**accuracies, **how, "images": len(self._set)})

    def _read(self, data: Any) -> ImageSet:
        """Return the first images of ``data`` on the CPU; raises UserError if they are not pixels in [0, 1] with labels."""
        x, y = (values.clone() for values in images_and_labels(data, limit=self.images, task=self.task))
        x, y = to_float(x[: self.images]).cpu(), y[: self.images].cpu()
        check_inputs(x, y, task=self.task)
        if y.dim() == 1 and len(y) > 20 and len(y) >= self.images and (y.diff() >= 0).all():
            _log.warning(
                "the validation images come class by class, and the first %d hold the classes %d to %d; give a shuffled loader",
                *(len(y), int(y[0]), int(y[-1])),
            )
        return ImageSet(x, y)
