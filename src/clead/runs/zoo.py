"""Trained models that come with the package: ``zoo:NAME`` wherever a run directory is read."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from clead.errors import UserError, did_you_mean

PREFIX = "zoo:"


def zoo_names() -> list[str]:
    """Return the names of the models."""
    return sorted(path.name for path in _zoo().iterdir() if (path / "config.yaml").is_file())


def located(source: str | Path) -> Path:
    """Return where a run lies, of ``zoo:NAME`` inside the package; raises UserError for a name that the zoo has not.

    >>> located("runs/mine").as_posix(), located("zoo:digits").name
    ('runs/mine', 'digits')
    """
    name = str(source)
    if not name.startswith(PREFIX):
        return Path(source)
    name = name.removeprefix(PREFIX)
    if name not in zoo_names():
        raise UserError(f"no model {name!r} in the zoo; {did_you_mean(name, zoo_names())}")
    return _zoo() / name


def results_of_zoo(source: str | Path) -> Path | None:
    """Return where results of a model of the zoo go, which is read-only: ``runs/zoo-NAME``; None for any other run.

    >>> results_of_zoo("zoo:digits").as_posix(), results_of_zoo("runs/mine")
    ('runs/zoo-digits', None)
    """
    path = located(source)
    return Path("runs") / f"zoo-{path.name}" if path.parent == _zoo() else None


def _zoo() -> Path:
    return Path(str(resources.files("clead"))) / "zoo"
