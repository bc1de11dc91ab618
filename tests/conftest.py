"""One thread per test process: on two cores it is faster than sharing them, and sums do not depend on the machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_foreign_state(tmp_path_factory, monkeypatch):
    """Keep caches and data paths of the developer's machine out of the tests."""
    monkeypatch.setenv("CLEAD_CACHE", str(tmp_path_factory.getbasetemp() / "clead-cache"))
    monkeypatch.delenv("CLEAD_DATA", raising=False)
