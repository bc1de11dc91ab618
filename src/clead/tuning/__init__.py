"""The search for a better recipe: a study of trials on validation images, shared by any number of processes."""

from __future__ import annotations

from clead.tuning.study import TunedStudy, tune

__all__ = ["TunedStudy", "tune"]
