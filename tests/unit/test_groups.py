"""Images that belong together stay together: data.group_by."""

import io

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clead.data.base import RawSplit, RawSplits
from clead.data.datasets.folder import Folder
from clead.data.datasets.npz import Npz
from clead.data.datasets.parquet import Parquet
from clead.data.groups import cut_groups, group_names, shared_groups
from clead.errors import UserError


def scenes(root, part="train", numbers=range(12), frames=5):
    """Two classes, each with six scenes of five frames."""
    for scene in numbers:
        folder = root / part / ("cat" if scene % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        for frame in range(frames):
            Image.fromarray(np.full((4, 4), 10 * scene + frame, np.uint8)).save(
                folder / f"scene{scene:02d}_{frame}.png"
            )
    return root


def of(image_set):
    """Return the scenes of images."""
    return {int(value) // 10 for value in image_set.images[:, 0, 0, 0]}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("group_by", ["scene[0-9]+", "^(.+)_[0-9]+", r"train/\w+/(\w+)_"])
def test_no_scene_is_parted(tmp_path, seed, group_by):
    splits = Folder(path=scenes(tmp_path), group_by=group_by, val_fraction=0.2).load(seed)
    sets = [of(part) for part in (splits.train, splits.val, splits.test)]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 12 and all(sets)
    for part in (splits.val, splits.test):  # both classes, whole scenes
        assert torch.bincount(part.labels).tolist() == [5, 5]


def test_without_the_setting_scenes_are_parted(tmp_path):
    splits = Folder(path=scenes(tmp_path), val_fraction=0.2).load(0)
    assert of(splits.train) & of(splits.val)


def test_a_limit_keeps_whole_groups(tmp_path):
    splits = Folder(path=scenes(scenes(tmp_path), "test", [20, 21]), group_by="scene..", limit_train=30).load(0)
    assert len(splits.train) + len(splits.val) == 30 and not of(splits.train) & of(splits.val)


def test_groups_that_span_given_splits_are_said(tmp_path):
    scenes(scenes(tmp_path), "test", [3, 4, 14, 15])
    splits = Folder(path=tmp_path, group_by="scene..").load(0)
    assert "2 of 4 groups of the test images are among the training images too (10 images)" in " ".join(splits.notes)
    assert not any("groups" in note for note in Folder(path=tmp_path).load(0).notes)


@pytest.mark.parametrize(
    ("group_by", "match"),
    [
        ("clip[0-9]", "matches none of the 60 names, such as scene"),
        ("(", "must be a regular expression or a column"),
        ("dog|cat", "matches none"),  # in the names, not in the folders
        ("/(dog|cat)/", "makes 2 groups of 60 images, of which none can be kept back"),
    ],
)
def test_what_makes_no_groups_is_refused(tmp_path, group_by, match):
    with pytest.raises(UserError, match=match):
        Folder(path=scenes(tmp_path), group_by=group_by).load(0)


def test_arrays_have_no_names_to_group_by(tmp_path):
    x, y = np.zeros((8, 4, 4), np.uint8), np.arange(8) % 2
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(UserError, match="no file names"):
        Npz(path=tmp_path / "a.npz", group_by="scene").load(0)


def test_a_name_that_does_not_match_is_its_own_group(tmp_path):
    scenes(tmp_path)
    for name in "abc":
        Image.fromarray(np.full((4, 4), 200, np.uint8)).save(tmp_path / "train/cat" / f"{name}.png")
    assert "matches 3 names not" in " ".join(Folder(path=tmp_path, group_by="scene..").load(0).notes)


def test_a_column_says_the_group():
    columns = {"patient": ["p1", "p1", "p2"]}
    assert group_names("patient", [], columns) == (["p1", "p1", "p2"], 0)
    with pytest.raises(UserError, match="did you mean 'patient'"):
        group_names("patients", [], columns)

    class Scans(Folder):
        def read(self):
            labels = torch.arange(40) % 2
            images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 1, 4, 4)
            return RawSplits(
                RawSplit(images, labels, columns={"patient": [str(i // 4) for i in range(40)]}),
                RawSplits().train,
                ("a", "b"),
            )

    splits = Scans(path=".", group_by="patient").load(0)
    patients = [{int(v) // 4 for v in part.images[:, 0, 0, 0]} for part in (splits.train, splits.val, splits.test)]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 10


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=20, max_size=120),
    st.integers(0, 5),
)
def test_groups_are_whole_and_every_class_keeps_an_image(rows, seed):
    labels, groups = torch.tensor([label for label, _ in rows]), [f"{label}-{group}" for label, group in rows]
    count = len(rows) // 5
    try:
        chosen, rest = cut_groups(labels, groups, count, seed)
    except UserError:
        assert all(len({g for g in groups if g[0] == str(k)}) == 1 for k in labels.unique().tolist())
        return
    assert sorted([*chosen.tolist(), *rest.tolist()]) == list(range(len(rows)))
    assert not {groups[i] for i in chosen} & {groups[i] for i in rest}
    assert set(labels[rest].tolist()) == set(labels.tolist()) and len(chosen)
    again, _ = cut_groups(labels, groups, count, seed)
    assert torch.equal(chosen, again)


@pytest.mark.parametrize("seed", range(3))
def test_many_groups_come_close_to_the_wished_count_of_every_class(seed):
    random = np.random.default_rng(seed)
    group = random.integers(0, 400, 4000)
    labels = torch.from_numpy(random.permutation(400)[group] % 5)
    chosen, _ = cut_groups(labels, list(map(str, group)), 400, seed)
    share = torch.bincount(labels[chosen], minlength=5) / torch.bincount(labels, minlength=5)
    assert (share - 0.1).abs().max() < 0.02


def test_shared_groups_of_three_splits():
    notes = shared_groups({"training": ["a", "b"], "validation": ["b"], "test": ["a", "b", "b"]})
    assert (
        len(notes) == 3 and "2 of 2 groups of the test images are among the training images too (3 images)" in notes[1]
    )
    assert not shared_groups({"training": ["a"], "test": ["b"]})


def test_a_tables_columns_and_file_names_say_the_group(tmp_path):
    rows = []
    for i in range(60):
        file = io.BytesIO()
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(file, "PNG")
        rows.append(
            {
                "image": {"bytes": file.getvalue(), "path": f"scene{i // 5}_{i}.png"},
                "label": (i // 5) % 2,
                "patient": i // 5,
            }
        )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    for group_by in ("patient", "scene[0-9]+"):
        splits = Parquet(path=tmp_path, group_by=group_by, val_fraction=0.2).load(0)
        sets = [{int(v) // 5 for v in part.images[:, 0, 0, 0]} for part in (splits.train, splits.val, splits.test)]
        assert all(sets) and sum(map(len, sets)) == len(set.union(*sets)) == 12
