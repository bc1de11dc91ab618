"""kill -9 at random moments: what is continued afterwards must equal what was never interrupted.

    python qa/kills.py --kills 50 --out qa/kills.json                 (half an hour on 2 cores)

Each kind of work is done once without a fault. Then it is begun again and again in processes of their own, each killed (SIGKILL)
and started anew with the same command until it ends by itself: one life. Three of four moments are drawn uniformly from the first
half of the uninterrupted work, counted from the process's first write; every fourth from the time until that write: imports,
reading, taking up what is there. These are counted apart; lives are lived until there were so many of the others. At the end of
every life its result is compared with the uninterrupted one: train – weights, best and last, bit for bit, metrics and outcome but
for the seconds; evaluate – the whole record with the flags of every image but for the note
that it was continued, and the pictures' tensors; tune – every trial with its
values and scores, none lost, none finished twice in the journal. Files that a kill left behind count as differences too. What
``--what`` does not name stays in the record as it was. Exit code 1 if anything differs.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from clead.atomic_io import write_atomically

# Checkpoints after every step: a kill is likely to fall into a write.
TRAIN = (
    *("--model.width", "4", "--model.features", "8", "--data.batch_size", "64", "--train.budget", "120"),
    *("--attack.steps", "2", "--train.ema", "0.9", "--train.checkpoint_seconds", "0", "--train.device", "cpu"),
    *("--train.validate_every", "0.5", "--train.validate_steps", "2", "--train.validate_images", "64"),
)
EVALUATE = (
    *("--eval.steps", "6", "--eval.images", "200", "--eval.batch_size", "10", "--eval.curve_points", "3"),
    *("--eval.curve_steps", "4", "--eval.check_images", "16", "--train.device", "cpu"),
)
TUNE = (
    *("--tune.trials", "8", "--tune.space.optim.lr", "{low: 0.001, high: 0.1, log: true}", "--tune.images", "40"),
    *("--model.width", "4", "--model.features", "8", "--train.budget", "20", "--train.checkpoint_seconds", "0"),
    *("--train.validate_steps", "1", "--train.device", "cpu"),
)
SHORT = {
    "train": ("--train.budget", "30"),
    "evaluate": ("--eval.images", "40", "--eval.steps", "3", "--eval.curve_points", "2", "--eval.check_images", "4"),
    "tune": ("--tune.trials", "3"),
}
CLEAD = (sys.executable, "-m", "clead")
CHANGING = ("seconds", "created", "started", "command", "versions", "memory", "run", "attempts")


class Work:
    """Something that is killed: how to prepare a directory, start it, know that it has begun, and read its result."""

    def __init__(self, folder: Path, kind: str, more: tuple[str, ...] = ()) -> None:
        self.folder, self.kind, self.more = folder, kind, more
        if kind == "evaluate":
            self.trained = folder / "trained"
            arguments = (*CLEAD, "train", "digits-pgd-at", *TRAIN, "--train.budget", "20", "--out", str(self.trained))
            subprocess.run(arguments, check=True, capture_output=True)

    def fresh(self, path: Path) -> None:
        """Make the directory as it is before the work."""
        if self.kind == "evaluate":
            shutil.copytree(self.trained, path)

    def command(self, path: Path) -> tuple[str, ...]:
        """Return what is started, for the first time and every time after."""
        if self.kind == "train":
            return (*CLEAD, "train", "digits-clead", *TRAIN, *self.more, "--out", str(path), "--resume")
        if self.kind == "evaluate":
            return (*CLEAD, "evaluate", str(path), *EVALUATE, *self.more)
        return (*CLEAD, "tune", "digits-pgd-at", *TUNE, *self.more, "--out", str(path))

    def result(self, path: Path) -> dict:
        """Return all that must not depend on kills: name -> value."""
        return {"train": _training, "evaluate": _evaluation, "tune": _study}[self.kind](path)


def _training(path: Path) -> dict:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {
        **_tensors(path / "best.safetensors"),
        **_tensors(path / "last.safetensors"),
        "metrics": _lasting(lines),
        "outcome": _lasting(json.loads((path / "outcome.json").read_text())),
        "files": sorted(file.name for file in path.iterdir()),
    }


def _evaluation(path: Path) -> dict:
    record = json.loads((path / "results" / "evaluation.json").read_text())
    record["notes"] = [note for note in record["notes"] if not note.startswith("continued from a state")]
    return {
        **_tensors(path / "results" / "evaluation.safetensors"),
        **{key: _lasting(value) for key, value in record.items() if key not in CHANGING},
        "files": sorted(file.name for folder in (path, path / "results") for file in folder.iterdir()),
    }


def _study(path: Path) -> dict:
    trials = json.loads((path / "trials.json").read_text())["trials"]
    journal = [json.loads(line) for line in (path / "study.journal").read_text().splitlines()]
    told = Counter(line["trial_id"] for line in journal if line["op_code"] == 6 and line["state"] in (1, 2, 3))
    return {
        **{f"trial {trial['number']}": _lasting(trial) for trial in trials},
        "finished": sorted(told.values()),
        "files": sorted(file.name for file in path.iterdir()),
    }


def _tensors(file: Path) -> dict:
    return {f"{file.stem}.{name}": tensor for name, tensor in load_file(file).items()}


def _lasting(value):
    """Leave out what tells the time."""
    if isinstance(value, dict):
        return {key: _lasting(part) for key, part in value.items() if key not in CHANGING}
    return [_lasting(part) for part in value] if isinstance(value, list) else value


def differing(wanted: dict, found: dict) -> list[str]:
    """Return the names of what is not the same, to the last bit."""

    def same(a, b):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return type(a) is type(b) and json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)

    return [
        name
        for name in {**wanted, **found}
        if name not in wanted or name not in found or not same(wanted[name], found[name])
    ]


def uninterrupted(work: Work, path: Path) -> tuple[float, float]:
    """Do the work once; return seconds until its first write, and from then to its end."""
    work.fresh(path)
    start = time.monotonic()
    process, error = _start(work.command(path))
    _first_write(process, path, _files(path))
    begun = time.monotonic()
    if process.wait() != 0:
        raise SystemExit(f"the uninterrupted {work.kind} failed: {error.read_text()[-2000:]}")
    return begun - start, time.monotonic() - begun


def life(
    work: Work, path: Path, chance: random.Random, times: tuple[float, float], budget: int
) -> tuple[Counter, list[str]]:
    """Kill and continue until the work ends by itself, after ``budget`` kills at the latest."""
    work.fresh(path)
    counts: Counter = Counter()
    while True:
        before, (process, error) = _files(path), _start(work.command(path))
        if counts["working"] < budget:
            where = "starting" if chance.random() < 0.25 else "working"
            moment = chance.uniform(0, times[0] if where == "starting" else times[1] / 2)
            if where == "working":
                _first_write(process, path, before)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
            if process.wait() == -signal.SIGKILL:
                counts[where] += 1
                continue
        return counts, [f"exit code {process.returncode}: {error.read_text()[-500:]}"] * (process.wait() != 0)


def _files(path: Path) -> dict[Path, int]:
    found = {}
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
            found[file] = file.stat().st_mtime_ns
    return found


def _first_write(process: subprocess.Popen, path: Path, before: dict[Path, int]) -> None:
    while process.poll() is None and _files(path) == before:
        time.sleep(0.005)


def _start(command: tuple[str, ...]) -> tuple[subprocess.Popen, Path]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    file = Path(tempfile.gettempdir()) / f"clead-kills-{os.getpid()}.stderr"
    with file.open("w") as error:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=error), file


def faults(kind: str, kills: int, seed: int, folder: Path, more: tuple[str, ...] = ()) -> dict:
    """Return the record of one kind of work."""
    folder.mkdir(parents=True)
    started = time.monotonic()
    work, chance = Work(folder, kind, more), random.Random(f"{seed} {kind}")
    times = uninterrupted(work, folder / "whole")
    wanted = work.result(folder / "whole")
    total, lives, most, differences = Counter(), 0, 0, []
    while total["working"] < kills:
        path = folder / f"life-{lives}"
        counts, failed = life(work, path, chance, times, kills - total["working"])
        found = failed or differing(wanted, work.result(path))
        total += counts
        lives, most = lives + 1, max(most, counts.total())
        differences += [f"life {lives} after {counts.total()} kills: {each}" for each in found]
        if not found:
            shutil.rmtree(path)
        print(
            f"{kind}: {total['working']} kills, {lives} lives, {len(differences)} differences",
            file=sys.stderr,
            flush=True,
        )
    return {
        "command": " ".join(("clead", *work.command(Path("DIR"))[len(CLEAD) :])),
        "seed": seed,
        "kills_while_working": total["working"],
        "kills_while_starting": total["starting"],
        "lives": lives,
        "most_kills_in_one_life": most,
        "compared_in_each_life": len(wanted),
        "differences": differences,
        "seconds_uninterrupted": [round(each, 1) for each in times],
        "seconds": round(time.monotonic() - started),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--what", nargs="+", choices=("train", "evaluate", "tune"), default=("train", "evaluate", "tune")
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a smaller training or evaluation, for the tests")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    record = json.loads(given.out.read_text()) if given.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="clead-kills-") as folder:
        for kind in given.what:
            record[kind] = faults(
                kind, given.kills, given.seed, Path(folder) / kind, SHORT[kind] if given.short else ()
            )
            record["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
            write_atomically(given.out, (json.dumps(record, indent=1) + "\n").encode())
    failed = [f"{kind}: {each}" for kind in given.what for each in record[kind]["differences"]]
    print("\n".join(failed) or "no differences", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
