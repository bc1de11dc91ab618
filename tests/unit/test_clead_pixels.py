"""Training on masks: every method that takes them makes a step, and the contrast of pixels is SupCon of what was drawn."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from clead.api.training import _check_start
from clead.attacks.pgd import PGD
from clead.config import load_recipe
from clead.errors import UserError
from clead.interfaces import Batch
from clead.losses.contrastive import supcon
from clead.losses.pixels import VOID
from clead.methods import METHODS
from clead.methods.base import StepContext
from clead.methods.clead_pixels import CLeadPixels, balanced_cells
from clead.models.build import build_model
from clead.models.unet import UNet
from clead.tasks.classification import CLASSIFICATION
from clead.tasks.segmentation import Segmentation
from clead.threats.linf import Linf
from support import generator

MASKS = ("--data.name", "digit_scenes", "--task", "segmentation")


def step_of(seed=0):
    return StepContext(Linf(eps=0.05), PGD(steps=1), generator(seed), task=Segmentation())


def batch_of(classes=3, side=16):
    mask = torch.randint(classes, (4, side, side), generator=generator(1))
    mask[:, :3] = VOID
    return Batch(torch.rand(4, 3, side, side, generator=generator(2)), mask, index=torch.arange(4))


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if "segmentation" in kind.tasks])
def test_a_step_on_masks_learns(name):
    method = METHODS.get(name)(**({"contrastive_weight": 0.0} if name == "clead" else {}))
    assert method.task_problem(Segmentation()) is None
    model = build_model(UNet(width=4, levels=2), 3, 3, [0.4] * 3, [0.2] * 3, seed=0, sample_shape=(3, 16, 16))
    if method.uses_embedding:
        model.add_projection(8)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batch, losses = batch_of(), []
    memory = method.state(model, (3, 16, 16))
    if method.remembers_images:
        memory.for_images(4)
    for seed in range(12):
        output = method.loss(model, method.views(model, batch, step := step_of(seed)._replace(state=memory)), step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0], losses


def test_with_all_pixels_drawn_it_is_supcon_of_the_pixels():
    labels = torch.randint(3, (2, 4, 4), generator=generator(1))
    z = [F.normalize(torch.randn(2, 5, 4, 4, generator=generator(seed)), dim=1) for seed in (2, 3)]
    value = CLeadPixels(pixels=16, temperature=0.2).contrast(z, Batch(torch.rand(2, 3, 4, 4), labels), step_of())
    rows = [torch.stack([each[b, :, i, j] for b in range(2) for i in range(4) for j in range(4)]) for each in z]
    torch.testing.assert_close(value, supcon(rows, labels.flatten(), 0.2).mean())


def test_void_pulls_nothing_and_pushes_no_more_than_another_class():
    labels = torch.tensor([[[0, 0], [1, VOID]]])
    z = [F.normalize(torch.randn(1, 5, 2, 2, generator=generator(2)), dim=1)] * 2
    value = CLeadPixels(pixels=4).contrast(z, Batch(torch.rand(1, 3, 2, 2), labels), step_of())
    rows = [each[0].flatten(1).T for each in z]
    torch.testing.assert_close(value, supcon(rows, torch.tensor([0, 0, 1, 2]), 0.5)[:3].mean())


def test_rare_classes_are_drawn_as_often_as_frequent_ones_and_void_last():
    cells = torch.zeros(1, 8, 8, dtype=torch.int64)
    cells[0, 0, :8], cells[0, 1:3] = 1, VOID  # 8 of class 1, 40 of class 0
    shares = [(cells.flatten()[balanced_cells(cells, 8, step_of(seed))[0]] == 1).float().mean() for seed in range(200)]
    # Each of 8 has 5 times the weight of each of 40, so half of the first draw; without replacement it falls to 0.45 on average
    # (numpy.random.Generator.choice with the same weights and replace=False, 20,000 draws: 0.450).
    assert abs(sum(shares) / 200 - 0.450) < 0.04
    everything = balanced_cells(cells, 64, step_of())[0]
    assert sorted(everything.tolist()) == list(range(64)) and (cells.flatten()[everything[48:]] == VOID).all()
    assert (cells.flatten()[everything[:48]] != VOID).all()


def test_the_same_step_draws_the_same_and_leaves_the_generator_as_it_was():
    step, cells = step_of(), torch.zeros(2, 6, 6, dtype=torch.int64)
    before = step.generator.get_state()
    assert torch.equal(balanced_cells(cells, 5, step), balanced_cells(cells, 5, step))
    assert torch.equal(step.generator.get_state(), before)


def test_it_is_for_masks_alone_and_refuses_what_knows_no_pixels():
    assert "masks" in CLeadPixels().task_problem(CLASSIFICATION)
    assert "supcon" in CLeadPixels(inner="supcon").task_problem(Segmentation())
    with pytest.raises(ValueError, match="second augmentation"):
        CLeadPixels(augmented_view=True)


@pytest.mark.parametrize(
    "words, remedy",
    [
        (["--method.name", "clead_pixels"], "for masks alone; give --method.name acl or"),
        (["--method.name", "clead", *MASKS], "--method.contrastive_weight 0 or --method.name"),
        (["--method.name", "pgd_at", "--method.inner", "embedding", *MASKS], "give --method.inner cross_entropy or"),
        (["--method.name", "clead_pixels", "--method.inner", "supcon", *MASKS], "give --method.inner cross_entropy or"),
        (
            ["--method.name", "pgd_at", "--method.inner", "supcon", "--task", "multilabel"],
            "--method.inner cross_entropy or",
        ),
        (
            ["--method.name", "pgd_at", "--method.inner_contrastive_weight", "1", *MASKS],
            "give --method.inner_contrastive_weight 0 or",
        ),
    ],
)
def test_the_remedy_is_of_the_setting_that_does_not_go_with_the_task(words, remedy):
    config = load_recipe("digits-trades", [*words, "--train.device", "cpu"])
    with pytest.raises(UserError) as raised:
        _check_start(config)
    assert remedy in str(raised.value) and "\n" not in str(raised.value)
