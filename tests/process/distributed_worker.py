"""What every process of tests/process/test_distributed.py runs: trains each case for some steps and leaves losses and weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

import clead  # noqa: E402
from clead import distributed  # noqa: E402
from clead.config import load_recipe  # noqa: E402


def main(out: Path, cases: dict[str, list[str]]) -> None:
    """Train every case into a run of its own."""
    for name, words in cases.items():
        run = clead.train(load_recipe(words[0], words[1:]), out=out / name, show=False)
        assert run.outcome.steps


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
    distributed.exit_process(0)
