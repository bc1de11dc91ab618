"""PGD that leaves paths which repeat themselves: the same verdicts as with all steps, in fewer; and MALT's targets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clead.attacks.apgd import APGD, nearest_classes
from clead.attacks.pgd_cd import PGDCD
from clead.threats.linf import Linf
from support import generator


class Counted(nn.Module):
    """A small network with kinks, which counts the images that it is asked for."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
        self.asked = 0

    def forward(self, x):
        self.asked += len(x)
        return self.net(4 * x)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    eps=st.floats(0.01, 0.5),
    step_size=st.sampled_from(["1/10", "1/4", "0.3", "1", "2"]),
    steps=st.integers(1, 90),
    restarts=st.integers(1, 2),
    loss=st.sampled_from(["cross_entropy", "margin"]),
)
def test_the_verdicts_are_those_of_all_steps(seed, eps, step_size, steps, restarts, loss):
    """One image at a time, so that the number of images left does not change how the network rounds."""
    model, threat = Counted(seed), Linf(eps=eps)
    x = torch.rand(3, 1, 3, 4, generator=generator(seed))
    y = model(x).argmax(1)
    found, asked = {}, {}
    for detect in (True, False):
        attack = PGDCD(steps=steps, step_size=step_size, restarts=restarts, loss=loss, detect=detect)
        model.asked, draws = 0, generator(seed)
        found[detect] = torch.cat(
            [attack.perturb(model, x[i : i + 1], y[i : i + 1], threat, generator=draws) for i in range(3)]
        )
        asked[detect] = model.asked
    broken = [model(each).argmax(1) != y for each in found.values()]
    assert torch.equal(*broken) and torch.equal(found[True], found[False])
    assert asked[True] <= asked[False]


def test_long_paths_are_left_early():
    saved = []
    for seed in range(4):
        model, x = Counted(seed), torch.rand(16, 1, 3, 4, generator=generator(seed))
        y, asked = model(x).argmax(1), {}
        for detect in (True, False):
            model.asked = 0
            PGDCD(steps=300, detect=detect).perturb(model, x, y, Linf(eps=0.03))
            asked[detect] = model.asked
        saved.append(asked[True] / asked[False])
    assert max(saved) < 0.5 and sum(saved) / len(saved) < 0.2


def test_it_is_plain_pgd_until_then():
    model, x, eps = Counted(3), torch.rand(1, 1, 3, 4, generator=generator(3)), 0.3
    y, point = model(x).argmax(1), x
    for _ in range(50):
        point = point.detach().requires_grad_()
        logits = model(point)
        if logits.argmax(1) != y:
            break
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, y), point)
        point = torch.minimum(torch.maximum(point + eps / 4 * gradient.sign(), x - eps), x + eps).clamp(0, 1)
    assert model(point).argmax(1) != y
    assert torch.equal(PGDCD(steps=50).perturb(model, x, y, Linf(eps=eps)), point.detach())


# ---------------------------------------------------------------------------------------------------- MALT


class Linear(nn.Module):
    def forward(self, x):
        return x.flatten(1) @ self.weight.T + self.bias

    weight = torch.tensor([[0.0, 0, 0], [-0.1, 0, 0], [3, 0, 0], [1, 1, 1], [0.2, 0.1, 0]])
    bias = torch.tensor([1.0, 0.95, -1.2, -1.3, 0.7])


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", float("inf"))])
def test_malt_orders_classes_by_the_distance_to_their_boundary(norm, dual):
    model, x = Linear(), torch.full((2, 1, 1, 3), 0.3)
    y, logits = torch.zeros(2, dtype=torch.int64), Linear()(x)[0]
    distance = [(logits[0] - logits[k]).item() / model.weight[k].norm(dual).item() for k in range(1, 5)]
    expected = [1 + k for k in sorted(range(4), key=lambda k: distance[k])]
    assert nearest_classes(model, x, y, 4, norm).tolist() == [expected] * 2
    assert nearest_classes(model, x, y, 2, norm).tolist() == [expected[:2]] * 2
    assert expected != [1 + k for k in logits[1:].argsort(descending=True).tolist()]


def test_with_one_target_malt_finds_what_the_most_likely_class_does_not():
    model, x, y = Linear(), torch.full((1, 1, 1, 3), 0.3), torch.zeros(1, dtype=torch.int64)
    threat = Linf(eps=0.5)
    for order, broken in (("confidence", False), ("malt", True)):
        attack = APGD(loss="margin", targets=1, steps=20, target_order=order)
        x_adv = attack.perturb(model, x, y, threat, generator=generator(0))
        assert bool((model(x_adv).argmax(1) != y).any()) == broken
    assert attack.label("") == "APGD-T margin MALT" and "AutoAttack" not in attack.label("")
    with pytest.raises(ValueError, match="target_order malt chooses among targets, got targets 0; set targets to 9"):
        APGD(target_order="malt")
