"""How models are evaluated in each task, one file each; a task that asks about images as classification does needs none.

A file registers ``evaluate``, under the task's name, with the arguments of ``evaluate_model``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from clead.config import Eval
from clead.evaluation.evaluator import evaluate_model
from clead.evaluation.recording import Evaluation
from clead.interfaces import ImageSet, Threat
from clead.registry import Registry
from clead.results.target import EvaluationTarget
from clead.tasks import task_name

EVALUATORS: Registry[Callable[..., Evaluation | None]] = Registry("evaluator", "clead.evaluation.tasks")


def evaluate_task(
    model: nn.Module,
    images: ImageSet,
    threat: Threat,
    settings: Eval,
    target: EvaluationTarget,
    **options: Any,
) -> Evaluation | None:
    """Evaluate ``model`` in ``target.task`` and return the record; ``options`` are further arguments of ``evaluate_model``.

    Raises UserError unless the labels of the images are the task's.
    """
    target.task.check_data(images.labels, target.classes)
    name = task_name(target.task)
    evaluate = EVALUATORS.get(name) if name in EVALUATORS.names() else evaluate_model
    return evaluate(model, images, threat, settings, target, **options)
