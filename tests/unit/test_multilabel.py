"""Several labels: losses by loops, linear models against closed form and brute force, tables and lists, and what is refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch import nn

import clead
from clead.config import load_recipe
from clead.data.datasets.multilabel import MultiLabelImages
from clead.errors import UserError
from clead.tasks.multilabel import MultiLabel
from support import generator, noise_png

TASK = MultiLabel()
LOGITS = st.lists(st.lists(st.floats(-6, 6, width=32), min_size=3, max_size=3), min_size=1, max_size=4)
PLAIN = {"curve_points": 0, "check_images": 0, "suite": "quick", "task": "multilabel"}


@settings(max_examples=30, deadline=None)
@given(LOGITS, st.data())
def test_losses_margins_and_verdicts_are_those_of_a_loop(rows, data):
    label = st.lists(st.sampled_from([0, 1, -1]), min_size=3, max_size=3).filter(lambda row: row != [-1] * 3)
    target = data.draw(st.lists(label, min_size=len(rows), max_size=len(rows)))
    z, y = torch.tensor(rows), torch.tensor(target)
    for k, (row, labels) in enumerate(zip(rows, target, strict=True)):
        known = [(value, label) for value, label in zip(row, labels, strict=True) if label >= 0]
        losses = [math.log1p(math.exp(-value if label else value)) for value, label in known]
        assert TASK.loss(z, y)[k].item() == pytest.approx(sum(losses), abs=1e-4)
        assert TASK.margin(z, y)[k].item() == pytest.approx(max(-value if label else value for value, label in known))
        right = [(value > 0) == bool(label) for value, label in known]
        assert TASK.correct(z, y)[k].item() == all(right)
        assert TASK.score(z, y)[k].item() == pytest.approx(sum(right) / len(right))
    assert TASK.training_loss(z, y).item() == pytest.approx(
        TASK.loss(z, y).sum().item() / int((y >= 0).sum()), rel=1e-4
    )
    assert TASK.divergence(z, z).abs().max() < 1e-5


def test_the_divergence_is_that_of_independent_labels():
    p, q = torch.tensor([[0.3, 0.9]]), torch.tensor([[0.6, 0.2]])
    expected = sum(a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)) for a, b in ((0.3, 0.6), (0.9, 0.2)))
    assert TASK.divergence(p.logit(), q.logit()).item() == pytest.approx(expected, rel=1e-5)


def linear(pixels: int = 6, labels: int = 3) -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, labels))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(labels, pixels, generator=generator(0)))
        model[1].bias.copy_(-model[1].weight.sum(1) / 2)
    return model


def test_the_worst_cases_of_a_linear_model_are_the_closed_form_and_no_corner_of_the_ball_is_worse():
    model, eps = linear(), 0.02
    x = 0.3 + 0.4 * torch.rand(24, 1, 2, 3, generator=generator(1))
    with torch.no_grad():
        z = model(x)
        y = (z + 0.1 * torch.randn(z.shape, generator=generator(2)) > 0).long()
    y[::5, 1] = -1
    record = clead.evaluate(model, x, y, eps=eps, classes=["a", "b", "c"], **PLAIN)
    side, known = 2 * y.clamp_min(0) - 1, y >= 0
    worst = z - side * eps * model[1].weight.detach().abs().sum(1)
    clean, robust = (((scores > 0) == (y == 1)) & known for scores in (z, worst))
    assert record.clean_flags == (clean | ~known).all(1).tolist()
    assert record.robust_flags == (robust | ~known).all(1).tolist() and 0 < sum(record.robust_flags) < 24
    for k, label in enumerate(record.per_class):
        of = known[:, k]
        assert (label.name, label.n) == ("abc"[k], int(of.sum()))
        assert label.clean_accuracy == pytest.approx(clean[of, k].double().mean().item())
        assert label.robust_accuracy == pytest.approx(robust[of, k].double().mean().item())
    metrics = {metric.name: metric for metric in record.metrics}
    alone = metrics["labels right, each attacked by itself"]
    assert (alone.clean, alone.robust) == pytest.approx((clean.sum().item() / alone.n, robust.sum().item() / alone.n))
    corners = torch.tensor(list(itertools.product((-eps, eps), repeat=6))).view(-1, 1, 1, 2, 3)
    with torch.no_grad():
        answers = torch.stack([model(x + corner) > 0 for corner in corners]) == (y == 1)
    fewest = (answers & known & clean).sum(2).amin(0)  # of one perturbation; a label that is wrong before stays so
    one = metrics["labels right, one perturbation"]
    assert alone.robust <= int(fewest.sum()) / one.n <= one.robust + 1e-9
    assert one.robust < (int(fewest.sum()) + 3) / one.n  # and the search comes near
    precisions = [
        [average_precision_score(y[known[:, k], k], scores[known[:, k], k]) for k in range(3)] for scores in (z, worst)
    ]
    mean = metrics["mean average precision"]
    assert (mean.clean, mean.robust) == pytest.approx(tuple(map(np.mean, precisions)), abs=1e-6)


@pytest.fixture
def table(tmp_path):
    for k in range(12):
        (tmp_path / f"{k}.png").write_bytes(noise_png(8, 8, seed=k))
    rows = [f"{k}.png,{'test' if k % 3 == 0 else 'train'},{k % 2},{'' if k == 4 else int(k < 6)}" for k in range(12)]
    (tmp_path / "table.csv").write_text("path,split,odd,small\n" + "\n".join(rows))
    return tmp_path / "table.csv"


def test_a_table_has_a_column_for_each_label_and_empty_cells_are_unknown(table):
    splits = MultiLabelImages(path=table, val_fraction=0.25).load(0)
    assert splits.classes == ("odd", "small") and len(splits.test) == 4
    assert splits.test.labels.tolist() == [[0, 1], [1, 1], [0, 0], [1, 0]]
    assert [0, -1] in torch.cat([splits.train.labels, splits.val.labels]).tolist()
    TASK.check_data(splits.train.labels, splits.classes)


def test_parquet_files_have_lists_of_labels(tmp_path):
    for split, lists in (("train", [["cat", "dog"], [], ["dog"], ["owl"], ["cat"], []]), ("test", [["owl"], ["cat"]])):
        images = [{"bytes": noise_png(8, 8, seed=k), "path": None} for k in range(len(lists))]
        unknown = [["owl"] if each == ["dog"] else [] for each in lists]
        pq.write_table(pa.table({"image": images, "labels": lists, "unknown": unknown}), tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match="--task multilabel --data.name multilabel"):
        load_recipe("digits-pgd-at", ["--data.path", str(tmp_path)]).data.load(0)
    splits = MultiLabelImages(path=tmp_path, val_fraction=0.2).load(0)
    assert splits.classes == ("cat", "dog", "owl") and splits.test.labels.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert sorted(torch.cat([splits.train.labels, splits.val.labels]).tolist())[1:3] == [[0, 0, 0], [0, 0, 1]]


def test_bad_tables_are_refused(table):
    text = table.read_text()
    table.write_text(text.replace("1.png,train,1,1", "1.png,train,1,1,0"))
    with pytest.raises(UserError, match="line 3"):
        MultiLabelImages(path=table).load(0)
    table.write_text(text.replace("1.png,train,1,1", "1.png,train,1,2"))
    with pytest.raises(UserError, match="at least two columns of labels.*got odd"):
        MultiLabelImages(path=table).load(0)
    with pytest.raises(UserError, match=r"line 3: the label 'small' must be 0, 1, -1 or empty \(unknown\), got '2'"):
        MultiLabelImages(path=table, columns="odd,small").load(0)
    with pytest.raises(UserError, match="no column 'big', but odd, small"):
        MultiLabelImages(path=table, columns="odd,big").load(0)


@pytest.mark.parametrize(
    "labels, words",
    [
        (torch.zeros(4, 2, dtype=torch.long), "labels must be 3 per image, one for each name and logit, got 2"),
        (torch.full((4, 3), 2), r"0, 1 or -1 \(unknown\), got 2 in row 0, label 0"),
        (torch.full((4, 3), -1), "every image needs a known label, got 4 without any, the first in row 0"),
        (torch.zeros(4, dtype=torch.long), r"must be 0, 1 or -1 of shape \(4, L\)"),
        (torch.zeros(3, 3, dtype=torch.long), r"shape \(4, .\), got torch.int64 \(3, 3\)"),
    ],
)
def test_labels_of_another_form_are_refused(labels, words):
    with pytest.raises(UserError, match=words):
        clead.evaluate(linear(), torch.rand(4, 1, 2, 3), labels, eps=0.1, classes=["a", "b", "c"], **PLAIN)


def test_methods_that_need_classes_are_refused_with_those_that_do_not(table):
    options = ["--task", "multilabel", "--data.name", "multilabel", "--data.path", str(table), "--train.epochs", "1"]
    for recipe, words in (("digits-clead", "supcon .*contrastive_weight 0"), ("digits-mart", "knows no multilabel")):
        with pytest.raises(UserError, match=words):
            clead.train(load_recipe(recipe, options), show=False)
    with pytest.raises(UserError, match="one class per image, got labels of shape .*; give --task multilabel"):
        clead.train(load_recipe("digits-pgd-at", options[2:]), show=False)
