"""Parquet files as they are downloaded: configurations, names of splits and columns, text labels, images beside the file."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from clead.data.datasets import DATASETS
from clead.data.datasets.auto import read_any
from clead.data.datasets.parquet_stream import ParquetStream
from clead.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (6, 6, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, labels, *, image="image", label="label", names=None, images=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(map(ord, path.name))
    images = [{"bytes": png(seed + n), "path": None} for n in range(len(labels))] if images is None else images
    table = pa.table({image: images, label: labels, **columns})
    if names is not None:
        about = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(table, path)
    return path


def sizes(found):
    return tuple(0 if part is None else len(part.labels) for part in (found.train, found.val, found.test))


def refusal(path, name="auto"):
    with pytest.raises(UserError) as caught:
        DATASETS.get(name)(path=path).load(0)
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("plain_text/train-00000-of-00001", None, "plain_text/test-00000-of-00001"),
        ("data/train-00000-of-00001-0a1b2c", "data/validation-00000-of-00001", "data/test-00000-of-00001"),
        ("default/train/0000", "default/valid/0000", "default/test/0000"),
        ("data/train", "data/dev", None),
        ("train", None, "test"),
        ("mnist_train", "mnist_val", "mnist_test"),
        ("train/part.0", "validation/part.0", "test/part.0"),
        ("data/train-00000-of-00001", None, None),
        (None, "data/valid-00000-of-00001", None),
        (None, None, "data/test-00000-of-00001"),
        ("some/photos", None, None),
    ],
)
def test_splits_lie_in_folders_and_names_of_every_kind(tmp_path, train, val, test):
    for name, count in ((train, 20), (val, 6), (test, 4)):
        if name:
            write(tmp_path / f"{name}.parquet", [0, 1] * (count // 2), names=["cat", "dog"])
    (tmp_path / "README.md").write_text("card")
    (tmp_path / ".gitattributes").write_text("")
    found = read_any(tmp_path)
    assert sizes(found) == (20 if train else 0, 6 if val else 0, 4 if test else 0) and found.classes == ("cat", "dog")
    assert len(found.skipped) == 2 and found.unsplit == (train == "some/photos")
    splits = DATASETS.get("auto")(path=tmp_path).load(0, training=bool(train))
    assert splits.origin == ("test" if test else "val" if val else "train")
    assert len(splits.test) == (4 if test else 6 if val else 4)


def test_several_configurations_are_named(tmp_path):
    for config in ("digits", "letters"):
        write(tmp_path / config / "train-00000-of-00001.parquet", [0, 1] * 4)
    message = refusal(tmp_path)
    assert "digits, letters" in message and f"--data.path {tmp_path / 'digits'}" in message
    assert sizes(read_any(tmp_path / "letters")) == (8, 0, 0)
    assert sizes(read_any(tmp_path / "digits/train-00000-of-00001.parquet")) == (8, 0, 0)


@pytest.mark.parametrize(
    ("image", "label"),
    [("img", "labels"), ("pixel_values", "category"), ("picture", "target"), ("photo", "class"), ("Image", "Label")],
)
def test_columns_of_every_name(tmp_path, image, label):
    write(tmp_path / "train.parquet", [0, 1] * 4, image=image, label=label, names=["x", "y"])
    assert read_any(tmp_path).classes == ("x", "y") and read_any(tmp_path).notes == ()


def test_of_two_kinds_of_labels_the_fine_ones_are_taken_and_it_is_said(tmp_path):
    write(tmp_path / "train.parquet", [0, 1, 2, 3] * 3, label="fine_label", coarse_label=[0, 0, 1, 1] * 3)
    found = read_any(tmp_path)
    assert len(found.classes) == 4 and found.notes == ("the column 'fine_label' holds the labels, not 'coarse_label'",)
    assert found.train.columns["coarse_label"] == ["0", "0", "1", "1"] * 3


def test_what_is_no_label_or_image_is_refused_with_the_line_to_type(tmp_path):
    write(tmp_path / "a/train.parquet", [0, 1] * 4, label="species")
    assert "got image, species" in refusal(tmp_path / "a") and "rename_columns" in refusal(tmp_path / "a")
    write(tmp_path / "b/train.parquet", [0.5, 1.5] * 4)
    assert "must be integers or text, got double" in refusal(tmp_path / "b")
    write(tmp_path / "c/train.parquet", [0, 1] * 4, images=[[[1, 2], [3, 4]]] * 8)
    assert "bytes of image files, got list<" in refusal(tmp_path / "c")
    write(tmp_path / "d/train.parquet", [[0], [1]] * 4)
    assert "'label' must be integers or text" in refusal(tmp_path / "d")


def test_text_and_numbered_labels_keep_their_values_as_names(tmp_path):
    write(tmp_path / "a/train.parquet", ["owl", "cat", "owl", "dog"] * 2)
    write(tmp_path / "a/test.parquet", ["dog"])
    assert read_any(tmp_path / "a").classes == ("cat", "dog", "owl") and read_any(
        tmp_path / "a"
    ).test.labels.tolist() == [1]
    write(tmp_path / "b/train.parquet", ["10", "9", "2"] * 2)
    assert read_any(tmp_path / "b").classes == ("2", "9", "10")
    write(tmp_path / "c/train.parquet", list(range(1, 11)) * 2)
    found = read_any(tmp_path / "c")
    assert (
        found.classes == tuple(map(str, range(1, 11))) and found.train.labels.min() == 0 and "0 … 9" in found.notes[0]
    )
    write(tmp_path / "d/train.parquet", [0, 2_000_000_000] * 2)
    assert read_any(tmp_path / "d").classes == ("0", "2000000000")
    write(tmp_path / "e/train.parquet", pa.array(["b", "a"] * 4).dictionary_encode())
    assert read_any(tmp_path / "e").classes == ("a", "b")
    write(tmp_path / "f/train.parquet", ["y", "x"] * 4, names=["y", "x"])
    assert read_any(tmp_path / "f").classes == ("y", "x")


def test_a_split_without_labels_is_left_out(tmp_path):
    write(tmp_path / "train.parquet", [0, 1] * 10, names=["x", "y"])
    write(tmp_path / "validation.parquet", [0, 1] * 2, names=["x", "y"])
    write(tmp_path / "test.parquet", [-1] * 6, names=["x", "y"])
    splits = DATASETS.get("auto")(path=tmp_path).load(0)
    assert splits.origin == "val" and len(splits.test) == 4 and "all are -1" in splits.notes[0]
    write(tmp_path / "test.parquet", [-1, 0], names=["x", "y"])
    assert "got -1 in row 0" in refusal(tmp_path)


def test_images_as_bytes_and_beside_the_file(tmp_path):
    write(tmp_path / "a/train.parquet", [0, 1] * 4, images=[png(n) for n in range(8)])
    assert sizes(read_any(tmp_path / "a")) == (8, 0, 0)
    (tmp_path / "b/data/pictures").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png(9))
    rows = []
    for n in range(8):
        (tmp_path / f"b/data/pictures/{n}.png").write_bytes(png(n))
        rows.append({"bytes": None, "path": f"pictures/{n}.png"})
    path = write(tmp_path / "b/data/train.parquet", [0, 1] * 4, images=rows, scene=[f"s{n}" for n in range(8)])
    found = read_any(tmp_path / "b")
    assert found.train.images == [png(n) for n in range(8)] and found.skipped == ()
    assert found.train.columns["file"][3] == "pictures/3.png" and found.train.columns["scene"][3] == "s3"
    for outside in ("../../secret.png", str(tmp_path / "secret.png"), "gone.png"):
        write(path, [0, 1] * 4, images=[*rows[:7], {"bytes": None, "path": outside}])
        assert "row 7: the image has no bytes" in refusal(tmp_path / "b")


# -------------------------------------------------------------------------------------------------- streamed


def streamed(path, **keys):
    return ParquetStream(path=path, val_fraction=0.2, shuffle_buffer=64, decode_workers=1, **keys).load(0)


def test_streamed_splits_and_columns_are_those_of_memory(tmp_path):
    labels = np.random.RandomState(0).randint(0, 2, 40)
    files = {"plain/train-00000-of-00001": labels, "plain/valid-00000-of-00001": labels[:10], "plain/test": labels[:6]}
    for name, each in files.items():
        write(tmp_path / f"{name}.parquet", np.array(["no", "yes"])[each].tolist(), image="photo", label="category")
    (tmp_path / "README.md").write_text("card")
    splits, whole = streamed(tmp_path), DATASETS.get("auto")(path=tmp_path).load(0)
    assert splits.classes == whole.classes == ("no", "yes") and splits.origin == whole.origin == "test"
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [
        40,
        10,
        6,
    ] and splits.skipped == whole.skipped
    for name in ("val", "test"):
        assert (getattr(splits, name).images == getattr(whole, name).images).all()
    (tmp_path / "plain/test.parquet").unlink()
    splits = streamed(tmp_path)
    assert splits.origin == "val" and len(splits.test) == 10 and "no test split" in splits.notes[0]
    (tmp_path / "plain/valid-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match="got only train; add the others, or use --data.name parquet"):
        streamed(tmp_path)


def test_streamed_images_as_bytes_and_labels_from_one(tmp_path):
    for part, count in (("train", 30), ("test", 9)):
        labels = np.random.RandomState(0).permutation(np.arange(count) % 3) + 1
        write(tmp_path / f"{part}.parquet", labels.tolist(), images=[png(n) for n in range(count)])
    splits = streamed(tmp_path)
    assert splits.classes == ("1", "2", "3") and any("0 … 2" in note for note in splits.notes)
    assert sorted(splits.test.labels.tolist()) == [0] * 3 + [1] * 3 + [2] * 3
    assert splits.train.images[:].shape == (24, 3, 6, 6)


@pytest.mark.parametrize(("name", "expected"), [("eval", (8, 4, 0)), ("holdout", (8, 0, 4)), ("dev", (8, 4, 0))])
def test_other_names_of_held_out_splits(tmp_path, name, expected):
    write(tmp_path / "data/train-00000-of-00001.parquet", [0, 1] * 4)
    write(tmp_path / f"data/{name}-00000-of-00001.parquet", [0, 1] * 2)
    assert sizes(read_any(tmp_path)) == expected


def test_a_file_without_a_split_beside_train_alone_is_refused(tmp_path):
    write(tmp_path / "train.parquet", [0, 1] * 4)
    write(tmp_path / "unseen.parquet", [0, 1] * 2)
    with pytest.raises(UserError, match=r"unseen\.parquet: this name says no split.*rename it to .*test\.parquet"):
        read_any(tmp_path)
    write(tmp_path / "test.parquet", [0, 1] * 2)
    assert sizes(read_any(tmp_path)) == (8, 0, 4)


def test_labels_of_bytes_are_text_and_floats_are_told_how_to_become_integers(tmp_path):
    write(tmp_path / "a/train.parquet", [b"cat", "né".encode()] * 4)
    assert read_any(tmp_path / "a").classes == ("cat", "né")
    write(tmp_path / "b/train.parquet", [0.0, 1.0] * 4)
    with pytest.raises(UserError, match=r"got double; convert it, with pandas: .*astype\(int\)"):
        read_any(tmp_path / "b")


def test_a_test_split_without_labels_alone(tmp_path):
    write(tmp_path / "data/test-00000-of-00001.parquet", [-1] * 4)
    with pytest.raises(UserError, match="the test split has no labels .* fetch the train or validation split"):
        read_any(tmp_path)
