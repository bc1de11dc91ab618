"""Which device is meant by its name; how the memory of the CPU is kept from step to step."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from pathlib import Path

import torch

from clead.errors import UserError


def device_of(name: str) -> torch.device:
    """Return the device that ``train.device`` means; raises UserError if there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"train.device: no device {name!r} here ({reason}); use auto, cpu, cuda or cuda:N") from None
    return device


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MEMORY_FACTOR = 2
"""What has to be free for freed memory to be kept, in multiples of the most that the process ever took; keeping took up to 1.8."""


def keep_freed_memory(device: torch.device) -> bool:
    """Let this process keep the memory of large tensors that it frees, if there is plenty; return whether it does.

    glibc gives every block over 32 MiB back to the kernel and asks for it again in the next step: two fifths of the CPU time of
    EfficientNet-Lite0 at 224 pixels. To be called after a step or an attack, when it shows how much memory that takes. Other
    systems and devices are left alone, and processes for which somebody has chosen already (MALLOC_…, GLIBC_TUNABLES).
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if device.type != "cpu" or chosen or platform.libc_ver()[0] != "glibc":
        return False
    if available_memory() < _MEMORY_FACTOR * _kib("VmHWM", Path("/proc/self/status")):
        return False
    choose = ctypes.CDLL(None).mallopt
    return bool(choose(_M_MMAP_THRESHOLD, 1 << 30) and choose(_M_TRIM_THRESHOLD, -1))


def available_memory(root: Path = Path("/")) -> int:
    """Return how many bytes of memory Linux can still give, within the limit of the container where there is one."""
    available, groups = _kib("MemAvailable", root / "proc/meminfo"), root / "sys/fs/cgroup"
    for limit, used in (
        ("memory.max", "memory.current"),  # control groups 2, then 1
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        if (groups / limit).exists() and (text := (groups / limit).read_text().strip()) != "max":
            available = min(available, int(text) - int((groups / used).read_text()))
    return available


def _kib(name: str, path: Path) -> int:
    """Return a value of a file of /proc in bytes; 0 if it is not there."""
    match = re.search(rf"{name}:\s+(\d+) kB", path.read_text()) if path.exists() else None
    return 1024 * int(match[1]) if match else 0
