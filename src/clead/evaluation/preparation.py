"""What is looked at before hours of attacks: whether they can be made, and whether the clean answers hint at a mistake."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clead.attacks import OBJECTIVES
from clead.attacks.capabilities import capabilities
from clead.attacks.runner import check_applicable, check_inputs, image_gradient, logits_of
from clead.errors import UserError
from clead.evaluation import diagnosis
from clead.evaluation.correctness import run_microbatched
from clead.evaluation.plan import EvaluationPlan
from clead.evaluation.state import ResumableResults
from clead.models.modes import attack_mode
from clead.models.seeding import fork_rng

_TRIED = 8  # images that are asked whether a gradient reaches them


def check_plan(plan: EvaluationPlan) -> tuple[bool, list[str]]:
    """Say whether a gradient reaches the images, and what is to be noted of it.

    Raises UserError if an attack cannot be made on this model or in this norm.
    """
    x, y = plan.inputs(slice(0, 1))
    if x.dim() != 4:
        check_inputs(x, y, task=plan.task)
    if (logits := logits_of(plan.model, x)).dim() != 2:
        plan.task.check(logits, y)
    for named in plan.attacks:
        task, aim = named.goal(plan.task, y)
        check_applicable(named.attack, plan.threat, task, named.objective)
        if named.target is not None and plan.images.labels.eq(named.target).any():
            raise UserError(
                f"{named.name} aims at class {named.target}: leave out images of that class, images[labels != {named.target}]"
            )
        if not capabilities(named.attack).searches:
            with attack_mode(plan.model):  # one of the embedding needs a split model
                OBJECTIVES.get(named.objective)(plan.model, x, y.clamp_min(0))
    if (gradient := image_gradient(plan.model, x)) is not None:
        with fork_rng(plan.settings.seed):
            several = image_gradient(plan.model, plan.inputs(slice(0, _TRIED))[0])
        if several is None or several.any() or gradient.any():
            return True, []
        return True, [
            f"the gradient of the logits to the first {len(several)} images is 0 everywhere (rounding, argmax or a sign in the "
            "model?), so attacks that climb it find nothing: believe --eval.suite black_box only"
        ]
    need = [named.name for named in plan.attacks if capabilities(named.attack).needs_gradient]
    if need:
        raise UserError(
            f"the model gives no gradient to its images (it detaches them, runs under no_grad, or is no PyTorch code), which "
            f"{', '.join(need)} needs; use --eval.suite black_box"
        )
    return False, []


def hints(plan: EvaluationPlan, store: ResumableResults, batches: Sequence[int]) -> list[str]:
    """Say which order of the classes, or which pixels, would make a low clean accuracy high; see ``evaluation/diagnosis.py``."""
    parts = [store.parts[plan.key(batch, -1)][0] for batch in batches]
    if not parts or plan.draws > 1 or any("predicted" not in saved for saved in parts):
        return []
    labels = torch.cat([plan.images.labels[plan.where(batch)] for batch in batches])
    predicted = torch.cat([saved["predicted"] for saved in parts])
    messages = [diagnosis.order_hint(predicted, labels, plan.target.classes)]
    if plan.target.training is None:  # clead train gives pixels as its models want them
        start = plan.where(batches[0]).start
        x, y = plan.inputs(slice(start, start + diagnosis.PIXELS))

        def answer(x: Tensor) -> Tensor:
            return run_microbatched(lambda x, y: plan.task.predict(logits_of(plan.model, x)), x, y, plan.microbatch)

        with fork_rng(plan.settings.seed):
            messages.append(diagnosis.pixel_hint(answer, x, y, plan.num_classes))
            if one_logit(plan.model) and predicted.eq(1).all():
                logits = run_microbatched(lambda x, y: logits_of(plan.model, x), x, y, plan.microbatch)
                messages.append(diagnosis.sigmoid_hint(logits[:, 1] - logits[:, 0]))
    return [message for message in messages if message is not None]


def one_logit(model: nn.Module) -> bool:
    """Say whether ``model`` was seen to give one logit per image, which is taken as two."""
    return any("one logit" in note for note in getattr(model, "notes", ()))
