"""What /metrics tells Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """The counters of one application; each has its own registry, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: Any = {"namespace": "clead", "registry": self.registry}
        self.requests = Counter("requests", "Answered requests.", ["path", "status"], **common)
        self.seconds = Histogram("request_seconds", "Time from head to answer.", ["path"], buckets=_SECONDS, **common)
        self.failures = Counter(
            "model_failures",
            "Requests that a model failed on: error, exit, not_finite, memory.",
            ["model", "kind"],
            **common,
        )
        self.connections = Counter(
            "connections_refused", "Connections that were refused or cut off, by reason.", ["reason"], **common
        )
        self.in_flight = Gauge("requests_in_flight", "Requests to /v1/ that are worked on.", **common)
        self.refused = Counter("refused", "Requests refused by a limit or the API key.", ["status"], **common)
        self.batch = Histogram(
            "batch_images", "Images that went through a model together.", ["model"], buckets=_IMAGES, **common
        )
        self.queue = Gauge("queue_images", "Images that wait for a model.", ["model"], **common)
        self.rejected = Counter("rejected_images", "Images that the detector rejected.", ["model"], **common)
        self.images = Counter("images", "Images that were answered.", ["model"], **common)

    def text(self) -> bytes:
        """Return all of them in Prometheus's text format."""
        return generate_latest(self.registry)
