"""Seeded sections that leave the global random state as they found it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Generator[None, None, None]:
    """Seed torch's global generators inside the block and restore them after it.

    Initialisers of ``torch.nn`` draw from the global generator only; this makes them a function of ``seed``.
    CUDA is neither initialised nor seeded if it was not in use.

    >>> with seeded(3):
    ...     first = torch.rand(2)
    >>> with seeded(3):
    ...     print(bool((torch.rand(2) == first).all()))
    True
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would also queue a seed for a CUDA generator that is not in use yet.
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield
