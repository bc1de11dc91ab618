"""Run variants of recipes over seeds on validation data, two at a time, and keep every result: a resumable queue.

python benchmarks/study.py benchmarks/study_digits.yaml

The YAML file names the recipes, seeds, common overrides and variants. Results go to the JSON file of the same name: one row per
(variant, seed) with validation accuracies (the test set is not touched), overrides and seconds; rows that exist are not run again.
Each run has one thread, so that two share a machine of two cores without changing each other's result.
"""

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import yaml


def run(recipe: str, overrides: list[str], seed: int) -> dict:
    """Train one variant and return its clean and worst-case accuracy on the evaluation split."""
    import torch

    torch.set_num_threads(1)
    import clead

    start = time.time()
    config = clead.load_recipe(recipe, [*overrides, "--train.seed", str(seed)])
    with tempfile.TemporaryDirectory() as folder:
        trained = clead.train(config, out=Path(folder) / "run", show=False)
        record = clead.evaluate_run(trained.path, show=False).record
    return {
        "clean_accuracy": record.clean_accuracy,
        "robust_accuracy": record.robust_accuracy,
        "split": record.data.split,
        "n": record.data.n,
        "forward_equivalents": trained.outcome.forward_equivalents,
        "seconds": time.time() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    study = yaml.safe_load(arguments.study.read_text())
    out = arguments.study.with_suffix(".json")
    rows = json.loads(out.read_text()) if out.exists() else []
    done = {(row["variant"], row["seed"]) for row in rows}
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(arguments.workers) as pool:
        jobs = {}
        for seed in study["seeds"]:
            for name, variant in study["variants"].items():
                if (name, seed) not in done:
                    overrides = [*study["common"].split(), *variant.get("set", "").split()]
                    jobs[pool.submit(run, variant["recipe"], overrides, seed)] = (name, seed, variant, overrides)
        for job in as_completed(jobs):
            name, seed, variant, overrides = jobs[job]
            rows.append(
                {"variant": name, "seed": seed, "recipe": variant["recipe"], "overrides": overrides, **job.result()}
            )
            rows.sort(key=lambda row: (row["variant"], row["seed"]))
            out.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"{name} seed {seed}: {job.result()}", flush=True)


if __name__ == "__main__":
    main()
