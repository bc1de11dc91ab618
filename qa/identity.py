"""Whether a change of the code left every number as it was: weights, flags and images, bit for bit.

    python qa/identity.py --out before.json                            (with the old code; 20 minutes on 2 cores)
    python qa/identity.py --out after.json --against before.json       (with the new code; exit code 1 if anything differs)

Everything is done by the command line, so that code of any two versions can be compared. Each digits recipe is trained for
``BUDGET`` forward-equivalents: a digest of the best and of the last weights, and each logged loss and accuracy, are noted. The
quick suite then attacks each of these models, and every suite in every norm attacks the committed model: clean flags, flags,
largest distance and forward passes of each attack, and a digest of the adversarial images. With ``--data`` (or ``CLEAD_DATA``),
the committed CIFAR-10 models are attacked as in ``tests/data/records``, on the first ``--images`` images, and their flags are
compared with the record's. What ``--out`` holds already is not computed again.

Digests are of one machine: another processor rounds otherwise. Compare only what one machine made. ``qa/identity.json`` was made on
one machine by commit abc5f45 and those up to 2482fbe; a83ec3c, before the code was reordered, and a563cfd, after it, gave the same
values there.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
BUDGET, IMAGES, STANDARD_IMAGES = "30", "48", "16"
METHODS = (
    *("standard", "gaussian", "pgd-at", "trades", "trades-awp", "mart", "free", "fgsm-rs", "supcon", "acl"),
    *("clead", "clead-published"),
)
SUITES = ("standard", "plus", "rand", "quick", "adaptive", "queries", "pgd")
EPS = {"linf": "0.15", "l2": "1", "l1": "6"}
CIFAR = ("standard", "pgd-at", "trades", "clead")
# What changes from run to run, and what only says how something is written.
MOVING = ("seconds", "time", "memory", "images_per_second")


def clead(*arguments, folder):
    """Run the program; raise with its messages if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "clead", *arguments], cwd=folder, capture_output=True, text=True, env=os.environ
    )
    if done.returncode:
        raise RuntimeError(f"clead {' '.join(arguments)}: exit code {done.returncode}\n{done.stderr[-2000:]}")


def digest_of(file):
    """Return a digest of the tensors of a safetensors file, whatever its metadata."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def numbers_of(file):
    """Return a digest of the logged lines without times and without warnings."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [line for line in lines if line["kind"] != "warning"]
    numbers = [{k: v for k, v in line.items() if not any(word in k for word in MOVING)} for line in lines]
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]


def rows_of(file):
    """Return a digest of the rows of a Parquet file, not of its metadata: suites and settings may have got other names."""
    return hashlib.sha256(json.dumps(pq.read_table(file).to_pylist(), default=bytes.hex).encode()).hexdigest()[:16]


def bits(flags):
    """Return flags as a text of 0 and 1; records hold lists or such texts."""
    return flags if isinstance(flags, str) else "".join("01"[bool(flag)] for flag in flags)


def distance_of(attack):
    """Return the largest distance of an attack; version 0.1 called it otherwise."""
    return attack["max_distance"] if "max_distance" in attack else attack["largest"]


def verdicts_of(file):
    """Return what a record says of each image and attack."""
    record = json.loads(file.read_text())
    attacks = {
        each["name"]: [bits(each["flags"]), distance_of(each), each["forwards"], each["backwards"]]
        for each in record["attacks"]
    }
    return {"clean": bits(record["clean_flags"]), "robust": bits(record["robust_flags"]), "attacks": attacks}


def trained(method, folder):
    run = folder / method
    clead(
        "train", f"digits-{method}", "--train.budget", BUDGET, "--train.device", "cpu", "--out", str(run), folder=folder
    )
    weights = {file.name: digest_of(file) for file in sorted(run.glob("*.safetensors"))}
    record = folder / "record.json"
    clead("evaluate", str(run), "--suite", "quick", "--eval.images", IMAGES, "--json", str(record), folder=folder)
    return {"weights": weights, "metrics": numbers_of(run / "metrics.jsonl"), **verdicts_of(record)}


def copied(model, folder):
    """Return a copy of a committed model, so that results are written beside the copy."""
    return str(shutil.copytree(ROOT / "tests/data/models" / model, folder / model))


def attacked(suite, norm, folder):
    images = IMAGES if suite in ("quick", "pgd") else STANDARD_IMAGES
    saved = folder / "x.parquet"
    clead(
        *("evaluate", copied("digits-clead", folder), "--suite", suite, "--eval.images", images),
        *(
            "--threat.norm",
            norm,
            "--threat.eps",
            EPS[norm],
            "--train.device",
            "cpu",
        ),
        *("--save-adversarial", str(saved), "--json", str(folder / "record.json")),
        folder=folder,
    )
    return {**verdicts_of(folder / "record.json"), "images": rows_of(saved)}


def replayed(name, images, folder):
    """Return verdicts of a committed CIFAR-10 model on the first images, and whether they are those of the committed record."""
    record = folder / "record.json"
    run = copied(f"cifar10-small-{name}", folder)
    clead(
        *(
            "evaluate",
            run,
            "--suite",
            "standard",
            "--eval.images",
            images,
            "--train.device",
            "cpu",
            "--json",
            str(record),
        ),
        folder=folder,
    )
    new = verdicts_of(record)
    old = verdicts_of(ROOT / f"tests/data/records/cifar10-small-{name}-s0-standard.json")
    n = len(new["clean"])
    same = new["robust"] == old["robust"][:n] and all(
        flags[0] == old["attacks"][attack][0][:n] for attack, flags in new["attacks"].items()
    )
    return {**new, "as the record": same}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", type=Path, help="the file of another version")
    parser.add_argument("--data", type=Path, default=os.environ.get("CLEAD_DATA"), help="folder of CIFAR-10")
    parser.add_argument(
        "--images", default="256", help="of each committed CIFAR-10 model; records are by batches of 256"
    )
    parser.add_argument("--only", default="", help="compute and compare what begins like this")
    arguments = parser.parse_args()
    work = {f"train {method}": lambda folder, m=method: trained(m, folder) for method in METHODS}
    work |= {
        f"attack {norm} {suite}": lambda folder, s=suite, n=norm: attacked(s, n, folder)
        for norm in EPS
        for suite in SUITES
        if norm == "linf" or suite in ("standard", "quick", "pgd")
    }
    if arguments.data:
        os.environ["CLEAD_DATA"] = str(arguments.data)
        work |= {f"replay {name}": lambda folder, n=name: replayed(n, arguments.images, folder) for name in CIFAR}
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"machine": platform.machine()}
    for name, compute in work.items():
        if name not in found and name.startswith(arguments.only):
            with tempfile.TemporaryDirectory(prefix="clead-identity-") as folder:
                found[name] = compute(Path(folder))
            new = arguments.out.with_suffix(".new")
            new.write_text(json.dumps(found, indent=1))
            new.replace(arguments.out)
            print(name, flush=True)
    different = []
    if arguments.against:
        other = json.loads(arguments.against.read_text())
        names = [name for name in work if name in other and name.startswith(arguments.only)]
        different = [name for name in names if found.get(name) != other[name]]
        for name in different:
            keys = [key for key in other[name] if found.get(name, {}).get(key) != other[name][key]]
            print(f"differs: {name} ({', '.join(keys)})")
        print(f"{len(names) - len(different)} of {len(names)} are the same")
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
