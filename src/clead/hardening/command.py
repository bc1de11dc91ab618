"""What ``clead harden`` does, stage by stage; each goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clead.api import evaluate_run, export_run, read_record, train, write_report
from clead.atomic_io import read_json, write_atomically
from clead.config import RunConfig, load_recipe
from clead.config.overrides import parse_overrides
from clead.errors import UserError
from clead.hardening.plan import HardenOptions, Plan, allow, make_plan, recipe_yaml
from clead.hardening.timing import StepTime, clock_of
from clead.hardening.verdict import Verdict, verdict
from clead.output import tell
from clead.results.record import Record
from clead.runs.directory import RunDir

_STATE = "harden.json"


@dataclass(frozen=True)
class Hardened:
    """What a hardening leaves.

    Attributes:
        folder: with ``recipe.yaml``, ``baseline/`` and ``robust/`` (run directories), ``model/`` (ONNX and card), ``report.html``.
        plan: what was done.
        baseline: the record of the plainly trained model.
        robust: that of the hardened one, on the same images.
        verdict: three sentences.
        seconds: that all of it took.
    """

    folder: Path
    plan: Plan
    baseline: Record
    robust: Record
    verdict: Verdict
    seconds: float


class _Stages:
    """The stages of one hardening, the time that they took, and what is kept of them in the folder."""

    plan: Plan

    def __init__(self, folder: Path, options: HardenOptions, *, show: bool) -> None:
        self.folder, self.options, self.show = folder, options, show
        given = {".".join(keys): value for keys, value in parse_overrides(options.overrides)}
        self.clock = clock_of(given.get("train.clock", "wall"))
        self.spent, self.start = 0.0, self.clock()

    @property
    def elapsed(self) -> float:
        """Seconds of the clock since the start, those before an interruption included."""
        return self.spent + self.clock() - self.start

    def save(self) -> None:
        """Keep plan and time, so that the next call goes on."""
        state = {
            "options": dataclasses.asdict(self.options),
            "seconds": self.elapsed,
            "plan": dataclasses.asdict(self.plan),
        }
        write_atomically(self.folder / _STATE, json.dumps(state, indent=1).encode())

    def load(self) -> None:
        """Take up what an earlier call has left."""
        state = read_json(self.folder / _STATE)
        if tuple(state["options"].pop("overrides")) != self.options.overrides or state["options"] != {
            key: value for key, value in dataclasses.asdict(self.options).items() if key != "overrides"
        }:
            raise UserError(
                f"--resume goes on with the same options; {self.folder} was begun with others; give those, or another --out"
            )
        self.spent = state["seconds"]
        timed = tuple((name, StepTime(**step), passes) for name, step, passes in state["plan"].pop("timed"))
        self.plan = Plan(**state["plan"] | {"timed": timed, "facts": tuple(state["plan"]["facts"])})

    def say(self, number: int, text: str) -> None:
        """Say which stage begins, and how much time is left."""
        if self.show:
            left = max(0.0, 60 * self.options.minutes - self.elapsed)
            tell(f"stage {number} of 4: {text}; {left / 60:.1f} of {self.options.minutes:g} minutes are left")


def harden(
    path: str | Path,
    *,
    minutes: float = 30,
    model: str | None = None,
    weights: str | None = None,
    norm: str = "linf",
    eps: str | float | None = None,
    flip: bool | None = None,
    image_size: int | None = None,
    seed: int = 0,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    resume: bool = False,
    show: bool = True,
) -> Hardened:
    """Harden a network on photographs within ``minutes``: choose it, train it, measure it, export it, and say what came out.

    Args:
        path: the images: a folder of classes, an archive, Parquet …, whatever ``data.name auto`` reads.
        minutes: for everything; training, evaluation, report and export take about so long, ±10 %.
        model: a network, such as ``resnet18``, ``timm:resnet18`` or ``net.py:make``; None: chosen by data and time.
        weights: a file or a run that it begins with.
        norm: linf, l2 or l1.
        eps: radius in pixel units of [0, 1]; None: the usual one of the norm, 8/255 of linf.
        flip: whether training mirrors images; None: unless that looks unsafe.
        image_size: pixels a side; None: chosen.
        seed: of everything that is drawn.
        overrides: ``--group.key VALUE`` for both trainings; attack, method and teacher for the robust one alone. With
            ``--train.clock cpu`` all minutes are those of CPU time, of all threads together, so that a machine that does other
            things as well changes nothing.
        out: a new or empty folder; ``runs/harden-NAME-TIME`` if None.
        resume: go on with what is in ``out``.
        show: show progress on stderr.

    Raises UserError if the data or the network cannot be used; Ctrl-C leaves a folder that ``resume`` goes on with.
    """
    radius = None if eps is None else str(eps)
    options = HardenOptions(str(path), minutes, model, weights, norm, radius, flip, image_size, seed, tuple(overrides))
    folder = (
        Path(out) if out is not None else Path("runs") / f"harden-{Path(path).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    if resume and out is None:
        raise UserError("--resume: goes on with a folder, got none; give the one that was begun: --out FOLDER")
    stages = _Stages(folder, options, show=show)
    if resume and (folder / _STATE).exists():
        stages.load()
    else:
        if folder.exists() and (folder.is_file() or any(folder.iterdir())):
            raise UserError(
                f"--out {folder} is not empty; give an empty or new folder, or add --resume to go on with it"
            )
        stages.plan, _ = make_plan(options)
        folder.mkdir(parents=True, exist_ok=True)
        stages.save()
    if show:
        for line in describe(stages.plan):
            tell(line)
    try:
        return _run(stages)
    finally:
        stages.save()


def _run(stages: _Stages) -> Hardened:
    folder, plan, options = stages.folder, stages.plan, stages.options
    stages.say(1, f"plain training of {plan.network}, for comparison")
    if not (folder / "baseline.yaml").exists():
        write_atomically(folder / "baseline.yaml", recipe_yaml(plan, "baseline").encode())
    _train(stages, "baseline", folder / "baseline.yaml")
    stages.say(2, f"robust training of {plan.network}")
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        # What is left when the plan is made and the baseline trained, without what evaluation and the rest need.
        left = 60 * options.minutes - stages.elapsed - plan.seconds["evaluation"] - 0.5 * plan.seconds["rest"]
        minutes = max(0.25 * plan.seconds["robust"], left) / 60
        plan = stages.plan = dataclasses.replace(
            plan, robust={**plan.robust, "train": {**plan.robust["train"], "minutes": round(minutes, 3)}}
        )
        write_atomically(recipe, recipe_yaml(plan, "robust").encode())
        stages.save()
    _train(stages, "robust", recipe)
    stages.say(3, f"attack of both on the first {plan.evaluated} test images, suite quick")
    records = {name: _evaluate(stages, name, plan.evaluated) for name in ("baseline", "robust")}
    stages.say(4, "report, ONNX file and model card")
    write_report([folder / "robust", folder / "baseline"], folder / "report.html", title=f"Hardened: {plan.network}")
    if not (folder / "model").exists():
        export_run(folder / "robust", out=folder / "model", show=False)
    history = RunDir.open(folder / "robust").history()
    minutes, steps = plan.robust["train"]["minutes"], plan.robust["attack"].get("steps", 1)
    outcome = verdict(records["baseline"], records["robust"], history, minutes, steps)
    write_atomically(folder / "verdict.txt", "\n".join([*outcome.lines(), ""]).encode())
    return Hardened(folder, plan, records["baseline"], records["robust"], outcome, stages.elapsed)


def _config(stages: _Stages, recipe: Path) -> RunConfig:
    allow(stages.options)
    return load_recipe(str(recipe))


def _train(stages: _Stages, name: str, recipe: Path) -> None:
    path = stages.folder / name
    if not (path / "outcome.json").exists():
        train(_config(stages, recipe), out=path, resume=path.exists(), show=stages.show)
        stages.save()


def _evaluate(stages: _Stages, name: str, images: int) -> Record:
    path = stages.folder / name
    if not (path / "results" / "evaluation.json").exists():
        config = RunDir.open(path).config()
        chosen = dataclasses.replace(config.eval, images=images)
        evaluate_run(path, config=dataclasses.replace(config, eval=chosen), show=stages.show)
        stages.save()
    return read_record(path)


def describe(plan: Plan) -> list[str]:
    """Return the plan in words, one line each."""
    lines = [f"data: {fact}" for fact in plan.facts]
    for name, step, passes in plan.timed:
        chosen = "  <- chosen" if name == plan.network else ""
        lines.append(
            f"network: {name}: {1000 * step.seconds:.1f} ms an image and step in {step.precision}, {passes:.0f} passes{chosen}"
        )
    robust = plan.robust
    reason = plan.reasons.get("model", "")
    lines.append(f"plan: {plan.network} ({reason})")
    size = robust["data"].get("image_size", "as stored")
    lines.append(
        f"plan: image size {size}, batch {robust['data']['batch_size']}, method {robust['method']['name']}, "
        f"{robust['threat']['norm']} {robust['threat']['eps']}"
    )
    spent = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in plan.seconds.items())
    lines.append(f"plan: minutes: {spent}; evaluation on {plan.evaluated} test images")
    return lines


def summary(hardened: Hardened) -> dict[str, Any]:
    """Return what ``--json`` writes."""
    return {
        "folder": str(hardened.folder),
        "network": hardened.plan.network,
        "seconds": round(hardened.seconds, 1),
        "n": hardened.robust.data.n,
        "clean_accuracy": hardened.robust.clean_accuracy,
        "robust_accuracy": hardened.robust.robust_accuracy,
        "baseline_clean_accuracy": hardened.baseline.clean_accuracy,
        "baseline_robust_accuracy": hardened.baseline.robust_accuracy,
        "verdict": dataclasses.asdict(hardened.verdict),
    }
