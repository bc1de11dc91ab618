"""How long a training step and an attack take on this machine: measured, in the settings that could be used."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from clead.attacks.pgd import PGD
from clead.attacks.runner import run_attack
from clead.config import RunConfig
from clead.data.loaders import Loader, ViewSettings
from clead.devices import device_of
from clead.evaluation.correctness import to_float
from clead.interfaces import Splits
from clead.models.modes import set_forward_mode
from clead.models.seeding import fork_rng
from clead.models.split import SplitModel, copied
from clead.training.step import Step, cost_per_image, first_images
from clead.training.trainer import PRECISION

IMAGES = 32
"""Most images of a step that is timed."""
_REPEATS = 3
_ATTACK_STEPS = 4


@dataclass(frozen=True)
class StepTime:
    """What one training step costs.

    Attributes:
        precision: of the autocast.
        channels_last: the memory layout.
        compile: whether the encoder is compiled.
        seconds: per image.
        forward_equivalents: per image.
    """

    precision: str
    channels_last: bool
    compile: bool
    seconds: float
    forward_equivalents: float


def variants(device: torch.device) -> list[tuple[str, bool, bool]]:
    """Return (precision, channels_last, compile) to be timed. Compiling takes a minute, so it is tried on CUDA alone."""
    choices = [("float32", False, False), ("float32", True, False), ("bfloat16", True, False)]
    return [*choices, ("bfloat16", True, True)] if device.type == "cuda" else choices


def time_steps(config: RunConfig, splits: Splits, model: SplitModel) -> list[StepTime]:
    """Return what a training step of ``config`` costs in each variant, the fastest first; ``model`` is left as it is.

    Args:
        config: of the training; its precision and layout do not count.
        splits: the images.
        model: as ``config`` makes it.
    """
    return sorted(
        (_time(config, splits, model, *variant) for variant in variants(device_of(config.train.device))),
        key=lambda measured: measured.seconds,
    )


def _time(
    config: RunConfig, splits: Splits, model: SplitModel, precision: str, channels_last: bool, compiled: bool
) -> StepTime:
    device, clock = device_of(config.train.device), clock_of(config.train.clock)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    train = dataclasses.replace(config.train, precision=precision, channels_last=channels_last, compile=compiled)
    config = dataclasses.replace(config, train=train)
    with fork_rng(0):
        model = copied(model).to(device=device, memory_format=layout)  # ty: ignore[no-matching-overload]
        set_forward_mode(model, train.forward_mode)
        count = min(IMAGES, config.data.batch_size, len(splits.train))
        views = ViewSettings(first=config.data.augment, second=None, cutmix=0.0, num_classes=len(splits.classes))
        loader = Loader(splits.train, count, device=device, seed=0, drop_last=True, views=views)
        batch = first_images(loader.batch(0, 0), count)
        batch = batch._replace(images=batch.images.contiguous(memory_format=layout))
        cost = cost_per_image(config, model, first_images(batch, 2))
        if compiled:
            model.compile()
        lower = precision != "float32"
        autocast = torch.autocast(device.type, dtype=PRECISION[precision], enabled=lower)
        step = Step(config, model, None, autocast, torch.amp.GradScaler(device.type, enabled=False))
        seconds = []
        for _ in range(1 + _REPEATS):
            start = clock()
            model.zero_grad(set_to_none=True)
            step.forward_backward(batch, 0.0, torch.Generator(device).manual_seed(0))
            _wait(device)
            seconds.append(clock() - start)
    return StepTime(precision, channels_last, compiled, statistics.median(seconds[1:]) / count, cost)


def attack_seconds(config: RunConfig, splits: Splits, model: SplitModel) -> float:
    """Return the seconds per image that one gradient step of an evaluation takes: float32, the model in evaluation mode."""
    device, clock = device_of(config.train.device), clock_of(config.train.clock)
    images = splits.test.subset(torch.arange(min(2 * IMAGES, len(splits.test))))
    x, y = to_float(images.images).to(device), images.labels.to(device)
    with fork_rng(0):
        model = model.to(device)
        seconds = []
        for steps in (1, _ATTACK_STEPS, _ATTACK_STEPS):
            start = clock()
            run_attack(PGD(steps=steps), model, x, y, config.threat, checked=True)
            _wait(device)
            seconds.append((clock() - start) / (steps * len(x)))
    return min(seconds)


def clock_of(kind: str) -> Callable[[], float]:
    """Return the clock that ``train.clock`` names, in seconds: wall, or the CPU time of all threads of this process (cpu)."""
    return time.process_time if kind == "cpu" else time.monotonic


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
