"""Batches are a function of (seed, epoch, index) alone."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clead.data.label_sampling import for_method
from clead.data.loaders import Loader, ViewSettings, make_generator
from clead.data.views import Augmentation
from clead.interfaces import ImageSet


def image_set(count=10):
    """Every image is constant, its value is its number."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    return ImageSet(images, torch.arange(count) % 3)


def numbers(batch):
    return (batch.images[:, 0, 0, 0] * 255).round().long().tolist()


@given(count=st.integers(2, 40), size=st.integers(1, 45), drop_last=st.booleans())
def test_an_epoch_visits_every_image_once(count, size, drop_last):
    loader = Loader(image_set(count), size, seed=1, drop_last=drop_last)
    batches = list(loader.epoch(0))
    assert len(batches) == loader.steps_per_epoch > 0
    seen = [number for batch in batches for number in numbers(batch)]
    assert len(set(seen)) == len(seen)
    if size >= count:
        assert len(seen) == count
    elif drop_last:
        assert len(seen) == count - count % size
    else:
        assert len(seen) == count - (count % size == 1)
    assert size == 1 or all(len(batch.labels) > 1 for batch in batches)
    for batch in batches:
        assert batch.images.dtype == torch.float32 and batch.labels.tolist() == [n % 3 for n in numbers(batch)]
        assert batch.second_view is None


def test_batches_do_not_depend_on_history():
    augment, view = Augmentation(crop=1), Augmentation(color_jitter=1.0)
    make = lambda: Loader(image_set(20), 6, seed=3, views=ViewSettings(augment, view))  # noqa: E731
    straight = make()
    run = [batch for epoch in range(3) for batch in straight.epoch(epoch)]
    resumed = [*make().epoch(1, start=2), *make().epoch(2)]
    for one, other in zip(run[-len(resumed) :], resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a is not None)
    state = torch.get_rng_state()
    make().batch(5, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_order_changes_with_epoch_and_seed():
    orders = {
        tuple(n for batch in Loader(image_set(30), 7, seed=seed).epoch(epoch) for n in numbers(batch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_views_are_drawn_apart():
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    data, augment = ImageSet(images, torch.zeros(8, dtype=torch.int64)), Augmentation(crop=2)
    both = Loader(data, 8, views=ViewSettings(augment, augment)).batch(0, 0)
    assert both.second_view is not None and not torch.equal(both.images, both.second_view)
    # Asking for a second view leaves the first as it is; without augment it is the plain image.
    assert torch.equal(Loader(data, 8, views=ViewSettings(augment)).batch(0, 0).images, both.images)
    plain = Loader(data, 8, views=ViewSettings(second=Augmentation())).batch(0, 0)
    assert torch.equal(plain.images, images[plain.index] / 255) and torch.equal(plain.images, plain.second_view)
    # ViewSettings change from epoch to epoch and from batch to batch.
    twice = ImageSet(images[:1].expand(8, -1, -1, -1), data.labels)
    loader = Loader(twice, 4, views=ViewSettings(augment))
    kinds = {bytes(loader.batch(e, i).images.numpy()) for e in range(2) for i in range(2)}
    assert len(kinds) == 4


def test_annealed_views_follow_the_progress_and_nothing_else():
    """Either view by its own strength, the draws being those of a constant one; the same place gives the same batch."""
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    data, strong = ImageSet(images, torch.zeros(8, dtype=torch.int64)), {"color_jitter": 1.0, "greyscale": 0.5}
    augment, view = Augmentation(**strong, anneal=0.25), Augmentation(**strong, anneal=0.5)
    make = lambda: Loader(data, 8, views=ViewSettings(augment, view))  # noqa: E731
    for progress, strengths in ((0.0, (1, 1)), (0.3, (0.75, 1)), (0.5, (0.5, 0.5)), (0.99, (0.25, 0.5))):
        batch = make().batch(1, 0, progress)
        for stream, strength, found in zip((2, 3), strengths, (batch.images, batch.second_view), strict=True):
            expected = Augmentation(**strong)(
                images[batch.index] / 255, generator=make_generator("cpu", 0, 1, 0, stream), strength=strength
            )
            assert torch.equal(found, expected), (progress, stream)
    assert torch.equal(make().batch(1, 0).images, make().batch(1, 0, 0.2).images)
    constant = Loader(data, 8, views=ViewSettings(Augmentation(**strong)))
    assert torch.equal(constant.batch(1, 0, 0.9).images, constant.batch(1, 0).images)


def test_seeded_keeps_keys_apart():
    keys = [(0,), (0, 0), (0, 1), (1, 0), (1,), (-1,), (2**32,), (2**32, 0), (12, 3), (1, 23), (2**70,)]
    draws = {tuple(torch.randint(2**31, (4,), generator=make_generator("cpu", *key)).tolist()) for key in keys}
    assert len(draws) == len(keys)
    assert make_generator("cpu", 1, 2, 3).initial_seed() == 2904650318439132554, (
        "a published run's stream must not change"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_order_is_the_same_on_every_device():
    data, augment = image_set(20), Augmentation(crop=1)
    cpu, gpu = (Loader(data, 6, device=device, views=ViewSettings(augment), seed=4) for device in ("cpu", "cuda"))
    for one, other in zip(cpu.epoch(2), gpu.epoch(2), strict=True):
        assert other.images.is_cuda and torch.equal(one.labels, other.labels.cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_views_on_the_device_agree_with_the_cpu():
    from clead.data import views

    images, one = torch.rand(16, 3, 32, 32), torch.rand(16)
    for apply in (
        lambda x, r: views.zoom(x, 0.3 * r, 0.2 * r, 0.4 + 0.3 * r, 0.5 + 0.3 * r),
        lambda x, r: views.jitter(x, 0.5 + r, 1.5 - r, 0.4 + r, r - 0.5),
        lambda x, r: views.shift(x, (9 * r).long() - 4, 4 - (9 * r).long(), 4),
        lambda x, r: views.cut(x, (32 * r).long(), (16 * r).long(), 9),
    ):
        assert torch.allclose(apply(images, one), apply(images.cuda(), one.cuda()).cpu(), atol=1e-5)
    augment = Augmentation(flip=True, random_resized_crop=(0.2, 1.0), color_jitter=0.5, greyscale=0.2, cutout=8)
    out = augment(images.cuda(), generator=make_generator("cuda", 1))
    assert out.is_cuda and out.min() >= 0 and out.max() <= 1


# ------------------------------------------------------------------------------------ classes in balance, auxiliary images


def unbalanced(sizes, **keys):
    """Images of classes 0, 1, … of these sizes; the value of an image is its number."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return dataclasses.replace(image_set(len(labels)), labels=labels, balanced=True, **keys)


@given(sizes=st.lists(st.integers(1, 12), min_size=2, max_size=6), size=st.integers(1, 30), seed=st.integers(0, 3))
def test_classes_come_equally_often_and_their_images_too(sizes, size, seed):
    data = unbalanced(sizes)
    loader = Loader(data, size, seed=seed, drop_last=True)
    assert (
        loader.steps_per_epoch
        == Loader(dataclasses.replace(data, balanced=False), size, drop_last=True).steps_per_epoch
    )
    drawn = torch.zeros(len(data), dtype=torch.int64)
    for step in range(2 * loader.steps_per_epoch + 3):
        batch = loader.batch(*divmod(step, loader.steps_per_epoch))
        assert len(batch.labels) == min(size, len(data)) and torch.equal(batch.labels, data.labels[batch.index])
        drawn += torch.bincount(batch.index, minlength=len(data))
        # At every step: classes differ by one image, images of a class by one.
        by_class = [drawn[data.labels == k] for k in range(len(sizes))]
        assert max(each.sum() for each in by_class) - min(each.sum() for each in by_class) <= 1
        assert all(each.max() - each.min() <= 1 for each in by_class)


def test_balanced_batches_depend_on_seed_and_step_alone():
    data = unbalanced([3, 40, 7])
    straight = [batch for epoch in range(4) for batch in Loader(data, 16, seed=5, drop_last=True).epoch(epoch)]
    fresh = [Loader(data, 16, seed=5, drop_last=True).batch(*divmod(step, 3)) for step in range(len(straight))]
    assert all(torch.equal(a.index, b.index) for a, b in zip(straight, fresh, strict=True))
    assert len({tuple(batch.index.tolist()) for batch in straight}) == len(straight)
    other = Loader(data, 16, seed=6).batch(0, 0)
    assert not torch.equal(other.index, straight[0].index)


def test_labelled_images_are_balanced_among_themselves():
    labelled = torch.arange(60) % 3 == 0
    data = unbalanced([40, 12, 8], labelled=labelled, labelled_share=0.5)
    loader = Loader(data, 12, drop_last=True)
    for index in range(loader.steps_per_epoch):
        batch = loader.batch(0, index)
        assert batch.labelled.sum() == 6 and torch.bincount(batch.labels[batch.labelled], minlength=3).tolist() == [
            2,
            2,
            2,
        ]


def with_extra(count=20, more=30, share=0.5, **keys):
    extra = ImageSet(torch.full((more, 1, 4, 4), 200, dtype=torch.uint8), torch.arange(more) % 2, **keys)
    return dataclasses.replace(image_set(count), extra=extra, extra_share=share)


@given(count=st.integers(2, 30), more=st.integers(1, 50), share=st.floats(0.05, 0.95), size=st.integers(2, 16))
def test_every_batch_has_its_share_of_auxiliary_images(count, more, share, size):
    data = with_extra(count, more, share)
    loader = Loader(data, size, seed=2, drop_last=True)
    size = min(size, count)
    extra = min(max(1, round(share * size)), size - 1)
    assert loader.steps_per_epoch == max(1, count // (size - extra)), "an epoch is a pass over the data's own images"
    seen = torch.zeros(count + more, dtype=torch.int64)
    for step in range(loader.steps_per_epoch):
        batch = loader.batch(0, step)
        auxiliary = batch.index >= count
        assert auxiliary.sum() == extra and len(batch.labels) == size and batch.labelled is None
        assert torch.equal(batch.labels[auxiliary], (batch.index[auxiliary] - count) % 2)
        assert (batch.images[auxiliary] * 255).round().eq(200).all()
        seen += torch.bincount(batch.index, minlength=count + more)
    assert seen[:count].max() == 1 or count // (size - extra) == 0
    assert seen[count:].max() - seen[count:].min() <= 1
    again = Loader(data, size, seed=2, drop_last=True).batch(0, loader.steps_per_epoch - 1)
    assert torch.equal(again.index, batch.index)


def test_auxiliary_images_without_labels_show_none():
    data = with_extra(labelled=torch.zeros(30, dtype=torch.bool))
    batch = Loader(data, 8, drop_last=True).batch(0, 0)
    assert batch.labelled.tolist() == (batch.index < 20).tolist() and (batch.labels[~batch.labelled] == -1).all()
    labelled = dataclasses.replace(data, extra=dataclasses.replace(data.extra, pseudo_labels=torch.full((30,), 1)))
    batch = Loader(labelled, 8, drop_last=True).batch(0, 0)
    assert batch.labelled is None and (batch.labels[batch.index >= 20] == 1).all()
    assert (
        for_method(data, uses_unlabelled=False).extra is None
        and for_method(data, uses_unlabelled=True).extra is data.extra
    )
    assert len(for_method(labelled, uses_unlabelled=False).extra) == 30


def test_auxiliary_and_labelled_shares_go_together():
    labelled = torch.arange(20) < 5
    data = dataclasses.replace(with_extra(), labelled=labelled, labelled_share=0.5)
    loader = Loader(data, 16, drop_last=True)
    batch = loader.batch(0, 0)
    assert (batch.index >= 20).sum() == 8 and labelled[batch.index[batch.index < 20]].sum() == 4
    assert loader.steps_per_epoch == 15 // 4
    assert torch.equal(batch.labels >= 0, batch.labelled) and batch.labelled.sum() == 12
    # Each of four shares of the batch has its share of each kind.
    quarters = Loader(data, 16, drop_last=True, microbatches=4)
    kinds = quarters.batch(0, 0).index.chunk(4)
    assert all((each >= 20).sum() == 2 for each in kinds)
