"""The run directory, and everything that is written to it: atomically, with checksums, never as something that runs code.

config.yaml         complete configuration
metrics.jsonl       one JSON object per log line
last.safetensors    weights at the end (EMA weights if EMA is on); ``best`` at the best validation robust accuracy
projection.safetensors  the projection head at the end, of a training that had one
resume.state        optimiser, schedule, EMA, RNG and position; ``resume.previous.state`` is one checkpoint older
environment.json    versions and machine
notes.txt           what a reader of its figures must know: auxiliary images (data.extra); how a model from elsewhere was made
results/            one JSON record per evaluation, with its images beside it
stages/             a run directory for each stage of a run that has several; weights and metrics are joined in the run's own
stored/             adversarial images that were made once, of the model that training started from
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clead.atomic_io import (
    append_line,
    check_inside,
    read_json_lines,
    read_regular,
    remove_leftovers,
    truncate,
    write_atomically,
)
from clead.config import RunConfig, parse_yaml, yaml_text
from clead.errors import UserError, printable
from clead.renamed import updated
from clead.results.provenance import command, environment
from clead.runs.zoo import located

_LARGEST_NOTES = 1_000_000
PROJECTION = "projection.safetensors"
NOTES = "notes.txt"
"""A sentence per line; every record has them among its notes."""
WRITTEN = ("resume.next.state", "best.safetensors", "last.safetensors", PROJECTION, "outcome.json", "metrics.jsonl")
WRITTEN += ("config.yaml", "environment.json", "pseudo_labels.safetensors", NOTES)
"""Files that are written whole: a kill may leave their staging files."""


@dataclass(frozen=True)
class RunDir:
    """A run directory. ``create`` makes a new one, ``open`` reads one."""

    path: Path

    @staticmethod
    def default_path(name: str) -> Path:
        """Return ``runs/NAME-TIME``, which does not exist yet."""
        stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        path, count = Path("runs") / stem, 1
        while path.exists():
            path, count = Path("runs") / f"{stem}-{count}", count + 1
        return path

    @staticmethod
    def create(path: Path, config: RunConfig) -> RunDir:
        """Start a run; raises UserError if ``path`` holds anything already."""
        RunDir.check_free(path)
        run = RunDir(path)
        if path.is_dir():
            remove_leftovers(path, WRITTEN)
        write_atomically(path / "config.yaml", config.to_yaml().encode())
        run.note_environment()
        return run

    @staticmethod
    def check_free(path: Path) -> None:
        """Raise UserError if ``path`` holds anything, but for what a kill in the middle of ``create`` may have left."""
        ours = tuple(f".{name}." for name in WRITTEN)
        if path.is_file() or (path.is_dir() and any(not each.name.startswith(ours) for each in path.iterdir())):
            what = "holds another run" if (path / "config.yaml").exists() else "is not empty"
            raise UserError(f"--out {path} {what}; give an empty directory, or --resume to continue the run")

    def note_environment(self) -> None:
        """Write environment.json unless it is there already."""
        file = self.path / "environment.json"
        if not file.exists():
            started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            details = {**environment(), "command": command(), "started": started}
            write_atomically(file, json.dumps(details, indent=2).encode())

    @staticmethod
    def open(path: Path) -> RunDir:
        """Return an existing run, or ``zoo:NAME``; raises UserError if ``path`` is none."""
        path = located(path)
        if not (path / "config.yaml").is_file():
            inside = sorted(each.parent.name for each in path.glob("*/config.yaml")) if path.is_dir() else []
            made = (
                f"one of the runs in it, such as {path / inside[0]}" if inside else "a directory that clead train made"
            )
            raise UserError(f"{path} is not a run directory (no config.yaml in it); give {made}")
        check_inside(path)
        return RunDir(path)

    def weights(self, which: str) -> Path:
        """Return where the weights are that are called ``which``, best or last; an exported folder has only one."""
        path, only = self.path / f"{which}.safetensors", self.path / "model.safetensors"
        return only if only.exists() and not path.exists() else path

    @property
    def name(self) -> str:
        """The directory's name."""
        return printable(self.path.resolve().name)

    def config(self) -> RunConfig:
        """Return the run's complete configuration."""
        path = self.path / "config.yaml"
        try:
            return RunConfig.from_dict(updated(parse_yaml(yaml_text(path), str(path))))
        except UnicodeDecodeError:
            raise UserError(f"{path} is damaged: it is not text; copy the run again") from None

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        append_line(self.path / "metrics.jsonl", json.dumps(line))

    def notes(self) -> list[str]:
        """Return the lines of notes.txt, none if there is no such file."""
        path = self.path / NOTES
        return (
            [printable(line) for line in read_regular(path, _LARGEST_NOTES).decode().splitlines()]
            if path.exists()
            else []
        )

    def history(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; a last line that a kill or a full disk cut off is left out."""
        return read_json_lines(self.path / "metrics.jsonl")

    def truncate_log(self, size: int) -> None:
        """Cut metrics.jsonl back to ``size`` bytes, so that a resumed run does not log a step twice."""
        # Never longer: a power cut may have lost lines that the state counts, and truncating upwards writes zeros.
        truncate(self.path / "metrics.jsonl", size)

    def log_size(self) -> int:
        """Return the size of metrics.jsonl in bytes."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0
