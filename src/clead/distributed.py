"""Several processes train one model: each takes its part of every batch, and the step is that of one process.

How: a step's images are shared out, and each process attacks its own. What the model says of them (features, logits) is gathered,
so that every process computes the loss of the whole batch, contrast with all its images included, whatever the method. Gradients
are averaged. It is not ``DistributedDataParallel``, whose hooks expect one forward and one backward per step: here a step has
attacks, weight perturbations and gradients of gradients in between.
"""

from __future__ import annotations

import atexit
import os
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clead.errors import UserError
from clead.interfaces import Threat

T = TypeVar("T")

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
        said = str(error)
        if not isinstance(error, dist.DistError) and not re.search(r"gloo|NCCL|Connection (closed|reset)", said):
            raise
        reason = (
            re.sub(r"\[.*?\]\s*", "", said.splitlines()[0]).partition(". ")[0][:120] if said else type(error).__name__
        )
        raise LostWorker(
            f"another process of this training is gone ({reason}); the same command with --resume goes on from {where}"
        ) from error


@dataclass(frozen=True)
class World:
    """The processes of one training, numbered from 0; number 0 writes, logs and validates.

    Attributes:
        rank: the number of this one.
        size: how many there are.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def local_slice(self, count: int) -> slice:
        """Return which of ``count`` things, a multiple of ``world_size``, are this process's."""
        each = count // self.world_size
        return slice(self.rank * each, (self.rank + 1) * each)

    def gather_with_grad(self, outputs: Tensor, images: int) -> Tensor:
        """Return what all processes have: (V·b, …) of V stacked views of b images become (V·b·size, …), view by view.

        The backward keeps this process's rows, times ``world_size``: averaging gradients over processes then gives the gradient of
        the whole batch's loss, of what is computed before and after the join alike.

        Args:
            outputs: of this process.
            images: b.
        """
        if self.world_size == 1:
            return outputs
        _count("join", outputs)
        return cast(Tensor, _GatherWithGrad.apply(outputs, self.rank, self.world_size, images))

    def all_gather(self, values: Tensor) -> Tensor:
        """Return the rows of all processes, in their order, without gradient."""
        if self.world_size == 1:
            return values
        _count("gather", values)
        return _gathered(values.detach(), self.world_size).flatten(0, 1)

    def all_reduce_mean(self, gradients: Sequence[Tensor | None], flags: Sequence[bool] = ()) -> list[bool]:
        """Average tensors over all processes in place; return which of ``flags`` is set on any process."""
        if self.world_size == 1:
            return list(flags)
        tensors = [gradient for gradient in gradients if gradient is not None]
        told = torch.tensor([float(flag) for flag in flags], device=tensors[0].device if tensors else None)
        # One message for all: many small ones cost more than copying.
        flat = torch.cat([told, *(tensor.detach().reshape(-1).float() for tensor in tensors)])
        _count("average", flat)
        dist.all_reduce(flat)
        start = len(told)
        for tensor in tensors:
            tensor.copy_((flat[start : start + tensor.numel()] / self.world_size).view_as(tensor))
            start += tensor.numel()
        return [bool(value) for value in flat[: len(told)].tolist()]

    def broadcast(self, result: T) -> T:
        """Return process 0's ``result`` on every process."""
        if self.world_size == 1:
            return result
        box = [result]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def check_same(self, about: dict[str, str]) -> None:
        """Raise UserError on every process, naming what differs and where, unless all have the same ``about``."""
        if self.world_size == 1:
            return
        everything: list[Any] = [None] * self.world_size
        dist.all_gather_object(everything, about)
        for number, other in enumerate(everything):
            if wrong := [key for key in about if other.get(key) != everything[0].get(key)]:
                key = wrong[0]
                raise UserError(
                    f"process {number} has another {key} than process 0: {_short(other.get(key))}, not "
                    f"{_short(everything[0].get(key))}; give all processes the same recipe, data and versions"
                )

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            dist.barrier()


SINGLE_PROCESS = World()
TRAFFIC: Counter[str] = Counter()
"""Bytes that this process has given into collectives: outputs joined, labels and keys and statistics gathered, gradients and
the backward's statistics summed; and the number of ``calls``."""


def _count(kind: str, tensor: Tensor) -> None:
    TRAFFIC[kind] += tensor.numel() * tensor.element_size()
    TRAFFIC["calls"] += 1


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


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, rank: int, size: int, images: int) -> Tensor:
        ctx.rank, ctx.size, ctx.images = rank, size, images
        views = len(outputs) // images
        every = _gathered(outputs.contiguous(), size).unflatten(1, (views, images))  # (size, V, b, …)
        return every.transpose(0, 1).flatten(0, 2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None, None]:
        by_view = grad_outputs[0].unflatten(0, (-1, ctx.size, ctx.images))
        return (by_view[:, ctx.rank] * ctx.size).flatten(0, 1), None, None, None


def _gathered(values: Tensor, size: int) -> Tensor:
    """Return (size, *values.shape)."""
    every = [torch.empty_like(values) for _ in range(size)]
    dist.all_gather(every, values.contiguous())
    return torch.stack(every)


class _Sum(torch.autograd.Function):
    """The sum over all processes; what is differentiated is the sum of their losses, so the backward is a sum, too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        _count("sums", values)
        total = values.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Tensor:
        return cast(Tensor, _Sum.apply(grad_outputs[0]))


class _Normalised(torch.autograd.Function):
    """Batch normalisation by statistics of all processes: PyTorch's fused passes, one gather forward, one sum backward.

    The gradient is that of the sum of all processes' losses (Ioffe and Szegedy 2015, section 3, with sums over all images).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, mean, variance)
        ctx.eps = eps
        return nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, variance = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted: only plain operations have one
            y = _plain(x, weight, bias, ctx.eps)
            gradients = torch.autograd.grad(y, (x, weight, bias), grad_outputs[0], create_graph=True, allow_unused=True)
            return *gradients, None, None, None
        grad = grad_outputs[0].contiguous(memory_format=_layout(x))
        back = torch.ops.aten.native_batch_norm_backward
        dx, dweight, dbias = back(grad, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True])
        sums = torch.stack([dbias, dweight])  # of the gradient, and of its product with the normalised values
        _count("sums", sums)
        dist.all_reduce(sums)
        images = dist.get_world_size() * (x.numel() // x.shape[1])
        inverse = (variance + ctx.eps).rsqrt()
        slope = -weight * inverse.square() * sums[1] / images
        offset = -weight * inverse * sums[0] / images - slope * mean
        shape = [1, -1, *([1] * (x.dim() - 2))]
        return torch.addcmul(dx.add_(offset.view(shape)), x, slope.view(shape)), dweight, dbias, None, None, None


def _layout(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _plain(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return x normalised by operations that can be differentiated any number of times."""
    over = [0, *range(2, x.dim())]
    shape = [1, -1, *([1] * (x.dim() - 2))]
    mean = _Sum.apply(x.mean(over)) / dist.get_world_size()
    centred = x - mean.view(shape)
    variance = _Sum.apply((centred * centred).mean(over)) / dist.get_world_size()
    return centred * (variance + eps).rsqrt().view(shape) * weight.view(shape) + bias.view(shape)


class _Synchronised:
    """Batch normalisation with the statistics of all processes' images, as many each; PyTorch's own is for GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x, (B, C, …)."""
        norm = cast(_BatchNorm, self)
        if not norm.training and norm.running_mean is not None:
            return _BatchNorm.forward(norm, x)
        norm._check_input_dim(x)
        weight = norm.weight if norm.affine else torch.ones(x.shape[1], device=x.device)
        bias = norm.bias if norm.affine else torch.zeros(x.shape[1], device=x.device)
        with torch.no_grad():
            over = [0, *range(2, x.dim())]
            values = x.detach().float()
            centre = values.mean(over, keepdim=True)
            own = torch.stack(
                [centre.flatten(), (values - centre).square_().mean(over)]
            )  # var_mean is 20 times slower on CPUs
            _count("statistics", own)
            means, variances = _gathered(own, dist.get_world_size()).unbind(1)
            mean = means.mean(0)
            variance = (variances + (means - mean).square()).mean(0)  # as many images each
            if norm.training and norm.track_running_stats and norm.running_mean is not None:
                _move(norm, mean, variance, dist.get_world_size() * (x.numel() // x.shape[1]))
        return cast(Tensor, _Normalised.apply(x.float(), weight, bias, mean, variance, norm.eps)).to(x.dtype)


def _move(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    factor = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    with torch.no_grad():
        norm.running_mean.lerp_(mean.to(norm.running_mean), factor)
        norm.running_var.lerp_((variance * count / max(1, count - 1)).to(norm.running_var), factor)


@contextmanager
def synchronised(model: nn.Module) -> Generator[None, None, None]:
    """Let all batch normalisations in ``model``, and in copies of it made inside, take the statistics of all processes."""
    norms = [(part, part.__class__) for part in model.modules() if isinstance(part, _BatchNorm)]
    try:
        for part, kind in norms:
            part.__class__ = _kinds(kind)
        yield
    finally:
        for part, kind in norms:
            part.__class__ = kind


_KINDS: dict[type, type] = {}


def _kinds(kind: type) -> type:
    if kind not in _KINDS:
        _KINDS[kind] = type(f"Synchronised{kind.__name__}", (_Synchronised, kind), {})
    return _KINDS[kind]


class Parted:
    """A threat whose random starts are drawn part by part, each part of a batch from a generator of its own.

    So a process that has some parts of a batch draws what one process draws for them.

    Args:
        threat: everything else is its.
        generators: one per part of the images that are here.
        images: so many images of a batch are here; a stack of several views has that many of each.
    """

    def __init__(self, threat: Threat, generators: Sequence[torch.Generator], images: int) -> None:
        self._threat, self._generators, self._images = threat, generators, images

    def __getattr__(self, name: str) -> Any:
        return getattr(self._threat, name)

    def random_start(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return a random point of the set around ``x``; ``generator`` is not drawn from."""
        parts = len(self._generators)
        by_part = x.unflatten(0, (-1, parts, self._images // parts))
        drawn = [
            self._threat.random_start(by_part[:, part].flatten(0, 1), generator=own).unflatten(0, (len(by_part), -1))
            for part, own in enumerate(self._generators)
        ]
        return torch.stack(drawn, 1).flatten(0, 2)


def average_gradients(processes: World, parameters: Iterable[nn.Parameter], flags: Sequence[bool] = ()) -> list[bool]:
    """Average the gradients of ``parameters`` over all processes, in place; see ``World.all_reduce_mean``."""
    return processes.all_reduce_mean([parameter.grad for parameter in parameters], flags)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
