"""C-LEAD as published: its loss by loops, and the images it stores: whose, of which model, made once."""

import json
import math
import shlex

import numpy as np
import pytest
import torch

import clead
from clead.attacks.cw import CW
from clead.attacks.fgsm import FGSM
from clead.attacks.runner import run_attack
from clead.config import load_recipe
from clead.data.loaders import Loader, ViewSettings
from clead.errors import UserError
from clead.evaluation.state import ResumableResults
from clead.interfaces import Batch, ImageSet
from clead.methods.clead_published import CLeadPublished
from clead.models.build import build_model
from clead.models.compute_cost import CostMeter
from clead.models.small_cnn import SmallCNN
from clead.runs.directory import RunDir
from clead.training import offline_adversaries as stored_module
from clead.training.offline_adversaries import store_images
from clead.training.signals import Interrupted
from clead.weights.files import load_weights
from support import same, saved_weights

TEXT = """--model.width 4 --model.features 8 --data.limit_train 330 --data.limit_test 20 --data.batch_size 32
--method.name clead_published --method.stored_attack.name fgsm --data.view.crop 2
--train.epochs 1 --train.validate_every 1 --train.device cpu --optim.lr 0.002 --eval.images 15"""
TINY = shlex.split(TEXT)


def config(*overrides):
    return load_recipe("digits-standard", [*TINY, *overrides])


def fit(out, *overrides, **keys):
    return clead.train(config(*overrides), out=out, show=False, **keys)


def make_model(seed=0):
    return build_model(SmallCNN(width=4, features=8), 1, 10, (0.3,), (0.3,), seed=seed, sample_shape=(1, 8, 8))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A trained classifier, as the method takes it."""
    plain = [
        *shlex.split(TEXT.replace("--method.name clead_published --method.stored_attack.name fgsm", "")),
        "--train.epochs",
        "6",
    ]
    settings = load_recipe("digits-standard", plain)
    return clead.train(settings, out=tmp_path_factory.mktemp("start") / "run", show=False)


# ------------------------------------------------------------------------------------------------ the loss


def loss_by_loops(z, tau):
    """½ [mean_i l_i(z → z_aug) + mean_i l_i(z → z_adv)], the equation of the paper, in NumPy, one pair at a time."""
    clean, *others = ([row / np.linalg.norm(row) for row in view] for view in z)
    n, total = len(clean), 0.0
    for other in others:
        for i in range(n):
            top = math.exp(clean[i] @ other[i] / tau)
            below = sum(math.exp(clean[i] @ clean[j] / tau) for j in range(n) if j != i)
            below += sum(math.exp(clean[i] @ other[j] / tau) for j in range(n))
            total -= math.log(top / below) / n
    return total / 2


@pytest.mark.parametrize("tau", [0.1, 0.7])
def test_the_loss_is_that_of_the_paper_with_its_gradient(tau):
    model = make_model().double().eval()
    model.add_projection(6, seed=1)
    model.projection.double()
    draw = torch.Generator().manual_seed(0)
    clean, second, stored = torch.rand(3, 5, 1, 8, 8, generator=draw, dtype=torch.float64)
    batch = Batch(clean, torch.full((5,), -1), second, stored=stored)
    method = CLeadPublished(temperature=tau, embedding_dim=6)
    output = method(model, batch, threat=None, attack=None, generator=draw)

    def expected():
        with torch.no_grad():
            return loss_by_loops([model.projection(model.features(v)).numpy() for v in (clean, second, stored)], tau)

    assert output.loss.item() == pytest.approx(expected(), rel=1e-9) and output.loss > 0.1
    output.loss.backward()
    weight = model.encoder.linear.weight
    step = 1e-6
    for at in ((0, 0), (3, 2)):
        slope = weight.grad[at].item()
        with torch.no_grad():
            weight[at] += step
            up = expected()
            weight[at] -= 2 * step
            slopes = (up - expected()) / (2 * step)
            weight[at] += step
        assert slope == pytest.approx(slopes, rel=1e-4, abs=1e-7)
    assert model.classifier.weight.grad is None


def test_the_defaults_are_those_of_the_paper():
    method = CLeadPublished()
    assert (method.temperature, method.embedding_dim, method.stored_attack["name"]) == (0.1, 128, "cw")


# ------------------------------------------------------------------------------------------------ stored images


def test_a_batch_has_the_stored_images_of_its_own_images_in_every_order():
    images = torch.arange(50, dtype=torch.uint8).reshape(50, 1, 1, 1).expand(50, 1, 2, 2).contiguous()
    stored = (images.float() / 255 + 0.25).half()
    loader = Loader(ImageSet(images, torch.zeros(50).long()), 8, views=ViewSettings(stored=stored))
    orders = []
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            assert batch.stored.dtype == torch.float32
            assert torch.equal(batch.stored, stored[batch.index].float())
            assert torch.allclose(batch.stored, batch.images + 0.25, atol=1e-3)
        orders.append(batch.index.tolist())
    assert orders[0] != orders[1] != orders[2]  # it was shuffled
    assert Loader(ImageSet(images, torch.zeros(50).long()), 8).batch(0, 0).stored is None


@pytest.mark.slow
def test_the_starting_model_is_attacked_once_and_every_image_meets_its_own(start, tmp_path, monkeypatch):
    seen, real = [], CLeadPublished.views

    def views(self, model, batch, step):
        seen.append(batch)
        return real(self, model, batch, step)

    monkeypatch.setattr(CLeadPublished, "views", views)
    run = fit(tmp_path / "run", "--train.start_from", str(start.path), "--train.epochs", "2")
    settings = config()
    splits = settings.data.load(0)
    model = clead.load(start.path, weights="last")
    x, y = splits.train.images.float() / 255, splits.train.labels
    expected = run_attack(FGSM(), model, x, y, settings.threat)
    parts = [load_weights(tmp_path / "run" / "stored" / f"train-00000{n}.safetensors")[0] for n in (0, 1)]
    stored = torch.cat([part["x_adv"] for part in parts])
    assert stored.dtype == torch.float16 and torch.allclose(stored.float(), expected, atol=1e-3)
    assert ((stored.float() - x).abs().amax((1, 2, 3)) > 0.1).all()
    for batch in seen:
        own = stored[batch.index].float()
        assert torch.equal(batch.stored[: len(own)], own) and torch.equal(batch.images, x[batch.index])
    assert len(seen) == 1 + run.outcome.steps and run.outcome.steps > 10  # the first counts the cost of a step
    # Of the test images as many as an evaluation counts.
    test = load_weights(tmp_path / "run" / "stored" / "test-000000.safetensors")[0]
    assert len(test["x_adv"]) == 15
    assert torch.equal(torch.cat([p["wrong"] for p in parts]), model(stored.float()).argmax(1) != y)


def test_the_classifier_rests_and_the_encoder_learns(tmp_path):
    before = make_model()
    run = fit(tmp_path / "run", model=before)
    untouched = make_model().state_dict()
    for name, tensor in saved_weights(run.path).items():
        assert torch.equal(tensor, untouched[name]) == (not name.startswith("encoder")), name


def test_the_neighbours_are_logged_and_choose_best(tmp_path):
    run = fit(tmp_path / "run", "--train.epochs", "3")
    lines = [line for line in RunDir(run.path).history() if line["kind"] == "validation"]
    assert len(lines) == 3 and all("clean_accuracy" not in line for line in lines)
    best = max(line["knn_accuracy"] for line in lines)
    assert run.outcome.best_validation == best > 0.3
    assert run.outcome.best_step == [line["step"] for line in lines if line["knn_accuracy"] == best][-1]


def test_cw_is_stored_as_far_as_it_goes_or_clipped(start, tmp_path):
    quick = [
        "--method.stored_attack.name",
        "cw",
        "--method.stored_attack.steps",
        "20",
        "--method.stored_attack.search_steps",
        "2",
    ]
    quick += [
        "--method.stored_attack.step_size",
        "0.1",
        "--method.stored_attack.weight",
        "10",
        "--threat.eps",
        "0.05",
        "--data.limit_train",
        "40",
    ]
    splits = config(*quick).data.load(0)
    model = clead.load(start.path)
    cpu = torch.device("cpu")
    free = store_images(config(*quick), splits, model, tmp_path / "free", device=cpu, show=False)
    clipped = config(*quick, "--method.stored_clip", "true")
    inside = store_images(clipped, splits, model, tmp_path / "clip", device=cpu, show=False)
    x, y = splits.train.images.float() / 255, splits.train.labels
    expected = run_attack(CW(steps=20, search_steps=2, step_size=0.1, weight=10), model, x, y, "l2")
    assert torch.allclose(free.images.float(), expected, atol=1e-3)
    assert (free.images.float() - x).abs().max() > 0.1
    assert 0 < (inside.images.float() - x).abs().max() <= 0.05 + 1e-3
    assert torch.allclose(inside.images.float(), clipped.threat.project(expected, x), atol=1e-3)


def test_what_storing_costs_is_counted(tmp_path):
    settings = config("--method.stored_attack.name", "pgd", "--method.stored_attack.steps", "3")
    splits = settings.data.load(0)
    model = make_model()
    with CostMeter(model) as meter:
        made = store_images(settings, splits, model, tmp_path / "a", device=torch.device("cpu"), show=False)
    # 3 times forward and backward to the inputs, and a few forwards to see what can be folded; no test image.
    assert 6 < made.forward_equivalents < 6.05
    assert meter.forward_equivalents > 6 * len(splits.train)
    run = fit(tmp_path / "run", "--method.stored_attack.name", "pgd", "--method.stored_attack.steps", "3")
    steps = RunDir(run.path).history()[0]
    per_step = 9 * 32 / len(splits.train)  # three views, each forward and back
    assert steps["forward_equivalents"] == pytest.approx(made.forward_equivalents + steps["step"] * per_step, abs=0.01)
    assert run.outcome.forward_equivalents == pytest.approx(made.forward_equivalents + run.outcome.steps * per_step)
    assert json.loads((run.path / "outcome.json").read_text())["forward_equivalents"] > 6


def test_a_kill_between_parts_loses_none(tmp_path, monkeypatch):
    whole = fit(tmp_path / "whole")
    real, kept = ResumableResults.save, []

    class Killed(BaseException):
        pass

    def put(self, key, tensors, data):
        real(self, key, tensors, data)
        kept.append(key)
        raise Killed

    monkeypatch.setattr(ResumableResults, "save", put)
    for resume in (False, True):
        with pytest.raises(Killed):
            fit(tmp_path / "killed", resume=resume)
    assert kept == ["train-000000", "train-000001"]
    first = tmp_path / "killed" / "stored" / "train-000000.safetensors"
    before = first.stat().st_mtime_ns
    monkeypatch.setattr(ResumableResults, "save", real)
    again = fit(tmp_path / "killed", resume=True)
    assert first.stat().st_mtime_ns == before
    assert same(saved_weights(whole.path), saved_weights(again.path)) and same(
        saved_weights(whole.path, "best"), saved_weights(again.path, "best")
    )
    assert again.outcome.forward_equivalents == whole.outcome.forward_equivalents
    for part in ("train-000000", "train-000001", "test-000000"):
        a, b = (load_weights(tmp_path / run / "stored" / f"{part}.safetensors")[0] for run in ("whole", "killed"))
        assert same(a, b)


def test_ctrl_c_while_images_are_stored_says_how_to_go_on(tmp_path, monkeypatch):
    real = ResumableResults.save

    def put(self, key, tensors, data):
        real(self, key, tensors, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(ResumableResults, "save", put)
    with pytest.raises(
        Interrupted, match=f"stopped while images were stored; continue with --resume --out {tmp_path}/run"
    ):
        fit(tmp_path / "run")


def test_images_that_version_0_1_began_are_taken_up(tmp_path, monkeypatch):
    """Its header has the version in place of the format, and its parts are signed for that header."""
    settings, cpu = config(), torch.device("cpu")
    splits, model = settings.data.load(0), make_model()
    whole = store_images(settings, splits, model, tmp_path / "whole", device=cpu, show=False)
    real = ResumableResults.__init__

    def of_version_0_1(self, path, header, **options):
        real(
            self,
            path,
            {**{key: value for key, value in header.items() if key != "format"}, "clead": "0.1.0"},
            **options,
        )

    with monkeypatch.context() as patch:
        patch.setattr(ResumableResults, "__init__", of_version_0_1)
        store_images(settings, splits, model, tmp_path / "run", device=cpu, show=False)
    (tmp_path / "run" / "train-000001.safetensors").unlink()
    saved = []
    save = ResumableResults.save
    monkeypatch.setattr(
        ResumableResults, "save", lambda self, key, *part: (saved.append(key), save(self, key, *part))[1]
    )
    again = store_images(settings, splits, model, tmp_path / "run", device=cpu, show=False)
    assert saved == ["train-000001"] and torch.equal(again.images, whole.images)
    assert json.loads((tmp_path / "run" / "state.json").read_text())["clead"] == "0.1.0"
    assert json.loads((tmp_path / "whole" / "state.json").read_text())["format"] == 1


def test_images_of_another_start_are_refused(tmp_path):
    settings, cpu = config(), torch.device("cpu")
    splits = settings.data.load(0)
    store_images(settings, splits, make_model(), tmp_path, device=cpu, show=False)
    with pytest.raises(UserError, match="stored by another training .model: ") as caught:
        store_images(settings, splits, make_model(seed=1), tmp_path, device=cpu, show=False)
    assert "\n" not in str(caught.value)


def test_hidden_labels_are_not_looked_at(tmp_path):
    """Where a label is hidden, the attack leads away from what the model says."""
    from dataclasses import replace

    settings, cpu, model = config("--data.limit_train", "60"), torch.device("cpu"), make_model().eval()
    splits = settings.data.load(0)
    x = splits.train.images.float() / 255
    seen = torch.arange(len(x)) % 2 == 0
    hidden = replace(splits, train=ImageSet(splits.train.images, splits.train.labels, seen))
    made = store_images(settings, hidden, model, tmp_path, device=cpu, show=False)
    with torch.no_grad():
        y = torch.where(seen, splits.train.labels, model(x).argmax(1))
    assert not torch.equal(y, splits.train.labels)
    assert torch.allclose(made.images.float(), run_attack(FGSM(), model, x, y, settings.threat), atol=1e-3)


# ------------------------------------------------------------------------------------------------ settings


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return saved_weights(fit(tmp_path_factory.mktemp("reference") / "run").path)


CHANGES = {
    "stored_attack": ("--method.stored_attack.name", "pgd"),
    "stored_attack.own": ("--method.stored_attack.random_start", "false"),
    "temperature": ("--method.temperature", "0.5"),
    "embedding_dim": ("--method.embedding_dim", "5"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_every_setting_changes_the_result(key, reference, tmp_path):
    if key == "stored_attack.own":
        CHANGES[key] = ("--method.stored_attack.name", "pgd", "--method.stored_attack.steps", "1")
    assert not same(saved_weights(fit(tmp_path / "run", *CHANGES[key]).path), reference)


def test_no_setting_is_forgotten_here():
    assert set(CLeadPublished.__pydantic_fields__) - set(CHANGES) == {"stored_clip"}  # tested with cw


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("--method.stored_attack.name cv", "method.stored_attack: unknown attack 'cv'; did you mean 'cw'?"),
        ("--method.stored_attack.eps 1", "method.stored_attack: eps: unknown key"),
        ("--method.stored_attack.name pgd --method.stored_attack.steps 0", "method.stored_attack: steps: "),
        ("--method.stored_clip true", "method: stored_clip is for attacks for the smallest perturbation: fgsm stays"),
        ("--data.cutmix 1", "data.cutmix: a mixed image is not the one whose adversarial image is stored, got 1"),
        (
            "--train.trainable classifier",
            "train.trainable: a contrastive loss trains encoder and projection head, which are frozen then, got classifier",
        ),
        ("--method.temperature 0", "method.temperature: "),
    ],
)
def test_mistakes_are_one_line(overrides, said):
    with pytest.raises(UserError) as caught:
        config(*shlex.split(overrides))
    (problem,) = caught.value.problems
    assert problem.startswith(said) and "\n" not in problem and ("got" in problem or "unknown" in problem)


def test_the_configuration_is_complete_and_comes_back():
    settings = config("--method.stored_attack.name", "cw", "--method.stored_attack.steps", "7")
    assert settings.method.stored_attack == {
        "name": "cw",
        "steps": 7,
        "search_steps": 9,
        "step_size": 0.01,
        "weight": 0.001,
    }
    assert type(settings).from_dict(settings.to_dict()) == settings
    assert stored_module.attack_of(settings.method.stored_attack) == CW(steps=7)
