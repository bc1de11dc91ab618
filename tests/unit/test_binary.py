"""One logit: the same flags as two, sensitivity, specificity and scores in closed form on a linear model, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import clead
from clead.errors import UserError
from clead.tasks.binary import Binary
from support import generator

PLAIN = {"curve_points": 0, "check_images": 0, "gallery": 2}


class Two(nn.Module):
    """The two logits [0, z] of a model of one."""

    def __init__(self, one: nn.Module) -> None:
        super().__init__()
        self.one = one

    def forward(self, x):
        z = self.one(x)
        return torch.cat([torch.zeros_like(z), z], 1)


def linear(seed: int = 0, bias: float = 0.0) -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(1, 16, generator=generator(seed)))
        model[1].bias.fill_(bias - model[1].weight.sum().item() / 2)
    return model


def images(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    x = 0.3 + 0.4 * torch.rand(n, 1, 4, 4, generator=generator(1))  # no ball of 0.1 meets the border of the pixel box
    return x, (linear()(x)[:, 0] + torch.randn(n, generator=generator(2)) > 0).long()


@given(st.floats(-8, 8), st.integers(0, 1), st.floats(0.01, 0.99))
def test_the_answer_is_the_side_of_the_threshold_and_the_margin_says_how_far(z, y, threshold):
    task, logit, target = Binary(threshold=threshold), torch.tensor([[z]]), torch.tensor([y])
    z, positive = logit.item(), logit.item() > torch.tensor(math.log(threshold / (1 - threshold))).item()
    assert task.predict(logit).item() == positive and task.correct(logit, target).item() == (positive == y)
    side = 1 if y else -1
    assert task.margin(logit, target).item() == pytest.approx(
        side * (math.log(threshold / (1 - threshold)) - z), abs=1e-5
    )
    assert task.loss(logit, target).item() == pytest.approx(math.log1p(math.exp(-side * z)), abs=1e-5)
    assert torch.equal(task.correct(logit[:, 0], target), task.correct(Two(nn.Identity())(logit), target))


@pytest.mark.parametrize("name", ["standard", "quick", "black_box", "pgd"])
def test_every_flag_is_that_of_the_two_logit_model(name):
    (x, y), model = images(16), linear()
    options = {"suite": name, "eps": 0.03, "steps": 8, **PLAIN}
    one = clead.evaluate(model, x, y, task="binary", **options)
    two = clead.evaluate(Two(model), x, y, **options)
    assert 0 < sum(one.robust_flags) < sum(one.clean_flags) < 16
    assert (one.clean_flags, one.robust_flags) == (two.clean_flags, two.robust_flags)
    assert [each.flags for each in one.attacks] == [each.flags for each in two.attacks]
    assert one.task == "binary" and two.task == "classification" and two.metrics == []


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_sensitivity_specificity_and_scores_are_the_closed_forms_of_a_linear_model(threshold):
    (x, y), model, eps = images(), linear(), 0.02
    record = clead.evaluate(
        model, x, y, suite="quick", eps=eps, task=Binary(threshold=threshold), classes=["no", "yes"], **PLAIN
    )
    z, most = model(x)[:, 0].detach().double(), eps * model[1].weight.detach().abs().sum().item()
    worst = torch.where(y == 1, z - most, z + most)
    shift = math.log(threshold / (1 - threshold))
    metrics = {metric.name: metric for metric in record.metrics}
    for name, side in (("sensitivity", 1), ("specificity", 0)):
        of = y == side
        clean, robust = (((scores > shift) == bool(side))[of].double().mean().item() for scores in (z, worst))
        assert (metrics[name].clean, metrics[name].robust) == pytest.approx((clean, robust))
        assert metrics[name].n == int(of.sum()) and f"{metrics[name].n} " in metrics[name].about
    pairs = [(a[:, None] > b[None]).double().mean().item() for a, b in ((s[y == 1], s[y == 0]) for s in (z, worst))]
    assert (metrics["ROC area"].clean, metrics["ROC area"].robust) == pytest.approx(tuple(pairs))
    assert pairs[1] < pairs[0] and record.robust_flags == ((worst > shift) == (y == 1)).tolist()


def test_data_and_outputs_of_other_tasks_are_refused_with_the_one_that_fits():
    task = Binary()
    with pytest.raises(UserError, match=r"two classes, .*, got 3: a, b, c; give --task classification"):
        task.check_data(torch.zeros(4, dtype=torch.int64), ["a", "b", "c"])
    with pytest.raises(UserError, match="give --task multilabel"):
        task.check_data(torch.zeros(4, 2, dtype=torch.int64), ["a", "b"])
    with pytest.raises(UserError, match=r"one logit per image.*got torch.float32 \(2, 3\); give --task classification"):
        task.check(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UserError, match="threshold"):
        clead.load_recipe("digits-pgd-at", ["--task", "binary", "--task.threshold", "1"])


def test_a_score_that_is_not_a_number_counts_as_wrong_as_can_be():
    class Broken(nn.Module):
        def forward(self, x):
            z = linear()(x)
            return torch.where(x[:, :1, 0, 0] < 0.45, torch.nan, z)

    x, y = images()
    lost = x[:, 0, 0, 0] < 0.45
    assert lost.any() and y[lost].any() and not y[lost].all()
    record = clead.evaluate(Broken().eval(), x, y, task="binary", suite="pgd", eps=0.01, steps=2, **PLAIN)
    area = next(metric for metric in record.metrics if "ROC" in metric.name)
    z = linear()(x)[:, 0].detach()
    z = torch.where(lost, torch.where(y == 1, -torch.inf, torch.inf), z)
    pairs = (z[y == 1][:, None] > z[y == 0]).float().mean().item()
    assert area.clean == pytest.approx(pairs) and area.robust <= area.clean
