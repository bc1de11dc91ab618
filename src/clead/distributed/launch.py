"""How the processes that ``torchrun`` started find each other, and how they end."""

from __future__ import annotations

import atexit
import os
import re
import socket
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from clead.distributed.world import SINGLE_PROCESS, World
from clead.errors import UserError

_MEETING = timedelta(minutes=5)


_PATIENCE = timedelta(hours=12)  # process 0 validates, or stores images, while the others wait


_STORE_PORT = "clead/port of process 0's store"


class LostWorker(RuntimeError):
    """Another process of the training ended or could not be reached; what was saved is whole."""


@contextmanager
def raise_on_lost_worker(where: str) -> Generator[None, None, None]:
    """Turn what gloo or NCCL say when a process is gone into LostWorker, which names ``where`` to go on."""
    try:
        yield
    except RuntimeError as error:  # gloo's are of no kind of their own
        message = str(error)
        if not isinstance(error, dist.DistError) and not re.search(r"gloo|NCCL|Connection (closed|reset)", message):
            raise
        reason = (
            re.sub(r"\[.*?\]\s*", "", message.splitlines()[0]).partition(". ")[0][:120]
            if message
            else type(error).__name__
        )
        raise LostWorker(
            f"another process of this training is gone ({reason}); the same command with --resume goes on from {where}"
        ) from error


def init_world(device: torch.device) -> World:
    """Return the processes that ``torchrun`` started, connected; ``SINGLE_PROCESS`` for a single one.

    Raises UserError if there is no master, or the others do not come within five minutes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2 or not dist.is_available():
        return SINGLE_PROCESS
    if not dist.is_initialized():
        try:
            connect("nccl" if device.type == "cuda" else "gloo", _MEETING)
            dist.barrier()
        except (RuntimeError, ValueError) as error:
            reason = re.sub(r"\s+", " ", str(error).splitlines()[0])[:160]
            where = f"{os.environ.get('MASTER_ADDR', 'MASTER_ADDR')}:{os.environ.get('MASTER_PORT', 'MASTER_PORT')}"
            raise UserError(
                f"the {size} processes of this training do not find each other at {where} ({reason}); start them with torchrun"
            ) from None
        dist.distributed_c10d._set_pg_timeout(_PATIENCE)
        atexit.register(_destroy_group)
    return World(dist.get_rank(), dist.get_world_size())


def connect(backend: str, timeout: timedelta) -> None:
    """Join the processes that ``torchrun`` started into a group with ``timeout`` for each of its operations.

    Process 0 keeps a store of its own: torchrun's outlives a restart of the processes (torch 2.13), with the addresses of those
    that are gone, and a new process that read them before they were replaced could not connect, or waited for ever.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout)
        return
    host, rank, size = os.environ["MASTER_ADDR"], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    agent = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        agent.set(_STORE_PORT, str(store.port))
    else:
        store = dist.TCPStore(host, _live_port(agent, host, timeout), is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _live_port(agent: dist.TCPStore, host: str, timeout: timedelta) -> int:
    """Return the port of process 0's store, once something answers there: what is written may be of the round before."""
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        port = int(agent.get(_STORE_PORT))
        try:
            socket.create_connection((host, port), timeout=5).close()
            return port
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"process 0 does not answer at port {port}: {error}") from error
            time.sleep(0.1)


def exit_process(code: int) -> None:
    """End this process with ``code`` if it is one of several; else return.

    With torch 2.13 one of thirty processes that had been in a group aborted after Python's own end, in the library's clean-up
    ("terminate called without an active exception"), and its training counted as failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available() and dist.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _destroy_group() -> None:
    """Part from the others: threads of a group that is still there abort a process that ends."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """Return the GPU of this process, one each on a machine, where ``device`` is any GPU."""
    local = os.environ.get("LOCAL_RANK")
    if device.type != "cuda" or device.index is not None or local is None:
        return device
    return torch.device("cuda", int(local) % torch.cuda.device_count())
