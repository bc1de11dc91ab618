"""Overrides from the command line, ``--group.key VALUE``, and what each changes in a recipe's tree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from clead.config.reference import documented_keys, text_keys
from clead.config.run import RunConfig
from clead.config.schema import DEFAULT_NAME, GROUPS, LENGTHS, REGISTRY_GROUPS, TUNE
from clead.config.yaml_io import parse_text, parse_value
from clead.data.datasets import DATASETS
from clead.errors import UserError, did_you_mean
from clead.renamed import RETIRED, retired_problem


def parse_overrides(arguments: Sequence[str]) -> list[tuple[list[str], Any]]:
    """Return (key path, value) pairs from ``--group.key VALUE`` or ``--group.key=VALUE``; values are read as YAML scalars or lists.

    ``--task NAME`` is short for ``--task.name NAME``.

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
        key = "task.name" if key == "task" else key
        if "." not in key:
            full = sorted({f"--{row[0]}.{row[2]}" for row in documented_keys() if row[2] == key.replace("-", "_")})
            hint = (
                f"did you mean {' or '.join(full)}?" if full else f"settings are --group.key with {', '.join(GROUPS)}"
            )
            problems.append(f"--{key}: unknown option; {hint}")
            continue
        if not value:
            problems.append(f"--{key}: the value is empty; give --{key} VALUE, or null for none")
            continue
        path = key.replace("-", "_").split(".")
        inside = path[2:] if path[0] == "stages" else path
        pairs.append((path, parse_text(value) if tuple(inside) in text_keys() else parse_value(value)))
    if problems:
        raise UserError(*problems)
    return pairs


def apply_overrides(tree: Any, overrides: Sequence[str]) -> RunConfig:
    """Return the configuration of a recipe's tree, which overrides change in place; raises UserError that lists every problem."""
    if isinstance(tree, dict):
        change(tree, parse_overrides(overrides))
    return RunConfig.from_dict(tree)


def change(tree: dict[str, Any], changes: Iterable[tuple[list[str], Any]]) -> None:
    """Put pairs of ``parse_overrides`` into a recipe's tree, in place; raises UserError for a key that cannot be changed so."""
    changes = list(changes)
    keys = [path for path, _ in changes]
    if ["data", "path"] in keys and ["data", "name"] not in keys and not _has_path(tree):
        changes.append((["data", "name"], "auto"))
    # A choice drops the other choice's keys: choices first, so that keys given beside one stay, in any order.
    # What is given for all stages comes before what is given for one.
    changes.sort(key=lambda pair: (pair[0][0] == "stages", not _chooses(pair[0]) and not _chooses(pair[0][2:])))
    for path, value in changes:
        if tuple(path[-2:]) in RETIRED:
            problem = retired_problem(*path[-2:], value)
            raise UserError(f"--{'.'.join([*path[:-2], ''])}{problem}")
        if path[0] == TUNE:
            raise UserError(f"--{'.'.join(path)}: changes nothing here; give it to clead tune")
        if path[0] == "stages":
            _override_stage(tree, path, value)
            continue
        _override(tree, path, value)
        _override_stages(tree, path)
    _one_length(tree, {path[1] for path, value in changes if path[0] == "train" and value is not None})


def _has_path(tree: dict[str, Any]) -> bool:
    data = tree.get("data")
    name = data.get("name") if isinstance(data, dict) else None
    return name not in DATASETS.names() or "path" in DATASETS.get(name).__pydantic_fields__


def _chooses(path: list[str]) -> bool:
    return bool(path) and path[0] in REGISTRY_GROUPS and path[1:] == [REGISTRY_GROUPS[path[0]][1]]


def _one_length(tree: dict[str, Any], given: set[str]) -> None:
    """Let an override of one length replace the recipe's."""
    if given & {*LENGTHS}:
        for key in {*LENGTHS} - given:
            tree["train"].pop(key, None)


def _override_stages(tree: dict[str, Any], path: list[str]) -> None:
    """Let an override of a common key hold in the stages too, in place of what they say of it; not that of a choice by name."""
    stages = tree.get("stages")
    for stage in stages if isinstance(stages, list) and not _chooses(path) else ():
        *parents, last = path
        values = stage
        for parent in parents:
            values = values.get(parent) if isinstance(values, dict) else None
        if isinstance(values, dict):
            for key in LENGTHS if path[:1] == ["train"] and last in LENGTHS else (last,):
                values.pop(key, None)


def _override_stage(tree: dict[str, Any], path: list[str], value: Any) -> None:
    """Set ``stages.NAME.group.key``; the stage may be given by its number, from 1 on, too."""
    stages = tree.get("stages")
    stages = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    names = [str(stage.get("name")) for stage in stages]
    if len(path) < 4:
        raise UserError(f"--{'.'.join(path)}: a setting of a stage has four parts; give --stages.NAME.group.key VALUE")
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
        stage[group].setdefault(key, common.get(key, DEFAULT_NAME[group]))
    _override(stage, path[2:], value)
    if group == "train" and value is not None:
        _one_length(stage, {path[3]})


def _override(tree: dict[str, Any], path: list[str], value: Any) -> None:
    group, *rest = path
    values = tree.get(group)
    values = dict(values) if isinstance(values, dict) else {}
    if _chooses(path) and values.get(rest[0], DEFAULT_NAME[group]) != value:
        registry, _ = REGISTRY_GROUPS[group]
        known: Iterable[str] = ()
        if group == "data" and value in registry.names():
            known = registry.get(value).__pydantic_fields__
        values = {k: v for k, v in values.items() if k in known}
    tree[group] = values
    for key in rest[:-1]:
        child = values.get(key)
        values[key] = dict(child) if isinstance(child, dict) else {}
        values = values[key]
    values[rest[-1]] = value
