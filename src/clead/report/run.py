"""What a report is given of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from clead.errors import UserError
from clead.measurements.base import MeasurementRecord
from clead.results.record import Record
from clead.settings import Ratio


@dataclass(frozen=True)
class RunResult:
    """What a report shows of one run; everything but the record is optional, and what is missing drops its section.

    Args:
        name: how the report calls the run; unique within one report.
        record: the evaluation.
        artifacts: for the gallery ``x``, ``x_adv`` (n, C, H, W) float in [0, 1], ``labels`` (n,), ``probabilities``,
            ``probabilities_adv`` (n, K); for the map ``embedding_clean``, ``embedding_adv`` (m, D),
            ``embedding_labels`` (m,).
        history: the lines of ``metrics.jsonl``.
        config: the configuration as nested groups (data, model, threat …).
        measurements: the other measurements by the names of their files without ``.json``, such as ``certify``.
    """

    name: str
    record: Record
    artifacts: dict[str, np.ndarray] = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    config: dict = field(default_factory=dict)
    measurements: Mapping[str, MeasurementRecord] = field(default_factory=dict)

    def measured(self, kind: str) -> MeasurementRecord | None:
        """Return a measurement of the weights that were evaluated; None if there is none, or it is of other weights."""
        measured = self.measurements.get(kind)
        return measured if measured and measured.model.fingerprint == self.record.model.fingerprint else None

    @property
    def stale(self) -> list[str]:
        """Names of measurements that are of other weights than the evaluation."""
        return [kind for kind in self.measurements if self.measured(kind) is None]

    def arrays(self, *keys: str) -> list[np.ndarray] | None:
        """Return the artifacts called ``keys``; None if one is missing or empty; UserError if their lengths differ."""
        if any(key not in self.artifacts for key in keys):
            return None
        arrays = [np.asarray(self.artifacts[key]) for key in keys]
        lengths = {key: len(array) for key, array in zip(keys, arrays, strict=True)}
        if len(set(lengths.values())) > 1:
            raise UserError(
                f"artifacts of run {self.name!r} must have one row per image, got {lengths}; write them again"
            )
        return arrays if len(arrays[0]) else None

    def class_name(self, index: int) -> str:
        """Return the name of class ``index``, or its number if it has none."""
        classes = self.record.data.classes
        return classes[index] if 0 <= index < len(classes) else str(index)

    def trained_radius(self) -> tuple[float, str, str] | None:
        """Return radius, how it was written, and norm of the threat in the run's configuration."""
        threat = self.config.get("threat")
        if not isinstance(threat, Mapping):
            return None
        try:
            eps = Ratio(threat.get("eps"))
        except ValueError:
            return None
        norm = str(threat.get("norm") or threat.get("name") or self.record.threat.norm).lower()
        return float(eps), self.record.threat.eps_text if abs(eps - self.record.threat.eps) < 1e-9 else eps.text, norm
