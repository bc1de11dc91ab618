"""What a user calls from Python: train, load, evaluate, compare. The command line is a thin layer over these."""

from __future__ import annotations

from clead.api.data import inspect_data
from clead.api.evaluation import ShardDone, evaluate, evaluate_foreign, evaluate_run, verify
from clead.api.exporting import export_run
from clead.api.measurements import measure
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
