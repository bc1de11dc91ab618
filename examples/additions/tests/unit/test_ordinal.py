"""Ordered classes: by hand, and under an attack, which must not stop at a near miss."""

import torch
from clead.tasks.ordinal import Ordinal
from torch import nn

from clead.attacks.apgd import APGD
from clead.attacks.runner import run_attack
from clead.threats.linf import Linf
from support import generator


def test_a_near_miss_is_right():
    task, z, y = Ordinal(tolerance=1), torch.tensor([[0.0, 3.0, 1.0, 2.0]]).repeat(4, 1), torch.arange(4)
    assert task.correct(z, y).tolist() == [True, True, True, False]
    assert task.margin(z, y).tolist() == [-1.0, -1.0, -3.0, 1.0]
    assert task.rival(z, y).tolist()[2:] == [0, 1]
    torch.testing.assert_close(task.loss(z, y)[3], -z[0].softmax(0)[2:].sum().log())


def test_an_attack_goes_on_until_the_answer_is_far():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(4, 4, generator=generator(3)))
    x = torch.rand(20, 1, 2, 2, generator=generator(4))
    task, y, threat = Ordinal(tolerance=1), model(x).argmax(1), Linf(eps=0.4)
    x_adv = run_attack(APGD(steps=20), model, x, y, threat, objective="margin", task=task, generator=generator())
    wrong, other = ~task.correct(model(x_adv), y), model(x_adv).argmax(1) != y
    assert wrong.sum() > 3 and (other | ~wrong).all()
