"""Seeded sections that leave the global random state as they found it."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def fork_rng(seed: int) -> Generator[None, None, None]:
    """Seed the global generators of torch, NumPy and Python inside the block and restore them after it.

    Initialisers of ``torch.nn`` draw from torch's only; a randomised model or another library may draw from any.
    CUDA is neither initialised nor seeded if it was not in use.

    >>> with fork_rng(3):
    ...     first = torch.rand(2)
    >>> with fork_rng(3):
    ...     print(bool((torch.rand(2) == first).all()))
    True
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would also queue a seed for a CUDA generator that is not in use yet.
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
