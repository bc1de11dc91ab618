"""What an evaluation has finished, on disk: a kill at any moment loses no finished batch of an attack."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from clead.checkpoint import load_weights, locked, save_weights, write_atomically
from clead.errors import UserError

VERSION = 1
Part = tuple[dict[str, Tensor], dict[str, Any]]


class State:
    """Finished parts of one evaluation: ``key`` -> (tensors, plain data).

    A directory with ``state.json`` (what is evaluated, and how) and one checksummed safetensors file per part, each written
    whole or not at all. Without a directory the parts are kept in memory only.

    Args:
        path: the directory, or None.
        header: everything that decides the result; a directory of another evaluation is refused.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.path = path
        self.header = {"version": VERSION, **json.loads(json.dumps(header))}
        self.parts: dict[str, Part] = {}
        self.resumed = 0
        """Parts that were there when the state was opened."""

    @contextmanager
    def opened(self) -> Generator[State, None, None]:
        """Read what there is and keep other processes out while the block runs.

        Raises UserError if the directory is of another evaluation (naming what differs) or in use.
        """
        if self.path is None:
            yield self
            return
        busy = f"{self.path} is in use by another evaluation; wait for it, or give each process its own --shard i/n"
        with locked(self.path, busy):
            found = read_header(self.path)
            if found is None:
                # Parts without a header are what a kill inside ``discard`` left: of which evaluation, nobody knows.
                for file in self.path.glob("*.safetensors"):
                    file.unlink()
                write_atomically(self.path / "state.json", json.dumps(self.header, indent=1).encode())
            elif different := differences(found, self.header):
                raise UserError(
                    f"{self.path} is the state of another evaluation ({'; '.join(different)}); "
                    "repeat that one, or discard it with --fresh"
                )
            for file in sorted(self.path.glob("*.safetensors")):
                # A damaged part is as one that was never finished: it is computed again.
                with contextlib.suppress(UserError):
                    self.parts[file.stem] = load_weights(file)
            self.resumed = len(self.parts)
            try:
                yield self
            except BaseException:
                if not self.parts:  # a mistake found before anything was computed leaves nothing behind
                    discard(self.path)
                raise

    def put(self, key: str, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Keep a finished part; raises UserError if the disk refuses, what was kept before stays."""
        part = ({name: tensor.cpu() for name, tensor in tensors.items()}, json.loads(json.dumps(dict(data))))
        if self.path is not None:
            save_weights(self.path / f"{key}.safetensors", *part)
        self.parts[key] = part


def discard(path: Path) -> None:
    """Remove a state directory: the record holds the result, or nobody wants it."""
    with contextlib.suppress(OSError):
        (path / "state.json").unlink()  # first: parts without a header are never taken up again
    shutil.rmtree(path, ignore_errors=True)


def read_header(path: Path) -> dict[str, Any] | None:
    """Return the header of a state directory, or None if there is none."""
    file = path / "state.json"
    if not file.exists():
        return None
    try:
        header = json.loads(file.read_text())
        if not isinstance(header, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise UserError(f"{file} is damaged; discard the state with --fresh") from None
    return header


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return what differs between two headers, in words."""
    return [
        f"{key}: {_brief(found.get(key))} there, {_brief(wanted.get(key))} here"
        for key in {**found, **wanted}
        if found.get(key) != wanted.get(key)
    ]


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."
