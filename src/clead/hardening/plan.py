"""The plan of a hardening: what the data are, which network, how it learns, and what the minutes go to."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clead.config import RunConfig
from clead.config.overrides import change, parse_overrides
from clead.config.schema import LENGTHS
from clead.data.survey import Survey, survey
from clead.devices import device_of
from clead.errors import UserError, did_you_mean
from clead.hardening.candidates import Candidate, candidates, training
from clead.hardening.timing import StepTime, attack_seconds, time_steps
from clead.interfaces import Splits
from clead.models import is_library
from clead.models.external import ModelError
from clead.runs.loading import build, data_notes
from clead.settings import WrittenFloat, WrittenInt
from clead.threats import THREATS
from clead.training.freezing import start_from

BASELINE, EVALUATION, REST = 0.08, 0.2, 0.06
"""Shares of the minutes, the evaluation's at most; the rest is reading, timing, report and export. Training has what is left."""
PASSES = 20
"""Passes over the training images that a network from scratch needs to be worth its size."""
BALANCED = 3
"""Classes are drawn equally often where the largest has more than so many times the images of the smallest."""
BATCH, PRETRAINED_BATCH, STEPS = 128, 64, 1000
"""The usual batches, from scratch and pre-trained, and the steps below which a smaller one is taken from scratch."""
SMALL_BATCH, ENOUGH_STEPS = 32, 3000
"""A network from scratch has to take so many steps, of so small a batch if need be, and a pre-trained one gets a smaller batch
below them (docs/harden.md has the trials)."""
_VALIDATION = 0.05  # of the training time
_SMALLEST = 32  # pixels a side, below which images are not made smaller to save time
_QUICK_STEPS = 240  # gradient steps per image of suite quick, its checks and its curve included
_OPTIONS = {
    "data.image_size": "--image-size",
    "data.augment.flip": "--flip",
    "model.name": "--model",
    "threat.norm": "--norm",
    "threat.eps": "--eps",
    "train.seed": "--seed",
    "train.start_from": "--weights",
}
"""Keys that the plan goes by, and the option that says the same to it."""
_ROBUST_ALONE = ("attack.", "method.", "train.teacher")
"""Keys that the plain training, which is compared with, does not take over."""


@dataclass(frozen=True)
class HardenOptions:
    """What a user asks for.

    Attributes:
        path: of the images: whatever ``data.name auto`` reads.
        minutes: for everything.
        model: a network: a registered name, ``timm:NAME`` and the like, or ``file.py:factory``; None: chosen.
        weights: a file or run that it begins with.
        norm, eps: the threat; eps None: the usual radius of its norm.
        flip: whether training mirrors images; None: as the survey says.
        image_size: pixels a side; None: chosen.
        seed: of everything that is drawn.
        overrides: ``--group.key VALUE`` for both trainings; ``attack``, ``method`` and ``train.teacher`` for the robust one alone.
    """

    path: str
    minutes: float = 30.0
    model: str | None = None
    weights: str | None = None
    norm: str = "linf"
    eps: str | None = None
    flip: bool | None = None
    image_size: int | None = None
    seed: int = 0
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What will be done.

    Attributes:
        network: the chosen one, as users read it.
        baseline, robust: complete recipes.
        reasons: key → why it has its value, for the recipe's comments.
        facts: what was found in the data, one sentence each.
        timed: every network that was timed, its fastest step, and passes over the data that fit.
        seconds: stage → its share, in seconds.
        evaluated: test images that the evaluation at the end has time for.
    """

    network: str
    baseline: Mapping[str, Any]
    robust: Mapping[str, Any]
    reasons: Mapping[str, str]
    facts: tuple[str, ...]
    timed: tuple[tuple[str, StepTime, float], ...]
    seconds: Mapping[str, float]
    evaluated: int


@dataclass(frozen=True)
class _Timed:
    candidate: Candidate
    step: StepTime
    passes: float


def make_plan(options: HardenOptions) -> tuple[Plan, Splits]:
    """Read the data, time a training step of each network, and choose; return the plan and the images.

    Raises UserError if the data cannot be read, or nothing can be trained in the time.
    """
    if not 1 <= options.minutes < math.inf:
        raise UserError(f"--minutes must be at least 1, and finite, got {options.minutes:g}; give such as --minutes 30")
    if options.norm not in THREATS.names():
        raise UserError(f"--norm: unknown threat {options.norm!r}; {did_you_mean(options.norm, THREATS.names())}")
    if options.weights is not None and options.model is None:
        raise UserError(
            f"--weights: the network that they are of is not named, got {options.weights}; add --model, such as --model resnet18"
        )
    allow(options)
    data = {"name": "auto", "path": str(Path(options.path).absolute())}
    described = survey(_config({"data": data, "train": _train(options)}, options, only="data.").data)
    data, reasons = _data_group(data, described, options)
    choices = candidates(described, options.model, has_weights=_has_weights(options))
    limit = 60 * options.minutes * (1 - BASELINE - EVALUATION - REST)
    smaller = [size for size in described.image_sizes if _SMALLEST <= size < data.get("image_size", described.sides[1])]
    if options.image_size is not None or choices[0].pretrained:
        smaller = []
    data, trees, splits, first = _at_affordable_size(data, choices, smaller, options, limit)
    if data.get("image_size") in smaller:
        reasons["data.image_size"] = "larger images leave too few passes in the time: more --minutes, or --image-size"
    timed = [first]
    for tree, each in zip(trees[1:], choices[1:], strict=True):
        if timed[-1].passes >= passes_needed(len(splits.train)):  # a larger network is not taken otherwise
            timed.append(_timed(tree, each, splits, options, limit))
    chosen = choose(timed, len(splits.train))
    tree = trees[choices.index(chosen.candidate)]
    step = chosen.step
    fast = {"precision": step.precision, "channels_last": step.channels_last, "compile": step.compile}
    reasons |= _training_reasons(chosen, timed, options, len(splits.train))
    config = _config(tree, options)
    model = build(config, splits)
    if options.weights is not None:
        start_from(model, Path(options.weights), classes=splits.classes)  # raises before anything is written
    gradient = attack_seconds(config, splits, model)
    affordable = int(60 * options.minutes * EVALUATION / (_QUICK_STEPS * gradient))
    evaluated = max(min(50, len(splits.test)), min(affordable, len(splits.test)))
    validated, every = _validation(splits, chosen, gradient, limit)
    train = {**fast, "validate_images": validated, "validate_every": every}
    seconds = _seconds(options.minutes, evaluated * _QUICK_STEPS * gradient)
    data["batch_size"] = _batch_size(chosen, len(splits.train))
    reasons["data.batch_size"] = (
        f"the largest usual one with which about {_steps(chosen.candidate):,} steps are taken, but 16 at least, and half of the "
        "images at most"
    )
    reasons |= dict.fromkeys(reasons.keys() & _given(options).keys(), "you asked for it")
    tree = _tree(chosen.candidate, data, options, robust=True)
    plain = _tree(chosen.candidate, data, options, robust=False)
    plan = Plan(
        chosen.candidate.name,
        _complete(plain, {**train, "minutes": seconds["baseline"] / 60}, options, without=_ROBUST_ALONE),
        _complete(tree, {**train, "minutes": seconds["robust"] / 60}, options),
        reasons,
        (*described.sentences(), *data_notes(splits)),
        tuple((each.candidate.name, each.step, each.passes) for each in timed),
        seconds,
        evaluated,
    )
    return plan, splits


def _at_affordable_size(
    data: dict[str, Any], choices: Sequence[Candidate], smaller: Sequence[int], options: HardenOptions, limit: float
) -> tuple[dict[str, Any], list[dict[str, Any]], Splits, _Timed]:
    """Return the ``data`` group, each network's recipe, the images, and the first network, timed.

    The images are as large as ``data`` says, or of the largest size of ``smaller`` at which the first network passes often enough
    over them, or else of the smallest. A network that takes no other size gets the one that it takes.
    """

    def at(data: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]], Splits, _Timed]:
        trees = [_tree(candidate, data, options, robust=True) for candidate in choices]
        splits = _config(trees[0], options).data.load(options.seed)
        return data, trees, splits, _timed(trees[0], choices[0], splits, options, limit)

    try:
        made = at(data)
    except ModelError as error:
        if options.image_size is not None:
            raise
        raise ModelError(f"{error}; if it is made for other images, add --image-size or --data.channels 3") from error
    for size in sorted(smaller, reverse=True):
        if made[-1].passes >= 3 * PASSES:
            break
        try:
            made = at({**data, "image_size": size, "augment": {**data["augment"], "crop": max(1, size // 8)}})
        except UserError:
            break
    return made


def allow(options: HardenOptions) -> None:
    """Let the code run that the user named as the network."""
    if options.model is not None and ":" in options.model and not is_library(options.model):
        from clead.models.user_model import allow_code

        allow_code(options.model)


def _seconds(minutes: float, evaluation: float) -> dict[str, float]:
    """Return the seconds of each stage; what the evaluation leaves of its share goes to the robust training."""
    whole = 60 * minutes
    evaluation = min(evaluation, EVALUATION * whole)
    robust = (1 - BASELINE - REST) * whole - evaluation
    return {"baseline": BASELINE * whole, "robust": robust, "evaluation": evaluation, "rest": REST * whole}


def passes_needed(images: int) -> float:
    """Return how often a network from scratch has to pass over so many images to learn enough."""
    return max(PASSES, ENOUGH_STEPS * SMALL_BATCH / images)


def choose(timed: Sequence[_Timed], images: int) -> _Timed:
    """Return the network to train.

    The largest that passes over the images often enough, or else the smallest.
    """
    enough = [each for each in timed if each.passes >= passes_needed(images)]
    return enough[-1] if enough else timed[0]


def _steps(candidate: Candidate) -> int:
    """Return the steps for which a batch is made smaller than the usual one."""
    return ENOUGH_STEPS if candidate.pretrained else STEPS


def _batch_size(chosen: _Timed, images: int) -> int:
    """Return a power of two: the largest, up to the usual one, with which enough steps fit into the passes; 16 or more."""
    usual = PRETRAINED_BATCH if chosen.candidate.pretrained else BATCH
    fitting = max(1.0, chosen.passes * images / _steps(chosen.candidate))
    return min(usual, max(16, 2 ** int(math.log2(fitting))), max(2, images // 2))


def _timed(
    tree: Mapping[str, Any], candidate: Candidate, splits: Splits, options: HardenOptions, limit: float
) -> _Timed:
    config = _config(tree, options)
    step = time_steps(config, splits, build(config, splits))[0]
    return _Timed(candidate, step, limit / (step.seconds * len(splits.train)))


def _config(tree: Mapping[str, Any], options: HardenOptions, *, only: str = "") -> RunConfig:
    return RunConfig.from_dict(_overridden(tree, options, only=only))


def _overridden(
    tree: Mapping[str, Any], options: HardenOptions, *, only: str = "", without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return a recipe with the user's own keys in it: those that begin with ``only``, and with none of ``without``."""
    tree = copy.deepcopy(dict(tree))
    changes = [(".".join(path), path, _as_written(value)) for path, value in parse_overrides(options.overrides)]
    for key, _, value in changes:
        _refuse_planned(key, value)
    taken = [each for each in changes if each[0].startswith(only) and not each[0].startswith(without)]
    change(tree, [(path, value) for _, path, value in taken])
    return tree


def _refuse_planned(key: str, value: Any) -> None:
    """Raise UserError for a key that the plan decides."""
    if key in [f"train.{length}" for length in LENGTHS]:
        raise UserError(f"--{key}: --minutes says how long, got {value}; leave it out")
    if option := _OPTIONS.get(key):
        value = ("no", "yes")[value] if isinstance(value, bool) else value
        raise UserError(f"--{key}: the plan goes by {option}, got {value}; give {option} {value}")
    if key == "data.path":
        raise UserError(f"--{key}: the images are named first, got {value}; give clead harden {value}")
    if key in ("eval.suite", "eval.images"):
        raise UserError(
            f"--{key}: the plan has time for suite quick on some images, got {value}; leave it out, and give it to clead evaluate "
            "afterwards"
        )


def _given(options: HardenOptions) -> dict[str, Any]:
    """Return the user's own keys, as in ``optim.lr``, and their values."""
    return {".".join(path): value for path, value in parse_overrides(options.overrides)}


def _has_weights(options: HardenOptions) -> bool | None:
    """Say whether the user has the network begin with weights; None: not said."""
    given = _given(options)
    if options.weights is not None:
        return True
    for key in ("model.args.pretrained", "model.pretrained", "model.args.weights"):
        if key in given:
            return bool(given[key])
    return None


def _train(options: HardenOptions) -> dict[str, Any]:
    """Return what every recipe's ``train`` has; the length is another later."""
    return {"minutes": 1.0, "start_from": options.weights, "seed": options.seed}


def _tree(candidate: Candidate, data: Mapping[str, Any], options: HardenOptions, *, robust: bool) -> dict[str, Any]:
    """Return the recipe of a network without its length."""
    one_step = options.norm == "linf" and not {"attack.name", "attack.steps"} & _given(options).keys()
    groups = training(candidate, one_step=one_step, robust=robust)
    train = {**_train(options), **groups.pop("train")}
    size = PRETRAINED_BATCH if candidate.pretrained else BATCH
    return {
        "name": "robust" if robust else "baseline",
        "data": {**data, "batch_size": min(size, data["batch_size"])},
        "model": dict(candidate.model),
        "threat": {"norm": options.norm, "eps": options.eps or THREATS.get(options.norm)().eps.text},
        **groups,
        "train": train,
        "eval": {"suite": "quick"},
    }


def _as_written(value: Any) -> Any:
    """Return a value of the command line without the memory of how it was written, so that it can be kept as JSON."""
    if isinstance(value, list):
        return [_as_written(each) for each in value]
    number = int if isinstance(value, WrittenInt) else float if isinstance(value, WrittenFloat) else None
    return value if number is None else number(value)


def _complete(
    tree: dict[str, Any], train: Mapping[str, Any], options: HardenOptions, *, without: tuple[str, ...] = ()
) -> dict[str, Any]:
    return _overridden({**tree, "train": {**tree["train"], **train}}, options, without=without)


def _data_group(
    data: dict[str, Any], described: Survey, options: HardenOptions
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the ``data`` group and the reasons for its keys."""
    reasons = {}
    images = described.images["train"]
    if not described.one_size or options.image_size is not None or described.sides[1] > _largest_side(options):
        fitting = [size for size in described.image_sizes if size <= _largest_side(options)]
        asked = options.image_size is not None
        data["image_size"] = options.image_size if asked else max(fitting or described.image_sizes[:1])
        reasons["data.image_size"] = (
            "you asked for it"
            if asked
            else f"the largest that enlarges few images and can be trained in the time; larger: --image-size "
            f"{2 * data['image_size']}"
        )
    flip = described.flips.safe if options.flip is None else options.flip
    side = data.get("image_size", described.sides[1])
    data["augment"] = {"crop": max(1, side // 8), "flip": flip}
    reasons["data.augment"] = "you asked for it" if options.flip is not None else described.flips.reason
    if described.balance > BALANCED:
        data["sampling"] = "balanced"
        reasons["data.sampling"] = f"the largest class has {described.balance:.1f} times as many images as the smallest"
    data["batch_size"] = max(8, min(128, images // 8))
    if "val" not in described.images:
        data["val_fraction"] = round(min(0.15, max(0.02, 500 / images)), 3)
        reasons["data.val_fraction"] = f"about {round(data['val_fraction'] * images)} images choose the best weights"
    return data, reasons


def _largest_side(options: HardenOptions) -> int:
    """Return the largest image size that is chosen without being asked for."""
    if device_of(_given(options).get("train.device", "auto")).type == "cuda":
        return 224
    return 64 if options.minutes < 120 else 96 if options.minutes < 480 else 128


def _validation(splits: Splits, chosen: _Timed, gradient: float, limit: float) -> tuple[int, float]:
    """Return how many images are attacked in a validation, and the epochs between two, so that they take 5 % of the time."""
    images = min(512, len(splits.val))
    each = images * 11 * gradient  # ten steps of PGD and a look at the clean images
    times = max(3.0, min(30.0, _VALIDATION * limit / each))
    return images, round(max(chosen.passes / times, 0.05), 2)


def _training_reasons(chosen: _Timed, timed: Sequence[_Timed], options: HardenOptions, images: int) -> dict[str, str]:
    step, candidate = chosen.step, chosen.candidate
    if options.model is not None:
        why = "you named it"
    else:
        why = f"the largest that passes {passes_needed(images):.0f} times over {images:,} images, or else the smallest"
    layout = "channels_last" if step.channels_last else "contiguous"
    reasons = {
        "model": f"{why}; about {chosen.passes:.0f} passes in the time",
        "threat.eps": "you asked for it"
        if options.eps
        else f"the usual radius in {options.norm} for small photographs",
        "train.precision": f"{step.precision} and {layout} had the fastest step: {1000 * step.seconds:.1f} ms an image",
        "train.minutes": "learning rate and radius follow the clock; for a length that repeats write epochs instead",
    }
    if candidate.pretrained:
        reasons |= {
            "train.forward_mode": "batch-norm, dropout and stochastic depth frozen, so that the network that learns is the one "
            "that is attacked and used",
            "train.eps_ramp": "clean images first, then eps rises: otherwise its new classifier may learn to give one answer",
        }
    return reasons


Mode = Literal["baseline", "robust"]


def recipe_yaml(plan: Plan, which: Mode) -> str:
    """Return a recipe as YAML, a comment behind every key that the plan has a reason for."""
    from clead.config.yaml_io import dump_yaml

    lines = []
    for group, values in dataclasses.asdict(plan)[which].items():
        reason = plan.reasons.get(group)
        if not isinstance(values, dict):
            lines.append(f"{group}: {values}")
            continue
        lines.append(f"{group}:" + (f"  # {reason}" if reason else ""))
        for key, value in values.items():
            if value is None:
                continue
            text = dump_yaml({key: value}).rstrip()
            reason = plan.reasons.get(f"{group}.{key}")
            first, *more = text.splitlines()
            lines += [f"  {first}" + (f"  # {reason}" if reason else ""), *(f"  {line}" for line in more)]
    return "\n".join(lines) + "\n"
