"""``clead tune digits-clead`` against the committed recipe: what a search of minutes finds, measured on test images it never saw.

    python studies/tune_digits.py --work DIR --out studies/tune_digits.json        (half an hour on 2 cores)

Two processes share one search, with the space that the recipe declares. Then the recipe that was found and the committed one are
trained with seeds that the search did not use, and evaluated by AutoAttack standard on all test images. What is in DIR already is
not done again.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import yaml

from clead.atomic_io import write_atomically

RECIPE = "digits-clead"
CLEAD = (sys.executable, "-m", "clead")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def call(*words):
    subprocess.run([*CLEAD, *words], check=True, env=ENVIRONMENT, stdout=sys.stderr)


def search(folder):
    """Search with two processes; return the seconds that it took, from their start to their end."""
    timed = folder / "seconds.json"
    if not timed.exists():
        begun = time.time()
        command = [*CLEAD, "tune", RECIPE, "--out", str(folder / "search")]
        processes = [subprocess.Popen(command, env=ENVIRONMENT, stdout=sys.stderr) for _ in range(2)]
        if any([process.wait() for process in processes]):
            raise SystemExit("a search failed")
        write_atomically(timed, json.dumps(round(time.time() - begun)).encode())
    return json.loads(timed.read_text())


def measured(task):
    """Train and evaluate one recipe with one seed; return clean and robust accuracy on the test images."""
    recipe, seed, path = task
    if not (path / "results" / "evaluation.json").exists():
        call("train", recipe, "--train.seed", str(seed), "--out", str(path), "--resume")
        call("evaluate", str(path))
    record = json.loads((path / "results" / "evaluation.json").read_text())
    return record["clean"]["accuracy"], record["worst"]["accuracy"], record["data"]["n"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    seconds = search(given.work)
    best = given.work / "search" / "best.yaml"
    tasks = [
        (recipe, seed, given.work / f"{name}-{seed}")
        for seed in given.seeds
        for name, recipe in (("committed", RECIPE), ("found", str(best)))
    ]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip([task[2].name for task in tasks], pool.map(measured, tasks), strict=True))
    rows = {}
    for name in ("committed", "found"):
        clean, robust = ([round(100 * found[f"{name}-{seed}"][column], 2) for seed in given.seeds] for column in (0, 1))
        rows[name] = {
            "clean": clean,
            "robust": robust,
            "robust_mean": round(statistics.mean(robust), 2),
            "robust_std": round(statistics.stdev(robust), 2),
        }
        print(name, rows[name])
    trials = json.loads((given.work / "search" / "trials.json").read_text())
    result = {
        "command": f"python studies/tune_digits.py --work DIR --out {given.out}",
        "search": {
            "processes": 2,
            "seconds": seconds,
            "trials": len(trials["trials"]),
            "recipe_found": yaml.safe_load(best.read_text()),
        },
        "seeds": given.seeds,
        "n": next(iter(found.values()))[2],
        "attack": "AutoAttack standard",
        "rows": rows,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    write_atomically(given.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
