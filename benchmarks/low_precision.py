"""APGD and FAB-T of AutoAttack with the search in bfloat16 and the verdict in float32: how much time, and which images are lost?

    CLEAD_DATA=... python benchmarks/low_precision.py --out benchmarks/low_precision.json --images 1000     (one core: hours)

Six committed models, three radii each, in blocks of ``--block`` images; each block is attacked in float32, as AutoAttack
``standard`` does, and by searches in bfloat16 (autocast, channels last), and is written to ``--out`` when it is done: a stopped
run goes on. The searches in bfloat16:

- ``verify``: every image that bfloat16 calls wrong is judged in float32; what float32 calls right is attacked again in float32.
- ``finish``: besides, every image that still stands is attacked again in float32, at the ``FINISH`` targets of its smallest margin.

An image is lost where float32 breaks it and the search in bfloat16 does not, and won in the opposite case. Seconds are CPU seconds
of one thread; Square is left out, since it needs no gradient and has a way of its own to save work.
"""

import argparse
import copy
import json
import platform
import time
from pathlib import Path

import torch
from torch import nn

from clead.attacks.apgd import APGD, SmoothPath, unit
from clead.attacks.fab import FAB
from clead.config import load_recipe
from clead.evaluation.correctness import to_float
from clead.models.fold_batch_norm import folded
from clead.runs.directory import RunDir
from clead.runs.loading import open_run
from clead.threats.linf import Linf

ROOT = Path(__file__).parent.parent
MODELS = {
    **{
        name: (f"tests/data/models/cifar10-small-{name}", (4, 8, 16), 255)
        for name in ("standard", "pgd-at", "trades", "clead")
    },
    "digits": ("tests/data/models/digits-clead", (10, 15, 20), 100),
    "mnist": ("zoo:mnist", (20, 30, 35), 100),
}
FINISH = 2


class Low(nn.Module):
    """A copy of a model that computes in bfloat16 and answers in float32."""

    def __init__(self, model):
        super().__init__()
        self.model, self.num_classes = copy.deepcopy(model).to(memory_format=torch.channels_last), model.num_classes

    def forward(self, x):
        """Return logits, (B, K) float32."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(x.contiguous(memory_format=torch.channels_last)).float()


def wrong(model, x, y):
    with torch.no_grad():
        return model(x).argmax(1) != y


def in_float32(attack, model, x, y, threat, seed):
    """Return which images the attack breaks, (B,)."""
    x_adv = attack.perturb(model, x, y, threat, generator=torch.Generator().manual_seed(seed))
    return wrong(model, x_adv, y)


def verified(attack, model, low, x, y, threat, seed):
    """Return which images break, (B,), by a search in bfloat16; float32 judges, and attacks again where it differs."""
    x_adv = attack.perturb(low, x, y, threat, generator=torch.Generator().manual_seed(seed))
    broken, disputed = wrong(model, x_adv, y), (x_adv != x).flatten(1).any(1) | wrong(low, x, y)
    again = (disputed & ~broken).nonzero()[:, 0]
    if len(again):
        broken[again] = in_float32(attack, model, x[again], y[again], threat, seed)
    return broken


def climb(attack, model, x, y, aim, draws, threat, left):
    """Aim once at ``aim`` for the images ``left``; return the first points that ``model`` calls wrong, or else the best."""
    best = x.clone()
    start = (x + threat.eps * unit(draws, "linf")).clamp(0, 1)
    path = SmoothPath(left, x[left], y[left], aim[left], start[left], "linf", threat.eps)
    attack._climb(model, path, attack.steps, best)
    best[path.left] = path.best
    return best


def finished(attack, model, low, x, y, threat, seed):
    """Return which images break, (B,), by targeted APGD in bfloat16, and then in float32 at the targets of smallest margin."""
    generator, broken, margins, draws = torch.Generator().manual_seed(seed), wrong(model, x, y), [], []
    with torch.no_grad():
        aims = model(x).scatter(1, y[:, None], -torch.inf).topk(attack.targets, dim=1).indices
        for aim in aims.unbind(1):
            draws.append(torch.empty_like(x).uniform_(-1, 1, generator=generator))
            left = (~broken).nonzero()[:, 0]
            logits = model(climb(attack, low, x, y, aim, draws[-1], threat, left))
            broken[left] |= (logits.argmax(1) != y)[left]
            margins.append((logits.gather(1, y[:, None]) - logits.gather(1, aim[:, None]))[:, 0])
        nearest = torch.stack(margins, 1).argsort(1)[:, :FINISH]
        for place in nearest.unbind(1):
            left = (~broken).nonzero()[:, 0]
            start = torch.stack(draws, 1)[torch.arange(len(x)), place]
            aim = aims.gather(1, place[:, None])[:, 0]
            broken[left] |= wrong(model, climb(attack, model, x, y, aim, start, threat, left), y)[left]
    return broken


def timed(search, *arguments):
    start = time.process_time()
    broken = search(*arguments)
    return {"seconds": time.process_time() - start, "broken": broken.int().tolist()}


def block_of(model, x, y, eps):
    """Return seconds and broken images of every search, on images that the model gets right."""
    threat, low, targets = Linf(eps=eps), Low(model), min(9, model.num_classes - 1)
    attacks = {
        "APGD-CE": APGD(steps=100),
        "APGD-T": APGD(steps=100, loss="dlr", targets=targets),
        "FAB-T": FAB(steps=100, targets=targets),
    }
    results, standing = {}, torch.ones_like(y, dtype=torch.bool)
    with folded(model, x[:2]), folded(low.model, x[:2]):
        for name, attack in attacks.items():
            if not standing.any():
                break
            some, labels = x[standing], y[standing]
            results[name] = {
                "float32": timed(in_float32, attack, model, some, labels, threat, 1),
                "verify": timed(verified, attack, model, low, some, labels, threat, 1),
            }
            if name == "APGD-T":
                results[name]["finish"] = timed(finished, attack, model, low, some, labels, threat, 1)
            standing[standing.clone()] &= torch.tensor(results[name]["float32"]["broken"]) == 0
    return results


def summary(blocks):
    """Return, for each attack and search, CPU seconds, images that it broke, lost and won."""
    rows = {}
    for block in blocks:
        for attack, searches in block.items():
            plain = searches["float32"]["broken"]
            for search, result in searches.items():
                nothing = dict.fromkeys(("seconds", "attacked", "broken", "lost", "won"), 0)
                row = rows.setdefault(attack, {}).setdefault(search, nothing)
                row["seconds"] = round(row["seconds"] + result["seconds"], 2)
                row["attacked"] += len(plain)
                row["broken"] += sum(result["broken"])
                row["lost"] += sum(a and not b for a, b in zip(plain, result["broken"], strict=True))
                row["won"] += sum(b and not a for a, b in zip(plain, result["broken"], strict=True))
    return rows


def load(name, images):
    """Return a model in evaluation mode, whose weights take no gradient, and its first test images and labels."""
    run = RunDir.open(Path(MODELS[name][0]) if MODELS[name][0].startswith("zoo:") else ROOT / MODELS[name][0])
    config = load_recipe(str(run.path / "config.yaml"), ["--eval.images", images])
    opened = open_run(run.path, config, None, None)
    return opened.model.eval().requires_grad_(False), to_float(opened.images.images), opened.images.labels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--block", type=int, default=125)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": {}}
    kept["what"] = {"block": arguments.block, "torch": torch.__version__, "processor": platform.machine()}
    for start in range(0, arguments.images, arguments.block):
        for name, (_, radii, unit_of) in MODELS.items():
            model, x, y = load(name, str(arguments.images))
            x, y = x[start : start + arguments.block], y[start : start + arguments.block]
            if not len(x):
                continue
            with torch.no_grad():
                right = model(x).argmax(1) == y
            for radius in radii:
                row = kept["rows"].setdefault(f"{name} {radius}/{unit_of}", {"blocks": {}})
                if str(start) in row["blocks"] or not right.any():
                    continue
                row["blocks"][str(start)] = block_of(model, x[right], y[right], radius / unit_of)
                row["summary"] = summary(row["blocks"].values())
                new = arguments.out.with_suffix(".new")
                new.write_text(json.dumps(kept))
                new.replace(arguments.out)
                print(name, radius, start, json.dumps(row["summary"]), flush=True)


if __name__ == "__main__":
    main()
