"""Masks under attack, from images to record: figures, worst cases, resuming, sharing out, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

import clead
from clead.attacks.apgd import APGD
from clead.attacks.masks import MaskAPGD
from clead.attacks.pgd import PGD
from clead.config import Eval
from clead.errors import UserError
from clead.evaluation import mask_checks
from clead.evaluation.correctness import accuracy_under_attack
from clead.evaluation.evaluator import evaluate_model
from clead.evaluation.objects import object_scores
from clead.evaluation.plan import EvaluationOptions
from clead.evaluation.processes import Shard
from clead.evaluation.suites import NamedAttack
from clead.evaluation.tasks import evaluate_task, segmentation
from clead.interfaces import ImageSet
from clead.losses.pixels import VOID
from clead.models.split import adapt
from clead.report.html import write_report
from clead.report.run import RunResult
from clead.results.masks import bootstrap, counts_of, mean_iou, pixel_accuracy
from clead.results.record import Record
from clead.results.target import EvaluationTarget
from clead.tasks.segmentation import SEGMENTATION
from clead.threats import THREATS
from support import generator

K, N = 3, 7
TARGET = EvaluationTarget("net", "conv", "given", "given", "test", "given", ("road", "tree", "car"), task=SEGMENTATION)
THREAT = THREATS.get("linf")(eps="8/255")
QUICK = {"suite": "sea-quick", "steps": 8, "curve_points": 0, "check_images": 0, "batch_size": 3}


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, K, 3, padding=1)).eval()


def scenes() -> ImageSet:
    """Masks are the network's answers with every eighth pixel wrong, and a corner of void."""
    images = torch.randint(256, (N, 3, 8, 8), generator=generator(1), dtype=torch.uint8)
    with torch.no_grad():
        masks = network()(images / 255).argmax(1)
    wrong = torch.rand(masks.shape, generator=generator(2)) < 1 / 8
    masks = torch.where(wrong, (masks + 1) % K, masks)
    masks[:2, :2, :2] = VOID
    return ImageSet(images, masks.to(torch.uint8))


def evaluated(
    model: nn.Module | None = None, images: ImageSet | None = None, *, threat=THREAT, target=TARGET, **changes
):
    given = {key: changes.pop(key) for key in ("attacks", "options") if key in changes}
    options = given.pop("options", EvaluationOptions(show=False))
    settings = Eval(**{**QUICK, **changes})
    what = (model or network(), images or scenes(), threat, settings, target)
    return evaluate_task(*what, options=options, **given)


@pytest.fixture(scope="module")
def evaluation():
    return evaluated(gallery=N, curve_points=2, curve_images=3)


def same(a: Record, b: Record) -> bool:
    """Whether two records hold the same figures."""
    changing = {"seconds": 0, "created": "", "command": "", "memory": None, "notes": []}
    plain = [each.model_copy(update=changing).model_dump() for each in (a, b)]
    for each in plain:
        for attack in each["attacks"]:
            attack["seconds"] = 0
    return plain[0] == plain[1]


def test_the_worst_case_is_at_most_that_of_each_attack(evaluation):
    record = evaluation.record
    miou = record.metrics[0]
    assert record.worst.accuracy <= min(attack.robust.accuracy for attack in record.attacks) < record.clean.accuracy
    assert miou.name == "mIoU" and miou.robust <= min(record.masks.attack_miou) < miou.clean
    assert [attack.num_successes for attack in record.attacks] == [N, N, N] and record.robust_flags == []
    assert all(attack.max_distance <= float(THREAT.eps) * 1.0001 for attack in record.attacks)
    assert record.suite == "sea-quick" and record.masks.size == (8, 8) and record.masks.void == 8


def test_every_figure_follows_from_the_counts_of_the_record(evaluation):
    record = Record.model_validate_json(evaluation.record.model_dump_json())
    clean, fewest, chosen = (
        counts_of(texts, K) for texts in (record.masks.clean, record.masks.lowest_accuracy, record.masks.lowest_miou)
    )
    assert record.clean.accuracy == pytest.approx(pixel_accuracy(clean.total()))
    assert (record.worst.accuracy, record.worst.low, record.worst.high) == bootstrap(fewest, "pixel_accuracy")
    assert record.metrics[0].robust == pytest.approx(mean_iou(chosen.total()))
    assert record.metrics[0].robust_interval == bootstrap(chosen, "mean_iou")[1:]
    assert [each.pixels for each in record.masks.classes] == clean.total().true.tolist()


def test_figures_are_those_of_torchmetrics_on_the_pictures(evaluation):
    artifacts, record = evaluation.artifacts, evaluation.record
    how = {"num_classes": K, "ignore_index": VOID}
    clean, masks = artifacts["predicted"].long(), artifacts["labels"].long()
    assert record.metrics[0].clean == pytest.approx(multiclass_jaccard_index(clean, masks, **how).item(), abs=1e-6)
    for key, figure in (("predicted", record.clean), ("predicted_adv", record.worst)):
        value = multiclass_accuracy(artifacts[key].long(), masks, average="micro", **how).item()
        assert figure.accuracy == pytest.approx(value, abs=1e-6)


def test_pictures_are_of_the_worst_images_worst_first(evaluation):
    artifacts = evaluation.artifacts
    right = (artifacts["predicted_adv"] == artifacts["labels"]) & (artifacts["labels"] != VOID)
    accuracy = right.sum((1, 2)) / (artifacts["labels"] != VOID).sum((1, 2))
    assert (accuracy.diff() >= 0).all() and sorted(artifacts["index"].tolist()) == list(range(N))
    assert (THREAT.distance(artifacts["x_adv"] - artifacts["x"]) <= float(THREAT.eps) + 1e-6).all()
    fewer = evaluated(gallery=2).artifacts
    assert fewer["index"].tolist() == artifacts["index"][:2].tolist()
    assert torch.equal(fewer["x_adv"], artifacts["x_adv"][:2])


def test_objects_are_scored_by_size(evaluation):
    masks, answers = (evaluation.artifacts[key].numpy() for key in ("labels", "predicted"))
    totals = sum(object_scores(*pair) for pair in zip(answers, masks, strict=True))
    figures = [metric for metric in evaluation.record.metrics if metric.name.startswith("IoU of")]
    sizes = [size for size in range(3) if totals[size, 0]]
    assert [(each.n, each.clean) for each in figures] == [
        (totals[k, 0], pytest.approx(totals[k, 1] / totals[k, 0])) for k in sizes
    ]
    assert all(each.robust < each.clean for each in figures)


def test_the_curve_falls(evaluation):
    first, second = evaluation.record.curve
    assert first.eps == pytest.approx(float(THREAT.eps)) and second.robust.accuracy < first.robust.accuracy


@pytest.fixture
def short_checks(monkeypatch):
    for name, value in {"STEPS": 16, "FEWER_STEPS": 12, "QUERIES": 40}.items():
        monkeypatch.setattr(mask_checks, name, value)
    return {"check_images": 3, "steps": 8}


@pytest.mark.parametrize(("norm", "eps"), [("linf", "8/255"), ("l2", 0.5), ("l1", 24)])
def test_a_healthy_model_passes_the_checks(norm, eps, short_checks):
    model = nn.Conv2d(3, K, 1, bias=False).eval()
    model.weight.data = torch.tensor([[3.0, -1, 0], [0, 3, -1], [-1, 0, 3]]).reshape(3, 3, 1, 1)
    images = scenes()
    masks = model(images.images / 255).argmax(1).to(torch.uint8)
    threat = THREATS.get(norm)(eps=eps)
    checks = evaluated(model, ImageSet(images.images, masks), threat=threat, **short_checks).record.checks
    assert [check for check in checks if not check.passed] == []
    assert all("%" in each.explanation and "\\" not in each.explanation for each in checks if each.name == "steps")
    names = {"noise", "steps", "black box", "unbounded", "monotone", "gradients", "logits", "deterministic"}
    assert {check.name for check in checks} == names


class Rounds(nn.Module):
    """What has no gradient: its images are rounded to 41 values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x * 40).round() / 40 + 0 * x)


def test_hidden_gradients_and_probabilities_are_found(short_checks):
    checks = {check.name: check.passed for check in evaluated(Rounds(), **short_checks).record.checks}
    assert not checks["gradients"] and not checks["black box"] and not checks["unbounded"]
    soft = nn.Sequential(network(), nn.Softmax(1)).eval()
    assert not {check.name: check.passed for check in evaluated(soft, **short_checks).record.checks}["logits"]


def test_a_stopped_evaluation_continues_to_the_same_record(tmp_path, monkeypatch):
    whole = evaluated(gallery=2)
    attack, calls = MaskAPGD.perturb, []

    def stops(self, *args, **kwargs):
        calls.append(self.loss)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return attack(self, *args, **kwargs)

    monkeypatch.setattr(MaskAPGD, "perturb", stops)
    options = EvaluationOptions(state=tmp_path / "state", show=False)
    with pytest.raises(KeyboardInterrupt):
        evaluated(gallery=2, options=options)
    again = evaluated(gallery=2, options=options)
    assert len(calls) == 5 + 5 and same(whole.record, again.record)
    assert all(torch.equal(value, again.artifacts[key]) for key, value in whole.artifacts.items())


def test_a_curve_of_other_settings_is_not_taken_up(tmp_path, monkeypatch):
    def stops(*args):
        raise KeyboardInterrupt

    options = EvaluationOptions(state=tmp_path / "state", show=False)
    with monkeypatch.context() as patched:
        patched.setattr(segmentation, "mask_checks", stops)
        with pytest.raises(KeyboardInterrupt):
            evaluated(curve_points=2, curve_images=3, options=options)
    with pytest.raises(UserError, match="eval.gallery: 24 there, 2 here.*--fresh"):  # pictures would lack their attacks
        evaluated(gallery=2, options=options)
    again = evaluated(curve_points=4, curve_images=2, options=options).record
    assert same(again, evaluated(curve_points=4, curve_images=2).record) and len(again.curve) == 4


def test_shards_make_the_record_of_one_process(tmp_path):
    state = tmp_path / "state"
    for index in (1, 2):
        assert evaluated(gallery=2, options=EvaluationOptions(state=state, shard=Shard(index, 2), show=False)) is None
    merged = evaluated(gallery=2, options=EvaluationOptions(state=state, merge=True, show=False))
    whole = evaluated(gallery=2)
    assert same(whole.record, merged.record)
    assert all(torch.equal(value, merged.artifacts[key]) for key, value in whole.artifacts.items())


def test_a_mask_of_void_alone_changes_no_figure_of_a_validation():
    images = scenes()
    more = ImageSet(
        torch.cat([images.images, images.images[:1]]), nn.functional.pad(images.labels, (0,) * 5 + (1,), value=VOID)
    )
    how = {"seed": 0, "device": torch.device("cpu"), "task": SEGMENTATION}
    model = adapt(network(), sample_shape=(3, 8, 8))
    figures = [
        accuracy_under_attack(model, each, THREAT, PGD(steps=2, random_start=False), "margin", **how)
        for each in (images, more)
    ]
    assert figures[0] == pytest.approx(figures[1]) and figures[0]["robust_accuracy"] < figures[0]["clean_accuracy"]


def test_attacks_given_by_hand_meet_every_image():
    attacks = [NamedAttack("PGD-5 cross_entropy", PGD(steps=5)), NamedAttack("margin", PGD(steps=5), "margin")]
    record = evaluated(attacks=attacks).record
    assert [attack.attacked for attack in record.attacks] == [N, N] and record.suite == "attacks"
    assert record.worst.accuracy < record.clean.accuracy


def test_an_image_whose_gradient_is_not_finite_counts_as_wrong_throughout():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            z = self.inner(x)
            flat = (x.amax((1, 2, 3)) > 0.9).float()[:, None, None, None]
            return (z + ((z - z.detach()).abs() + (1 - flat)).sqrt() - (1 - flat)).nan_to_num()

    images = scenes()
    pixels = images.images.clamp(max=200)
    pixels[1, 0, 0, 0] = 255
    record = evaluated(Broken(), ImageSet(pixels, images.labels), batch_size=N).record
    assert all(attack.lost == [1] for attack in record.attacks) and "images [1]" in " ".join(record.notes)
    right = counts_of(record.masks.lowest_accuracy, K).hit.sum(-1)
    assert right[1] == 0 and np.delete(right, 1).min() > 0


WRONG_DATA = ImageSet(scenes().images, torch.zeros(N, dtype=torch.int64))
CLASSES = dataclasses.replace(TARGET, classes=("a", "b"))
LARGER = ImageSet(scenes().images, nn.functional.pad(scenes().labels, (0, 1)))


class Doubled(nn.Module):
    """Answers at twice the size, or twice."""

    def __init__(self, inner: nn.Module, several: bool = False) -> None:
        super().__init__()
        self.inner, self.several = inner, several

    def forward(self, x: Tensor) -> Any:
        z = self.inner(x)
        return [z, 2 * z] if self.several else nn.functional.interpolate(z, scale_factor=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: evaluated(suite="quick"), "is for the task classification, and this is segmentation; use --eval.suite sea"),
        (lambda: evaluated(images=WRONG_DATA), "classification"),
        (lambda: evaluated(attacks=[NamedAttack("APGD", APGD())]), "use --attack.name pgd, or --eval.suite sea"),
        (lambda: evaluated(nn.Sequential(network(), nn.Conv2d(K, K + 1, 1))), "4 classes per pixel, the data has 3"),
        (lambda: evaluated(nn.Sequential(network(), nn.Flatten(), nn.Linear(192, K))), "give --task classification"),
        (lambda: evaluated(threat=THREATS.get("l0")(eps=3)), "suite sea-quick is defined for linf, l2 and l1"),
        (lambda: evaluated(images=LARGER), "masks must have the images' size, got masks of (8, 9) for images of (8, 8)"),
        (lambda: evaluated(Doubled(network())), "returns logits of (16, 16) for images of (8, 8); let it return the images'"),
        (lambda: evaluated(nn.Sequential(network(), nn.Conv2d(K, 1, 1))), "torch.cat([torch.zeros_like(z), z], 1)"),
        (lambda: evaluated(Doubled(network(), several=True)), "name the one: --model.output 0 (in Python: clead.adapt("),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(make, message):
    with pytest.raises(UserError) as refused:
        make()
    text = str(refused.value)
    assert message in text and "\n" not in text and ("give --task segmentation" not in text or "classif" in text)


def test_a_classifier_is_not_given_a_suite_for_masks():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, K)).eval()
    labels = ImageSet(scenes().images, torch.zeros(N, dtype=torch.int64))
    target = EvaluationTarget("net", "linear", "given", "given", "test", "given", TARGET.classes)
    with pytest.raises(
        UserError, match="suite sea is for the task segmentation, and this is classification; use --eval.suite standard"
    ):
        evaluate_model(model, labels, THREAT, Eval(suite="sea"), target)


def test_python_evaluates_and_compares_any_module(tmp_path):
    """A module that answers at half the resolution, in a dictionary, as libraries' do."""

    class Library(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(network(), nn.AvgPool2d(2))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": self.inner(x)}

    images = scenes()
    settings = {"steps": 4, "curve_points": 0, "check_images": 0, "show": False, "classes": TARGET.classes}
    records = [
        clead.evaluate(
            model, images.images, images.labels, task="segmentation", suite="sea-quick", name=name, **settings
        )
        for name, model in (("plain", network()), ("half", Library()))
    ]
    assert records[0].clean.accuracy > records[1].clean.accuracy
    comparison = clead.compare(records)
    assert comparison["pairs"] == [] and [each["metric"] for each in comparison["masks"]] == [
        "pixel_accuracy",
        "mean_iou",
    ]
    assert comparison["masks"][0]["difference"] == pytest.approx(records[0].worst.accuracy - records[1].worst.accuracy)
    one_more = nn.Conv2d(K, K + 1, 1)  # a class that no mask has, and that it answers where no other logit is above 0
    one_more.weight.data, one_more.bias.data = torch.eye(K + 1, K)[:, :, None, None], torch.zeros(K + 1)
    target = dataclasses.replace(TARGET, classes=("a", "b", "c", "d"))
    more = evaluated(nn.Sequential(network(), one_more).eval(), target=target).record
    fewer = evaluated().record
    assert counts_of(more.masks.lowest_miou, K + 1).predicted[:, K].sum() > 0
    one, other = (clead.compare(pair)["masks"][1]["difference"] for pair in ([fewer, more], [more, fewer]))
    assert one == pytest.approx(-other) == pytest.approx(fewer.metrics[0].robust - more.metrics[0].robust)
    path = write_report([RunResult(record.run, record) for record in records], tmp_path / "report.html", title="Masks")
    html = path.read_text().replace("&nbsp;", " ").replace("\N{NO-BREAK SPACE}", " ")
    assert "IoU of each class" in html and "of the pixels right" in html and "AutoAttack" not in html
    with pytest.raises(UserError, match='for masks give task="segmentation"'):
        clead.evaluate(network(), images.images, images.labels, show=False)
    with pytest.raises(UserError, match="for a class per pixel give --task segmentation"):
        clead.evaluate(Library(), images.images, WRONG_DATA.labels, show=False)


def test_the_report_shows_the_worst_images(evaluation, tmp_path):
    artifacts = {key: value.numpy() for key, value in evaluation.artifacts.items()}
    path = write_report([RunResult("net", evaluation.record, artifacts)], tmp_path / "report.html", title="Masks")
    section = path.read_text().partition('<section id="masks"')[2].partition("</section>")[0]
    shown = [int(number) for number in re.findall(r"image (\d+): [\d.]+.% of the pixels right when clean", section)]
    assert list(dict.fromkeys(shown)) == (evaluation.artifacts["index"] + 1).tolist()
    assert section.count("data:image/png;base64,") == N + 1 and "road, tree, car" in section
