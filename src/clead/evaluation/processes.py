"""Images shared out over processes: shards by hand, or the ranks of ``torchrun``; the result is that of one process."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from clead.distributed import connect
from clead.errors import UserError
from clead.evaluation.state import Part, differences, read_header

T = TypeVar("T")

_MEETING = timedelta(minutes=5)
_PATIENCE = timedelta(days=7)  # rank 0 draws curves while the others wait


@dataclass(frozen=True)
class Shard:
    """Every ``count``-th batch, beginning with number ``index`` (from 1).

    Whole batches are shared out, not images: an image meets the same others in its batch whatever the number of processes, so
    its result is the same to the last bit.
    """

    index: int
    count: int

    @staticmethod
    def parse(text: str) -> Shard:
        """Return the shard written as ``i/n``; raises UserError otherwise.

        >>> Shard.parse("2/4")
        Shard(index=2, count=4)
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--shard must be i/n with 1 ≤ i ≤ n, got {text!r}; give such as --shard 2/4")
        return Shard(int(match[1]), int(match[2]))

    def has(self, batch: int) -> bool:
        """Say whether batch number ``batch`` (from 0) is of this shard."""
        return batch % self.count == self.index - 1

    def folder(self, state: Path) -> Path:
        """Return where this shard keeps its state: beside that of the others."""
        return state if self.count == 1 else state.with_name(f"{state.name}.shard-{self.index}-of-{self.count}")


SINGLE_SHARD = Shard(1, 1)


def shards(state: Path) -> list[Path]:
    """Return the shard states beside ``state``; raises UserError naming what is missing or does not belong together."""
    pattern = re.compile(re.escape(state.name) + r"\.shard-(\d+)-of-(\d+)")
    folders = {path: match for path in sorted(state.parent.glob("*")) if (match := pattern.fullmatch(path.name))}
    if not folders:
        raise UserError(f"--merge: there is no shard at {state.parent}; run: clead evaluate RUN --shard 1/n, and so on")
    counts = sorted({int(match[2]) for match in folders.values()})
    if len(counts) > 1:
        raise UserError(
            f"--merge: {state.parent} holds shards of several divisions (n = {', '.join(map(str, counts))}); remove the folders "
            f"of all but one: {', '.join(path.name for path in sorted(folders))}"
        )
    have = {int(match[1]) for match in folders.values()}
    if missing := sorted(set(range(1, counts[0] + 1)) - have):
        raise UserError(
            f"--merge: shard {', '.join(f'{i}/{counts[0]}' for i in missing)} is missing at {state.parent}; "
            "copy it there, or compute it with --shard"
        )
    return sorted(folders)


def folders(state: Path) -> list[Path]:
    """Return where the processes of this run keep their states."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return [Shard(index, count).folder(state) for index in range(1, count + 1)]


def merged(
    state: Path, header: dict[str, Any], keys: set[str], *, trust: bool = False
) -> tuple[dict[str, Part], list[str]]:
    """Return the parts of all shards beside ``state``, and notes on those that were taken on ``trust``.

    Raises UserError unless they are complete, of this evaluation, and made by this user on this machine (or ``trust`` is True).
    """
    from clead.evaluation.state import ResumableResults

    parts: dict[str, Part] = {}
    notes: list[str] = []
    for folder in shards(state):
        stored = read_header(folder) or {}
        wanted = {**header, "version": stored.get("version"), "shard": stored.get("shard")}
        if different := differences(stored, wanted):
            raise UserError(
                f"--merge: {folder} is of another evaluation ({'; '.join(different)}); repeat that shard with the same settings"
            )
        with ResumableResults(folder, {**header, "shard": stored["shard"]}, trust=trust).opened() as store:
            parts.update(store.parts)
            notes += [f"shard {stored['shard']}: {note}" for note in store.notes[1:]]
    if missing := keys - set(parts):
        batches = sorted({int(key.split("-")[0]) for key in missing})
        count = len(shards(state))
        late = sorted({batch % count + 1 for batch in batches})
        raise UserError(
            f"--merge: shard {', '.join(f'{i}/{count}' for i in late)} is not finished; run it again with --shard"
        )
    return parts, notes


@dataclass(frozen=True)
class Group:
    """The processes of one distributed run."""

    rank: int
    world_size: int
    handle: Any

    def gather(self, header: dict[str, Any], parts: dict[str, Part]) -> dict[str, Part] | None:
        """Return the parts of all processes on rank 0, None elsewhere.

        Raises UserError on every process, naming what differs, if they evaluate different things.
        """
        shared = {key: value for key, value in header.items() if key != "shard"}
        headers: list[Any] = [None] * self.world_size
        dist.all_gather_object(headers, shared, group=self.handle)
        for other, received in enumerate(headers):
            if different := differences(headers[0], received):
                raise UserError(
                    f"process {other} evaluates something else than process 0: {'; '.join(different)}; "
                    "give all processes the same model, images and settings"
                )
        everything: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(parts, everything, dst=0, group=self.handle)
        return {key: saved for one in everything for key, saved in one.items()} if everything is not None else None

    def broadcast(self, result: T) -> T:
        """Return rank 0's result on every process."""
        box = [result]
        dist.broadcast_object_list(box, src=0, group=self.handle)
        return box[0]


def group() -> Group | None:
    """Return the processes that ``torchrun`` started, or None for a single one.

    Raises UserError if the others do not come within five minutes, because only some of them evaluate.
    """
    if not dist.is_available() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    if not dist.is_initialized():
        connect("gloo", _PATIENCE)
    try:
        dist.new_group(backend="gloo", timeout=_MEETING)  # connects all processes, or fails
    except RuntimeError as error:
        raise UserError(
            f"an evaluation is shared by all {dist.get_world_size()} processes, but some of them did not begin it within "
            f"{_MEETING.total_seconds():.0f} seconds; call it in every process, also where only one needs the result"
        ) from error
    # Python objects travel by gloo, also where the run's own group is nccl.
    handle = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Group(dist.get_rank(), dist.get_world_size(), handle)


def rank() -> int:
    """Return this process's rank, 0 for a single process; only rank 0 writes and prints."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0
