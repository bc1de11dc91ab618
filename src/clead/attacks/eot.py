"""Expectation over transformation: attack the mean of a randomised model, not one draw of it."""

from __future__ import annotations

import torch
from torch import Tensor

from clead.attacks import ATTACKS
from clead.attacks.pgd import PGD
from clead.interfaces import Objective, Threat
from clead.models.seeding import fork_rng
from clead.settings import setting, settings


def expectation(objective: Objective, draws: int, *, generator: torch.Generator | None = None) -> Objective:
    """Return x -> mean of J(x) over draws of a randomised model (Athalye et al. 2018, arXiv:1707.07397, eq. 1).

    The gradient is the mean gradient. A model draws from the global generators, which are seeded from ``generator`` for each
    call and restored after it: the result is a function of the generator's seed alone, and the caller's stream goes on
    undisturbed. The graphs of all draws are in memory until the gradient is taken.

    Args:
        objective: J, of a model that draws anew in every call.
        draws: how many, ≥ 1.
        generator: decides the draws; every call takes new ones from it. If None every call has the same draws.

    Raises ValueError if draws < 1.

    >>> noisy = lambda x: (x + torch.randn_like(x)).flatten(1).sum(1)
    >>> state = torch.get_rng_state()
    >>> expectation(noisy, 10_000)(torch.full((1, 1, 1, 1), 3.0)).round()
    tensor([3.])
    >>> torch.equal(torch.get_rng_state(), state)
    True
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")

    def mean(x: Tensor) -> Tensor:
        seed = 0
        if generator is not None:  # synchronises the device
            seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        with fork_rng(seed):
            total = objective(x)
            for _ in range(draws - 1):
                total = total + objective(x)
        return total / draws

    return mean


@ATTACKS.register("eot_pgd")
@settings
class EOTPGD(PGD):
    """PGD on the expected objective of a randomised model (Athalye et al. 2018, arXiv:1802.00420, section 4.1).

    On a model that draws nothing it is PGD at ``draws`` times the cost.
    """

    draws: int = setting(20, "draws of the model per step, whose gradients are averaged", unit="draws", ge=1)

    def __call__(
        self, objective: Objective, x: Tensor, threat: Threat, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return x_adv, (B, C, H, W) in [0, 1], inside the threat set around ``x``."""
        return PGD.__call__(
            self, expectation(objective, self.draws, generator=generator), x, threat, generator=generator
        )
