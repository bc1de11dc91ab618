"""Several processes train one model: each takes its part of every batch, and the step is that of one process.

How: a step's images are shared out, and each process attacks its own. What the model says of them (features, logits) is gathered,
so that every process computes the loss of the whole batch, contrast with all its images included, whatever the method. Gradients
are averaged. It is not ``DistributedDataParallel``, whose hooks expect one forward and one backward per step: here a step has
attacks, weight perturbations and gradients of gradients in between.
"""

from __future__ import annotations

from clead.distributed.batch_norm import synchronised
from clead.distributed.collectives import TRAFFIC
from clead.distributed.launch import LostWorker, connect, exit_process, init_world, local_device, raise_on_lost_worker
from clead.distributed.world import SINGLE_PROCESS, SlicedThreat, World, average_gradients

__all__ = [
    "LostWorker",
    "SlicedThreat",
    "SINGLE_PROCESS",
    "TRAFFIC",
    "World",
    "average_gradients",
    "connect",
    "exit_process",
    "init_world",
    "local_device",
    "raise_on_lost_worker",
    "synchronised",
]
