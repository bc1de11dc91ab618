"""One training step without the optimiser: a batch → views → loss → gradients in the weights, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode

from clead.config import RunConfig
from clead.distributed import SINGLE_PROCESS, World
from clead.interfaces import Batch, Objective, StepOutput, Threat
from clead.methods.base import StepContext
from clead.models.compute_cost import CostMeter
from clead.models.modes import attack_mode
from clead.models.split import SplitModel, copied
from clead.training.awp import perturbed_weights


@dataclass(frozen=True)
class Step:
    """What all steps of a training have in common.

    Attributes:
        config: of the run.
        model: in train mode; the gradients are left in its parameters.
        method_state: what the method keeps from step to step, or None.
        autocast: the precision of the forward.
        scaler: of the loss, for float16.
        world: the processes that train together.
        teacher: what the method learns from, in evaluation mode, or None.
    """

    config: RunConfig
    model: SplitModel
    method_state: nn.Module | None
    autocast: AbstractContextManager[Any]
    scaler: torch.amp.GradScaler
    world: World = SINGLE_PROCESS
    teacher: SplitModel | None = None

    def forward_backward(
        self, batch: Batch, progress: float, generator: torch.Generator, threat: Threat | None = None
    ) -> StepOutput:
        """Make the views and leave in the weights the gradient of their loss, where ``train.awp`` wants it to be taken.

        The gradient of one of several processes is to be averaged with theirs.

        Args:
            batch: of this process.
            progress: part of the training that lies behind, in [0, 1).
            generator: of the random starts.
            threat: that of the run if None.
        """
        output = self._loss_of(batch, progress, generator, threat)
        buffers = self.method_state.buffers() if self.config.train.awp and self.method_state is not None else ()
        saved = [(buffer, buffer.clone()) for buffer in buffers]
        average = None if self.world.world_size == 1 else self.world.all_reduce_mean
        with perturbed_weights(self.model, lambda: self.scaler.scale(output().loss), self.config.train.awp, average):
            for buffer, before in saved:  # the ascent leaves the method's buffers as they are, as it does the model's
                buffer.copy_(before)
            result = output()
            with record_function("backward"):
                self.scaler.scale(result.loss).backward()
        return result

    def forward(
        self, batch: Batch, progress: float, generator: torch.Generator, threat: Threat | None = None
    ) -> StepOutput:
        """Return the loss at the weights as they are, for a caller who takes its gradient, and its metrics; arguments as above."""
        return self._loss_of(batch, progress, generator, threat)()

    def _loss_of(
        self, batch: Batch, progress: float, generator: torch.Generator, threat: Threat | None
    ) -> Callable[[], StepOutput]:
        """Make the views and return what computes their loss."""
        config, model, world, size = self.config, self.model, self.world, len(batch.labels)
        alone = world.world_size == 1
        threat = threat or config.threat
        attack = config.attack if threat.eps else _unmoved
        mode, state = config.train.attack_mode, self.method_state
        context = StepContext(threat, attack, generator, progress, state, world, mode, self.teacher, config.task)
        with record_function("views"), self.autocast:
            views = config.method.views(model, batch, context)
        if not alone:
            views = views._replace(batch=_of_all(views.batch, world), local_batch=views.batch)

        def output() -> StepOutput:
            join = None if alone else lambda outputs: world.gather_with_grad(outputs, size)
            with record_function("loss"), self.autocast, model.gathering_outputs(join):
                return config.method.loss(model, views, context)

        return output


def threat_at(config: RunConfig, progress: float) -> Threat:
    """Return the threat, with the radius that ``train.eps_ramp`` gives it at ``progress`` of the training, in [0, 1]."""
    begin, full = config.train.eps_ramp
    if progress >= full:
        return config.threat
    share = max(0.0, progress - begin) / (full - begin)
    return replace(config.threat, eps=config.threat.eps * share)


def cost_per_image(
    config: RunConfig,
    model: SplitModel,
    batch: Batch,
    method_state: nn.Module | None = None,
    teacher: SplitModel | None = None,
) -> float:
    """Return what one training step costs per image in forward-equivalents, measured on copies of model and method state.

    Forward 1, backward to inputs only 1, backward to inputs and weights 2, over all views and attack steps, at the full radius and
    with all weights that may learn. The model is in the mode in which it learns. A teacher's forwards count by its multiplications.
    """
    probe = copied(model)
    state = None if method_state is None else copied(method_state)
    taught = nullcontext() if teacher is None else CostMeter(teacher)
    generator = torch.Generator(batch.images.device).manual_seed(0)
    step = Step(config, probe, state, nullcontext(), torch.amp.GradScaler(enabled=False), teacher=teacher)
    begin, end = config.method.typical_steps
    with torch.random.fork_rng(devices=[]):
        for _ in range(begin):
            step.forward_backward(batch, 0.0, generator)
        with CostMeter(probe) as meter, taught as teaching:
            for _ in range(begin, end):
                step.forward_backward(batch, 0.0, generator)
    spent = float(meter.forward_equivalents)
    if teacher is not None and teaching is not None:
        spent += teaching.forwards * _multiplications(teacher, batch.images) / _multiplications(probe, batch.images)
    return spent / (len(batch.labels) * (end - begin))


def _multiplications(model: SplitModel, x: Tensor) -> int:
    """Return the multiplications of a forward of ``x``, as PyTorch counts them."""
    with torch.no_grad(), attack_mode(model), FlopCounterMode(display=False) as counter:
        model(x)
    return max(1, counter.get_total_flops())


def mean_output(outputs: Sequence[StepOutput]) -> StepOutput:
    """Return the mean loss and metrics of the microbatches of a step."""
    if len(outputs) == 1:
        return outputs[0]
    names = outputs[0].metrics
    return StepOutput(
        torch.stack([output.loss.detach() for output in outputs]).mean(),
        {name: torch.stack([output.metrics[name] for output in outputs]).mean() for name in names},
    )


def microbatches(batch: Batch, count: int) -> list[Batch]:
    """Return the batch in ``count`` equal parts."""
    if count == 1:
        return [batch]
    parts = [[None] * count if values is None else values.chunk(count) for values in batch]
    return [Batch(*each) for each in zip(*parts, strict=True)]


def first_images(batch: Batch, n: int) -> Batch:
    """Return the first ``n`` images of a batch, with all that belongs to them."""
    return batch._replace(**{name: values[:n] for name, values in batch._asdict().items() if values is not None})


def _unmoved(objective: Objective, x: Tensor, threat: Threat, *, generator: torch.Generator | None = None) -> Tensor:
    """Return the images: there is nothing else in a ball of radius 0."""
    return x


def _of_all(batch: Batch, world: World) -> Batch:
    """Return the batch with what belongs to the labels, of all processes; the images stay those of this one."""
    names = ("labels", "index", "soft_labels", "labelled")
    return batch._replace(
        **{name: world.all_gather(values) for name in names if (values := getattr(batch, name)) is not None}
    )
