"""MNIST by name."""

from __future__ import annotations

from pathlib import Path

from clead.data.base import InMemoryDataset, RawSplits
from clead.data.datasets import DATASETS
from clead.data.datasets.auto import read_named
from clead.errors import UserError
from clead.settings import setting, settings


@DATASETS.register("mnist")
@settings
class Mnist(InMemoryDataset):
    """MNIST, 28×28 grey, 10 classes, from a path or $CLEAD_DATA/mnist."""

    path: Path | None = setting(None, "Where it is, in any layout that auto knows; by default $CLEAD_DATA/mnist.")

    def read(self) -> RawSplits:
        """Return the images; raises UserError if they are nowhere."""
        raw = read_named("mnist", self.path, 10)
        if raw is None:
            raise UserError(
                "mnist is not downloaded by this program and $CLEAD_DATA/mnist does not exist; give "
                "--data.path, for instance a copy of huggingface.co/datasets/ylecun/mnist, or set CLEAD_DATA"
            )
        return raw
