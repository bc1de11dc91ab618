"""What several tests use: the repository, random numbers, pictures, comparisons of runs, a kill, a free port."""

from __future__ import annotations

import io
import re
import shlex
import socket
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from clead.errors import UserError
from clead.runs.directory import RunDir
from clead.weights.files import load_weights

ROOT = Path(__file__).parent.parent
"""The repository."""
TINY = shlex.split("""--model.width 4 --model.features 8 --data.limit_train 60 --data.limit_test 20 --data.batch_size 16
--attack.steps 1 --train.epochs 1 --train.validate_steps 1 --train.device cpu --eval.suite pgd --eval.steps 2
--eval.curve_points 0 --eval.check_images 0 --eval.gallery 4""")
"""What makes a recipe of digits a matter of a second."""
VOID = {"meta", "br", "img", "link", "input", "hr", "path", "circle", "use", "rect"}


class Killed(BaseException):
    """Stands for a SIGKILL: no ``except Exception`` sees it."""


class Returns(nn.Module):
    """A model that answers ``function(x)``, of pixels (B, D)."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x.flatten(1))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return an image file's bytes."""
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise_png(*shape: int, seed: int = 0) -> bytes:
    """Return a PNG of uniform noise, (H, W) or (H, W, 3)."""
    return encoded(np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8))


def saved_weights(run: Path, which: str = "last") -> dict[str, Tensor]:
    """Return the weights of a run, ``last`` or ``best``."""
    return load_weights(run / f"{which}.safetensors")[0]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal to the last bit."""
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def history(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log, without their seconds."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in RunDir(run).history()]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def refused(call: Callable[[], Any], *fragments: object) -> str:
    """Return the one line of the UserError that ``call`` raises; each fragment must be in it."""
    with pytest.raises(UserError) as caught:
        call()
    (message,) = caught.value.problems
    assert "\n" not in message and len(message) < 600
    for fragment in fragments:
        assert str(fragment) in message, message
    return message


class Nesting(HTMLParser):
    """Every tag is closed by its own; headings, tables, regions and images have what a screen reader needs."""

    def __init__(self, text):
        super().__init__()
        self.open, self.faults, self.headings, self.labels = [], [], [], []
        self.feed(text)
        self.faults += [f"open at the end: {tag}" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("p", "ul", "table", "div", "figure", "section") and "p" in self.open:
            self.faults.append(f"{tag} in p at {self.getpos()}")
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        if tag == "th" and attrs.get("scope") not in ("row", "col"):
            self.faults.append(f"th without scope at {self.getpos()}")
        if tag == "svg" and not attrs.get("aria-label") and attrs.get("aria-hidden") != "true":
            self.faults.append(f"svg without a label at {self.getpos()}")
        if tag == "img" and not attrs.get("alt"):
            self.faults.append(f"img without alt at {self.getpos()}")
        if attrs.get("role") == "region":
            self.labels.append(attrs["aria-label"])
            if attrs.get("tabindex") != "0":
                self.faults.append(f"a region that scrolls and cannot be focused at {self.getpos()}")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes another at {self.getpos()}")
