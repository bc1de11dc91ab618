"""Retrieval: similarities, precision and ROC by slow loops; attacks on queries and items by closed forms and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn

import clead
from clead.attacks.apgd import APGD
from clead.attacks.pgd import PGD
from clead.attacks.runner import run_attack
from clead.config import evaluation_config
from clead.data.base import RawSplit, RawSplits, with_classes
from clead.errors import UserError
from clead.evaluation.state import ResumableResults
from clead.evaluation.tasks.retrieval import GalleryAttack, measure_gallery, metrics
from clead.interfaces import ImageSet
from clead.models.nearest import TEMPERATURE, NearestItem
from clead.models.split import SplitModel, adapt
from clead.runs.gallery import cut_gallery, make_gallery
from clead.tasks.classification import TOWARDS_CLASS
from clead.tasks.retrieval import Retrieval, average_precision, check_gallery, class_similarity, verification_roc
from clead.threats.linf import Linf

EPS = 0.06


class Linear(SplitModel):
    """h = W (x − ½), of images (B, 1, 2, 2)."""

    def __init__(self, weight):
        super().__init__(2, len(weight))
        self.weight = nn.Parameter(weight)

    def _split(self, x):
        h = (x.flatten(1) - 0.5) @ self.weight.T
        return h, h[:, :2]


def units(count, size, seed):
    return nn.functional.normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)), dim=1)


def scene(items, classes, seed, queries=24):
    """A linear encoder with a gallery, and queries; no pixel comes near 0 or 1."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(items) % classes
    images = 0.5 + 0.8 * (torch.rand(items, 1, 2, 2, generator=draw) - 0.5)
    encoder = Linear(torch.randn(3, 4, generator=draw))
    with torch.no_grad():
        gallery = nn.functional.normalize(encoder.features(images), dim=1)
    x = 0.5 + 0.8 * (torch.rand(queries, 1, 2, 2, generator=draw) - 0.5)
    return NearestItem(encoder, gallery, labels, range(classes), images), ImageSet(images, labels), x


def most(model, x, winners, losers):
    """max over ‖δ‖∞ ≤ ε and the winners of min over the losers of ⟨h(x + δ), g_winner − g_loser⟩: a linear program each."""
    weight, gallery = model.encoder.weight.detach().double(), model.gallery.double()
    best = -math.inf
    for winner in winners:
        slopes = ((gallery[winner] - gallery[losers]) @ weight).numpy()
        values = slopes @ (x.flatten().double().numpy() - 0.5)
        rows = np.hstack([-slopes, np.ones((len(slopes), 1))])
        solved = linprog([0, 0, 0, 0, -1], A_ub=rows, b_ub=values, bounds=[(-EPS, EPS)] * 4 + [(None, None)])
        best = max(best, -solved.fun)
    return best


@given(st.integers(2, 9), st.integers(2, 4), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_the_largest_similarity_is_the_nearest_items_and_the_margin_that_of_wrong_and_right_items(items, classes, seed):
    z, gallery, labels = units(5, 3, seed), units(items, 3, seed + 1), torch.arange(items) % classes
    outputs, task = class_similarity(z, gallery, labels, classes), Retrieval()
    for row, query in enumerate(z):
        cosines = [float(query @ item) for item in gallery]
        nearest = int(labels[cosines.index(max(cosines))])
        assert int(task.predict(outputs)[row]) == nearest
        for y in range(min(classes, items)):
            right = max(c for c, label in zip(cosines, labels.tolist(), strict=True) if label == y)
            wrong = max((c for c, label in zip(cosines, labels.tolist(), strict=True) if label != y), default=-2.0)
            target = torch.full((5,), y)
            assert float(task.margin(outputs, target)[row]) == pytest.approx(wrong - right, abs=1e-6)
            assert bool(task.correct(outputs, target)[row]) == (nearest == y)


def test_precision_is_that_of_a_loop_with_wrong_items_first_among_equals():
    draw = torch.Generator().manual_seed(0)
    similarity = torch.randint(0, 6, (40, 12), generator=draw) / 6  # many are equal
    right = torch.rand(40, 12, generator=draw) < 0.4
    right[:, 0] = True
    for values, fits, precision in zip(similarity, right, average_precision(similarity, right), strict=True):
        ranked = sorted(zip(values.tolist(), fits.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))
        hits, total = 0, 0.0
        for rank, (_, fit) in enumerate(ranked, 1):
            hits += fit
            total += fit * hits / rank
        assert float(precision) == pytest.approx(total / hits)


def test_the_roc_is_that_of_counting_pairs():
    draw = torch.Generator().manual_seed(1)
    same, different = (
        torch.randn(80, generator=draw).round(decimals=1) + 1,
        torch.randn(300, generator=draw).round(decimals=1),
    )
    roc = verification_roc(same, different)
    above = (same[:, None] > different).double() + 0.5 * (same[:, None] == different).double()
    assert roc.area == pytest.approx(float(above.mean()))
    assert roc.points[0] == (0, 0) and roc.points[-1] == (1, 1)
    for threshold in (-0.5, 0.3, 1.2):
        pair = (float((different >= threshold).double().mean()), float((same >= threshold).double().mean()))
        assert any(pair == pytest.approx(point) for point in roc.points)
    assert roc.accepted == max(true for false, true in roc.points if false <= 0.01)
    nearest = min(roc.points, key=lambda point: abs(point[0] - 1 + point[1]))
    assert roc.equal_error == pytest.approx((nearest[0] + 1 - nearest[1]) / 2)


def test_with_one_item_of_each_class_an_attack_breaks_what_the_closed_form_says():
    model, items, x = scene(4, 4, 0, queries=60)
    y = model(x).detach().argmax(1)
    h, weight = model.encoder.features(x).detach(), model.encoder.weight.detach()
    value = torch.full((60,), -torch.inf)
    for wrong in range(4):
        gap = model.gallery[wrong] - model.gallery[y]
        reach = (gap * h).sum(1) + EPS * (gap @ weight).abs().sum(1)
        value = torch.where(y == wrong, value, torch.maximum(value, reach))
    clear = value.abs() > 1e-3
    for attack, objective in ((PGD(steps=30, restarts=4, keep="best"), "margin"), (APGD(loss="margin", targets=3), "")):
        x_adv = run_attack(attack, model, x, y, Linf(eps=EPS), objective=objective or "cross_entropy")
        robust = Retrieval().correct(model(x_adv), y)
        assert torch.equal(robust[clear], value[clear] < 0) and 5 < robust.sum() < 55


def test_with_several_items_an_attack_breaks_what_a_linear_program_breaks():
    model, items, x = scene(9, 3, 3)
    y = Retrieval().predict(model(x)).detach()
    x_adv = run_attack(PGD(steps=60, restarts=4, keep="best"), model, x, y, Linf(eps=EPS), objective="margin")
    robust, labels = Retrieval().correct(model(x_adv), y), model.labels
    values = [most(model, x[i], (labels != y[i]).nonzero()[:, 0].tolist(), labels == y[i]) for i in range(len(x))]
    clear = torch.tensor(values).abs() > 2e-3
    assert torch.equal(robust[clear], torch.tensor(values)[clear] < 0) and 3 < robust.sum() < 21


def test_an_attack_towards_one_item_is_one_on_a_gallery_of_items_and_agrees_with_a_linear_program():
    model, items, x = scene(5, 5, 3)  # each item is a class of its own
    goal = torch.arange(len(x)) % 5
    x_adv = run_attack(
        *(PGD(steps=60, restarts=4, keep="best"), model, x, goal, Linf(eps=EPS)), objective="margin", task=TOWARDS_CLASS
    )
    led = ~TOWARDS_CLASS.correct(model(x_adv), goal)
    values = torch.tensor([most(model, x[i], [int(goal[i])], torch.arange(5) != goal[i]) for i in range(len(x))])
    clear = values.abs() > 2e-3
    assert torch.equal(led[clear], values[clear] > 0) and 2 < led.sum() < 22


def test_figures_of_a_gallery_agree_with_brute_force(tmp_path):
    """On images of two pixels that are free, tried on a grid with its corners and edges."""
    draw = torch.Generator().manual_seed(5)
    encoder = Linear(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))  # the other two pixels do nothing
    angles = torch.rand(30, generator=draw) * 2 * math.pi
    images = torch.full((30, 4), 0.5)
    images[:, 0], images[:, 1] = 0.5 + 0.3 * angles.cos(), 0.5 + 0.3 * angles.sin()
    images, labels = images.view(30, 1, 2, 2), (angles * 3 / math.pi).long() % 3
    items, queries = cut_gallery(ImageSet(images, labels), 3)
    with torch.no_grad():
        gallery = nn.functional.normalize(encoder.features(items.images), dim=1)
    model = NearestItem(encoder, gallery, items.labels, "abc", items.images)
    attack = GalleryAttack(model, Linf(eps=EPS))
    first, second = (
        measure_gallery(attack, queries, queries.images, ResumableResults(path, {}), 0)
        for path in (tmp_path / "state",) * 2
    )
    assert all(torch.equal(first[key], second[key]) for key in first)  # the second time nothing is computed
    steps = torch.linspace(-EPS, EPS, 41)
    grid = torch.cartesian_prod(steps, steps, torch.zeros(1), torch.zeros(1)).view(-1, 1, 2, 2)
    holds = []
    for x, y in zip(queries.images, queries.labels, strict=True):
        z = model.features(x[None])[0].detach()
        cosines = model.gallery @ z
        right, wrong = cosines[items.labels == y].max(), cosines.where(items.labels != y, -2.0)
        around = model.features(items.images[wrong.argmax()] + grid).detach() @ z
        holds.append(bool(wrong.max() < right) and bool(around.max() < right))
    assert first["holds"].tolist() == holds and 0 < sum(holds) < len(holds)
    assert torch.equal(first["precision"], first["robust_precision"])  # the queries were given as they are
    for clean, worst, sign in (("same", "robust_same", 1), ("different", "robust_different", -1)):
        around = [model.features(x + grid).detach() for x in queries.images]
        assert (sign * (first[clean] - first[worst]) >= 0).all() and not torch.equal(first[clean], first[worst])
        bounds = [(sign * (z @ gallery.T)).amin(0) for z in around]  # of each item, of which one was drawn
        nearest = torch.stack(
            [(sign * value - bound).abs().min() for value, bound in zip(first[worst], bounds, strict=True)]
        )
        assert (nearest < 0.01).double().mean() > 0.9  # opposite an item there are two ways, and a search takes one
    shown = {metric.name: metric for metric in metrics(first, 0.9)}
    assert shown["verification: area under the ROC"].robust < shown["verification: area under the ROC"].clean
    assert shown["recall@1 with an attacked item"].robust == sum(holds) / len(holds)


def test_a_gallery_that_answers_nothing_is_refused():
    for count, labels, size, message in (
        (0, [], None, "has no item, got 0; give images of two classes or more: --gallery FOLDER"),
        (2, [1, 1], None, "got only 'dog', which would answer every query; add items of another: --gallery FOLDER"),
        (2, [0, 1], 7, "have 3 numbers each, the model's 7; make the gallery with this model"),
        (2, [0, 1, 1], None, "give one label per embedding"),
    ):
        with pytest.raises(UserError, match=message):
            check_gallery(torch.zeros(count, 3), torch.tensor(labels, dtype=torch.int64), size, ("cat", "dog"))
    with pytest.raises(UserError, match="must be finite"):
        check_gallery(torch.tensor([[torch.nan], [1.0]]), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="no class has more than 5 images, got 4 images in all"):
        cut_gallery(ImageSet(torch.zeros(4, 1, 2, 2), torch.tensor([0, 0, 1, 1])), 5)
    with pytest.raises(UserError, match="pairs of one class and of two, got 0 and 1"):
        verification_roc(torch.zeros(0), torch.zeros(1))


def test_the_gallery_is_so_many_of_each_class_and_the_queries_are_the_rest():
    images = torch.arange(12.0).view(12, 1, 1, 1)
    items, queries = cut_gallery(ImageSet(images, torch.tensor([0, 1, 2] * 3 + [0, 0, 3])), 2)
    assert items.labels.bincount().tolist() == [2, 2, 2, 1]
    assert sorted([*items.images.flatten().tolist(), *queries.images.flatten().tolist()]) == list(range(12))
    assert queries.images.flatten().tolist() == sorted(queries.images.flatten().tolist())


def test_features_are_unit_vectors_and_logits_similarities():
    model, items, x = scene(6, 3, 4)
    features, logits = model.features_and_logits(x)
    assert features.norm(dim=1).allclose(torch.ones(len(x)))
    assert torch.equal(logits, class_similarity(features, model.gallery, model.labels, 3) / TEMPERATURE)
    assert {"gallery", "labels"} <= model.state_dict().keys()


def test_classes_that_are_not_kept_are_not_there_and_the_others_are_numbered_anew():
    names = ("Latin/a", "Latin/b", "Greek/a", "dog")
    train = RawSplit(torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1), torch.tensor([0, 1, 2, 3] * 2))
    raw = with_classes(RawSplits(train, train.subset(torch.tensor([3, 2])), names), "dog, Latin/*")
    assert raw.classes == ("Latin/a", "Latin/b", "dog")
    assert raw.train.labels.tolist() == [0, 1, 2, 0, 1, 2] and raw.train.images.flatten().tolist() == [0, 1, 3, 4, 5, 7]
    assert raw.test.labels.tolist() == [2]
    assert "only images of 3 of 4 classes are read" in raw.notes[0]
    with pytest.raises(UserError, match=r"data.keep_classes must name classes that are there, got 'dgo'; did you mean"):
        with_classes(raw, "dgo")


def test_an_image_is_never_asked_for_where_it_is_an_item_itself(tmp_path):
    from PIL import Image

    images = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for number in range(4):  # two items of each class
        folder = tmp_path / "cats and dogs" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number, 0].numpy()).save(folder / f"{number}.png")
    task = Retrieval(gallery=tmp_path / "cats and dogs")
    data = ImageSet(images, torch.arange(6) % 2)
    made = make_gallery(task, data, ("cat", "dog"))
    assert (
        torch.equal(made.queries.images, images[4:])
        and "4 images that are items of the gallery, or nearly" in made.notes[1]
    )
    with pytest.raises(UserError, match="all 4 images to ask with are items of .*would find themselves"):
        make_gallery(task, data.subset(torch.arange(4)), ("cat", "dog"))


def test_a_copy_that_was_resized_and_saved_with_loss_is_seen(tmp_path):
    """Of smooth pictures: a JPEG of twice the size among the items is no query; in a gallery that is cut it is said."""
    from PIL import Image

    coarse = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1)
    images = (255 * smooth).round().to(torch.uint8)
    for number in range(4):
        folder = tmp_path / ("cat", "dog")[number % 2]
        folder.mkdir(exist_ok=True)
        picture = Image.fromarray(images[number].permute(1, 2, 0).numpy()).resize((64, 64), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.jpg", quality=80)
    data = ImageSet(images, torch.arange(6) % 2)
    made = make_gallery(Retrieval(gallery=tmp_path), data, ("cat", "dog"))
    assert torch.equal(made.queries.images, images[4:])
    twice = ImageSet(torch.cat([images, (images.int() + 1).clamp_max(255).to(torch.uint8)]), torch.arange(12) % 2)
    notes = make_gallery(Retrieval(items=3), twice, ("cat", "dog")).notes
    assert len(notes) == 2 and "queries are copies of items" in notes[1]
    assert len(make_gallery(Retrieval(items=1), data, ("cat", "dog")).notes) == 1


def test_of_a_model_from_elsewhere_the_record_says_what_is_compared():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4))
    model, images = adapt(net, sample_shape=(1, 4, 4)), torch.rand(12, 1, 4, 4)
    short = {"suite": "pgd", "steps": 1, "curve_points": 0, "check_images": 0, "gallery": 0}
    record = clead.evaluate(model, images, torch.arange(12) % 3, task=Retrieval(items=1), eps=0.01, **short)
    compared = "what is compared are the features that the layer '3' gets, not what the model returns"
    assert f"{compared}; if that is the embedding, give --task.features output" in record.notes


class Named(nn.Module):
    """An encoder that returns more than its embedding, and names classes that are none of the gallery's."""

    classes = ("cat", "dog")

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 5)

    def forward(self, x):
        return {"pooler_output": self.layer(x.flatten(1)).tanh(), "pixels": x}


FAST = {"suite": "pgd", "steps": 1, "curve_points": 0, "check_images": 0, "gallery": 0}


@pytest.mark.parametrize(
    ("layers", "features"),
    [([nn.Linear(16, 6), nn.Tanh()], None), ([nn.Linear(16, 6)], "output")],
    ids=["tanh", "linear"],
)
def test_an_encoder_without_a_classifier_is_asked_by_what_it_returns(layers, features):
    net, images = nn.Sequential(nn.Flatten(), *layers), torch.rand(24, 1, 4, 4)
    items, queries = cut_gallery(ImageSet(images, torch.arange(24) % 3), 2)
    task = Retrieval(items=2, features=features)
    record = clead.evaluate(net, images, torch.arange(24) % 3, task=task, eps=0.01, **FAST)
    with torch.no_grad():
        z = [nn.functional.normalize(net(each.images)) for each in (queries, items)]
    nearest = items.labels[(z[0] @ z[1].T).argmax(1)]
    assert record.clean_accuracy == (nearest == queries.labels).double().mean().item()
    assert "what is compared is what the model returns, 6 numbers per image" in record.notes
    assert record.data.classes == ["0", "1", "2"] and len(record.metrics) == 6


def test_a_model_from_elsewhere_is_asked_about_any_classes(tmp_path):
    overrides = [
        "--data.name",
        "digits",
        "--data.keep_classes",
        "7,8,9",
        "--task",
        "retrieval",
        "--train.device",
        "cpu",
    ]
    overrides += ["--eval.images", "12", *(f"--eval.{key}={value}" for key, value in FAST.items())]
    evaluation = clead.evaluate_external(
        Named(), evaluation_config("evaluation", overrides), out=tmp_path / "out", show=False
    )
    record = evaluation.record
    assert record.data.classes == ["7", "8", "9"] and record.data.n == 12
    assert "what is compared is what the model returns, 5 numbers per image" in record.notes
    assert any("'pooler_output' is taken" in note for note in record.notes)


class Detached(nn.Module):
    def forward(self, x):
        return x.detach().flatten(1).sin()


@pytest.mark.parametrize(
    ("net", "features", "message"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Tanh()),
            "classifier",
            "no layer of the model is known .* --model.classifier NAME",
        ),
        (
            nn.Conv2d(1, 3, 3),
            None,
            r"one embedding \(B, d\) per image, got \(3, 1, 4, 4\); return the mean over",
        ),
        (Detached(), None, "no gradient goes through the model .*; give the PyTorch module: --model FILE:NAME"),
    ],
)
def test_a_model_without_an_embedding_is_refused(net, features, message):
    with pytest.raises(UserError, match=message):
        task = Retrieval(items=1, features=features)
        clead.evaluate(net, torch.rand(12, 1, 4, 4), torch.arange(12) % 3, task=task, eps=0.01, **FAST)
