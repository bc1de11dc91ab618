"""What a user calls from Python: train, load, evaluate, compare. The command line is a thin layer over these."""

from __future__ import annotations

from typing import Any

from clead.api.data import inspect_data
from clead.api.evaluation import ShardDone, evaluate, evaluate_foreign, evaluate_run, verify
from clead.api.exporting import export_run
from clead.api.measurements import OLD_NAMES, measure, old_function
from clead.api.opened import load
from clead.api.results import compare, read_record, write_report
from clead.api.training import TrainedRun, profile, train

__all__ = [
    "ShardDone",
    "TrainedRun",
    "compare",
    "evaluate",
    "evaluate_foreign",
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


def __getattr__(name: str) -> Any:
    if name in OLD_NAMES:
        return old_function(name)
    raise AttributeError(f"module 'clead.api' has no attribute {name!r}")
