"""Accuracy when every image is darker or brighter: pixels times a factor, clipped to [0, 1]."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from clead.evaluation.correctness import correct_mask, to_float
from clead.measurements import MEASUREMENTS
from clead.measurements.base import Measurement, MeasurementRecord, Result, cells, new_table
from clead.results.record import Estimate
from clead.results.statistics import estimate
from clead.settings import setting, settings

if TYPE_CHECKING:
    from rich.table import Table


class BrightnessResult(Result):
    """Accuracy on images that were multiplied by ``factor``."""

    factor: float
    accuracy: Estimate

    def table(self, record: MeasurementRecord) -> Table:
        """Return the table for the terminal."""
        table = new_table(record, "brightness", "pixels times", "accuracy", "95 % interval")
        table.add_row(f"{self.factor:g}", *cells(self.accuracy))
        return table

    def sentence(self, record: MeasurementRecord) -> str:
        """Return the sentence that can be quoted."""
        return f"{record.about}: {self.accuracy.accuracy:.1%} are right when pixels are multiplied by {self.factor:g}."


@MEASUREMENTS.register("brightness")
@settings
class Brightness(Measurement):
    """Measure accuracy on darker or brighter images: ``clead brightness RUN ... [--factor 0.5]``."""

    result = BrightnessResult
    factor: float = setting(0.5, "What pixels are multiplied by.", ge=0)

    def run(self, target, state):
        """Classify batch by batch; a batch that was finished before a kill is not classified again."""
        flags = []
        with state.opened():
            for number, index in enumerate(torch.arange(len(target.images)).split(256)):
                key, images = f"batch-{number}", target.images.subset(index)
                if key not in state.parts:
                    begun = time.monotonic()
                    x = (self.factor * to_float(images.images.to(target.device))).clamp(0, 1)
                    right = correct_mask(target.model, x, images.labels.to(target.device))
                    state.save(key, {"flags": right.cpu()}, {"seconds": time.monotonic() - begun})
                flags += state.parts[key][0]["flags"].tolist()
        return BrightnessResult(factor=self.factor, accuracy=estimate(flags))
