"""The detectors' place in version 0.1; they are in ``clead.measurements.detection`` now."""

from __future__ import annotations

from clead.renamed import old_names

_NAMES = ("Mahalanobis", "NearestNeighbours", "Disagreement")
__getattr__ = old_names(__name__, dict.fromkeys(_NAMES, "clead.measurements.detection:"))
