"""The stages of a run: several trainings that follow each other, each with groups of its own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from clead.config.schema import DEFAULT_NAME, GROUPS, LENGTHS, REGISTRY_GROUPS, Optim, Train, build, chosen_name, plain
from clead.errors import UserError, did_you_mean

STAGE_GROUPS = ("data", "threat", "attack", "method", "optim", "train")
STAGE_DATA = (
    "batch_size",
    "augment",
    "view",
    "cutmix",
    "labelled_share",
    "pseudo_labels_from",
)  # what of the data a stage may change
OF_THE_RUN = ("seed", "device", "start_from")  # what of the training it may not
_WHOLE_RUN = "belongs to the whole run; give it outside of stages"


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


def stages_of(tree: dict[str, Any], common: Mapping[str, Any]) -> tuple[tuple[Stage, ...], list[str]]:
    """Return the stages of a recipe and every problem in them; ``common`` are the run's own groups, as far as they are valid."""
    given = tree["stages"]
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        return (), [f"stages: must be a list of mappings, each with a name and groups, got {given!r:.60}"]
    names = [str(item.get("name")) for item in given]
    problems, parts = stage_problems(names, []), []
    for name, item in zip(names, given, strict=True):
        mistakes, groups = [], {}
        for group in item:
            if group not in (*STAGE_GROUPS, "name"):
                unknown = f"unknown group; {did_you_mean(str(group), STAGE_GROUPS)}"
                mistakes.append(f"{group}: {_WHOLE_RUN if group in GROUPS else unknown}")
        for group in STAGE_GROUPS:
            changes = {} if item.get(group) is None else item[group]
            if not isinstance(changes, dict):
                mistakes.append(f"{group}: must be a mapping of keys, got {changes!r}")
                continue
            refused = [key for key in changes if _of_the_run(group, str(key), common)]
            mistakes += [f"{group}.{key}: {_WHOLE_RUN}" for key in refused]
            changes = {str(key): value for key, value in changes.items() if key not in refused}
            try:
                values = tree.get(group)
                groups[group] = build(group, _inherited(group, values if isinstance(values, dict) else {}, changes))
            except UserError as error:
                mistakes += error.problems
        mistakes += joint_problems(groups)
        problems += [f"stages.{name}.{mistake}" for mistake in mistakes]
        parts.append(groups)
    if not problems:
        problems = stage_problems(names, parts)
    return () if problems else tuple(Stage(name=n, **groups) for n, groups in zip(names, parts, strict=True)), problems


def _of_the_run(group: str, key: str, common: Mapping[str, Any]) -> bool:
    if group == "data":
        return key == "name" or (key not in STAGE_DATA and hasattr(common.get("data"), key))
    return group == "train" and key in OF_THE_RUN


def _inherited(group: str, common: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the common keys with a stage's own in their place; another choice (a method, say) starts from its defaults."""
    if group in REGISTRY_GROUPS:
        key = REGISTRY_GROUPS[group][1]
        usual = common.get(key, DEFAULT_NAME[group])
        if changes.get(key, usual) != usual:
            return changes
    if group == "train" and any(changes.get(key) is not None for key in LENGTHS):
        common = {name: value for name, value in common.items() if name not in LENGTHS}
    return _deep(common, changes)


def _deep(common: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    nested = {key: _deep(common[key], changes[key]) for key in changes if _both_mappings(common.get(key), changes[key])}
    return {**common, **changes, **nested}


def _both_mappings(a: Any, b: Any) -> bool:
    return isinstance(a, dict) and isinstance(b, dict)


def joint_problems(groups: Mapping[str, Any]) -> list[str]:
    """Return the problems that concern several groups at once; groups that are not valid themselves may be lacking."""
    method, data = groups.get("method"), groups.get("data")
    if method is None or data is None:
        return []
    return data.problems() or method.problems(data, groups.get("train"))


def stage_problems(names: Sequence[str], parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with the stages' names, and with several stages together."""
    problems = [
        f"stages.{number}.name: must be letters, digits and _, beginning with a letter, got {name!r}"
        for number, name in enumerate(names, start=1)
        if not re.fullmatch(r"[A-Za-z]\w*", name) or name == "None"
    ]
    twice = sorted({name for name in names if names.count(name) > 1})
    problems += [f"stages: two stages are called {name!r}; give each a name of its own" for name in twice]
    storing = [
        name for name, groups in zip(names, parts, strict=False) if getattr(groups["method"], "uses_stored", False)
    ]
    if len(storing) > 1:
        problems.append(f"stages: only one stage of a run can store adversarial images, got {', '.join(storing)}")
    return problems


def stage_tree(stage: Stage) -> dict[str, Any]:
    """Return what a stage may say as plain nested dicts."""
    tree: dict[str, Any] = {"name": stage.name}
    for group in STAGE_GROUPS:
        value = getattr(stage, group)
        tree[group] = {**chosen_name(group, value), **plain(value)}
    tree["data"] = {key: value for key, value in tree["data"].items() if key in STAGE_DATA}
    tree["train"] = {key: value for key, value in tree["train"].items() if key not in OF_THE_RUN}
    return tree
