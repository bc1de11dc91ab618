"""Weights from elsewhere: read without running code, and matched by name with a model."""

from __future__ import annotations

from clead.weights.matching import load_into
from clead.weights.reading import Weights, read_weights

__all__ = ["Weights", "load_into", "read_weights"]
