"""The sections of the other measurements: each is asked of the results that it is about."""

from __future__ import annotations

from collections.abc import Sequence

from clead.measurements.base import Measured, Result
from clead.report.run import RunResult
from clead.results.section import Section


def measurements(runs: Sequence[RunResult]) -> list[Section]:
    """Return the section of each kind of result that a run has, in the order of their places."""
    kinds: dict[type[Result], list[Measured]] = {}
    for index, run in enumerate(runs):
        for kind in sorted(run.measurements):
            if record := run.measured(kind):
                kinds.setdefault(type(record.result), []).append(Measured(index, run.name, record))
    sections = [section for kind, measured in kinds.items() if (section := kind.section(measured))]
    return sorted(sections, key=lambda section: section.place)
