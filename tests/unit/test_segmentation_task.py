"""Segmentation: what is right at each pixel, by slow loops, closed forms and torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

import clead
from clead.errors import UserError
from clead.tasks.classification import CLASSIFICATION
from clead.tasks.segmentation import SEGMENTATION, VOID, upsampled
from support import generator

LOGIT = st.one_of(st.floats(-5, 5, width=32), st.sampled_from([0.0, math.nan, math.inf, -math.inf]))


def random_case(seed=0, images=3, classes=4, size=6):
    draw = generator(seed)
    outputs = torch.randn(images, classes, size, size, generator=draw)
    target = torch.randint(0, classes + 1, (images, size, size), generator=draw)
    return outputs, torch.where(target == classes, VOID, target)


@given(st.lists(LOGIT, min_size=3, max_size=3), st.sampled_from([0, 1, 2, VOID]))
def test_a_pixel_is_right_if_its_logits_are_finite_and_the_first_largest_is_the_masks(logits, label):
    outputs, target = torch.tensor(logits).view(1, 3, 1, 1), torch.tensor([[[label]]])
    right = all(map(math.isfinite, logits)) and logits.index(max(logits)) == label
    assert SEGMENTATION.correct(outputs, target).item() == right
    counts = SEGMENTATION.confusion(outputs, target)
    assert (counts.sum().item(), counts.diagonal(dim1=1, dim2=2).sum().item()) == (label != VOID, right)


def test_loss_and_margin_are_means_over_the_pixels_that_are_not_void():
    outputs, target = random_case()
    target[2] = VOID
    losses, margins = SEGMENTATION.loss(outputs, target), SEGMENTATION.margin(outputs, target)
    for image in range(2):
        pixels = [(i, j) for i in range(6) for j in range(6) if target[image, i, j] != VOID]
        slow_loss, slow_margin = [], []
        for i, j in pixels:
            z, label = outputs[image, :, i, j].tolist(), int(target[image, i, j])
            slow_loss.append(math.log(sum(map(math.exp, z))) - z[label])
            slow_margin.append(max(value for k, value in enumerate(z) if k != label) - z[label])
        assert losses[image].item() == pytest.approx(sum(slow_loss) / len(pixels), rel=1e-5)
        assert margins[image].item() == pytest.approx(sum(slow_margin) / len(pixels), abs=1e-5)
    assert (losses[2], margins[2]) == (0, 0)
    torch.testing.assert_close(SEGMENTATION.loss(outputs, target.byte()), losses)
    flags = SEGMENTATION.correct(outputs, target)
    assert torch.equal(flags, (SEGMENTATION.pixel_margins(outputs, target) < 0) & (target != VOID))
    part = SEGMENTATION.accuracy(flags, target)
    assert part[2].isnan() and part[0] == int(flags[0].sum()) / int((target[0] != VOID).sum())


def test_void_pixels_have_no_gradient():
    outputs, target = random_case(1)
    outputs.requires_grad_()
    SEGMENTATION.loss(outputs, target).sum().backward()
    moved = outputs.grad.abs().sum(1) > 0
    assert torch.equal(moved, target != VOID)


def test_metrics_and_counts_agree_with_torchmetrics():
    outputs, target = random_case(2, classes=5, size=9)
    target[target == 3] = 0  # a class that is in no mask
    metrics = SEGMENTATION.metrics(SEGMENTATION.correct(outputs, target), target, 5)
    predicted, options = SEGMENTATION.predict(outputs), {"num_classes": 5, "ignore_index": VOID}
    average = multiclass_accuracy(predicted, target, average="micro", **options)
    assert metrics["accuracy"] == pytest.approx(average.item())
    counts = SEGMENTATION.confusion(outputs, target).sum(0)
    assert torch.equal(counts, multiclass_confusion_matrix(predicted, target, **options))
    assert metrics["class_n"] == counts.sum(1).tolist() and metrics["class_accuracy"][3] is None


def test_counts_are_of_each_image():
    outputs, target = random_case(3)
    counts = SEGMENTATION.confusion(outputs, target)
    slow = torch.zeros(3, 4, 4, dtype=torch.int64)
    answers = SEGMENTATION.predict(outputs)
    for image, row, column in (target != VOID).nonzero().tolist():
        slow[image, target[image, row, column], answers[image, row, column]] += 1
    assert torch.equal(counts, slow)


def test_logits_of_a_lower_resolution_are_upsampled_to_the_mask():
    outputs, target = torch.randn(2, 3, 2, 4, generator=generator()), torch.zeros(2, 8, 16, dtype=torch.int64)
    expected = torch.nn.Upsample(size=(8, 16), mode="bilinear")(outputs)
    torch.testing.assert_close(SEGMENTATION.answers(outputs, target), expected.argmax(1))
    torch.testing.assert_close(SEGMENTATION.loss(outputs, target), SEGMENTATION.loss(expected, target))
    assert upsampled(expected, (8, 16)) is expected
    SEGMENTATION.check(outputs, target)


def test_training_terms_are_means_over_pixels():
    outputs, target = random_case(4)
    target[0] = VOID
    known = target != VOID
    rows = outputs.permute(0, 2, 3, 1)
    expected = F.cross_entropy(rows[known], target[known], label_smoothing=0.1)
    torch.testing.assert_close(SEGMENTATION.training_loss(outputs, target, 0.1), expected)
    assert SEGMENTATION.training_loss(outputs, torch.full_like(target, VOID)) == 0
    p, q = rows[1].softmax(-1), rows[2].softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(SEGMENTATION.divergence(outputs[1:2], outputs[2:]), divergence[None])
    score = SEGMENTATION.score(outputs, target)
    assert score[0] == 0 and score[1] == (rows[1].argmax(-1) == target[1])[known[1]].float().mean()


def test_data_of_another_task_are_refused_with_the_task_that_fits():
    SEGMENTATION.check_data(random_case()[1], ("a", "b", "c", "d"))
    with pytest.raises(
        UserError, match=r"needs a mask per image, got labels of shape \(3,\); give --task classification"
    ):
        SEGMENTATION.check_data(torch.zeros(3, dtype=torch.int64), ("a", "b"))
    with pytest.raises(UserError, match=r"give --task segmentation"):
        CLASSIFICATION.check_data(random_case()[1], ("a", "b"))


@pytest.mark.parametrize(
    "target, text",
    [
        (
            torch.zeros(2, dtype=torch.long),
            "one class number per image is a classifier's target; give masks",
        ),
        (torch.zeros(2, 1, 4, 4, dtype=torch.long), "give masks.squeeze(1)"),
        (torch.zeros(2, 3, 4, 4), "give masks.argmax(1)"),
        (torch.zeros(2, 4, 4), "give masks.long()"),
        (torch.zeros(1, 4, 4, dtype=torch.long), "give one mask per image"),
        (torch.tensor([1, 3]).view(2, 1, 1).expand(2, 4, 4), "give masks - 1"),
        (torch.full((2, 4, 4), 7), "masks must be in [0, 3), or 255 for void, got 7"),
        (torch.full((2, 4, 4), -1), "got -1; give 255 where a pixel has no class"),
    ],
)
def test_wrong_masks_are_refused_in_one_line_with_the_remedy(target, text):
    with pytest.raises(UserError) as caught:
        SEGMENTATION.check_target(target, 2, 3)
    assert text in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "shape, text",
    [
        ((2, 3), "give --task classification"),
        ((2, 1, 4, 4), "must have 2 to 255 classes"),
        ((2, 3, 8, 8), "logits must be no larger than the mask, got (8, 8) for masks of (4, 4)"),
    ],
)
def test_outputs_that_are_no_logits_of_the_masks_are_refused(shape, text):
    with pytest.raises(UserError) as caught:
        SEGMENTATION.check(torch.zeros(shape), torch.zeros(2, 4, 4, dtype=torch.long))
    assert text in str(caught.value)


def test_as_target_takes_what_is_clear_and_refuses_the_rest():
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    assert SEGMENTATION.as_target(mask, 2).shape == (2, 4, 4) and SEGMENTATION.as_target(mask, 2).dtype == torch.int64
    assert SEGMENTATION.as_target(mask[0, 0], 1).shape == (1, 4, 4)
    for value, text in ((mask.float(), "give masks.long()"), (mask.repeat(1, 3, 1, 1), "give masks.argmax(1)")):
        with pytest.raises(UserError) as caught:
            SEGMENTATION.as_target(value, 2)
        assert text in str(caught.value)


def test_data_of_void_alone_is_refused_and_single_masks_of_it_are_not():
    void = torch.full((2, 4, 4), VOID)
    with pytest.raises(UserError, match=r"got 2 of void \(255\) alone"):
        SEGMENTATION.check_data(void, ("a", "b"))
    void[0, 0, 0] = 1
    SEGMENTATION.check_data(void, ("a", "b"))
    SEGMENTATION.check_target(void[1:], 1, 2)


def test_an_evaluation_goes_on_over_masks_of_void_alone():
    images, net = (
        torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.nn.Conv2d(3, 2, 3, padding=1),
    )
    masks = net(images).argmax(1)
    options = {
        "task": "segmentation",
        "suite": "sea-quick",
        "eps": "4/255",
        "steps": 3,
        "check_images": 0,
        "curve_points": 0,
    }
    whole = clead.evaluate(net, images[1:], masks[1:], **options)
    masks[0] = VOID  # the first, in a batch of its own
    record = clead.evaluate(net, images, masks, batch_size=1, **options)
    assert record.clean.accuracy == whole.clean.accuracy == 1 and record.masks.clean[0] == ""
    assert "2 classes clean" in record.metrics[0].about
