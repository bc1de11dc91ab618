"""A linear classifier on frozen features: the optimum it claims to be, attacked through both, on other data."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from clead import api, cli
from clead.config import load_recipe
from clead.errors import UserError
from clead.evaluation.state import ResumableResults
from clead.interfaces import ImageSet, Splits
from clead.measurements import probe as linear_probe
from clead.measurements.base import Computation, MeasurementRecord
from clead.measurements.probe import evaluate_linear_probe, fit_linear
from clead.models.split import AdaptedModel
from clead.threats.linf import Linf


def blobs(count, classes, seed, dim=5):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    scale = torch.tensor([1.0, 50.0, 0.02, 1.0, 3.0])
    return (centres[labels] + torch.randn(count, dim, generator=draw)) * scale + 7, labels


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_the_layer_is_the_optimum_of_the_penalised_cross_entropy(strength):
    """The gradient of ½‖W‖² + C·Σ CE in the rescaled features vanishes there, in NumPy."""
    features, labels = blobs(120, 3, seed=1)
    linear = fit_linear(features, labels, 3, strength)
    h = features.double().numpy()
    mean, deviation = h.mean(0), h.std(0)
    weight = linear.weight.detach().double().numpy() * deviation
    bias = linear.bias.detach().double().numpy() + linear.weight.detach().double().numpy() @ mean
    scaled = (h - mean) / deviation
    logits = scaled @ weight.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = p - np.eye(3)[labels.numpy()]
    slope = weight + strength * error.T @ scaled
    assert abs(slope).max() < 2e-3 * strength * 120 and abs(error.sum(0)).max() < 0.05
    assert abs(weight).max() > 0.05, "the zero layer would not do"


def test_two_classes_and_classes_without_an_image():
    features, labels = blobs(60, 2, seed=2)
    binary = fit_linear(features, labels, 2, 1.0)
    assert (binary(features).argmax(1) == labels).float().mean() > 0.7 and not binary.weight[0].any()
    many = fit_linear(features, labels * 3 + 1, 6, 1.0)
    found = many(features).argmax(1)
    assert set(found.tolist()) <= {1, 4} and torch.equal((found == 4), binary(features).argmax(1) == 1)
    constant = torch.cat([features, torch.full((60, 1), 3.0)], 1)
    assert torch.isfinite(fit_linear(constant, labels, 2, 1.0).weight).all()


def encoder(scale=1.0):
    """Features are the pixels, times ``scale``; the classifier of its own is of no use."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 6, bias=False), nn.Dropout(0.5), nn.Linear(6, 2))
    nn.init.zeros_(net[3].weight)
    with torch.no_grad():
        net[1].weight.copy_(scale * torch.eye(6))
    return AdaptedModel(net, sample_shape=(1, 2, 3), num_classes=2)


def bright(count, seed):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = torch.randint(60, 160, (count, 1, 2, 3), generator=draw)
    return ImageSet((images + 30 * labels[:, None, None, None]).to(torch.uint8), labels)


def probed(train, validation, test, threat, model=None, steps=1, strengths=(1.0,), **how):
    splits = Splits(train, validation, test, ("a", "b"), "")
    computation = Computation(show=False, **how)
    return evaluate_linear_probe(
        model or encoder(), splits, test, threat, computation, steps=steps, strengths=strengths
    )


def test_robust_accuracy_is_the_closed_form_of_a_linear_model():
    """Encoder and probe are linear: an L∞ ball of eps lowers the margin w·x + b by eps·‖w‖₁ and no pixel leaves [0, 1]."""
    train, validation, test = bright(80, 1), bright(40, 2), bright(60, 3)
    model, eps = encoder(3.0).train(), 0.05
    before = copy.deepcopy(model.state_dict())
    found = probed(train, validation, test, Linf(eps=eps), model, steps=20)
    x = (train.images / 255).flatten(1) * 3
    linear = fit_linear(x, train.labels, 2, 1.0)
    w = (linear.weight[1] - linear.weight[0]).detach() * 3
    with torch.no_grad():
        logits = linear((test.images / 255).flatten(1) * 3)
    margin = (logits[:, 1] - logits[:, 0]) * (2 * test.labels - 1)
    assert found.clean_flags == (margin > 0).tolist()
    assert found.robust_flags == (margin > eps * w.abs().sum()).tolist()
    assert 0.1 < found.robust.accuracy < found.clean.accuracy - 0.1, "else this could not fail"
    assert found.settings["C"] == 1.0 and found.settings["fitted"] == 80 and found.n == 60
    assert found.attack == "PGD-20, linf 0.05, through encoder and linear probe"
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(module.training for module in model.modules()) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("count", "seed"), [(10, 3), (12, 2)])  # one best, and two equal ones
def test_validation_images_choose_the_strength(count, seed):
    train, validation, test = bright(count, seed), bright(100, 50), bright(10, 3)
    threat = Linf(eps=0.01)

    def score(*strengths):
        found = probed(train, validation, test, threat, strengths=strengths)
        return found.settings["validation_accuracy"], found.settings["C"]

    alone = {c: score(c)[0] for c in (1e-4, 0.1, 100.0)}
    best = max(alone.values())
    assert min(alone.values()) < best and score(100.0, 0.1, 1e-4) == (best, min(c for c in alone if alone[c] == best))


def test_only_labelled_images_are_fitted():
    train, validation, test = bright(80, 1), bright(40, 2), bright(60, 3)
    mask = torch.arange(80) < 20
    few = dataclasses.replace(train, labelled=mask, labels=torch.where(mask, train.labels, 1 - train.labels))
    a = probed(few, validation, test, Linf(eps=0.02), steps=2)
    b = probed(bright(80, 1).subset(torch.arange(20)), validation, test, Linf(eps=0.02), steps=2)
    assert a.settings == b.settings and a.robust_flags == b.robust_flags and a.settings["fitted"] == 20


def test_what_was_finished_is_not_done_again(tmp_path, monkeypatch):
    train, validation, test = bright(40, 1), bright(20, 2), bright(30, 3)
    options = {"steps": 3, "batch_size": 10}
    whole = probed(train, validation, test, Linf(eps=0.03), **options)
    put, count = ResumableResults.save, 0

    def stop(self, *arguments):
        nonlocal count
        put(self, *arguments)
        count += 1
        if count == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResumableResults, "save", stop)
        probed(train, validation, test, Linf(eps=0.03), **options, state=ResumableResults(tmp_path / "s", {}))
    monkeypatch.setattr(linear_probe, "_chosen", None)  # the classifier is there
    again = probed(train, validation, test, Linf(eps=0.03), **options, state=ResumableResults(tmp_path / "s", {}))
    assert again.model_dump(exclude={"seconds"}) == whole.model_dump(exclude={"seconds"})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"steps": 0}, "got 60 images, 0 steps"),
        ({"strengths": [1.0, 0.0]}, "C must be above 0, got 1.0, 0.0"),
        ({"strengths": []}, "C must be above 0, got none"),
        ({"test": bright(0, 0)}, "got 0 images"),
        (
            {"train": ImageSet(bright(4, 0).images, torch.zeros(4).long())},
            "labelled training images of at least 2 classes",
        ),
    ],
)
def test_mistakes_are_one_line(keys, message):
    parts = {"train": bright(20, 1), "validation": bright(20, 2), "test": bright(60, 3), **keys}
    with pytest.raises(UserError, match=message):
        probed(threat=Linf(eps=0.1), **parts)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("probe") / "run"
    config = load_recipe(
        "digits-standard", ["--train.budget", "20", "--train.validate_images", "8", "--model.width", "8"]
    )
    api.train(config, out=out, show=False)
    return out


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["clead", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


@pytest.fixture
def parity(tmp_path):
    """Digits again, by another question: even or odd."""
    splits = load_recipe("digits-standard").data.load(0)
    path = tmp_path / "parity.npz"
    arrays = {}
    for name, part in (("train", splits.train), ("test", splits.test)):
        arrays |= {f"x_{name}": part.images[:400].numpy(), f"y_{name}": (part.labels[:400] % 2).numpy()}
    np.savez(path, **arrays, classes=np.array(["even", "odd"]))
    return path


@pytest.mark.slow
def test_the_command_measures_other_data_of_other_classes(run, parity, tmp_path, monkeypatch, capsys):
    words = ["--eval.images", "40", "--eval.steps", "3", "--threat.eps", "0.05", "--strengths", "0.01,1"]
    copy_ = tmp_path / "copy.json"
    code, out, err = call(
        monkeypatch, capsys, "probe", run, "--data.name", "npz", "--data.path", parity, *words, "--json", copy_
    )
    assert code == 0, err
    record = MeasurementRecord.model_validate(json.loads((run / "results" / "probe.json").read_text()))
    assert json.loads(copy_.read_text()) == json.loads(record.model_dump_json())
    assert record.data.classes == ["even", "odd"] and record.data.n == 40 and record.data.name == "parity.npz"
    assert record.threat.eps == 0.05 and record.settings["strengths"] == [0.01, 1.0] and record.settings["steps"] == 3
    result = record.result
    assert result.clean.accuracy > 0.7 and result.robust.accuracy < result.clean.accuracy
    assert result.settings["C"] in (0.01, 1.0) and result.settings["fitted"] == 360
    assert "withstand the PGD-3, linf 0.05, through encoder and linear probe attack" in " ".join(out.split())
    # With fewer labels another probe is fitted.
    code, out, err = call(
        monkeypatch,
        capsys,
        "probe",
        run,
        "--data.name",
        "npz",
        "--data.path",
        parity,
        "--data.labelled",
        "0.05",
        *words,
    )
    few = json.loads((run / "results" / "probe.json").read_text())
    assert code == 0 and few["result"]["settings"]["fitted"] == 18 and few["settings"]["labelled"] == 0.05


def test_mistakes_on_the_command_line(run, parity, monkeypatch, capsys):
    for words, message in (
        (["--eval.split", "val"], "eval.split: the validation images choose C, got val; use test"),
        (["--strengths", "1,a"], "strengths.1: input should be a valid number"),
        (["--strengths", "-1"], "C must be above 0, got -1.0"),
        (["--method.kl_weight", "1"], "--method.kl_weight: changes nothing here"),
        (["--data.path", str(parity), "--data.image_size", "12"], "was trained on images of shape (1, 8, 8)"),
    ):
        code, _, err = call(monkeypatch, capsys, "probe", run, *words)
        assert code == 2 and message in err and err.count("\n") == 1, (words, err)
