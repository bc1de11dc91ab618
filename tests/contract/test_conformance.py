"""AutoAttack ``standard`` of this package against the reference implementation: the same images of a trained model broken.

``tests/data/models/digits-clead`` is the digits-clead recipe, seed 0. The same comparison on CIFAR-10's ResNet-8 and on more images
is ``benchmarks/autoattack.py``; its results are committed beside it.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import clead
from support import ROOT

RUN = ROOT / "tests" / "data" / "models" / "digits-clead"
# Radii at which many images break and many hold: where two evaluations can differ.
EPS = {"linf": 0.18, "l2": 0.6, "l1": 1.0}
EOT_STEPS = 50  # half of its own
PEER = {"linf": "Linf", "l2": "L2", "l1": "L1"}
STAGES = {"APGD-CE": "apgd-ce", "APGD-T": "apgd-t", "FAB-T": "fab-t", "Square": "square"}
# Images, and steps of each attack: 100 is AutoAttack's own length, 40 two fifths of it, for both alike (queries too). The reference
# takes seconds an image; studies of more images: benchmarks/autoattack.py.
N = {"linf": (16, 100), "l2": (16, 40), "l1": (12, 40)}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def subject() -> tuple[torch.nn.Module, Tensor, Tensor]:
    model = clead.load(RUN, weights="last")
    images = clead.load_recipe(str(RUN / "config.yaml")).data.load(0).test
    return model, images.images[:24].float() / 255, images.labels[:24]


def shorten(adversary: Any, steps: int) -> None:
    """Give every attack of the reference the length that ``--eval.steps`` gives ours."""
    for apgd in (adversary.apgd, adversary.apgd_targeted):
        apgd.n_iter = apgd.n_iter_orig = steps
        apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr = (max(int(part * steps), 1) for part in (0.22, 0.06, 0.03))
    adversary.fab.n_iter = steps
    adversary.square.n_queries = 50 * steps


def reference(model: torch.nn.Module, x: Tensor, y: Tensor, norm: str, steps: int) -> dict[str, Tensor]:
    """Return which images hold after each stage of pyautoattack's standard version."""
    from pyautoattack import AutoAttack

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adversary = AutoAttack(model, norm=PEER[norm], eps=EPS[norm], version="standard", seed=0)
        adversary.verbose = False
        shorten(adversary, steps)
        with torch.no_grad():
            held = model(x).argmax(1) == y
        found = {}
        for name, stage in STAGES.items():
            adversary.attacks_to_run = [stage]
            if held.any():
                x_adv, _ = adversary.run_standard_evaluation(x[held], y[held], batch_size=len(x))
                with torch.no_grad():
                    right = model(x_adv).argmax(1) == y[held]
                held = held.clone()
                held[held.nonzero()[:, 0]] = right
            found[name] = held.clone()
    return found


@pytest.mark.parametrize("norm", list(EPS))
def test_the_same_images_break_as_in_the_reference(subject, norm):
    """Up to one image, each way, in the end: starts and squares are drawn by chance."""
    model, x, y = subject
    n, steps = N[norm]
    x, y = x[:n], y[:n]
    record = clead.evaluate(model, x, y, norm=norm, eps=EPS[norm], steps=steps, curve_points=0, check_images=0)
    ours = {part.name.split("×")[0]: torch.tensor(part.flags) for part in record.attacks}
    theirs = reference(model, x, y, norm, steps)
    assert 0.15 * len(x) < int(theirs["Square"].sum()) < 0.85 * len(x), "the radius leaves nothing to differ about"
    # One run of APGD differs from the next by up to 3 of sixty images with the seed, in both; the end does not.
    for name, allowed in (("APGD-CE", 2), ("APGD-T", 1), ("FAB-T", 1), ("Square", 1)):
        only_ours, only_theirs = int((~ours[name] & theirs[name]).sum()), int((ours[name] & ~theirs[name]).sum())
        assert max(only_ours, only_theirs) <= allowed, f"{name}: {only_ours} break here only, {only_theirs} there only"


class Noisy(torch.nn.Module):
    """A defence by noise: every answer is one draw."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + 0.1 * torch.randn_like(x))


def test_a_randomised_model_breaks_as_under_rand_of_the_reference(subject):
    """Verdicts are majorities of 100 draws, of the reference's images too (it looks at one). Both average 20 gradients a step."""
    from pyautoattack import AutoAttack

    model, x, y = subject
    noisy, x, y = Noisy(model).eval(), x[:10], y[:10]
    record = clead.evaluate(noisy, x, y, suite="rand", eps=EPS["linf"], steps=EOT_STEPS, curve_points=0, check_images=0)
    assert [part.name for part in record.attacks] == ["APGD-CE EoT-20", "APGD-DLR EoT-20"]
    torch.manual_seed(0)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        adversary = AutoAttack(noisy, norm="Linf", eps=EPS["linf"], version="rand", seed=0)
        adversary.verbose = False
        shorten(adversary, EOT_STEPS)
        x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=len(x))
        with torch.no_grad():
            right = torch.stack([noisy(x_adv).argmax(1) == y for _ in range(100)]).float().mean(0)
    ours, theirs = torch.tensor(record.robust_flags), right > 0.5
    assert 0.15 * len(x) < int(theirs.sum()) < 0.85 * len(x)
    assert int((ours & ~theirs).sum()) <= 1, "an image that the reference breaks holds here"
    assert int((~ours & theirs).sum()) <= 2
