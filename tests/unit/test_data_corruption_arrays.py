"""CIFAR-10-C, CIFAR-100-C and MNIST-C as published: test images in arrays, one file or folder per corruption."""

import numpy as np
import pytest

from clead.data.datasets import DATASETS
from clead.data.datasets.auto import read_any
from clead.errors import UserError
from layouts import DIGITS, TEN, cifar10_c, labels_of, mnist_c, noise, save_npy


def test_all_corruptions_and_severities_are_test_images(tmp_path):
    for path in (cifar10_c(tmp_path), tmp_path):
        found = read_any(path)
        assert len(found.train.labels) == 0 and found.ordered and found.classes == TEN
        oracle = np.concatenate([noise(50, 32, 32, 3, seed=seed) for seed in range(3)]).transpose(0, 3, 1, 2)
        assert np.array_equal(found.test.images.numpy(), oracle)
        assert found.test.labels.tolist() == [k % 10 for k in range(150)]
        assert found.test.columns["corruption"] == ["fog"] * 50 + ["gaussian_noise"] * 50 + ["jpeg_compression"] * 50
        assert found.test.columns["severity"] == [str(1 + k // 10) for k in range(50)] * 3
        assert found.notes[-1] == (
            "the 150 test images are corrupted by 3 corruptions (fog, gaussian_noise, jpeg_compression) at severities 1, 2, 3, 4, 5"
        )


def test_one_corruption_and_one_severity(tmp_path):
    path = cifar10_c(tmp_path) / "gaussian_noise.npy"
    found = read_any(path)
    assert np.array_equal(found.test.images.numpy(), noise(50, 32, 32, 3, seed=1).transpose(0, 3, 1, 2))
    assert "corrupted by the corruption gaussian_noise at" in found.notes[-1] and found.classes == TEN
    splits = DATASETS.get("auto")(path=path, only="severity=3").load(0, training=False)
    assert np.array_equal(splits.test.images.numpy(), noise(50, 32, 32, 3, seed=1).transpose(0, 3, 1, 2)[20:30])
    assert "only images with severity=3 are read (data.only)" in splits.notes
    both = DATASETS.get("auto")(path=path.parent, only="severity=2 corruption=fog").load(0, training=False)
    assert np.array_equal(both.test.images.numpy(), noise(50, 32, 32, 3).transpose(0, 3, 1, 2)[10:20])


@pytest.mark.parametrize(
    ("only", "fragment"),
    [
        ("severity=6", "got 'severity=6'; known: 1, 2, 3, 4, 5"),
        ("strength=3", "there are the columns corruption, severity"),
        ("fog", "got 'fog'"),
        ("corruption=frog", "did you mean 'fog'"),
    ],
)
def test_a_value_that_no_image_has_is_refused(only, fragment, tmp_path):
    with pytest.raises(UserError) as caught:
        DATASETS.get("auto")(path=cifar10_c(tmp_path), only=only).load(0, training=False)
    assert fragment in str(caught.value)


def test_it_is_not_trained_on(tmp_path):
    with pytest.raises(UserError, match="there must be training and test images, got 0 and 150"):
        DATASETS.get("auto")(path=cifar10_c(tmp_path)).load(0)


def test_one_severity_alone_has_the_labels_of_all(tmp_path):
    path = cifar10_c(tmp_path)
    save_npy(path / "fog.npy", noise(10, 32, 32, 3))
    found = read_any(path / "fog.npy")
    assert found.test.labels.tolist() == list(range(10)) and "severity" not in found.test.columns


def test_labels_that_do_not_repeat_give_no_severity(tmp_path):
    path = cifar10_c(tmp_path)
    save_npy(path / "labels.npy", np.arange(50) // 5)
    assert "severity" not in read_any(path).test.columns


def test_other_class_numbers_have_no_names(tmp_path):
    path = cifar10_c(tmp_path)
    save_npy(path / "labels.npy", np.tile(labels_of(10, 5), 5))
    assert read_any(path).classes == DIGITS[:5]
    (tmp_path / "CIFAR-10-C").rename(tmp_path / "mine")
    save_npy(tmp_path / "mine/labels.npy", np.tile(labels_of(10, 10), 5))
    assert read_any(tmp_path / "mine").classes == DIGITS


@pytest.mark.parametrize(
    ("file", "array", "fragment"),
    [
        ("labels.npy", np.arange(49), "must be 50 integers, one per image, got int64 (49,)"),
        ("labels.npy", np.arange(60), "must be 50 integers"),
        ("labels.npy", np.arange(100), "must be 50 integers"),
        ("labels.npy", np.zeros(50), "got float64 (50,)"),
        ("labels.npy", np.eye(50, dtype=int), "got int64 (50, 50)"),
        ("labels.npy", np.array([None] * 50), "holds Python objects"),
        ("fog.npy", noise(50, 3, 32, 32), "(N, H, W, C) of uint8 with C 1 or 3, got uint8 (50, 3, 32, 32)"),
        ("fog.npy", np.zeros((50, 32, 32, 3), np.float32), "got float32"),
        ("fog.npy", noise(50, 28, 28, 3), "the images have another shape"),
        ("fog.npy", noise(0, 32, 32, 3), "got uint8 (0, 32, 32, 3)"),
        ("fog.npy", np.array(3), "got int64 ()"),
    ],
)
def test_other_arrays_are_refused(file, array, fragment, tmp_path):
    path = cifar10_c(tmp_path)
    np.save(path / file, array, allow_pickle=True)
    with pytest.raises(UserError) as caught:
        read_any(path)
    assert fragment in str(caught.value) and len(caught.value.problems) == 1


def test_a_header_that_lies_is_refused_before_anything_is_allocated(tmp_path):
    path = cifar10_c(tmp_path)
    content = (path / "fog.npy").read_bytes()
    (path / "fog.npy").write_bytes(
        content.replace(b"(50, 32, 32, 3)", b"(5000000000000, 32, 32, 3)".ljust(15))[: len(content)]
    )
    with pytest.raises(UserError, match="the header says uint8|not a NumPy array"):
        read_any(path)


def test_mnist_c(tmp_path):
    mnist_c(tmp_path)
    for path in (tmp_path, tmp_path / "mnist_c"):
        found = read_any(path)
        assert found.test.columns == {"corruption": ["fog"] * 20 + ["identity"] * 20}
        assert len(found.skipped) == 2 and all("train_images.npy: corrupted training" in line for line in found.skipped)
    one = read_any(tmp_path / "mnist_c/fog")
    assert np.array_equal(one.test.images.numpy(), noise(20, 28, 28, 1).transpose(0, 3, 1, 2))
    assert one.notes == ("the 20 test images are corrupted by the corruption fog",)
