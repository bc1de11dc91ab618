"""CutMix: every pixel from one of two images, labels by the true areas, boxes as the paper draws them."""

import math
import shlex

import pytest
import torch
from torch.nn import functional as F

import clead
from clead.config import load_recipe
from clead.data.loaders import Loader, ViewSettings, cutmix, make_generator
from clead.data.views import Augmentation
from clead.errors import UserError
from clead.interfaces import ImageSet
from support import generator


def numbered(count=7, height=9, width=6):
    """Image i is i everywhere; its label is i."""
    images = torch.arange(count).float()[:, None, None, None].expand(-1, 2, height, width).contiguous()
    return images, torch.arange(count)


@pytest.mark.parametrize("seed", range(12))
def test_labels_are_the_shares_of_the_pixels_in_one_box(seed):
    images, labels = numbered()
    mixed, soft = cutmix(images, labels, 8, 1.0, generator=generator(seed))
    assert mixed.shape == images.shape and soft.shape == (7, 8) and soft.dtype == torch.float32
    assert torch.equal(images, numbered()[0]), "the images given are left as they are"
    counted = torch.stack([(mixed[:, 0] == k).flatten(1).float().mean(1) for k in range(8)], 1)
    torch.testing.assert_close(soft, counted)
    assert torch.equal(mixed[:, 0], mixed[:, 1])
    changed = (mixed != images)[:, 0].any(0)  # partners that are the image itself hide the box, but not everywhere
    rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
    box = changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] if len(rows) else changed[:0]
    assert box.all(), "the box is one rectangle, and the same in every image"


def test_partners_are_a_permutation():
    images, labels = numbered()
    for seed in range(5):
        mixed, soft = cutmix(images, labels, 7, 1.0, generator=generator(seed))
        # Each image gives its box once: every class has the same mass as before.
        torch.testing.assert_close(soft.sum(0), torch.ones(7))


@pytest.mark.parametrize("alpha", [0.3, 1.0, 5.0])
def test_the_share_is_beta_and_the_box_is_uniform(alpha):
    """On a large image and with no cutting at the border in the mean: 1 − area = λ for boxes inside."""
    size, inside, centres = 64, [], []
    images, labels = numbered(2, size, size)
    for seed in range(3000):
        draw = generator(seed)
        torch.randperm(2, generator=draw)
        share = torch._sample_dirichlet(torch.full((2,), alpha, dtype=torch.float64), generator=draw)[0].item()
        inside.append(share)
        mixed, soft = cutmix(images[:, :1], labels, 2, alpha, generator=generator(seed)) if seed < 300 else (None, None)
        if mixed is None or soft[0].max() == 1:
            continue
        changed = (mixed != images[:, :1])[0, 0]
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        if not len(rows):
            continue
        side = round(size * math.sqrt(1 - share))
        for line in (rows, columns):
            assert len(line) <= side
            if line[0] > 0 and line[-1] < size - 1:
                assert len(line) == side, "a box inside has the side W·√(1 − λ)"
                centres.append(line[0].item() + side // 2)
    inside = torch.tensor(inside, dtype=torch.float64)
    assert inside.mean() == pytest.approx(0.5, abs=0.03)
    assert inside.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)  # the variance of Beta(α, α)
    assert torch.tensor(centres).double().mean() == pytest.approx(size / 2, abs=4)


def image_set(count=20):
    return ImageSet(
        torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator(0)), torch.arange(count) % 3
    )


def test_the_loader_mixes_after_augmentation_and_repeats_itself():
    plain, mixing = (
        Loader(image_set(), 8, seed=3, views=ViewSettings(Augmentation(crop=1), Augmentation(crop=2), alpha, 3))
        for alpha in (0.0, 1.0)
    )
    kinds = set()
    for epoch in range(3):
        for index in range(2):
            before, after = plain.batch(epoch, index), mixing.batch(epoch, index)
            assert before.soft_labels is None
            images, soft = cutmix(
                before.images, before.labels, 3, 1.0, generator=make_generator("cpu", 3, epoch, index, 4)
            )
            assert torch.equal(after.images, images) and torch.equal(after.soft_labels, soft)
            # The label stays that of the image around the box; the second view is not mixed.
            assert torch.equal(after.labels, before.labels) and torch.equal(after.second_view, before.second_view)
            again = mixing.batch(epoch, index)
            assert torch.equal(again.images, after.images) and torch.equal(again.soft_labels, soft)
            kinds.add(bytes(soft.numpy()))
    assert len(kinds) == 6
    state = torch.get_rng_state()
    mixing.batch(0, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_mixed_images_of_one_class_keep_its_label():
    images, labels = torch.rand(4, 1, 8, 8, generator=generator(0)), torch.full((4,), 2)
    _, soft = cutmix(images, labels, 3, 1.0, generator=generator(1))
    torch.testing.assert_close(soft, F.one_hot(labels, 3).float())


def test_misuse_is_one_line():
    with pytest.raises(UserError, match="data.cutmix: input should be greater than or equal to 0, got -1"):
        load_recipe("digits-pgd-at", ["--data.cutmix", "-1"])


TINY = shlex.split("""--model.width 4 --model.features 8 --data.limit_train 60 --data.batch_size 16 --train.validate_every 2
--train.validate_steps 1 --train.device cpu --train.epochs 1""")


@pytest.mark.parametrize("method", ["standard", "pgd_at", "trades", "clead", "mart", "free"])
def test_every_method_trains_on_mixed_images(method, tmp_path):
    weights = []
    for alpha in ("0", "1"):
        config = load_recipe(
            "digits-pgd-at", [*TINY, "--method.name", method, "--attack.steps", "1", "--data.cutmix", alpha]
        )
        run = clead.train(config, out=tmp_path / alpha, show=False)
        weights.append(run.model.state_dict()["classifier.weight"])
    assert torch.isfinite(weights[1]).all() and not torch.equal(*weights)
