"""Accuracy on darker images, by a model whose answer is known: is the mean pixel above a half?"""

from types import SimpleNamespace

import torch
from clead.measurements.brightness import Brightness
from torch import nn

from clead.evaluation.state import ResumableResults
from clead.interfaces import ImageSet


class AboveHalf(nn.Module):
    def forward(self, x):
        mean = x.flatten(1).mean(1, keepdim=True)
        return torch.cat([0.5 - mean, mean - 0.5], 1)


def test_half_as_bright_is_below_a_half():
    x = torch.cat([torch.full((3, 1, 4, 4), 0.2), torch.full((5, 1, 4, 4), 0.8)])
    y = torch.tensor([0] * 3 + [1] * 5)
    for factor, right in ((1.0, 8), (0.5, 3), (10.0, 5)):
        target = SimpleNamespace(model=AboveHalf(), images=ImageSet(x, y), device=torch.device("cpu"))
        result = Brightness(factor=factor).run(target, ResumableResults(None, {}))
        assert result.accuracy.accuracy == right / 8 and result.accuracy.n == 8
