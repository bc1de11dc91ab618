"""The datasets, one file each; ``DATASETS`` finds them by name."""

from __future__ import annotations

from typing import Any

from clead.registry import Registry

DATASETS: Registry[Any] = Registry("dataset", "clead.data.datasets")
