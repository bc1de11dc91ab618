"""Images with masks: every layout, joint augmentation, what is refused and how."""

from __future__ import annotations

import json
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from clead.data.classes import align_classes
from clead.data.datasets import DATASETS
from clead.data.inspection import inspect
from clead.data.loaders import Loader, ViewSettings
from clead.data.mask_layouts import MaskedImages
from clead.data.mask_layouts.cityscapes import CLASSES as CITYSCAPES
from clead.data.masks import decode_masks
from clead.data.views import Augmentation
from clead.errors import UserError
from clead.interfaces import ImageSet
from clead.losses.pixels import VOID
from support import encoded, generator

SIZE = (6, 8)


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def numbers(seed, classes=3):
    mask = np.random.default_rng(100 + seed).integers(0, classes, SIZE, dtype=np.uint8)
    mask[0, 0], mask[0, 1] = VOID, classes - 1
    return mask


def palette(mask):
    image = Image.fromarray(mask, "P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    return image


def write(folder, name, content):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else encoded(content))


def pairs(root, count=6, classes=3, split=""):
    for i in range(count):
        write(root / split, f"images/{i}.png", picture(i))
        write(root / split, f"masks/{i}.png", palette(numbers(i, classes)) if i % 2 else numbers(i, classes))
    return root


def load(path, **settings):
    return DATASETS.get("masks")(path=path, **settings).load(0)


def refused(path, **settings):
    with pytest.raises(UserError) as caught:
        load(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def every(splits):
    """Return (image, mask) bytes of all images."""
    sets = [splits.train, splits.val, splits.test]
    return {
        (x.numpy().tobytes(), y.numpy().tobytes())
        for each in sets
        for x, y in zip(each.images, each.labels, strict=True)
    }


def expected(count, classes=3):
    return {(picture(i).transpose(2, 0, 1).tobytes(), numbers(i, classes).tobytes()) for i in range(count)}


def test_folders_of_images_and_masks_of_one_name(tmp_path):
    pairs(tmp_path)
    (tmp_path / "classes.txt").write_text("sky\nroad\ntree\n")
    splits = load(tmp_path)
    assert splits.classes == ("sky", "road", "tree") and splits.origin == "train"
    assert every(splits) == expected(6) and splits.train.labels.dtype == torch.uint8


@pytest.mark.parametrize("splits_inside", [False, True])
def test_folders_with_splits(splits_inside, tmp_path):
    for i, split in enumerate(("train", "train", "train", "validation", "test", "test")):
        for kind, content in (("images", picture(i)), ("masks", numbers(i))):
            write(tmp_path, f"{kind}/{split}/a/{i}.png" if splits_inside else f"{split}/{kind}/a/{i}.png", content)
    splits = load(tmp_path)
    assert [len(each) for each in (splits.train, splits.val, splits.test)] == [3, 1, 2]
    assert every(splits) == expected(6) and splits.classes == ("0", "1", "2")


def test_parquet_files_with_names_of_the_classes(tmp_path):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    features = {"image": {"_type": "Image"}, "mask": {"_type": "Image"}, "classes": {"names": ["a", "b", "c"]}}
    for split, rows in (("train", range(4)), ("test", range(4, 6))):
        columns = {
            "image": [{"bytes": encoded(picture(i)), "path": None} for i in rows],
            "mask": [{"bytes": encoded(numbers(i)), "path": None} for i in rows],
        }
        table = pyarrow.table(columns).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
        parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    splits = load(tmp_path, val_fraction=0.25)
    assert splits.classes == ("a", "b", "c") and every(splits) == expected(6)
    assert [len(each) for each in (splits.train, splits.val, splits.test)] == [3, 1, 2]
    with pytest.raises(UserError, match="--data.name masks and --task segmentation"):
        DATASETS.get("parquet")(path=tmp_path).load(0)


def test_cityscapes_ids_become_its_19_classes(tmp_path):
    ids = np.resize(np.array([7, 33, 0, 26], np.uint8), SIZE)
    for split, city, count in (("train", "ulm", 3), ("val", "bonn", 2), ("test", "mainz", 1)):
        for i in range(count):
            write(tmp_path, f"leftImg8bit/{split}/{city}/{city}_{i}_leftImg8bit.png", picture(i))
            write(tmp_path, f"gtFine/{split}/{city}/{city}_{i}_gtFine_labelIds.png", ids * (split != "test"))
    splits = load(tmp_path)
    assert splits.classes == tuple(CITYSCAPES) and splits.origin == "val" and len(splits.test) == 2
    assert splits.test.labels[0].unique().tolist() == [0, 13, 18, VOID]
    assert any("all 1 masks of the test split are void" in note for note in splits.notes)
    (tmp_path / "gtFine/val/bonn/bonn_1_gtFine_labelIds.png").unlink()
    assert "bonn_1 of bonn has no mask (1 such files); fetch" in refused(tmp_path)


def test_pascal_voc_reads_its_lists_and_palettes(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for i in range(5):
        write(root, f"JPEGImages/{i}.jpg", encoded(picture(i), "JPEG"))
        write(root, f"SegmentationClass/{i}.png", palette(numbers(i, 21)))
    write(root, "ImageSets/Segmentation/train.txt", b"0\n1\n2\n")
    write(root, "ImageSets/Segmentation/val.txt", b"3\n")
    splits = load(tmp_path)
    assert splits.classes[20] == "tvmonitor" and len(splits.test) == 1
    assert splits.test.labels.numpy().tobytes() == numbers(3, 21).tobytes()
    write(root, "ImageSets/Segmentation/val.txt", b"3\n9\n")
    assert "val.txt names 2 files that are not there, such as" in refused(tmp_path)


def test_images_and_masks_are_resized_alike(tmp_path):
    pairs(tmp_path)
    splits = load(tmp_path, image_size=(3, 4))
    assert splits.train.images.shape[1:] == (3, 3, 4) and splits.train.labels.shape[1:] == (3, 4)
    nearest = {np.asarray(Image.fromarray(numbers(i)).resize((4, 3), 0)).tobytes() for i in range(6)}
    assert {mask for _, mask in every(splits)} == nearest
    assert load(tmp_path, image_size=5).train.images.shape[1:] == (3, 5, 5)


def test_names_may_be_given_and_may_be_more_than_are_seen(tmp_path):
    assert load(pairs(tmp_path), classes=["a", "b", "c", "d"]).classes == ("a", "b", "c", "d")
    report, _ = inspect(DATASETS.get("masks")(path=tmp_path, classes=["a", "b", "c"]))
    assert report.problems == [] and list(report.classes) == ["a", "b", "c"]


def test_a_list_of_names_puts_named_classes_into_its_order(tmp_path):
    pairs(tmp_path)
    (tmp_path / "classes.txt").write_text("sky\nroad\ntree\n")
    splits = load(tmp_path, classes=["car", "tree", "Sky", "road"])
    assert splits.classes == ("car", "tree", "Sky", "road") and splits.train.labels.dtype == torch.uint8
    table = np.full(256, VOID, np.uint8)
    table[:3] = 2, 3, 1
    assert every(splits) == {(picture(i).transpose(2, 0, 1).tobytes(), table[numbers(i)].tobytes()) for i in range(6)}
    assert "data.classes lacks 'tree'" in refused(tmp_path, classes=["sky", "road"])
    scenes = DATASETS.get("digit_scenes")(limit_train=40, limit_test=20, classes=[*"0123456789", "canvas"]).load(0)
    assert scenes.test.labels.flatten(1).mode(1).values.unique().tolist() == [10]


def test_test_images_alone_take_names_and_the_order_of_a_model(tmp_path):
    pairs(tmp_path, split="test")
    data = DATASETS.get("masks")(path=tmp_path, classes=["a", "b", "c"])
    splits = data.load(0, training=False)
    assert splits.classes == ("a", "b", "c") and len(splits.test) == 6
    aligned, _ = align_classes(splits, ("c", "d", "a", "b"), names_must_agree=True)
    table = np.full(256, VOID, np.uint8)
    table[:3] = 2, 3, 0
    assert aligned.classes == ("c", "d", "a", "b")
    assert {mask for _, mask in every(aligned)} == {table[numbers(i)].tobytes() for i in range(6)}
    with pytest.raises(UserError, match="the data has b, which it does not know"):
        align_classes(splits, ("a", "c"), names_must_agree=True)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_masks_of_few_bits_hold_class_numbers(bits, tmp_path):
    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    mask = np.random.default_rng(0).integers(0, min(2**bits, 5), SIZE, dtype=np.uint8)
    lines = np.unpackbits(mask[..., None], axis=2)[..., -bits:].reshape(SIZE[0], -1)
    rows = b"".join(b"\0" + np.packbits(line).tobytes() for line in lines)
    header = SIZE[1].to_bytes(4, "big") + SIZE[0].to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    png = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    files = MaskedImages([encoded(picture(0))], [b"\x89PNG\r\n\x1a\n" + png], ["a"], ["b"])
    assert np.array_equal(decode_masks(files, None, None)[0].numpy(), mask)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_tiff_masks_of_few_bits_hold_class_numbers(bits):
    mask = np.random.default_rng(0).integers(0, min(2**bits, 5), SIZE, dtype=np.uint8)
    lines = np.unpackbits(mask[..., None], axis=2)[..., -bits:].reshape(SIZE[0], -1)
    pixels = b"".join(np.packbits(line).tobytes() for line in lines)
    # width, height, bits, no compression, 0 is black, where the pixels begin, one channel, rows of a strip, its bytes
    tags = {256: SIZE[1], 257: SIZE[0], 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: SIZE[0], 279: len(pixels)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    tiff = b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + directory + bytes(4)
    files = MaskedImages([encoded(picture(0))], [tiff], ["a"], ["b"])
    assert np.array_equal(decode_masks(files, None, None)[0].numpy(), mask)


def test_few_images_in_groups_leave_a_group_for_validation(tmp_path):
    splits = load(pairs(tmp_path), group_by="([0-9])[.]png", val_fraction=0.02)
    assert [len(each) for each in (splits.train, splits.val, splits.test)] == [4, 1, 1]


def test_numbers_with_gaps_are_noted(tmp_path):
    for i in range(6):
        write(tmp_path, f"images/{i}.png", picture(i))
        write(tmp_path, f"masks/{i}.png", np.where(numbers(i) == VOID, VOID, numbers(i) % 2 * 100).astype(np.uint8))
    note = (
        "the masks have the numbers 0, 100, so there are 101 classes, 99 of them without a pixel; if these are no class"
    )
    assert [each for each in load(tmp_path).notes if note in each]
    assert load(tmp_path, classes=[f"c{k}" for k in range(101)]).classes[100] == "c100"


SMALLER = {"images": slice(None), "masks": 0}
WRONG = {
    "size": (lambda root: write(root, "masks/1.png", numbers(1)[:, :4].copy()), "the mask is 4x6 pixels, its image"),
    "classes": (
        lambda root: (root / "classes.txt").write_text("a\nb\n"),
        "masks must be in [0, 2), one number per class (a, b)",
    ),
    "no mask": (
        lambda root: os.remove(root / "masks/1.png"),
        "has no mask; images and masks belong together by name: add ",
    ),
    "no image": (lambda root: os.remove(root / "images/1.png"), "has no image; images and masks"),
    "colours": (
        lambda root: write(root, "masks/1.png", picture(1)),
        "must hold class numbers, as a grey or palette PNG, got col",
    ),
    "jpeg": (
        lambda root: write(root, "masks/1.png", encoded(numbers(1), "JPEG")),
        "JPEG changes the numbers of a mask",
    ),
    "broken": (lambda root: write(root, "masks/1.png", b"\x89PNG"), "not a readable mask"),
    "many": (
        lambda root: write(root, "masks/1.png", numbers(1).astype(np.uint16) * 300),
        "must be in [0, 255], got 0 to",
    ),
    "negative": (
        lambda root: write(root, "masks/1.png", encoded(-numbers(1).astype(np.int32), "TIFF")),
        "got -255 to 0",
    ),
    "twice": (lambda root: write(root, "images/1.jpg", encoded(picture(1), "JPEG")), "remove one: rm "),
    "sizes": (
        lambda root: [write(root, f"{kind}/1.png", picture(1)[:5, :, row]) for kind, row in SMALLER.items()],
        "resize all alike",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_masks_that_do_not_fit_are_refused_by_name(case, tmp_path):
    pairs(tmp_path)
    change, text = WRONG[case]
    change(tmp_path)
    message = refused(tmp_path)
    assert text in message and str(tmp_path) in message


def test_void_masks_are_left_out_and_a_data_set_of_them_is_refused(tmp_path):
    pairs(tmp_path)
    write(tmp_path, "masks/1.png", np.full(SIZE, VOID, np.uint8))
    splits = load(tmp_path)
    assert sum(map(len, (splits.train, splits.val, splits.test))) == 5
    assert any(
        "1 images of the train split are left out, because their masks are all void" in note for note in splits.notes
    )
    for i in range(6):
        write(tmp_path, f"masks/{i}.png", np.full(SIZE, VOID, np.uint8))
    assert "masks must have a pixel with a class" in refused(tmp_path, classes=["a", "b"])
    for i in range(6):
        write(tmp_path, f"masks/{i}.png", np.where(numbers(i) == 0, VOID, 0).astype(np.uint8))
    assert "if 255 is a class, write 1 for it" in refused(tmp_path)


def test_settings_for_one_class_per_image_are_refused(tmp_path):
    data = DATASETS.get("masks")(path=pairs(tmp_path), cutmix=1.0, labelled=0.5, sampling="balanced")
    assert [each.split(":")[0] for each in data.problems()] == ["data.cutmix", "data.sampling", "data.labelled"]
    assert not DATASETS.get("digit_scenes")().problems()


def test_masks_are_not_taken_for_classes(tmp_path):
    with pytest.raises(UserError, match="look like images and their masks.*give --data.name masks"):
        DATASETS.get("auto")(path=pairs(tmp_path)).load(0)
    assert "layouts that are read: " in refused(tmp_path / "images")


def test_scenes_of_digits_are_compositions_with_masks():
    splits = DATASETS.get("digit_scenes")(limit_train=40, limit_test=20).load(0)
    assert splits.classes == ("canvas", *map(str, range(10))) and "compositions" in splits.notes[0]
    assert splits.train.images.shape[1:] == (3, 32, 32) and splits.train.labels.shape[1:] == (32, 32)
    digits = [len(set(mask.unique().tolist()) - {0, VOID}) for mask in splits.test.labels]
    assert min(digits) >= 1 and max(digits) <= 5 and max(digits) >= 3


def test_geometric_augmentation_moves_images_and_masks_alike():
    masks = torch.randint(0, 5, (64, 12, 12), generator=generator()).where(
        torch.rand(64, 12, 12, generator=generator(1)) > 0.1, torch.tensor(VOID)
    )
    images = (masks[:, None].float() / 255).repeat(1, 3, 1, 1)  # an image that says what its mask is
    views = Augmentation(crop=2, flip=True, cutout=5)
    x, y = views.with_masks(images, masks, generator=generator(2))
    assert torch.equal(x, views(images, generator=generator(2)))
    known = y != VOID
    assert torch.equal((x[:, 0] * 255).round().long()[known], y[known])
    assert (x[:, 0] == 0)[~known].float().mean() > 0.5 and not torch.equal(y, masks)
    boxes = Augmentation(random_resized_crop=(0.2, 0.5))
    halves = torch.zeros(64, 12, 12, dtype=torch.int64)
    halves[:, :, 6:] = 3
    x, y = boxes.with_masks((halves[:, None] / 3).repeat(1, 3, 1, 1), halves, generator=generator(3))
    clear = (x[:, 0] - 0.5).abs() > 0.02
    assert set(y.unique().tolist()) == {0, 3} and torch.equal((x[:, 0] > 0.5).long()[clear] * 3, y[clear])


def test_batches_have_masks_moved_with_their_images():
    masks = torch.randint(0, 5, (10, 8, 8), generator=generator(), dtype=torch.uint8)
    images = ImageSet(masks[:, None].repeat(1, 3, 1, 1), masks)
    batch = Loader(images, 4, seed=1, views=ViewSettings(first=Augmentation(flip=True))).batch(0, 0)
    assert batch.labels.dtype == torch.int64 and batch.labels.shape == (4, 8, 8)
    assert torch.equal((batch.images[:, 0] * 255).round().long(), batch.labels)
    assert not torch.equal(batch.labels.byte(), masks[batch.index])
