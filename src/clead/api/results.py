"""Read, compare and draw records."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from clead.atomic_io import JSON_LIMIT, check_inside, read_regular
from clead.errors import UserError
from clead.measurements import MEASUREMENTS
from clead.measurements.base import MeasurementRecord
from clead.report import html
from clead.results.masks import compare_masks, counts_of
from clead.results.record import Record
from clead.results.statistics import balanced, mcnemar, unbalanced
from clead.runs.directory import RunDir
from clead.runs.zoo import located
from clead.weights.files import load_weights

Read = TypeVar("Read", bound=BaseModel)


def read_record(source: str | Path) -> Record:
    """Return the record of a run directory, an evaluation's folder or a JSON file; raises UserError if there is none."""
    path = located(source)
    if path.is_dir():
        folder = _results(path)
        path = folder / "evaluation.json"
        if not path.exists():
            raise UserError(f"{source} has not been evaluated; run: clead evaluate {source}")
    if not path.is_file():
        raise UserError(
            f"no run directory or record at {source}; give the folder that clead train made, or its results/evaluation.json"
        )
    try:
        return _read(Record, path, "a record of clead evaluate")
    except UserError as error:
        try:
            measured = _read(MeasurementRecord, path, "a measurement")
        except UserError:
            raise error from None
        raise UserError(
            f"{path} is the measurement {measured.kind} of {measured.run}, which has no worst case over a suite to compare; "
            "use clead report RUN RUN, which draws measurements beside each other"
        ) from None


def _results(folder: Path) -> Path:
    """Return where a folder has its records: ``results/`` of a run, or itself if ``clead evaluate --model`` made it."""
    if not (folder / "config.yaml").exists() and (folder / "evaluation.json").exists():
        check_inside(folder, "folder of results", only="evaluation")
        return folder
    return RunDir.open(folder).path / "results"


def _read(kind: type[Read], path: Path, what: str) -> Read:
    try:
        return kind.model_validate_json(read_regular(path, JSON_LIMIT))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path} is not {what}: {where or 'file'}: {first['msg']}; repeat clead evaluate, or restore the file"
        ) from None


def compare(sources: Sequence[str | Path | Record]) -> dict[str, Any]:
    """Return ``{"rows": …, "pairs": …, "masks": …}`` of several runs or records, as plain data.

    ``rows``: method, run, n, threat, clean_accuracy, robust_accuracy with its interval, balanced_clean and
    balanced_robust (means of the classes; ``unbalanced``: whether they must be stated), the task and its own figures, each
    attack's accuracy, that on images
    that the training stored, and training cost. ``pairs``: McNemar's exact test for every two records of the same images under the
    same threat and attacks; of masks ``masks`` has the differences instead, with their bootstrap intervals over images.
    """
    records = _records(sources)
    rows = [
        {
            "run": record.run,
            "method": record.training.method if record.training else record.run,
            "n": record.data.n,
            "images": record.data.which,
            "threat": f"{record.threat.norm} {record.threat.eps_text}",
            "suite": record.suite,
            "clean_accuracy": record.clean_accuracy,
            "robust_accuracy": record.robust_accuracy,
            "robust_low": record.worst.low,
            "robust_high": record.worst.high,
            "balanced_clean": mean.clean.accuracy if mean else None,
            "balanced_robust": mean.robust.accuracy if mean else None,
            "unbalanced": unbalanced(record) is not None,
            "attacks": {attack.name: attack.robust.accuracy for attack in record.attacks},
            "task": record.task,
            "metrics": {metric.name: (metric.clean, metric.robust) for metric in record.metrics},
            "transferred": record.transferred.robust.accuracy if record.transferred else None,
            "forward_equivalents": record.training.forward_equivalents if record.training else None,
        }
        for record in records
        for mean in [record.balanced or balanced(record.per_class)]
    ]
    pairs, regions = [], []
    for a, b in combinations(records, 2):
        # Not by how eps was written: 8/255 and 0.03137… are one threat.
        same = [
            (
                r.data.images,
                r.threat.norm,
                r.threat.eps,
                r.suite,
                r.task,
                [(attack.name, attack.settings) for attack in r.attacks],
            )
            for r in (a, b)
        ]
        if same[0] == same[1] and a.masks is not None and b.masks is not None:
            regions += [{"a": a.run, "b": b.run, **each} for each in _compared(a, b)]
        elif same[0] == same[1]:
            result = mcnemar(a.robust_flags, b.robust_flags)
            pairs.append({"a": a.run, "b": b.run, **result._asdict()})
    return {"rows": rows, "pairs": pairs, "masks": regions}


def _compared(a: Record, b: Record) -> list[dict[str, Any]]:
    """Return the differences of two models on the same masks, in the worst case, from the same bootstrap draws of images."""
    k, results = max(len(record.data.classes) for record in (a, b)), []
    for metric, key in (("pixel_accuracy", "lowest_accuracy"), ("mean_iou", "lowest_miou")):
        first, second = (counts_of(getattr(record.masks, key), k) for record in (a, b))
        results.append({"metric": metric, **compare_masks(first, second, metric)._asdict()})
    return results


def write_report(
    sources: Sequence[str | Path],
    path: str | Path,
    *,
    title: str | None = None,
    figures: str | Path | None = None,
) -> Path:
    """Write one self-contained HTML page about runs, evaluations' folders or record files, and return its path.

    A record file alone gives tables and curves; a folder also images, embeddings and the measurements beside the record, and a
    run's its training curves.

    Args:
        sources: at least one.
        path: a new file whose name ends in .html, or a report to be replaced.
        title: the heading; ``Robustness of RUN`` or ``Robustness report`` if None.
        figures: a folder for every plot as PNG and SVG and its numbers as CSV, or None.
    """
    html.check_target(Path(path))
    records = _records(sources)
    results = []
    for source, record in zip(map(located, sources), records, strict=True):
        if not source.is_dir():
            results.append(html.RunResult(record.run, record))
            continue
        folder = _results(source)
        images = folder / "evaluation.safetensors"
        artifacts = {k: v.numpy() for k, v in load_weights(images)[0].items()} if images.exists() else {}
        run = RunDir.open(source) if folder != source else None
        results.append(
            html.RunResult(
                record.run,
                record,
                artifacts,
                run.history() if run else [],
                run.config().to_dict() if run else {},
                _measurements(folder),
            )
        )
    if title is None:
        title = f"Robustness of {records[0].run}" if len(records) == 1 else "Robustness report"
    pairs = compare(records)["pairs"]
    return html.write_report(
        results, Path(path), title=title, pairs=pairs, figures=None if figures is None else Path(figures)
    )


def _measurements(folder: Path) -> dict[str, MeasurementRecord]:
    """Return what the commands of measurements left in a folder."""
    names = MEASUREMENTS.names()
    paths = [path for path in sorted(folder.glob("*.json")) if path.stem.partition("-")[0] in names]
    # An attack within a norm ball leaves a record of clead evaluate, which names its suite.
    paths = [path for path in paths if "-" not in path.stem or b'"suite"' not in read_regular(path, JSON_LIMIT)]
    return {path.stem: _read(MeasurementRecord, path, "a measurement of clead") for path in paths}


def _records(sources: Sequence[str | Path | Record]) -> list[Record]:
    """Return the records; runs of one name are told apart by their paths."""
    records = [source if isinstance(source, Record) else read_record(source) for source in sources]
    names = [record.run for record in records]
    return [
        record
        if names.count(record.run) == 1 or isinstance(source, Record)
        else record.model_copy(update={"run": str(source)})
        for source, record in zip(sources, records, strict=True)
    ]
