"""Images that are there twice, and what leaks by them."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from clead.data.datasets.folder import Folder
from clead.data.datasets.npz import Npz
from clead.data.duplicates import Split, find_duplicates, near_pairs, propose, signatures
from clead.data.groups import group_names


def picture(seed, side=48, colour=True):
    """A smooth random picture, as photographs are."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (6, 6, 3) if colour else (6, 6)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC))


def jpeg(image, quality=70):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def noisy(image, seed, sigma=4):
    noise = np.random.default_rng(seed).normal(0, sigma, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


def brighter(image):
    return (image * 0.9 + 20).clip(0, 255).astype(np.uint8)


def smaller(image):
    side = image.shape[0]
    return np.asarray(Image.fromarray(image).resize((side * 3 // 4,) * 2).resize((side, side)))


def split(images, labels=None, names=()):
    return Split(images, [0] * len(images) if labels is None else labels, names)


def pairs_of(images):
    a, b = near_pairs(*signatures(images))
    return set(zip(a.tolist(), b.tolist(), strict=True))


def test_equal_images_are_counted_between_and_within_splits():
    one, two, three, four = map(picture, range(4))
    found = find_duplicates(
        {"training": split([one, one, two, three], [0, 0, 1, 1]), "test": split([one, two, four, four], [0, 0, 1, 1])},
        near=False,
    )
    assert found.shared == {("test", "training"): 2} and found.within == {"training": 1, "test": 1}
    assert found.conflicting == 2  # two, once with each label
    assert (found.distinct, found.total) == (4, 8)
    assert "2 test images are training images too" in found.notes()[0] and "most images are equal" in found.notes()[-1]


def test_different_shapes_are_different_images():
    flat = np.arange(16, dtype=np.uint8)
    found = find_duplicates({"training": split([flat.reshape(4, 4)]), "test": split([flat.reshape(2, 8)])}, near=False)
    assert not any(found.shared.values()) and not found.notes()


@pytest.mark.parametrize("change", [jpeg, brighter, smaller, lambda image: noisy(image, 1)])
@pytest.mark.parametrize(("side", "colour"), [(32, True), (48, False), (160, True)])
def test_changed_copies_are_near_duplicates_and_other_pictures_are_not(change, side, colour):
    train = [picture(seed, side, colour) for seed in range(30)]
    test = [change(image) for image in train[:10]] + [picture(seed, side, colour) for seed in range(100, 120)]
    found = find_duplicates({"training": split(train), "test": split(test)})
    assert found.near_shared == {("test", "training"): 10} and not found.shared["test", "training"]
    assert "10 more test images nearly equal training images" in found.notes()[0]


def test_equal_images_are_not_counted_as_near_ones_too():
    train = [picture(seed) for seed in range(5)]
    found = find_duplicates({"training": split(train), "test": split([train[0], jpeg(train[1]), picture(9)])})
    assert found.shared == {("test", "training"): 1} and found.near_shared == {("test", "training"): 1}


@pytest.mark.parametrize("scale", [1, 3])
def test_different_digits_are_no_duplicates(scale):
    digits = load_digits()
    images = [
        np.asarray(Image.fromarray((x * 15.9).astype(np.uint8)).resize((8 * scale,) * 2)) for x in digits.images[:600]
    ]
    assert len(pairs_of(images)) <= 1
    assert pairs_of([*images[:50], *[noisy(x, 0, 2) for x in images[:50]]]) >= {(k, k + 50) for k in range(50)}


def test_images_of_one_colour_have_no_pattern_to_compare():
    assert not pairs_of([np.full((16, 16), value, np.uint8) for value in range(0, 250, 10)])


def test_pairs_are_those_of_a_comparison_of_all_with_all():
    images = [noisy(picture(seed // 3, 32), seed, 3) for seed in range(45)]
    hashes, thumbs, sides = signatures(images)
    expected = {
        (i, j)
        for i in range(45)
        for j in range(i + 1, 45)
        if (hashes[i] != hashes[j]).sum() <= 8 and ((thumbs[i] - thumbs[j]) ** 2).mean() < 0.25**2
    }
    assert pairs_of(images) == expected >= {(3 * k, 3 * k + 1) for k in range(15)}
    assert all(i // 3 == j // 3 for i, j in expected) and (sides == 32).all()


@pytest.mark.parametrize(
    "pattern",
    ["scene{s:02d}_frame{f:04d}.png", "{s}-{f}.jpg", "IMG_{s}_{f}.png", "seq{s} ({f}).png", "p{s}_left_{f}.bmp",
     "{s:03d}{letter}.png", "clip{s}/{f:05d}.png", "s{s}_{letter}{letter}.png"],
)  # fmt: skip
def test_an_expression_is_proposed_that_keeps_each_series_together(pattern):
    names = [pattern.format(s=s, f=f, letter="abc"[f]) for s in range(8) for f in range(3)]
    pairs = [(3 * s + i, 3 * s + j) for s in range(8) for i in range(3) for j in range(i + 1, 3)]
    expression, apart = propose(names, pairs)
    assert expression is not None and apart == 0
    assert len(set(group_names(expression, names, {})[0])) == 8


def test_names_without_series_get_no_proposal():
    random = np.random.default_rng(0)
    names = [f"{random.integers(10**9):x}{random.integers(10**9):x}.png" for _ in range(40)]
    assert propose(names, [(2 * k, 2 * k + 1) for k in range(20)])[0] is None
    assert propose([f"{k}.png" for k in range(40)], [(2 * k, 2 * k + 1) for k in range(20)])[0] is None


def frames(root, part="train", scenes=range(12), count=6):
    for scene in scenes:
        folder = root / part / ("a" if scene % 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        for frame in range(count):
            image = noisy(picture(scene, 32), 100 * scene + frame, 3)
            Image.fromarray(image).save(folder / f"scene{scene:02d}_frame{frame:04d}.png")
    return root


def test_frames_of_one_scene_on_both_sides_are_said_and_the_line_to_type_mends_it(tmp_path):
    frames(frames(tmp_path), "test", range(20, 24))
    splits = Folder(path=tmp_path, val_fraction=0.2).load(0)
    said = " ".join(splits.notes)
    assert "validation images nearly equal training images" in said and "--data.group_by '" in said
    assert "test images" not in said
    expression = said.split("--data.group_by '")[1].split("' keeps")[0]
    splits = Folder(path=tmp_path, val_fraction=0.2, group_by=expression).load(0)
    assert not splits.notes


def test_loading_says_which_images_are_in_both_splits(tmp_path):
    x = np.stack([picture(seed, 8, False) for seed in range(20)])
    y = np.arange(20) % 2
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=np.concatenate([x[:3], 255 - x[:5]]), y_test=y[:8])
    assert (
        "3 test images are training images too (equal pixels): their figures are too good"
        in Npz(path=tmp_path / "a.npz").load(0).notes
    )
    np.savez(tmp_path / "b.npz", x_train=x, y_train=y, x_test=255 - x[:5], y_test=y[:5])
    assert not Npz(path=tmp_path / "b.npz").load(0).notes
