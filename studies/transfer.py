"""Use the features of digits models for other data: MNIST, shrunk to 8×8, by a linear probe that is attacked.

CLEAD_DATA=... python studies/transfer.py studies/study_headline/digits.yaml --only standard pgd-at trades clead
python studies/tables.py studies/transfer_digits.json

The models are those of the variants and seeds of a study (see ``studies/study.py``; not of those that need another one);
runs that it left in ``--work`` are used, and the others trained. The encoder stays as it is; a linear classifier is fitted to
4,500 clean images of MNIST, and 1,000 of its test set are attacked by PGD-50 (cross-entropy and margin) through both, in the
ball of the study's recipes. With every C of ``STRENGTHS``, the same for all models: how hard a classifier is fitted decides how
robust it is, too, and a C chosen by clean accuracy is chosen by a few images. To shrink MNIST, a pixel is the mean of 3×3 of
the inner 24×24. Rows that exist are not measured again.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # each worker has one

import argparse
import json
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import yaml
from study import fingerprint, folder, stop

TRAIN, TEST = 5000, 1000  # of the first, a tenth are validation images, which choose nothing here
STRENGTHS = (1.0, 0.1, 10.0)
# What a study may say of its own data and evaluation is not said of the other data.
OTHER = [
    *("--data.name", "auto", "--data.val_fraction", "0.1", "--data.limit_train", "null", "--data.limit_test", "null"),
    *(
        "--data.labelled",
        "1",
        "--data.labelled_share",
        "null",
        "--data.pseudo_labels_from",
        "null",
        "--data.label_noise",
        "0",
    ),
    *("--eval.images", "null", "--eval.split", "test", "--eval.steps", "null"),
]


def shrunk(path: Path) -> Path:
    """Write images of MNIST, its classes in proportion, as 8×8 images, uint8, and return the file."""
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
    begun = path.with_name(f"begun-{path.name}")
    np.savez(begun, **arrays)
    return begun.replace(path)


def measure(recipe: str, overrides: list[str], seed: int, run: Path, data: Path) -> dict:
    """Train a model unless it is there, and return the accuracies of the probes on it."""
    import torch

    torch.set_num_threads(1)
    import clead

    config = clead.load_recipe(recipe, [*overrides, "--train.seed", str(seed)])
    trained = clead.train(config, out=run, resume=True, show=False)
    other = clead.load_recipe(run / "config.yaml", [*OTHER, "--data.path", str(data)])
    row = {"forward_equivalents": trained.outcome.forward_equivalents, "suites": {}}
    for strength in STRENGTHS:
        found = clead.measure(run, "probe", config=other, strengths=(strength,), show=False).result.model_dump()
        row |= {"n": found["n"], "split": "test", "attack": found["attack"], "fitted": found["settings"]["fitted"]}
        row.setdefault("clean_accuracy", found["clean"]["accuracy"])
        row.setdefault("robust_accuracy", found["robust"]["accuracy"])
        row["suites"][f"C = {strength:g}"] = {
            "clean_accuracy": found["clean"]["accuracy"],
            "robust_accuracy": found["robust"]["accuracy"],
        }
    return row


def main() -> None:
    from clead.atomic_io import write_atomically

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
    if unknown := {*(arguments.only or ())} - {*study["variants"]}:
        parser.error(
            f"{', '.join(unknown)} of --only is no variant of {arguments.study}: {', '.join(study['variants'])}"
        )
    data = shrunk(work / "mnist8.npz")
    failed = []
    with ProcessPoolExecutor(
        arguments.workers, initializer=signal.signal, initargs=(signal.SIGTERM, signal.SIG_DFL)
    ) as pool:
        signal.signal(signal.SIGTERM, stop)
        jobs = {}
        for seed, name in ((seed, name) for seed in study["seeds"] for name in arguments.only or study["variants"]):
            each = study["variants"][name]
            if "needs" in each or seed not in each.get("seeds", [seed]):
                print(f"{name} seed {seed} is left out", flush=True)
                continue
            overrides = [*study.get("common", "").split(), *each.get("set", "").split()]
            said = fingerprint(each["recipe"], [*overrides, *OTHER, str(STRENGTHS)])
            if any((row["variant"], row["seed"], row["fingerprint"]) == (name, seed, said) for row in rows):
                continue
            job = pool.submit(measure, each["recipe"], overrides, seed, folder(work, name, seed), data)
            about = {"variant": name, "seed": seed, "recipe": each["recipe"], "overrides": overrides}
            jobs[job] = about | {"fingerprint": said}
        for job in as_completed(jobs):
            name, seed = jobs[job]["variant"], jobs[job]["seed"]
            if job.exception() is not None:
                failed.append(f"{name} seed {seed}: {job.exception()}")
                continue
            rows[:] = [row for row in rows if (row["variant"], row["seed"]) != (name, seed)]
            rows.append(jobs[job] | job.result())
            print(f"{name} seed {seed}: {job.result()}", flush=True)
            rows.sort(key=lambda row: (row["variant"], row["seed"]))
            write_atomically(out, (json.dumps(rows, indent=1) + "\n").encode())
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
