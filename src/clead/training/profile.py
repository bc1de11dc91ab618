"""Where the time of a training step goes: a few real steps under PyTorch's profiler."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from clead.config import RunConfig
from clead.devices import device_of
from clead.interfaces import Splits
from clead.models.split import SplitModel
from clead.runs.directory import RunDir
from clead.training.trainer import PARTS, PRECISION, Callbacks, fit

_WARM_UP = 3
_OPERATORS = 12


def profile_training(config: RunConfig, splits: Splits, model: SplitModel, *, steps: int = 10) -> dict[str, Any]:
    """Train a few steps in a temporary directory and say where the time went.

    Args:
        config: of the run; its length is not used.
        splits: the images.
        model: trained in place for these steps.
        steps: measured, ≥ 1, after three that warm up.

    Returns:
        ``images_per_second``; ``step_ms``; ``parts``: name -> milliseconds per step (data, views, loss, backward, optimiser, rest);
        ``forward_equivalents`` per image; ``bound_ms``: that number of forwards, each as long as a measured one in training mode
        and the run's precision, so what is left is neither forward nor backward; ``operators``: (name, milliseconds per step of
        its own, calls per step), the longest first; ``device`` and ``threads``.
    """
    device = device_of(config.train.device)
    images = min(config.data.batch_size, len(splits.train))
    total = steps + _WARM_UP
    length = {"epochs": total / max(1, len(splits.train) // images), "budget": None, "minutes": None, "clock": "wall"}
    short = dataclasses.replace(config.train, **length, validate_every=1e6, validate_images=1, validate_steps=1)
    config = dataclasses.replace(config, train=short)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    plan = schedule(wait=0, warmup=_WARM_UP, active=steps, repeat=1)
    times: list[float] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        profile(activities=activities, schedule=plan) as profiler,
    ):

        def after_step() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter())
            if len(times) <= total:
                profiler.step()

        outcome = fit(
            config,
            splits,
            model,
            RunDir.create(Path(folder) / "run", config),
            show=False,
            callbacks=Callbacks(after_step),
        )
    step = statistics.median(b - a for a, b in zip(times[_WARM_UP - 1 :], times[_WARM_UP:], strict=False))
    averages = profiler.key_averages()
    on_device = device.type == "cuda"
    spent = {
        row.key: (row.device_time_total if on_device else row.cpu_time_total) / 1000 / steps
        for row in averages
        if row.key in PARTS
    }
    parts = {name: spent.get(name, 0.0) for name in PARTS}
    leaf_modules = [
        (row.key, (row.self_device_time_total if on_device else row.self_cpu_time_total), row.count) for row in averages
    ]
    operators = sorted(
        (row for row in leaf_modules if row[0].startswith(("aten::", "mkldnn", "cudnn"))), key=lambda row: -row[1]
    )
    equivalents = outcome.forward_equivalents * len(splits.train) / outcome.steps / images
    return {
        "images_per_second": images / step,
        "step_ms": 1000 * step,
        "parts": {**parts, "rest": max(0.0, 1000 * step - sum(parts.values()))},
        "forward_equivalents": equivalents,
        "bound_ms": equivalents * _forward_ms(config, splits, model, images, steps),
        "operators": [(name, spent / 1000 / steps, count / steps) for name, spent, count in operators[:_OPERATORS]],
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def _forward_ms(config: RunConfig, splits: Splits, model: SplitModel, images: int, repeats: int) -> float:
    """Return the median milliseconds of a forward of one batch in training mode and in the run's precision."""
    device = device_of(config.train.device)
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    x = splits.train.images[:images].to(device).float().div(255).contiguous(memory_format=layout)
    dtype = PRECISION[config.train.precision]
    times = []
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        for _ in range(repeats + 1):
            start = time.perf_counter()
            model.train()(x)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])
