"""The mode of a model while it is attacked."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn


@contextmanager
def attack_mode(model: nn.Module) -> Generator[None, None, None]:
    """Hold ``model`` in evaluation mode with frozen parameters while its input is optimised.

    Inside the block every submodule is in evaluation mode (batch-norm uses and keeps its running statistics,
    dropout is off) and no parameter requires a gradient, so a backward goes to the inputs only. On exit, also
    through an exception, all is restored exactly: every submodule has its own training flag and every
    parameter its own ``requires_grad`` again. ``.grad`` and buffers are never touched.

    >>> net = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    >>> with attack_mode(net):
    ...     print(net[0].training, net[1].weight.requires_grad)
    False False
    >>> net[0].training, net[1].weight.requires_grad
    (True, True)
    """
    # The flags are set one by one: train(mode) would overwrite parts that the user holds in another mode, or
    # overrides it.
    training = [(module, module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for module, _ in training:
            module.training = False
        for parameter, _ in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in required:
            parameter.requires_grad_(flag)
