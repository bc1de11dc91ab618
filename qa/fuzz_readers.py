"""What comes from elsewhere, broken in all ways that Hypothesis thinks of: it is read, or refused in one line, and nothing else.

    python qa/fuzz_readers.py --seconds 90 --out qa/fuzz_readers.json

Five readers, each in a process of its own (so that a crash is seen) for so many seconds at least: recipes, records, weights and
resume states, encoded images, .npz files. Inputs are valid ones with bytes flipped, cut out, repeated and spliced in, or with a
node of their tree replaced, and arbitrary ones. The checksum of a resume state is made right again, because it is no signature. A
finding is any exception but UserError, a message of several lines, an input that takes over ten seconds, a configuration that is
not itself after YAML, or a dead process. Each of the rounds of 100 examples has its number as seed. Exit code 1 if there was one.
"""

import argparse
import hashlib
import io
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import hypothesis
import numpy as np
import torch
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as to_safetensors

from clead import api
from clead.atomic_io import write_atomically
from clead.config import GROUPS, documented_keys, load_recipe, recipe_names, recipe_text
from clead.data.datasets.npz import read_npz
from clead.data.decoding import ResizeSpec, decode
from clead.errors import UserError
from clead.runs.directory import RunDir
from clead.runs.resume import Checkpoints
from clead.weights.files import load_weights, save_weights

RECORDS = Path(__file__).parent.parent / "tests" / "data" / "records"
SLOW = 10.0
MAGIC = b"clead-state-1\n"

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["8/255", "null", ""])
)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


@st.composite
def broken(draw, wholes):
    """Bytes of a valid file after a few accidents."""
    content = bytearray(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.integers(0, 12))
        what = draw(st.sampled_from(["flip", "set", "cut", "repeat", "insert", "truncate", "number"]))
        if what == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "set":
            content[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif what == "cut":
            del content[at : at + length]
        elif what == "repeat":
            content[at:at] = content[at : at + length] * draw(st.sampled_from([1, 3, 1000]))
        elif what == "insert":
            content[at:at] = draw(st.binary(max_size=12))
        elif what == "truncate":
            del content[at:]
        else:
            content[at : at + 8] = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])).to_bytes(
                8, "little"
            )
    return bytes(content)


@st.composite
def grafted(draw, wholes):
    """A valid tree with one of its nodes replaced, removed or added."""
    tree = json.loads(draw(st.sampled_from(wholes)))
    here, path = tree, []
    while isinstance(here, (dict, list)) and here and (not path or draw(st.booleans())):
        key = draw(st.sampled_from(sorted(here))) if isinstance(here, dict) else draw(st.integers(0, len(here) - 1))
        path.append((here, key))
        here = here[key]
    parent, key = path[-1]
    if draw(st.booleans()) or not isinstance(parent, dict):
        parent[key] = draw(trees)
    elif draw(st.booleans()):
        del parent[key]
    else:
        parent[draw(st.text(max_size=8))] = draw(trees)
    return tree


def recipes(folder):
    file = folder / "recipe.yaml"
    texts = [recipe_text(name)[1].encode() for name in recipe_names()]
    shipped = [json.dumps(yaml.safe_load(text)) for text in texts]
    keys = st.sampled_from([(row[0], row[2]) for row in documented_keys()])
    one = st.builds(lambda key, value: {key[0]: dict([(key[1], value)])}, keys, trees)
    as_yaml = (grafted(shipped) | one | st.dictionaries(st.sampled_from(GROUPS), trees) | trees).map(
        lambda tree: yaml.safe_dump(tree, allow_unicode=True).encode()
    )

    def read(content):
        file.write_bytes(content)
        config = load_recipe(str(file))
        file.write_text(config.to_yaml())
        assert load_recipe(str(file)) == config, "another configuration after YAML"

    return broken(texts) | as_yaml | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")), read


def records(folder):
    found = sorted(RECORDS.glob("*.json"), key=lambda path: path.stat().st_size)
    whole = [path.read_text() for path in found if "robust_flags" in path.read_text()][:2]
    file = folder / "record.json"

    def read(content):
        file.write_bytes(
            content if isinstance(content, bytes) else json.dumps(content).encode("utf-8", "surrogatepass")
        )
        api.compare([file, file])

    return broken([text.encode() for text in whole]) | grafted(whole) | trees, read


def checkpoints(folder):
    run = RunDir(folder / "run")
    run.path.mkdir()
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Linear(3, 2))
    optimiser = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 1, 5, 3 + 2)).sum().backward()
    optimiser.step()
    file = run.path / "w.safetensors"
    save_weights(file, network.state_dict(), {"classes": ["a", "b"], "config": {"x": 1}})
    Checkpoints(run.path).save(
        {"model": network.state_dict(), "optimizer": optimiser.state_dict(), "position": {"step": 3}}
    )
    state = run.path / "resume.state"
    payload = state.read_bytes()[len(MAGIC) + 32 :]
    weights = broken([file.read_bytes(), to_safetensors({"a": torch.ones(3)})]).map(
        lambda content: ("weights", content)
    )
    states = (broken([payload]) | broken([MAGIC + payload])).map(lambda content: ("state", content))

    def read(case):
        kind, content = case
        if kind == "weights":
            file.write_bytes(content)
            load_weights(file)
            return
        state.write_bytes(MAGIC + hashlib.sha256(content).digest() + content)
        Checkpoints(run.path).load()

    return weights | states, read


def images(folder):
    pixels = np.random.RandomState(0).randint(0, 256, (9, 7, 3), dtype=np.uint8)
    wholes = []
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "PPM"):
        for mode in ("RGB", "L", "1"):
            buffer = io.BytesIO()
            Image.fromarray(pixels).convert(mode).save(buffer, kind)
            wholes.append(buffer.getvalue())
    for mode in ("P", "RGBA", "LA", "I;16"):
        buffer = io.BytesIO()
        image = (
            Image.fromarray(pixels[..., 0].astype(np.uint16))
            if mode == "I;16"
            else Image.fromarray(pixels).convert(mode)
        )
        image.save(buffer, "PNG", exif=Image.Exif(), pnginfo=None)
        wholes.append(buffer.getvalue())

    def read(case):
        content, fit = case
        decode([content], ["image"], fit)

    fits = st.builds(
        ResizeSpec, st.none() | st.integers(1, 40), st.sampled_from(["squash", "crop"]), st.sampled_from([None, 1, 3])
    )
    return st.tuples(broken(wholes) | st.binary(max_size=100), fits), read


def arrays(folder):
    file, wholes = folder / "data.npz", []
    x, y = np.zeros((6, 4, 4), np.uint8), np.arange(6) % 2
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, x_train=x, y_train=y, x_test=x, y_test=y, classes=np.array(["a", "b"]))
        wholes.append(buffer.getvalue())
    objects = io.BytesIO()
    np.savez(objects, x_train=np.array([{}], dtype=object), y_train=y, x_test=x, y_test=y)
    wholes.append(objects.getvalue())

    def read(content):
        file.write_bytes(content)
        read_npz(file)

    return broken(wholes) | st.binary(max_size=100), read


READERS = {"recipes": recipes, "records": records, "checkpoints": checkpoints, "images": images, "arrays": arrays}


def fuzz(name: str, seconds: float) -> dict:
    """Feed one reader for so long, or until something is found."""
    counts, slowest, finding, rounds = Counter(), 0.0, None, 0
    with tempfile.TemporaryDirectory(prefix="clead-fuzz-") as folder:
        cases, read = READERS[name](Path(folder))
        end = time.monotonic() + seconds

        def one(case):
            nonlocal slowest
            start = time.monotonic()
            try:
                read(case)
                counts["read"] += 1
            except UserError as error:
                assert all(problem and "\n" not in problem for problem in error.problems), f"several lines: {error}"
                counts["refused"] += 1
            took = time.monotonic() - start
            slowest = max(slowest, took)
            assert took < SLOW, f"took {took:.0f} seconds"

        plain = settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        while time.monotonic() < end and finding is None:
            try:
                seed(rounds)(plain(given(cases)(one)))()
            except Exception as error:
                notes = " ".join(getattr(error, "__notes__", []))
                finding = f"{type(error).__name__}: {error} {notes}"[:2000]
            rounds += 1
    return {
        "seconds": round(time.monotonic() - end + seconds),
        "rounds": rounds,
        "read": counts["read"],
        "refused": counts["refused"],
        "slowest_seconds": round(slowest, 2),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "findings": [] if finding is None else [finding],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--what", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=READERS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(fuzz(asked.one, asked.seconds)))
        return
    record = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "hypothesis": hypothesis.__version__,
        }
    }
    record["versions"] |= {"pillow": Image.__version__, "numpy": np.__version__, "pyyaml": yaml.__version__}
    for name in asked.what:
        arguments = [sys.executable, __file__, "--one", name, "--seconds", str(asked.seconds)]
        done = subprocess.run(arguments, capture_output=True, text=True)
        dead = [f"exit code {done.returncode}: {done.stderr[-1500:]}"]
        record[name] = {"findings": dead} if done.returncode else json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {record[name]}", file=sys.stderr, flush=True)
    if asked.out is not None:
        write_atomically(asked.out, (json.dumps(record, indent=1) + "\n").encode())
    findings = [f"{name}: {each}" for name in asked.what for each in record[name]["findings"]]
    print("\n".join(findings) or "nothing found")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
