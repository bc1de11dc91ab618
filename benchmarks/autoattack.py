"""AutoAttack ``standard``: ours against pyautoattack and torchattacks, on the same model and images, interleaved in one run.

    pip install pyautoattack==0.2.0 && pip install --no-deps torchattacks==3.5.1 && pip install requests
    CLEAD_DATA=... python benchmarks/autoattack.py tests/data/models/cifar10-small-pgd-at --images 1000 \
        --out benchmarks/autoattack_cifar10.json

The images go in blocks of ``--block``; each block is evaluated by every contender before the next one begins, in an order that
rotates, and is written to ``--out`` when it is done: a stopped run goes on with the next block. Each runs in a fresh process, as
its users run it (in one process, the first shapes the memory allocator for the next). Times are CPU seconds of the attacks,
without imports and data, on ``--threads`` threads. A verdict is a float32 classification of each contender's images by the plain
model. Forwards and backwards are counted at the model, per evaluated image. Everything is float32.
"""

import argparse
import json
import multiprocessing
import platform
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import clead
from clead.config import Eval, load_recipe
from clead.data.base import shuffle_if_sorted
from clead.evaluation import plan
from clead.evaluation.correctness import to_float
from clead.evaluation.evaluator import evaluate_model
from clead.evaluation.plan import EvaluationOptions
from clead.evaluation.suites import suite
from clead.interfaces import ImageSet
from clead.models.compute_cost import CostMeter
from clead.results.target import EvaluationTarget
from clead.runs.directory import RunDir
from clead.threats import THREATS

STAGES = {"APGD-CE": "apgd-ce", "APGD-T": "apgd-t", "FAB-T": "fab-t", "Square": "square"}
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def right(model, x, y):
    with torch.no_grad():
        return torch.cat([model(a).argmax(1) == b for a, b in zip(x.split(250), y.split(250), strict=True)])


def inside(x_adv, x, norm, eps):
    size = THREATS.get(norm)(eps=eps).distance(x_adv - x)
    return (size <= float(clead_eps(eps)) * (1 + 1e-4) + 1e-6) & (x_adv.flatten(1).amin(1) >= 0)


def clead_eps(text):
    over, _, under = str(text).partition("/")
    return float(over) / float(under or 1)


class Timed:
    """A search, and the CPU seconds it takes."""

    def __init__(self, attack, seconds, name):
        self.attack, self.seconds, self.name = attack, seconds, name

    def perturb(self, model, x, y, threat, *, generator=None):
        """Search, and note the time."""
        start = time.process_time()
        try:
            return self.attack.perturb(model, x, y, threat, generator=generator)
        finally:
            self.seconds[self.name] = self.seconds.get(self.name, 0) + time.process_time() - start


def ours(model, images, labels, norm, eps, block, seed):
    """Return clean flags, flags after each stage, CPU seconds and passes of ``evaluate_model``, as the command line runs it."""
    seconds = {}

    def timed(*args, **kwargs):
        attacks, notes = suite(*args, **kwargs)
        return [type(a)(a.name, Timed(a.attack, seconds, a.name), a.objective, a.cost) for a in attacks], notes

    plan.suite = timed
    try:
        start = time.process_time()
        settings = Eval(curve_points=0, check_images=0, gallery=0, batch_size=block, seed=seed)
        target = EvaluationTarget(
            "model", "model", "best", "data", "test", "", tuple(map(str, range(model.num_classes)))
        )
        record = evaluate_model(
            model,
            ImageSet(images, labels),
            THREATS.get(norm)(eps=eps),
            settings,
            target,
            options=EvaluationOptions(show=False),
        ).record
        seconds["all"] = time.process_time() - start
    finally:
        plan.suite = suite
    flags = {part.name: part.flags for part in record.attacks}
    passes = {part.name: (part.forwards, part.backwards) for part in record.attacks}
    return {"clean": record.clean_flags, "flags": flags, "seconds": seconds, "passes": passes}


def by_pyautoattack(model, images, labels, norm, eps, block, seed):
    from pyautoattack import AutoAttack

    x, y = to_float(images), labels
    adversary = AutoAttack(model, norm=NORMS[norm], eps=clead_eps(eps), version="standard", seed=seed)
    adversary.verbose = False
    if model.num_classes <= 9:  # it refuses more targets than there are
        adversary.apgd_targeted.n_target_classes = min(adversary.apgd_targeted.n_target_classes, model.num_classes - 1)
        adversary.fab.n_target_classes = model.num_classes - 1
    begin = time.process_time()
    clean = right(model, x, y)
    held, seconds, flags, passes = clean.clone(), {}, {}, {}
    for name, stage in STAGES.items():
        start = time.process_time()
        adversary.attacks_to_run = [stage]
        index = held.nonzero()[:, 0]
        with CostMeter(model) as meter:
            if len(index):
                x_adv, _ = adversary.run_standard_evaluation(x[index], y[index], batch_size=block)
                held[index] = right(model, x_adv, y[index]) | ~inside(x_adv, x[index], norm, eps)
        seconds[name] = time.process_time() - start
        flags[name] = held.tolist()
        passes[name] = (meter.forwards / len(x), meter.backwards / len(x))
    seconds["all"] = time.process_time() - begin
    return {"clean": clean.tolist(), "flags": flags, "seconds": seconds, "passes": passes}


def by_torchattacks(model, images, labels, norm, eps, block, seed):
    import torchattacks

    x, y = to_float(images), labels
    begin = time.process_time()
    clean = right(model, x, y)
    held = clean.clone()
    index = held.nonzero()[:, 0]
    adversary = torchattacks.AutoAttack(
        model, norm=NORMS[norm], eps=clead_eps(eps), version="standard", n_classes=model.num_classes, seed=seed
    )
    with CostMeter(model) as meter:
        if len(index):
            x_adv = adversary(x[index], y[index])
            held[index] = right(model, x_adv, y[index]) | ~inside(x_adv, x[index], norm, eps)
    return {
        "clean": clean.tolist(),
        "flags": {"all": held.tolist()},
        "seconds": {"all": time.process_time() - begin},
        "passes": {"all": (meter.forwards / len(x), meter.backwards / len(x))},
    }


CONTENDERS = {"clead": ours, "pyautoattack": by_pyautoattack, "torchattacks": by_torchattacks}


def evaluate(name, run, images, threads, norm, eps, block, seed):
    """Load the model and let a contender attack it, in a process of its own."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    model = clead.load(run, weights=load_recipe(str(run / "config.yaml")).eval.weights)
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # for everybody: a user who wants speed does so
    return CONTENDERS[name](model, images.images, images.labels, norm, eps, block, seed)


def summary(blocks):
    """Return totals over the blocks, and how many verdicts differ from ours."""
    names = list(blocks[0])

    def joined(name, stage):
        return [flag for block in blocks for flag in list(block[name]["flags"].values())[stage]]

    n = sum(len(block[names[0]]["clean"]) for block in blocks)
    found = {"n": n, "clean_accuracy": sum(sum(block[names[0]]["clean"]) for block in blocks) / n}
    for name in names:
        seconds = {key: sum(b[name]["seconds"].get(key, 0) for b in blocks) for key in blocks[0][name]["seconds"]}
        stages = {stage: sum(joined(name, i)) / n for i, stage in enumerate(blocks[0][name]["flags"]) if stage != "all"}
        final = joined(name, -1)
        found[name] = {
            "robust_accuracy": sum(final) / n,
            "after": stages,
            "cpu_seconds": seconds,
            "forwards": sum(sum(f for f, _ in b[name]["passes"].values()) * len(b[name]["clean"]) for b in blocks) / n,
            "backwards": sum(sum(f for _, f in b[name]["passes"].values()) * len(b[name]["clean"]) for b in blocks) / n,
        }
        mine = joined("clead", -1)
        found[name]["only_clead_broke"] = sum(f and not m for f, m in zip(final, mine, strict=True))
        found[name]["only_it_broke"] = sum(m and not f for f, m in zip(final, mine, strict=True))
        found[name]["times_clead"] = {
            key: seconds[key] / max(found["clead"]["cpu_seconds"].get(key, 0), 1e-9)
            for key in seconds
            if key in found["clead"]["cpu_seconds"]
        }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--block", type=int, default=250)
    parser.add_argument("--norm", default="linf", choices=list(NORMS))
    parser.add_argument("--eps", default=None, help="the run's own for its own norm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contenders", nargs="*", default=["clead", "pyautoattack"], choices=list(CONTENDERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    run = RunDir.open(arguments.run)
    config = load_recipe(str(run.path / "config.yaml"))
    eps = arguments.eps or config.threat.eps.text
    images = shuffle_if_sorted(config.data.load(config.train.seed).test)
    images = images.subset(torch.arange(min(arguments.images, len(images))))
    what = {
        "run": run.name,
        "norm": arguments.norm,
        "eps": eps,
        "images": len(images),
        "block": arguments.block,
        "threads": arguments.threads,
        "seed": arguments.seed,
        "contenders": arguments.contenders,
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }
    blocks = []
    if arguments.out.exists():
        found = json.loads(arguments.out.read_text())
        if found["what"] != what:
            raise SystemExit(f"{arguments.out} holds another benchmark: {found['what']}")
        blocks = found["blocks"]
    for number, start in enumerate(range(0, len(images), arguments.block)):
        if number < len(blocks):
            continue
        part = images.subset(torch.arange(start, min(start + arguments.block, len(images))))
        turn = number % len(arguments.contenders)
        results = {}
        for name in arguments.contenders[turn:] + arguments.contenders[:turn]:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                results[name] = alone.submit(
                    evaluate,
                    name,
                    run.path,
                    part,
                    arguments.threads,
                    arguments.norm,
                    eps,
                    arguments.block,
                    arguments.seed,
                ).result()
            seconds = {key: round(value, 1) for key, value in results[name]["seconds"].items()}
            print(
                f"block {number} {name}: {sum(list(results[name]['flags'].values())[-1])} held, {seconds}", flush=True
            )
        blocks.append({name: results[name] for name in arguments.contenders})
        content = {"what": what, "summary": summary(blocks), "blocks": blocks}
        arguments.out.write_text(json.dumps(content) + "\n")
    print(json.dumps(json.loads(arguments.out.read_text())["summary"], indent=1))


if __name__ == "__main__":
    main()
