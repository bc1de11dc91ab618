"""Suite ``sea`` against adversarial-library's ALMA-prox and DAG: on a trained model's masks it leaves no more than both.

The peer takes minutes, so its figures are kept: ``qa/segmentation_reference.py`` made
``tests/data/segmentation_reference.json``, and makes it again.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

import clead
from clead.results.masks import Counts, counts_of, lowest_accuracy, lowest_mean_iou, mean_iou, pixel_accuracy
from support import ROOT

RUN = ROOT / "tests" / "data" / "models" / "scenes-pgd-at"
REFERENCE = json.loads((ROOT / "tests" / "data" / "segmentation_reference.json").read_text())
K = 11


@pytest.fixture(scope="module")
def subject() -> tuple[torch.nn.Module, Tensor, Tensor]:
    images = clead.load_recipe(str(RUN / "config.yaml")).data.load(0).test
    x, y = images.images[: REFERENCE["n"]].float() / 255, images.labels[: REFERENCE["n"]]
    return clead.load(RUN, weights="last"), x, y.long()


def worst(texts: list[list[str]]) -> tuple[float, float]:
    """Return the worst aAcc and mIoU of several answers to the same images."""
    answers = [counts_of(each, K) for each in texts]
    counts = Counts(*(np.stack(values, 1) for values in zip(*answers, strict=True)))
    lowest = [counts.chosen(choose(counts)).total() for choose in (lowest_accuracy, lowest_mean_iou)]
    return float(pixel_accuracy(lowest[0])), float(mean_iou(lowest[1]))


@pytest.mark.parametrize(
    "steps", [pytest.param(20, id="short"), pytest.param(300, marks=pytest.mark.long, id="in-full")]
)
@pytest.mark.parametrize("eps", [pytest.param(eps, id=eps.replace("/", "-")) for eps in REFERENCE["attacks"]])
def test_sea_leaves_no_more_than_the_peers_attacks_together(subject, eps, steps):
    """Also with 20 steps of its 300. To a point of aAcc and of mIoU, in the worst case of all answers, the clean one among them."""
    record = clead.evaluate(
        *subject, task="segmentation", suite="sea", eps=eps, steps=steps, curve_points=0, check_images=0
    )
    assert record.masks is not None and record.masks.clean == REFERENCE["clean"], "the clean answers differ"
    accuracy, iou = worst([REFERENCE["clean"], *REFERENCE["attacks"][eps].values()])
    clean = float(mean_iou(counts_of(REFERENCE["clean"], K).total()))
    assert clean > 0.6 and iou < clean - 0.05, "the radius leaves nothing to differ about"
    assert record.worst.accuracy <= accuracy + 0.01
    assert record.metrics[0].name == "mIoU" and record.metrics[0].robust <= iou + 0.01
