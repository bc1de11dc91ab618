"""IDX files: MNIST and its kin, as published and as torchvision keeps them."""

import gzip

import numpy as np
import pytest

from clead.data.datasets import DATASETS
from clead.data.datasets.auto import read_any
from clead.errors import UserError
from layouts import DIGITS, emnist, fashion_mnist, idx_bytes, labels_of, mnist, mnist_packed, noise, write, write_idx


@pytest.mark.parametrize(
    "path", [".", "MNIST", "MNIST/raw", "MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/t10k-images-idx3-ubyte"]
)
def test_images_and_labels_are_those_of_the_files(path, tmp_path):
    mnist(tmp_path)
    found = read_any(tmp_path / path)
    assert np.array_equal(found.train.images[:, 0].numpy(), noise(40, 28, 28))
    assert np.array_equal(found.test.images[:, 0].numpy(), noise(20, 28, 28, seed=1))
    assert found.train.labels.tolist() == [k % 10 for k in range(40)] and found.classes == DIGITS and not found.notes
    assert DATASETS.get("mnist")(path=tmp_path / path, val_fraction=0.5).load(0).classes == DIGITS


def test_an_unpacked_file_and_its_gz_are_one(tmp_path):
    mnist(tmp_path)
    write_idx(tmp_path / "MNIST/raw", {"train": 40, "t10k": 20}, packed=True)
    assert len(read_any(tmp_path).train.labels) == 40


@pytest.mark.parametrize("dotted", [False, True])
def test_test_images_alone(dotted, tmp_path):
    separator = "." if dotted else "-"
    write(tmp_path / f"t10k-images{separator}idx3-ubyte", idx_bytes(noise(20, 28, 28)))
    write(tmp_path / f"t10k-labels{separator}idx1-ubyte", idx_bytes(labels_of(20, 10)))
    found = read_any(tmp_path)
    assert (len(found.train.labels), len(found.test.labels)) == (0, 20)


def test_emnist_has_its_characters_and_says_that_it_lies_transposed(tmp_path):
    emnist(tmp_path)
    found = read_any(tmp_path)
    assert found.classes[:2] == ("A", "B") and found.train.labels.min() == 0
    assert any("transposed" in note for note in found.notes)
    write_idx(tmp_path / "EMNIST/raw", {"train": 20, "test": 10}, prefix="emnist-digits-")
    with pytest.raises(
        UserError, match="2 sets of images.*emnist-digits, emnist-letters.*--data.path .*emnist-digits-test-images"
    ):
        read_any(tmp_path)
    one = read_any(tmp_path / "EMNIST/raw/emnist-digits-test-images-idx3-ubyte")
    assert one.classes == DIGITS and len(one.train.labels) == 20
    write(tmp_path / "EMNIST/raw/emnist-letters-mapping.txt", "1 sixty-five\n")
    with pytest.raises(UserError, match="mapping.txt must hold a label and character codes"):
        read_any(tmp_path / "EMNIST/raw/emnist-letters-train-images-idx3-ubyte")


def test_a_part_of_fashion_mnist_keeps_numbers(tmp_path):
    fashion_mnist(tmp_path)
    write_idx(tmp_path / "FashionMNIST/raw", {"train": 40, "t10k": 20}, classes=3)
    assert read_any(tmp_path).classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("file", "content", "fragment"),
    [
        ("train-images-idx3-ubyte", b"", "must begin with 2051, as IDX files of uint8 with 3 dimensions do, got 0"),
        ("train-images-idx3-ubyte", b"\x89PNG 1234567890123", "got 2303741511"),
        ("train-images-idx3-ubyte", idx_bytes(noise(40, 28, 28))[:-1], "31376 bytes with it, got 31375"),
        ("train-images-idx3-ubyte", idx_bytes(noise(40, 28, 28)) + b"a", "got 31377"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03" + b"\xff" * 12, "4294967295 x 4294967295 x 4294967295"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03" + bytes(12), "0 x 0 x 0"),
        (
            "train-images-idx3-ubyte",
            idx_bytes(noise(39, 28, 28)),
            "has 39 images and train-labels-idx1-ubyte 40 labels",
        ),
        ("train-labels-idx1-ubyte", idx_bytes(noise(40, 1)), "must begin with 2049"),
        ("train-labels-idx1-ubyte", None, "its labels must lie beside it as train-labels-idx1-ubyte or"),
    ],
)
def test_headers_that_lie_are_refused(file, content, fragment, tmp_path):
    mnist(tmp_path)
    path = tmp_path / "MNIST/raw" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_any(tmp_path)
    assert fragment in str(caught.value) and len(caught.value.problems) == 1


def test_damaged_gzip_is_refused(tmp_path):
    mnist_packed(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        whole[:-4] + b"abcd",
        b"",
        b"no gzip",
        whole[:2000] + b"\0" * 40 + whole[2040:],
    ):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="not a whole gzip file|must begin with 2051|got"):
            read_any(tmp_path)


def test_a_gzip_that_unpacks_to_more_than_images_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("clead.data.bounded.UNPACKED_ABOVE", 2**21)
    mnist_packed(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(2**25)))
    with pytest.raises(UserError, match="bytes that unpack to .* are no images"):
        read_any(tmp_path)
