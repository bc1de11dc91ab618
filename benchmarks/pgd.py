"""PGD-10 as training uses it, against torchattacks' PGD on the same model and images, interleaved in one process.

    pip install --no-deps torchattacks==3.5.1 && pip install requests
    python benchmarks/pgd.py --out benchmarks/pgd.json

The peer attacks the model as its users hold it (float32, parameters that require gradients). Ours attacks it as a training step
does, with batch-norm folded, in bfloat16 and in float32, both channels_last. Results are compared without a random start, times
are taken with one: medians of wall-clock time. ``agreement`` is the part of the pixels whose sign of the perturbation is the
peer's, ``loss`` the mean cross-entropy reached, in float32.
"""

import argparse
import json
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch
from torch.nn import functional as F

from clead.attacks.pgd import PGD
from clead.attacks.runner import run_attack
from clead.models import MODELS
from clead.threats.linf import Linf

EPS, STEP, STEPS = 8 / 255, 2 / 255, 10


def build(name):
    torch.manual_seed(0)
    return MODELS.get(name)().build(3, 10, [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]).eval()


def peer(model, x, y, random_start):
    import torchattacks

    return torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=STEPS, random_start=random_start)(x, y)


def ours(precision):
    def attack(model, x, y, random_start):
        pgd = PGD(steps=STEPS, step_size="2/255", random_start=random_start)
        return run_attack(pgd, model, x, y, Linf(eps="8/255"), precision=precision, checked=True)

    return attack


MODES = {
    "torchattacks float32": peer,
    "clead float32": ours(torch.float32),
    "clead bfloat16": ours(torch.bfloat16),
}


def main():
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet8", "resnet18"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor(),
        "batch": arguments.batch,
    }
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(arguments.batch, 3, 32, 32, generator=generator)
    y = torch.randint(0, 10, (arguments.batch,), generator=generator)
    for name in arguments.models:
        model = build(name)
        found = {mode: attack(model, x, y, False) for mode, attack in MODES.items()}
        times = {mode: [] for mode in MODES}
        for round_ in range(arguments.rounds + 1):
            for mode, attack in MODES.items():
                start = time.perf_counter()
                attack(model, x, y, True)
                if round_:  # the first round warms up
                    times[mode].append(time.perf_counter() - start)
        theirs = "torchattacks float32"
        result[name] = {}
        for mode, seconds in times.items():
            with torch.no_grad():
                loss = F.cross_entropy(model(found[mode]), y).item()
            same = ((found[mode] - x).sign() == (found[theirs] - x).sign()).float().mean().item()
            result[name][mode] = {
                "ms_per_image": 1000 * statistics.median(seconds) / arguments.batch,
                "speedup": statistics.median(times[theirs]) / statistics.median(seconds),
                "loss": loss,
                "agreement": same,
            }
            print(name, mode, {key: round(value, 4) for key, value in result[name][mode].items()}, flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
