"""Clean accuracy, and accuracy under one attack: what several measurements end in."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field
from torch import Tensor

from clead.interfaces import ImageSet
from clead.measurements.base import Computation, Measured, MeasurementRecord, Result, cells, new_table, span
from clead.progress import Tick
from clead.results.format import count, settings_text
from clead.results.record import Estimate, Flags, Metric
from clead.results.section import Section, Table
from clead.results.statistics import estimate

if TYPE_CHECKING:
    from rich.table import Table as TerminalTable

FlagPair = tuple[Tensor, Tensor]


class AttackedResult(Result):
    """Clean accuracy and accuracy under one attack; flags are per image, in the order of the images.

    Of masks accuracies are shares of pixels, there are no flags, and ``metrics`` has the mIoU.
    """

    attack: str
    settings: dict[str, Any]
    n: int = Field(ge=1)
    seed: int
    clean: Estimate
    clean_flags: Flags
    robust: Estimate
    robust_flags: Flags
    metrics: list[Metric] = Field(default_factory=list)
    seconds: float

    def table(self, record: MeasurementRecord) -> TerminalTable:
        """Return clean accuracy and that under the attack."""
        table = new_table(record, self.attack, "attack", "accuracy", "95 % interval", "seconds")
        table.add_row("none (clean)", *cells(self.clean), "")
        table.add_row(self.attack, *cells(self.robust), f"{self.seconds:.1f}", style="bold")
        for metric in self.metrics:
            table.add_row(f"{metric.name}, clean → attacked", f"{metric.clean:.2%} → {metric.robust:.2%}", "", "")
        return table

    def sentence(self, record: MeasurementRecord) -> str:
        """Return how many images withstand the attack."""
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        whose = "" if self.clean_flags else "of the pixels "
        more = "".join(f" {each.name}: {each.robust:.1%}, {each.clean:.1%} when clean." for each in self.metrics)
        return (
            f"{record.about}: {self.robust.accuracy:.1%} (95 % interval {span(self.robust)}) {whose}withstand the "
            f"{self.attack} attack ({settings}); {self.clean.accuracy:.1%} are right when clean.{more}"
        )

    @classmethod
    def section(cls, measured: Sequence[Measured]) -> Section:
        """Return one row of each attack on each run."""
        rows = []
        for one in measured:
            result = cast(AttackedResult, one.record.result)
            images = f"{count(result.n)}\N{NO-BREAK SPACE}({one.record.data.split})"
            described = settings_text(result.settings)
            rows.append([one.name, result.attack, described, images, result.clean, result.robust])
        table = Table(
            ["Run", "Attack", "Settings", "images", "clean", "under attack"],
            rows,
            caption="One attack each, on all images, with 95\N{NO-BREAK SPACE}% intervals",
            label="Other attacks, table",
            text=["Attack", "Settings"],
            strong=["under attack"],
        )
        intro = (
            "Attacks that the threat above does not cover, and a linear classifier on the frozen features that is attacked "
            "through both. They are no part of the worst case."
        )
        return Section("beyond", "Other attacks", 40, intro, [table])


def attack_accuracy(
    images: ImageSet,
    verdicts: Callable[[Tensor, Tensor, int], FlagPair],
    how: Computation,
    *,
    attack: str,
    settings: dict[str, Any],
    tick: Tick,
) -> AttackedResult:
    """Judge ``images`` batch by batch; what ``how.state`` has already is not computed again.

    verdicts: (images (B, C, H, W) as they are stored, labels (B,), number of the batch) -> which are right when clean, and after
    the attack too, (B,).
    """
    clean: list[bool] = []
    robust: list[bool] = []
    state = how.state
    for batch, start in enumerate(range(0, len(images), how.batch_size)):
        key, rows = f"{batch:06d}", slice(start, min(start + how.batch_size, len(images)))
        if key not in state.parts:
            begun = time.monotonic()
            right, robust_too = verdicts(images.images[rows], images.labels[rows], batch)
            state.save(key, {"clean": right, "robust": robust_too}, {"seconds": time.monotonic() - begun})
        flags = state.parts[key][0]
        clean += flags["clean"].tolist()
        robust += flags["robust"].tolist()
        tick(rows.stop - rows.start, robust=sum(robust) / len(robust))
    return AttackedResult(
        attack=attack,
        settings=settings,
        n=len(images),
        seed=how.seed,
        clean=estimate(clean),
        clean_flags=clean,
        robust=estimate(robust),
        robust_flags=robust,
        seconds=how.seconds,
    )
