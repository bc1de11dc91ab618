"""The configuration of a run: one frozen tree, whose leaves are the settings of the objects themselves; YAML in and out.

YAML and command-line overrides go through the same validation, and every problem is listed at once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import Field
from yaml.error import MarkedYAMLError

from clead.attacks import ATTACKS
from clead.attacks.pgd import PGD
from clead.data.datasets import DATASETS
from clead.errors import UserError, did_you_mean
from clead.methods import METHODS
from clead.models import MODELS
from clead.registry import Registry
from clead.settings import Ratio, setting, settings, validated
from clead.threats import THREATS

_LARGEST_YAML = 1_000_000
_LARGEST_SEED = 2**63 - 1


@settings
class Optim:
    """The optimiser, its learning-rate schedule and gradient clipping."""

    name: Literal["sgd", "adamw"] = setting("sgd", "optimiser: SGD with Nesterov momentum, or AdamW")
    lr: float = setting(0.1, "largest learning rate", gt=0)
    momentum: float = setting(0.9, "momentum of SGD; β₁ of AdamW", ge=0, lt=1)
    weight_decay: float = setting(5e-4, "weight decay of every parameter", ge=0)
    schedule: Literal["one_cycle", "cosine", "step", "constant"] = setting("one_cycle", "learning rate over training")
    warmup: float = setting(0.2, "part of training in which the rate rises", ge=0, lt=1, unit="fraction of training")
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
        None, "length in passes over the training set; give this or budget", gt=0, unit="epochs"
    )
    budget: float | None = setting(
        None,
        "length in compute, so that methods are compared fairly; give this or epochs",
        gt=0,
        unit="forward-equivalents per training image (forward 1, backward to inputs 1, full backward 2)",
    )
    precision: Literal["float32", "bfloat16", "float16"] = setting("float32", "autocast of the training step")
    channels_last: bool = setting(False, "channels-last memory format, faster with convolutions in bfloat16")
    compile: bool = setting(False, "compile the encoder with torch.compile")
    ema: float = setting(
        0.0,
        "decay of the exponential moving average of the weights, which is then what is kept; 0: off",
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
        "contrast and batch-norm see one part",
        ge=1,
    )
    parts: int | None = setting(
        None,
        "equal parts of a batch with random views and perturbations of their own; processes × accumulate must divide it, and then "
        "their number changes nothing else; none: as many as processes × accumulate",
        ge=1,
    )
    validate_every: float = setting(1.0, "time between validations", gt=0, unit="epochs")
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
    start_from: str | None = setting(
        None,
        "weights to begin with: a .safetensors file, or a run directory (those its eval.weights names); none: drawn from the seed",
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        """Ask for exactly one of epochs and budget, and at most one average."""
        if self.ema and self.swa_start is not None:
            raise ValueError(f"give one of ema and swa_start, got ema={self.ema:g}, swa_start={self.swa_start:g}")
        if (self.epochs is None) == (self.budget is None):
            raise ValueError(f"give exactly one of epochs and budget, got epochs={self.epochs}, budget={self.budget}")


@settings
class Eval:
    """The worst case over the attacks of a suite, on images that training never saw."""

    suite: Literal["standard", "plus", "rand", "quick", "adaptive", "queries", "pgd"] = setting(
        "standard",
        "standard: AutoAttack (APGD-CE, APGD-T, FAB-T, Square); plus: its longer version; rand: for randomised models; quick: "
        "two APGD of 50 steps; adaptive: standard, then the embedding; queries: without gradients (Square, in "
        "linf also RayS, from labels alone); pgd: FGSM and two PGD-50, each on all images",
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
    curve_points: int = setting(6, "radii up to twice eps at which robust accuracy is drawn; 0: no curve", ge=0)
    curve_images: int = setting(256, "images of the curve", ge=1)
    curve_steps: int = setting(20, "PGD steps of the curve", ge=1)
    check_images: int = setting(128, "images for the checks of gradient masking; 0: no checks", ge=0)
    gallery: int = setting(24, "images kept for the report's gallery", ge=0)
    seed: int = setting(0, "of the attacks' randomness", ge=0, le=_LARGEST_SEED)


_CHOSEN: dict[str, tuple[Registry[Any], str]] = {
    "data": (DATASETS, "name"),
    "model": (MODELS, "name"),
    "threat": (THREATS, "norm"),
    "attack": (ATTACKS, "name"),
    "method": (METHODS, "name"),
}
_FIXED: dict[str, type] = {"optim": Optim, "train": Train, "eval": Eval}
GROUPS = (*_CHOSEN, *_FIXED)
TUNE = "tune"
"""The group of a recipe that says how it is searched: ``clead tune`` reads it, a training has no use for it."""
_STAGE_GROUPS = ("data", "threat", "attack", "method", "optim", "train")
_STAGE_DATA = (
    "batch_size",
    "augment",
    "view",
    "cutmix",
    "labelled_share",
    "pseudo_labels_from",
)  # what of the data a stage may change
_OF_THE_RUN = ("seed", "device", "start_from")  # what of the training it may not
_DEFAULT_NAME = {"data": None, "model": "small_cnn", "threat": "linf", "attack": "pgd", "method": "clead"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One of several trainings that follow each other in a run, each from the weights that the one before it ended with.

    Of ``data`` only batch size, augmentation, view, CutMix, labelled_share and pseudo_labels_from (there the name of an earlier
    stage, or the run's own) count, of ``train`` all but seed, device and start_from: the rest is the run's own.
    """

    name: str
    data: Any
    threat: Any
    attack: Any
    method: Any
    optim: Optim
    train: Train


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run, complete and frozen.

    >>> from clead.data.datasets.digits import Digits
    >>> RunConfig(data=Digits(), train=Train(epochs=1)).threat.eps
    8/255
    """

    data: Any
    train: Train
    name: str = "run"
    model: Any = dataclasses.field(default_factory=lambda: MODELS.get("small_cnn")())
    threat: Any = dataclasses.field(default_factory=lambda: THREATS.get("linf")())
    attack: Any = dataclasses.field(default_factory=PGD)
    method: Any = dataclasses.field(default_factory=lambda: METHODS.get("clead")())
    optim: Optim = dataclasses.field(default_factory=Optim)
    eval: Eval = dataclasses.field(default_factory=Eval)
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        """Check what concerns several groups at once."""
        parts = {group: getattr(self, group) for group in GROUPS}
        problems = [f"{group}: {problem}" for group, value in parts.items() if (problem := _stranger(group, value))]
        problems += _stage_problems([stage.name for stage in self.stages], [vars(stage) for stage in self.stages])
        for stage in self.stages:
            own = {group: getattr(stage, group) for group in _STAGE_GROUPS}
            strange = [f"{group}: {said}" for group, value in own.items() if (said := _stranger(group, value))]
            problems += [f"stages.{stage.name}.{said}" for said in strange or _joint_problems(own)]
        problems += self._teacher_problems()
        if problems or (not self.stages and (problems := _joint_problems(parts))):
            raise UserError(*problems)

    def _teacher_problems(self) -> list[str]:
        """Return what is wrong with the stages that other stages take pseudo-labels from."""
        problems, before = [], []
        for stage in self.stages:
            source = getattr(stage.data, "pseudo_labels_from", None)
            if source is not None and source != getattr(self.data, "pseudo_labels_from", None) and source not in before:
                there = f"before it there is {', '.join(before) or 'none'}"
                rule = f"must be an earlier stage ({there}), got {source!r}; a run directory is given outside of stages"
                problems.append(f"stages.{stage.name}.data.pseudo_labels_from: {rule}")
            before.append(stage.name)
        return problems

    def trainings(self) -> tuple[RunConfig, ...]:
        """Return the complete configuration of each stage, in order; without stages, this one alone."""
        return tuple(self._training(stage) for stage in self.stages) or (self,)

    def _training(self, stage: Stage) -> RunConfig:
        known = {key: getattr(stage.data, key) for key in _STAGE_DATA if hasattr(self.data, key)}
        whole = {key: getattr(self.train, key) for key in _OF_THE_RUN if key != "start_from"}
        return dataclasses.replace(
            self,
            name=f"{self.name}-{stage.name}",
            data=dataclasses.replace(self.data, **known),
            train=dataclasses.replace(stage.train, **whole, start_from=None),
            **{group: getattr(stage, group) for group in ("threat", "attack", "method", "optim")},
            stages=(),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested dicts, complete, in the form that ``from_dict`` and YAML take."""
        tree: dict[str, Any] = {"name": self.name}
        for group in GROUPS:
            value = getattr(self, group)
            tree[group] = {**_chosen_name(group, value), **_plain(value)}
        if self.stages:
            tree["stages"] = [_stage_tree(stage) for stage in self.stages]
        return tree

    def to_yaml(self) -> str:
        """Return the complete configuration as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @staticmethod
    def from_dict(tree: Any) -> RunConfig:
        """Validate nested dicts; raises UserError that lists every problem with its full key."""
        problems: list[str] = []
        if not isinstance(tree, dict):
            raise UserError(f"a recipe must be a mapping of {', '.join(GROUPS)}, got {type(tree).__name__}")
        parts: dict[str, Any] = {}
        if tree.get("name") is not None:
            parts["name"] = str(tree["name"])
            if not re.fullmatch(r"\w[\w .+-]*", parts["name"]):
                problems.append(f"name: becomes part of a directory's name: letters, digits, '-', got {tree['name']!r}")
        for group in tree:
            if group not in (*GROUPS, "name", "stages", TUNE):
                problems.append(f"{group}: unknown group; {did_you_mean(str(group), GROUPS)}")
        for group in GROUPS:
            values = {} if tree.get(group) is None else tree[group]
            try:
                if not isinstance(values, dict):
                    raise UserError(f"{group}: must be a mapping of keys, got {values!r}")
                parts[group] = _build(group, {str(key): value for key, value in values.items()})
            except UserError as error:
                problems.extend(error.problems)
        if tree.get("stages"):
            parts["stages"], of_stages = _stages(tree, parts)
            # What is wrong in the common groups is not said once per stage.
            problems.extend(said for said in of_stages if said.split(".", 2)[-1] not in problems)
        else:
            problems.extend(_joint_problems(parts))
        if problems:
            raise UserError(*problems)
        return RunConfig(**parts)


def _stages(tree: dict[str, Any], common: Mapping[str, Any]) -> tuple[tuple[Stage, ...], list[str]]:
    """Return the stages of a recipe and every problem in them; ``common`` are the run's own groups, as far as they are valid."""
    given = tree["stages"]
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        return (), [f"stages: must be a list of mappings, each with a name and groups, got {given!r:.60}"]
    names = [str(item.get("name")) for item in given]
    problems, parts = _stage_problems(names, []), []
    for name, item in zip(names, given, strict=True):
        found, part = [], {}
        for group in item:
            if group not in (*_STAGE_GROUPS, "name"):
                unknown = f"unknown group; {did_you_mean(str(group), _STAGE_GROUPS)}"
                found.append(f"{group}: {_WHOLE_RUN if group in GROUPS else unknown}")
        for group in _STAGE_GROUPS:
            own = {} if item.get(group) is None else item[group]
            if not isinstance(own, dict):
                found.append(f"{group}: must be a mapping of keys, got {own!r}")
                continue
            refused = [key for key in own if _of_the_run(group, str(key), common)]
            found += [f"{group}.{key}: {_WHOLE_RUN}" for key in refused]
            own = {str(key): value for key, value in own.items() if key not in refused}
            try:
                values = tree.get(group)
                part[group] = _build(group, _inherited(group, values if isinstance(values, dict) else {}, own))
            except UserError as error:
                found += error.problems
        found += _joint_problems(part)
        problems += [f"stages.{name}.{said}" for said in found]
        parts.append(part)
    if not problems:
        problems = _stage_problems(names, parts)
    return () if problems else tuple(Stage(name=n, **part) for n, part in zip(names, parts, strict=True)), problems


_WHOLE_RUN = "belongs to the whole run; give it outside of stages"


def _of_the_run(group: str, key: str, common: Mapping[str, Any]) -> bool:
    if group == "data":
        return key == "name" or (key not in _STAGE_DATA and hasattr(common.get("data"), key))
    return group == "train" and key in _OF_THE_RUN


def _inherited(group: str, common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return the common keys with a stage's own in their place; another choice (a method, say) starts from its defaults."""
    if group in _CHOSEN:
        key = _CHOSEN[group][1]
        usual = common.get(key, _DEFAULT_NAME[group])
        if own.get(key, usual) != usual:
            return own
    if group == "train":
        for key, other in (("epochs", "budget"), ("budget", "epochs")):
            if own.get(key) is not None:
                common = {name: value for name, value in common.items() if name != other}
    return _deep(common, own)


def _deep(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    nested = {key: _deep(common[key], own[key]) for key in own if _both_mappings(common.get(key), own[key])}
    return {**common, **own, **nested}


def _both_mappings(a: Any, b: Any) -> bool:
    return isinstance(a, dict) and isinstance(b, dict)


def _stage_problems(names: Sequence[str], parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with the stages' names, and with several stages together."""
    problems = [
        f"stages.{number}.name: must be letters, digits and _, beginning with a letter, got {name!r}"
        for number, name in enumerate(names, start=1)
        if not re.fullmatch(r"[A-Za-z]\w*", name) or name == "None"
    ]
    twice = sorted({name for name in names if names.count(name) > 1})
    problems += [f"stages: two stages are called {name!r}; give each a name of its own" for name in twice]
    storing = [name for name, part in zip(names, parts, strict=False) if getattr(part["method"], "uses_stored", False)]
    if len(storing) > 1:
        problems.append(f"stages: only one stage of a run can store adversarial images, got {', '.join(storing)}")
    return problems


def _stage_tree(stage: Stage) -> dict[str, Any]:
    tree: dict[str, Any] = {"name": stage.name}
    for group in _STAGE_GROUPS:
        value = getattr(stage, group)
        tree[group] = {**_chosen_name(group, value), **_plain(value)}
    tree["data"] = {key: value for key, value in tree["data"].items() if key in _STAGE_DATA}
    tree["train"] = {key: value for key, value in tree["train"].items() if key not in _OF_THE_RUN}
    return tree


def _joint_problems(parts: Mapping[str, Any]) -> list[str]:
    """Return the problems that concern several groups at once; groups that are not valid themselves may be lacking."""
    method, data = parts.get("method"), parts.get("data")
    if method is None or data is None:
        return []
    inner = (
        getattr(method, "inner", "") in ("contrastive", "supcon") or getattr(method, "inner_contrastive_weight", 0) > 0
    )
    contrasts = getattr(method, "contrastive_weight", 0) > 0 or (inner and getattr(method, "uses_attack", False))
    contrasts = contrasts or getattr(method, "uses_embedding", False)
    if contrasts and data.batch_size < 2:
        return [
            "data.batch_size: a contrastive loss needs at least 2 images, because the others are the negatives, "
            f"got {data.batch_size}; raise it, or set the contrastive weights to 0"
        ]
    if problems := _label_problems(method, data):
        return problems
    trained = parts.get("train")
    frozen = getattr(method, "uses_embedding", False) or (
        getattr(method, "contrastive_weight", 0) > 0 and getattr(method, "contrastive_level", "logits") != "logits"
    )
    if getattr(trained, "trainable", "all") == "classifier" and frozen:
        return [
            "train.trainable: a contrastive loss trains encoder and projection head, which are frozen then, got classifier; "
            "set it to all, or take a method without that term (method.name standard)"
        ]
    if data.cutmix and getattr(method, "uses_stored", False):
        return [
            f"data.cutmix: a mixed image is not the one whose adversarial image is stored, got {data.cutmix:g}; set it to 0"
        ]
    if data.augment.gaussian and getattr(method, "uses_attack", False):
        return [
            "data.augment.gaussian: unclipped noise leaves [0, 1], in which an attack's images must lie, got "
            f"{data.augment.gaussian:g}; set it to 0, or take a method without an attack (method.name standard)"
        ]
    return []


def _label_problems(method: Any, data: Any) -> list[str]:
    """Return what is wrong with the settings on labels together."""
    few = data.labelled < 1
    problems = [
        f"data.{key}: changes nothing while every image has a label, got {value}; set data.labelled below 1"
        for key in ("labelled_share", "pseudo_labels_from")
        if (value := getattr(data, key)) is not None and not few
    ]
    if few and data.labelled_share is not None and data.batch_size < 2:
        problems.append(
            f"data.batch_size: labelled_share needs one labelled and one unlabelled image at least, got {data.batch_size}; raise it"
        )
    if few and data.cutmix and getattr(method, "uses_unlabelled", False) and data.pseudo_labels_from is None:
        problems.append(
            f"data.cutmix: mixes labels, which images without one have not, got {data.cutmix:g}; set it to 0, or data.labelled 1"
        )
    return problems


def _stranger(group: str, value: Any) -> str:
    """Say what is wrong if ``value``, given in Python, is none of the settings that this group can hold."""
    if group in _FIXED:
        return "" if isinstance(value, _FIXED[group]) else f"must be {_FIXED[group].__name__}(...), got {value!r}"
    known = {name: cls.__name__ for name, cls in _CHOSEN[group][0].items()}
    if type(value) in [cls for _, cls in _CHOSEN[group][0].items()]:
        return ""
    return f"must be the settings of a registered {_CHOSEN[group][0].kind} ({', '.join(known.values())}), got {value!r}"


def _build(group: str, values: dict[str, Any]) -> Any:
    if group in _FIXED:
        return validated(_FIXED[group], values, group)
    registry, key = _CHOSEN[group]
    values = dict(values)
    name = values.pop(key, _DEFAULT_NAME[group])
    if name is None:
        raise UserError(f"{group}.{key}: is required; known: {', '.join(registry.names())}")
    if group == "model" and ":" in str(name):
        name, values["factory"] = "custom", str(name)
    try:
        cls = registry.get(str(name))
    except UserError as error:
        raise UserError(f"{group}.{key}: {error}") from None
    return validated(cls, values, group)


def _chosen_name(group: str, value: Any) -> dict[str, str]:
    if group not in _CHOSEN:
        return {}
    registry, key = _CHOSEN[group]
    return {key: next(name for name, cls in registry.items() if cls is type(value))}


def _plain(value: Any) -> Any:
    if isinstance(value, Ratio):
        return value.text if "/" in value.text else float(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    folder = resources.files("clead") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def recipe_text(recipe: str) -> tuple[str, str]:
    """Return (name, YAML text) of a shipped recipe's name or of a YAML file's path; raises UserError if there is neither."""
    if recipe in recipe_names():
        return recipe, (resources.files("clead") / "recipes" / f"{recipe}.yaml").read_text()
    path = Path(recipe)
    if path.is_file():
        try:
            return path.stem, yaml_text(path)
        except UnicodeDecodeError:
            raise UserError(f"a recipe must be YAML text, got a binary file: {path}") from None
    raise UserError(f"unknown recipe {recipe!r}, neither shipped nor a file; {did_you_mean(recipe, recipe_names())}")


def yaml_text(path: Path) -> str:
    """Return the text of a recipe or a run's configuration; raises UserError if it is too large to be one."""
    with path.open("rb") as file:
        content = file.read(_LARGEST_YAML + 1)  # not its size on disk, which a pipe or device does not tell
    if len(content) > _LARGEST_YAML:
        raise UserError(f"a recipe must be under {_LARGEST_YAML} bytes, got more: {path}")
    return content.decode()


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply overrides ``--group.key VALUE``; raises UserError that lists every problem.

    Naming another threat, attack, model or method starts from that one's defaults; naming another dataset keeps the keys
    that it knows too (batch size, augmentation …). A ``data.path`` for a dataset that has none (digits) means ``auto``.
    Of ``train.epochs`` and ``train.budget``, the one given replaces the other. Code that an override names as the model may run,
    see ``clead.allow_code``.
    """
    named = [value for path, value in parse_overrides(overrides) if path in (["model", "name"], ["model", "factory"])]
    if code := [value for value in named if isinstance(value, str) and ":" in value]:
        from clead.models.custom import allow_code

        allow_code(*code)
    return read_recipe(recipe, overrides)


def read_recipe(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe as ``load_recipe`` does, with overrides that need not be the user's: they allow no code."""
    name, text = recipe_text(recipe)
    tree = parse_yaml(text, recipe)
    return _changed({"name": name, **tree} if isinstance(tree, dict) else tree, overrides)


def bare_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return a configuration without a recipe, to evaluate a model made elsewhere: the data at ``--data.path``."""
    # Nothing is trained, but the complete configuration says how long.
    return _changed({"name": name, "data": {"name": "auto"}, "train": {"epochs": 1}}, overrides)


def _changed(tree: Any, overrides: Sequence[str]) -> RunConfig:
    if isinstance(tree, dict):
        changes = parse_overrides(overrides)
        keys = [path for path, _ in changes]
        if ["data", "path"] in keys and ["data", "name"] not in keys and not _has_path(tree):
            changes.append((["data", "name"], "auto"))
        # A choice drops the other choice's keys: choices first, so that keys given beside one stay, in any order.
        # What is given for all stages comes before what is given for one.
        changes.sort(
            key=lambda change: (change[0][0] == "stages", not _chooses(change[0]) and not _chooses(change[0][2:]))
        )
        for path, value in changes:
            if path[0] == TUNE:
                raise UserError(f"--{'.'.join(path)}: changes nothing here; give it to clead tune")
            if path[0] == "stages":
                _override_stage(tree, path, value)
                continue
            _override(tree, path, value)
            _override_stages(tree, path)
        _one_length(tree, {path[1] for path, value in changes if path[0] == "train" and value is not None})
    return RunConfig.from_dict(tree)


def _has_path(tree: dict[str, Any]) -> bool:
    data = tree.get("data")
    name = data.get("name") if isinstance(data, dict) else None
    return name not in DATASETS.names() or "path" in DATASETS.get(name).__pydantic_fields__


class _Loader(yaml.SafeLoader):
    """Safe YAML without what hides a mistake or explodes: a key given twice and aliases are errors."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise MarkedYAMLError(None, None, f"aliases are not supported, got *{event.anchor}", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise MarkedYAMLError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, source: str) -> Any:
    """Return what safe YAML holds; raises UserError naming the line of a syntax error."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{source} is not valid YAML{where}: {getattr(error, 'problem', None) or 'cannot be parsed'}"
        ) from None


def parse_overrides(arguments: Sequence[str]) -> list[tuple[list[str], Any]]:
    """Return (key path, value) pairs from ``--group.key VALUE`` or ``--group.key=VALUE``; values are read as YAML scalars or lists.

    >>> parse_overrides(["--threat.eps", "8/255", "--data.flip=true"])
    [(['threat', 'eps'], '8/255'), (['data', 'flip'], True)]
    """
    pairs, waiting, problems = [], list(arguments), []
    while waiting:
        argument = waiting.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not key:
            problems.append(f"unexpected argument {argument!r}; settings are given as --group.key VALUE")
            continue
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                problems.append(f"{argument}: a value is missing; give {argument} VALUE")
                continue
            value = waiting.pop(0)
        if "." not in key:
            full = sorted({f"--{row[0]}.{row[2]}" for row in documented_keys() if row[2] == key.replace("-", "_")})
            hint = (
                f"did you mean {' or '.join(full)}?" if full else f"settings are --group.key with {', '.join(GROUPS)}"
            )
            problems.append(f"--{key}: unknown option; {hint}")
            continue
        try:
            parsed = yaml.load(value, _Loader)  # noqa: S506  (a SafeLoader)
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
            parsed = value
        pairs.append((key.replace("-", "_").split("."), parsed))
    if problems:
        raise UserError(*problems)
    return pairs


def _chooses(path: list[str]) -> bool:
    return bool(path) and path[0] in _CHOSEN and path[1:] == [_CHOSEN[path[0]][1]]


def _one_length(tree: dict[str, Any], given: set[str]) -> None:
    """Let an override of epochs replace the recipe's budget, and the reverse."""
    for key, other in (("epochs", "budget"), ("budget", "epochs")):
        if key in given and other not in given:
            tree["train"].pop(other, None)


def _override_stages(tree: dict[str, Any], path: list[str]) -> None:
    """Let an override of a common key hold in the stages too, in place of what they say of it; not that of a choice by name."""
    stages = tree.get("stages")
    for stage in stages if isinstance(stages, list) and not _chooses(path) else ():
        *parents, last = path
        values = stage
        for part in parents:
            values = values.get(part) if isinstance(values, dict) else None
        if isinstance(values, dict):
            for key in ("epochs", "budget") if path in (["train", "epochs"], ["train", "budget"]) else (last,):
                values.pop(key, None)


def _override_stage(tree: dict[str, Any], path: list[str], value: Any) -> None:
    """Set ``stages.NAME.group.key``; the stage may be given by its number, from 1 on, too."""
    stages = tree.get("stages")
    stages = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    names = [str(stage.get("name")) for stage in stages]
    if len(path) < 4:
        raise UserError(f"--{'.'.join(path)}: a setting of a stage is --stages.NAME.group.key VALUE")
    if not stages:
        raise UserError(f"--{'.'.join(path)}: the recipe has no stages; leave out stages.{path[1]}")
    if path[1] not in names and not (path[1].isdecimal() and 1 <= int(path[1]) <= len(stages)):
        raise UserError(
            f"--{'.'.join(path)}: no stage {path[1]!r}; {did_you_mean(path[1], names)} (or 1 to {len(stages)})"
        )
    stage = stages[names.index(path[1]) if path[1] in names else int(path[1]) - 1]
    group = path[2]
    if _chooses(path[2:]) and isinstance(stage.get(group), dict) and isinstance(common := tree.get(group), dict):
        key = path[3]
        stage[group].setdefault(key, common.get(key, _DEFAULT_NAME[group]))
    _override(stage, path[2:], value)
    if group == "train" and value is not None:
        _one_length(stage, {path[3]})


def _override(tree: dict[str, Any], path: list[str], value: Any) -> None:
    group, *rest = path
    values = tree.get(group)
    values = dict(values) if isinstance(values, dict) else {}
    if _chooses(path) and values.get(rest[0], _DEFAULT_NAME[group]) != value:
        registry, _ = _CHOSEN[group]
        known: Iterable[str] = ()
        if group == "data" and value in registry.names():
            known = registry.get(value).__pydantic_fields__
        values = {k: v for k, v in values.items() if k in known}
    tree[group] = values
    for part in rest[:-1]:
        child = values.get(part)
        values[part] = dict(child) if isinstance(child, dict) else {}
        values = values[part]
    values[rest[-1]] = value


def key_reference() -> str:
    """Return the text of ``clead train --help`` on every key; what classes of a group share is said once."""
    lines, choices, rows = [], choice_keys(), documented_keys()
    for group in GROUPS:
        here = [row for row in rows if row[0] == group]
        classes = list(dict.fromkeys(name for _, name, *_ in here)) if group in _FIXED else choices[group][2]
        found: dict[tuple[str, str, str], dict[str, str]] = {}
        for _, name, key, default, allowed, doc in here:
            found.setdefault((key, allowed, doc), {})[name] = default
        owners = {what: tuple(defaults) for what, defaults in found.items()}
        lines.append(f"\n{group}")
        if group in choices:
            key, default, names = choices[group]
            lines.append(f"  --{group}.{key}  ({f'default {default}' if default else 'required'}; {' | '.join(names)})")
        # Stable: the keys of every class first, then those of some, class by class.
        for owner in sorted(dict.fromkeys(owners.values()), key=lambda names: (-len(names), classes.index(names[0]))):
            if len(owner) < len(classes):
                lines.append(f"\n  only {group} {', '.join(owner)}")
            for (key, allowed, doc), defaults in found.items():
                if owners[key, allowed, doc] != owner:
                    continue
                shown = _shown_default(defaults)
                lines.append(f"  --{group}.{key}  ({shown}{f'; {allowed}' if allowed else ''})\n      {doc}")
    lines.append(
        "\nstages\n  A recipe may have several trainings, each from the weights of the one before it. --stages.NAME.group.key is\n"
        f"  a setting of one of them, by number too, as --stages.2.train.epochs (groups: {', '.join(_STAGE_GROUPS)}); a key\n"
        "  without stages. holds in all."
    )
    return "\n".join(lines)


def _shown_default(defaults: Mapping[str, str]) -> str:
    """Return the default of a key, given class by class, as one phrase."""
    by_value = {value: [name for name in defaults if defaults[name] == value] for value in defaults.values()}
    if len(by_value) == 1:
        value = next(iter(by_value))
        return value if value == "required" else f"default {value}"
    most = max(by_value, key=lambda value: len(by_value[value]))
    shown = [f"{'/'.join(names)} {value}" for value, names in by_value.items() if len(names) <= 3 or value != most]
    return "default " + ", ".join([*shown, *([f"else {most}"] if len(by_value[most]) > 3 else [])])


def documented_keys() -> list[tuple[str, str, str, str, str, str]]:
    """Return (group, class name, key, default, range and unit, doc) of every key of every group, for ``--help``."""
    rows = []
    for group in GROUPS:
        classes = _CHOSEN[group][0].items() if group in _CHOSEN else [("", _FIXED[group])]
        for name, cls in classes:
            rows.extend((group, name, *row) for row in _rows(cls, ""))
    return rows


def choice_keys() -> dict[str, tuple[str, str | None, list[str]]]:
    """Return group -> (key, default, known names) of every group whose class is chosen by name."""
    return {group: (key, _DEFAULT_NAME[group], registry.names()) for group, (registry, key) in _CHOSEN.items()}


def _choices(annotation: Any) -> list[Any]:
    """Return what a Literal, alone or in a union, allows."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _rows(cls: Any, prefix: str) -> list[tuple[str, str, str, str]]:
    rows = []
    for key, field in cls.__pydantic_fields__.items():
        default = field.get_default(call_default_factory=True)
        if dataclasses.is_dataclass(default):
            rows.extend(_rows(type(default), f"{prefix}{key}."))
            continue
        rules = [
            f"{sign} {bound}"
            for rule in field.metadata
            for word, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
            if (bound := getattr(rule, word, None)) is not None
        ]
        choices = [repr(choice) for choice in _choices(field.annotation)]
        unit = (field.json_schema_extra or {}).get("unit", "")
        allowed = "; ".join(filter(None, [" | ".join(choices), ", ".join(rules), unit]))
        shown = "required" if field.is_required() else yaml.safe_dump(_plain(default), default_flow_style=True)
        rows.append((prefix + key, shown.replace("...", "").strip(), allowed, field.description or ""))
    return rows
