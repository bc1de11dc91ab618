"""Whether loss, gradients and weights are finite, and where they are not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from clead.runs.directory import RunDir
from clead.runs.resume import Checkpoints

REMEDY = "lower optim.lr, set optim.clip_norm, or use precision float32"


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message names step, term and the last good checkpoint."""


def check_loss(step: int, metrics: Mapping[str, float], run: RunDir) -> None:
    """Raise NonFiniteLoss unless the ``loss`` of a step is finite; the message names the terms that are not."""
    if math.isfinite(metrics["loss"]):
        return
    terms = [name for name, value in metrics.items() if not math.isfinite(value) and name != "loss"] or ["loss"]
    raise NonFiniteLoss(
        f"loss became {metrics['loss']} at step {step} (in {', '.join(terms)}); {last_good(run)}; {REMEDY}"
    )


def last_good(run: RunDir) -> str:
    """Return which checkpoint of the run is the last."""
    good = run.path / "resume.state"
    return (
        f"the last good checkpoint is {good}" if Checkpoints(run.path).exist() else "no checkpoint had been written yet"
    )


def non_finite_weights(model: nn.Module) -> str:
    """Return the name of the first parameter that is NaN or infinite, or an empty string."""
    # Not of buffers: a user's model may hold infinities there on purpose, such as a mask.
    named = model.named_parameters()
    return next((name for name, parameter in named if not torch.isfinite(_local(parameter)).all()), "")


def non_finite_gradient(model: nn.Module, parameters: Sequence[nn.Parameter]) -> str:
    """Return the name of the first parameter whose gradient is NaN or infinite, or an empty string."""
    gradients = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not gradients or math.isfinite(get_total_norm(gradients, norm_type=math.inf).item()):  # synchronises the device
        return ""
    named = ((name, _local(each.grad)) for name, each in model.named_parameters() if each.grad is not None)
    return next((name for name, grad in named if not torch.isfinite(grad).all()), "the method's own weights")


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # ty: ignore[not-callable]
