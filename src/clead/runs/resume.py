"""Checkpoints that a stopped training continues from: checksummed, signed, and read without running code."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clead.atomic_io import read_regular, remove_leftovers, write_atomically
from clead.errors import UserError
from clead.runs.directory import WRITTEN
from clead.signature import is_signed, owned, sign

_MAGIC = b"clead-state-1\n"
_SIGNED = b"\nclead-signature-1 "  # after the payload, with the digest's signature in hex
_LARGEST_STATE = 64 * 2**30
# Newest first: a kill between the two renames of save leaves the newest state under its staging name.
_STATES = ("resume.next.state", "resume.state", "resume.previous.state")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in a run directory: the newest, and the one before it."""

    folder: Path

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a training's state (plain dicts, tensors) with its checksum; the one before stays as ``resume.previous.state``."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        payload = buffer.getvalue()
        current = self.folder / "resume.state"
        staged = self.folder / "resume.next.state"
        digest = hashlib.sha256(payload).digest()
        write_atomically(staged, _MAGIC + digest + payload + _SIGNED + sign(digest.hex()).encode())
        try:
            if current.exists():
                os.replace(current, self.folder / "resume.previous.state")
            os.replace(staged, current)
        except OSError as error:
            raise UserError(f"cannot write {current}: {error.strerror or error}; free some space") from error

    def exist(self) -> bool:
        """Say whether there is a checkpoint to resume from."""
        return any((self.folder / name).exists() for name in _STATES)

    def load(self) -> tuple[dict[str, Any] | None, str]:
        """Return the newest checkpoint whose checksum holds, or None, and a note on its origin or if an older one had to be used.

        A checksum is no signature: the note says so where this user did not write the checkpoint on this machine.
        """
        remove_leftovers(self.folder, WRITTEN)
        broken = []
        for name in _STATES:
            path = self.folder / name
            if not path.exists():
                continue
            content = read_regular(path, _LARGEST_STATE)
            digest, payload = content[len(_MAGIC) : len(_MAGIC) + 32], content[len(_MAGIC) + 32 :]
            payload, signature = _unsigned(payload)
            if content.startswith(_MAGIC) and hashlib.sha256(payload).digest() == digest and _stored_as_is(payload):
                # weights_only: a checksum is no signature, and a pickle could run code; whatever torch.load says then,
                # the file is of no use.
                with contextlib.suppress(Exception):
                    state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
                    notes = [f"{', '.join(broken)} damaged, continuing from {name}"] if broken else []
                    if not (owned(path) and is_signed(digest.hex(), signature)):
                        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
                        notes.append(
                            f"{name} (of {made}) was not written by you on this machine; the weights and figures of this run are "
                            "as good as who wrote it"
                        )
                    return state, "; ".join(notes)
            broken.append(name)
        if broken:
            raise UserError(
                f"no checkpoint of {self.folder} is whole ({', '.join(broken)} damaged); start the run again elsewhere"
            )
        return None, ""


def _stored_as_is(payload: bytes) -> bool:
    """Say whether a state is an archive as PyTorch writes it, without compression, which could make gigabytes of a small file."""
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    return stored and sum(member.file_size for member in members) <= len(payload)


def _unsigned(payload: bytes) -> tuple[bytes, str | None]:
    """Return the payload of a checkpoint, and its signature if it has one: those of earlier versions have none."""
    size = len(_SIGNED) + 64
    if payload[-size:].startswith(_SIGNED):
        return payload[:-size], payload[-64:].decode("ascii", "replace")
    return payload, None
