"""NI-FGSM against the paper's equations, one image at a time in NumPy."""

import numpy as np
import torch
from clead.attacks.ni_fgsm import NIFGSM

from clead.threats.linf import Linf
from support import generator


def test_it_takes_the_papers_path():
    x, w, c = (torch.rand(5, 1, 2, 3, generator=generator(seed)) for seed in (1, 2, 3))

    def objective(images):
        return (w * (images - c) ** 2).flatten(1).sum(1)

    found = NIFGSM(steps=4, decay=0.7)(objective, x, Linf(eps=0.2))
    for i in range(5):
        start, weight, centre = (tensor[i].double().numpy() for tensor in (x, w, c))
        point, g = start, np.zeros_like(start)
        for _ in range(4):
            gradient = 2 * weight * (point + 0.05 * 0.7 * g - centre)
            g = 0.7 * g + gradient / np.abs(gradient).sum()
            point = np.clip(np.clip(point + 0.05 * np.sign(g), start - 0.2, start + 0.2), 0, 1)
        np.testing.assert_allclose(found[i].numpy(), point, atol=1e-6)
