"""Tables of paths and labels: CSV, TSV, JSON lines, JSON."""

import json
import os

import numpy as np
import pytest

from clead.data.datasets import DATASETS
from clead.data.datasets.auto import read_any
from clead.errors import UserError
from layouts import encoded, imagefolder_metadata, kaggle, noise, pictures, table, write


def refused(path, *fragments):
    with pytest.raises(UserError) as caught:
        read_any(path)
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def labelled(part, classes):
    """File name -> class name."""
    return {
        name.rsplit("/", 1)[1].split(".")[0]: classes[label]
        for name, label in zip(part.names, part.labels, strict=True)
    }


CATS = {f"p{k}": ("cat", "dog")[k % 2] for k in range(8)}


def test_kaggle_folder_or_file(tmp_path):
    kaggle(tmp_path)
    for path in (tmp_path, tmp_path / "train.csv"):
        found = read_any(path)
        assert labelled(found.train, found.classes) == CATS
        assert found.train.images[3] == encoded(noise(8, 8, 3, seed=3))
        assert not any("train/CLASS" in note for note in found.notes)
    assert read_any(tmp_path).skipped == (
        f"{tmp_path / 'test.csv'}: a table without labels",
        *(f"{tmp_path / 'test' / name}.png: is in no row of a table" for name in ("p8", "p9")),
    )
    splits = DATASETS.get("auto")(path=tmp_path, val_fraction=0.3).load(0)
    assert splits.origin == "train" and len(splits.test) == 2


HEADERS = [
    ("path", "label"),
    ("file", "class"),
    ("filename", "category"),
    ("Image", "Label"),
    ("Image Path", "Class Name"),
    ("image_id", "target"),
    ("file_name", "breed"),
]


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("form", ["", ".png", "images/"])
def test_columns_delimiters_and_forms_of_paths(header, delimiter, form, tmp_path):
    names = pictures(tmp_path / "images", 8)
    rows = [delimiter.join([form + name if form.endswith("/") else name + form, CATS[name]]) for name in names]
    text = "\ufeff" + "\r\n".join([delimiter.join(header), *rows, "", ""])
    for file in ("labels.csv", *(["labels.tsv"] if delimiter == "\t" else [])):
        found = read_any(write(tmp_path / file, text))
        assert labelled(found.train, found.classes) == CATS and found.unsplit
        assert labelled(read_any(tmp_path).train, found.classes) == CATS
        (tmp_path / file).unlink()


@pytest.mark.parametrize("kind", ["lines", "list", "map"])
def test_json(kind, tmp_path):
    rows = [
        {"image": f"{name}.png", "label": CATS[name], "age": k}
        for k, name in enumerate(pictures(tmp_path / "images", 8))
    ]
    if kind == "lines":
        path = write(tmp_path / "train.jsonl", "\n".join(map(json.dumps, rows)))
    else:
        path = write(
            tmp_path / "a.json", json.dumps(rows if kind == "list" else {row["image"]: row["label"] for row in rows})
        )
    found = read_any(path)
    assert labelled(found.train, found.classes) == CATS
    assert kind == "map" or found.train.columns == {"age": [str(k) for k in range(8)]}


def test_splits_and_other_columns(tmp_path):
    for path in (table(tmp_path), tmp_path):
        found = read_any(path)
        assert (len(found.train.labels), len(found.val.labels), len(found.test.labels)) == (4, 2, 2)
        assert (
            found.train.columns == {"hospital": ["0", "1", "2", "0"]} and found.classes == ("0", "1") and found.ordered
        )
    rows = [f"images/p{k % 8}.png;{k % 2};test;{k % 4 // 2}" for k in range(8)]
    path = write(tmp_path / "labels.csv", "\n".join(["path;label;split;hospital", *rows]))
    splits = DATASETS.get("auto")(path=path, only="hospital=1").load(0, training=False)
    assert splits.origin == "test" and len(splits.test) == 4


def test_splits_of_folders_and_of_paths(tmp_path):
    imagefolder_metadata(tmp_path)
    found = read_any(tmp_path)
    assert labelled(found.train, found.classes) == {f"p{k}": ("cat", "dog")[k % 2] for k in range(4)}
    assert labelled(found.test, found.classes) == {f"p{k}": ("cat", "dog")[k % 2] for k in range(4, 8)}
    for part in ("train", "test"):
        (tmp_path / part / "metadata.jsonl").unlink()
    rows = [f"{'train' if k < 4 else 'test'}/p{k}.png,{k % 2 + 1}" for k in range(8)]
    write(tmp_path / "metadata.csv", "\n".join(["file_name,label", *rows]))
    found = read_any(tmp_path)
    assert (len(found.train.labels), len(found.test.labels), found.classes) == (4, 4, ("1", "2"))
    assert any("numbered" in note for note in found.notes)


def test_train_val_and_test_csv(tmp_path):
    for split, first in (("train", 0), ("valid", 4), ("test", 6)):
        names = pictures(tmp_path / split, 2, first=first)
        write(
            tmp_path / f"{split}.csv", "\n".join(["image,class", *[f"{name}.png,{k}" for k, name in enumerate(names)]])
        )
    write(tmp_path / "labels.csv", "image,class\ntrain/p0.png,7\n")
    found = read_any(tmp_path)
    assert [len(part.labels) for part in (found.train, found.val, found.test)] == [2, 2, 2]
    assert found.skipped == (f"{tmp_path / 'labels.csv'}: a table beside test.csv",)
    alone = read_any(tmp_path / "test.csv")
    assert alone.unsplit and len(alone.train.labels) == 2


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        (["1", "2", "10", "2"], ("1", "2", "10"), [0, 1, 2, 1]),
        (["0", "1", "0", "1"], ("0", "1"), [0, 1, 0, 1]),
        (["1.0", "2.0", "1.0", "2.0"], ("1", "2"), [0, 1, 0, 1]),
        (["b", "a", "b", "a"], ("a", "b"), [1, 0, 1, 0]),
        (["01", "x", "01", "x"], ("01", "x"), [0, 1, 0, 1]),
        (["=1+1", "no", "=1+1", "no"], ("=1+1", "no"), [0, 1, 0, 1]),
    ],
)
def test_which_number_a_class_has(labels, classes, numbers, tmp_path):
    names = pictures(tmp_path, 4)
    rows = [f"{name}.png,{label}" for name, label in zip(names, labels, strict=True)]
    found = read_any(write(tmp_path / "a.csv", "\n".join(["path,label", *rows])))
    assert found.classes == classes and found.train.labels.tolist() == numbers


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_encodings(encoding, tmp_path):
    write(tmp_path / "é.png", encoded(noise(8, 8, 3)))
    path = write(tmp_path / "a.csv", "path,label\né.png,café\n".encode(encoding))
    found = read_any(path)
    assert found.classes == ("café",)
    assert any("Latin-1" in note for note in found.notes) == (encoding == "latin-1")


def test_repeated_rows_count_once_and_are_said(tmp_path):
    pictures(tmp_path, 3)
    text = "path,label\np0.png,a\np1.png,b\np0.png,a\np0.png,a\np2.png,b\n"
    found = read_any(write(tmp_path / "a.csv", text))
    assert found.train.labels.tolist() == [0, 1, 1] and any(
        "2 rows" in note and "count once" in note for note in found.notes
    )
    refused(write(tmp_path / "a.csv", text + "p1.png,a\n"), "p1.png has the labels 'b' and 'a'", "multi-label")


@pytest.mark.parametrize(
    ("name", "text", "fragments"),
    [
        ("a.csv", "", ("is empty", "path,label")),
        ("a.csv", "\n\n", ("is empty",)),
        (
            "a.csv",
            "p0.png,cat\np1.png,dog\n",
            ("a column of paths", "got p0.png, cat", "begin the file with a line of column names: path,label"),
        ),
        (
            "a.csv",
            "path,breadth\np0.png,3\n",
            ("a column of labels (such as label), got path, breadth; rename a column",),
        ),
        ("a.csv", "path,label\np0.png,cat\np1.png,dog,x\n", ("line 3 must have 2 values as the first line, got 3",)),
        ("a.csv", "path,label\np0.png\n", ("line 2 must have 2 values", "got 1")),
        ("a.csv", "path,label\np0.png,\np1.png,dog\np2.png,\n", ("2 rows have no label, the first in line 2",)),
        (
            "a.csv",
            "path,label\np0.png,a\nq.png,b\nr.png,b\n",
            ("2 of 3 images are missing, such as 'q.png'", "images: put them there"),
        ),
        ("a.csv", 'path,label\n"p0.png,a\n', ("a.csv line", "mend the line")),
        ("a.csv", "path,label\np0.png,a\0b\n", ("a.csv",)),
        ("a.csv", "path,label\n" + "x" * 200_000 + ",a\n", ("field larger than field limit",)),
        (
            "a.csv",
            "path,label,split\np0.png,a,train\np1.png,a,extra\n",
            ("must name train, val or test, got 'extra' in 1 rows",),
        ),
        ("a.jsonl", '{"path": "p0.png", "label": "a"}\n{"path": "p1.png", \n', ("line 2: not JSON",)),
        ("a.jsonl", '{"path": "p0.png", "label": "a"}\n["p1.png"]\n', ("line 2 must be an object",)),
        (
            "a.jsonl",
            '{"path": "p0.png", "label": ["a", "b"]}\n',
            ("line 1: a list of labels makes it a multi-label set",),
        ),
        ("a.jsonl", '{"path": "p0.png"}\n', ("a column of labels",)),
        ("a.jsonl", "", ("is empty",)),
        ("a.json", "[" * 100_000, ("not JSON",)),
        ("a.json", '{"path": ["p0.png"], "label": ["a"]}', ("must be a list of objects",)),
        ("a.json", "3", ("must be a list of objects",)),
        ("a.json", '{"images": [], "annotations": []}', ("COCO's format",)),
        ("a.json", "[]", ("is empty",)),
    ],
)
def test_damaged_tables_are_refused_with_the_line(name, text, fragments, tmp_path):
    pictures(tmp_path, 3)
    refused(write(tmp_path / name, text), name, *fragments)


@pytest.mark.parametrize(
    "name",
    ["../p0.png", "images/../../p0.png", "/etc/passwd", "~/p0.png", "C:\\p0.png", "..\\p0.png", "\\\\host\\p0.png"],
)
def test_paths_that_leave_the_folder_are_refused(name, tmp_path):
    pictures(tmp_path, 1)
    path = write(tmp_path / "set/a.csv", f"path,label\n{name},a\n")
    refused(path, "1 of 1 paths lead out of its folder", "make them relative")


def test_links_that_leave_the_folder_are_refused(tmp_path):
    pictures(tmp_path / "secret", 1)
    pictures(tmp_path / "set/images", 1)
    os.symlink(tmp_path / "secret/p0.png", tmp_path / "set/link.png")
    os.symlink(tmp_path / "secret", tmp_path / "set/folder")
    os.symlink("images/p0.png", tmp_path / "set/inside.png")
    for name in ("link.png", "folder/p0.png"):
        refused(write(tmp_path / "set/a.csv", f"path,label\n{name},a\n"), "is a link that leads out of")
    assert len(read_any(write(tmp_path / "set/a.csv", "path,label\ninside.png,a\n")).train.labels) == 1


def test_what_is_no_regular_file_is_missing(tmp_path):
    os.mkfifo(tmp_path / "p0.png")
    refused(write(tmp_path / "a.csv", "path,label\np0.png,a\n"), "1 of 1 images are missing")


def test_windows_separators_are_understood(tmp_path):
    pictures(tmp_path / "images", 2)
    found = read_any(write(tmp_path / "a.csv", "path,label\nimages\\p0.png,a\nimages\\p1.png,b\n"))
    assert len(found.train.labels) == 2


def test_a_fold_is_a_value(tmp_path):
    pictures(tmp_path, 2)
    found = read_any(write(tmp_path / "a.csv", "path,label,fold\np0.png,a,0\np1.png,b,1\n"))
    assert found.train.columns == {"fold": ["0", "1"]} and "names no splits (0, 1)" in found.notes[0]


def test_a_table_that_is_no_list_of_images_leaves_the_folders(tmp_path):
    for name in ("cat", "dog"):
        pictures(tmp_path / "train" / name, 2)
    write(tmp_path / "labels.csv", "id,label\n0,cat\n1,dog\n")
    write(tmp_path / "train/metadata.jsonl", '{"file_name": "cat/p0.png", "text": "a cat"}\n')
    found = read_any(tmp_path)
    assert found.classes == ("cat", "dog") and len(found.train.labels) == 4


def test_several_tables_for_all_are_refused(tmp_path):
    pictures(tmp_path, 2)
    for name in ("labels.csv", "metadata.jsonl"):
        row = "path,label\np0.png,a\n" if name.endswith("csv") else '{"path": "p1.png", "label": "b"}'
        write(tmp_path / name, row)
    refused(tmp_path, "holds several tables (labels.csv, metadata.jsonl); give one of them: --data.path")


def test_a_large_table_is_read_in_order(tmp_path):
    pictures(tmp_path / "images", 30)
    order = np.random.default_rng(0).permutation(30)
    rows = [f"p{k},class {k % 3},{'w' * 3000}" for k in order]
    write(tmp_path / "labels.csv", "\n".join(["id,label,text", *rows]))
    found = read_any(tmp_path)
    assert found.train.labels.tolist() == [k % 3 for k in order]


@pytest.mark.parametrize("label_first", [True, False])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_columns_of_pixels_are_refused_with_the_line_that_converts_them(label_first, suffix, tmp_path, monkeypatch):
    images, labels = noise(6, 8, 8), np.arange(6) % 2
    pixels = images.reshape(6, 64)
    rows = np.column_stack([labels, pixels] if label_first else [pixels, labels])
    names = [f"pixel{k}" for k in range(64)]
    names = ["label", *names] if label_first else [*names, "label"]
    if suffix == "csv":
        path = write(tmp_path / "mnist.csv", "\n".join([",".join(names), *(",".join(map(str, row)) for row in rows)]))
    else:
        path = write(
            tmp_path / "mnist.jsonl", "\n".join(json.dumps(dict(zip(names, row.tolist(), strict=True))) for row in rows)
        )
    refused(path, "64 columns of pixel values", "numpy.loadtxt(", "numpy.savez(")
    if suffix == "csv":
        with pytest.raises(UserError) as caught:
            read_any(path)
        monkeypatch.chdir(tmp_path)
        exec(str(caught.value).split("convert it in Python: ")[1], {"numpy": np})
        found = read_any(tmp_path / "images.npz")
        assert (
            np.array_equal(found.train.images[:, 0].numpy(), images) and found.train.labels.tolist() == labels.tolist()
        )


@pytest.mark.parametrize("name", ["meta.csv", "HAM10000_metadata.csv", "list.tsv", "rows.jsonl"])
def test_a_table_of_any_name_is_read_where_no_folders_say_the_classes(tmp_path, name):
    names = pictures(tmp_path / "images", 8)
    rows = [
        {"path": f"images/{each}", "label": CATS[each], "split": ("train", "holdout")[k // 4]}
        for k, each in enumerate(names)
    ]
    if name.endswith("jsonl"):
        text = "\n".join(map(json.dumps, rows))
    else:
        text = "\n".join(
            ("\t" if name.endswith("tsv") else ",").join(row) for row in [rows[0].keys(), *(r.values() for r in rows)]
        )
    write(tmp_path / name, text)
    found = read_any(tmp_path)
    assert len(found.train.labels) == len(found.test.labels) == 4
    assert labelled(found.train, found.classes).items() <= CATS.items()
    folders = tmp_path / "folders"
    for each in ("cat", "dog"):
        pictures(folders / each, 2)
    write(folders / name, (tmp_path / name).read_text())
    assert len(read_any(folders).train.labels) == 4 and read_any(folders).unsplit


def test_labels_in_train_and_images_that_are_in_no_row(tmp_path):
    names = [each.split(".")[0] for each in pictures(tmp_path / "train", 8)]
    pictures(tmp_path / "test", 2)
    write(tmp_path / "labels.csv", "id,breed\n" + "".join(f"{each},{CATS[each]}\n" for each in names))
    found = read_any(tmp_path)
    assert len(found.train.labels) == 8 and labelled(found.train, found.classes) == CATS
    assert [line.split(": ")[1] for line in found.skipped] == ["is in no row of a table"] * 2


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("image,cat,dog\np0.png,1,0\np1.png,0,1\n", "d['label'] = d.iloc[:, 1:].idxmax(axis=1)"),
        ("path,label\n/home/u/p0.png,a\n/home/u/p1.png,b\n", "2 of 2 paths lead out of its folder"),
        ("path,label\np0.png,1\np1.png,nan\n", "1 rows have no label, the first in line 3"),
        ("path,label\np0.png,1\np1.png,None\n", "1 rows have no label, the first in line 3"),
        ("emotion,pixels,Usage\n0,1 2 3 4,Training\n", "numpy.array(row.split(), 'uint8')"),
        ("path,label\np0.png,a\np1.png,b,c\n", "line 3 must have 2 values"),
    ],
)
def test_the_one_table_of_a_folder_says_what_is_amiss(tmp_path, text, fragment):
    pictures(tmp_path, 2)
    write(tmp_path / "anything.csv", text)
    refused(tmp_path, fragment)


def test_an_identifier_that_begins_as_a_split_is_no_folder(tmp_path):
    for k in range(4):
        write(tmp_path / f"images/train_{k}.png", encoded(noise(8, 8, 3, seed=k)))
    write(tmp_path / "labels.csv", "id,label\n" + "".join(f"train_{k},{'ab'[k % 2]}\n" for k in range(4)))
    assert read_any(tmp_path).unsplit
