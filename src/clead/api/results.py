"""Read, compare and draw records."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from clead.checkpoint import RunDir, load_weights
from clead.errors import UserError
from clead.evaluation.statistics import mcnemar
from clead.report import html
from clead.report.record import Record


def read_record(source: str | Path) -> Record:
    """Return the record of a run directory or of a JSON file; raises UserError if there is none or it is not one."""
    path = Path(source)
    if path.is_dir():
        RunDir.open(path)
        path = path / "results" / "evaluation.json"
        if not path.exists():
            raise UserError(f"{source} has not been evaluated; run: clead evaluate {source}")
    if not path.is_file():
        raise UserError(f"no run directory or record at {source}")
    try:
        return Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is not a record of clead evaluate: {where or 'file'}: {first['msg']}") from None


def compare(sources: Sequence[str | Path | Record]) -> dict[str, Any]:
    """Return ``{"rows": …, "pairs": …}`` of several runs or records, as plain data.

    ``rows``: method, run, n, threat, clean_accuracy, robust_accuracy with its interval, each attack's accuracy, that on images
    that the training stored, and training cost. ``pairs``: McNemar's exact test for every two records of the same images under the
    same threat and attacks.
    """
    records = _records(sources)
    rows = [
        {
            "run": record.run,
            "method": record.training.method if record.training else record.run,
            "n": record.data.n,
            "threat": f"{record.threat.norm} {record.threat.eps_text}",
            "suite": record.suite,
            "clean_accuracy": record.clean_accuracy,
            "robust_accuracy": record.robust_accuracy,
            "robust_low": record.worst.low,
            "robust_high": record.worst.high,
            "attacks": {part.name: part.robust.accuracy for part in record.attacks},
            "transferred": record.transferred.robust.accuracy if record.transferred else None,
            "forward_equivalents": record.training.forward_equivalents if record.training else None,
        }
        for record in records
    ]
    pairs = []
    for a, b in combinations(records, 2):
        # Not by how eps was written: 8/255 and 0.03137… are one threat.
        same = [
            (r.data.images, r.threat.norm, r.threat.eps, r.suite, [(part.name, part.settings) for part in r.attacks])
            for r in (a, b)
        ]
        if same[0] == same[1]:
            result = mcnemar(a.robust_flags, b.robust_flags)
            pairs.append({"a": a.run, "b": b.run, **result._asdict()})
    return {"rows": rows, "pairs": pairs}


def write_report(sources: Sequence[str | Path], path: str | Path, *, title: str = "Robustness report") -> Path:
    """Write one self-contained HTML page about runs or record files and return its path.

    A record file alone gives tables and curves; a run directory also has training curves, images and embeddings.
    """
    records = _records(sources)
    results = []
    for source, record in zip(map(Path, sources), records, strict=True):
        if source.is_dir():
            run = RunDir.open(source)
            images = source / "results" / "evaluation.safetensors"
            artifacts = {k: v.numpy() for k, v in load_weights(images)[0].items()} if images.exists() else {}
            results.append(html.RunResult(record.run, record, artifacts, run.history(), run.config().to_dict()))
        else:
            results.append(html.RunResult(record.run, record))
    return html.write_report(results, Path(path), title=title, pairs=compare(records)["pairs"])


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
