"""Folders of images: which files are read as which split and class, and what is said of all others."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import clead
from clead.data.datasets import DATASETS
from clead.data.datasets.auto import read_any
from clead.data.files import describe, files_below
from clead.errors import UserError


def picture(seed, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (6, 6, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write(root, *names, content=None):
    """Write a different image to each path."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = len([file for file in root.rglob("*") if file.is_file()])
        path.write_bytes(picture(seed) if content is None else content)


def classes_in(root, *folders, count=3):
    write(root, *(f"{folder}/{n}.png" for folder in folders for n in range(count)))
    return root


def sizes(found):
    return tuple(0 if part is None else len(part.labels) for part in (found.train, found.val, found.test))


def refusal(path, **keys):
    with pytest.raises(UserError) as caught:
        DATASETS.get("auto")(path=path).load(0, **keys)
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("above", ["", "images/", "archive v1/"])
@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", "validation", "Testing"),
        ("TRAIN", "valid", "TEST"),
        ("train", "dev", "test"),
        ("train", "Val", None),
        ("train", None, "test"),
        (None, "validation", None),
        (None, None, "testing"),
        ("training", None, None),
    ],
)
def test_splits_of_every_name_one_folder_down_too(tmp_path, above, train, val, test):
    for name, count in ((train, 5), (val, 3), (test, 2)):
        if name:
            classes_in(tmp_path, f"{above}{name}/cat", f"{above}{name}/dog", count=count)
    write(tmp_path, "README.md", content=b"about")
    found = read_any(tmp_path)
    assert sizes(found) == (10 if train else 0, 6 if val else 0, 4 if test else 0) and found.classes == ("cat", "dog")
    splits = DATASETS.get("auto")(path=tmp_path, val_fraction=0.3).load(0, training=bool(train))
    assert splits.origin == ("test" if test else "val" if val else "train")
    assert len(splits.test) == (4 if test else 6 if val else 2)
    assert splits.skipped == (f"{tmp_path / 'README.md'}: lies in no split folder",) or "no image" in splits.skipped[0]


def test_class_folders_without_splits_serve_whole_for_a_foreign_model(tmp_path):
    classes_in(tmp_path, "cat", "dog", "owl", count=10)
    write(tmp_path, "list.csv", content=b"a,b")
    evaluated = DATASETS.get("auto")(path=tmp_path).load(0, training=False)
    assert (len(evaluated.test), len(evaluated.train), evaluated.origin) == (30, 0, "all")
    assert any("no splits" in note for note in evaluated.notes) and len(evaluated.skipped) == 1
    trained = DATASETS.get("auto")(path=tmp_path).load(0)
    assert (len(trained.test), len(trained.train) + len(trained.val), trained.origin) == (6, 24, "train")
    assert evaluated.classes == trained.classes == ("cat", "dog", "owl")


def test_class_called_train_beside_others_is_a_class(tmp_path):
    classes_in(tmp_path, "car", "plane", "train")
    assert read_any(tmp_path).classes == ("car", "plane", "train") and read_any(tmp_path).unsplit


def test_numbered_classes_are_in_the_order_of_numbers_over_all_splits(tmp_path):
    classes_in(tmp_path, "train/10", "train/9", "val/0", "test/90")
    assert read_any(tmp_path).classes == ("0", "9", "10", "90")


def test_a_path_that_is_a_split_itself(tmp_path, monkeypatch):
    classes_in(
        tmp_path, "photos/train/cat", "photos/train/dog", "photos/train/owl", "photos/test/cat", "photos/val/owl"
    )
    message = refusal(tmp_path / "photos/train")
    assert str(tmp_path / "photos") in message and "train/train" not in message and "test, val" in message
    monkeypatch.chdir(tmp_path / "photos/train")
    assert f"--data.path {tmp_path / 'photos'}" in refusal(Path("."))
    for split, numbers in (("test", {0}), ("val", {2})):  # the classes are those of all splits
        splits = DATASETS.get("auto")(path=tmp_path / "photos" / split).load(0, training=False)
        assert set(splits.test.labels.tolist()) == numbers and splits.classes == ("cat", "dog", "owl")
        assert splits.origin == split
    classes_in(tmp_path, "alone/train/cat", "alone/train/dog")
    assert DATASETS.get("auto")(path=tmp_path / "alone/train").load(0).origin == "train"


def test_what_is_not_clear_is_asked(tmp_path):
    classes_in(tmp_path, "two/val/a", "two/valid/a", "two/train/a", "two/train/b")
    assert "val and valid both hold validation images" in refusal(tmp_path / "two")
    classes_in(tmp_path, "several/one/train/a", "several/one/train/b", "several/other/train/a")
    assert f"--data.path {tmp_path / 'several/one'}" in refusal(tmp_path / "several")
    classes_in(tmp_path, "flat/train", "flat/test")
    assert "test and train lie in no class folder" in refusal(tmp_path / "flat")
    classes_in(tmp_path, "half/train/a", "half/train/b", "half/test")
    splits = DATASETS.get("auto")(path=tmp_path / "half").load(0)
    assert len(splits.skipped) == 3 and "lies in no class folder" in splits.skipped[0] and splits.origin == "train"
    assert any("no image in test/ lies in a class folder" in note for note in splits.notes)


# ---------------------------------------------------------------------------------------------------- files


def test_every_ending_is_read_and_folders_at_any_depth(tmp_path):
    kinds = {"PNG": "png apng PNG", "JPEG": "jpg jpeg jpe jfif JPEG", "TIFF": "tif tiff", "GIF": "gif", "BMP": "bmp"}
    kinds |= {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jp2", "PPM": "ppm pnm"}
    count = 0
    for kind, endings in kinds.items():
        for ending in endings.split():
            write(
                tmp_path,
                f"test/{('cat', 'dog')[count % 2]}/{'deep/er/' * (count % 3)}{count}.{ending}",
                content=picture(count, kind),
            )
            count += 1
    write(tmp_path, "test/cat/0003", content=picture(99))  # without an ending
    splits = DATASETS.get("auto")(path=tmp_path).load(0, training=False)
    assert len(splits.test) == count + 1 and splits.skipped == ()


def test_every_file_that_is_not_read_is_named_with_the_reason(tmp_path):
    classes_in(tmp_path, "train/cat", "train/dog", "test/cat", "test/dog")
    not_images = {
        "train/cat/notes.txt": "no image",
        "train/cat/raw.heic": "no image",
        "train/cat/0.png.bak": "no image",
        "train/cat/.ipynb_checkpoints/0.png": "hidden folder",
        "train/dog/._1.png": "hidden",
        "train/cover.png": "no class folder",
        "test/LICENSE": "no image",
        "logo.png": "no split folder",
        "extra/cat/1.png": "no split folder",
        "train/dog/Thumbs.db": "operating system",
        "train/.DS_Store": "operating system",
        "__MACOSX/train/cat/._0.png": "hidden",
    }
    write(tmp_path, *not_images)
    (tmp_path / "test/LICENSE").write_text("words")
    os.mkfifo(tmp_path / "train/cat/pipe.png")
    (tmp_path / "train/cat/gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "train/cat/loop").symlink_to(tmp_path / "train", target_is_directory=True)
    not_images |= {
        "train/cat/pipe.png": "no regular file",
        "train/cat/gone.png": "leads nowhere",
        "train/cat/loop": "already",
    }
    found = read_any(tmp_path)
    assert sizes(found) == (6, 0, 6)
    said = dict(line.split(": ", 1) for line in found.skipped)
    assert set(said) == {str(tmp_path / name) for name in not_images}
    assert all(reason in said[str(tmp_path / name)] for name, reason in not_images.items())
    assert all("operating system" in line for line in found.skipped[-2:])


def test_linked_class_folders_are_read(tmp_path):
    classes_in(tmp_path, "a pool/cat", "a pool/dog", "photos/train/owl")
    for name in ("cat", "dog"):
        (tmp_path / "photos/train" / name).symlink_to(tmp_path / "a pool" / name, target_is_directory=True)
    assert sizes(read_any(tmp_path / "photos")) == (9, 0, 0)


def test_names_that_are_no_text_are_one_line(tmp_path):
    classes_in(tmp_path, "cat", "dog")
    (tmp_path / "cat" / "two\nlines.txt").write_text("x")
    with open(os.fsencode(tmp_path) + b"/dog/\xff.txt", "w") as file:
        file.write("x")
    skipped = read_any(tmp_path).skipped
    assert len(skipped) == 2 and all(line.isprintable() and line.encode() for line in skipped)


def test_an_empty_class_folder_is_said(tmp_path):
    classes_in(tmp_path, "train/cat", "train/dog", "test/cat")
    (tmp_path / "test/dog").mkdir()
    found = read_any(tmp_path)
    assert found.notes == ("1 class folders hold no test image: dog",) and found.classes == ("cat", "dog")
    (tmp_path / "train/owl").mkdir()
    assert "train/owl holds no image" in refusal(tmp_path)


def test_images_between_split_and_class(tmp_path):
    classes_in(tmp_path, "train/images/cat", "train/images/dog", "val/images/cat")
    assert read_any(tmp_path).classes == ("cat", "dog") and sizes(read_any(tmp_path)) == (6, 3, 0)


NAMES = st.sampled_from(["train", "val", "test", "cat", "dog", "images", ".hidden", "deep"])
FILES = st.sampled_from(["a.png", "b.JPG", "c.txt", ".d.png", "Thumbs.db", "e"])


@settings(max_examples=80, deadline=None)
@given(
    st.sets(st.tuples(st.lists(NAMES, max_size=4), FILES).map(lambda pair: "/".join([*pair[0], pair[1]])), max_size=12)
)
def test_every_file_is_read_once_or_named(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("tree")
    for n, name in enumerate(sorted(names)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"" if name.endswith("txt") else picture(n))
    try:
        found = read_any(root)
    except UserError as error:
        assert len(error.problems) == 1
        return
    parts = [part for part in (found.train, found.val, found.test) if part is not None]
    read = [name for part in parts for name in part.names]
    skipped = [line.split(": ")[0] for line in found.skipped]
    assert sorted(read + skipped) == sorted(str(root / name) for name in names)
    for part in parts:
        for name, label in zip(part.names, part.labels.tolist(), strict=True):
            assert found.classes[label] in Path(name).relative_to(root).parts


def test_a_tree_deeper_than_python_recurses_is_no_traceback(tmp_path):
    classes_in(tmp_path, "cat", "dog")
    deep = tmp_path / "cat"
    for _ in range(300):
        deep = deep / "d"
        deep.mkdir()
    (deep / "x.png").write_bytes(picture(0))
    assert "folders deep" in read_any(tmp_path).skipped[0]


# --------------------------------------------------------------------------------------------- unknown layouts


def test_what_is_not_known_is_described(tmp_path):
    folder = tmp_path / "data"
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()
    write(folder, "x.xyz", "y.xyz", content=b"\0")
    assert describe(folder) == "2 folders, 0 of them with images, 2 files *.xyz"
    message = refusal(folder)
    assert describe(folder) in message and "train/CLASS" in message
    classes_in(tmp_path, "five/1", "five/2", "five/3", count=1)
    (tmp_path / "five/4").mkdir()
    write(tmp_path, "five/annotations.txt", content=b"x")
    assert describe(tmp_path / "five") == "4 folders, 3 of them with images, a file annotations.txt"
    write(tmp_path, "flat/1.png", "flat/2.png")
    assert "no class folder" in refusal(tmp_path / "flat") and "2 files *.png" in refusal(tmp_path / "flat")


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("photos/cat/1.png", picture(0), ["one image", "--data.path {root}/photos"]),
        ("notes.txt", b"some words", ["a text file", "folder of the images"]),
        ("photos.rar", b"Rar!\x1a", ["photos.", "unpack it"]),
        ("photos.7z", b"7z\xbc\xaf", ["photos.", "unpack it"]),
        ("model.bin", bytes(range(256)), ["another kind"]),
    ],
)
def test_a_file_that_is_no_data_set(tmp_path, name, content, fragments):
    write(tmp_path, name, content=content)
    message = refusal(tmp_path / name)
    assert all(fragment.format(root=tmp_path) in message for fragment in fragments), message


@pytest.mark.parametrize(
    "path", [r"C:\Users\me\photos", "C:/Users/me/photos", r"\\server\share\photos", r"photos\train"]
)
def test_windows_paths(path):
    assert "Windows" in refusal(Path(path))


def test_an_empty_folder_and_no_file_at_all(tmp_path):
    assert "an empty folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "neither" in refusal(tmp_path / "pipe")
    assert list(files_below(tmp_path)) == [(tmp_path / "pipe", "is no regular file")]


def test_a_training_names_what_it_does_not_read(tmp_path, caplog, monkeypatch):
    """The first ten files when it begins, all of them in the run."""
    monkeypatch.chdir(tmp_path)
    classes_in(tmp_path, "photos/train/cat", "photos/train/dog", "photos/val/cat", "photos/val/dog", count=8)
    write(tmp_path, *(f"photos/train/cat/{n}.txt" for n in range(12)), content=b"words")
    overrides = ["--data.name", "auto", "--data.path", "photos", "--data.batch_size", "8", "--train.budget", "1"]
    overrides += [
        "--data.val_fraction",
        "0.25",
        "--model.name",
        "small_cnn",
        "--model.width",
        "2",
        "--model.features",
        "4",
    ]
    clead.train(clead.load_recipe("digits-standard", overrides), out="run")
    assert "12 files are not read: photos/train/cat/0.txt: is no image" in caplog.text
    assert "photos/train/cat/7.txt" in caplog.text and "photos/train/cat/8.txt" not in caplog.text
    assert "test images are those of the validation split" in caplog.text
    lines = (tmp_path / "run/skipped.txt").read_text().splitlines()
    assert len(lines) == 12 and lines[0] == "photos/train/cat/0.txt: is no image of a format that is read"


# --------------------------------------------------------------------------- names of splits as data sets have them


@pytest.mark.parametrize(
    ("train", "held", "expected"),
    [
        ("train_set", "test_set", (6, 0, 6)),
        ("seg_train/seg_train", "seg_test/seg_test", (6, 0, 6)),
        ("ILSVRC2012_img_train", "ILSVRC2012_img_val", (6, 6, 0)),
        ("Final_Training/Images", "Final_Test/Images", (6, 0, 6)),
        ("train2017", "val2017", (6, 6, 0)),
        ("TrainImages", "TestImages", (6, 0, 6)),
        ("trainval", "test", (6, 0, 6)),
        ("train", "eval", (6, 6, 0)),
        ("train", "held-out", (6, 0, 6)),
        ("Data/CLS-LOC/train", "Data/CLS-LOC/val", (6, 6, 0)),
    ],
)
def test_splits_under_other_names(tmp_path, train, held, expected):
    found = read_any(classes_in(tmp_path, *(f"{split}/{name}" for split in (train, held) for name in ("cat", "dog"))))
    assert sizes(found) == expected and found.classes == ("cat", "dog") and not found.unsplit and not found.skipped


def test_class_names_that_begin_as_splits_are_classes(tmp_path):
    found = read_any(classes_in(tmp_path, "train_station/inside", "test_tube/glass", "valley/green"))
    assert found.classes == ("test_tube", "train_station", "valley") and found.unsplit


@pytest.mark.parametrize("name", ["other", "unseen", "batch2", "fold1"])
def test_a_folder_of_the_same_classes_beside_train_alone_is_refused(tmp_path, name):
    classes_in(tmp_path, "train/cat", "train/dog", f"{name}/cat", f"{name}/dog")
    message = refusal(tmp_path, training=False)
    assert f"{tmp_path / name}: this name says no split" in message and f"rename it to {tmp_path / 'test'}" in message
    classes_in(tmp_path, "test/cat", "test/dog")  # now it is known what is measured
    assert DATASETS.get("auto")(path=tmp_path).load(0).origin == "test"


@pytest.mark.parametrize("above", ["2750", "101_ObjectCategories", "images", "food/images", "a/b/c"])
def test_one_folder_around_the_classes_is_stepped_into(tmp_path, above):
    (tmp_path / "README").write_text("about")
    found = read_any(classes_in(tmp_path, f"{above}/cat", f"{above}/dog"))
    assert found.classes == ("cat", "dog") and len(found.skipped) == 1 and "README" in found.skipped[0]


def test_images_in_one_folder_have_no_class(tmp_path):
    classes_in(tmp_path, "jpg")
    (tmp_path / "imagelabels.mat").write_bytes(b"MATLAB")
    message = refusal(tmp_path, training=False)
    assert "all images lie in one folder, jpg" in message and "instead of imagelabels.mat" in message
    assert "all images lie in one folder, 1 cat" in refusal(classes_in(tmp_path / "b", "1 cat"), training=False)
    alone = classes_in(tmp_path / "c", "test/cat")
    assert sizes(read_any(alone)) == (0, 0, 3)  # said to be of one class


def test_classes_above_splits_are_refused(tmp_path):
    classes_in(tmp_path, *(f"{name}/{split}" for name in ("cat", "dog") for split in ("train", "test")))
    message = refusal(tmp_path, training=False)
    assert f"{tmp_path / 'cat/test'} to {tmp_path / 'test/cat'}" in message


def test_folders_of_the_same_names_in_all_classes_are_said(tmp_path):
    found = read_any(classes_in(tmp_path, *(f"{area}/{name}" for area in ("art", "photo") for name in ("cat", "dog"))))
    assert found.classes == ("art", "photo")
    assert "which all hold folders of the same names (cat, dog)" in found.notes[0]


@pytest.mark.parametrize("name", ["train_test_split.txt", "meta/test.txt", "lists/val_list.txt", "TestSplit.lst"])
def test_a_list_of_a_split_is_not_passed_over(tmp_path, name):
    classes_in(tmp_path, "images/cat", "images/dog")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("cat/0\n")
    message = refusal(tmp_path, training=False)
    assert str(tmp_path / name) in message and "columns path,label,split" in message
    (tmp_path / name).rename(tmp_path / "images/classes.txt")
    assert len(read_any(tmp_path).train.labels) == 6


@pytest.mark.parametrize(
    ("train", "test", "pair"),
    [(("Cat", "Dog"), ("cat", "dog"), ("cat", "Cat")), (("0", "1"), ("00", "01"), ("00", "0"))],
)
@pytest.mark.parametrize("split", ["test", "val"])
def test_names_that_differ_in_writing_only(tmp_path, train, test, pair, split):
    classes_in(tmp_path, *(f"train/{name}" for name in train), *(f"{split}/{name}" for name in test))
    assert "{!r} and {!r} differ in writing only: rename one".format(*pair) in refusal(tmp_path)
    classes_in(tmp_path, *(f"test/{name}" for name in train))
    if split == "val":
        assert "validation images have class" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("train_32x32.mat", "scipy.io.loadmat"),
        ("train/data-00000-of-00001.arrow", "to_parquet('train.parquet')"),
        ("cat/0.tga", "save('NAME.png')"),
        ("cat/0.npy", "numpy.stack"),
        ("a/b.h5", "h5py.File"),
        ("training.pt", ".numpy()"),
    ],
)
def test_files_that_are_not_read_are_told_with_their_conversion(tmp_path, name, fragment):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"\0")
    assert fragment in refusal(tmp_path) and f"*{Path(name).suffix} is not read" in refusal(tmp_path)
    if "/" not in name:
        assert fragment in refusal(tmp_path / name)
