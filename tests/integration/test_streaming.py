"""Training images that stay on the disk: the same images, in an order that is a function of the seed, in little memory."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import clead
from clead.config import load_recipe
from clead.data.channels import mean_std
from clead.data.datasets.parquet import Parquet
from clead.data.datasets.parquet_stream import ParquetStream
from clead.data.loaders import Loader, ViewSettings
from clead.data.streaming import StreamedImages
from clead.data.views import Augmentation
from clead.distributed import World
from clead.errors import UserError

SIZE = 12


def png(value: int, noise: np.random.RandomState, size: int = SIZE) -> bytes:
    buffer = io.BytesIO()
    image = np.clip(value + noise.randint(-20, 20, (size, size, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, blobs: list[bytes | None], labels: list[int], group: int = 16) -> None:
    struct = pa.array(
        [{"bytes": blob, "path": None} for blob in blobs], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    names = {"info": {"features": {"label": {"names": ["dark", "grey", "bright"]}}}}
    schema = pa.schema([("image", struct.type), ("label", pa.int64())], metadata={"huggingface": json.dumps(names)})
    pq.write_table(pa.table([struct, pa.array(labels, pa.int64())], schema=schema), path, row_group_size=group)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three training shards of 100 images, in row groups of 16, and a test shard; three classes by brightness."""
    noise = np.random.RandomState(0)
    for part, count, shards in (("train", 100, 3), ("test", 30, 1)):
        for shard in range(shards):
            labels = noise.randint(0, 3, count).tolist()
            write(
                tmp_path / f"{part}-{shard:05d}-of-{shards:05d}.parquet",
                [png(40 + 80 * k, noise) for k in labels],
                labels,
            )
    return tmp_path


def stream(folder: Path, **settings) -> ParquetStream:
    return ParquetStream(**{"path": folder, "image_size": SIZE, "shuffle_buffer": 40, "decode_workers": 2, **settings})


def everything(images) -> list[bytes]:
    return [image.numpy().tobytes() for part in images.split(50) for image in part]


def test_the_images_and_labels_are_those_that_memory_would_hold(folder):
    streamed, whole = stream(folder).load(0), Parquet(path=folder).load(0)
    assert streamed.classes == whole.classes == ("dark", "grey", "bright")
    assert isinstance(streamed.train.images, StreamedImages)
    for name in ("val", "test"):
        assert isinstance(getattr(streamed, name).images, torch.Tensor)
    assert torch.equal(streamed.test.images, whole.test.images) and torch.equal(streamed.test.labels, whole.test.labels)
    # Which are validation images differs; together they are the same images with the same labels.
    pairs = [
        sorted(
            (image, label)
            for part in (splits.train, splits.val)
            for image, label in zip(everything(part.images), part.labels.tolist(), strict=True)
        )
        for splits in (streamed, whole)
    ]
    assert pairs[0] == pairs[1]
    assert len(streamed.val) == 30


def test_positions_slices_and_masks_are_those_of_a_tensor(folder):
    images = stream(folder).load(0).train.images
    whole = torch.cat(list(images.split(64)))
    assert images.shape == whole.shape and len(images) == len(whole)
    index = torch.tensor([5, 200, 5, 0, 111])
    assert torch.equal(images[index], whole[index])
    assert torch.equal(images[3:70], whole[3:70])
    mask = torch.arange(len(whole)) % 7 == 0
    assert torch.equal(images[mask], whole[mask])
    assert torch.equal(images.at(index)[torch.tensor([1])], whole[200:201])
    assert images[torch.tensor([], dtype=torch.int64)].shape == (0, 3, SIZE, SIZE)


def test_an_epoch_has_every_image_once_and_mixes_within_windows_of_row_groups(folder):
    images = stream(folder).load(0).train.images
    order = images.shuffled(torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(len(images)))
    other = images.shuffled(torch.Generator().manual_seed(1))
    assert not torch.equal(order, other)
    groups = images.shards.group_of(images.rows.numpy())[order.numpy()]
    # No row group comes back once 2 windows (of fewer than 40 + 16 images) lie behind its first image.
    for group in np.unique(groups):
        places = np.flatnonzero(groups == group)
        assert places.max() - places.min() < 2 * 56
    assert (np.diff(groups) != 0).mean() > 0.4  # mixed, not group after group


def test_row_groups_are_read_once_per_epoch(folder, monkeypatch):
    train = stream(folder).load(0).train
    train.images.shards._kept.clear()  # what cutting validation images has read
    loader = Loader(train, 10, seed=3)
    reads: list[tuple[int, int]] = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, n, **k: reads.append(n) or read(self, n, **k))
    for index in range(loader.steps_per_epoch):
        loader.batch(0, index)
    groups = len(np.unique(train.images.shards.group_of(train.images.rows.numpy())))
    assert (
        groups <= len(reads) <= groups + 4
    )  # the last batch reads ahead: the next epoch's first, of a window of 3 or 4 groups


def test_processes_decode_their_own_images_and_together_have_what_one_has(folder, monkeypatch):
    train = stream(folder).load(0).train
    crop = Augmentation(crop=2, flip=True)
    options = {"seed": 3, "views": ViewSettings(crop, crop)}
    whole = Loader(train, 16, **options)
    parts = [Loader(train, 16, world=World(rank, 2), **options) for rank in range(2)]
    decoded = []
    read = type(train.images)._decoded
    monkeypatch.setattr(
        type(train.images), "_decoded", lambda self, rows: decoded.append(len(rows)) or read(self, rows)
    )
    monkeypatch.setattr(type(train.images), "prefetch", lambda self, rows: None)
    for index in range(3):
        expected = whole.batch(0, index)
        decoded.clear()
        batches = [loader.batch(0, index) for loader in parts]
        assert sum(decoded) == 16, "each decodes its own images only"
        for name in ("images", "labels", "second_view", "index"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in batches]), getattr(expected, name)), name


def test_batches_are_a_function_of_seed_and_place(folder):
    first, second = (Loader(stream(folder).load(0).train, 10, seed=3) for _ in range(2))
    straight = [first.batch(1, index) for index in range(first.steps_per_epoch)]
    for index in (7, 2, 2, 20):  # as after a resume: not from the start, not in order
        again = second.batch(1, index)
        assert torch.equal(again.images, straight[index].images) and torch.equal(again.labels, straight[index].labels)
    labels = torch.cat([batch.labels for batch in straight])
    brightness = torch.cat([batch.images.mean((1, 2, 3)) for batch in straight]) * 255
    assert ((brightness - (40 + 80 * labels)).abs() < 10).all()  # each image with its own label


@pytest.mark.slow
def test_training_stopped_in_the_middle_of_an_epoch_goes_on_bit_identically(folder, tmp_path):
    words = f"--data.name parquet_stream --data.path {folder} --data.image_size 12 --data.shuffle_buffer 40 --data.batch_size 16"
    words += " --train.budget 25 --train.checkpoint_seconds 0 --train.device cpu"
    config = load_recipe("digits-trades", words.split())
    whole = clead.train(config, out=tmp_path / "whole", show=False)
    code = f"""
import os, clead
from clead.data import loaders
plain, calls = loaders.Loader.batch, []
def batch(self, epoch, index, progress=0.0):
    calls.append(index)
    if len(calls) == 24:
        os._exit(9)
    return plain(self, epoch, index, progress)
loaders.Loader.batch = batch
clead.train(clead.load_recipe("digits-trades", {words.split()!r}), out={str(tmp_path / "cut")!r}, show=False)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert whole.outcome.steps > 24
    clead.train(config, out=tmp_path / "cut", resume=True, show=False)
    a, b = (clead.load(tmp_path / name, weights="last").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_mean_and_deviation_of_a_sample_are_near_those_of_all(folder):
    streamed, whole = stream(folder).load(0), Parquet(path=folder).load(0)
    for a, b in zip(mean_std(streamed), mean_std(whole), strict=True):
        assert np.allclose(a, b, atol=0.02)


@pytest.mark.slow
def test_memory_stays_flat_while_twenty_times_as_much_is_read(tmp_path):
    # 80 row groups of 50 images of 30 kB: 120 MB. Room: 2 windows of 100 images, 6 MB encoded; so a twentieth.
    noise = np.random.RandomState(0)
    for shard in range(4):
        blobs: list[bytes | None] = []
        for _ in range(1000):
            buffer = io.BytesIO()
            Image.fromarray(noise.randint(0, 256, (100, 100, 3), dtype=np.uint8)).save(buffer, "BMP")
            blobs.append(buffer.getvalue())
        write(tmp_path / f"train-{shard:05d}-of-00004.parquet", blobs, noise.randint(0, 3, 1000).tolist(), group=50)
    write(tmp_path / "test-00000-of-00001.parquet", blobs[:30], [0, 1, 2] * 10)
    code = f"""
import re
from pathlib import Path
import pyarrow
from clead.data.datasets.parquet_stream import ParquetStream
from clead.data.loaders import Loader
def used(kind): return int(re.search(kind + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
data = ParquetStream(path={str(tmp_path)!r}, image_size=8, shuffle_buffer=100, val_fraction=0.01)
loader = Loader(data.load(0).train, 20)
for index in range(10):
    loader.batch(0, index)
before = used("VmRSS")
for index in range(10, loader.steps_per_epoch):
    loader.batch(0, index)
print(before, used("VmHWM"), sum(file.stat().st_size for file in Path({str(tmp_path)!r}).glob("train*")) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, peak, size = map(float, done.stdout.split())
    cap = 6  # MB of encoded images, by shuffle_buffer
    assert size > 18 * cap
    assert peak - before < 4 * cap  # allocators keep some


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"labelled_share": 0.5, "labelled": 0.5}, "come as they lie, got 0.5"),
        ({"sampling": "balanced"}, "data.sampling: images that are streamed come as they lie, got balanced"),
        ({"extra": "more"}, "data.extra: images that are streamed come as they lie, got more"),
        ({"group_by": "patient"}, "cut by row groups, got 'patient'"),
        ({"path": "nowhere"}, "data.path must exist, got 'nowhere'"),
    ],
)
def test_settings_that_cannot_be_are_refused(folder, settings, says):
    with pytest.raises(UserError, match=says):
        stream(folder, **settings).load(0)


def test_an_empty_shard_is_named(folder):
    write(folder / "train-00001-of-00003.parquet", [], [])
    with pytest.raises(UserError, match=r"train-00001-of-00003\.parquet: holds no row"):
        stream(folder).load(0)


def test_a_truncated_shard_is_named(folder):
    file = folder / "train-00002-of-00003.parquet"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"train-00002-of-00003\.parquet: not a readable Parquet file"):
        stream(folder).load(0)


@pytest.mark.parametrize("reader", ["parquet_stream", "parquet"])
def test_a_flipped_bit_in_a_shard_with_checksums_is_named(folder, reader):
    file = folder / "train-00001-of-00003.parquet"
    pq.write_table(pq.read_table(file), file, row_group_size=16, compression="none", write_page_checksum=True)
    content = bytearray(file.read_bytes())
    at = content.index(b"IDAT", len(content) // 2) + 20  # in an image's data
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00001-of-00003\.parquet.*(CRC|checksum)"):
        if reader == "parquet":
            Parquet(path=folder).load(0)
        else:
            loader = Loader(stream(folder).load(0).train, 10)
            for index in range(loader.steps_per_epoch):
                loader.batch(0, index)


def test_a_shard_changed_between_epochs_is_named(folder):
    loader = Loader(stream(folder).load(0).train, 10)
    loader.batch(0, 0)
    for shard in range(3):
        file = folder / f"train-{shard:05d}-of-00003.parquet"
        table = pq.read_table(file)
        pq.write_table(table.slice(0, 99), file, row_group_size=16)
    with pytest.raises(UserError, match=r"train-0000\d-of-00003\.parquet: was changed while it was being read"):
        for index in range(loader.steps_per_epoch):
            loader.batch(1, index)


def test_shards_changed_between_a_run_and_its_resume_change_the_fingerprint(folder):
    before = stream(folder).load(0).fingerprint
    assert stream(folder).load(0).fingerprint == before
    noise = np.random.RandomState(5)
    write(
        folder / "train-00000-of-00003.parquet",
        [png(40 + 80 * (i % 3), noise) for i in range(100)],
        [i % 3 for i in range(100)],
    )
    assert stream(folder).load(0).fingerprint != before


def test_a_broken_image_is_named_by_file_and_row(folder):
    noise = np.random.RandomState(5)
    blobs: list[bytes | None] = [png(40 + 80 * (i % 3), noise) for i in range(100)]
    blobs[37] = b"no image"
    write(folder / "train-00001-of-00003.parquet", blobs, [i % 3 for i in range(100)])
    images = stream(folder).load(4).train.images
    with pytest.raises(UserError, match=r"train-00001-of-00003\.parquet row 37: not a readable image"):
        for _ in images.split(50):
            pass


def test_broken_images_are_left_out_counted_and_listed_only_if_the_user_said_so(folder, tmp_path, caplog, monkeypatch):
    noise = np.random.RandomState(1)
    blobs = [png(40 + 80 * (k % 3), noise) for k in range(60)]
    blobs[7], blobs[31] = blobs[7][:40], None
    write(folder / "train-00001-of-00003.parquet", blobs, [k % 3 for k in range(60)])
    monkeypatch.setenv("CLEAD_CACHE", str(tmp_path / "cache"))
    splits = ParquetStream(path=folder, shuffle_buffer=32, skip_unreadable=True).load(0)
    names = tuple(f"{folder / 'train-00001-of-00003.parquet'} row {row}" for row in (7, 31))
    assert splits.unreadable == names and "2 of 290 images cannot be read and are left out" in caplog.text
    assert len(splits.train.labels) + len(splits.val.labels) == 258
    stream = splits.train.images
    everything = stream[torch.arange(len(stream))]  # every image that is left can be read
    # Brightness tells the class, so labels still belong to their images.
    assert torch.equal(((everything.float().mean((1, 2, 3)) - 40) / 80).round().long(), splits.train.labels)
    caplog.clear()
    monkeypatch.setattr("clead.data.streaming.readable", None)  # remembered: no second pass
    again = ParquetStream(path=folder, shuffle_buffer=32, skip_unreadable=True).load(0)
    assert again.fingerprint == splits.fingerprint and again.unreadable == names and "looking once" not in caplog.text


def test_rows_that_lie_class_by_class_are_refused(tmp_path):
    noise = np.random.RandomState(0)
    labels = sorted(i % 3 for i in range(300))
    write(tmp_path / "train-00000-of-00001.parquet", [png(100, noise) for _ in labels], labels)
    write(tmp_path / "test-00000-of-00001.parquet", [png(100, noise) for _ in range(9)], [0, 1, 2] * 3)
    with pytest.raises(
        UserError, match=r"rows lie class by class \(the label changes in 0\.7% of the rows\), and only 40"
    ):
        stream(tmp_path).load(0)
    splits = stream(tmp_path, shuffle_buffer=300).load(0)  # all mix
    assert torch.bincount(splits.val.labels).tolist() == [10, 10, 10]


def test_validation_images_come_from_few_row_groups_by_class_in_proportion(folder, monkeypatch):
    reads: list[int] = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, n, **k: reads.append(n) or read(self, n, **k))
    splits = stream(folder, channels=3, limit_test=5).load(0)
    share = torch.bincount(torch.cat([splits.train.labels, splits.val.labels])) / 300
    assert ((torch.bincount(splits.val.labels) - 30 * share).abs() <= 1).all()
    assert (
        len(reads) <= 6 + 2
    )  # 30 images; a row group of 16 has about 5 of each class; 2 row groups are the test part's


def test_size_and_channels_are_those_of_the_first_image(tmp_path):
    noise = np.random.RandomState(0)
    labels = [0, 1, 2] * 20
    for part in ("train", "test"):
        write(tmp_path / f"{part}-00000-of-00001.parquet", [png(100, noise, 9) for _ in labels], labels)
    assert ParquetStream(path=tmp_path).load(0).train.images.shape[1:] == (3, 9, 9)
    assert ParquetStream(path=tmp_path, channels=1, image_size=5).load(0).train.images[:2].shape == (2, 1, 5, 5)


def test_a_validation_part_stands_for_a_test_part(folder):
    (folder / "test-00000-of-00001.parquet").rename(folder / "validation-00000-of-00001.parquet")
    assert len(stream(folder).load(0).test) == 30


@pytest.mark.slow
def test_imagenets_recipe_takes_a_step(tmp_path):
    noise = np.random.RandomState(0)
    labels = [0, 1, 2] * 4
    for part in ("train", "validation"):
        write(
            tmp_path / f"{part}-00000-of-00001.parquet", [png(40 + 80 * k, noise, 240) for k in labels], labels, group=4
        )
    options = [
        "--data.path",
        str(tmp_path),
        "--data.batch_size",
        "4",
        "--data.val_fraction",
        "0.34",
        "--train.epochs",
        "1",
    ]
    options += ["--train.device", "cpu", "--model.width", "8", "--train.precision", "float32"]
    run = clead.train(load_recipe("imagenet-resnet50-clead", options), out=tmp_path / "run", show=False)
    model = clead.load(run.path)
    with torch.inference_mode():
        assert model(torch.rand(2, 3, 224, 224)).shape == (2, 3)
    assert model.encoder.stem[0].kernel_size == (7, 7) if hasattr(model, "encoder") else True
