"""Splits, checks, decoding, the cache and the layouts of datasets."""

import io
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clead.data import decoding
from clead.data.base import RawSplit, RawSplits, check, fingerprint, shuffle_if_sorted, stratified
from clead.data.datasets import DATASETS
from clead.data.decoding import ResizeSpec, decode, fit_arrays
from clead.errors import MissingExtra, UserError
from clead.interfaces import ImageSet
from support import encoded


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CLEAD_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def noise(*shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def write_folder(root, per_class=4, classes=("cat", "dog"), parts=("train", "test"), size=(6, 6), grey=False):
    for p, part in enumerate(parts):
        for c, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for n in range(per_class):
                image = noise(*size, *(() if grey else (3,)), seed=100 * p + 10 * c + n)
                (root / part / name / f"{n}.png").write_bytes(encoded(image))
    return root


def write_parquet(root, part, images, labels, *, image="img", label="label", names=None, shard="00000-of-00001"):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(exist_ok=True, parents=True)
    table = pa.table({image: [{"bytes": each, "path": None} for each in images], label: labels})
    if names is not None:
        info = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, root / f"{part}-{shard}.parquet")


def one_line_error(call, *fragments):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for fragment in fragments:
        assert fragment in message, message


def load(name, path, **keys):
    return DATASETS.get(name)(path=path, **keys).load(0)


# ---------------------------------------------------------------------------------------------------- splits


@given(
    sizes=st.lists(st.integers(2, 40), min_size=2, max_size=6),
    fraction=st.floats(0.01, 0.5),
    seed=st.integers(0, 2**40),
)
def test_stratified_keeps_proportions(sizes, fraction, seed):
    labels = torch.from_numpy(np.random.RandomState(0).permutation(np.repeat(np.arange(len(sizes)), sizes)))
    count = round(fraction * len(labels))
    chosen, rest = stratified(labels, count, seed)
    assert sorted([*chosen.tolist(), *rest.tolist()]) == list(range(len(labels)))
    got = np.bincount(labels[chosen], minlength=len(sizes))
    ideal = np.array(sizes) * count / len(labels)
    assert (got >= 1).all() and (np.array(sizes) - got >= 1).all()
    if (ideal >= 1).all() and (np.array(sizes) - ideal >= 1).all():
        assert got.sum() == count and (abs(got - ideal) < 1).all()


@given(sizes=st.lists(st.integers(2, 30), min_size=2, max_size=6), data=st.data())
def test_stratified_limit_is_exact(sizes, data):
    labels = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
    count = data.draw(st.integers(2 * len(sizes), len(labels)))
    chosen, _ = stratified(labels, count, 0, least=2, spare=0)
    assert len(chosen) == count and (np.bincount(labels[chosen]) >= 2).all()


def test_stratified_draw_is_frozen():
    """The split of a published result must never change with a library's version."""
    labels = torch.tensor([0, 1] * 10)
    assert stratified(labels, 4, 7)[0].tolist() == [8, 10, 15, 17]


def test_fingerprint_sees_content_and_order():
    images, labels = torch.from_numpy(noise(6, 1, 4, 4)), torch.tensor([0, 1, 2, 0, 1, 2])
    same = fingerprint([ImageSet(images, labels)], ("a", "b", "c"))
    assert same == fingerprint([ImageSet(images.clone(), labels.clone())], ["a", "b", "c"])
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    pixel = images.clone()
    pixel[5, 0, 3, 3] ^= 1
    others = [
        fingerprint([ImageSet(images[order], labels[order])], ("a", "b", "c")),
        fingerprint([ImageSet(pixel, labels)], ("a", "b", "c")),
        fingerprint([ImageSet(images, labels.flip(0))], ("a", "b", "c")),
        fingerprint([ImageSet(images, labels)], ("a", "b", "d")),
        fingerprint([ImageSet(images.view(6, 1, 2, 8), labels)], ("a", "b", "c")),
    ]
    assert len({same, *others}) == 6


def test_digits_split_is_fixed_and_stratified():
    splits = DATASETS.get("digits")().load(3)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1294, 144, 359)
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    digits = sklearn_datasets.load_digits()
    oracle = sorted(bytes(round(v * 255 / 16) for v in image.ravel()) for image in digits.images)
    got = torch.cat([splits.train.images, splits.val.images, splits.test.images])
    assert sorted(bytes(image) for image in got.numpy()) == oracle
    counts = torch.bincount(splits.test.labels)
    assert ((counts - torch.bincount(torch.from_numpy(digits.target)) * 0.2).abs() < 1).all()


def test_digits_without_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(MissingExtra, match=r"clead\[data\]"):
        DATASETS.get("digits")().load(0)


# ---------------------------------------------------------------------------------------------------- checks


def found(train, test, classes=("a", "b")):
    def part(labels):
        return RawSplit(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), torch.tensor(labels, dtype=torch.int64))

    return RawSplits(part(train), part(test), classes)


@pytest.mark.parametrize(
    ("train", "test", "classes", "fragment"),
    [
        ([0, 0, 1, 7], [0], ("a", "b"), "got 7 in row 3"),
        ([0, 0, 1, 1], [-1], ("a", "b"), "test labels must be in [0, 2)"),
        ([0, 0, 1, 1], [2], ("a", "b", "zebra"), "'zebra'"),
        ([0, 0, 1], [0], ("a", "lone"), "got 1 of class 'lone'"),
        ([0, 0, 0], [0], ("only", "b"), "got only 'only'"),
        ([], [0], ("a", "b"), "got 0 and 1"),
        ([0, 0, 1, 1], [], ("a", "b"), "got 4 and 0"),
    ],
)
def test_bad_labels_are_refused(train, test, classes, fragment):
    one_line_error(lambda: check(found(train, test, classes)), fragment)


def test_good_labels_and_an_unused_name_are_accepted():
    check(found([0, 0, 1, 1], [1], ("a", "b", "unused")))


def test_small_limit_is_refused():
    one_line_error(lambda: DATASETS.get("digits")(limit_train=19).load(0), "20 here, got 19")


def test_missing_path_suggests_a_neighbour(tmp_path):
    (tmp_path / "pictures").mkdir()
    one_line_error(lambda: load("folder", tmp_path / "pictrues"), f"did you mean '{tmp_path / 'pictures'}'?")
    one_line_error(lambda: load("folder", tmp_path / "no" / "way"), "does not exist")


def test_errors_come_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "CACHE_ABOVE", 0)
    root = write_folder(tmp_path / "root")
    (root / "test" / "dog" / "0.png").write_bytes(b"broken")
    with pytest.raises(UserError):
        load("folder", root)
    assert not (tmp_path / "cache").exists()


# -------------------------------------------------------------------------------------------------- decoding


def test_decode_agrees_with_pillow_image_by_image():
    blobs = [encoded(noise(9, 7, 3, seed=n), kind) for n, kind in enumerate(["PNG", "BMP", "PPM", "JPEG", "WEBP"])]
    images = decode(blobs, list("abcde"), ResizeSpec())
    assert images.shape == (5, 3, 9, 7) and images.dtype == torch.uint8
    for image, blob in zip(images, blobs, strict=True):
        oracle = np.asarray(Image.open(io.BytesIO(blob)).convert("RGB"))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), oracle)


def test_channels_follow_the_images():
    grey, colour = encoded(noise(5, 5)), encoded(noise(5, 5, 3))
    assert decode([grey, grey], ["a", "b"], ResizeSpec()).shape == (2, 1, 5, 5)
    mixed = decode([grey, colour], ["a", "b"], ResizeSpec())
    assert mixed.shape == (2, 3, 5, 5) and np.array_equal(mixed[0].numpy(), np.stack([noise(5, 5)] * 3))
    assert decode([grey, colour], ["a", "b"], ResizeSpec(channels=1)).shape == (2, 1, 5, 5)
    assert decode([grey, grey], ["a", "b"], ResizeSpec(channels=3)).shape == (2, 3, 5, 5)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "transparent palette"])
def test_every_mode_is_read(mode):
    rgb = Image.fromarray(noise(4, 4, 3))
    if mode == "I;16":
        image, oracle = Image.fromarray(noise(4, 4).astype(np.uint16) * 256 + 255), noise(4, 4)
    elif mode == "transparent palette":
        image = rgb.quantize(8)
        image.info["transparency"] = bytes([0, 128] * 4)
        oracle = np.asarray(rgb.quantize(8).convert("RGB"))
    else:
        image = rgb.quantize(16) if mode == "P" else rgb.convert("L" if mode == "LA" else mode)
        oracle = np.asarray(image.convert("L" if mode in ("1", "L", "LA") else "RGB"))
        image = image.convert(mode)
    got = decode([encoded(image)], ["x"], ResizeSpec())[0].numpy()
    assert np.array_equal(got, oracle[None] if oracle.ndim == 2 else oracle.transpose(2, 0, 1))


def test_exif_orientation_is_honoured():
    image = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270° to see it upright
    got = decode([encoded(image, "PNG", exif=exif)], ["x"], ResizeSpec())[0]
    assert np.array_equal(got.permute(1, 2, 0).numpy(), np.rot90(image, 3))


def test_resize_squash_and_crop():
    image = noise(8, 12, 3)
    blob, picture = encoded(image), Image.fromarray(image)
    squash = decode([blob], ["x"], ResizeSpec(4))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(squash, np.asarray(picture.resize((4, 4), Image.Resampling.BILINEAR)))
    crop = decode([blob], ["x"], ResizeSpec(4, "crop"))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(crop, np.asarray(picture.resize((6, 4), Image.Resampling.BILINEAR))[:, 1:5])
    # Arrays and files go the same way.
    array = torch.from_numpy(image.transpose(2, 0, 1)[None].copy())
    assert torch.equal(fit_arrays(array, ResizeSpec(4, "crop"))[0].permute(1, 2, 0), torch.from_numpy(crop))
    assert fit_arrays(array, ResizeSpec()) is array and fit_arrays(array, ResizeSpec(channels=3)) is array


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20))
def test_crop_always_gives_the_asked_square(height, width, size):
    array = torch.zeros(1, 1, height, width, dtype=torch.uint8)
    assert fit_arrays(array, ResizeSpec(size, "crop")).shape == (1, 1, size, size)


def test_broken_images_are_named():
    good = encoded(noise(20, 20, 3))
    for bad, reason in [(b"", "unknown format"), (b"GIF89a" + good, "unknown format"), (good[:400], "trunc")]:
        one_line_error(lambda bad=bad: decode([good, bad], ["good", "bad.png"], ResizeSpec()), "bad.png", reason)


def test_decompression_bomb_is_refused(monkeypatch):
    blob = encoded(noise(20, 20))
    for limit in (399, 150):  # Pillow itself warns above the limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        one_line_error(lambda: decode([blob], ["bomb.png"], ResizeSpec()), "bomb.png", str(limit))


def test_different_sizes_need_image_size():
    blobs = [encoded(noise(4, 4)), encoded(noise(4, 4)), encoded(noise(5, 6))]
    one_line_error(lambda: decode(blobs, list("abc"), ResizeSpec()), "c: the image is 6x5", "--data.image_size")
    assert decode(blobs, list("abc"), ResizeSpec(4)).shape == (3, 1, 4, 4)


# ----------------------------------------------------------------------------------------------------- cache


def test_cache_is_used_keyed_by_content_and_mended(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(decoding, "CACHE_ABOVE", 1)
    cache = tmp_path / "cache"
    blobs = [encoded(noise(4, 4, seed=n)) for n in range(3)]
    first = decode(blobs, list("abc"), ResizeSpec())
    (file,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode_one", None)  # must not be called
        assert torch.equal(decode(blobs, list("xyz"), ResizeSpec()), first)
    content = file.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    for damaged in (b"", content[:20], content[:-5], flipped):
        file.write_bytes(damaged)
        assert torch.equal(decode(blobs, list("abc"), ResizeSpec()), first)
        assert file.read_bytes() == content and "damaged" in caplog.text
    decode(blobs, list("abc"), ResizeSpec(channels=3))
    decode(blobs[::-1], list("abc"), ResizeSpec())
    assert len(list(cache.iterdir())) == 3  # and no temporary file


def test_small_collections_are_not_cached(tmp_path):
    decode([encoded(noise(4, 4))], ["a"], ResizeSpec())
    assert not (tmp_path / "cache").exists()


def test_unwritable_cache_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "CACHE_ABOVE", 0)
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CLEAD_CACHE", str(tmp_path / "file" / "cache"))
    assert decode([encoded(noise(4, 4))], ["a"], ResizeSpec()).shape == (1, 1, 4, 4)

    def full(source, target):
        raise OSError("disk full")

    monkeypatch.setenv("CLEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "replace", full)
    assert decode([encoded(noise(4, 4))], ["a"], ResizeSpec()).shape == (1, 1, 4, 4)
    assert list((tmp_path / "cache").iterdir()) == []


# ---------------------------------------------------------------------------------------------------- folder


def test_folder_without_test_cuts_a_fixed_fifth(tmp_path):
    root = write_folder(tmp_path / "root", per_class=10, parts=("train",))
    dataset = DATASETS.get("folder")(path=root)
    splits, other = dataset.load(0), dataset.load(1)
    assert any("there is no test split" in note for note in splits.notes) and splits.origin == "train"
    assert torch.bincount(splits.test.labels).tolist() == [2, 2]
    assert torch.equal(splits.test.images, other.test.images)


def test_folder_class_only_in_test_is_named(tmp_path):
    root = write_folder(tmp_path / "root")
    (root / "test" / "bird").mkdir()
    (root / "test" / "bird" / "x.png").write_bytes(encoded(noise(6, 6, 3)))
    one_line_error(lambda: load("folder", root), "'bird'", "without any training image")


def test_folder_problems(tmp_path):
    one_line_error(lambda: load("folder", tmp_path), "train/")
    (tmp_path / "train").mkdir()
    one_line_error(lambda: load("folder", tmp_path), "no class folder")
    (tmp_path / "train" / "cat").mkdir()
    (tmp_path / "train" / "cat" / "notes.txt").write_text("x")
    one_line_error(lambda: load("folder", tmp_path), "cat holds no image")
    root = write_folder(tmp_path / "one", classes=("cat",), parts=("train",))
    one_line_error(lambda: load("folder", root), "got only 'cat'")


def test_folder_keeps_upper_case_and_skips_hidden(tmp_path):
    root = write_folder(tmp_path / "root", grey=True)
    (root / "train" / "cat" / "0.png").rename(root / "train" / "cat" / "0.PNG")
    (root / "train" / "cat" / "._1.png").write_bytes(b"resource fork")
    (root / "train" / ".git").mkdir()
    splits = load("folder", root)
    assert len(splits.train) + len(splits.val) == 8 and splits.classes == ("cat", "dog")
    assert splits.train.images.shape[1:] == (1, 6, 6)


# --------------------------------------------------------------------------------------------------- parquet


@pytest.fixture
def pictures():
    return [encoded(noise(6, 6, 3, seed=n)) for n in range(8)]


def test_parquet_shards_names_and_data_folder(tmp_path, pictures):
    pytest.importorskip("pyarrow")
    names = ["cat", "dog"]
    for shard, rows in (("00000-of-00002", slice(0, 4)), ("00001-of-00002", slice(4, 8))):
        write_parquet(tmp_path / "data", "train", pictures[rows], [0, 1, 1, 0], image="image", names=names, shard=shard)
    write_parquet(tmp_path / "data", "test", pictures[:2], [1, 0], image="image", names=names)
    splits = load("auto", tmp_path)
    assert splits.classes == ("cat", "dog") and splits.test.labels.tolist() == [1, 0]
    assert sorted([*splits.train.labels.tolist(), *splits.val.labels.tolist()]) == [0] * 4 + [1] * 4
    oracle = decode(pictures, list("abcdefgh"), ResizeSpec())
    assert sorted(map(bytes, torch.cat([splits.train.images, splits.val.images]).numpy())) == sorted(
        map(bytes, oracle.numpy())
    )
    (tmp_path / "data" / "train-00001-of-00002.parquet").unlink()
    one_line_error(lambda: load("parquet", tmp_path), "says 2 files, got 1")


def test_parquet_fine_label_and_default_names(tmp_path, pictures):
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path, "train", pictures, [0, 1, 2, 3] * 2, label="fine_label")
    write_parquet(tmp_path, "test", pictures[:1], [3], label="fine_label")
    assert load("parquet", tmp_path).classes == ("0", "1", "2", "3")


def test_parquet_problems(tmp_path, pictures):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    labels = [0, 1] * 4
    write_parquet(tmp_path, "train", pictures, labels)
    assert DATASETS.get("parquet")(path=tmp_path).read().test.images == []
    write_parquet(tmp_path, "test", pictures, labels, image="scan")
    one_line_error(lambda: load("parquet", tmp_path), "'img', 'image'", "got scan, label")
    write_parquet(tmp_path, "test", pictures, labels, label="kind")
    one_line_error(lambda: load("parquet", tmp_path), "'label', 'fine_label'", "got img, kind")
    write_parquet(tmp_path, "test", pictures, list("ababcdcd"))
    one_line_error(lambda: load("parquet", tmp_path), "'a', 'b', 'c', 'd' without any training image")
    write_parquet(tmp_path, "test", [*pictures[:7], None], labels)
    one_line_error(lambda: load("parquet", tmp_path), "row 7", "no bytes")
    write_parquet(tmp_path, "test", [*pictures[:7], pictures[7][:60]], labels)
    one_line_error(lambda: load("parquet", tmp_path), "test-00000-of-00001.parquet row 7", "not a readable image")
    write_parquet(tmp_path, "test", pictures, [0, 1] * 3 + [0, None])
    one_line_error(lambda: load("parquet", tmp_path), "row 7", "label is empty")
    write_parquet(tmp_path, "test", pictures, labels, names=["x", "y"])
    one_line_error(lambda: load("parquet", tmp_path), "same classes")
    pq.write_table(pa.table({"img": [b"raw"], "label": [0]}), tmp_path / "test-00000-of-00001.parquet")
    one_line_error(lambda: load("parquet", tmp_path), "row 0: not a readable image")
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"PAR1 no")
    one_line_error(lambda: load("parquet", tmp_path), "not a readable Parquet file")


# ------------------------------------------------------------------------------------------------------- npz


def write_npz(path, **changes):
    arrays = {
        "x_train": noise(12, 6, 6, 3),
        "y_train": np.tile([0, 1, 2], 4),
        "x_test": noise(3, 6, 6, 3, seed=1),
        "y_test": np.arange(3),
    }
    np.savez(path, **{key: value for key, value in {**arrays, **changes}.items() if value is not None})
    return path


def test_npz_layouts_agree(tmp_path):
    channels_last = load("npz", write_npz(tmp_path / "a.npz"))
    first = {
        key: noise(n, 6, 6, 3, seed=s).transpose(0, 3, 1, 2) for key, n, s in (("x_train", 12, 0), ("x_test", 3, 1))
    }
    as_float = {key: value / np.float32(255) for key, value in first.items()}
    column = {"y_train": np.tile([0, 1, 2], 4)[:, None].astype(np.uint8)}
    for changes in (first, as_float, column):
        assert load("npz", write_npz(tmp_path / "b.npz", **changes)).fingerprint == channels_last.fingerprint
    flat = load("auto", write_npz(tmp_path / "c.npz", x_train=noise(12, 6, 6), x_test=noise(3, 6, 6)))
    assert flat.train.images.shape == (9, 1, 6, 6) and flat.classes == ("0", "1", "2")
    named = write_npz(tmp_path / "d.npz", classes=np.array(["x", "y", "z"]))
    assert load("npz", named).classes == ("x", "y", "z")


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"y_test": None}, "lacks y_test"),
        ({"x_train": noise(12, 6, 6, 3).astype(np.float32)}, "from 0 to 255"),
        ({"x_train": np.full((12, 6, 6), np.nan)}, "from nan to nan"),
        ({"x_train": np.full((12, 6, 6), -0.5)}, "from -0.5 to -0.5"),
        ({"x_train": noise(12, 6, 6).astype(np.int64)}, "got int64"),
        ({"x_train": noise(12, 3, 6, 3)}, "no doubt which axis"),
        ({"x_train": noise(12, 6, 6, 4)}, "(12, 6, 6, 4)"),
        ({"y_train": np.arange(11)}, "must be 12 integers"),
        ({"y_train": np.eye(12)}, "not one-hot"),
        ({"x_test": noise(3, 5, 5, 3)}, "test images 3x5x5"),
        ({"classes": np.array(["x", "y"])}, "got 2 in row 2"),
        ({"classes": np.array([{"a": 1}], dtype=object)}, "holds Python objects (object)"),
    ],
)
def test_npz_problems(tmp_path, changes, fragment):
    path = write_npz(tmp_path / "bad.npz", **changes)
    with pytest.raises(UserError) as caught:
        load("npz", path)
    assert fragment in str(caught.value)


def test_npz_that_is_none(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"hello")
    one_line_error(lambda: load("npz", tmp_path / "x.npz"), "not a readable .npz")
    content = write_npz(tmp_path / "y.npz").read_bytes()
    (tmp_path / "y.npz").write_bytes(content[: len(content) // 2])
    one_line_error(lambda: load("npz", tmp_path / "y.npz"), "not a readable .npz")


# ------------------------------------------------------------------------------------------- auto and by name


def test_auto_says_what_it_found(tmp_path):
    (tmp_path / "readme.md").write_text("x")
    one_line_error(lambda: load("auto", tmp_path), "a folder with a file readme.md")
    one_line_error(lambda: load("auto", tmp_path / "readme.md"), "a text file")


def test_names_are_found_in_clead_data(tmp_path, monkeypatch):
    one_line_error(lambda: DATASETS.get("mnist")().load(0), "--data.path", "CLEAD_DATA")
    classes = tuple(map(str, range(10)))
    write_folder(tmp_path / "mnist", classes=classes, grey=True)
    monkeypatch.setenv("CLEAD_DATA", str(tmp_path))
    assert DATASETS.get("mnist")().load(0).classes == classes
    one_line_error(lambda: load("cifar100", tmp_path / "mnist"), "cifar100 has 100 classes, got 10")


def test_images_that_lie_class_by_class_are_mixed_and_others_kept():
    images = torch.arange(60, dtype=torch.uint8)[:, None, None, None]
    blocks = ImageSet(images, torch.arange(60) // 20)
    found = shuffle_if_sorted(blocks)
    assert torch.equal(found.labels, found.images[:, 0, 0, 0].long() // 20)
    assert torch.equal(found.labels.bincount(), blocks.labels.bincount())
    assert set(found.labels[:20].tolist()) == {0, 1, 2} and torch.equal(found.labels, shuffle_if_sorted(blocks).labels)
    shuffled = ImageSet(images, torch.arange(60) % 3)
    assert shuffle_if_sorted(shuffled) is shuffled


@pytest.mark.parametrize("odd", [[], [0], [2, 1, 2]])
def test_sorted_files_one_behind_the_other_are_mixed_too(odd):
    labels = torch.tensor([0] * 40 + [1] * 40 + [2] * 40 + [0] * 40 + [1] * 40 + [2] * 40 + odd)
    mixed = shuffle_if_sorted(ImageSet(torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels))
    assert set(mixed.labels[:20].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("count", [1, 6, 40, 1000])
def test_images_in_no_order_stay(count):
    labels = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(3))
    images = ImageSet(torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1), labels)
    assert count < 2 or shuffle_if_sorted(images) is images
    empty = images.subset(torch.zeros(0, dtype=torch.int64))
    assert len(shuffle_if_sorted(empty)) == 0
