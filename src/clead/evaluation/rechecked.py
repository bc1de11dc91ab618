"""Whether the finished parts of a state agree with the model: what can be seen again without an attack is looked at again."""

from __future__ import annotations

import torch
from torch import Tensor

from clead.attacks.runner import logits_of
from clead.evaluation.correctness import run_microbatched
from clead.evaluation.plan import EvaluationPlan
from clead.evaluation.state import Part
from clead.tasks import Task

_FIGURES = frozenset({"seconds", "forwards", "backwards", "calls", "largest"})
"""What a record needs of an attack's part; one that an earlier version left lacks some."""
_CLEAR = 1e-4  # of the largest logit: closer ones can change places by rounding


def clean_agrees(plan: EvaluationPlan, batch: int, part: Part) -> bool:
    """Say whether the clean images of a batch are classified as a finished part says."""
    if plan.draws > 1:  # a randomised model answers otherwise each time
        return True
    x, y = plan.inputs(plan.where(batch))
    flags = part[0].get("flags")
    if flags is None or flags.dtype != torch.bool or len(flags) != len(y):
        return False
    right, certain = _verdicts(plan, x, y, plan.task)
    return not ((flags != right) & certain).any()


def attack_agrees(plan: EvaluationPlan, batch: int, stage: int, part: Part, chosen: Tensor) -> bool:
    """Say whether a finished part of an attack on the images ``chosen``, (B,) bool, agrees with the images that it kept.

    They must be inside the threat set and classified as the part says, and every broken image that should have been kept must be
    there. "Robust" cannot be seen again without the attack; it rests on the signature.
    """
    rows, (tensors, data) = plan.where(batch), part
    flags = tensors.get("flags")
    if flags is None or flags.dtype != torch.bool or len(flags) != len(chosen) or (flags & ~chosen).any():
        return False
    if not data.keys() >= _FIGURES:
        return False
    number = torch.arange(rows.start, rows.stop)
    last = stage == len(plan.attacks) - 1
    lost = torch.isin(
        number, torch.tensor(data.get("lost", []), dtype=number.dtype)
    )  # there is no image that breaks these
    wanted = number[chosen & (number < plan.num_saved) & (~flags | last) & ~lost]
    if not chosen.any():
        return True
    index, x_adv = tensors.get("index"), tensors.get("x_adv")
    if index is None or x_adv is None or not torch.equal(index, wanted):
        return False
    if not len(wanted):
        return True
    inside = wanted - rows.start
    x, y = (values[inside.to(plan.device)] for values in plan.inputs(rows))
    if x_adv.shape != x.shape or x_adv.dtype != x.dtype:
        return False
    x_adv = x_adv.to(plan.device)
    if not plan.contains(x_adv, x):
        return False
    if plan.draws > 1:
        return True
    task, y = plan.attacks[stage].goal(plan.task, y)
    right, certain = _verdicts(plan, x_adv, y, task)
    return not ((flags[inside] != right) & certain).any()


def _verdicts(plan: EvaluationPlan, x: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Return which images are classified right, and of which that is certain whatever the batch they are in, (B,) bool each."""
    logits = run_microbatched(lambda x, y: logits_of(plan.model, x), x, y, plan.microbatch)
    top = logits.topk(2, dim=1)
    certain = top.values[:, 0] - top.values[:, 1] > _CLEAR * logits.abs().amax(1)  # False for NaN
    return task.correct(logits, y).cpu(), certain.cpu()
