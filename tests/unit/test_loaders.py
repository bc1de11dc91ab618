"""Batches are a function of (seed, epoch, index) alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
