"""What an evaluation has finished, on disk: a kill at any moment loses no finished batch of an attack.

Every part is signed by the user who made it (``clead.signature``), so that a state which came with a folder is not taken for one's
own: a flag that says "robust" cannot be checked without repeating the attack.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from clead.atomic_io import check_inside, locked, read_json, remove_tree_inside, write_atomically
from clead.errors import UserError
from clead.renamed import updated
from clead.signature import is_signed, keyless, owned, sign
from clead.weights.files import fingerprint, load_weights, save_weights

_log = logging.getLogger("clead")
VERSION = 1
CONTINUED = "continued from a state"
"""How the note of a state that was taken up begins."""
_SIGNATURE = "signature"
Part = tuple[dict[str, Tensor], dict[str, Any]]


class UntrustedState(UserError):
    """A state directory holds parts that this user did not make on this machine."""


class ResumableResults:
    """Finished parts of one evaluation: ``key`` -> (tensors, plain data).

    A directory with ``state.json`` (what is evaluated, and how) and one checksummed and signed safetensors file per part, each
    written whole or not at all. Without a directory the parts are kept in memory only.

    Args:
        path: the directory, or None.
        header: everything that decides the result; a directory of another evaluation is refused.
        trust: continue parts that this user did not make on this machine, and say so.

    Attributes:
        parts: what is finished.
        resumed: keys of the parts that were there when the state was opened.
        notes: what a record must say of those parts.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any], *, trust: bool = False) -> None:
        self.path = path
        self.header = {"version": VERSION, **json.loads(json.dumps(header))}
        self.trust = trust
        self.parts: dict[str, Part] = {}
        self.resumed: frozenset[str] = frozenset()
        self.notes: list[str] = []

    @contextmanager
    def opened(self) -> Generator[ResumableResults, None, None]:
        """Read what there is and keep other processes out while the block runs.

        Raises UserError if the directory is of another evaluation (naming what differs) or in use, and UntrustedState if it
        holds parts from elsewhere and ``trust`` is False.
        """
        if self.path is None:
            yield self
            return
        if self.path.is_symlink():
            raise UserError(f"{self.path} is a link, a state is a folder; remove it, or discard it with --fresh")
        check_inside(self.path, "state")
        busy = f"{self.path} is in use by another evaluation; wait for it, or give each process its own --shard i/n"
        with locked(self.path, busy):
            header = read_header(self.path)
            if header is None:
                # Parts without a header are what a kill inside ``discard`` left: of which evaluation, nobody knows.
                for file in self.path.glob("*.safetensors"):
                    file.unlink()
                write_atomically(self.path / "state.json", json.dumps(self.header, indent=1).encode())
                if reason := keyless():
                    _log.warning("%s is continued after a stop only with --trust-state: %s", self.path, reason)
            elif different := differences(header, self.header):
                raise UserError(
                    f"{self.path} is the state of another evaluation ({'; '.join(different)}); "
                    "repeat that one, or discard it with --fresh"
                )
            else:
                self.header = header  # as its parts are signed: it may hold a name of an earlier version
            self._read(self.path)
            try:
                yield self
            except BaseException:
                if not self.parts:  # a mistake that was seen before anything was computed leaves nothing behind
                    discard(self.path)
                raise

    def _read(self, folder: Path) -> None:
        """Take up the parts in ``folder``; raises UntrustedState if some are not this user's and ``trust`` is False."""
        files = sorted(folder.glob("*.safetensors"))
        foreign, damaged = [], 0
        for file in files:
            try:
                tensors, data = load_weights(file)
            except UserError:  # a damaged part is as one that was never finished: it is computed again
                damaged += 1
                continue
            signature = data.pop(_SIGNATURE, None)
            if not (owned(folder) and owned(file) and is_signed(self._text(file.stem, (tensors, data)), signature)):
                foreign.append(file.name)
            self.parts[file.stem] = (tensors, data)
        if not self.parts:
            return
        newest = max((folder / f"{key}.safetensors").stat().st_mtime for key in self.parts)
        made = f"the last of {time.strftime('%Y-%m-%d %H:%M', time.localtime(newest))}"
        count = f"{len(self.parts)} finished parts, {made}"
        if foreign and not self.trust:
            self.parts.clear()
            raise UntrustedState(
                f"{folder} holds {count}, and {len(foreign)} of them were not made by you on this machine: their verdicts may be "
                "wrong or forged; start anew with --fresh, or, if you trust who made them, continue with --trust-state"
            )
        self.resumed = frozenset(self.parts)
        self.notes.append(f"{CONTINUED} with {count}")
        if foreign:
            self.notes.append(
                f"{len(foreign)} of these parts were made by another user or on another machine and taken on trust (--trust-state)"
            )
        again = f"; {damaged} damaged ones are computed again" if damaged else ""
        _log.warning("%s: %s%s", folder, "; ".join(self.notes), again)

    @property
    def seconds(self) -> float:
        """What the finished parts took."""
        return sum(data["seconds"] for _, data in self.parts.values())

    def save(self, key: str, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Keep a finished part; raises UserError if the disk refuses, what was kept before stays."""
        part = ({name: tensor.cpu() for name, tensor in tensors.items()}, json.loads(json.dumps(dict(data))))
        if self.path is not None:
            signed = {**part[1], _SIGNATURE: sign(self._text(key, part))}
            save_weights(self.path / f"{key}.safetensors", part[0], signed)
        self.parts[key] = part

    def drop(self, keys: Collection[str]) -> None:
        """Forget finished parts that the model contradicts, so that they are computed again, and note it."""
        for key in keys:
            self.parts.pop(key, None)
            if self.path is not None:
                (self.path / f"{key}.safetensors").unlink(missing_ok=True)
        note = f"parts that were there and do not agree with the model, computed again: {', '.join(keys)}"
        self.notes.append(note)
        _log.warning("%s: %s", self.path, note)

    def _text(self, key: str, part: Part) -> str:
        """Return what a signature is of: which evaluation, which part of it, and what that holds."""
        return json.dumps([self.header, key, fingerprint(part[0]), part[1]], sort_keys=True)


def discard(path: Path) -> None:
    """Remove a state directory: the record holds the result, or nobody wants it."""
    if not path.is_symlink():
        with contextlib.suppress(OSError):
            (path / "state.json").unlink()  # first: parts without a header are never taken up again
    remove_tree_inside(path)


def read_header(path: Path) -> dict[str, Any] | None:
    """Return the header of a state directory, or None if there is none."""
    file, remedy = path / "state.json", "discard the state with --fresh"
    try:
        header = read_json(file, remedy=remedy)
    except FileNotFoundError:
        return None
    if not isinstance(header, dict):
        raise UserError(f"{file} is damaged (not a JSON object); {remedy}")
    return header


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return what differs between two headers, in words."""
    stored, wanted = updated(stored), updated(wanted)
    return [
        f"{key}: {_brief(stored.get(key))} there, {_brief(wanted.get(key))} here"
        for key in {**stored, **wanted}
        if stored.get(key) != wanted.get(key)
    ]


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."
