"""Memory of the CPU that is kept from step to step."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clead import devices
from clead.devices import available_memory, keep_freed_memory

GLIBC = platform.libc_ver()[0] == "glibc"
FAULTS = """
import resource, torch
from clead.devices import keep_freed_memory

def faults():  # pages that the kernel gives for eight tensors of 64 MiB, one after the other
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.zeros(2**24).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
first = faults()
kept = keep_freed_memory(torch.device("cpu"))
faults()
print(first, kept, faults())
"""


def run(**environment: str) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=inherited | environment
    )
    return done.stdout.split()


@pytest.mark.skipif(not GLIBC, reason="needs glibc")
def test_large_tensors_are_not_asked_of_the_kernel_again() -> None:
    first, kept, later = run()
    assert kept == "True"
    assert int(first) > 1000  # huge pages or small ones: 8 · 64 MiB are 256 or 131,072 of them
    assert int(later) < int(first) / 20


@pytest.mark.skipif(not GLIBC, reason="needs glibc")
def test_what_the_user_chose_stays() -> None:
    first, kept, later = run(MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False"
    assert int(later) > int(first) / 2


def test_nothing_is_kept_where_memory_is_short_or_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "available_memory", lambda: 2**20)
    assert not keep_freed_memory(torch.device("cpu"))
    monkeypatch.setattr(devices, "available_memory", lambda: 2**60)
    assert not keep_freed_memory(torch.device("meta"))


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       32000000 kB\nMemAvailable:    8000000 kB\n")
    assert available_memory(tmp_path) == 8_000_000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    assert available_memory(tmp_path) == 8_000_000 * 1024
    (group / "memory.max").write_text("5000\n")
    assert available_memory(tmp_path) == 4000
    (group / "memory").mkdir()
    (group / "memory/memory.limit_in_bytes").write_text("3000\n")
    (group / "memory/memory.usage_in_bytes").write_text("2500\n")
    assert available_memory(tmp_path) == 500
