"""``clead harden`` on four kinds of folders that people have: are the minutes kept, and what do plan and verdict say?

python studies/harden_folders.py --minutes 3      (a quiet machine: each run has all its cores)

The images are generated (stripes whose direction, frequency and colour say the class, with noise): 40 unbalanced classes of 30
to 60 pixels, 200 images in 3 classes, images of one channel, and 5,000 images of mixed sizes. Rows that studies/harden_folders.json
has are not run again. A row has the plan, the seconds taken beside those asked for, and the verdict.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

TEST = 25  # images of each class, 5 where there are forty
KINDS = {
    "40 unbalanced classes, 30 to 60 pixels": {"counts": [4 + 200 // (1 + k) for k in range(40)], "sides": (30, 60)},
    "200 images in 3 classes": {"counts": [67, 67, 66], "sides": (64, 64)},
    "one channel": {"counts": [150] * 8, "sides": (28, 28), "grey": True},
    "5,000 images of mixed sizes": {"counts": [500] * 10, "sides": (40, 300)},
}


def picture(label: int, side: int, rng: np.random.Generator, *, grey: bool) -> Image.Image:
    """Return a picture whose stripes and colour say its class."""
    y, x = np.mgrid[0:side, 0:side] / side
    waves = np.sin(2 * np.pi * ((label % 5 + 1) * (x if label % 2 else y) + rng.random()))
    colour = np.array([label % 3, label // 3 % 3, label // 9 % 3]) * 40
    image = 100 + 40 * waves[..., None] + colour + rng.normal(0, 20, (side, side, 3))
    return Image.fromarray(image.clip(0, 255).astype(np.uint8)).convert("L" if grey else "RGB")


def photographs(root: Path, counts: list[int], sides: tuple[int, int], *, grey: bool = False) -> Path:
    """Write a folder ``train`` and a folder ``test`` with one folder for each class."""
    rng = np.random.default_rng(0)
    for label, count in enumerate(counts):
        for split, images in (("train", count), ("test", TEST if len(counts) < 20 else 5)):
            folder = root / split / f"kind{label:02d}"
            folder.mkdir(parents=True)
            for number in range(images):
                side = int(rng.integers(sides[0], sides[1] + 1))
                picture(label, side, rng, grey=grey).save(folder / f"{number}.png")
    return root


def main() -> None:
    import clead
    from clead.atomic_io import write_atomically
    from clead.hardening.command import summary

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--only", nargs="+", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for kind in arguments.only:
        if any(row["kind"] == kind and row["minutes"] == arguments.minutes for row in rows):
            continue
        with tempfile.TemporaryDirectory() as folder:
            photos = photographs(Path(folder) / "photos", **KINDS[kind])
            hardened = clead.harden(photos, minutes=arguments.minutes, out=Path(folder) / "hardened")
            plan = hardened.plan
            row = {
                **{"kind": kind, "minutes": arguments.minutes, "facts": plan.facts, "data": plan.robust["data"]},
                **{"model": plan.robust["model"], "method": plan.robust["method"], **summary(hardened)},
            }
        row = {key: value for key, value in row.items() if key != "folder"}
        row["data"] = {key: value for key, value in row["data"].items() if key != "path"}
        row["share_of_the_minutes"] = round(row["seconds"] / 60 / arguments.minutes, 3)
        rows.append(row)
        write_atomically(arguments.out, (json.dumps(rows, indent=1) + "\n").encode())
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
