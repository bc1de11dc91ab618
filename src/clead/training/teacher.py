"""The model that a training learns from, if its method has a teacher."""

from __future__ import annotations

from pathlib import Path

from clead.config import RunConfig
from clead.errors import UserError
from clead.interfaces import Splits
from clead.models.split import SplitModel, copied
from clead.runs.directory import RunDir
from clead.runs.loading import load_model
from clead.weights.files import load_weights

START = "start"
"""What ``train.teacher`` says of the model as the training begins."""


def load_teacher(config: RunConfig, model: SplitModel, splits: Splits) -> SplitModel | None:
    """Return ``train.teacher`` in evaluation mode, without gradients, or None.

    Args:
        config: of the training.
        model: as the training begins.
        splits: its images.

    Raises UserError if the teacher knows other classes or another shape of images, or its features have another size.
    """
    source = config.train.teacher
    if source is None:
        return None
    if source == START:
        teacher = copied(model)
        teacher.drop_projection()
        return teacher.eval().requires_grad_(False)
    try:
        run = RunDir.open(Path(source))
        trained = run.config()
        _, metadata = load_weights(run.weights(trained.eval.weights))
        teacher = load_model(run, trained, trained.eval.weights, None)
    except UserError as error:
        raise UserError(*(f"train.teacher: {problem}" for problem in error.problems)) from None
    shape = tuple(splits.train.images.shape[1:])
    if tuple(metadata["shape"]) != shape or list(metadata["classes"]) != list(splits.classes):
        raise UserError(
            f"train.teacher: {source} was trained on images of shape {tuple(metadata['shape'])} in {len(metadata['classes'])} "
            f"classes, these have {shape} and {len(splits.classes)} (names and order count); give a run on the same"
        )
    if config.method.uses_features and teacher.feature_dim != model.feature_dim:
        raise UserError(
            f"train.teacher: {source} has features of size {teacher.feature_dim}, this model {model.feature_dim}; give a run of "
            "the same network, or start"
        )
    return teacher.requires_grad_(False)
