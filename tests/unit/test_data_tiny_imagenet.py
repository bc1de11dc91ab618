"""Tiny-ImageNet as it is unpacked."""

import pytest

from clead.data.datasets import DATASETS
from clead.data.datasets.auto import read_any
from clead.errors import UserError
from layouts import encoded, noise, tiny_imagenet, write


def test_labels_and_roles(tmp_path):
    for path in (tiny_imagenet(tmp_path), tmp_path / "tiny-imagenet-200"):
        found = read_any(path)
        assert found.classes == ("goldfish", "fire salamander") and found.ordered
        wanted = {"n02": 0, "n01": 1}
        assert [wanted[name.split("/")[-3]] for name in found.train.names] == found.train.labels.tolist() != [0] * 6
        assert found.val.labels.tolist() == [0, 1, 0, 1]
        assert found.val.images[3] == encoded(noise(8, 8, 3, seed=23), "JPEG")
        assert len(found.skipped) == 1 and found.skipped[0].endswith("test: 4 images without labels")
        assert not any("train/CLASS" in note for note in found.notes)
    splits = DATASETS.get("auto")(path=tmp_path, val_fraction=0.4).load(0)
    assert splits.origin == "val" and len(splits.test) == 4 and splits.skipped


def test_without_lists_classes_are_the_sorted_folders(tmp_path):
    top = tiny_imagenet(tmp_path) / "tiny-imagenet-200"
    (top / "words.txt").unlink()
    assert read_any(top).classes == ("n02", "n01")
    (top / "wnids.txt").unlink()
    found = read_any(top)
    assert found.classes == ("n01", "n02") and found.val.labels.tolist() == [1, 0, 1, 0] and not found.ordered


def test_words_that_are_not_distinct_are_not_used(tmp_path):
    top = tiny_imagenet(tmp_path) / "tiny-imagenet-200"
    write(top / "words.txt", "n01\tcrane\nn02\tcrane\n")
    assert read_any(top).classes == ("n02", "n01")


def test_validation_alone_is_to_be_evaluated_on(tmp_path):
    top = tiny_imagenet(tmp_path) / "tiny-imagenet-200"
    (top / "train").rename(tmp_path / "elsewhere")
    splits = DATASETS.get("auto")(path=top).load(0, training=False)
    assert len(splits.test) == 4 and splits.origin == "val"


@pytest.mark.parametrize(
    ("file", "content", "fragment"),
    [
        ("val/val_annotations.txt", "val_9.JPEG\tn01\t0\t0\t7\t7\n", "1 of them are missing, such as"),
        ("val/val_annotations.txt", "../../../etc/passwd\tn01\n", "images/passwd"),
        ("val/val_annotations.txt", "val_0.JPEG\tn09\t0\n", "the class 'n09' is not in wnids.txt"),
        ("val/val_annotations.txt", "val_0.JPEG n01\n", "a file name and a class in each line"),
        ("wnids.txt", "n01\n", "the class 'n02' is not in wnids.txt"),
    ],
)
def test_lists_that_do_not_fit_are_refused(file, content, fragment, tmp_path):
    top = tiny_imagenet(tmp_path) / "tiny-imagenet-200"
    write(top / file, content)
    with pytest.raises(UserError) as caught:
        read_any(top)
    assert fragment in str(caught.value) and len(caught.value.problems) == 1
