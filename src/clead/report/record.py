"""The records' place in version 0.1; they are in ``clead.results.record`` now."""

from __future__ import annotations

from clead.renamed import old_names

__getattr__ = old_names(__name__, dict.fromkeys(["Record", "Estimate"], "clead.results.record:"))
