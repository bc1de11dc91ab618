"""Robust accuracy at equal CPU minutes: our recipes against the peers' own code, on the same network and the same images.

    git clone https://github.com/fzjcdt/FastAT_Benchmark; git clone https://github.com/Harry24k/MAIR
    pip install --no-deps torchattacks==3.5.1 torchvision==0.28.0
    CLEAD_DATA=... python benchmarks/minutes.py --fastat FastAT_Benchmark --mair MAIR --out benchmarks/minutes.json

``--base``, one of our recipes, says which images, which network (with its first weights) and which threat. Peers train with their
own classes, settings and schedules, unmodified; what is replaced is the data path: batches are made by our loader, which is faster
than theirs. Their length is in epochs: a trial says what a step costs, and they are told of as many epochs as the minutes have room
for, but of ``EPOCHS`` at least, since their rate is that of the epoch and all but 0 in the last; whatever they do at a given epoch
is scaled with that. An epoch ends when it has taken its share of the minutes, that of MAIR, which wants to know how many batches it
has, after as many as the trial says. They are given more than we are: their validation (1,000 images, after each epoch) is outside
their minutes, ours is inside. ``cpu_minutes`` is what each really used, of one thread. Ours follow the clock, too:
``train.minutes`` with ``train.clock cpu``.

Every model is then attacked by the same suite on the same test images. One job after another, contenders interleaved, each in a
fresh process; the JSON file is written after each, and the same command goes on where it was stopped (within an attack; ours within
a training, too). Rows of other settings than those now given are refused.
"""

import argparse
import copy
import json
import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

ONE_STEP = "cifar10-small-fgsm-rs --method.fold_batch_norm true --train.ema 0.9995 --method.label_smoothing 0.4"
OURS = {
    "n_fgsm": f"{ONE_STEP} --method.name n_fgsm",
    "nuat": f"{ONE_STEP} --method.name nuat",
    "fgsm_pgi": f"{ONE_STEP} --method.name fgsm_pgi",
    "fgsm_rs_cs": f"{ONE_STEP} --method.name fgsm_rs_cs",
    "liet": "cifar10-small-fgsm-rs --method.fold_batch_norm true --train.ema 0.9995 --method.name liet",
    "pgd_at": "cifar10-small-pgd-at --train.ema 0.9995 --method.label_smoothing 0.4",
}
FASTAT = ("fgsm_rs", "n_fgsm", "nu_at", "fgsm_pgi", "fgsm_rs_cs", "liet", "pgd_at_wa")
TRIAL, EPOCHS = 8, 20  # steps of a trial epoch; least epochs that a peer is told of
SAVE_SELDOM = "--train.checkpoint_seconds=300"
"""What fgsm_pgi remembers takes 3 s of CPU to save, and peers save nothing."""


class Batches:
    """A loader as the peers want one: ``len``, ``dataset``, and batches (images, labels), led by their index if asked for.

    ``step_seconds`` is what a step of the last epoch took, ``outside`` the CPU seconds that do not count.
    """

    def __init__(self, splits, augment, batch_size: int, seed: int, *, indexed: bool = False) -> None:
        from clead.data.loaders import Loader, ViewSettings

        self.loader = Loader(splits.train, batch_size, seed=seed, drop_last=True, views=ViewSettings(first=augment))
        self.dataset, self.indexed, self.step_seconds = Images(splits.train), indexed, 0.0

    def begin(self, steps: int, seconds: float = math.inf) -> None:
        """Begin a training whose epochs have so many steps, but end when each so far has had so many CPU seconds."""
        self.steps, self.seconds, self.epoch, self.taken = steps, seconds, 0, 0
        self.outside, self.begun = 0.0, time.process_time()

    def spent(self) -> float:
        """Return the CPU seconds of the training so far."""
        return time.process_time() - self.begun - self.outside

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):
        self.epoch += 1
        start, before = self.spent(), self.taken
        try:
            while self.taken < before + self.steps:
                if self.taken > before and self.spent() >= self.epoch * self.seconds:
                    return
                batch = self.loader.batch(*divmod(self.taken, self.loader.steps_per_epoch))
                self.taken += 1
                yield (batch.index, batch.images, batch.labels) if self.indexed else (batch.images, batch.labels)
        finally:  # MAIR leaves at the last batch
            self.step_seconds = (self.spent() - start) / max(1, self.taken - before)


class Images:
    """Images as a data set of (index, image, label)."""

    def __init__(self, image_set) -> None:
        self.image_set = image_set

    def __len__(self) -> int:
        return len(self.image_set)

    def __getitem__(self, index: int):
        return index, self.image_set.images[index].float() / 255, self.image_set.labels[index]


def setting(base: str, overrides: list[str], seed: int):
    """Return the base recipe, the images, which are those of seed 0 whatever the seed, and the network with its first weights."""
    import clead
    from clead.runs.loading import build

    config = clead.load_recipe(base, overrides)
    splits = config.data.load(0)
    return config, splits, build(replace(config, train=replace(config.train, seed=seed)), splits)


def import_torchvision() -> None:
    """Import torchvision, whose compiled part need not fit PyTorch: the peers import it for data and networks, not used here."""
    import torch

    sys.path.append(str(Path(sys.prefix) / "networks"))
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor a) -> Tensor")
        import torchvision  # noqa: F401


def fastat(checkout: Path, method: str, model, loaders, job: dict, epochs: int, folder: Path) -> Path:
    """Train ``model`` by the FastAT benchmark's own class for ``epochs`` epochs of the loader; return where its weights are."""
    import main as peer
    import torch

    train, validation = loaders
    configs = checkout / "configs" / "cifar10"
    config = peer.load_config(str(configs / "common.yaml"), str(configs / f"{method}.yaml"))
    scale = epochs / config["total_epoch"]
    config |= {"log_dir": str(folder), "total_epoch": epochs, "eps": job["eps"]}
    if "epochs_reset" in config:
        config["epochs_reset"] = max(1, round(config["epochs_reset"] * scale))
    if "decay_arr" in config:
        config["decay_arr"] = [round(each * scale) for each in config["decay_arr"]]
    optimizer, scheduler = peer.get_optimizer_and_scheduler(model, config, train)
    trainer = peer.METHOD_MAP[method](model, config=config, name=method, device=torch.device("cpu"), seed=job["seed"])

    def timed(function):
        def call(*arguments):
            start = time.process_time()
            result = function(*arguments)
            train.outside += time.process_time() - start
            return result

        return call

    name = "_validate_with_weight_average" if config["weight_average"] else "_validate_model"
    setattr(trainer, name, timed(getattr(trainer, name)))
    trainer.train(optimizer, scheduler, train, validation)
    return Path(trainer.output_dir) / "best.pth"


def mair(checkout: Path, method: str, model, loaders, job: dict, epochs: int, folder: Path) -> Path:
    """Train ``model`` by MAIR's AT, as its README does it, with weight decay besides, for ``epochs`` epochs of the loader.

    It validates nothing; the last weights count.
    """
    import torch
    from mair import RobModel
    from mair.defenses import AT

    trainer = AT(RobModel(model, n_classes=job["classes"]), eps=job["eps"], alpha=2 / 255, steps=10)
    milestones = [round(epochs * part) for part in (0.5, 0.75)]
    trainer.setup(
        optimizer="SGD(lr=0.1, momentum=0.9, weight_decay=5e-4)",
        scheduler=f"Step(milestones={milestones}, gamma=0.1)",
        scheduler_type="Epoch",
        n_epochs=epochs,
    )
    trainer.fit(loaders[0], n_epochs=epochs, record_type=None, save_type=None)
    torch.save(model.state_dict(), folder / "last.pth")
    return folder / "last.pth"


def train_peer(job: dict, config, splits, model, folder: Path) -> dict:
    """Train by a peer's code for the minutes of the job, or find it trained, and leave its weights in ``model``."""
    import torch

    trained, what = folder / "trained.pth", {key: job[key] for key in ("base", "overrides", "validation")}
    if trained.exists():
        weights, figures, before = torch.load(trained, weights_only=True)
        if before != what:
            raise ValueError(f"{folder} was trained with {before}, now given {what}; give the same, or another --work")
        model.load_state_dict(weights)
        return figures
    peer, method = job["contender"].split(" ")
    checkout = Path(job["checkout"])
    sys.path.insert(0, str(checkout))
    import_torchvision()
    os.chdir(folder)
    indexed = method in ("fgsm_pgi", "fgsm_pco", "fgsm_mep_cs")
    loader = Batches(splits, config.data.augment, 128, job["seed"], indexed=indexed)
    images = splits.val.images[: job["validation"]].float() / 255
    validation = list(zip(images.split(128), splits.val.labels[: len(images)].split(128), strict=True))
    run = {"fastat": fastat, "mair": mair}[peer]
    trial, few = copy.deepcopy(model), [tuple(each[:2] for each in validation[0])]
    loader.begin(TRIAL)
    run(checkout, method, trial, (loader, few), job, 2, folder)  # the second epoch counts: first steps take longer
    seconds = 60 * job["minutes"]
    epochs = max(EPOCHS, round(seconds / loader.step_seconds / loader.loader.steps_per_epoch))
    if peer == "mair":
        loader.begin(max(1, round(seconds / loader.step_seconds / epochs)))
    else:
        loader.begin(sys.maxsize, seconds / epochs)
    weights = run(checkout, method, model.train(), (loader, validation), job, epochs, folder)
    figures = {"cpu_minutes": loader.spent() / 60, "steps": loader.taken, "told_epochs": epochs}
    model.load_state_dict(torch.load(weights, weights_only=True))
    torch.save((model.state_dict(), figures, what), trained.with_suffix(".new"))
    trained.with_suffix(".new").replace(trained)
    return figures


def train_ours(job: dict, config, splits, model, folder: Path) -> dict:
    """Train by one of our recipes for the minutes of the job, and leave its best weights in ``model``."""
    import clead
    from clead.weights.files import load_weights

    clock = ["--train.minutes", str(job["minutes"]), "--train.clock", "cpu", "--train.seed", str(job["seed"])]
    recipe, *given = job["recipe"].split()
    ours = clead.load_recipe(recipe, [SAVE_SELDOM, *given, *job["overrides"], *clock])
    if (ours.model, ours.threat) != (config.model, config.threat):
        raise ValueError(f"{job['contender']}: {recipe} has another network or threat than {job['base']}")
    outcome = clead.train(ours, data=splits, out=folder / "run", resume=True, show=False).outcome
    model.load_state_dict(load_weights(folder / "run" / "best.safetensors")[0])
    return {"cpu_minutes": outcome.cpu_seconds / 60, "steps": outcome.steps}


def carry_out(job: dict, folder: Path) -> dict:
    """Train and attack; return a row of the JSON file."""
    import torch

    torch.set_num_threads(1)
    import clead
    from clead.data.base import shuffle_if_sorted

    folder = folder.resolve()  # peers change the directory
    folder.mkdir(parents=True, exist_ok=True)
    config, splits, model = setting(job["base"], job["overrides"], job["seed"])
    eps = float(config.threat.eps)
    job = job | {"eps": eps, "classes": len(splits.classes)}
    done = (train_ours if "recipe" in job else train_peer)(job, config, splits, model, folder)
    test = shuffle_if_sorted(splits.test)
    record = clead.evaluate(
        model.eval(),
        test.images[: job["images"]],
        test.labels[: job["images"]],
        suite=job["suite"],
        norm=config.threat.norm,
        eps=str(config.threat.eps),
        state=folder / "evaluation",
        check_images=0,
        curve_points=0,
        gallery=0,
    )
    return {
        **done,
        "clean_accuracy": record.clean_accuracy,
        "robust_accuracy": record.robust_accuracy,
        "robust_flags": "".join("01"[flag] for flag in record.robust),
    }


def table(rows: list[dict]) -> str:
    """Return mean robust accuracies, contenders by minutes."""
    minutes = sorted({row["minutes"] for row in rows})
    lines = [" " * 24 + "".join(f"{each:>10g}" for each in minutes)]
    for name in dict.fromkeys(row["contender"] for row in rows):
        cells = []
        for each in minutes:
            found = [row["robust_accuracy"] for row in rows if (row["contender"], row["minutes"]) == (name, each)]
            cells.append(f"{100 * sum(found) / len(found):10.1f}" if found else " " * 10)
        lines.append(f"{name:24}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    from clead.atomic_io import write_atomically

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fastat", type=Path, help="a checkout of the FastAT benchmark")
    parser.add_argument("--mair", type=Path, help="a checkout of MAIR")
    parser.add_argument("--ours", nargs="*", default=list(OURS), help="of OURS in this file")
    parser.add_argument("--methods", nargs="*", default=list(FASTAT), choices=FASTAT, help="of the FastAT benchmark")
    parser.add_argument("--base", default="cifar10-small-pgd-at")
    parser.add_argument("--overrides", default="", help="of the base, and of all our recipes")
    parser.add_argument("--minutes", type=float, nargs="+", default=[10, 20, 40])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--validation", type=int, default=1000, help="images on which the peers validate")
    parser.add_argument("--suite", default="standard")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/minutes"))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    contenders = {f"clead {name}": {"recipe": OURS[name]} for name in given.ours}
    if given.fastat:
        contenders |= {f"fastat {name}": {"checkout": str(given.fastat.resolve())} for name in given.methods}
    if given.mair:
        contenders["mair AT"] = {"checkout": str(given.mair.resolve())}
    common = {"base": given.base, "overrides": given.overrides.split(), "images": given.images, "suite": given.suite}
    rows = json.loads(given.out.read_text()) if given.out.exists() else []
    for row in rows:
        now = common | {key: value for key, value in contenders.get(row["contender"], {}).items() if key == "recipe"}
        if changed := [key for key, value in now.items() if row[key] != value]:
            sys.exit(f"{given.out} has rows of another {', '.join(changed)}; give the same, or another --out")
    done = {(row["contender"], row["minutes"], row["seed"]) for row in rows}
    jobs = [
        common | how | {"contender": name, "minutes": minutes, "seed": seed, "validation": given.validation}
        for seed in given.seeds
        for minutes in sorted(given.minutes)
        for name, how in contenders.items()
        if (name, minutes, seed) not in done
    ]
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.workers, mp_context=spawned, max_tasks_per_child=1) as pool:
        started, failed = [], False
        for job in jobs:
            name = f"{job['contender']}-{job['minutes']:g}-s{job['seed']}".replace(" ", "-")
            started.append((job, pool.submit(carry_out, job, given.work / name)))
        for job, result in started:
            about = {key: value for key, value in job.items() if key not in ("checkout", "validation")}
            if result.exception() is not None:
                print(f"{job['contender']} failed: {result.exception()!r}", flush=True)
                failed = True
                continue
            rows.append(about | result.result())
            write_atomically(given.out, (json.dumps(rows, indent=1) + "\n").encode())
            short = {key: value for key, value in result.result().items() if key != "robust_flags"}
            print(f"{job['contender']}, {job['minutes']:g} minutes, seed {job['seed']}: {short}", flush=True)
    print(table(rows))
    sys.exit(failed)


if __name__ == "__main__":
    main()
