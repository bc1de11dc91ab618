"""Use the features of digits models for other data: MNIST, shrunk to 8×8, by a linear probe that is attacked.

CLEAD_DATA=... python benchmarks/transfer.py benchmarks/study_headline/digits.yaml --only standard pgd-at trades clead
python benchmarks/tables.py benchmarks/transfer_digits.json

The models are those of the variants and seeds of a study (see ``benchmarks/study.py``); runs that it left in ``--work`` are used,
and the others trained. The encoder stays as it is; a linear classifier is fitted to 4,500 clean images, 500 choose its C, 1,000 of
the test set are attacked by PGD-50 (cross-entropy and margin) through both, in the ball of the study's recipes. A probe's
robustness is that of its features. To shrink MNIST, a pixel is the mean of 3×3 of the inner 24×24. Rows that exist are not measured
again.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import yaml
from study import folder

TRAIN, TEST = 5000, 1000


def shrunk(path: Path) -> Path:
    """Write as many images of every class of MNIST as 8×8 images, uint8, and return the file."""
    import numpy as np
    import torch

    from clead.data.datasets.mnist import Mnist

    if path.exists():
        return path
    splits = Mnist(limit_train=TRAIN, limit_test=TEST).load(seed=0)
    arrays = {}
    for split, parts in (("train", (splits.train, splits.val)), ("test", (splits.test,))):
        inner = torch.cat([part.images for part in parts])[:, 0, 2:-2, 2:-2].float()
        arrays[f"x_{split}"] = torch.nn.functional.avg_pool2d(inner, 3).round().byte().numpy()
        arrays[f"y_{split}"] = torch.cat([part.labels for part in parts]).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def measure(recipe: str, overrides: list[str], seed: int, run: Path, data: Path) -> dict:
    """Train a model unless it is there, and return the accuracies of the probe on it."""
    import torch

    torch.set_num_threads(1)
    import clead
    from clead.api.measurements import probe_run

    config = clead.load_recipe(recipe, [*overrides, "--train.seed", str(seed)])
    trained = clead.train(config, out=run, resume=True, show=False)
    other = ["--data.name", "auto", "--data.path", str(data), "--data.val_fraction", "0.1"]
    found = probe_run(run, config=clead.load_recipe(run / "config.yaml", other), show=False).result.model_dump()
    return {
        "forward_equivalents": trained.outcome.forward_equivalents,
        "n": found["n"],
        "split": "test",
        "clean_accuracy": found["clean"]["accuracy"],
        "robust_accuracy": found["robust"]["accuracy"],
        "settings": found["settings"],
    }


def main() -> None:
    from clead.checkpoint import write_atomically

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--only", nargs="*", help="these variants; all if left out")
    parser.add_argument("--work", type=Path, help="run directories; runs/study-NAME by default")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    study = yaml.safe_load(arguments.study.read_text())
    work = arguments.work or Path("runs") / f"study-{arguments.study.stem}"
    out = Path(__file__).parent / f"transfer_{arguments.study.stem}.json"
    rows = json.loads(out.read_text()) if out.exists() else []
    done = {(row["variant"], row["seed"]) for row in rows}
    os.environ["OMP_NUM_THREADS"] = "1"
    data = shrunk(work / "mnist8.npz")
    failed = []
    with ProcessPoolExecutor(arguments.workers) as pool:
        jobs = {}
        for seed in study["seeds"]:
            for name in arguments.only or study["variants"]:
                each = study["variants"][name]
                if (name, seed) in done or "needs" in each:
                    continue
                overrides = [*study.get("common", "").split(), *each.get("set", "").split()]
                job = pool.submit(measure, each["recipe"], overrides, seed, folder(work, name, seed), data)
                jobs[job] = {"variant": name, "seed": seed, "recipe": each["recipe"], "overrides": overrides}
        for job in as_completed(jobs):
            said = f"{jobs[job]['variant']} seed {jobs[job]['seed']}"
            if job.exception() is not None:
                failed.append(f"{said}: {job.exception()}")
                continue
            rows.append(jobs[job] | job.result())
            print(f"{said}: {rows[-1]}", flush=True)
            rows.sort(key=lambda row: (row["variant"], row["seed"]))
            write_atomically(out, (json.dumps(rows, indent=1) + "\n").encode())
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
