"""From run directories or record files to the report: gather what there is and hand it to the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clead.api import compare, read_record
from clead.checkpoint import RunDir, load_weights
from clead.report.html import RunResult, write_report


def report(sources: Sequence[str | Path], path: Path, *, title: str = "Robustness report") -> Path:
    """Write one self-contained HTML page about runs or record files and return its path.

    A record file alone gives tables and curves; a run directory also has training curves, images and embeddings.
    """
    results = []
    for source in map(Path, sources):
        record = read_record(source)
        if source.is_dir():
            run = RunDir.open(source)
            images = source / "results" / "evaluation.safetensors"
            artifacts = {k: v.numpy() for k, v in load_weights(images)[0].items()} if images.exists() else {}
            results.append(RunResult(record.run, record, artifacts, run.history(), run.config().to_dict()))
        else:
            results.append(RunResult(record.run, record, {}, [], {}))
    return write_report(results, path, title=title, pairs=compare([result.record for result in results])["pairs"])
