"""Clean accuracy, and accuracy under one attack: what several measurements end in."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from clead.evaluation.correctness import to_float
from clead.evaluation.state import ResumableResults
from clead.interfaces import ImageSet
from clead.progress import Tick
from clead.results.record import Estimate
from clead.results.statistics import estimate

Flags = tuple[Tensor, Tensor]


class AttackedResult(BaseModel):
    """Clean accuracy and accuracy under one attack; flags are per image, in the order of the images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attack: str
    settings: dict[str, Any]
    n: int = Field(ge=1)
    seed: int
    clean: Estimate
    clean_flags: list[bool]
    robust: Estimate
    robust_flags: list[bool]
    seconds: float


def in_batches(
    images: ImageSet,
    verdicts: Callable[[Tensor, Tensor, int], Flags],
    *,
    attack: str,
    settings: dict[str, Any],
    batch_size: int,
    seed: int,
    device: torch.device,
    state: ResumableResults,
    tick: Tick,
) -> AttackedResult:
    """Judge ``images`` batch by batch; what ``state`` has already is not computed again.

    verdicts: (x (B, C, H, W) in [0, 1], y (B,), number of the batch) -> which are right when clean, and after the attack too, (B,).
    """
    clean: list[bool] = []
    robust: list[bool] = []
    for batch, start in enumerate(range(0, len(images), batch_size)):
        key, here = f"{batch:06d}", slice(start, min(start + batch_size, len(images)))
        if key not in state.parts:
            begun = time.monotonic()
            right, held = verdicts(to_float(images.images[here].to(device)), images.labels[here].to(device), batch)
            state.save(key, {"clean": right, "robust": held}, {"seconds": time.monotonic() - begun})
        flags = state.parts[key][0]
        clean += flags["clean"].tolist()
        robust += flags["robust"].tolist()
        tick(here.stop - here.start, robust=sum(robust) / len(robust))
    return AttackedResult(
        attack=attack,
        settings=settings,
        n=len(images),
        seed=seed,
        clean=estimate(clean),
        clean_flags=clean,
        robust=estimate(robust),
        robust_flags=robust,
        seconds=sum(data["seconds"] for _, data in state.parts.values()),
    )
