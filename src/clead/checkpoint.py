"""The run directory, and everything that is written to it: atomically, with checksums, never as something that runs code.

config.yaml         complete configuration
metrics.jsonl       one JSON object per log line
last.safetensors    weights at the end (EMA weights if EMA is on); ``best`` at the best validation robust accuracy
projection.safetensors  the projection head at the end, of a training that had one
resume.state        optimiser, schedule, EMA, RNG and position; ``resume.previous.state`` is one checkpoint older
environment.json    versions and machine
results/            one JSON record per evaluation, with its images beside it
stages/             a run directory for each stage of a run that has several; weights and metrics are joined in the run's own
stored/             adversarial images that were made once, of the model that training started from
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import re
import shlex
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from clead.atomic_io import (
    append_line,
    check_inside,
    open_regular,
    read_json_lines,
    read_regular,
    remove_leftovers,
    truncate,
    write_atomically,
)
from clead.config import RunConfig, parse_yaml, yaml_text
from clead.errors import UserError, printable
from clead.models.file_kinds import is_pickle
from clead.signature import is_signed, owned, sign

_MAGIC = b"clead-state-1\n"
_SIGNED = b"\nclead-signature-1 "  # after the payload, with the digest's signature in hex
_LARGEST_HEADER = 16_000_000  # some 100,000 tensors; the library's own limit is 100 MB
_LARGEST_STATE = 64 * 2**30
# Newest first: a kill between the two renames of save_state leaves the newest state under its staging name.
_STATES = ("resume.next.state", "resume.state", "resume.previous.state")

PROJECTION = "projection.safetensors"
_WRITTEN = ("resume.next.state", "best.safetensors", "last.safetensors", PROJECTION, "outcome.json", "metrics.jsonl")
_WRITTEN += ("config.yaml", "environment.json", "pseudo_labels.safetensors")


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write weights and JSON metadata as safetensors, atomically, with a checksum of both."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    texts["checksum"] = json.dumps(_checksum(content, texts))
    write_atomically(path, to_safetensors(content, texts))


def _checksum(content: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    return hashlib.sha256(f"{fingerprint(content)}{sorted(texts.items())}".encode()).hexdigest()


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (weights, metadata as texts) of a safetensors file; raises UserError if it is missing, truncated or a pickle."""
    try:
        with open_regular(path) as file:
            head = file.read(16)
    except FileNotFoundError:
        raise UserError(f"no weights at {path}; train first, or give the path of a .safetensors file") from None
    if is_pickle(head):
        raise UserError(f"{path} is a pickle, which can run code when loaded; save the weights as safetensors instead")
    size = int.from_bytes(head[:8], "little")
    if size < 2:  # not even "{}"; a sparse file of zeros would be mapped as large as it says it is
        raise UserError(f"{path} is truncated or not a safetensors file (no header); copy or train it again")
    if _LARGEST_HEADER < size <= path.stat().st_size:  # more than the whole file: truncated, or another kind of file
        raise UserError(
            f"{path}: the header of a safetensors file may have {_LARGEST_HEADER} bytes at most, this one says {size}; it is "
            "damaged or was made to harm"
        )
    try:
        with safe_open(path, framework="pt") as file:
            texts = {key: value for key, value in (file.metadata() or {}).items() if key != "format"}
            return {name: file.get_tensor(name) for name in file.keys()}, texts  # noqa: SIM118  (not a dict)
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise _not_safetensors(path, error) from None


def _not_safetensors(path: Path, error: Exception) -> UserError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return UserError(f"{path} is truncated or not a safetensors file ({reason}); copy or train it again")


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (weights, metadata) of a file of ``save_weights``; raises UserError if it is missing, truncated or a pickle."""
    content, texts = read_safetensors(path)
    try:
        metadata = {key: json.loads(value) for key, value in texts.items()}
    except (ValueError, RecursionError) as error:
        raise _not_safetensors(path, error) from None
    # Weights from elsewhere have no checksum.
    checksum = metadata.pop("checksum", None)
    if checksum is not None and checksum != _checksum(content, {k: v for k, v in texts.items() if k != "checksum"}):
        raise UserError(f"{path} is damaged: its checksum does not match its content; copy or train it again")
    return content, metadata


def check_weights(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> list[str]:
    """Return what must be said of weights that fit: those of another type than the model's.

    Raises UserError naming the first leaf that differs, with what was expected and found.
    """
    for name, tensor in expected.items():
        if name not in given:
            raise UserError(
                f"{source} is of another architecture: {name} {tuple(tensor.shape)} is missing; check the model settings"
            )
        if given[name].shape != tensor.shape:
            raise UserError(
                f"{source} is of another architecture: {name} should be {tuple(tensor.shape)}, found {tuple(given[name].shape)}; "
                "check the model settings"
            )
    extra = sorted(set(given) - set(expected))
    if extra:
        raise UserError(
            f"{source} is of another architecture: {extra[0]} is not in this model; check the model settings"
        )
    return type_notes(source, expected, given)


def type_notes(source: str, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Say which tensors change their type; raises UserError where whole numbers stand for real ones, as in quantised files."""
    changed: Counter[tuple[torch.dtype, torch.dtype]] = Counter()
    for name, tensor in given.items():
        want = expected[name].dtype
        if tensor.dtype == want or (not want.is_floating_point and not tensor.dtype.is_floating_point):
            continue
        if tensor.dtype.is_floating_point != want.is_floating_point:
            raise UserError(
                f"{source}: {name} holds {_type(tensor.dtype)}, the model's is {_type(want)}; give weights that are not quantised"
            )
        changed[tensor.dtype, want] += 1
    return [
        f"{source}: {count} tensors are {_type(have)}, the model computes with them as {_type(want)}"
        for (have, want), count in changed.items()
    ]


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return a hex digest of names, shapes, types and values of the weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _stored_as_is(payload: bytes) -> bool:
    """Say whether a state is an archive as PyTorch writes it, without compression, which could make gigabytes of a small file."""
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    return stored and sum(member.file_size for member in members) <= len(payload)


def command() -> str:
    """Return the command line that is running, without the folder that the program lies in and without passwords of URLs."""
    name = Path(sys.argv[0]).name.replace("__main__.py", "clead")
    return re.sub(r"(://[^:/@\s]*:)[^@\s]+@", r"\1***@", shlex.join([name, *sys.argv[1:]]))


def environment() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    import numpy

    from clead import __version__

    return {
        "clead": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


@dataclass(frozen=True)
class RunDir:
    """A run directory. ``create`` makes a new one, ``open`` reads one."""

    path: Path

    @staticmethod
    def default_path(name: str) -> Path:
        """Return ``runs/NAME-TIME``, which does not exist yet."""
        stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        path, count = Path("runs") / stem, 1
        while path.exists():
            path, count = Path("runs") / f"{stem}-{count}", count + 1
        return path

    @staticmethod
    def create(path: Path, config: RunConfig) -> RunDir:
        """Start a run; raises UserError if ``path`` holds anything already."""
        RunDir.check_free(path)
        run = RunDir(path)
        if path.is_dir():
            remove_leftovers(path, _WRITTEN)
        write_atomically(path / "config.yaml", config.to_yaml().encode())
        run.note_environment()
        return run

    @staticmethod
    def check_free(path: Path) -> None:
        """Raise UserError if ``path`` holds anything, but for what a kill in the middle of ``create`` may have left."""
        ours = tuple(f".{name}." for name in _WRITTEN)
        if path.is_file() or (path.is_dir() and any(not each.name.startswith(ours) for each in path.iterdir())):
            what = "holds another run" if (path / "config.yaml").exists() else "is not empty"
            raise UserError(f"--out {path} {what}; give an empty directory, or --resume to continue the run")

    def note_environment(self) -> None:
        """Write environment.json unless it is there already."""
        file = self.path / "environment.json"
        if not file.exists():
            started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            details = {**environment(), "command": command(), "started": started}
            write_atomically(file, json.dumps(details, indent=2).encode())

    @staticmethod
    def open(path: Path) -> RunDir:
        """Return an existing run; raises UserError if ``path`` is none."""
        if not (path / "config.yaml").is_file():
            inside = sorted(each.parent.name for each in path.glob("*/config.yaml")) if path.is_dir() else []
            made = (
                f"one of the runs in it, such as {path / inside[0]}" if inside else "a directory that clead train made"
            )
            raise UserError(f"{path} is not a run directory (no config.yaml in it); give {made}")
        check_inside(path)
        return RunDir(path)

    def weights(self, which: str) -> Path:
        """Return where the weights are that are called ``which``, best or last; an exported folder has only one."""
        path, only = self.path / f"{which}.safetensors", self.path / "model.safetensors"
        return only if only.exists() and not path.exists() else path

    @property
    def name(self) -> str:
        """The directory's name."""
        return printable(self.path.resolve().name)

    def config(self) -> RunConfig:
        """Return the run's complete configuration."""
        path = self.path / "config.yaml"
        try:
            return RunConfig.from_dict(parse_yaml(yaml_text(path), str(path)))
        except UnicodeDecodeError:
            raise UserError(f"{path} is damaged: it is not text; copy the run again") from None

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        append_line(self.path / "metrics.jsonl", json.dumps(line))

    def history(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; a last line that a kill or a full disk cut off is left out."""
        return read_json_lines(self.path / "metrics.jsonl")

    def truncate_log(self, size: int) -> None:
        """Cut metrics.jsonl back to ``size`` bytes, so that a resumed run does not log a step twice."""
        # Never longer: a power cut may have lost lines that the state counts, and truncating upwards writes zeros.
        truncate(self.path / "metrics.jsonl", size)

    def log_size(self) -> int:
        """Return the size of metrics.jsonl in bytes."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Write the resume state (plain dicts and tensors) with its checksum; keep the one before as ``resume.previous.state``."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        payload = buffer.getvalue()
        current = self.path / "resume.state"
        staged = self.path / "resume.next.state"
        digest = hashlib.sha256(payload).digest()
        write_atomically(staged, _MAGIC + digest + payload + _SIGNED + sign(digest.hex()).encode())
        try:
            if current.exists():
                os.replace(current, self.path / "resume.previous.state")
            os.replace(staged, current)
        except OSError as error:
            raise UserError(f"cannot write {current}: {error.strerror or error}; free some space") from error

    def has_state(self) -> bool:
        """Say whether there is a checkpoint to resume from."""
        return any((self.path / name).exists() for name in _STATES)

    def load_state(self) -> tuple[dict[str, Any] | None, str]:
        """Return the newest checkpoint whose checksum holds, or None, and a note on its origin or if an older one had to be used.

        A checksum is no signature: the note says so where this user did not write the checkpoint on this machine.
        """
        remove_leftovers(self.path, _WRITTEN)
        broken = []
        for name in _STATES:
            path = self.path / name
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
                f"no checkpoint of {self.path} is whole ({', '.join(broken)} damaged); start the run again elsewhere"
            )
        return None, ""


def _unsigned(payload: bytes) -> tuple[bytes, str | None]:
    """Return the payload of a checkpoint, and its signature if it has one: those of earlier versions have none."""
    size = len(_SIGNED) + 64
    if payload[-size:].startswith(_SIGNED):
        return payload[:-size], payload[-64:].decode("ascii", "replace")
    return payload, None
