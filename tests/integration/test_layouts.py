"""Every layout of tests/layouts.py is read, or refused in one line; damaged files never are a traceback or much memory."""

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clead.data.datasets import DATASETS, READERS, auto
from clead.data.datasets.auto import read_any
from clead.errors import UserError
from layouts import LAYOUTS, cifar10_binary, cifar100_binary, class_folders, fashion_mnist, mnist

IDS = [each.build.__name__ for each in LAYOUTS]


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_layout_is_read_or_refused_in_one_line(layout, tmp_path):
    path = layout.build(tmp_path)
    if layout.refused:
        with pytest.raises(UserError) as caught:
            read_any(path)
        assert layout.refused in str(caught.value) and len(caught.value.problems) == 1 and not any(layout.sizes)
        return
    found = read_any(path)
    parts = (found.train, found.val, found.test)
    assert tuple(0 if part is None else len(part.labels) for part in parts) == layout.sizes
    assert found.classes == layout.classes
    used = [int(label) for part in parts if part is not None for label in part.labels]
    assert set(used) == set(range(len(layout.classes))), "a sample has images of every class"
    if layout.sizes[2] or layout.sizes[1]:
        splits = DATASETS.get("auto")(path=path, val_fraction=0.5).load(0, training=False)
        assert splits.classes == layout.classes and splits.test.images.ndim == 4


def test_every_reader_has_a_sample(tmp_path):
    read = set()
    for n, layout in enumerate(LAYOUTS):
        (tmp_path / str(n)).mkdir()
        path = layout.build(tmp_path / str(n))
        read |= {name for name, reader in READERS.items() if reader.recognizes(path)}
    assert read == set(READERS.names()) - {"kmnist"}, "add a sample to tests/layouts.py"  # KMNIST: as MNIST


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Build each layout once; (path to give, its files)."""
    built = []
    for layout in LAYOUTS:
        root = tmp_path_factory.mktemp(layout.build.__name__)
        path = layout.build(root)
        built.append((path, sorted(file for file in root.rglob("*") if file.is_file())))
    return built


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_are_read_or_refused_in_one_line(samples, data):
    path, files = data.draw(st.sampled_from(samples))
    file = data.draw(st.sampled_from(files))
    content = file.read_bytes()
    size = sum(each.stat().st_size for each in files)
    if data.draw(st.booleans()):
        damaged = content[: data.draw(st.integers(0, len(content)))]
    else:
        damaged = bytearray(content)
        near = st.integers(0, min(200, len(content) - 1))  # headers lie there
        for place in data.draw(st.lists(near | st.integers(0, len(content) - 1), min_size=1, max_size=4)):
            damaged[place] = data.draw(st.integers(0, 255))
    file.write_bytes(damaged)
    tracemalloc.start()
    try:
        found = read_any(path)
        assert len(found.classes) <= size
    except UserError as error:
        assert len(error.problems) == 1 and len(str(error)) < 2000
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        file.write_bytes(content)
    assert peak < 3_000_000 + 20 * size


def test_a_data_set_is_found_by_name_among_others(tmp_path):
    for build in (cifar10_binary, cifar100_binary, mnist, fashion_mnist):
        build(tmp_path)
    for name, shape, classes in (
        ("cifar10", (3, 32, 32), 10),
        ("cifar100", (3, 32, 32), 100),
        ("mnist", (1, 28, 28), 10),
    ):
        splits = DATASETS.get(name)(path=tmp_path).load(0)
        assert splits.test.images.shape[1:] == shape and len(splits.classes) == classes
        assert any("FashionMNIST/raw" in note and "not read" in note for note in splits.notes)
    found = read_any(tmp_path)
    assert found.classes[0] == "airplane" and any("MNIST/raw" in note for note in found.notes)


@pytest.mark.parametrize("path", [".", "FashionMNIST", "FashionMNIST/raw", "FashionMNIST/raw/t10k-images-idx3-ubyte"])
def test_another_data_set_than_the_one_asked_for_is_refused(tmp_path, path):
    fashion_mnist(tmp_path)
    with pytest.raises(UserError, match="must hold mnist.*holds fashion_mnist.*--data.name auto"):
        DATASETS.get("mnist")(path=tmp_path / path).load(0)
    assert read_any(tmp_path / path).classes[0] == "T-shirt/top"


def test_what_else_lies_there_is_named(tmp_path):
    mnist(tmp_path)
    class_folders(tmp_path / "train", 3)
    found = read_any(tmp_path)
    assert found.classes == tuple(map(str, range(10)))
    assert any("train/CLASS" in note and "not read" in note for note in found.notes)


def test_a_folder_that_may_not_be_entered_holds_no_layout(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    mnist(tmp_path)
    for method in ("is_dir", "is_file"):
        monkeypatch.setattr(Path, method, refuse)
    assert not [name for name, reader in READERS.items() if auto.recognizes(reader, tmp_path)]
