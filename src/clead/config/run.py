"""The configuration of a run: one frozen tree, whose leaves are the settings of the objects themselves."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from clead.attacks.pgd import PGD
from clead.config.schema import GROUPS, TASK_SUITES, TUNE, Eval, Optim, Train, build, chosen_name, plain, type_problem
from clead.config.stages import (
    OF_THE_RUN,
    STAGE_DATA,
    STAGE_GROUPS,
    Stage,
    joint_problems,
    stage_problems,
    stage_tree,
    stages_of,
)
from clead.config.yaml_io import dump_yaml
from clead.errors import UserError, did_you_mean
from clead.methods import METHODS
from clead.models import MODELS
from clead.tasks import task_name
from clead.tasks.classification import CLASSIFICATION
from clead.threats import THREATS


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
    task: Any = CLASSIFICATION
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
        problems = [f"{group}: {problem}" for group, value in parts.items() if (problem := type_problem(group, value))]
        problems += stage_problems([stage.name for stage in self.stages], [vars(stage) for stage in self.stages])
        for stage in self.stages:
            groups = {group: getattr(stage, group) for group in STAGE_GROUPS}
            strange = [
                f"{group}: {mistake}" for group, value in groups.items() if (mistake := type_problem(group, value))
            ]
            problems += [f"stages.{stage.name}.{mistake}" for mistake in strange or joint_problems(groups)]
        problems += self._teacher_problems()
        if problems or (not self.stages and (problems := joint_problems(parts))):
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
        known = {key: getattr(stage.data, key) for key in STAGE_DATA if hasattr(self.data, key)}
        whole = {key: getattr(self.train, key) for key in OF_THE_RUN if key != "start_from"}
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
            tree[group] = {**chosen_name(group, value), **plain(value)}
        if self.stages:
            tree["stages"] = [stage_tree(stage) for stage in self.stages]
        return tree

    def to_yaml(self) -> str:
        """Return the complete configuration as YAML."""
        return dump_yaml(self.to_dict())

    @staticmethod
    def from_dict(tree: Any) -> RunConfig:
        """Validate nested dicts; raises UserError that lists every problem with its full key."""
        problems: list[str] = []
        if not isinstance(tree, dict):
            raise UserError(
                f"a recipe must be a mapping of {', '.join(GROUPS)}, got {type(tree).__name__}; "
                "write such as threat: {eps: 8/255}"
            )
        parts: dict[str, Any] = {}
        if tree.get("name") is not None:
            parts["name"] = str(getattr(tree["name"], "text", tree["name"]))
            if not re.fullmatch(r"\w[\w .+-]*", parts["name"]):
                problems.append(f"name: becomes part of a directory's name: letters, digits, '-', got {tree['name']!r}")
        for group in tree:
            if group not in (*GROUPS, "name", "stages", TUNE):
                problems.append(f"{group}: unknown group; {did_you_mean(str(group), GROUPS)}")
        for group in GROUPS:
            values = {} if tree.get(group) is None else tree[group]
            suites = TASK_SUITES.get(task_name(parts["task"])) if group == "eval" and "task" in parts else None
            if suites and isinstance(values, dict):
                values = {"suite": suites[0], **values}
            try:
                if not isinstance(values, dict):
                    raise UserError(
                        f"{group}: must be a mapping of keys, got {values!r}; write {group}: {{key: value}}"
                    )
                parts[group] = build(group, {str(key): value for key, value in values.items()})
            except UserError as error:
                problems.extend(error.problems)
        if tree.get("stages"):
            parts["stages"], of_stages = stages_of(tree, parts)
            # What is wrong in the common groups is not said once per stage.
            problems.extend(problem for problem in of_stages if problem.split(".", 2)[-1] not in problems)
        else:
            problems.extend(joint_problems(parts))
        if problems:
            raise UserError(*problems)
        return RunConfig(**parts)
