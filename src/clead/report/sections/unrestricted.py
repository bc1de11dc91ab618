"""Attacks outside the norm ball, and the linear probe: one row each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clead.evaluation.attack_accuracy import AttackedResult
from clead.report.run import RunResult


def beyond(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return a row of each measurement that is one attack with a clean and a robust accuracy."""
    return [
        {"name": run.name, "result": measured.result, "data": measured.data}
        for run in runs
        for kind in sorted(run.measurements)
        if (measured := run.measured(kind)) and isinstance(measured.result, AttackedResult)
    ]
