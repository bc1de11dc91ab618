"""Run variants of recipes over seeds, two at a time, and keep every result: a queue that goes on where it was stopped.

python studies/study.py studies/study_headline/digits.yaml

The YAML file names the recipes, seeds (a variant may have its own), common overrides and variants, and the suites to evaluate
with (the first one's result is ``robust_accuracy``; by default what the overrides say). Results go to the JSON file of the same
name: one row per (variant, seed) with accuracies, overrides and seconds; rows that exist are not run again, and a study whose
recipes or overrides have changed since is refused. ``--eval.split val`` among the overrides keeps the test set untouched. Each run
has one thread, so that two share a machine of two cores without changing each other's result. Run directories are in ``--work``,
where a training or an evaluation that was stopped (Ctrl-C, SIGTERM) goes on. A run that fails is reported, and the others go on;
where its process is killed, all stop.
Variables of the environment in overrides, such as $CLEAD_DATA, are filled in when a run starts.
``evaluate``, of the study or a variant, are overrides of the evaluation alone, such as other classes for retrieval.
A variant that ``needs`` another one is run after it; NEEDED in its overrides is the other's run directory of the same seed, and
its compute counts, too.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import yaml


def fingerprint(recipe: str, overrides: list[str]) -> str:
    """Return a digest of what a recipe says, without its comments, and of the overrides."""
    from clead.config import recipe_text

    said = json.dumps([yaml.safe_load(recipe_text(recipe)[1]), overrides], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def run(
    recipe: str, overrides: list[str], evaluation: list[str], seed: int, suites: list[str | None], path: Path
) -> dict:
    """Train one variant and return its clean and worst-case accuracies on the evaluation split."""
    import torch

    torch.set_num_threads(1)
    import clead

    start = time.time()
    config = clead.load_recipe(recipe, [*overrides, "--train.seed", str(seed)])
    trained = clead.train(config, out=path, resume=True, show=False)
    config = clead.load_recipe(recipe, [*overrides, *evaluation, "--train.seed", str(seed)])
    row = {"forward_equivalents": trained.outcome.forward_equivalents, "training_seconds": trained.outcome.seconds}
    if trained.outcome.cpu_seconds is not None:
        row["cpu_seconds"] = trained.outcome.cpu_seconds
    for suite in suites:
        chosen = config if suite is None else replace(config, eval=replace(config.eval, suite=suite))
        record = clead.evaluate_run(path, config=chosen, result=suite or "evaluation", show=False).record
        if "robust_accuracy" not in row:
            row |= {
                "clean_accuracy": record.clean_accuracy,
                "robust_accuracy": record.robust_accuracy,
                "split": record.data.split,
                "n": record.data.n,
            }
            if record.masks is None:
                row["robust_flags"] = "".join("01"[flag] for flag in record.robust)  # one for each image
            else:  # pixels of each image and class, from which all figures follow
                row |= {key: getattr(record.masks, key) for key in ("clean", "lowest_accuracy", "lowest_miou")}
            if record.metrics:
                row["metrics"] = {each.name: [each.clean, each.robust] for each in record.metrics}
        if record.transferred is not None:  # of images stored by C-LEAD as published: right, but no robustness
            row["transferred_accuracy"] = record.transferred.robust.accuracy
            row["transferred_fooled"] = record.transferred.fooled  # the model that they were made for
        if suite is not None:
            row.setdefault("suites", {})[suite] = {
                "robust_accuracy": record.robust_accuracy,
                "after": {part.name: part.robust.accuracy for part in record.attacks},
                "notes": record.notes,
            }
    return {**row, "seconds": time.time() - start}


KEYS = {"recipe", "set", "seeds", "suites", "needs", "evaluate"}
"""What a variant may say."""


def stop(*_) -> None:
    """On SIGTERM: the workers end with their queue, at once; runs go on from what they last saved."""
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.exit("stopped; the same command goes on from here")


def folder(work: Path, name: str, seed: int) -> Path:
    return work / f"{name.replace(' ', '-')}-s{seed}"


def main() -> None:
    from clead.atomic_io import write_atomically

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, help="run directories; runs/study-NAME by default")
    parser.add_argument("--only", nargs="*", help="these variants")
    arguments = parser.parse_args()
    study = yaml.safe_load(arguments.study.read_text())
    out = arguments.study.with_suffix(".json")
    work = arguments.work or Path("runs") / f"study-{arguments.study.stem}"
    rows = json.loads(out.read_text()) if out.exists() else []
    os.environ["OMP_NUM_THREADS"] = "1"
    for name, each in study["variants"].items():
        if unknown := set(each) - KEYS:  # such as what follows a comma of a text without quotes
            sys.exit(
                f"{arguments.study}: variant {name!r} has {', '.join(map(str, unknown))}; a variant takes {', '.join(sorted(KEYS))}"
            )
    variants = {name: each for name, each in study["variants"].items() if not arguments.only or name in arguments.only}

    def given(name):
        return [*study.get("common", "").split(), *study["variants"][name].get("set", "").split()]

    def asked(name):
        return study["variants"][name].get("evaluate", study.get("evaluate", "")).split()

    prints = {name: fingerprint(each["recipe"], given(name) + asked(name)) for name, each in study["variants"].items()}
    changed = [row for row in rows if row["variant"] in prints and row.get("fingerprint") != prints[row["variant"]]]
    if changed:
        said = ", ".join(f"{row['variant']} seed {row['seed']}" for row in changed)
        sys.exit(
            f"{out} has rows of other recipes or overrides than {arguments.study} now says: {said}; delete these rows"
        )
    done = {(row["variant"], row["seed"]) for row in rows}
    waiting = [
        (name, seed) for seed in study["seeds"] for name, each in variants.items() if seed in each.get("seeds", [seed])
    ]
    waiting = [job for job in waiting if job not in done]
    for name, seed in tuple(waiting):  # where the run directories are gone, what is needed is run again
        needs = variants[name].get("needs")
        if needs is not None and (needs, seed) not in waiting and not folder(work, needs, seed).exists():
            waiting.insert(0, (needs, seed))
    failed = []

    def start(pool, name, seed):
        variant = study["variants"][name]
        needed = str(folder(work, variant["needs"], seed)) if "needs" in variant else ""
        overrides, evaluation = (
            [os.path.expandvars(value.replace("NEEDED", needed)) for value in values]
            for values in (given(name), asked(name))
        )
        suites = variant.get("suites", study.get("suites", [None]))
        about = {"variant": name, "seed": seed, "recipe": variant["recipe"], "overrides": given(name)}
        job = pool.submit(run, variant["recipe"], overrides, evaluation, seed, suites, folder(work, name, seed))
        about |= {"evaluation": asked(name)} if asked(name) else {}
        return job, about | {"fingerprint": prints[name]}

    def keep(job, about):
        said = f"{about['variant']} seed {about['seed']}"
        if isinstance(job.exception(), BrokenProcessPool):
            raise job.exception()
        if job.exception() is not None:
            failed.append(said)
            return print(f"{said} failed: {job.exception()}", flush=True)
        row = about | job.result()
        needs = study["variants"][about["variant"]].get("needs")
        row["forward_equivalents"] += sum(
            old["forward_equivalents"] for old in rows if (old["variant"], old["seed"]) == (needs, about["seed"])
        )
        rows[:] = [old for old in rows if (old["variant"], old["seed"]) != (row["variant"], row["seed"])]
        rows.append(row)
        rows.sort(key=lambda row: (row["variant"], row["seed"]))
        write_atomically(out, (json.dumps(rows, indent=1) + "\n").encode())
        print(f"{said}: {job.result()}", flush=True)

    try:
        # A worker alone that is told to stop does so, instead of inheriting what the queue does then.
        with ProcessPoolExecutor(
            arguments.workers, initializer=signal.signal, initargs=(signal.SIGTERM, signal.SIG_DFL)
        ) as pool:
            signal.signal(signal.SIGTERM, stop)
            running = {}
            while waiting or running:
                missing = {*waiting, *((about["variant"], about["seed"]) for about in running.values())}
                ready = [job for job in waiting if (study["variants"][job[0]].get("needs"), job[1]) not in missing]
                for name, seed in ready[: arguments.workers - len(running)]:
                    waiting.remove((name, seed))
                    job, about = start(pool, name, seed)
                    running[job] = about
                done = wait(running, return_when=FIRST_COMPLETED).done
                for job in sorted(done, key=lambda job: job.exception() is not None):  # what has a result first
                    keep(job, running.pop(job))
    except BrokenProcessPool:
        sys.exit("a run was killed, or lacked memory; the same command goes on from here")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the command given again tries them again")


if __name__ == "__main__":
    main()
