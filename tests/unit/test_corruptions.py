"""Common corruptions: closed forms, slow loops from the definitions, ranges, seeds, and the evaluation over them."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from clead.errors import UserError
from clead.interfaces import ImageSet
from clead.measurements.base import Computation
from clead.measurements.corruptions import CORRUPTIONS, SEVERITIES, corrupt, evaluate_corruptions


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def picture(height: int = 32, width: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth shapes with an edge and some texture, as photographs have, in the middle of the range."""
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    phase = rng(seed).uniform(0, 6, channels)
    waves = np.stack([np.sin(9 * rows + p) * np.cos(7 * columns - p) for p in phase], -1)
    edge = ((rows - 0.5) ** 2 + (columns - 0.5) ** 2 < 0.1)[..., None]
    texture = rng(seed + 1).uniform(-0.08, 0.08, (height, width, channels))
    return (255 * (0.45 + 0.2 * waves + 0.2 * edge + texture).clip(0, 1)).astype(np.uint8)


def grey(level: int, side: int = 32, channels: int = 1) -> np.ndarray:
    return np.full((side, side, channels), level, np.uint8)


def test_the_fifteen_of_the_paper():
    assert len(CORRUPTIONS) == 15 and SEVERITIES == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (9, 21, 3), (40, 17, 1)])
def test_any_image_gives_an_image_of_its_shape(name, severity, shape):
    image = picture(*shape)
    before = image.copy()
    out = corrupt(image, name, severity, rng())
    assert out.dtype == np.uint8 and out.shape == shape
    assert np.array_equal(image, before), "the caller's image was changed"
    assert np.array_equal(out, corrupt(image, name, severity, rng())), "not a function of the seed"
    for extreme in (0, 255):
        assert corrupt(np.full(shape, extreme, np.uint8), name, severity, rng()).shape == shape


def distortion(name: str, severity: int, count: int = 6) -> float:
    out = []
    for k in range(count):
        image = picture(seed=k)
        out.append(np.square(corrupt(image, name, severity, rng(k)) - image.astype(float)).mean() ** 0.5)
    return float(np.mean(out))


@pytest.mark.parametrize("name", sorted(CORRUPTIONS.keys() - {"glass_blur", "frost", "elastic_transform"}))
def test_severity_increases_distortion(name):
    """Not for glass, frost and elastic, whose constants trade one kind of change for another."""
    sizes = [distortion(name, severity) for severity in SEVERITIES]
    assert sizes[0] > 1  # of 255
    assert all(b > a * (0.93 if name == "motion_blur" else 1.0) for a, b in zip(sizes, sizes[1:], strict=False)), sizes
    assert sizes[4] > 1.1 * sizes[0]


@pytest.mark.parametrize("name", ["glass_blur", "frost", "elastic_transform"])
def test_the_others_distort_at_every_severity(name):
    assert all(distortion(name, severity) > 3 for severity in SEVERITIES)


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow",
                                  "frost", "fog", "elastic_transform"])  # fmt: skip
def test_random_ones_differ_with_the_seed(name):
    assert not np.array_equal(corrupt(picture(), name, 5, rng(0)), corrupt(picture(), name, 5, rng(1)))


@pytest.mark.parametrize(
    "name", ["defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"]
)
def test_the_others_draw_nothing(name):
    assert np.array_equal(corrupt(picture(), name, 5, rng(0)), corrupt(picture(), name, 5, rng(1)))


@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "contrast", "pixelate",
                                  "elastic_transform"])  # fmt: skip
@pytest.mark.parametrize("level", [0, 77, 255])
def test_what_only_moves_pixels_leaves_an_even_image_alone(name, level):
    for severity in SEVERITIES:
        assert np.array_equal(corrupt(grey(level), name, severity, rng()), grey(level))


@pytest.mark.parametrize(("severity", "std"), list(zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True)))
def test_gaussian_noise_has_its_standard_deviation(severity, std):
    out = corrupt(grey(128, side=256), "gaussian_noise", severity, rng()).astype(float)
    assert out.mean() == pytest.approx(128, abs=0.5)
    assert out.std() / 255 == pytest.approx(math.hypot(std, 1 / 255 / 12**0.5), rel=0.02)


@pytest.mark.parametrize(("severity", "count"), list(zip(SEVERITIES, (500, 250, 100, 75, 50), strict=True)))
def test_shot_noise_has_the_variance_of_counts(severity, count):
    out = corrupt(grey(102, side=256), "shot_noise", severity, rng()) / 255  # 0.4
    assert out.mean() == pytest.approx(0.4, abs=0.003)
    assert out.var() == pytest.approx(0.4 / count, rel=0.05)


@pytest.mark.parametrize(("severity", "fraction"), list(zip(SEVERITIES, (0.01, 0.02, 0.03, 0.05, 0.07), strict=True)))
def test_impulse_noise_strikes_its_fraction(severity, fraction):
    out = corrupt(grey(100, side=256), "impulse_noise", severity, rng())
    assert set(np.unique(out)) == {0, 100, 255}
    assert (out != 100).mean() == pytest.approx(fraction, rel=0.1)
    assert (out == 255).mean() == pytest.approx(fraction / 2, rel=0.15)


@pytest.mark.parametrize(("severity", "c"), list(zip(SEVERITIES, (0.05, 0.1, 0.15, 0.2, 0.3), strict=True)))
def test_brightness_is_a_step_of_the_value_in_hsv(severity, c):
    """By the standard library's conversion, pixel by pixel."""
    import colorsys

    image = picture(8, 8)
    image[0, 0], image[0, 1], image[0, 2] = 0, (255, 0, 10), 255
    out = corrupt(image, "brightness", severity, rng())
    for index in np.ndindex(8, 8):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[index] / 255))
        expected = np.array(colorsys.hsv_to_rgb(hue, saturation, min(value + c, 1))) * 255
        assert np.abs(out[index] - expected).max() <= 0.5 + 1e-6
    assert np.abs(corrupt(grey(100), "brightness", severity, rng()) - (100 + 255 * c)).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(("severity", "c"), list(zip(SEVERITIES, (0.75, 0.5, 0.4, 0.3, 0.15), strict=True)))
def test_contrast_shrinks_towards_the_mean(severity, c):
    image = picture()
    mean = image.mean((0, 1))
    expected = mean + c * (image - mean)
    assert np.abs(corrupt(image, "contrast", severity, rng()) - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("severity", "quality"), list(zip(SEVERITIES, (80, 65, 58, 50, 40), strict=True)))
def test_jpeg_is_pillows(severity, quality, channels):
    image = picture(channels=channels)
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality)
    expected = np.asarray(Image.open(file)).reshape(image.shape)
    assert np.array_equal(corrupt(image, "jpeg_compression", severity, rng()), expected)


@pytest.mark.parametrize(("severity", "small"), list(zip(SEVERITIES, (30, 28, 27, 24, 20), strict=True)))
def test_pixelate_keeps_as_many_rows_and_columns(severity, small):
    """Enlarging by a box filter repeats or mixes lines; shrunk to 20 of 32, 16 of 32 columns would be too few, 21 too many."""
    image = picture(channels=1)
    reduced = Image.fromarray(image[:, :, 0]).resize((small, small), Image.Resampling.BOX)
    expected = np.asarray(reduced.resize((32, 32), Image.Resampling.BOX))
    assert np.array_equal(corrupt(image, "pixelate", severity, rng())[:, :, 0], expected)


def test_defocus_of_severity_five_is_nearly_the_mean_of_nine():
    """Radius 1.5 covers the 3×3 neighbourhood, and σ = 0.1 softens it by less than e^−50."""
    image = picture(channels=1).astype(float)
    padded = np.pad(image[:, :, 0], 1, mode="reflect")
    expected = sum(padded[r : r + 32, c : c + 32] for r in range(3) for c in range(3)) / 9
    out = corrupt(image.astype(np.uint8), "defocus_blur", 5, rng())[:, :, 0]
    assert np.abs(out - expected).max() <= 0.5 + 1e-6


def test_a_small_defocus_stays_within_the_neighbours():
    """Severities 1 to 3 have a disk of one pixel, softened by three taps of a Gaussian."""
    image = grey(0)
    image[16, 16] = 255
    out = corrupt(image, "defocus_blur", 3, rng())[:, :, 0].astype(float)
    taps = np.array([math.exp(-1 / (2 * 0.6**2)), 1, math.exp(-1 / (2 * 0.6**2))])
    taps /= taps.sum()
    assert np.abs(out[15:18, 15:18] - 255 * np.outer(taps, taps)).max() <= 0.5 + 1e-6
    assert (out > 0).sum() == 9


def test_motion_blur_of_a_point_is_half_a_gaussian():
    image = grey(0, side=41)
    image[20, 20] = 255
    out = corrupt(image, "motion_blur", 5, rng(3))[:, :, 0].astype(float)
    sigma = 2.5 * 41 / 32
    weights = np.exp(-(np.arange(2 * math.ceil(9 * 41 / 32) + 1) ** 2) / (2 * sigma**2))
    found = np.sort(out[out > 0])[::-1]
    assert np.abs(found[:5] - 255 * (weights / weights.sum())[:5]).max() <= 0.5 + 1e-6
    assert out[20, 20] == found[0] and (out[:, 21:] == 0).all(), "the smear is to one side"


def test_glass_blur_moves_pixels_and_makes_none():
    """Severity 1: σ = 0.05 blurs nothing, so what is left is a permutation; borders stay, moves are of a pixel or a chain."""
    image = picture(channels=1)
    image[:] = rng(5).permutation(1024).reshape(32, 32, 1) % 256
    out = corrupt(image, "glass_blur", 1, rng())
    assert not np.array_equal(out, image) and np.array_equal(np.sort(out.ravel()), np.sort(image.ravel()))
    assert np.array_equal(out[0], image[0]) and np.array_equal(out[:, 0], image[:, 0])


def test_zoom_blur_keeps_the_middle_more_than_the_border():
    image = picture()
    change = np.abs(corrupt(image, "zoom_blur", 5, rng()).astype(float) - image).mean(2)
    assert change[14:18, 14:18].mean() < change[[0, -1]].mean()


@pytest.mark.parametrize("side", [8, 32, 33])
def test_plasma_fills_the_unit_interval_and_is_rougher_with_less_decay(side):
    from clead.measurements.corruptions.transforms import _plasma

    maps = {decay: _plasma(side, decay, rng(1)) for decay in (1.5, 3.0)}
    for plasma in maps.values():
        assert plasma.min() == 0 and plasma.max() == 1 and plasma.shape[0] >= side and plasma.shape[0] < 2 * side
    rough, smooth = (np.abs(np.diff(plasma, axis=0)).mean() for plasma in maps.values())
    assert rough > smooth


def test_fog_by_its_formula():
    from clead.measurements.corruptions.transforms import _plasma

    image = picture()
    mist = _plasma(32, 1.75, rng(4))[:, :, None]
    largest = image.max() / 255
    expected = ((image / 255 + 1.5 * mist) * largest / (largest + 1.5)).clip(0, 1) * 255
    assert np.abs(corrupt(image, "fog", 5, rng(4)) - expected).max() <= 0.5 + 1e-6


def test_snow_falls_twice_once_upside_down():
    out = corrupt(grey(0, channels=3), "snow", 4, rng())
    assert np.array_equal(out, np.rot90(out, 2)) and len(np.unique(out)) > 5
    assert out.min() == round(255 * 0.5 * 0.15 + 0.01), "paler by half of what the snow takes"


def test_elastic_of_severity_one_is_affine_and_of_five_is_not():
    """An affine map of a ramp is a ramp: away from the mirrored border its second differences vanish."""
    ramp = np.repeat((np.arange(32) * 7).astype(np.uint8)[None, :, None], 32, 0)
    bends = [
        np.abs(np.diff(corrupt(ramp, "elastic_transform", severity, rng(2))[8:24, 8:24, 0].astype(float), 2, axis=1))
        for severity in (1, 5)
    ]
    assert bends[0].max() <= 2 and bends[1].mean() > 1.5


def test_snow_and_frost_brighten():
    image = picture() // 2
    for name in ("snow", "frost"):
        assert corrupt(image, name, 3, rng()).mean() > image.mean() + 5


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(CORRUPTIONS)),
    severity=st.sampled_from(SEVERITIES),
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_random_images_of_any_size(name, severity, height, width, channels, seed):
    image = rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    out = corrupt(image, name, severity, rng(seed))
    assert out.shape == image.shape and out.dtype == np.uint8


@pytest.mark.parametrize(
    ("image", "name", "severity", "says"),
    [
        (picture(), "gausian_noise", 1, "unknown corruption 'gausian_noise'; did you mean 'gaussian_noise'"),
        (picture(), "fog", 0, "a severity must be 1, 2, 3, 4 or 5, got 0"),
        (picture(), "fog", 6, "a severity must be 1, 2, 3, 4 or 5, got 6"),
        (picture(7, 9), "fog", 1, "sides of at least 8 pixels, got uint8 (7, 9, 3)"),
        (picture(channels=2), "fog", 1, "(H, W, 1 or 3)"),
        (picture() / 255.0, "fog", 1, "must be uint8"),
    ],
)
def test_bad_input_is_one_line(image, name, severity, says):
    with pytest.raises(UserError) as caught:
        corrupt(image, name, severity, rng())
    assert says in str(caught.value) and "\n" not in str(caught.value)


class Bright(nn.Module):
    """Class 1 if the mean is above a half; remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.drop = nn.Dropout(0.9)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        mean = self.drop(x).flatten(1).mean(1) * self.weight
        return torch.stack([0.5 - mean, mean - 0.5], 1)


def image_set(count: int = 10) -> ImageSet:
    images = np.stack([picture(seed=k, height=16, width=16) // 2 for k in range(count)])
    return ImageSet(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.arange(count) % 2 * 0)


def test_evaluation_counts_what_the_corrupted_images_are_called():
    """Dark images, all of class 0: brightness and fog carry some over, contrast none."""
    data, model = image_set(), Bright()
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    result = evaluate_corruptions(model, data, names=["brightness", "contrast", "fog"], severities=[1, 5])
    assert (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == (state[0].tolist(), state[1])
    assert model.training and model.drop.training and model.weight.requires_grad and model.weight.grad is None
    assert result.n == 10 and result.clean.accuracy == 1.0 and result.clean.n == 10
    assert [(cell.name, cell.severity) for cell in result.cells] == [
        (name, severity) for name in ("brightness", "contrast", "fog") for severity in (1, 5)
    ]
    assert result.accuracies()["contrast"] == [1.0, 1.0]
    expected = []
    for severity in (1, 5):
        images = [corrupt(i.permute(1, 2, 0).numpy(), "brightness", severity, rng()) for i in data.images]
        expected.append(float(np.mean([image.mean() / 255 <= 0.5 for image in images])))
    assert result.accuracies()["brightness"] == pytest.approx(expected) and expected[1] < 1
    assert result.mean_accuracy == pytest.approx(np.mean([cell.accuracy.accuracy for cell in result.cells]))
    assert type(result).model_validate_json(result.model_dump_json()) == result


def test_what_is_drawn_does_not_depend_on_the_batches_or_on_what_else_is_asked():
    data = image_set(5)
    seen = []
    for names, severities, batch_size in (
        (["gaussian_noise"], [3], 5),
        (["gaussian_noise"], [3], 2),
        (["fog", "gaussian_noise"], [1, 3], 4),
    ):
        model = Bright()
        evaluate_corruptions(model, data, names=names, severities=severities, how=Computation(batch_size=batch_size))
        seen.append(torch.cat(model.seen)[-5:])
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0][0] - data.images[0] / 255, seen[0][1] - data.images[1] / 255)
    other = Bright()
    evaluate_corruptions(other, data, names=["gaussian_noise"], severities=[3], how=Computation(seed=1))
    assert not torch.equal(torch.cat(other.seen)[-5:], seen[0])


def test_all_75_cells():
    result = evaluate_corruptions(Bright(), image_set(2))
    assert len(result.cells) == 75 and list(result.accuracies()) == list(CORRUPTIONS)


def test_nan_logits_are_wrong_answers():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            bad = torch.where(x.flatten(1).amax(1) > 0.9, torch.nan, 0.0)
            return torch.stack([1 + bad, bad], 1)

    data = ImageSet(torch.full((3, 1, 8, 8), 200, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    result = evaluate_corruptions(Broken(), data, names=["brightness"], severities=[1, 5])
    assert result.clean.accuracy == 1 and result.accuracies() == {"brightness": [1.0, 0.0]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"names": ["fogg"]}, "unknown corruption 'fogg'; did you mean 'fog'"),
        ({"names": []}, "at least one corruption and one severity"),
        ({"severities": [1, 1]}, "may be named once"),
        ({"severities": [7]}, "a severity must be 1, 2, 3, 4 or 5, got 7"),
        ({"how": Computation(batch_size=0)}, "batch_size must be at least 1"),
        ({"how": Computation(seed=-1)}, "seed at least 0"),
        ({"images": ImageSet(torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))}, "must be uint8"),
        ({"images": ImageSet(torch.zeros(2, 1, 8, 8).byte(), torch.tensor([0, 2]))}, "labels must be in [0, 2)"),
    ],
)
def test_bad_evaluations_are_one_line(change, says):
    arguments = {"images": image_set(2), **change}
    with pytest.raises(UserError) as caught:
        evaluate_corruptions(Bright(), arguments.pop("images"), **arguments)
    assert says in str(caught.value) and "\n" not in str(caught.value)
