"""Attacks as Python functions: derived from the settings, with a stub for editors; targeted attacks, by closed forms and peers."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import clead.attacks
from clead.attacks import ATTACKS, UNRESTRICTED
from clead.attacks.apgd import APGD
from clead.attacks.capabilities import capabilities
from clead.attacks.fmn import FMN
from clead.attacks.functions import PYTHON_DEFAULTS
from clead.attacks.pgd import PGD
from clead.attacks.runner import run_attack
from clead.attacks.spatial import Spatial
from clead.config import Eval
from clead.errors import UserError
from clead.evaluation import attacking
from clead.evaluation.evaluator import evaluate_model
from clead.evaluation.plan import EvaluationOptions
from clead.evaluation.suites import NamedAttack
from clead.interfaces import ImageSet
from clead.results.target import EvaluationTarget
from clead.tasks.classification import CLASSIFICATION, TOWARDS_CLASS
from clead.threats.linf import Linf
from support import ROOT

SHIPPED = (
    "apgd",
    "cw",
    "deepfool",
    "eot_pgd",
    "fab",
    "fgsm",
    "fmn",
    "mi_fgsm",
    "patch",
    "pgd",
    "rays",
    "spatial",
    "square",
)
TARGETED = ("apgd", "cw", "eot_pgd", "fab", "fgsm", "fmn", "mi_fgsm", "pgd", "square")
QUICK = {
    "apgd": {"eps": 0.3, "steps": 10},
    "cw": {"eps": 1.5, "steps": 60, "search_steps": 4, "weight": 1.0, "step_size": 0.05},
    "eot_pgd": {"eps": 0.3, "steps": 10, "draws": 2},
    "fab": {"eps": 0.3, "steps": 10},
    "fgsm": {"eps": 0.3},
    "fmn": {"eps": 0.3, "steps": 40},
    "mi_fgsm": {"eps": 0.3},
    "pgd": {"eps": 0.3, "steps": 10},
    "square": {"eps": 0.3, "queries": 300},
}


def linear(k=4, seed=0):
    """Return a linear model of 1×3×3 images."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, k))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(k, 9, generator=generator))
        model[1].bias.copy_(-model[1].weight.sum(1) / 2)  # grey is on every boundary
    return model


def batch(n=12, seed=1):
    x = 0.4 + 0.2 * torch.rand(n, 1, 3, 3, generator=torch.Generator().manual_seed(seed))
    return x, linear()(x).argmax(1)


def test_every_shipped_attack_is_a_function_with_its_settings():
    for name in SHIPPED:
        function, kind = getattr(clead.attacks, name), {**dict(ATTACKS.items()), **dict(UNRESTRICTED.items())}[name]
        parameters = inspect.signature(function).parameters
        assert list(parameters)[:3] == ["model", "x", "y"] and set(kind.__pydantic_fields__) <= set(parameters)
        assert (
            all(f"{key}:" in function.__doc__ for key in parameters)
            and inspect.cleandoc(kind.__doc__) in function.__doc__
        )
        assert ("target" in parameters) == (name in TARGETED) == capabilities(kind).targeted
        assert ("seed" in parameters) == (not capabilities(kind).deterministic)
    assert inspect.signature(clead.attacks.pgd).parameters["steps"].default == 50 == PYTHON_DEFAULTS["pgd"]["steps"]
    assert inspect.signature(clead.attacks.patch).parameters["size"].default == "1/16"


@pytest.mark.slow
def test_the_stubs_for_editors_are_up_to_date():
    """In a process of its own: other tests register attacks that are not shipped."""
    code = "import json, generate; print(json.dumps(generate.stubs()))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "docs"), str(ROOT / "src")])}
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    for name, text in json.loads(made.stdout.splitlines()[-1]).items():
        assert (ROOT / "src/clead/attacks" / name).read_text() == text, f"{name} is old; run: python docs/generate.py"
        compile(text, name, "exec")


def test_unknown_and_missing_arguments_are_named():
    x, y = batch()
    with pytest.raises(TypeError, match=r"pgd\(\) has no argument 'step'; did you mean 'steps'"):
        clead.attacks.pgd(linear(), x, y, eps=0.1, step=3)
    with pytest.raises(TypeError, match=r"pgd\(\) needs a value for eps"):
        clead.attacks.pgd(linear(), x, y)


def test_fgsm_takes_the_longer_step_with_a_random_start():
    model, (x, y) = linear(), batch()
    attacked = [clead.attacks.fgsm(model, x, y, eps=0.1, random_start=True, step_size=size) for size in (None, 1.25, 1)]
    assert torch.equal(attacked[0], attacked[1]) and not torch.equal(attacked[0], attacked[2])


def test_targeted_pgd_and_fgsm_are_the_closed_form_of_a_linear_model():
    """Towards class t of two, log p(t) rises along sign(w_t − w_other) everywhere: the best point is the corner of the box."""
    model, (x, _) = linear(2), batch()
    y = model(x).argmax(1)
    chosen, target = y == 0, 1
    x, y = x[chosen], y[chosen]
    corner = (x + 0.05 * (model[1].weight[1] - model[1].weight[0]).sign().view(1, 3, 3)).clamp(0, 1)
    assert torch.allclose(clead.attacks.pgd(model, x, y, eps=0.05, target=target), corner, atol=1e-6)
    assert torch.allclose(clead.attacks.fgsm(model, x, y, eps=0.05, target=target), corner, atol=1e-6)
    assert torch.allclose(clead.attacks.mi_fgsm(model, x, y, eps=0.05, target=target), corner, atol=1e-6)


@pytest.mark.parametrize("objective", ["cross_entropy", "margin"])
def test_one_targeted_step_follows_the_written_out_gradient(objective):
    model, (x, y) = linear(), batch()
    target = (y + 2) % 4
    logits, weight = model(x), model[1].weight
    if objective == "cross_entropy":
        slope = weight[target] - logits.softmax(1) @ weight
    else:
        rival = torch.tensor(
            [max((k for k in range(4) if k != t), key=z.__getitem__) for z, t in zip(logits, target, strict=True)]
        )
        slope = weight[target] - weight[rival]
    expected = (x + 0.02 * slope.sign().view_as(x)).clamp(0, 1)
    assert torch.allclose(
        clead.attacks.fgsm(model, x, y, eps=0.02, target=target, objective=objective), expected, atol=1e-6
    )


def nearest(model, x, target):
    """Return the L2 distance to the region of ``target`` of a linear model, per image, by brute force over active sets of one."""
    weight, z = model[1].weight.double(), model(x).double()
    gaps = [z[:, k] - z.gather(1, target[:, None])[:, 0] for k in range(z.shape[1])]
    sizes = [(weight[target] - weight[k]).norm(dim=1).clamp_min(1e-9) for k in range(z.shape[1])]
    return torch.stack([gap.clamp_min(0) / size for gap, size in zip(gaps, sizes, strict=True)]).amax(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cw", "fmn"])
def test_the_nearest_image_of_a_class_is_as_near_as_geometry_allows(name):
    """No point of the class is nearer than the farthest of its half-spaces; with two classes that is the distance."""
    model, (x, _) = linear(2), batch()
    y = model(x).argmax(1)
    target = 1 - y
    options = {"steps": 150, "search_steps": 6, "step_size": 0.003} if name == "cw" else {"norm": "l2", "steps": 300}
    x_adv = getattr(clead.attacks, name)(model, x, y, target=target, **options)
    assert torch.equal(model(x_adv).argmax(1), target)
    assert torch.allclose((x_adv - x).flatten(1).norm(dim=1).double(), nearest(model, x, target), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("name", TARGETED)
def test_success_is_that_the_target_is_predicted(name):
    """Where the corner of the ball that a linear model likes best for the class is of the class, a targeted attack gets there."""
    model, (x, y) = linear(), batch(24)
    target = (y + 1) % 4
    x_adv = getattr(clead.attacks, name)(model, x, y, target=target, **QUICK[name])
    hit = model(x_adv).argmax(1) == target
    assert hit.float().mean() >= (0.4 if name in ("fgsm", "mi_fgsm", "square") else 0.6), name
    untargeted = getattr(clead.attacks, name)(model, x, y, **QUICK[name])
    assert (model(untargeted).argmax(1) == target).float().mean() < hit.float().mean()  # it goes anywhere else
    size = (x_adv - x).flatten(1)
    assert (size.norm(dim=1) <= 1.5 + 1e-5).all() if name == "cw" else size.abs().max() <= 0.3 + 1e-5


def test_images_of_the_target_class_come_back_with_a_warning(caplog):
    model, (x, y) = linear(), batch()
    target = int(y[0])
    alone = y != target
    with caplog.at_level("WARNING", logger="clead"):
        x_adv = clead.attacks.pgd(model, x, y, eps=0.1, steps=5, target=target)
    count = int((y == target).sum())
    assert f"{count} of 12 images are of the target class: they are left out" in caplog.text
    assert torch.equal(x_adv[~alone], x[~alone])
    assert torch.equal(x_adv[alone], clead.attacks.pgd(model, x[alone], y[alone], eps=0.1, steps=5, target=target))


@pytest.mark.parametrize(
    "target, words",
    [
        (7, r"target must be in \[0, 4\), got 7; give a class from 0 to 3"),
        (-1, r"target must be in \[0, 4\), got -1"),
        (torch.zeros(3, dtype=torch.long), r"int64 of shape \(12,\), got torch.int64 \(3,\)"),
        (torch.zeros(12), r"got torch.float32 \(12,\)"),
        ("3", "target must be a class number"),
    ],
)
def test_targets_that_are_none_are_refused(target, words):
    x, y = batch()
    with pytest.raises(UserError, match=words):
        clead.attacks.pgd(linear(), x, y, eps=0.1, target=target)


def test_what_cannot_be_aimed_says_so():
    model, (x, y) = linear(), batch()
    with pytest.raises(TypeError, match=r"deepfool\(\) has no argument 'target'"):
        clead.attacks.deepfool(model, x, y, target=1)
    for attack, threat in (
        (ATTACKS.get("rays")(), Linf(eps=0.1)),
        (Spatial(), None),
        (ATTACKS.get("deepfool")(), "l2"),
    ):
        with pytest.raises(
            UserError, match="cannot aim at a class; leave out the target, or use one of apgd, cw, eot_pgd"
        ):
            run_attack(attack, model, x, (y + 1) % 4, threat, task=TOWARDS_CLASS)
    with pytest.raises(UserError, match="objective 'kl' knows no target; give --objective cross_entropy or margin"):
        clead.attacks.pgd(model, x, y, eps=0.1, target=(y + 1) % 4, objective="kl")
    with pytest.raises(UserError, match="target is the label of every image"):
        clead.attacks.pgd(model, x, y, eps=0.1, target=y)


@pytest.mark.parametrize(
    "attack, threat, words",
    [
        (Spatial(), Linf(eps=0.1), "Spatial keeps to images of its own"),
        (PGD(), None, "PGD needs a norm and a radius"),
        (PGD(), "l2", "PGD looks for no smallest perturbation"),
        (FMN(), "l7", "unknown threat 'l7'"),
        (ATTACKS.get("rays")(), "linf", "RayS looks for no smallest perturbation"),
    ],
)
def test_the_runner_refuses_what_the_class_does_not_state(attack, threat, words):
    x, y = batch()
    with pytest.raises(UserError, match=words):
        run_attack(attack, linear(), x, y, threat)


def test_the_targeted_task_is_the_other_way_round():
    logits, target = torch.tensor([[1.0, 3.0, 2.0], [0.0, 5.0, 5.5], [torch.nan, 0, 9]]), torch.tensor([1, 1, 2])
    assert TOWARDS_CLASS.correct(logits, target).tolist() == [False, True, True]  # taken for it, not, no answer
    assert torch.equal(TOWARDS_CLASS.margin(logits[:2], target[:2]), torch.tensor([1.0, -0.5]))
    assert torch.equal(TOWARDS_CLASS.loss(logits[:2], target[:2]), -CLASSIFICATION.loss(logits[:2], target[:2]))


@pytest.fixture(scope="module")
def torchattacks():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("torchattacks")
    except ImportError:
        pytest.skip("torchattacks is not installed")


def trained():
    """Return a small convolutional network that has learnt three clear patterns, with images of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 3))
    patterns = torch.rand(3, 1, 12, 12)
    y = torch.arange(30) % 3
    x = (patterns[y] * 0.6 + 0.2 + 0.05 * torch.randn(30, 1, 12, 12)).clamp(0, 1)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model, x, y


@pytest.mark.parametrize("name", ["PGD", "FGSM"])
def test_targeted_attacks_are_those_of_torchattacks(torchattacks, name):
    """Same start (the image itself), steps and sizes: the same images up to rounding where no gradient is near 0."""
    model, x, y = trained()
    target = (y + 1) % 3
    with contextlib.redirect_stdout(None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "PGD":
            theirs = torchattacks.PGD(model, eps=0.1, alpha=0.02, steps=8, random_start=False)
        else:
            theirs = torchattacks.FGSM(model, eps=0.1)
        theirs.set_mode_targeted_by_label(quiet=True)
        expected = theirs(x, target)
    if name == "PGD":
        ours = clead.attacks.pgd(
            model, x, y, eps=0.1, step_size=0.02, steps=8, random_start=False, keep="last", target=target
        )
    else:
        ours = clead.attacks.fgsm(model, x, y, eps=0.1, target=target)
    assert ((ours - expected).abs() < 1e-5).float().mean() > 0.99
    assert torch.equal(model(ours).argmax(1), model(expected).argmax(1))


def test_a_targeted_evaluation_resumes_with_the_same_flags_and_attacks_nothing_again(tmp_path, monkeypatch):
    """What is taken for the class is checked again as that: a part of a targeted attack is not dropped as a lie."""
    model, x = (
        linear(),
        torch.randint(80, 176, (24, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)),
    )
    labels = model(x / 255).argmax(1)
    images = ImageSet(x, labels).subset((labels != 2).nonzero()[:, 0])
    target = EvaluationTarget("m", "linear", "given", "d", "test", "f", ("a", "b", "c", "d"))
    aimed = [
        NamedAttack("PGD towards c", PGD(steps=5), target=2),
        NamedAttack("APGD towards c", APGD(steps=5), target=2),
    ]
    options = Eval(curve_points=0, check_images=0, batch_size=8)

    def evaluated():
        result = evaluate_model(
            model,
            images,
            Linf(eps=0.1),
            options,
            target,
            attacks=aimed,
            options=EvaluationOptions(state=tmp_path / "state", show=False),
        )
        return [
            (part.flags, part.num_successes, part.settings["target"]) for part in result.record.attacks
        ], result.record.notes

    first, notes = evaluated()
    assert 0 < first[0][1] < len(images) and first[0][2] == 2
    assert any(
        "PGD towards c is targeted: an image counts as broken only where it is taken for c" in note for note in notes
    )
    monkeypatch.setattr(attacking, "run_attack", lambda *args, **how: pytest.fail("attacked again"))
    assert evaluated()[0] == first
    with pytest.raises(UserError, match="aims at class 2: leave out images of that class"):
        evaluate_model(
            model,
            ImageSet(x, labels),
            Linf(eps=0.1),
            options,
            target,
            attacks=aimed,
            options=EvaluationOptions(show=False),
        )
