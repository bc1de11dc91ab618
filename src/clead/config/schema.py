"""The groups of a configuration: the settings of optimiser, training and evaluation, and those chosen by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from clead.attacks import ATTACKS
from clead.data.datasets import DATASETS
from clead.errors import UserError
from clead.methods import METHODS
from clead.models import MODELS, is_library
from clead.models.modes import AttackMode, ForwardMode
from clead.registry import Registry
from clead.renamed import current_value, without_retired
from clead.settings import Probability, Ratio, setting, settings, validated
from clead.tasks import TASKS
from clead.threats import THREATS

_LARGEST_SEED = 2**63 - 1
LENGTHS = ("epochs", "budget", "minutes")
"""The settings of ``train`` that say how long; one of them is given."""


@settings
class Optim:
    """The optimiser, its learning-rate schedule and gradient clipping."""

    name: Literal["sgd", "adamw"] = setting("sgd", "optimiser: SGD with Nesterov momentum, or AdamW")
    lr: float = setting(0.1, "largest learning rate", gt=0)
    momentum: float = setting(0.9, "momentum of SGD; β₁ of AdamW", ge=0, lt=1)
    weight_decay: float = setting(5e-4, "weight decay of every parameter", ge=0)
    schedule: Literal["one_cycle", "cosine", "step", "constant"] = setting("one_cycle", "learning rate over training")
    warmup: float = setting(0.2, "part of training in which the rate rises", ge=0, lt=1, unit="fraction of training")
    encoder_lr: float = setting(
        1.0,
        "learning rate of the encoder as part of that of the classifier, which has lr (and any head beside it)",
        gt=0,
        le=1,
    )
    first_layer_lr: float = setting(
        1.0,
        "learning rate of the encoder's first layer as part of that of its last; it rises geometrically from layer to layer "
        "(layer decay; Clark et al. 2020, arXiv:2003.10555)",
        gt=0,
        le=1,
    )
    milestones: tuple[Annotated[float, Field(gt=0, le=1)], ...] = setting(
        (0.5, 0.75), "where the step schedule falls, each in (0, 1]", unit="fractions of training"
    )
    decay: float = setting(0.1, "factor of each fall of the step schedule", gt=0, lt=1)
    clip_norm: float | None = setting(None, "largest gradient norm; none: no clipping", gt=0)


@settings
class Train:
    """How long, how often checked, and at which precision."""

    seed: int = setting(
        0,
        "decides the initial weights, the order of the images, the augmentations and the perturbations",
        ge=0,
        le=_LARGEST_SEED,
    )
    epochs: float | None = setting(
        None, "length in passes over the training set; give this, budget or minutes", gt=0, unit="epochs"
    )
    budget: float | None = setting(
        None,
        "length in compute, so that methods are compared fairly; give this, epochs or minutes",
        gt=0,
        unit="forward-equivalents per training image (forward 1, backward to inputs 1, full backward 2)",
    )
    minutes: float | None = setting(
        None,
        "length by the clock, validation included: rates and schedules follow the time that is spent, so the number of steps is "
        "another each time; give this, epochs or budget",
        gt=0,
        unit="minutes",
    )
    clock: Literal["wall", "cpu"] = setting(
        "wall",
        "what minutes counts: the time on the wall, or the CPU time of all threads and processes of the training, set-up included, "
        "which other work on the machine lengthens little (images that are stored before the first step count by the wall)",
    )
    precision: Literal["float32", "bfloat16", "float16"] = setting("float32", "autocast of the training step")
    channels_last: bool = setting(False, "channels-last memory format, faster with convolutions in bfloat16")
    compile: bool = setting(False, "compile the encoder with torch.compile")
    ema: float = setting(
        0.0,
        "decay of the exponential moving average of the weights, which is then what is kept; (1 + n)/(10 + n) at most after n "
        "steps, so that the first weights of a short training do not stay in it; 0: off",
        ge=0,
        lt=1,
    )
    swa_start: float | None = setting(
        None,
        "when stochastic weight averaging begins: the mean of the weights after each epoch from then on is kept, and of the "
        "batch-norm statistics (Izmailov et al. 2018, arXiv:1803.05407, recompute those); none: off",
        ge=0,
        lt=1,
        unit="fraction of training",
    )
    awp: float = setting(
        0.0,
        "γ of adversarial weight perturbation (0.005 in the paper); costs a forward and a backward per view more; 0: off",
        ge=0,
        lt=1,
    )
    sync_batch_norm: bool = setting(
        True,
        "where several processes train, batch-norm takes the statistics of all their images; false: of each one's own",
    )
    shard: bool = setting(
        False,
        "several processes share weights, gradients and optimiser state out (FSDP2), for networks that are too large for one",
    )
    accumulate: int = setting(
        1,
        "a batch goes in so many equal parts, one after another, whose gradients are averaged, where it does not fit into memory; "
        "contrast, batch-norm and the mean over known labels see one part; random numbers are those of the whole batch",
        ge=1,
    )
    validate_every: float = setting(
        1.0,
        "time between validations; with minutes at least so much that they take a twentieth of the time",
        gt=0,
        unit="epochs",
    )
    validate_images: int = setting(512, "most validation images to attack", ge=1)
    validate_steps: int = setting(10, "PGD steps of the validation attack", ge=1)
    patience: int | None = setting(
        None, "stop after so many validations without a better robust accuracy; none: never", ge=1
    )
    checkpoint_seconds: float = setting(60.0, "time between resume checkpoints", ge=0, unit="seconds")
    trainable: Literal["all", "classifier"] = setting(
        "all",
        "all weights, or the final linear layer alone on an encoder that is frozen, in evaluation mode, batch-norm statistics too",
    )
    unfreeze: float = setting(
        0.0,
        "part of training over which the layers begin to learn one after another, from the classifier, which learns from the "
        "start, down to the first (Howard & Ruder 2018, arXiv:1801.06146); 0: all from the start",
        ge=0,
        lt=1,
        unit="fraction of training",
    )
    forward_mode: ForwardMode = setting(
        "train",
        "mode in which the model learns. train: batch-norm normalises by the batch, dropout and stochastic depth are on; "
        "frozen_batch_norm: batch-norm by its running statistics, which stay as they are; eval: the same without dropout and "
        "stochastic depth, for a pre-trained model",
    )
    attack_mode: AttackMode = setting(
        "eval", "mode in which the model is attacked in training: eval, or forward: as it learns (forward_mode)"
    )
    batch_norm_images: int = setting(
        0,
        "before each validation batch-norm's running statistics are measured anew, on so many training images and adversarial "
        "images of theirs; 0: they stay those that the steps left",
        ge=0,
    )
    eps_ramp: tuple[Probability, Probability] = setting(
        (0.0, 0.0),
        "when the radius begins to rise from 0 and when it is full, linearly in between: [0, 0] is full from the start, [0, 0.7] a "
        "warm-up, [0.25, 0.75] epsilon-scheduling (arXiv:2509.23325); validation is at the full radius, and an attack.step_size "
        "stays as it is",
        unit="fractions of training",
    )
    start_from: str | None = setting(
        None,
        "weights to begin with: a run directory (those its eval.weights names), zoo:NAME, or a file such as net.safetensors or "
        "net.pth; of another number of classes or another size of images, what fits is taken and listed; none: drawn from the seed",
    )
    teacher: str | None = setting(
        None,
        "the model that methods ard, rslad, lbgat, clead_embed and clead_finetune learn from: a run directory of the same "
        "classes, or start: the model as this training begins",
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        """Ask for exactly one length and at most one average, and refuse what goes together with nothing else."""
        if self.ema and self.swa_start is not None:
            raise ValueError(f"give one of ema and swa_start, got ema={self.ema:g}, swa_start={self.swa_start:g}")
        if self.eps_ramp[0] > self.eps_ramp[1] or (self.eps_ramp[0] == self.eps_ramp[1] > 0):
            raise ValueError(f"eps_ramp must rise, got {list(self.eps_ramp)}; give [0, 0.7], for example")
        if self.shard and (self.unfreeze or self.batch_norm_images):
            raise ValueError("shard goes with neither unfreeze nor batch_norm_images; leave them out")
        if self.trainable == "classifier" and (self.unfreeze or self.forward_mode != "train"):
            raise ValueError(
                "trainable classifier holds the encoder frozen in evaluation mode, so it goes with neither unfreeze nor "
                "forward_mode; leave them out"
            )
        if self.clock == "cpu" and self.minutes is None:
            raise ValueError(
                "clock cpu is how minutes are counted, and there are none; give minutes, or --train.clock wall"
            )
        lengths = [f"{name}={value}" for name in LENGTHS if (value := getattr(self, name)) is not None]
        if len(lengths) != 1:
            raise ValueError(f"give exactly one of {', '.join(LENGTHS)}, got {', '.join(lengths) or 'none'}")


SuiteName = Literal["standard", "plus", "rand", "quick", "adaptive", "black_box", "pgd", "sea", "sea-quick"]
TASK_SUITES = {"segmentation": ("sea", "sea-quick")}
"""The suites of tasks that have their own, the usual one first."""


@settings
class Eval:
    """The worst case over the attacks of a suite, on images that training never saw."""

    suite: Annotated[SuiteName, BeforeValidator(lambda name: current_value("eval.suite", name))] = setting(
        "standard",
        "standard: AutoAttack (APGD-CE, APGD-T, FAB-T, Square); plus: its longer version; rand: for randomised models; quick: "
        "two APGD of 50 steps; adaptive: standard, then the embedding; black_box: without gradients (Square, in "
        "linf also RayS, from labels alone); pgd: FGSM and two PGD-50, each on all images. For segmentation, sea: APGD of 300 "
        "steps on each of three losses of pixels, its default; sea-quick: of 60",
    )
    split: Literal["test", "val"] = setting("test", "which images")
    images: int | None = setting(None, "evaluate only the first so many; none: all", ge=1)
    weights: Literal["best", "last"] = setting("best", "weights of the best validation robust accuracy, or the last")
    batch_size: int | None = setting(
        None, "images attacked at once; none: by image size and device; halved when memory is short", ge=1
    )
    steps: int | None = setting(
        None, "instead of the suite's own, for a quick look or a longer search (the record says so)", ge=1, unit="steps"
    )
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "what the search computes in; every verdict is in float32, and bfloat16 may find less"
    )
    curve_points: int = setting(
        6, "radii up to twice eps with a robust accuracy, in suite quick 6 or fewer if 6; 0: no curve", ge=0
    )
    curve_images: int | None = setting(
        None,
        "images of the curve; none: 256, in suite quick (where 256 is none too) as many as are cheap beside the attacks; of masks "
        "32, in suite sea-quick 8",
        ge=1,
    )
    curve_steps: int | None = setting(
        None, "steps of the curve's attack; none: 20, in suite quick (where 20 is none too) 10 or 5", ge=1
    )
    check_images: int | None = setting(
        None,
        "images for the checks of gradient masking; none: 128, in suite quick (where 128 is none too) what is cheap; of masks 32, "
        "in suite sea-quick 8; 0: no checks",
        ge=0,
    )
    gallery: int = setting(24, "images kept for the report's gallery", ge=0)
    seed: int = setting(0, "of the attacks' randomness", ge=0, le=_LARGEST_SEED)


REGISTRY_GROUPS: dict[str, tuple[Registry[Any], str]] = {
    "data": (DATASETS, "name"),
    "task": (TASKS, "name"),
    "model": (MODELS, "name"),
    "threat": (THREATS, "norm"),
    "attack": (ATTACKS, "name"),
    "method": (METHODS, "name"),
}
PLAIN_GROUPS: dict[str, type] = {"optim": Optim, "train": Train, "eval": Eval}
GROUPS = (*REGISTRY_GROUPS, *PLAIN_GROUPS)
TUNE = "tune"
"""The group of a recipe that says how it is searched: ``clead tune`` reads it, a training has no use for it."""
DEFAULT_NAME = {
    "data": None,
    "task": "classification",
    "model": "small_cnn",
    "threat": "linf",
    "attack": "pgd",
    "method": "clead",
}


def type_problem(group: str, value: Any) -> str:
    """Say what is wrong if ``value``, given in Python, is none of the settings that this group can hold."""
    if group in PLAIN_GROUPS:
        return (
            ""
            if isinstance(value, PLAIN_GROUPS[group])
            else f"must be {PLAIN_GROUPS[group].__name__}(...), got {value!r}"
        )
    known = {name: cls.__name__ for name, cls in REGISTRY_GROUPS[group][0].items()}
    if type(value) in [cls for _, cls in REGISTRY_GROUPS[group][0].items()]:
        return ""
    return f"must be the settings of a registered {REGISTRY_GROUPS[group][0].kind} ({', '.join(known.values())}), got {value!r}"


def build(group: str, values: dict[str, Any]) -> Any:
    """Return the settings of a group from its keys; raises UserError that lists every problem."""
    values, retired = without_retired(group, values)
    try:
        made = _build(group, values)
    except UserError as error:
        raise UserError(*retired, *error.problems) from None
    if retired:
        raise UserError(*retired)
    return made


def _build(group: str, values: dict[str, Any]) -> Any:
    if group in PLAIN_GROUPS:
        return validated(PLAIN_GROUPS[group], values, group)
    registry, key = REGISTRY_GROUPS[group]
    name = values.pop(key, DEFAULT_NAME[group])
    if name is None:
        raise UserError(f"{group}.{key}: is required; known: {', '.join(registry.names())}")
    if group == "model" and ":" in str(name):
        kind, key_of_name = ("library", "network") if is_library(str(name)) else ("custom", "factory")
        name, values[key_of_name] = kind, str(name)
    try:
        cls = registry.get(str(name))
    except UserError as error:
        raise UserError(f"{group}.{key}: {error}") from None
    return validated(cls, values, group)


def chosen_name(group: str, value: Any) -> dict[str, str]:
    """Return the key and name that choose the class of these settings; nothing where the group has one class."""
    if group not in REGISTRY_GROUPS:
        return {}
    registry, key = REGISTRY_GROUPS[group]
    return {key: next(name for name, cls in registry.items() if cls is type(value))}


def plain(value: Any) -> Any:
    """Return settings as YAML can hold them: dicts, lists, numbers, and ratios such as 8/255 as written."""
    if isinstance(value, Ratio):
        return value.text if "/" in value.text else float(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    return value
