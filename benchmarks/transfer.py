"""Use the features of MNIST models for other data: scikit-learn's digits, enlarged to 28×28, by a linear probe that is attacked.

python benchmarks/transfer.py benchmarks/study_headline/mnist.json --work runs/study-mnist
python benchmarks/tables.py benchmarks/transfer_mnist.json

STUDY is the result of ``benchmarks/study.py``, ``--work`` the folder in which it left its runs. The encoder stays as it is; a
linear classifier is fitted to 1,294 clean images, 144 choose its C, 359 are attacked by PGD-50 (cross-entropy and margin) through
both in the L∞ ball of --eps: the enlarged digits are grey, and nothing holds at MNIST's 0.3. A probe's robustness is that of its
features. Rows that exist are not measured again.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from study import folder

KEPT = ("variant", "seed", "forward_equivalents")


def enlarged(path: Path) -> Path:
    """Write the digits as 28×28 images, uint8, and return the file."""
    import numpy as np
    import torch
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    large = torch.nn.functional.interpolate(small, size=(28, 28), mode="bilinear").clamp(0, 1)
    x, y = (255 * large[:, 0]).round().byte().numpy(), digits.target
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[359:], order[:359]
    np.savez(path, x_train=x[train], y_train=y[train], x_test=x[test], y_test=y[test])
    return path


def measure(run: Path, data: Path, eps: str) -> dict:
    """Return accuracies of the probe on one run."""
    import torch

    torch.set_num_threads(1)
    from clead.api.measurements import probe_run
    from clead.config import load_recipe

    overrides = ["--data.name", "auto", "--data.path", str(data), "--data.val_fraction", "0.1", "--eval.images", "null"]
    overrides += ["--eval.split", "test", "--threat.eps", eps]
    measured = probe_run(run, config=load_recipe(run / "config.yaml", overrides), show=False)
    return measured.result.model_dump()


def main() -> None:
    from clead.checkpoint import write_atomically

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="benchmarks/transfer_STUDY.json by default")
    parser.add_argument("--eps", default="0.1", help="L∞ radius of the attack")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    out = arguments.out or Path(__file__).parent / f"transfer_{arguments.study.stem}.json"
    rows = json.loads(out.read_text()) if out.exists() else []
    if others := {row["eps"] for row in rows} - {arguments.eps}:
        sys.exit(f"{out} has rows of eps {', '.join(sorted(others))}, got {arguments.eps}; give another --out")
    done = {(row["variant"], row["seed"]) for row in rows}
    os.environ["OMP_NUM_THREADS"] = "1"
    data = enlarged(arguments.work / "digits28.npz")
    failed = []
    with ProcessPoolExecutor(arguments.workers) as pool:
        jobs = {}
        for row in json.loads(arguments.study.read_text()):
            run = folder(arguments.work, row["variant"], row["seed"])
            if (row["variant"], row["seed"]) in done:
                continue
            if not run.exists():
                print(f"{run} is not there, left out", flush=True)
                continue
            jobs[pool.submit(measure, run, data, arguments.eps)] = row
        for job in as_completed(jobs):
            if job.exception() is not None:
                failed.append(f"{jobs[job]['variant']} seed {jobs[job]['seed']}: {job.exception()}")
                continue
            found = job.result()
            row = {key: jobs[job][key] for key in KEPT} | {"eps": arguments.eps, "n": found["n"], "split": "test"}
            row |= {"clean_accuracy": found["clean"]["accuracy"], "robust_accuracy": found["robust"]["accuracy"]}
            rows.append({**row, "settings": found["settings"]})
            rows.sort(key=lambda row: (row["variant"], row["seed"]))
            write_atomically(out, (json.dumps(rows, indent=1) + "\n").encode())
            print(f"{row['variant']} seed {row['seed']}: {row}", flush=True)
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
