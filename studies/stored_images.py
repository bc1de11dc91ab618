"""Ask other models about the images that C-LEAD as published has stored: how much of being right on them is robustness?

python studies/stored_images.py RUNS/clead-published-s0 --models RUNS/clead-published-s0 RUNS/standard-s1 RUNS/clead-s1

RUNS are made by ``clead train RECIPE --train.seed N --train.validate_every 1000 --out RUNS/NAME-sN`` with the recipes
digits-clead-published, digits-standard and digits-clead; for CIFAR-10 with cifar10-small-clead-published, seeds 1 and 2, and
cifar10-small-standard, seed 2, without --train.validate_every, and ``--images 500`` here.

The first is a run of a recipe ``*-clead-published``, whose adversarial test images were made for the classifier of its first stage;
the others are runs on the same data. Those that began with other random weights have never seen anything of that classifier.
Results are added to studies/stored_images.json: for each pair how many of the first test images a model has right when clean and
as stored, and how large the perturbations are.
"""

import argparse
import json
import sys
from pathlib import Path

OUT = Path(__file__).with_suffix(".json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stored", type=Path)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--images", type=int, help="the first so many test images; all if left out")
    arguments = parser.parse_args()
    import torch

    from clead.atomic_io import write_atomically
    from clead.evaluation.correctness import to_float
    from clead.evaluation.state import read_header
    from clead.evaluation.transfer import stored_test, transferred
    from clead.runs.directory import RunDir
    from clead.runs.loading import open_run

    torch.set_num_threads(1)
    folder = arguments.stored / "stored"
    header = read_header(folder)
    if header is None:
        parser.error(f"{arguments.stored} has stored no images; give a run of a recipe *-clead-published")
    stored = stored_test(folder, header["data"])
    if arguments.images is not None and not 1 <= arguments.images <= len(stored.x_adv):
        parser.error(f"--images must be between 1 and {len(stored.x_adv)}, the images stored, got {arguments.images}")
    data = RunDir.open(arguments.stored).config().data
    rows = json.loads(OUT.read_text()) if OUT.exists() else []
    for path in arguments.models:
        run = open_run(path, None, None, None)
        if type(run.config.data) is not type(data):
            parser.error(f"{path} is of other data than {arguments.stored}; give a run on the same")
        images = run.images
        if arguments.images is not None:
            images = images.subset(torch.arange(arguments.images))
        threat = run.config.threat
        found = transferred(run.model, images, stored, threat, torch.device("cpu"))
        n = found.robust.n
        change = (stored.x_adv[:n] - to_float(images.images[:n])).flatten(1)
        largest = change.abs().amax(1)
        about = {"recipe": run.config.name, "stored_by": arguments.stored.name, "model": path.name}
        about["data"] = run.config.to_dict()["data"]["name"]
        rows = [row for row in rows if any(row[key] != value for key, value in about.items() if key != "recipe")]
        rows.append(
            about
            | {"n": n, "right": found.robust.accuracy, "fooled": found.fooled, "eps": float(threat.eps)}
            | {
                "median_linf": largest.median().item(),
                "within_eps": (largest <= threat.eps + 1e-6).float().mean().item(),
            }
            | {"median_l2": change.norm(dim=1).median().item(), "attack": found.settings}
        )
        print(rows[-1], flush=True)
    rows.sort(key=lambda row: (row["data"], row["stored_by"], row["model"]))
    write_atomically(OUT, (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # a UserError is one
        sys.exit(f"stored_images.py: error: {error}")
