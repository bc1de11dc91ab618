"""Random harm to runs, pictures, archives and states: refused in one line or passed over, and nothing outside is touched.

    python qa/fuzz.py --seconds 600 --out qa/fuzz.json

Each round has its number as seed and can be had again with ``--first N --rounds 1``. It makes one to five random changes: a file or
folder of the run, of the pictures or of a state becomes a link (inside, outside, dangling, in a circle, to a device), a FIFO, a
socket, a folder or nothing, or its bytes are flipped, cut, repeated or spliced; archives of pictures get such bytes; checkpoints
keep a right checksum, because it is no signature. Then a random command runs on it. What must hold is what ``qa/faults.py`` checks.
``qa/fuzz_readers.py`` feeds single readers with what Hypothesis thinks of.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import faults
import torch
from faults import PICTURES, QUICK, VERBS, Harm, Place, make_base, zipped

from clead.atomic_io import write_atomically

COMMANDS: dict[str, tuple[str, ...]] = {
    **VERBS,
    "evaluate on": ("evaluate", "run", *QUICK),
    "export": ("export", "run", "--out", "exported"),
    "compare": ("compare", "run", "--json", "result.json"),
    "train photos": ("train", "cifar10-small-standard", *PICTURES, "--data.path", "photos", "--out", "made"),
    "train zip": ("train", "cifar10-small-standard", *PICTURES, "--data.path", "photos.zip", "--out", "made"),
    "data": ("data", "photos"),
    "start from": (
        "train",
        "digits-standard",
        *faults.TINY,
        "--train.start_from",
        "run/best.safetensors",
        "--out",
        "made",
    ),
}
MAGIC = b"clead-state-1\n"


def broken(content: bytes, chance: random.Random) -> bytes:
    """Return bytes after a few accidents."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randint(0, max(0, len(data) - 1)), chance.randint(1, 40)
        what = chance.choice(["flip", "cut", "repeat", "insert", "truncate", "number"])
        if what == "flip" and data:
            data[at] ^= 1 << chance.randint(0, 7)
        elif what == "cut":
            del data[at : at + length]
        elif what == "repeat":
            data[at:at] = data[at : at + length] * chance.choice([1, 3, 1000])
        elif what == "insert":
            data[at:at] = chance.randbytes(length)
        elif what == "truncate":
            del data[at:]
        else:
            data[at : at + 8] = chance.choice([0, 1, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little")
    return bytes(data)


def harm(place: Place, chance: random.Random) -> str:
    """Change one thing at random, and say what."""
    root = chance.choice([place.run, place.run, place.photos, place.run / "results" / "evaluation.state"])
    if root.resolve() != place.folder.resolve() / root.relative_to(place.folder) or not root.parent.is_dir():
        return "nothing"  # a change before this one has led it elsewhere: to the files of this machine, perhaps
    if not root.exists():
        root.mkdir()
    if not root.is_dir():
        return "nothing"
    known = [path for path in sorted(root.rglob("*")) if not path.is_symlink()]
    new = root / chance.choice(
        ["x.png", "0-0.safetensors", "state.json", "stages", "stored", "resume.next.state", ".x"]
    )
    path = chance.choice([*known, new])
    kind = chance.choice(["link", "link", "fifo", "socket", "folder", "gone", "bytes", "bytes", "bytes", "checksum"])
    if kind in ("bytes", "checksum"):
        if not path.is_file():
            return "nothing"
        content = broken(path.read_bytes(), chance)
        if kind == "checksum" and content.startswith(MAGIC):
            payload = content[len(MAGIC) + 32 :]
            content = MAGIC + hashlib.sha256(payload).digest() + payload
        path.write_bytes(content)
        return f"{path.relative_to(place.folder)}: {kind}"
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "link":
        targets = [
            place.outside,
            place.outside / "notes.txt",
            place.outside / "inner",
            Path("/dev/zero"),
            Path("nothing"),
        ]
        target = chance.choice([*targets, path, place.run / "metrics.jsonl", Path(".."), Path("/")])
        path.symlink_to(target)
        return f"{path.relative_to(place.folder)}: link to {os.path.relpath(target, place.folder)}"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
        os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    return f"{path.relative_to(place.folder)}: {kind}"


def round_of(number: int, folder: Path, base: Path) -> tuple[str, list[str], str]:
    """Return (command, changes, what went wrong or an empty text) of a round."""
    chance = random.Random(number)
    place = Place(folder / str(number), base)
    name = chance.choice(list(COMMANDS))
    changes: list[str] = []
    try:
        if name == "train zip":
            files = {str(f.relative_to(place.photos)): f.read_bytes() for f in sorted(place.photos.rglob("*.png"))}
            (place.folder / "photos.zip").write_bytes(broken(zipped(files), chance))
            changes.append("photos.zip: bytes")
        else:
            changes += [harm(place, chance) for _ in range(chance.randint(1, 5))]
        place.clead(*COMMANDS[name], codes=(0, 1, 2))
        return name, changes, ""
    except Harm as error:
        return name, changes, str(error)
    finally:
        shutil.rmtree(place.folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=10**9)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    findings: list[dict[str, Any]] = []
    begun, number = time.monotonic(), given.first
    with tempfile.TemporaryDirectory(prefix="clead-fuzz-") as name:
        base = Path(name) / "base"
        base.mkdir()
        make_base(base)
        while number < given.first + given.rounds and time.monotonic() - begun < given.seconds:
            command, changes, wrong = round_of(number, Path(name), base)
            counts[command] += 1
            if wrong:
                findings.append({"seed": number, "command": command, "changes": changes, "wrong": wrong})
                print(f"round {number}, {command}, {changes}: {wrong}", flush=True)
            number += 1
    record = {
        "command": f"python qa/fuzz.py --first {given.first} --rounds {number - given.first} --seconds 100000",
        "rounds": dict(sorted(counts.items())),
        "findings": findings,
        "seconds": round(time.monotonic() - begun),
    }
    if given.out is not None:
        write_atomically(given.out, (json.dumps(record, indent=1) + "\n").encode())
    print(f"{counts.total()} rounds, {len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
