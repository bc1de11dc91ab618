"""Files of weights: safetensors with metadata and a checksum, written whole, never something that runs code."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from clead.atomic_io import open_regular, write_atomically
from clead.errors import UserError
from clead.models.file_kinds import is_pickle

_LARGEST_HEADER = 16_000_000  # some 100,000 tensors; the library's own limit is 100 MB


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
