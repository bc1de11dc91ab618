"""The mode of a model while it learns, and while it is attacked."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

ForwardMode = Literal["train", "frozen_batch_norm", "eval"]
AttackMode = Literal["eval", "forward"]


def set_forward_mode(model: nn.Module, mode: ForwardMode) -> None:
    """Put ``model`` into the mode in which it learns.

    train: batch-norm takes and keeps the statistics of the batch, dropout and stochastic depth are on. frozen_batch_norm: the same
    with batch-norm's running statistics as they are. eval: evaluation mode, without dropout and stochastic depth too.
    """
    model.train(mode != "eval")
    if mode == "frozen_batch_norm":
        for norm in batch_norms(model):
            norm.eval()


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch-norm layers that keep running statistics."""
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]


@contextmanager
def attack_mode(model: nn.Module, mode: AttackMode = "eval") -> Generator[None, None, None]:
    """Hold ``model`` in evaluation mode with frozen parameters while its input is optimised.

    Inside the block every submodule is in evaluation mode (batch-norm uses and keeps its running statistics,
    dropout is off) and no parameter requires a gradient, so a backward goes to the inputs only. With ``mode`` forward the
    submodules stay in the mode that they are in, and batch-norm keeps its running statistics as they are. On exit, also
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
    tracking = [(norm, norm.track_running_stats) for norm in batch_norms(model) if mode == "forward"]
    try:
        for module, _ in training if mode == "eval" else ():
            module.training = False
        for norm, _ in tracking:
            norm.track_running_stats = False
        for parameter, _ in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        for norm, flag in tracking:
            norm.track_running_stats = flag
