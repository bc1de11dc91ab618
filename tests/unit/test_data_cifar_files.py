"""CIFAR as it lies unpacked: binary records, and the pickles of the Python version, which are not unpickled."""

import pickle

import numpy as np
import pytest

from clead.data.datasets import DATASETS, cifar_files
from clead.data.datasets.auto import read_any
from clead.errors import UserError
from layouts import HUNDRED, TEN, cifar10_binary, cifar10_python, cifar100_binary, cifar100_python, noise, write

BUILD = {
    ("cifar10", "bin"): cifar10_binary,
    ("cifar10", "py"): cifar10_python,
    ("cifar100", "bin"): cifar100_binary,
    ("cifar100", "py"): cifar100_python,
}
FOLDERS = {
    ("cifar10", "bin"): "cifar-10-batches-bin",
    ("cifar10", "py"): "cifar-10-batches-py",
    ("cifar100", "bin"): "cifar-100-binary",
    ("cifar100", "py"): "cifar-100-python",
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("which", BUILD)
def test_images_and_fine_labels_are_those_of_the_files(which, inside, tmp_path):
    BUILD[which](tmp_path)
    name, kind = which
    found = read_any(tmp_path / FOLDERS[which] if inside else tmp_path)
    counts = [10] * 5 if name == "cifar10" else [200]
    pixels = np.concatenate([noise(count, 3072, seed=seed) for seed, count in enumerate(counts)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(found.train.images.numpy(), pixels)
    test = noise(20 if name == "cifar10" else 100, 3072, seed=len(counts)).reshape(-1, 3, 32, 32)
    assert np.array_equal(found.test.images.numpy(), test)
    classes = 10 if name == "cifar10" else 100
    assert found.train.labels.tolist() == [k % classes for count in counts for k in range(count)]
    assert found.classes == (TEN if name == "cifar10" else HUNDRED) and found.ordered and not found.notes
    assert len(DATASETS.get(name)(path=tmp_path, val_fraction=0.5).load(0).test) == len(test)


@pytest.mark.parametrize("which", BUILD)
def test_test_images_alone_are_to_be_evaluated_on(which, tmp_path):
    BUILD[which](tmp_path)
    for file in (tmp_path / FOLDERS[which]).iterdir():
        if file.name.startswith(("data_batch", "train")):
            file.unlink()
    found = read_any(tmp_path)
    assert len(found.train.labels) == 0 < len(found.test.labels)
    assert len(DATASETS.get("auto")(path=tmp_path).load(0, training=False).test) == len(found.test.labels)


@pytest.mark.parametrize("kind", ["bin", "py"])
def test_a_missing_training_file_is_named(kind, tmp_path):
    BUILD["cifar10", kind](tmp_path)
    (file,) = (tmp_path / FOLDERS["cifar10", kind]).glob("data_batch_3*")
    file.unlink()
    with pytest.raises(UserError, match=f"lacks {file.name}; unpack the archive again"):
        read_any(tmp_path)


@pytest.mark.parametrize("which", BUILD)
def test_missing_names_are_the_published_ones(which, tmp_path):
    BUILD[which](tmp_path)
    for file in (tmp_path / FOLDERS[which]).iterdir():
        if "meta" in file.name or "names" in file.name:
            file.unlink()
    classes = read_any(tmp_path).classes
    assert classes == (TEN if which[0] == "cifar10" else cifar_files.CLASSES["cifar100"])
    assert list(classes) == sorted(set(classes)) and len(classes) == int(which[0].removeprefix("cifar"))
    if which[0] == "cifar100":
        assert (classes[0], classes[47], classes[99]) == ("apple", "maple_tree", "worm")


def test_records_of_another_size_are_refused(tmp_path):
    cifar10_binary(tmp_path)
    file = tmp_path / "cifar-10-batches-bin/test_batch.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"test_batch.bin must be records of 3073 bytes \(1 label, 3072 pixels\), got 61459"
    ):
        read_any(tmp_path)


def test_another_number_of_names_is_refused(tmp_path):
    cifar10_binary(tmp_path)
    write(tmp_path / "cifar-10-batches-bin/batches.meta.txt", "cat\ndog\n")
    with pytest.raises(UserError, match="must name 10 classes, got 2"):
        read_any(tmp_path)


def change(tmp_path, **values):
    """Change what is in test_batch."""
    file = cifar10_python(tmp_path) / "cifar-10-batches-py/test_batch"
    batch = {"data": noise(20, 3072), "labels": [k % 10 for k in range(20)]}
    file.write_bytes(pickle.dumps({key: value for key, value in {**batch, **values}.items() if value is not None}))


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"data": noise(20, 3071)}, "got uint8 (20, 3071)"),
        ({"data": noise(20, 32, 32, 3)}, "got uint8 (20, 32, 32, 3)"),
        ({"data": noise(20, 3072).astype(np.int64)}, "got int64 (20, 3072)"),
        ({"data": [1, 2]}, "got 2 others"),
        ({"data": None}, "got NoneType"),
        ({"labels": list(range(19))}, "'labels' must be 20 integers from 0 to 9"),
        ({"labels": [*range(19), 10]}, "from 0 to 9"),
        ({"labels": [*range(19), "cat"]}, "from 0 to 9"),
        ({"labels": None}, "'labels' must be 20 integers"),
        ({"data": noise(20, 3072) / 255}, "numpy dtype with other values"),
        ({"extra": {1, 2}}, "EMPTY_SET"),
        ({"extra": print}, "the name 'builtins.print'"),
    ],
)
def test_other_content_is_refused_with_the_way_to_convert_it(values, fragment, tmp_path):
    change(tmp_path, **values)
    with pytest.raises(UserError) as caught:
        read_any(tmp_path)
    message = str(caught.value)
    assert fragment in message and "test_batch" in message and "\n" not in message
    if "pickle" in message:
        assert "binary version" in message and "numpy.savez(" in message


@pytest.mark.parametrize(
    "labels", [np.arange(20) % 10, (np.arange(20) % 10).astype(np.uint8), list(np.arange(20) % 10)]
)
def test_labels_saved_again_by_numpy_are_read(labels, tmp_path):
    change(tmp_path, labels=labels)
    assert read_any(tmp_path).test.labels.tolist() == [k % 10 for k in range(20)]


def test_common_names_alone_are_no_cifar100(tmp_path):
    for name in ("train", "test", "meta"):
        write(tmp_path / name, "a text")
    with pytest.raises(UserError, match="data.path must have a layout"):
        read_any(tmp_path)
