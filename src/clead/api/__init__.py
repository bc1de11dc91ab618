"""What a user calls from Python: train, load, evaluate, compare. The command line is a thin layer over these."""

from __future__ import annotations

from typing import Any

from clead.api.data import inspect_data
from clead.api.evaluation import evaluate, evaluate_external, evaluate_run
from clead.api.exporting import export_run
from clead.api.measurements import OLD_NAMES, measure, old_function
from clead.api.results import compare, read_record, write_report
from clead.api.training import TrainedRun, profile, train
from clead.api.verification import verify
from clead.evaluation.saving import ShardDone
from clead.renamed import old_names
from clead.runs.loading import load

__all__ = [
    "ShardDone",
    "TrainedRun",
    "compare",
    "evaluate",
    "evaluate_external",
    "evaluate_run",
    "export_run",
    "inspect_data",
    "load",
    "measure",
    "profile",
    "read_record",
    "train",
    "verify",
    "write_report",
]


_old_name = old_names(__name__, {"evaluate_foreign": "evaluate_external"})


def __getattr__(name: str) -> Any:
    return old_function(name) if name in OLD_NAMES else _old_name(name)
