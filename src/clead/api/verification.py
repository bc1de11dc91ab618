"""Score adversarial images that an evaluation saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from clead.config import RunConfig
from clead.errors import UserError
from clead.evaluation import adversarial_dataset
from clead.evaluation.correctness import correct_mask, exact_float32, to_float
from clead.models.split import weights
from clead.models.threshold import judged
from clead.renamed import RenamedFields
from clead.results.target import digest
from clead.runs.directory import RunDir
from clead.runs.loading import evaluated_images, load_model
from clead.settings import validated
from clead.tasks.binary import Binary
from clead.tasks.classification import CLASSIFICATION
from clead.threats import THREATS
from clead.threats.geometry import contains
from clead.weights.files import fingerprint


def verify(path: str | Path, file: str | Path, *, config: RunConfig | None = None) -> dict[str, Any]:
    """Score the adversarial images of a file, made for this run or for another, and measure them anew.

    Args:
        path: a run directory.
        file: what ``save_adversarial`` wrote.
        config: the run's configuration with changes (the data's path); the run's own if None.

    Returns:
        ``made_for``, the run that was attacked, and whether this is the ``same_model``; ``n``; ``num_successes``, so many
        broken images the file states; ``wrong``, so many of them this run classifies wrong; ``accuracy`` on all images, and
        ``accuracy_8_bits`` on the same rounded to 8 bits, as a picture file or a camera would hold them; ``max_distance``, the size
        of the largest perturbation, ``eps`` and how many are ``outside``. Raises UserError if the images are not those that the run
        is evaluated on.
    """
    run = RunDir.open(Path(path))
    trained = run.config()
    config = config or trained
    model = judged(load_model(run, config, config.eval.weights, None), config.task)
    x_adv, as_bytes, about = adversarial_dataset.load(Path(file))
    changed = dataclasses.replace(config, eval=dataclasses.replace(config.eval, images=len(x_adv)))
    images, _ = evaluated_images(run, changed, trained, None)
    if digest(images) != about["images"]:
        raise UserError(
            f"{file} holds other images than the first {len(x_adv)} of {path}; give the same data (--data.path, --eval.split)"
        )
    threat = validated(THREATS.get(about["threat"]["norm"]), {"eps": about["threat"]["eps_text"]})
    x, labels = to_float(images.images), images.labels
    task = CLASSIFICATION if isinstance(config.task, Binary) else config.task
    with exact_float32():
        right = torch.cat(
            [correct_mask(model, a, y, task=task) for a, y in zip(x_adv.split(256), labels.split(256), strict=True)]
        )
        as_file = torch.cat(
            [
                correct_mask(model, to_float(a), y, task=task)
                for a, y in zip(as_bytes.split(256), labels.split(256), strict=True)
            ]
        )
    result = {
        "run": run.name,
        "made_for": about["run"],
        "same_model": about["model"] == fingerprint(weights(model)),
        "n": len(labels),
        "num_successes": int((~about["robust"]).sum()),
        "wrong": int((~right & ~about["robust"]).sum()),
        "accuracy": right.double().mean().item(),
        "accuracy_8_bits": as_file.double().mean().item(),
        "max_distance": threat.distance(x_adv - x).max().item(),
        "eps": threat.eps,
        "outside": int((~contains(threat, x_adv, x)).sum()),
    }
    return RenamedFields(result)
