"""What the reference's AutoAttack leaves of a committed model's images: the figures that tests/contract/test_conformance.py compares with.

    pip install pyautoattack==0.2.0
    python qa/autoattack_reference.py --out tests/data/autoattack_reference.json      (three minutes on one core)

It takes seconds an image, so the tests compare with what is kept here. ``tests/data/models/digits-clead`` is the digits-clead recipe,
seed 0; its first test images. For each norm ``holds`` says of each image, as 0 or 1, whether it is right after a stage and those
before it.
"""

from __future__ import annotations

import argparse
import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clead

RUN = Path(__file__).parents[1] / "tests" / "data" / "models" / "digits-clead"
# Radii at which many images break and many hold: where two evaluations can differ.
EPS = {"linf": 0.18, "l2": 0.6, "l1": 1.0}
PEER = {"linf": "Linf", "l2": "L2", "l1": "L1"}
STAGES = {"APGD-CE": "apgd-ce", "APGD-T": "apgd-t", "FAB-T": "fab-t", "Square": "square"}
# Images, and steps of each attack: 100 is AutoAttack's own length, 40 two fifths of it, for both alike (queries too).
N = {"linf": (16, 100), "l2": (16, 40), "l1": (12, 40)}
EOT_IMAGES, EOT_STEPS = 10, 50  # half of its own steps


class Noisy(torch.nn.Module):
    """A defence by noise: every answer is one draw."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the answer to one draw."""
        return self.model(x + 0.1 * torch.randn_like(x))


def subject() -> tuple[torch.nn.Module, Tensor, Tensor]:
    """Return the model, and images in [0, 1] with their labels."""
    model = clead.load(RUN, weights="last")
    images = clead.load_recipe(str(RUN / "config.yaml")).data.load(0).test
    return model, images.images[:24].float() / 255, images.labels[:24]


def adversary_of(model: torch.nn.Module, norm: str, kind: str, steps: int) -> Any:
    """Return the reference, every attack of the length that ``--eval.steps`` gives ours."""
    from pyautoattack import AutoAttack

    adversary = AutoAttack(model, norm=PEER[norm], eps=EPS[norm], version=kind, seed=0)
    adversary.verbose = False
    for apgd in (adversary.apgd, adversary.apgd_targeted):
        apgd.n_iter = apgd.n_iter_orig = steps
        apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr = (max(int(part * steps), 1) for part in (0.22, 0.06, 0.03))
    adversary.fab.n_iter = steps
    adversary.square.n_queries = 50 * steps
    return adversary


def reference(model: torch.nn.Module, x: Tensor, y: Tensor, norm: str, steps: int) -> dict[str, Tensor]:
    """Return which images hold after each stage of pyautoattack's standard version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adversary = adversary_of(model, norm, "standard", steps)
        with torch.no_grad():
            held = model(x).argmax(1) == y
        holds = {}
        for name, stage in STAGES.items():
            adversary.attacks_to_run = [stage]
            if held.any():
                x_adv, _ = adversary.run_standard_evaluation(x[held], y[held], batch_size=len(x))
                with torch.no_grad():
                    right = model(x_adv).argmax(1) == y[held]
                held = held.clone()
                held[held.nonzero()[:, 0]] = right
            holds[name] = held.clone()
    return holds


def randomised(model: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return which images hold under its version ``rand``, by majority of 100 draws (the reference itself looks at one)."""
    torch.manual_seed(0)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        noisy = Noisy(model).eval()
        adversary = adversary_of(noisy, "linf", "rand", EOT_STEPS)
        x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=len(x))
        with torch.no_grad():
            return torch.stack([noisy(x_adv).argmax(1) == y for _ in range(100)]).float().mean(0) > 0.5


def bits(flags: Tensor) -> str:
    return "".join("01"[flag] for flag in flags.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, x, y = subject()
    result: dict[str, Any] = {"peer": f"pyautoattack {version('pyautoattack')}", "torch": torch.__version__}
    for norm, (n, steps) in N.items():
        holds = reference(model, x[:n], y[:n], norm, steps)
        result[norm] = {
            "eps": EPS[norm],
            "n": n,
            "steps": steps,
            "holds": {name: bits(flags) for name, flags in holds.items()},
        }
    flags = randomised(model, x[:EOT_IMAGES], y[:EOT_IMAGES])
    result["rand"] = {"eps": EPS["linf"], "n": EOT_IMAGES, "steps": EOT_STEPS, "holds": bits(flags)}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
