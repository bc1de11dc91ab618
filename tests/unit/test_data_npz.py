"""Arrays as people save them: other names of keys, bytes as class names, labels from 1, ranges and shapes that mislead."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from clead.data.datasets import DATASETS
from clead.data.datasets.auto import read_any
from clead.data.datasets.npz import key_of
from clead.errors import UserError
from layouts import labels_of, medmnist, medmnist_arrays, noise, npy, npz_pair, save_npy


def save(tmp_path, **arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    return tmp_path / "a.npz"


def refused(path, *fragments):
    with pytest.raises(UserError) as caught:
        read_any(path)
    assert len(caught.value.problems) == 1
    for fragment in fragments:
        assert fragment in str(caught.value)


PAIRS = [
    ("x_train", "y_train", "x_test", "y_test"),
    ("X_train", "Y_train", "X_test", "Y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("images_train", "labels_train", "images_test", "labels_test"),
    ("train_x", "train_y", "test_x", "test_y"),
    ("train-data", "train-targets", "test-data", "test-targets"),
    ("training_imgs", "training_label", "test_imgs", "test_label"),
]


@pytest.mark.parametrize("keys", PAIRS)
def test_names_of_keys_agree(keys, tmp_path):
    arrays = noise(12, 8, 8, 3), labels_of(12, 3), noise(6, 8, 8, 3, seed=1), labels_of(6, 3)
    found = read_any(save(tmp_path, **dict(zip(keys, arrays, strict=True)), embedding=np.ones(3)))
    assert np.array_equal(found.train.images.numpy(), arrays[0].transpose(0, 3, 1, 2))
    assert np.array_equal(found.test.labels.numpy(), arrays[3]) and found.classes == ("0", "1", "2")
    assert found.skipped == (f"{tmp_path / 'a.npz'}: embedding: neither images nor labels by its name",)


@pytest.mark.parametrize(
    "keys", [("x", "y"), ("images", "labels"), ("data", "targets"), ("X", "Y"), ("x_test", "y_test")]
)
def test_a_pair_alone_is_to_be_evaluated_on(keys, tmp_path):
    found = read_any(save(tmp_path, **dict(zip(keys, (noise(6, 8, 8), labels_of(6, 3)), strict=True))))
    assert len(found.train.labels) == 0 and len(found.test.labels) == 6


def test_training_arrays_alone(tmp_path):
    path = save(tmp_path, x_train=noise(30, 8, 8), y_train=labels_of(30, 3))
    assert DATASETS.get("auto")(path=path).load(0).origin == "train"
    path = save(
        tmp_path, x_train=noise(30, 8, 8), y_train=labels_of(30, 3), x_val=noise(9, 8, 8), y_val=labels_of(9, 3)
    )
    splits = DATASETS.get("auto")(path=path).load(0)
    assert splits.origin == "val" and len(splits.test) == 9


@pytest.mark.parametrize(
    "name", ["x", "y", "images", "label", "train", "x_train_2", "x_y", "train_test_x", "", "x_train_test"]
)
def test_other_names_are_no_key(name):
    assert key_of(name) in (None, ("", "images"), ("", "labels")) and (name in ("x", "y", "images", "label")) == bool(
        key_of(name)
    )


def test_bytes_are_names_and_labels_from_one_are_counted_from_there(tmp_path):
    found = read_any(npz_pair(tmp_path))
    assert found.classes == ("cat", "dog", "é") and found.test.labels.tolist() == [0, 1, 2] * 2
    assert found.notes == ("labels begin at 1, so label 1 is the first class, 'cat'",)


@pytest.mark.parametrize(
    ("labels", "classes", "names", "numbered"),
    [
        ([1, 2, 3, 1], None, ("1", "2", "3"), [0, 1, 2, 0]),  # as SVHN's
        ([10, 1, 2, 10], None, ("1", "2", "10"), [2, 0, 1, 2]),
        ([0, 90, 180, 270], None, ("0", "90", "180", "270"), [0, 1, 2, 3]),
        (["dog", "cat", "dog", "cat"], None, ("cat", "dog"), [1, 0, 1, 0]),
        ([b"dog", b"cat", b"dog", b"cat"], None, ("cat", "dog"), [1, 0, 1, 0]),
        (["10", "9", "0", "9"], None, ("0", "9", "10"), [2, 1, 0, 1]),
        (["dog", "cat", "dog", "cat"], ["dog", "cat"], ("dog", "cat"), [0, 1, 0, 1]),
        ([0, 1, 1, 0], [b"b", b"a"], ("b", "a"), [0, 1, 1, 0]),
        ([1, 2, 1, 2], ["b", "a", "c"], ("b", "a", "c"), [1, 2, 1, 2]),
        ([True, False, True, False], None, ("0", "1"), [1, 0, 1, 0]),
        ([0, 1, 0, 1], [3, 5], ("3", "5"), [0, 1, 0, 1]),
    ],
)
def test_which_number_a_class_has(labels, classes, names, numbered, tmp_path):
    extra = {} if classes is None else {"classes": np.array(classes)}
    found = read_any(save(tmp_path, x=noise(4, 8, 8), y=np.array(labels), **extra))
    assert (found.classes, found.test.labels.tolist()) == (names, numbered)
    assert found.ordered == (classes is not None or not isinstance(labels[0], (str, bytes)))


def test_labels_of_all_splits_are_numbered_together(tmp_path):
    path = save(
        *[tmp_path],
        **{
            "x_train": noise(4, 8, 8),
            "y_train": np.array([2, 3, 2, 3]),
            "x_test": noise(2, 8, 8),
            "y_test": np.array([1, 1]),
        },
    )
    found = read_any(path)
    assert (
        found.classes == ("1", "2", "3")
        and found.train.labels.tolist() == [1, 2, 1, 2]
        and found.test.labels.tolist() == [0, 0]
    )


def test_medmnist(tmp_path):
    arrays = medmnist_arrays(28, 28, 3)
    found = read_any(medmnist(tmp_path))
    for part, name in ((found.train, "train"), (found.val, "val"), (found.test, "test")):
        assert np.array_equal(part.images.numpy(), arrays[f"{name}_images"].transpose(0, 3, 1, 2))
        assert part.labels.tolist() == arrays[f"{name}_labels"][:, 0].tolist()


def test_one_file_each(tmp_path):
    npy(tmp_path)
    save_npy(tmp_path / "other.npy", noise(3))
    found = DATASETS.get("npz")(path=tmp_path).read()
    assert np.array_equal(found.train.images[:, 0].numpy(), noise(12, 8, 8))
    assert found.skipped == (f"{tmp_path}: other.npy: neither images nor labels by its name",)
    (tmp_path / "y_test.npy").unlink()
    refused(tmp_path, "lacks y_test; it holds x_test, x_train, y_train, other.npy")


@pytest.mark.parametrize(
    ("images", "fragments"),
    [
        (np.full((4, 8, 8), 255.0), ("from 255 to 255", "x / 255")),
        (
            np.linspace(0, 200, 256).reshape(4, 8, 8),
            ("from 0 to 200", "x / 255, or save x.round().astype(numpy.uint8)"),
        ),
        (np.linspace(-1, 1, 256).reshape(4, 8, 8), ("from -1 to 1", "(x + 1) / 2")),
        (np.linspace(-2.1, 2.6, 256).reshape(4, 8, 8), ("from -2.1 to 2.6", "x * std + mean")),
        (np.full((4, 8, 8), np.nan), ("numpy.nan_to_num",)),
        (np.full((4, 8, 8), np.inf), ("from inf to inf", "x * std + mean")),
        (noise(4, 8, 8).astype(np.int64), ("got int64", ".astype(numpy.uint8)")),
        (noise(4, 8, 8).astype(np.uint16) * 16, ("got uint16", "* 255).round().astype(numpy.uint8), if", "is white")),
        (noise(4, 8, 8) > 9, ("got bool", ".astype(numpy.uint8) * 255")),
        (np.array([["a"] * 8] * 4)[:, :, None], ("got <U1",)),
        (noise(4, 8, 8, 4), ("drop the alpha channel: x[..., :3]",)),
        (noise(4, 4, 8, 8), ("drop the alpha channel: x[:, :3]",)),
        (noise(4, 28, 28, 28), ("these are volumes",)),
        (noise(4, 8, 8, 8, 1), ("these are volumes",)),
        (noise(4, 3072), ("x.reshape(-1, 3, 32, 32)",)),
        (noise(4, 784), ("x.reshape(-1, 1, 28, 28)",)),
        (noise(4, 64), ("x.reshape(-1, 1, 8, 8)",)),
        (noise(4, 3, 8, 3), ("no doubt which axis", "x.transpose(0, 2, 3, 1)")),
        (noise(4), ("reshape it",)),
    ],
)
def test_images_that_leave_a_doubt_are_refused_with_the_line_to_type(images, fragments, tmp_path):
    refused(save(tmp_path, x=images, y=labels_of(4, 2)), ": x ", *fragments)


@pytest.mark.parametrize(
    ("labels", "fragments"),
    [
        (np.eye(4), ("one-hot", ".argmax(1)")),
        (np.eye(4, dtype=np.uint8)[:, :2] * 0, ("2 labels for each image make it a multi-label set", "labels[:, 0]")),
        (np.ones((4, 14)), ("14 labels",)),
        (np.zeros(4), ("got float64 (4,)", ".astype(int)")),
        (np.array([1, 2, 3, -1]), ("-1 in row 3",)),
        (np.array([2**63] * 4, dtype=np.uint64), ("labels must be in",)),
        (np.arange(5), ("must be 4 integers or texts, one per image, got int64 (5,)",)),
        (np.array(3), ("got int64 ()",)),
    ],
)
def test_labels_that_are_none_are_refused(labels, fragments, tmp_path):
    path = save(tmp_path, x=noise(4, 8, 8), y=labels)
    with pytest.raises(UserError) as caught:
        DATASETS.get("auto")(path=path).load(0, training=False)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_names_that_are_none_are_refused(tmp_path):
    arrays = {"x": noise(4, 8, 8), "y": np.array(["a", "b", "a", "c"])}
    refused(save(tmp_path, **arrays, classes=np.array(["a", "b"])), "the label 'c' is none of the classes a, b")
    refused(save(tmp_path, **arrays, classes=np.array([0.5])), "must be texts, got float64")


@pytest.mark.parametrize(
    ("arrays", "fragments"),
    [
        ({"x_train": noise(4, 8, 8)}, ("lacks y_train", "it holds x_train")),
        ({"train_images": noise(4, 8, 8)}, ("lacks train_labels",)),
        ({"y": labels_of(4, 2)}, ("lacks the images of y",)),
        (
            {"arr_0": noise(4, 8, 8), "arr_1": labels_of(4, 2)},
            ("it holds arr_0, arr_1; rename its keys", "train_images"),
        ),
        ({"x": noise(4, 8, 8), "images": noise(4, 8, 8), "y": labels_of(4, 2)}, ("x and images are both",)),
        ({"x_val": noise(4, 8, 8), "valid_x": noise(4, 8, 8)}, ("are both val images",)),
    ],
)
def test_missing_and_double_arrays_are_named(arrays, fragments, tmp_path):
    refused(save(tmp_path, **arrays), *fragments)


def test_nearly_black_images_are_said(tmp_path):
    found = read_any(save(tmp_path, x=noise(4, 8, 8) // 128, y=labels_of(4, 2)))
    assert "the largest value is 1 of 255" in found.notes[0] and "x * 255" in found.notes[0]


def test_objects_are_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    np.savez(tmp_path / "a.npz", x=np.array([Evil()], dtype=object), y=labels_of(1, 1))
    refused(tmp_path / "a.npz", "holds Python objects (object)", "numpy.stack(images).astype(numpy.uint8)")
    assert not (tmp_path / "ran").exists()


def member(header, content=b"", method=zipfile.ZIP_STORED):
    """A .npz file whose x says ``header``."""
    buffer = io.BytesIO()
    text = header.encode().ljust(118) + b"\n"
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content)
        labels = io.BytesIO()
        np.save(labels, labels_of(4, 2))
        archive.writestr("y.npy", labels.getvalue())
    return buffer.getvalue()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 8, 8)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-4, 8, 8)}",
        "{'descr': '|S1000000000', 'fortran_order': False, 'shape': (4,)}",
        "{'descr': '|S0', 'fortran_order': False, 'shape': (99999999999,)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (4,)}",
        "{'descr': [('a', '|u1', (9999999, 9999))], 'fortran_order': False, 'shape': (4,)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (4, 8, 8)",
        "__import__('os').system('true')",
        "(" * 100,
    ],
)
def test_headers_that_lie_cost_no_memory(header, tmp_path):
    (tmp_path / "a.npz").write_bytes(member(header, bytes(256)))
    tracemalloc.start()
    refused(tmp_path / "a.npz", "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packing_of_another_kind_is_refused(method, tmp_path):
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (4, 8, 8)}"
    (tmp_path / "a.npz").write_bytes(member(header, bytes(256), method))
    refused(tmp_path / "a.npz", "packed in a way that NumPy does not write")
