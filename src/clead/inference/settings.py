"""How a server answers and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import SecretStr, model_validator

from clead.settings import setting, settings


def spare_cores() -> int:
    """Return how many of the cores that this process may use are left when one is kept for the network, at least 1."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable - 1)


@settings
class ServeSettings:
    """Engine, detector, and limits of a server."""

    engine: Literal["torch", "onnx"] = setting(
        "torch", "What computes: torch, or onnx: the run exported in memory, on a CPU much faster."
    )
    threads: int = setting(
        default_factory=spare_cores, doc="Threads of the engine; by default all cores but one.", ge=1
    )
    max_batch: int = setting(
        32, "Images that go through a model together; those that wait while it works are put together.", ge=1, le=4096
    )
    detector: Literal["mahalanobis", "nearest_neighbours", "disagreement"] | None = setting(
        "mahalanobis",
        "Detector of attacks, fitted on training images: mahalanobis, nearest_neighbours, disagreement; none: no suspicion scores, "
        "no neighbours, and the data is not read.",
    )
    reject: float = setting(
        0.05, "Part of clean images that the detector may reject, which sets its threshold.", gt=0, lt=1
    )
    reference: int = setting(
        10_000,
        "Training images, evenly by class, on which the detector is fitted and among which neighbours are sought.",
        ge=20,
    )
    gallery: Path | None = setting(
        None,
        "Images of any layout and any classes, among which /v1/search seeks the nearest to a query; none: there is no such path.",
    )
    thumbnails: bool = setting(
        True, "Whether /v1/explain and /v1/search show the images that they name; not if these are private."
    )
    api_key: SecretStr | None = setting(
        None,
        "What clients must send as X-API-Key or as a Bearer token, at least 16 characters; null: nothing.",
        min_length=16,
    )
    # At most 2,000: more at once are what decode() remembers on the disk.
    max_images: int = setting(64, "Images in one request.", ge=1, le=2000)
    max_body: int = setting(16 * 2**20, "Size of one request, in bytes.", ge=1024)
    max_pixels: int = setting(
        25_000_000,
        "Pixels of all image files of one request, read from their headers before anything is decoded.",
        ge=1,
    )
    max_requests: int = setting(
        64, "Requests worked on at once, counted from when they have arrived; others are told to come back (503).", ge=1
    )
    max_buffered: int = setting(
        256 * 2**20,
        "Size of all requests together that are in memory, in bytes, at least one of max_body; others are told to come back (503).",
        ge=1024,
    )
    max_head: int = setting(32 * 2**10, "Size of a request's head, in bytes.", ge=1024, le=2**20)
    max_connections: int = setting(1000, "Connections that are open at once.", ge=2)
    max_per_client: int = setting(
        200, "Connections that are open at once from one address; a proxy in front is one address.", ge=1
    )
    read_seconds: float = setting(20.0, "Seconds in which a request must have arrived.", gt=0)
    min_rate: int = setting(
        1024, "Bytes per second at which a body must arrive, on average and after the first two seconds.", ge=1
    )
    request_seconds: float = setting(
        30.0, "Seconds in which an arrived request must be answered; it is given up after that (503).", gt=0
    )
    drain_seconds: int = setting(30, "Seconds that requests in work are given when the server is told to stop.", ge=1)
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "Names in Host and Origin that are answered to, such as a proxy's, beside localhost and the address that is listened on, "
        "with commas; * allows all.",
    )

    @model_validator(mode="after")
    def _check(self) -> ServeSettings:
        from clead.inference.hosts import (
            allowed_name,  # it takes the server's packages, which clead serve --help does not
        )

        for name in self.allowed_hosts:
            allowed_name(name)
        return self
