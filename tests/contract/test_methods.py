"""What every registered method must do; a new file in methods/ is picked up by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from clead.attacks.pgd import PGD
from clead.interfaces import Batch, StepOutput
from clead.methods import METHODS
from clead.methods.base import StepContext
from clead.methods.free import Free
from clead.models.build import build_model
from clead.models.small_cnn import SmallCNN
from clead.models.split import SplitModel
from clead.models.unet import UNet
from clead.tasks.classification import CLASSIFICATION
from clead.tasks.segmentation import Segmentation
from clead.threats import THREATS

RADII = {"linf": 0.1, "l2": 0.6, "l1": 2.0, "l0": 3}


def for_masks(method: Any) -> bool:
    return method.task_problem(CLASSIFICATION) is not None


def make_model(method: Any, masks: bool = False) -> SplitModel:
    network = UNet(width=4, levels=2) if masks or for_masks(method) else SmallCNN(width=3, features=6)
    model = build_model(network, 1, 4, (0.4,), (0.3,), seed=0, sample_shape=(1, 8, 8))
    if method.uses_embedding:
        model.add_projection(method.embedding_dim)
    return model.train()


def make_batch(method: Any, masks: bool = False) -> Batch:
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    stored = (0.9 * x + 0.05).contiguous() if method.uses_stored else None
    labels = torch.arange(6) % 4
    if masks or for_masks(method):
        labels = (x[:, 0] * 4).long()
    return Batch(x, labels, x.flip(3) if method.uses_second_view else None, stored=stored)


@pytest.fixture(params=METHODS.names())
def method(request: pytest.FixtureRequest) -> Any:
    return METHODS.get(request.param)()


def call(method: Any, model: SplitModel, batch: Batch, threat: Any, seed: int = 0, masks: bool = False) -> StepOutput:
    generator = torch.Generator().manual_seed(seed)
    teacher = copy.deepcopy(model).eval().requires_grad_(False) if method.needs_teacher else None
    task = Segmentation() if masks or for_masks(method) else CLASSIFICATION
    step = StepContext(threat, PGD(steps=2), generator, teacher=teacher, task=task)
    return method.loss(model, method.views(model, batch, step), step)


@pytest.mark.slow
@pytest.mark.parametrize("norm", THREATS.names())
def test_a_step(method, norm):
    threat = THREATS.get(norm)(eps=RADII[norm])
    model, batch = make_model(method), make_batch(method)
    kept = [copy.deepcopy(part) for part in batch]
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()

    output = call(method, model, batch, threat)
    assert isinstance(output, StepOutput)
    assert output.loss.shape == () and torch.isfinite(output.loss) and output.loss.requires_grad
    for value in output.metrics.values():
        assert value.shape == () and not value.requires_grad
    assert flags == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert all(p.grad is None for p in model.parameters()), "a method does not call backward on the weights"
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    for before, after in zip(kept, batch, strict=True):
        assert before is after is None or torch.equal(before, after)

    output.loss.backward()
    for name, p in model.named_parameters():
        frozen = not method.uses_classifier or getattr(method, "frozen_classifier", False)
        if name.startswith("classifier.") and frozen:
            assert p.grad is None, name
            continue
        assert p.grad is not None and torch.isfinite(p.grad).all(), name

    again = call(method, make_model(method), batch, threat)
    assert torch.equal(again.loss, output.loss)
    assert {name: value.item() for name, value in again.metrics.items()} == {
        name: value.item() for name, value in output.metrics.items()
    }


def test_a_method_refuses_masks_or_makes_a_step_of_them(method):
    if problem := method.task_problem(Segmentation()):
        assert problem.startswith("method.")
        return
    output = call(method, make_model(method, True), make_batch(method, True), THREATS.get("linf")(eps=0.1), masks=True)
    assert output.loss.shape == () and torch.isfinite(output.loss) and output.loss.requires_grad


@pytest.mark.parametrize("name", ["clead_finetune", "fgsm_rs", "liet", "nuat"])
def test_what_goes_by_one_class_per_image_refuses_masks(name):
    assert METHODS.get(name)().task_problem(Segmentation()) == "method.name: this method knows no segmentation"


def test_the_random_starts_follow_the_generator(method):
    threat = THREATS.get("linf")(eps=0.3)
    losses = [call(method, make_model(method), make_batch(method), threat, seed).loss for seed in (0, 1)]
    drawn = method.uses_attack and not isinstance(method, Free)  # whose perturbation begins at 0
    assert torch.equal(*losses) != drawn


def test_settings_are_documented(method):
    for name, field in type(method).__pydantic_fields__.items():
        assert field.description, name
