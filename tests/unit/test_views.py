"""Views against slow, per-image NumPy, Pillow and colorsys; draws per image, in range, from the given generator only."""

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from clead.config import RunConfig
from clead.data import views
from clead.data.views import Augmentation
from clead.errors import UserError
from support import generator

ALL_ON = {"flip": True, "color_jitter": 0.5, "greyscale": 0.5, "cutout": 3}


def batch(count=6, channels=3, height=8, width=8, seed=0):
    return torch.rand(count, channels, height, width, generator=generator(seed))


def per_image(low, high, count=6, seed=1):
    return torch.rand(count, generator=generator(seed)) * (high - low) + low


# ------------------------------------------------------------------------------- given parameters: slow oracles


def test_shift_agrees_with_slow_numpy():
    images = batch(height=5, width=7)
    down, right = torch.tensor([-2, -1, 0, 1, 2, 2]), torch.tensor([2, 0, 0, -1, -2, 1])
    got = views.shift(images, down, right, 2)
    for b in range(6):
        oracle = np.zeros((3, 5, 7), dtype=np.float32)
        for y in range(5):
            for x in range(7):
                from_y, from_x = y - int(down[b]), x - int(right[b])
                if 0 <= from_y < 5 and 0 <= from_x < 7:
                    oracle[:, y, x] = images[b, :, from_y, from_x]
        assert np.array_equal(got[b].numpy(), oracle)


def test_mirror_agrees_with_numpy():
    images, chosen = batch(), torch.tensor([True, False, True, False, False, True])
    got = views.mirror(images, chosen)
    for b in range(6):
        image = images[b].numpy()
        assert np.array_equal(got[b].numpy(), image[:, :, ::-1] if chosen[b] else image)


def test_zoom_agrees_with_pillow():
    images = batch(height=8, width=12)
    top, left = torch.tensor([0.0, 0.25, 0.5, 0.0, 0.125, 0.3]), torch.tensor([0.0, 0.25, 0.5, 0.75, 0.1, 0.2])
    height, width = torch.tensor([1.0, 0.5, 0.5, 0.25, 0.8, 0.7]), torch.tensor([1.0, 0.5, 0.25, 0.25, 0.9, 0.6])
    got = views.zoom(images, top, left, height, width).numpy()
    assert np.allclose(got[0], images[0].numpy(), atol=1e-6)  # the whole box
    for b in range(6):
        box = [12 * left[b], 8 * top[b], 12 * (left[b] + width[b]), 8 * (top[b] + height[b])]
        for channel in range(3):
            # Pillow cuts its bilinear filter at the box's edge, we at the image's: compare inside.
            picture = Image.fromarray(images[b, channel].numpy())
            oracle = np.asarray(
                picture.transform(
                    (12, 8),
                    Image.Transform.EXTENT,
                    tuple(map(float, box)),
                    resample=Image.Resampling.BILINEAR,
                )
            )
            rows = slice(None) if top[b] > 0 and top[b] + height[b] < 1 else slice(4, 5)
            columns = slice(None) if left[b] > 0 and left[b] + width[b] < 1 else slice(5, 7)
            assert np.allclose(got[b, channel][rows, columns], oracle[rows, columns], atol=1e-4)


def slow_jitter(image, brightness, contrast, saturation, hue):
    grey = [0.299, 0.587, 0.114]
    image = np.clip(image * brightness, 0, 1)
    mean = float(np.mean(np.tensordot(grey, image, 1)))
    image = np.clip(mean + contrast * (image - mean), 0, 1)
    level = np.tensordot(grey, image, 1)
    image = np.clip(level + saturation * (image - level), 0, 1)
    out = np.empty_like(image)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            h, s, v = colorsys.rgb_to_hsv(*image[:, y, x])
            out[:, y, x] = colorsys.hsv_to_rgb((h + hue) % 1, s, v)
    return out


def test_jitter_agrees_with_colorsys():
    images = batch(height=4, width=4).double()
    images[0] = 0.5  # grey: no hue
    images[1, :, 0] = torch.tensor([0.0, 1.0, 1.0]).double()[:, None]  # two channels share the maximum
    factors = [per_image(0.2, 1.8, seed=n).double() for n in range(3)]
    hue = per_image(-0.5, 0.5, seed=9).double()
    got = views.jitter(images, *factors, hue)
    for b in range(6):
        oracle = slow_jitter(images[b].numpy(), *(float(f[b]) for f in factors), float(hue[b]))
        assert np.allclose(got[b].numpy(), oracle, atol=1e-9)


def test_neutral_jitter_is_the_identity():
    one, zero = torch.ones(6), torch.zeros(6)
    images = batch()
    assert torch.allclose(views.jitter(images, one, one, one, zero), images, atol=1e-6)
    assert torch.allclose(views.turn_hue(images, one), images, atol=1e-5)


def test_grey_agrees_with_pillow():
    image = np.random.RandomState(0).randint(0, 256, (8, 8, 3), dtype=np.uint8)
    got = views.grey(torch.from_numpy(image.transpose(2, 0, 1)[None]).float() / 255)
    oracle = np.asarray(Image.fromarray(image).convert("L"), dtype=np.float32) / 255
    assert got.shape == (1, 3, 8, 8) and np.allclose(got[0].numpy(), oracle, atol=0.6 / 255)


@given(st.integers(0, 6), st.integers(0, 4), st.integers(1, 9))
def test_cut_agrees_with_slow_numpy(row, column, side):
    image = torch.ones(1, 2, 7, 5)
    oracle = np.ones((7, 5))
    for y in range(row - side // 2, row - side // 2 + side):
        for x in range(column - side // 2, column - side // 2 + side):
            if 0 <= y < 7 and 0 <= x < 5:
                oracle[y, x] = 0
    got = views.cut(image, torch.tensor([row]), torch.tensor([column]), side)
    assert np.array_equal(got[0, 0].numpy(), oracle) and np.array_equal(got[0, 1].numpy(), oracle)


# --------------------------------------------------------------------------------------- what is drawn, and how


def test_identity_when_everything_is_off():
    images = batch()
    assert Augmentation()(images, generator=generator()) is images
    grey = batch(channels=1)
    assert Augmentation(greyscale=1.0)(grey, generator=generator()) is grey


@settings(max_examples=40, deadline=None)
@given(
    crop=st.sampled_from([0, 1, 4]),
    zoom=st.booleans(),
    flip=st.booleans(),
    jitter=st.sampled_from([0.0, 0.5, 2.5]),
    greyscale=st.sampled_from([0.0, 0.2, 1.0]),
    cutout=st.sampled_from([0, 1, 20]),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 1000),
)
def test_range_shape_and_input_are_kept(crop, zoom, flip, jitter, greyscale, cutout, channels, seed):
    augment = Augmentation(
        crop=0 if zoom else crop,
        random_resized_crop=(0.08, 1.0) if zoom else None,
        flip=flip,
        color_jitter=jitter,
        greyscale=greyscale,
        cutout=cutout,
    )
    images = batch(5, channels, 9, 6, seed).round(decimals=1)  # many 0 and 1, many ties
    before = images.clone()
    out = augment(images, generator=generator(seed))
    assert out.shape == images.shape and out.dtype == images.dtype
    assert out.min() >= 0 and out.max() <= 1
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dtype_is_kept(dtype):
    for keys in ({"crop": 2, "gaussian": 0.1}, {"random_resized_crop": (0.2, 1.0)}):
        assert Augmentation(**ALL_ON, **keys)(batch().to(dtype), generator=generator()).dtype == dtype


def test_randomness_comes_from_the_generator_only():
    augment, images = Augmentation(**ALL_ON, crop=2), batch()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = augment(images, generator=generator(5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(augment(images, generator=generator(5)), first)
    assert not torch.equal(augment(images, generator=generator(6)), first)


@pytest.mark.parametrize(
    "keys",
    [
        {"crop": 2},
        {"flip": True},
        {"random_resized_crop": (0.2, 1.0)},
        {"color_jitter": 0.5},
        {"greyscale": 0.5},
        {"cutout": 3},
        {"gaussian": 0.1},
    ],
)
def test_every_image_is_drawn_alone(keys):
    """Forty copies of one image must not all come out alike, as they would with one draw per batch."""
    copies = batch(1).expand(40, -1, -1, -1)
    out = Augmentation(**keys)(copies, generator=generator())
    kinds = len({bytes(image.numpy()) for image in out})
    assert kinds == 2 if set(keys) & {"flip", "greyscale"} else kinds > 8


def test_crop_offsets_are_uniform():
    image = torch.zeros(1, 1, 5, 5)
    image[..., 2, 2] = 1
    out = Augmentation(crop=1)(image.expand(9000, -1, -1, -1), generator=generator()).mean(0)[0]
    oracle = np.zeros((5, 5))
    oracle[1:4, 1:4] = 1 / 9
    assert np.allclose(out.numpy(), oracle, atol=0.015)  # 4.5 standard deviations


def test_probabilities_are_kept():
    image = batch(1, height=4, width=4).expand(4000, -1, -1, -1)

    def changed(**keys):
        out = Augmentation(**keys)(image, generator=generator())
        return (out != image).flatten(1).any(1).float().mean().item()

    assert changed(flip=True) == pytest.approx(0.5, abs=0.035)
    assert changed(greyscale=0.2) == pytest.approx(0.2, abs=0.03)
    assert changed(color_jitter=0.5) == pytest.approx(0.8, abs=0.03)


def test_zoom_area_and_aspect():
    """A ramp's slope tells the box's side: width = slope ratio; areas and aspects must lie in their ranges."""
    side = 64
    x = torch.arange(side).float().expand(side, side) / side
    images = torch.stack([x, x.T, x])[None].expand(300, -1, -1, -1)
    out = Augmentation(random_resized_crop=(0.2, 0.5))(images, generator=generator())
    middle = slice(side // 4, 3 * side // 4)
    width = (out[:, 0, 32, middle].diff(dim=1).mean(1) * side).numpy()
    height = (out[:, 1, middle, 32].diff(dim=1).mean(1) * side).numpy()
    area, aspect = width * height, width / height
    assert 0.19 < area.min() < 0.22 and 0.48 < area.max() < 0.51
    assert 0.73 < aspect.min() < 0.78 and 1.28 < aspect.max() < 1.35


def test_gaussian_noise_is_independent_unclipped_and_of_the_given_size():
    images = batch(200).round()  # 0 and 1: clipping would cut half of the noise away
    noise = (Augmentation(gaussian=0.25)(images, generator=generator()) - images).double().flatten()
    assert noise.mean().abs() < 5 * 0.25 / len(noise) ** 0.5
    assert noise.std() == pytest.approx(0.25, rel=5 / (2 * len(noise)) ** 0.5)
    assert noise.pow(4).mean() == pytest.approx(3 * 0.25**4, rel=0.1)  # the kurtosis of a Gaussian
    assert abs(torch.corrcoef(torch.stack([noise[:-1], noise[1:]]))[0, 1]) < 5 / len(noise) ** 0.5


def test_gaussian_noise_comes_last_and_leaves_the_other_draws_as_they_are():
    images = batch()
    plain = Augmentation(**ALL_ON, crop=2)(images, generator=generator(3))
    noisy = Augmentation(**ALL_ON, crop=2, gaussian=1e-3)(images, generator=generator(3))
    assert 0 < (noisy - plain).abs().max() < 6e-3


@pytest.mark.parametrize(
    ("method", "refused"),
    [
        ({"name": "standard"}, False),
        ({"name": "pgd_at"}, True),
        ({"name": "trades"}, True),
        ({"name": "clead"}, True),
        ({"name": "standard", "kl_weight": 1}, True),
        ({"name": "trades", "kl_weight": 0}, False),
    ],
)
def test_gaussian_noise_is_refused_where_images_are_attacked(method, refused):
    tree = {"data": {"name": "digits", "augment": {"gaussian": 0.25}}, "method": method, "train": {"epochs": 1}}
    if refused:
        with pytest.raises(
            UserError, match=r"^data.augment.gaussian: .*leaves \[0, 1\].*got 0.25; set it to 0"
        ) as error:
            RunConfig.from_dict(tree)
        assert len(error.value.problems) == 1
    else:
        assert RunConfig.from_dict(tree).data.augment.gaussian == 0.25


STRONG = {"random_resized_crop": (0.1, 1.0), "color_jitter": 0.5, "greyscale": 0.2}


@pytest.mark.parametrize(
    ("steps", "period", "expected"),
    [
        (8, 2, [1, 1, 3 / 4, 3 / 4, 1 / 2, 1 / 2, 1 / 4, 1 / 4]),
        (7, 3, [1, 1, 1, 4 / 7, 4 / 7, 4 / 7, 1 / 7]),  # the last level is cut short
        (3, 1, [1, 2 / 3, 1 / 3]),
        (4, 3.9, [1, 1, 1, 1]),
    ],
)
def test_the_strength_falls_in_steps(steps, period, expected):
    """s(t) = 1 − ⌊t/K⌋·K/T by hand, t = 0 … T − 1."""
    augment = Augmentation(**STRONG, anneal=period / steps)
    assert [augment.strength(t / steps) for t in range(steps)] == pytest.approx(expected)
    assert {Augmentation(**STRONG).strength(t / steps) for t in range(steps)} == {1.0}


def test_the_strength_falls_at_whole_steps_however_they_round():
    """In the paper K = 50 of T = 1,000 epochs: ⌊t/K⌋ in integers, though 0.15 / 0.05 is below 3 in floating point."""
    for period, total in ((50, 1000), (1, 49), (3, 100), (7, 31)):
        augment = Augmentation(**STRONG, anneal=period / total)
        for t in range(total):
            assert augment.strength(t / total) == pytest.approx(1 - (t // period) * period / total), (t, period)


def test_no_strength_is_no_view_and_full_strength_is_the_plain_one():
    augment, images = Augmentation(**STRONG), batch(40)
    torch.testing.assert_close(augment(images, generator=generator(), strength=0.0), images, rtol=0, atol=1e-6)
    full = augment(images, generator=generator(), strength=1.0)
    assert torch.equal(full, augment(images, generator=generator())) and not torch.allclose(full, images, atol=0.1)


def test_full_strength_leaves_published_views_as_they_were():
    """The sum of a view drawn before there was a strength: the recipes' boxes and jitter, to the last bit of each pixel."""
    ramp = torch.arange(2 * 3 * 6 * 6, dtype=torch.float32).reshape(2, 3, 6, 6) / 215
    view = Augmentation(random_resized_crop=(0.2, 1.0), flip=True, color_jitter=0.5, greyscale=0.2)
    assert view(ramp, generator=generator(4)).double().sum().item() == pytest.approx(86.3624154, rel=1e-6)


def test_strength_weakens_boxes_jitter_and_greyscale():
    """Areas in [1 − s·(1 − min), 1], jitter of s times the strength on s times as many images, greyscale on s times as many."""
    s, count = 0.5, 4000
    ramp = torch.linspace(0, 1, 101)
    images = torch.stack([ramp.expand(101, -1), ramp[:, None].expand(-1, 101), torch.full((101, 101), 0.5)])
    boxes = Augmentation(random_resized_crop=(0.1, 0.9))(
        images.expand(500, -1, -1, -1), generator=generator(), strength=s
    )
    width = (boxes[:, 0, 50, 75] - boxes[:, 0, 50, 25]) * 2
    height = (boxes[:, 1, 75, 50] - boxes[:, 1, 25, 50]) * 2
    area, aspect = width * height, width / height
    assert 0.54 < area.min() < 0.57 and 0.93 < area.max() <= 0.96
    assert aspect.min() > 0.85 and 1.12 < aspect.max() < 1.17  # within √(4/3)

    flat = torch.tensor([0.3, 0.4, 0.5])[:, None, None].expand(3, 2, 2)
    grey = Augmentation(greyscale=0.6)(flat.expand(count, -1, -1, -1), generator=generator(), strength=s)
    share = (grey[:, 0] == grey[:, 1]).all(-1).all(-1).float().mean().item()
    assert share == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / count) ** 0.5)

    constant = torch.full((1, 2, 2), 0.4)  # one channel, constant: brightness alone is seen
    factor = Augmentation(color_jitter=0.5)(constant.expand(count, -1, -1, -1), generator=generator(), strength=s)
    factor = factor[:, 0, 0, 0] / 0.4
    changed = (factor - 1).abs() > 1e-6
    assert changed.float().mean().item() == pytest.approx(0.8 * s, abs=4 * (0.24 / count) ** 0.5)
    assert 0.8 <= factor.min() + 1e-6 < 0.81 and 1.19 < factor.max() - 1e-6 <= 1.2  # 1 ± 0.8·0.5·s


def test_strength_leaves_the_others_as_they_are():
    others, images = Augmentation(crop=2, flip=True, cutout=3, gaussian=0.1), batch(channels=1)
    weak = others(images, generator=generator(), strength=0.1)
    assert torch.equal(weak, others(images, generator=generator()))


def test_one_channel_jitter_has_no_colour():
    images = batch(channels=1)
    one = torch.ones(6)
    out = views.jitter(images, one, one, 0 * one, 0.3 * one)
    assert torch.equal(out, images)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"random_resized_crop": (0.5, 0.2)}, "0 < min <= max <= 1, got"),
        ({"random_resized_crop": (0.0, 1.0)}, "0 < min <= max <= 1, got"),
        ({"random_resized_crop": (0.5, 1.0), "crop": 4}, "exclude each other"),
        ({"crop": -1}, "greater than or equal to 0"),
        ({"greyscale": 1.5}, "less than or equal to 1"),
        ({"color_jitter": 3}, "less than or equal to 2.5"),
        ({"gaussian": -0.1}, "greater than or equal to 0"),
        ({"gaussian": 25}, "less than or equal to 2"),
        ({"croop": 4}, "croop"),
        ({"anneal": 0.05, "crop": 4, "flip": True}, "all three are off, got anneal 0.05; set one of them"),
        ({"anneal": 1.0, "greyscale": 0.2}, "less than 1"),
        ({"anneal": 0, "greyscale": 0.2}, "greater than 0"),
    ],
)
def test_bad_settings_are_refused(keys, message):
    with pytest.raises((ValidationError, UserError), match=message):
        Augmentation(**keys)


def test_bytes_are_refused():
    with pytest.raises(ValueError, match="float batch"):
        Augmentation(crop=1)(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), generator=generator())
