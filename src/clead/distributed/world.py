"""The processes of one training: which one this is, and what they exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clead.distributed.collectives import GatherWithGrad, count_traffic, gathered
from clead.errors import UserError
from clead.interfaces import Threat

T = TypeVar("T")


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
        count_traffic("join", outputs)
        return cast(Tensor, GatherWithGrad.apply(outputs, self.rank, self.world_size, images))

    def all_gather(self, values: Tensor) -> Tensor:
        """Return the rows of all processes, in their order, without gradient."""
        if self.world_size == 1:
            return values
        count_traffic("gather", values)
        return gathered(values.detach(), self.world_size).flatten(0, 1)

    def all_reduce_mean(self, gradients: Sequence[Tensor | None], flags: Sequence[bool] = ()) -> list[bool]:
        """Average tensors over all processes in place; return which of ``flags`` is set on any process."""
        if self.world_size == 1:
            return list(flags)
        tensors = [gradient for gradient in gradients if gradient is not None]
        received = torch.tensor([float(flag) for flag in flags], device=tensors[0].device if tensors else None)
        # One message for all: many small ones cost more than copying.
        flat = torch.cat([received, *(tensor.detach().reshape(-1).float() for tensor in tensors)])
        count_traffic("average", flat)
        dist.all_reduce(flat)
        start = len(received)
        for tensor in tensors:
            tensor.copy_((flat[start : start + tensor.numel()] / self.world_size).view_as(tensor))
            start += tensor.numel()
        return [bool(value) for value in flat[: len(received)].tolist()]

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


class SlicedThreat:
    """A threat whose random starts are drawn for a whole batch, of which only some images are here.

    So any number of processes, and of microbatches, starts from the same points.

    Args:
        threat: everything else is its.
        positions: which images of the batch are here, (b,) int64; a stack of several views has all of them in each.
        batch_size: images in the whole batch.
    """

    def __init__(self, threat: Threat, positions: Tensor, batch_size: int) -> None:
        self._threat, self._positions, self._batch_size = threat, positions, batch_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._threat, name)

    def random_start(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return a random point of the set around ``x``, (V·b, C, H, W)."""
        return self.of_whole_batch(x, lambda whole: self._threat.random_start(whole, generator=generator))

    def of_whole_batch(self, x: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the rows that belong to ``x``, (V·b, …), of what ``draw`` makes of a whole batch of that kind, (V·B, …)."""
        views = len(x) // len(self._positions)
        first = self._batch_size * torch.arange(views, device=x.device)[:, None]
        rows = (first + self._positions.to(x.device)).flatten()
        # Random numbers go along the memory, so the layout must be that of the images.
        layout = torch.channels_last if not x.is_contiguous() else torch.contiguous_format
        whole = torch.zeros((views * self._batch_size, *x.shape[1:]), dtype=x.dtype, device=x.device).contiguous(
            memory_format=layout
        )
        whole[rows] = x
        return draw(whole)[rows]


def average_gradients(processes: World, parameters: Iterable[nn.Parameter], flags: Sequence[bool] = ()) -> list[bool]:
    """Average the gradients of ``parameters`` over all processes, in place; see ``World.all_reduce_mean``."""
    return processes.all_reduce_mean([parameter.grad for parameter in parameters], flags)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
