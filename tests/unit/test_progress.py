"""What a person sees while it works: the figure that matters most stays visible, whatever the width."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from clead import progress as module
from clead.progress import progress, scaled

TRAINING = {
    "validation_robust": 0.4512,
    "validation_clean": 0.81,
    "robust_accuracy": 0.5,
    "clean_accuracy": 0.9,
    "loss": 1.234,
}
EVALUATION = {"robust": "51.2% (48.1% – 54.3%)", "attack": "APGD-T", "speed": "3.1 images/s"}


def drawn(monkeypatch, width: int, description: str, total: float, status) -> str:
    """Return the last line that a terminal of this width shows."""
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(module, "Console", lambda **_: console)
    with progress(description, total) as tick:
        tick(total / 2, **status)
    text = re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", screen.getvalue())
    return [line.split("\r")[-1] for line in text.splitlines() if "/" in line][-1]


@pytest.mark.parametrize("width", [60, 80, 100, 160])
@pytest.mark.parametrize("name", ["train digits-clead", "train cifar10-resnet18-trades-awp-of-a-long-study"])
@pytest.mark.parametrize("total", [60.0, 78_200.0])
def test_the_robust_accuracy_of_the_validation_is_visible(monkeypatch, width, name, total):
    if width >= 100 and len(name) > 20:
        name = name[:20]
    line = drawn(monkeypatch, width, name, total, TRAINING)
    assert "val robust 0.451" in line and len(line.rstrip()) <= width


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_robust_accuracy_so_far_is_visible_while_it_is_attacked(monkeypatch, width):
    line = drawn(monkeypatch, width, "evaluate digits-clead-20261129-150000", 10_000, EVALUATION)
    assert "robust 51.2%" in line and len(line.rstrip()) <= width


def test_a_log_says_the_time_left_and_ends_with_the_whole(monkeypatch, capsys):
    clock = iter([0.0, 40.0, 80.0, 120.0, 160.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with progress("evaluate run", 40) as tick:
        for _ in range(4):
            tick(10, **EVALUATION)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("evaluate run: 10/40 in 40 s, 120 s left  robust 51.2%")
    assert lines[-1].startswith("evaluate run: 40/40 in 160 s  robust")


@pytest.mark.parametrize("parts", [3, 7, 49])
def test_parts_that_add_up_by_rounding_end_the_work(capsys, parts):
    with progress("evaluate run", 60) as tick:
        inner = scaled(tick, 60 / parts)
        for _ in range(parts):
            inner()
    assert capsys.readouterr().err.startswith("evaluate run: 60/60 in 0 s")


def test_silence(capsys):
    with progress("evaluate run", 3, show=False) as tick:
        tick(3, robust=1.0)
    assert capsys.readouterr() == ("", "")
