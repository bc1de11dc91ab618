"""``clead harden`` on hands and on CIFAR-10: a pre-trained network, networks from scratch at the same minutes, and its own choice.

CLEAD_DATA=... python studies/harden.py --minutes 20 --seeds 0 1 2      (a quiet machine: each run has all its cores)

Rows that studies/harden.json has are not run again, and a run that was stopped goes on. Run folders are in ``--work``. Data: hands
(64 pixels), the first 5,000 and all 50,000 training images of CIFAR-10 (32 pixels). ``chosen`` has no ``--model``.
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


def main() -> None:
    import clead
    from clead.atomic_io import write_atomically
    from clead.hardening.command import summary

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[20.0])
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
        name = "-".join(str(value).replace(" ", "-").replace(",", "") for value in job.values())
        hardened = clead.harden(
            Path(os.environ["CLEAD_DATA"]) / folder,
            minutes=job["minutes"],
            model=model,
            seed=job["seed"],
            overrides=[*of_data, *of_model],
            out=arguments.work / name,
            resume=True,
        )
        curve = {point.eps_text: point.robust.accuracy for point in hardened.robust.curve}
        rows.append({**job, **summary(hardened), "folder": name, "curve": curve})
        write_atomically(arguments.out, (json.dumps(rows, indent=1) + "\n").encode())
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
