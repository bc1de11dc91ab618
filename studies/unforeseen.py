"""Measure the runs of a study under threats that they were not trained against: other norms, rotations and shifts, corruptions.

python studies/unforeseen.py studies/study_headline/digits.json --work RUNS --norms l2:0.6 l1:1 --degrees 15 --pixels 0.4
python studies/tables.py studies/unforeseen_digits.json

STUDY is the result of ``studies/study.py``, ``--work`` the folder in which it left its runs. Norms are attacked with the suite
quick (two APGD of 50 steps), rotations and shifts exhaustively, corruptions are the mean of all kinds and
severities. The same images as in the study, the weights that its recipes evaluate. Rows that exist are not measured again.
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from study import folder

KEPT = ("variant", "seed", "n", "split", "clean_accuracy", "forward_equivalents")


def measure(run: Path, norms: list[str], degrees: float, pixels: float) -> dict:
    """Return accuracy by threat of one run."""
    import torch

    torch.set_num_threads(1)
    import clead
    from clead.attacks.spatial import Spatial
    from clead.config import load_recipe
    from clead.measurements.unrestricted import UnrestrictedAttack

    config = load_recipe(run / "config.yaml", ["--eval.check_images", "0", "--eval.curve_points", "0"])
    found = {}
    for norm in norms:
        name, eps = norm.split(":")
        other = load_recipe(run / "config.yaml", ["--threat.norm", name, "--threat.eps", eps])
        other = replace(config, threat=other.threat, eval=replace(config.eval, suite="quick"))
        found[norm] = clead.evaluate_run(
            run, config=other, result=f"unforeseen-{name}", show=False
        ).record.robust_accuracy
    spatial = Spatial(degrees=degrees, pixels=pixels)
    found["spatial"] = clead.measure(run, UnrestrictedAttack(attack=spatial), show=False).result.robust.accuracy
    found["corruptions"] = clead.measure(run, "corruptions", show=False).result.mean_accuracy
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--norms", nargs="+", required=True, metavar="NORM:EPS")
    parser.add_argument("--degrees", type=float, default=30.0, help="largest rotation")
    parser.add_argument("--pixels", type=float, required=True, help="largest shift; a tenth of the side is usual")
    parser.add_argument("--out", type=Path, help="studies/unforeseen_STUDY.json by default")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="these variants")
    arguments = parser.parse_args()
    out = arguments.out or Path(__file__).parent / f"unforeseen_{arguments.study.stem}.json"
    rows = json.loads(out.read_text()) if out.exists() else []
    done = {(row["variant"], row["seed"]) for row in rows}
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(arguments.workers) as pool:
        jobs = {}
        for row in sorted(json.loads(arguments.study.read_text()), key=lambda row: row["seed"]):
            if (row["variant"], row["seed"]) in done or arguments.only and row["variant"] not in arguments.only:
                continue
            run = folder(arguments.work, row["variant"], row["seed"])
            jobs[pool.submit(measure, run, arguments.norms, arguments.degrees, arguments.pixels)] = row
        for job in as_completed(jobs):
            row = {key: jobs[job][key] for key in KEPT}
            rows.append({**row, "suites": {name: {"robust_accuracy": value} for name, value in job.result().items()}})
            rows.sort(key=lambda row: (row["variant"], row["seed"]))
            out.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"{row['variant']} seed {row['seed']}: {job.result()}", flush=True)


if __name__ == "__main__":
    main()
