"""``clead harden`` on hands and on CIFAR-10: a pre-trained network, networks from scratch at the same minutes, and its own choice.

CLEAD_DATA=... OMP_NUM_THREADS=1 python studies/harden.py --minutes 40 --seeds 0 1 2      (40 CPU minutes are 20 of two cores)

Minutes are those of CPU time of all threads (``--train.clock cpu``), so the machine may do other things as well. Rows that
studies/harden.json has are not run again, and a run that was stopped goes on. Run folders are in ``--work``. Data: hands (64
pixels), the first 5,000 and all 50,000 training images of CIFAR-10 (32 pixels). ``chosen`` has no ``--model``: where the command
then takes the network of a row before it, that row counts for it, and is named in ``as``.
"""

import argparse
import json
import os
from pathlib import Path

DATA = {
    "hands": ["hands"],
    "cifar10-5000": ["cifar10", "--data.limit_train", "5000"],
    "cifar10": ["cifar10"],
}
NETWORKS = {
    "pre-trained": ["efficientnet_lite0"],
    "from scratch, 16": ["resnet10", "--model.width", "16"],
    "from scratch, 32": ["resnet10", "--model.width", "32"],
    "chosen": [None],
}
CLOCK = ["--train.clock", "cpu"]


def main() -> None:
    import clead
    from clead.atomic_io import write_atomically
    from clead.hardening.command import summary
    from clead.hardening.plan import HardenOptions, make_plan

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[40.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", nargs="+", choices=[*DATA], default=[*DATA])
    parser.add_argument("--networks", nargs="+", choices=[*NETWORKS], default=[*NETWORKS])
    parser.add_argument("--work", type=Path, default=Path("runs/study-harden"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    jobs = [
        {"data": data, "network": network, "minutes": minutes, "seed": seed}
        for seed in arguments.seeds
        for minutes in arguments.minutes
        for data in arguments.data
        for network in arguments.networks
    ]
    for job in jobs:
        if any(all(row[key] == job[key] for key in job) for row in rows):
            continue
        (folder, *of_data), (model, *of_model) = DATA[job["data"]], NETWORKS[job["network"]]
        path, overrides = Path(os.environ["CLEAD_DATA"]) / folder, [*of_data, *of_model, *CLOCK]
        before = [row for row in rows if all(row[key] == job[key] for key in job if key != "network")]
        if model is None and before:
            options = HardenOptions(str(path), job["minutes"], seed=job["seed"], overrides=tuple(overrides))
            network = make_plan(options)[0].robust["model"]
            if equal := next((row for row in before if row["model"] == network), None):
                rows.append({**equal, **job, "as": equal["network"]})
        if not rows or any(rows[-1][key] != job[key] for key in job):
            name = "-".join(str(value).replace(" ", "-").replace(",", "") for value in job.values())
            hardened = clead.harden(
                path,
                minutes=job["minutes"],
                model=model,
                seed=job["seed"],
                overrides=overrides,
                out=arguments.work / name,
                resume=True,
            )
            curve = {point.eps_text: point.robust.accuracy for point in hardened.robust.curve}
            results = {"model": hardened.plan.robust["model"], **summary(hardened), "folder": name, "curve": curve}
            rows.append({**results, **job})  # last the job, whose network is a name of NETWORKS
        write_atomically(arguments.out, (json.dumps(rows, indent=1) + "\n").encode())
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
