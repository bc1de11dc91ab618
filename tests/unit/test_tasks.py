"""Tasks: what is right, by slow loops and closed forms; nothing outside ``tasks/`` compares outputs with labels."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import clead
from clead.config import RunConfig, load_recipe
from clead.errors import UserError
from clead.tasks import TASKS
from clead.tasks.classification import CLASSIFICATION

ROOT = Path(clead.__file__).parent
LOGIT = st.one_of(st.floats(-5, 5), st.sampled_from([0.0, math.nan, math.inf, -math.inf]))


@given(st.lists(st.lists(LOGIT, min_size=3, max_size=3), min_size=1, max_size=4), st.data())
def test_right_is_a_finite_row_whose_first_largest_logit_is_the_labels(rows, data):
    labels = data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    expected = []
    for row, label in zip(rows, labels, strict=True):
        row = torch.tensor(row).tolist()  # as float32 rounds it
        finite = all(math.isfinite(value) for value in row)
        expected.append(finite and row.index(max(row)) == label)
    assert CLASSIFICATION.correct(torch.tensor(rows), torch.tensor(labels)).tolist() == expected


def test_loss_and_margin_are_the_closed_forms():
    logits, labels = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]]), torch.tensor([2, 0])
    z = [1.0, 3.0, 2.0]
    assert CLASSIFICATION.margin(logits, labels).tolist() == [1.0, 0.0]
    expected = [math.log(sum(map(math.exp, z))) - 2.0, math.log(3)]
    assert CLASSIFICATION.loss(logits, labels).tolist() == pytest.approx(expected)
    assert CLASSIFICATION.predict(logits).tolist() == [1, 0]
    assert CLASSIFICATION.rival(logits, torch.tensor([1, 0])).tolist() == [2, 1]


@pytest.mark.parametrize(
    "target, words",
    [
        (torch.zeros(3, 2, 2, dtype=torch.long), "a mask per image is for clead.evaluate"),
        (torch.zeros(3, 2), "give y.argmax(1)"),
        (torch.zeros(3, 1, dtype=torch.long), "give y.squeeze(1)"),
        (torch.zeros(3), "give y.long()"),
        (torch.zeros(2, dtype=torch.long), "one class number per image"),
        (torch.tensor([1, 2, 3]), "count from 1: give labels - 1"),
        (torch.tensor([0, -1, 2]), "leave out images without a label"),
        (torch.tensor([0, 1, 7]), "got 7; the model has 3 classes: give one of 8 or more"),
    ],
)
def test_wrong_targets_are_refused_in_one_line_with_the_remedy(target, words):
    with pytest.raises(UserError) as caught:
        CLASSIFICATION.check_target(target, 3, 3)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_outputs_that_are_no_logits_are_refused():
    with pytest.raises(
        UserError, match=r"logits must be float \(B, K\), got torch.float32 \(2, 3, 4\); name the output"
    ):
        CLASSIFICATION.check(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.long))
    CLASSIFICATION.check(torch.zeros(1, 3), torch.tensor([2, 0]))  # the outputs may be of the first image alone


def test_metrics_count_each_class():
    flags, labels = torch.tensor([True, False, True, True]), torch.tensor([0, 0, 2, 2])
    metrics = CLASSIFICATION.metrics(flags, labels, 3)
    assert metrics == {"accuracy": 0.75, "class_n": [2, 0, 2], "class_accuracy": [0.5, None, 1.0]}


def test_every_task_describes_itself_in_one_line():
    assert "classification" in TASKS.names()
    for _, kind in TASKS.items():
        assert "\n" not in kind().describe()


def test_nothing_else_takes_the_argmax_of_outputs():
    found = []
    for room in (
        "attacks",
        "methods",
        "evaluation",
        "measurements",
        "training",
        "serving",
        "playground",
        "export",
        "api",
    ):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                called = (
                    isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "argmax"
                )
                if called and node.args and ast.unparse(node.args[0]) in ("1", "-1"):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def test_a_task_is_named_on_the_command_line_and_kept_in_the_configuration():
    config = load_recipe("digits-pgd-at", ["--task", "classification"])
    assert config.task == CLASSIFICATION and config.to_dict()["task"] == {"name": "classification"}
    assert RunConfig.from_dict(config.to_dict()).task == CLASSIFICATION
    with pytest.raises(UserError, match="task.name: unknown task 'nonsense'"):
        load_recipe("digits-pgd-at", ["--task", "nonsense"])


def test_labels_of_another_shape_are_refused_with_the_task_that_fits():
    with pytest.raises(UserError, match=r"one class per image, got labels of shape \(3, 2\); give --task multilabel"):
        CLASSIFICATION.check_data(torch.zeros(3, 2), ["a", "b"])
    with pytest.raises(UserError, match="--task segmentation"):
        CLASSIFICATION.check_data(torch.zeros(3, 4, 4), ["a", "b"])
