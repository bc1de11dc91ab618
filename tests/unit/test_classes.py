"""Which number a class has."""

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from clead.config import RunConfig, evaluation_config
from clead.data.classes import align_classes, class_list, class_order, class_text, number_labels, renumbering
from clead.data.datasets.npz import Npz
from clead.errors import UserError
from clead.interfaces import ImageSet, Splits


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (map(str, range(11, -1, -1)), list(map(str, range(12)))),
        (["270", "0", "90", "180"], ["0", "90", "180", "270"]),
        (["-5", "10", "-10", "+3"], ["-10", "-5", "+3", "10"]),
        (["007", "10", "08"], ["007", "08", "10"]),
        (["10", "9", "other"], ["10", "9", "other"]),
        (["b", "a", "b"], ["a", "b"]),
        (["²", "1"], ["1", "²"]),  # what str.isdigit would take for a number
    ],
)
def test_names_that_are_all_integers_sort_as_numbers(names, order):
    assert class_order(names) == order


@pytest.mark.parametrize(
    ("values", "labels", "names"),
    [
        ([0, 1, 2], [0, 1, 2], "0 1 2"),
        ([1, 2, 3, 1], [0, 1, 2, 0], "1 2 3"),
        ([90, 0, 270, 180], [1, 0, 3, 2], "0 90 180 270"),
        ([5, 2_000_000_000], [0, 1], "5 2000000000"),
        ([0, 2_000_000_000], [0, 1], "0 2000000000"),
        ([0, 1, 3], [0, 1, 3], "0 1 2 3"),  # 2 may have images elsewhere
        (["10", "9"], [1, 0], "9 10"),
        (["cat", "ant"], [1, 0], "ant cat"),
        ([True, False], [1, 0], "0 1"),
    ],
)
def test_labels_become_class_numbers(values, labels, names):
    numbered, got, notes = number_labels(values[:1], values[1:])
    assert torch.cat(numbered).tolist() == labels and " ".join(got) == names
    assert bool(notes) == (got != tuple(map(str, range(len(set(values))))) and not isinstance(values[0], str))


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=30), st.integers(0, 30))
def test_every_label_keeps_its_value_as_name_and_its_order(values, cut):
    numbered, names, _ = number_labels(np.array(values[:cut], np.int64), np.array(values[cut:], np.int64))
    labels = torch.cat(numbered).tolist()
    assert [int(names[k]) for k in labels] == values and len(names) <= 2 * len(values)
    assert all(
        (a < b) == (v < w) for a, v in zip(labels, values, strict=True) for b, w in zip(labels, values, strict=True)
    )


def test_negative_labels_stay_for_the_check():
    (labels,), names, _ = number_labels([-1, 0, 1])
    assert labels.tolist() == [-1, 0, 1] and names == ("0", "1")


# A list of names: data.classes


@pytest.mark.parametrize(
    ("file", "content", "names"),
    [
        ("a.txt", "dog\ncat\n\n", ("dog", "cat")),
        ("a.txt", "\ufeffchien\nchat été\n", ("chien", "chat été")),
        ("a.txt", "0 dog\n1 sea lion\n", ("dog", "sea lion")),
        ("a.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish",
         (("n01440764", "tench, Tinca tinca"), ("n01443537", "goldfish"))),
        ("a.txt", "90\n0\n", ("90", "0")),
        ("a.json", '["dog", "cat"]', ("dog", "cat")),
        ("a.json", '{"1": "cat", "0": "dog"}', ("dog", "cat")),
        ("a.json", '{"10": "k", "2": "c", "0": "a", "1": "b", "3": "d", "4": "e", "5": "f", "6": "g","7": "h","8": "i","9": "j"}',
         tuple("abcdefghijk")),
        ("a.json", '{"dog": 1, "cat": 0}', ("cat", "dog")),
        ("a.json", '{"id2label": {"0": "dog", "1": "cat"}, "label2id": {"dog": 0, "cat": 1}, "hidden_size": 8}', ("dog", "cat")),
        ("a.json", '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}',
         (("n01440764", "tench"), ("n01443537", "goldfish"))),
        ("a.yaml", "- no\n- 010\n- 1e3\n", ("no", "010", "1e3")),
        ("a.yaml", "names:\n  0: dog\n  1: cat\n", ("dog", "cat")),
        ("labels", "{1: one, 2: two}", None),  # JSON by its first character, and not JSON
        ("a.json", '{"1": "one", "2": "two"}', ("one", "two")),
        ("a.json", '{"1": "one", "3": "three"}', None),
        ("a.json", '{"0": "one", "00": "two"}', None),
        ("a.json", '["dog", "dog"]', None),
        ("a.json", '["dog", ""]', None),
        ("a.json", '["dog", true]', None),
        ("a.json", '["dog", {"a": 1}]', None),
        ("a.json", "[", None),
        ("a.json", "7", None),
        ("a.json", "[" * 100_000, None),
        ("a.txt", "", None),
        ("a.txt", "caf\udce9\n", None),
    ],
)  # fmt: skip
def test_a_file_of_class_names_says_their_order(tmp_path, file, content, names):
    (tmp_path / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    if names is None:
        with pytest.raises(UserError):
            class_list(str(tmp_path / file))
    else:
        assert class_list(str(tmp_path / file)) == names


@pytest.mark.parametrize(
    ("value", "names"),
    [("dog, cat", ("dog", "cat")), (["dog", 90], ("dog", "90")), ({1: "cat", 0: "dog"}, ("dog", "cat")), (None, None)],
)
def test_class_names_can_be_given_as_they_are(value, names):
    assert class_list(value) == names


@pytest.mark.parametrize("value", ["dog", "dog.txt", "a,a", 7, {"a": "b"}, [], [None], "a" * 5000])
def test_what_is_no_list_of_names_is_refused(value):
    with pytest.raises(UserError):
        class_list(value)


def test_names_are_text_whatever_they_were():
    names = np.array([b"cat", "café".encode()], dtype="S8")
    assert list(map(class_text, names)) == ["cat", "café"]
    assert list(map(class_text, np.array(["cat"]))) == ["cat"]
    assert list(map(class_text, np.array([90]))) == ["90"]


def saved(path, x, y, **more):
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y, **more)
    return str(path)


X = np.arange(12 * 16, dtype=np.uint8).reshape(12, 4, 4)
Y = np.arange(12) % 3


def test_labels_are_numbered_as_the_list_says_by_name(tmp_path):
    path = saved(tmp_path / "a.npz", X, Y, classes=np.array(["ant", "bee", "cow"]))
    plain = Npz(path=path).load(3)
    splits = Npz(path=path, classes="cow,fly,ant,bee").load(3)
    assert splits.classes == ("cow", "fly", "ant", "bee")
    assert splits.test.labels.tolist() == [[2, 3, 0][y] for y in Y]
    assert "3 of the 4 classes" in " ".join(splits.notes)
    # The list decides numbers, not which images are kept back.
    assert torch.equal(splits.val.images, plain.val.images) and torch.equal(splits.train.images, plain.train.images)
    assert splits.fingerprint != plain.fingerprint


def test_labels_without_names_get_those_of_the_list_by_number(tmp_path):
    splits = Npz(path=saved(tmp_path / "a.npz", X, Y), classes="cow,ant,bee,fly").load(0)
    assert splits.classes == ("cow", "ant", "bee", "fly") and splits.test.labels.tolist() == Y.tolist()
    splits = Npz(path=saved(tmp_path / "a.npz", X, Y), classes="2,1,0").load(0)  # these are names
    assert splits.classes == ("2", "1", "0") and splits.test.labels.tolist() == (2 - Y).tolist()


def test_data_uses_the_name_that_it_knows_of_several(tmp_path):
    path = saved(tmp_path / "a.npz", X, Y, classes=np.array(["Ant_", "sea-lion", "cow"]))
    names = [["n1", "cow"], ["n2", "sea lion"], ["n3", "ant"]]
    splits = Npz(path=path, classes=names).load(0)
    assert splits.classes == ("cow", "sea lion", "ant") and splits.test.labels.tolist() == [[2, 1, 0][y] for y in Y]
    assert "'sea-lion' as" in " ".join(splits.notes)
    path = saved(tmp_path / "b.npz", X, Y, classes=np.array(["n3", "n1", "n2"]))
    assert Npz(path=path, classes=names).load(0).classes == ("n1", "n2", "n3")


def test_a_class_that_the_list_lacks_is_named(tmp_path):
    path = saved(tmp_path / "a.npz", X, Y, classes=np.array(["ant", "bee", "cow"]))
    with pytest.raises(UserError, match="lacks 'cow'.*did you mean 'cowl'"):
        Npz(path=path, classes="ant,bee,cowl").load(0)
    with pytest.raises(UserError, match="names 2 classes, 0 … 1, but the data has the label 2"):
        Npz(path=saved(tmp_path / "b.npz", X, Y), classes="ant,bee").load(0)


def test_names_that_differ_only_in_case_stay_two(tmp_path):
    path = saved(tmp_path / "a.npz", X, Y, classes=np.array(["a", "A", "b"]))
    splits = Npz(path=path, classes="A,b,a").load(0)
    assert splits.test.labels.tolist() == [[2, 0, 1][y] for y in Y]


def test_the_list_of_names_is_kept_in_the_configuration(tmp_path):
    (tmp_path / "names.txt").write_text("bee\nant\n")
    config = evaluation_config("x", ["--data.path", str(tmp_path), "--data.classes", str(tmp_path / "names.txt")])
    (tmp_path / "names.txt").unlink()
    assert RunConfig.from_dict(yaml.safe_load(config.to_yaml())).data.classes == ("bee", "ant")
    config = evaluation_config("x", ["--data.path", str(tmp_path), "--data.classes", "[[a, b], 'no', 1]"])
    assert RunConfig.from_dict(yaml.safe_load(config.to_yaml())).data.classes == (("a", "b"), "no", "1")


@given(st.permutations(list("abcdefg")), st.lists(st.integers(0, 6), min_size=1))
def test_renumbering_keeps_every_images_name(order, labels):
    names = list("abcdefg")
    labels = torch.tensor(labels)
    new = renumbering(names, torch.bincount(labels, minlength=7).tolist(), order)
    assert [new.classes[k] for k in new(labels)] == [names[k] for k in labels]


# A model's own names


def splits_of(classes, labels=(0, 1, 2, 0)):
    labels = torch.tensor(labels)
    images = ImageSet(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), labels)
    return Splits(images, images, images, tuple(classes), "")


def named(splits):
    return [splits.classes[k] for k in splits.test.labels]


@pytest.mark.parametrize("model", [("c", "a", "b"), ("x", "c", "y", "a", "b"), ["B", "a", "C"]])
def test_labels_become_the_models_numbers_by_name(model):
    before = splits_of("abc")
    after, notes = align_classes(before, model, source="net.onnx")
    assert after.classes == tuple(model)
    assert [name.lower() for name in named(after)] == named(before) and notes
    assert any("order of the classes differs" in note or len(model) > 3 for note in notes)


@pytest.mark.parametrize("model", [None, ("a", "b", "c"), ("0", "1", "2"), ("LABEL_0", "LABEL_1", "LABEL_2")])
def test_names_that_say_nothing_leave_the_data_alone(model):
    before = splits_of("abc")
    after, notes = align_classes(before, model)
    assert after is before and not notes


def test_numbers_in_text_order_are_names_like_any_others():
    order = sorted(map(str, range(12)))
    before = splits_of(map(str, range(12)), tuple(range(12)))
    after, notes = align_classes(before, order)
    assert after.test.labels.tolist() == [order.index(str(k)) for k in range(12)] and "class 2 is '2'" in notes[0]


def test_data_without_names_takes_the_models():
    after, notes = align_classes(splits_of("012"), ("cat", "dog", "owl"), source="net.onnx")
    assert after.classes == ("cat", "dog", "owl") and after.test.labels.tolist() == [0, 1, 2, 0]
    assert "label k is taken for class k" in notes[0]


def test_other_names_in_the_same_places_are_said_and_kept():
    after, notes = align_classes(splits_of(["Katze", "dog", "owl"]), ("cat", "dog", "owl"))
    assert after.test.labels.tolist() == [0, 1, 2, 0] and "'Katze' is 'cat'" in notes[0]


@pytest.mark.parametrize(
    ("classes", "model", "own"),
    [("abd", "cab", False), ("abd", "abc", True), ("012", "abc", True), ("abc", "012", True), ("abc", "wxyz", False)],
)
def test_names_that_the_model_does_not_know_are_refused(classes, model, own):
    with pytest.raises(UserError, match="--data.classes"):
        align_classes(splits_of(classes), tuple(model), names_must_agree=own)


def test_the_users_order_holds_against_a_files_and_the_disagreement_is_named():
    before = splits_of("abc")
    after, notes = align_classes(before, ("b", "a", "c"), order_given=True)
    assert after is before and "class 0 is 'a' in the data and 'b' in the model" in notes[0]
    assert align_classes(before, ("a", "b", "c", "d"), order_given=True) == (before, ())


def test_aliases_of_yaml_that_stand_for_gigabytes_are_refused(tmp_path):
    lines = [
        "a0: &a0 [x, y]",
        *(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 30)),
        "names: [*a29, *a28]",
    ]
    (tmp_path / "laughs.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="aliases are not read"):
        class_list(tmp_path / "laughs.yaml")
    (tmp_path / "names.yaml").write_text("names: [cat, dog]")
    assert class_list(tmp_path / "names.yaml") == ("cat", "dog")
