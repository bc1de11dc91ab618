"""What is searched: the ``tune`` group of a recipe, checked against the configuration's keys."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from clead.config import (
    GROUPS,
    TUNE,
    RunConfig,
    choice_keys,
    load_recipe,
    parse_overrides,
    parse_yaml,
    read_recipe,
    recipe_text,
)
from clead.errors import UserError, did_you_mean
from clead.settings import Ratio, setting, settings, validated

_LARGEST_SEED = 2**31 - 1
_SEARCHABLE_DATA = ("batch_size", "augment", "view", "cutmix")
_FIXED_TRAIN = ("seed", "device", "start_from", "checkpoint_seconds")


@settings
class Tune:
    """How a recipe is searched."""

    space: dict[str, Any] = setting(
        doc="what is searched: a key of clead train --help -> {low, high, log, step}, or a list of choices"
    )
    trials: int = setting(24, "trials of the study, all its processes together", ge=1)
    seeds: int = setting(1, "trainings per trial; its accuracies are their means", ge=1)
    clean_weight: float = setting(
        0.2, "w of the score, (1 − w) · robust accuracy + w · clean accuracy, both on validation images", ge=0, le=1
    )
    pareto: bool = setting(
        False,
        "search for the front of robust and clean accuracy instead of the best score; no trial is stopped early then",
    )
    prune: bool = setting(
        True, "stop a trial whose validations are worse than the median of the others' at the same part of training"
    )
    suite: Literal["quick", "pgd", "standard"] = setting("quick", "attacks that a finished trial is measured with")
    images: int | None = setting(None, "measure on the first so many validation images; none: all", ge=1)
    during: dict[str, Any] = setting(
        default_factory=dict, doc="settings of the trials alone, which the recipe that is found does not have"
    )
    seed: int = setting(0, "of the search itself", ge=0, le=_LARGEST_SEED)


@settings
class Range:
    """The values of one key between two ends, which are among them."""

    low: Ratio = setting(doc="smallest value")
    high: Ratio = setting(doc="largest value")
    log: bool = setting(False, "search its logarithm")
    step: Ratio | None = setting(None, "distance of neighbouring values; none: any value, of whole numbers 1", gt=0)


@dataclasses.dataclass(frozen=True)
class SearchSpec:
    """A recipe with a checked space.

    Args:
        recipe: a shipped name or a YAML file.
        overrides: what was changed on the command line, without ``--tune.``.
        settings: the ``tune`` group.
        config: the recipe with ``overrides``, as a training without a search has it.
        distributions: of every key in the space.
    """

    recipe: str
    overrides: tuple[str, ...]
    settings: Tune
    config: RunConfig
    distributions: dict[str, BaseDistribution]

    def trial_config(self, values: Mapping[str, Any]) -> RunConfig:
        """Return what a trial with these values trains; raises UserError if they do not go together."""
        return self._with({**self.settings.during, **values})

    def found_config(self, values: Mapping[str, Any]) -> RunConfig:
        """Return the recipe with these values, as it is to be trained."""
        return dataclasses.replace(self._with(values), name=f"{self.config.name}-tuned")

    def _with(self, values: Mapping[str, Any]) -> RunConfig:
        return read_recipe(self.recipe, [*self.overrides, *_overrides(values)])

    def own_values(self) -> dict[str, Any] | None:
        """Return the recipe's own values of the space's keys, or None if one lies outside."""
        values = {}
        for key, distribution in self.distributions.items():
            value = value_of(self.config, key)
            if isinstance(distribution, CategoricalDistribution):
                same = [c for c in distribution.choices if value_of(self._with({key: c}), key) == value]
                if not same:
                    return None
                values[key] = same[0]
                continue
            assert isinstance(distribution, (IntDistribution, FloatDistribution))
            if value is None or not distribution.low <= value <= distribution.high:
                return None
            steps = 0 if distribution.step is None else (value - distribution.low) / distribution.step
            if abs(steps - round(steps)) > 1e-6:
                return None
            values[key] = int(value) if isinstance(distribution, IntDistribution) else float(value)
        return values

    @property
    def prunes(self) -> bool:
        """Whether trials are stopped early; not under a threat of their own, where they cannot be compared before the end."""
        own_threat = any("threat" in key.split(".") for key in self.distributions)
        return self.settings.prune and not self.settings.pareto and not own_threat

    def score(self, clean: float, robust: float) -> float:
        """Return (1 − w)·robust + w·clean."""
        weight = self.settings.clean_weight
        return (1 - weight) * robust + weight * clean

    def definition(self) -> dict[str, Any]:
        """Return, as plain data, what must be the same for every process of a study."""
        recipe = self.config.to_dict()
        del recipe["train"]["device"]
        tune = _plain(self.settings)
        del tune["trials"]
        tune["space"] = {key: _described(distribution) for key, distribution in self.distributions.items()}
        return {"recipe": recipe, TUNE: tune}

    def group(self) -> dict[str, Any]:
        """Return the ``tune`` group as it stands in a recipe."""
        return _plain(self.settings)


def open_search(recipe: str, overrides: Sequence[str] = ()) -> SearchSpec:
    """Read a recipe's ``tune`` group, with ``--tune.KEY VALUE`` in its place; raises UserError that lists every problem.

    ``--tune.space.GROUP.KEY`` takes ``[a, b]``, ``{low: a, high: b}``, or null, which leaves the key out.
    """
    pairs = parse_overrides(overrides)
    changes = [(path[1:], value) for path, value in pairs if path[0] == TUNE]
    fixed = tuple(_overrides({".".join(path): value for path, value in pairs if path[0] != TUNE}))
    config = load_recipe(recipe, fixed)
    tree = parse_yaml(recipe_text(recipe)[1], recipe).get(TUNE)
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"{TUNE}: must be a mapping of keys, got {tree!r:.60}; write {TUNE}: {{trials: 20}}")
    group = {str(key): value for key, value in (tree or {}).items()}
    for nested in ("space", "during"):
        if isinstance(group.get(nested), dict):
            group[nested] = {str(key): value for key, value in group[nested].items()}
    for path, value in changes:
        if path[0] in ("space", "during") and len(path) > 1:
            inside = group.setdefault(path[0], {})
            if not isinstance(inside, dict):
                continue  # said below
            inside[".".join(path[1:])] = value
            if value is None and path[0] == "space":
                del inside[".".join(path[1:])]
        else:
            group[".".join(path)] = value
    if not group.get("space"):
        raise UserError(
            f"{TUNE}.space: says what to search, {recipe} has none; give --tune.space.optim.lr '{{low: 0.001, high: 0.1, log: "
            "true}' and the like, or a tune group in the recipe"
        )
    chosen = validated(Tune, group, TUNE)
    if not config.trainings()[-1].method.uses_classifier:
        raise UserError(
            f"method.name: a trial's score is its accuracy, and {config.to_dict()['method']['name']} trains no classifier; add "
            "a stage that does"
        )
    return _checked(recipe, fixed, chosen, config)


def _checked(recipe: str, overrides: tuple[str, ...], chosen: Tune, config: RunConfig) -> SearchSpec:
    problems, distributions = [], {}
    try:
        read_recipe(recipe, [*overrides, *_overrides(chosen.during)])
    except UserError as error:
        problems += [f"{TUNE}.during: {problem}" for problem in error.problems]
    problems += [
        f"{TUNE}.during.{key}: is in the space too; give it in one of them"
        for key in chosen.during
        if key in chosen.space
    ]
    for key, values in chosen.space.items():
        try:
            _searchable(key, config)
            kinds: tuple[type, ...] = ()
            if isinstance(values, dict) and "low" in values:  # a configuration with a value of it knows the key's type
                kinds = value_kinds(read_recipe(recipe, [*overrides, *_overrides({key: values["low"]})]), key)
            distribution = _distribution(key, values, kinds)
            for value in _ends(distribution):
                read_recipe(recipe, [*overrides, *_overrides({key: value})])
            distributions[key] = distribution
        except UserError as error:
            prefix = f"{TUNE}.space"
            problems += [
                mistake if mistake.startswith(prefix) else f"{prefix}: {mistake}" for mistake in error.problems
            ]
    if problems:
        raise UserError(*problems)
    return SearchSpec(recipe, overrides, chosen, config, distributions)


def _searchable(key: str, config: RunConfig) -> None:
    """Raise UserError for a key that chooses something with other keys, or that changes what trials are measured by."""
    path = key.split(".")
    if path[0] == "stages":
        if len(path) < 4:
            raise UserError(
                f"{TUNE}.space.{key}: a setting of a stage is stages.NAME.group.key; give such as stages.NAME.optim.lr"
            )
        path = path[2:]
    if path[0] not in GROUPS:
        raise UserError(f"{TUNE}.space.{key}: unknown group {path[0]!r}; {did_you_mean(path[0], GROUPS)}")
    if len(path) < 2:
        raise UserError(f"{TUNE}.space.{key}: is a group; give one of its keys, such as {key}.KEY")
    choices = choice_keys()
    if path[0] in choices and path[1] == choices[path[0]][0]:
        raise UserError(
            f"{TUNE}.space.{key}: another {path[0]} has other keys; search each by itself, with --{key} on the command line"
        )
    fixed = (
        path[0] == "eval"
        or (path[0] == "data" and path[1] not in _SEARCHABLE_DATA)
        or (path[0] == "train" and (path[1] in _FIXED_TRAIN or path[1].startswith("validate_")))
    )
    if fixed and path[1] in type(getattr(config, path[0])).__pydantic_fields__:
        raise UserError(
            f"{TUNE}.space.{key}: every trial must be measured alike, on the same images; leave it out, or set it with --{key}"
        )


def _distribution(key: str, values: Any, kinds: Sequence[type]) -> BaseDistribution:
    where = f"{TUNE}.space.{key}"
    if isinstance(values, list):
        plain = all(value is None or isinstance(value, (bool, int, float, str)) for value in values)
        if not values or not plain or len(set(map(repr, values))) < len(values):
            raise UserError(
                f"{where}: choices are different numbers, words, true, false or null, got {values!r:.60}; mend the list"
            )
        return CategoricalDistribution(values)
    if not isinstance(values, dict):
        raise UserError(
            f"{where}: must be a range or a list, got {values!r:.60}; give {{low: …, high: …}} or a list of choices"
        )
    span = validated(Range, {str(name): value for name, value in values.items()}, where)
    if span.low >= span.high:
        raise UserError(f"{where}: low must be below high, got {span.low} and {span.high}; give the smaller one as low")
    if span.log and span.low <= 0:
        raise UserError(f"{where}: a logarithm needs low above 0, got {span.low}; raise it, or leave log out")
    if span.log and span.step is not None:
        raise UserError(f"{where}: log and step do not go together, got step {span.step}; leave one out")
    whole = int in kinds and float not in kinds
    if not whole and not {float, Ratio} & set(kinds):
        raise UserError(f"{where}: is no number; give a list of choices, got {values!r:.60}")
    if span.step is not None and abs((n := (span.high - span.low) / span.step) - round(n)) > 1e-9:
        raise UserError(f"{where}: steps of {span.step} do not lead from {span.low} to {span.high}; change one of them")
    if whole:
        if not all(float(number).is_integer() for number in (span.low, span.high, span.step or 1)):
            raise UserError(
                f"{where}: is a whole number, so are low, high and step, got {values!r:.60}; give such as {{low: 1, high: 10}}"
            )
        return IntDistribution(int(span.low), int(span.high), log=span.log, step=int(span.step or 1))
    step = None if span.step is None else float(span.step)
    return FloatDistribution(float(span.low), float(span.high), log=span.log, step=step)


def _ends(distribution: BaseDistribution) -> Sequence[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    return distribution.low, distribution.high


def suggest(trial: Trial, distributions: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """Return a trial's value of every key: what it has already, else what the sampler draws."""
    nested: dict[str, Any] = {}
    for key, values in distributions.items():
        if isinstance(values, CategoricalDistribution):
            nested[key] = trial.suggest_categorical(key, values.choices)
        elif isinstance(values, IntDistribution):
            nested[key] = trial.suggest_int(key, values.low, values.high, log=values.log, step=values.step)
        else:
            assert isinstance(values, FloatDistribution)
            nested[key] = trial.suggest_float(key, values.low, values.high, log=values.log, step=values.step)
    return nested


def _overrides(values: Mapping[str, Any]) -> list[str]:
    # JSON is YAML, and repeats a float to the last bit.
    return [f"--{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in values.items()]


def _owner(config: RunConfig, key: str) -> tuple[Any, str]:
    """Return the settings that hold ``key``, and its last part; the key is known to exist."""
    *parents, last = key.split(".")
    owner: Any = config
    if parents[:1] == ["stages"]:
        stages = {stage.name: stage for stage in config.stages}
        owner = stages[parents[1]] if parents[1] in stages else config.stages[int(parents[1]) - 1]
        parents = parents[2:]
    elif config.stages and parents[0] in vars(config.stages[-1]):
        owner = config.stages[-1]  # what is given for all stages holds in the last
    for parent in parents:
        owner = owner[parent] if isinstance(owner, dict) else getattr(owner, parent)
    return owner, last


def value_of(config: RunConfig, key: str) -> Any:
    """Return the value of a dotted key."""
    owner, last = _owner(config, key)
    return owner.get(last) if isinstance(owner, dict) else getattr(owner, last)


def value_kinds(config: RunConfig, key: str) -> tuple[type, ...]:
    """Return the types that the value of a dotted key may have."""
    owner, last = _owner(config, key)
    if isinstance(owner, dict):
        return (type(owner.get(last)),)
    annotation = type(owner).__pydantic_fields__[last].annotation
    return get_args(annotation) or (annotation,)


def _described(distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    bounds = ("low", "high", "log", "step")
    return {name: getattr(distribution, name) for name in bounds if getattr(distribution, name) is not None}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(value)))


def key_reference() -> str:
    """Return the text of ``clead tune --help`` on every key of the ``tune`` group."""
    lines = []
    fields: dict[str, Any] = vars(Tune)["__pydantic_fields__"]
    for name, field in fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "required" if field.is_required() else f"default {json.dumps(default)}"
        lines.append(f"  --tune.{name}  ({shown})\n      {field.description}")
    return "\n".join(lines)


def differences(there: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return what two definitions do not share, by its dotted key, in words."""
    lines = []
    for key in {**there, **given}:
        old, new = there.get(key, _NOTHING), given.get(key, _NOTHING)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: the study has {_said(old)}, got {_said(new)}")
    return lines


_NOTHING = object()


def _said(value: Any) -> str:
    text = "none" if value is _NOTHING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."
