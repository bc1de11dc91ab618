"""What every registered dataset must do; a new one is picked up by its name."""

import io
import json
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from clead.data.base import InMemoryDataset
from clead.data.datasets import DATASETS
from clead.losses.pixels import VOID

SHAPES = {"mnist": (1, 28, 28), "digits": (1, 8, 8)}
CLASSES = {"cifar100": 100}


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CLEAD_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def arrays(classes, per_class, shape, seed):
    images = np.random.RandomState(seed).randint(0, 256, (classes * per_class, *shape), dtype=np.uint8)
    return images, np.tile(np.arange(classes), per_class)


def png(image):
    buffer = io.BytesIO()
    image = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def make(name, tmp_path):
    """Return the dataset over small generated data, and what its test images must be (None: unknown)."""
    cls = DATASETS.get(name)
    if "path" not in {field.name for field in fields(cls)}:
        return cls(), None
    shape, classes = SHAPES.get(name, (3, 8, 8)), CLASSES.get(name, 10)
    (x_train, y_train), (x_test, y_test) = arrays(classes, 6, shape, 0), arrays(classes, 2, shape, 1)
    if name in ("parquet", "parquet_stream", "multilabel"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
            labels = y if name != "multilabel" else [[f"c{label}"] for label in y]
            table = pa.table({"img": [{"bytes": png(i), "path": None} for i in x], "label": labels})
            info = {"info": {"features": {"label": {"names": [f"c{k}" for k in range(classes)]}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
            pq.write_table(table, tmp_path / f"{part}-00000-of-00001.parquet")
        return cls(path=tmp_path), x_test
    if name == "folder":
        for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
            for row, (image, label) in enumerate(zip(x, y, strict=True)):
                folder = tmp_path / part / f"c{label}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{row:03}.png").write_bytes(png(image))
        return cls(path=tmp_path), x_test[np.argsort(y_test, kind="stable")]
    if name == "masks":
        for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
            for row, (image, label) in enumerate(zip(x, y, strict=True)):
                for kind, content in (("images", image), ("masks", np.full((1, *shape[1:]), label, np.uint8))):
                    file = tmp_path / part / kind / f"{row:03}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(png(content))
        return cls(path=tmp_path), x_test
    np.savez(tmp_path / "data.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return cls(path=tmp_path / "data.npz"), x_test


@pytest.mark.parametrize("name", DATASETS.names())
def test_keys_are_documented_settings(name):
    cls = DATASETS.get(name)
    assert is_dataclass(cls) and issubclass(cls, InMemoryDataset) and cls.__doc__
    assert cls.__mro__[1] is InMemoryDataset, "one abstract parent, no deeper"
    for key, field in cls.__pydantic_fields__.items():
        assert field.description, f"{name}.{key} has no documentation"


@pytest.mark.parametrize("name", DATASETS.names())
def test_splits_are_complete_disjoint_and_seeded(name, tmp_path):
    dataset, expected_test = make(name, tmp_path)
    splits, again, other = dataset.load(0), dataset.load(0), dataset.load(1)
    for part in (splits.train, splits.val, splits.test):
        images = part.images[:]  # some are streamed
        assert images.dtype == torch.uint8 and images.ndim == 4 and images.is_contiguous()
        labels = part.labels if part.labels.dim() < 3 else part.labels[part.labels != VOID].long()
        assert labels.dtype == torch.int64 and len(part.images) == len(part.labels) > 0
        assert labels.min() >= 0 and labels.max() < len(splits.classes)
        assert part.labels.dim() < 3 or part.labels.shape[1:] == images.shape[2:]  # masks
    assert splits.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(splits.train.images[:], again.train.images[:])
    # The seed moves images between training and validation only.
    assert torch.equal(splits.test.images, other.test.images)
    assert not torch.equal(splits.val.images, other.val.images)
    rows = [sorted(map(bytes, torch.cat([s.train.images[:], s.val.images]).numpy())) for s in (splits, other)]
    assert rows[0] == rows[1]
    if expected_test is not None:
        assert np.array_equal(splits.test.images.numpy(), expected_test)
        everything = torch.cat([splits.train.images[:], splits.val.images])
        assert len({bytes(image) for image in everything.numpy()}) == len(everything)  # none lost, none doubled


@pytest.mark.parametrize("name", DATASETS.names())
def test_every_common_key_changes_the_result(name, tmp_path):
    dataset, _ = make(name, tmp_path)
    cls, plain = type(dataset), dataset.load(0)
    path = {"path": dataset.path} if hasattr(dataset, "path") else {}
    k = len(plain.classes)
    limited = cls(**path, limit_train=4 * k, limit_test=k, val_fraction=0.25).load(0)
    assert (len(limited.train), len(limited.val), len(limited.test)) == (3 * k, k, k)
    if limited.val.labels.dim() == 1:  # by class, where there is one for each image
        assert torch.bincount(limited.val.labels).tolist() == [1] * k
    whole = len(plain.train) + len(plain.val)
    all_but_one = cls(**path, limit_train=whole - 1, limit_test=len(plain.test) + 1).load(0)
    assert len(all_but_one.train) + len(all_but_one.val) == whole - 1
    assert len(all_but_one.test) == len(plain.test)
    big = cls(**path, image_size=16, channels=3).load(0)
    assert big.train.images.shape[1:] == big.test.images.shape[1:] == (3, 16, 16)
    assert plain.train.labels.dim() < 3 or big.train.labels.shape[1:] == big.test.labels.shape[1:] == (16, 16)
    grey = cls(**path, channels=1).load(0)
    assert grey.train.images.shape[1] == 1
