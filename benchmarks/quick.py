"""What the curve and the checks of gradient masking add to the attacks of suite quick, in passes and in CPU time.

    python benchmarks/quick.py [RUN]          writes benchmarks/quick.json

A digits run (trained for a minute if none is given) on all its test images, and a ResNet-10 of width 8 with random weights on
random images of CIFAR's size, whose labels are its own answers; and a linear model, where calls cost more than images. Medians of
CPU time of interleaved repetitions. ``in full`` is a curve of 255 images and all checks of 127.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import clead
from clead.attacks.runner import logits_of
from clead.models.compute_cost import CostMeter
from clead.models.resnet import ResNet10

FULL = {"curve_images": 255, "check_images": 127}  # 256 and 128 count as not given
NOTHING = {"curve_points": 0, "check_images": 0}
REPETITIONS = 3


def measured(model: nn.Module, x: torch.Tensor, y: torch.Tensor, eps: str, **settings: Any) -> dict[str, float]:
    """Return passes, calls and CPU seconds of a quick evaluation, and its robust accuracy."""
    start = time.process_time()
    with CostMeter(model) as meter:
        record = clead.evaluate(model, x, y, suite="quick", eps=eps, gallery=0, **settings)
    return {
        "passes": meter.forwards + meter.backwards,
        "calls": meter.calls,
        "seconds": time.process_time() - start,
        "robust": record.robust_accuracy,
    }


def compared(model: nn.Module, x: torch.Tensor, y: torch.Tensor, eps: str) -> dict[str, Any]:
    """Return the three measurements and the ratios to the attacks alone."""
    measured(model, x[:2], y[:2], eps)  # warm up
    runs: dict[str, list[dict[str, float]]] = {"attacks": [], "whole": [], "in full": []}
    for repetition in range(REPETITIONS):
        runs["attacks"].append(measured(model, x, y, eps, **NOTHING))
        runs["whole"].append(measured(model, x, y, eps))
        if not repetition:
            runs["in full"].append(measured(model, x, y, eps, **FULL))
    assert len({value["robust"] for values in runs.values() for value in values}) == 1
    medians = {
        name: {**values[0], "seconds": round(statistics.median(value["seconds"] for value in values), 2)}
        for name, values in runs.items()
    }
    ratios = {
        f"{name}: {key}": round(medians[name][key] / medians["attacks"][key], 2)
        for name in ("whole", "in full")
        for key in ("passes", "calls", "seconds")
    }
    return {"images": len(x), **medians, "times the attacks": ratios}


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        run = Path(sys.argv[1])
    else:
        run = Path(tempfile.mkdtemp()) / "run"
        clead.train(clead.load_recipe("digits-pgd-at", ["--train.budget", "100"]), out=run, show=False)
    splits = clead.load_recipe(run / "config.yaml").data.load(0)
    digits = compared(clead.load(run), splits.test.images, splits.test.labels, "0.15")
    torch.manual_seed(0)
    net = ResNet10(width=8).build(3, 10, [0.5] * 3, [0.25] * 3)
    x = torch.rand(48, 3, 32, 32)
    resnet = compared(net.eval(), x, logits_of(net, x).argmax(1), "0.5/255")
    line = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()
    x = torch.rand(300, 3, 8, 8)
    linear = compared(line, x, logits_of(line, x).argmax(1), "0.01")
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps({"digits": digits, "ResNet-10, width 8": resnet, "linear": linear}, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
