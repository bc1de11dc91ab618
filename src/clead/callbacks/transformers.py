"""Validation under attack for the ``Trainer`` of transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

from clead.callbacks.validation import Validation
from clead.errors import needs_extra

with needs_extra("transformers", "clead.callbacks.transformers"):
    from transformers import TrainerCallback

_ROBUST = "eval_robust_accuracy"


class RobustValidation(TrainerCallback):
    """Measure clean and robust accuracy at each evaluation of a transformers ``Trainer``, and keep the best weights.

    ``trainer.add_callback(RobustValidation(trainer, eps="8/255"))``. They are logged by the trainer as ``eval_clean_accuracy`` and
    ``eval_robust_accuracy``, and ``metric_for_best_model="robust_accuracy"`` chooses by them. A resumed training goes on from the
    best of its log.

    Args:
        trainer: that trains.
        data: batches or samples of images in [0, 1] and labels; None: the trainer's evaluation images.
        **options: of ``clead.callbacks.validation.Validation``: eps, norm, steps, images, seed, best.
    """

    def __init__(self, trainer: Any, data: Any = None, **options: Any) -> None:
        self.trainer, self.data = trainer, data
        self.validation = Validation(**options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Take up the best accuracy of a training that is resumed."""
        self.validation.best = max((line[_ROBUST] for line in state.log_history if _ROBUST in line), default=-1.0)

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure, log and keep."""
        data = self.trainer.get_eval_dataloader() if self.data is None else self.data
        model: nn.Module = given["model"]
        accuracies = self.validation.measure(model, data)
        logged = {f"eval_{name}": value for name, value in accuracies.items()}
        self.trainer.log(dict(logged))
        given["metrics"].update(logged)
        self.validation.keep(model, accuracies, write=state.is_world_process_zero)
