"""What adversarial-library's attacks leave of a committed model's masks: figures for tests/contract/test_mask_conformance.py.

    pip install --no-deps --target peer adv-lib==0.2.8
    PYTHONPATH=src:peer python qa/segmentation_reference.py --out tests/data/segmentation_reference.json   (three minutes on one core)

It takes a second an image and attack, so the tests compare with what is kept here: of each attack the counts of pixels, as records
have them. ``tests/data/models/scenes-pgd-at`` is a U-Net of width 8 with 3 levels, trained by ``clead train`` with the settings
in its ``config.yaml``; the first test images of ``digit_scenes``. ALMA-prox and DAG look for a small perturbation that turns a
part of the pixels, and not for the worst in a ball: what they return is projected on the ball, and they are run for several parts
and step sizes, of which the worst counts for each image.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

import clead
from clead.attacks.runner import logits_of
from clead.losses.pixels import VOID
from clead.results.masks import Counts, counts_text
from clead.tasks.segmentation import SEGMENTATION
from clead.threats.linf import Linf

RUN = Path(__file__).parents[1] / "tests" / "data" / "models" / "scenes-pgd-at"
EPS = ("4/255", "8/255", "16/255")
N = 8
ALMA_STEPS, DAG_STEPS = 500, 200  # their own lengths
ALMA_PARTS, DAG_PARTS = (0.99, 0.25, 0.1), (0.2, 0.1, 0.05)  # of the pixels that are to be wrong; few are of digits
DAG_SIZES = (0.001, 0.003)


def subject() -> tuple[nn.Module, Tensor, Tensor]:
    """Return the model, images in [0, 1] and their masks."""
    model = clead.load(RUN, weights="last")
    images = clead.load_recipe(str(RUN / "config.yaml")).data.load(0).test
    return model, images.images[:N].float() / 255, images.labels[:N].long()


def counts_after(model: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    """Return the counts of pixels of each image."""
    confusion = SEGMENTATION.confusion(logits_of(model, x), y).numpy()
    return counts_text(Counts(confusion.diagonal(axis1=1, axis2=2), confusion.sum(1), confusion.sum(2)))


def perturbed(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what each of the peer's attacks returns, in no ball."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # it compiles a loop of a few steps
    for name in ("torchvision", "torchvision.models", "visdom"):  # of its pictures, which nobody looks at
        sys.modules.setdefault(name, ModuleType(name))
    sys.modules["torchvision"].models = sys.modules["torchvision.models"]  # ty: ignore[unresolved-attribute]
    from adv_lib.attacks.segmentation.alma_prox import alma_prox  # ty: ignore[unresolved-import]
    from adv_lib.attacks.segmentation.dense_adversary import dag  # ty: ignore[unresolved-import]

    counted = y != VOID
    labels = y.masked_fill(~counted, 0)
    for part in ALMA_PARTS:
        how = {"adv_threshold": part, "num_steps": ALMA_STEPS}
        # One by one: of several images with as many void pixels each as they have it looks for constraint number −1.
        each = [alma_prox(model, *(values[k : k + 1] for values in (x, labels, counted)), **how) for k in range(len(x))]
        yield f"ALMA-prox of {part}", torch.cat(each)
    for part in DAG_PARTS:
        for size in DAG_SIZES:
            x_adv = dag(model, x, labels, counted, adv_threshold=part, max_iter=DAG_STEPS, γ=size)
            yield f"DAG of {part} by steps of {size}", x_adv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, x, y = subject()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    attacked = dict(perturbed(model, x, y))
    balls = {}
    for text in EPS:
        threat = Linf(eps=text)
        balls[text] = {
            name: counts_after(model, threat.project(x_adv.detach(), x), y) for name, x_adv in attacked.items()
        }
    result = {
        "peer": f"adv-lib {version('adv-lib')}",
        "torch": torch.__version__,
        "n": N,
        "clean": counts_after(model, x, y),
        "attacks": balls,
    }
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
