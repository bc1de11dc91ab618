"""What a user calls from Python: train, load, evaluate, compare. The command line is a thin layer over these."""

from __future__ import annotations

from clead.api.data import inspect_data
from clead.api.evaluation import ShardDone, evaluate, evaluate_foreign, evaluate_run, verify
from clead.api.exporting import export_run
from clead.api.measurements import (
    DETECT_IMAGES,
    certify_run,
    corruptions_run,
    detect_run,
    distances_run,
    probe_run,
    unrestricted_run,
)
from clead.api.opened import load
from clead.api.results import compare, read_record, write_report
from clead.api.training import TrainedRun, profile, train

__all__ = [
    "DETECT_IMAGES",
    "ShardDone",
    "TrainedRun",
    "certify_run",
    "compare",
    "corruptions_run",
    "detect_run",
    "distances_run",
    "evaluate",
    "evaluate_foreign",
    "evaluate_run",
    "export_run",
    "inspect_data",
    "load",
    "probe_run",
    "profile",
    "read_record",
    "train",
    "unrestricted_run",
    "verify",
    "write_report",
]
