"""Parquet files in Hugging Face's layout whose training images do not fit into memory."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from clead.data.base import (
    InMemoryDataset,
    RawSplit,
    RawSplits,
    Role,
    check,
    renumber,
    resolve_path,
    say_left_out,
    say_remarks,
)
from clead.data.classes import number_labels
from clead.data.datasets import DATASETS
from clead.data.datasets.parquet import (
    IMAGE,
    LABEL,
    ParquetFiles,
    by_name,
    choose_column,
    class_names,
    label_column,
    parquet_files,
)
from clead.data.datasets.parquet import unread as _skipped
from clead.data.decoding import ResizeSpec, decode
from clead.data.duplicates import digests_of, repeats
from clead.data.label_sampling import hide_labels, stratified
from clead.data.streaming import Shards, StreamedImages, unreadable
from clead.errors import UserError
from clead.interfaces import ImageSet, Splits
from clead.settings import setting, settings

_LIMIT_SEED = 0


@DATASETS.register("parquet_stream")
@settings
class ParquetStream(InMemoryDataset):
    """Parquet files as for parquet; training images stay on the disk and are decoded batch by batch.

    Labels, validation and test images are in memory: set limit_test and a small val_fraction. Without test-*.parquet, test images
    are those of validation-*.parquet. Rows should be written in random order and in row groups of some hundred images: an epoch
    takes row groups in random order and mixes the images of a window of them.

    Size and channels are those of the first image, unless image_size and channels say otherwise. Validation images are cut from as
    few row groups as have enough of every class.
    """

    path: Path = setting(..., "The folder that holds the Parquet files.")
    shuffle_buffer: int = setting(
        8192,
        "Images among which an epoch mixes; two windows of so many are kept in memory, encoded.",
        unit="images",
        ge=1,
    )
    decode_workers: int | None = setting(None, "Threads that decode images; None: one per core.", unit="threads", ge=1)

    def read(self) -> RawSplits:
        """Refuse: ``load`` reads, batch by batch, images that do not fit into memory."""
        raise UserError("data.name parquet_stream reads batch by batch; use --data.name parquet to look at it")

    def load(self, seed: int, *, training: bool = True) -> Splits:
        """Return the splits, with training images that are read later; see ``InMemoryDataset.load`` and this class."""
        self._refuse_settings()
        files = parquet_files(resolve_path(self.path))
        splits, origin, notes = _roles(files)
        fit = None
        images, values, names, left_out = {}, {}, [], []
        for role, raw in splits.items():
            (image, label), more = _columns(files.folder, role, raw)
            notes += [note for note in more if note not in notes]
            shards = Shards(raw, image, self.shuffle_buffer)
            fit = fit or self._fit(shards)
            values[role] = np.concatenate([label_column(file, label) for file in raw])
            names += [class_names(file, label) for file in raw]
            rows = torch.arange(shards.rows)
            if self.skip_unreadable:
                broken = unreadable(shards, fit)
                left_out += [shards.name(row) for row in rows[broken].tolist()]
                rows, values[role] = rows[~broken], values[role][~broken.numpy()]
            workers = self.decode_workers or os.cpu_count() or 1
            images[role] = StreamedImages(shards, rows, fit, buffer=self.shuffle_buffer, workers=workers)
        assert fit is not None
        if left_out:
            say_left_out(left_out, sum(map(len, values.values())) + len(left_out))
        labels, classes, more = _number(files.folder, names, values)
        parts = {role: RawSplit([], each) for role, each in labels.items()}
        raw = RawSplits(parts["train"], parts["test"], classes, parts.get("val"), notes=(*notes, *more))
        check(raw, limit_train=self.limit_train)
        notes = raw.notes
        if self.classes is not None:
            order = renumber(raw, self.classes)
            labels = {role: order(each) for role, each in labels.items()}
            classes, notes = order.classes, (*notes, *order.notes)
        train = ImageSet(images["train"], labels["train"])
        test = ImageSet(images["test"], labels["test"])
        if self.limit_train is not None and self.limit_train < len(train):
            train = train.subset(stratified(train.labels, self.limit_train, _LIMIT_SEED, least=2, spare=0)[0])
        if self.limit_test is not None and self.limit_test < len(test):
            test = test.subset(stratified(test.labels, self.limit_test, _LIMIT_SEED, least=0, spare=0)[0])
        self._check_order(labels["train"].numpy())
        if "val" in images:
            val, rest = ImageSet(images["val"], labels["val"]), torch.arange(len(train))
        else:
            val, rest = self._validation(train, seed)
        digest = hashlib.sha256(repr((classes, self.limit_train, self.limit_test, tuple(fit)[:3])).encode())
        for split in ("train", "test") if "val" not in images else ("train", "val", "test"):
            digest.update(images[split].shards.fingerprint.encode())
            digest.update(images[split].rows.numpy() if left_out else b"")
            digest.update(labels[split].numpy())
        digest.update(val.images.rows.numpy())
        train = hide_labels(train.subset(rest), self.labelled, self.label_noise, len(classes), seed)
        streamed: tuple[StreamedImages, ...] = (val.images, test.images)
        val, test = _decoded(val), _decoded(test)
        remarks = streamed[0].remarks + streamed[1].remarks
        notes = (
            *notes,
            *say_remarks(remarks, self.background),
            *repeats([val, test], digests_of(val.images) + digests_of(test.images)),
        )
        skipped = _skipped(resolve_path(self.path), {file.resolve() for raw in splits.values() for file in raw})
        return Splits(
            train, val, test, classes, digest.hexdigest(), tuple(left_out), skipped=skipped, notes=notes, origin=origin
        )

    def _refuse_settings(self) -> None:
        """Raise UserError for a setting that images cannot have which are read as they lie."""
        if self.labelled_share is not None:
            raise UserError(
                f"data.labelled_share: images that are streamed come as they lie, got {self.labelled_share:g}; leave it out, "
                "or use --data.name parquet"
            )
        if self.sampling != "shuffled" or self.extra is not None:
            key, value = ("sampling", self.sampling) if self.extra is None else ("extra", self.extra)
            raise UserError(
                f"data.{key}: images that are streamed come as they lie, got {value}; leave it out, or use --data.name parquet"
            )
        if self.only is not None:
            raise UserError(
                f"data.only: streamed images come without columns, got {self.only!r}; use --data.name parquet"
            )
        if self.keep_classes is not None:
            raise UserError(
                f"data.keep_classes: images that are streamed come as they lie, got {self.keep_classes!r}; leave it out, or use "
                "--data.name parquet"
            )
        if self.group_by is not None:
            raise UserError(
                f"data.group_by: validation images that are streamed are cut by row groups, got {self.group_by!r}; leave it out "
                "and write the images of a group into one row group, or use --data.name parquet"
            )

    def _fit(self, shards: Shards) -> ResizeSpec:
        """Return side and channels: what is set, else those of the first image (that can be read, with skip_unreadable)."""
        if self.image_size is not None and self.channels is not None:
            return ResizeSpec(self.image_size, self.resize, self.channels, self.background)
        row = 0
        while True:
            try:
                first = decode(shards.blobs(np.array([row])), [shards.name(row)], ResizeSpec())
                break
            except UserError:
                if not self.skip_unreadable or row == shards.rows - 1:
                    raise
                row += 1
        _, channels, height, width = first.shape
        if self.image_size is None and height != width:
            raise UserError(
                f"{shards.name(row)}: the image is {width}x{height} pixels, and images that are streamed must be square; set "
                f"--data.image_size, for instance {min(height, width)}"
            )
        return ResizeSpec(
            self.image_size or height, self.resize, self.channels or (1 if channels == 1 else 3), self.background
        )

    def _check_order(self, labels: np.ndarray) -> None:
        """Raise UserError if rows lie class by class, so that images which mix would have one class."""
        shares = np.bincount(labels) / len(labels)
        changes = np.count_nonzero(np.diff(labels)) / len(labels)
        if len(labels) > self.shuffle_buffer and changes < 0.1 * (1 - (shares**2).sum()):
            raise UserError(
                f"{self.path}: training rows lie class by class (the label changes in {changes:.1%} of the rows), and only "
                f"{self.shuffle_buffer} images mix; write the rows in random order, or raise --data.shuffle_buffer"
            )

    def _validation(self, train: ImageSet, seed: int) -> tuple[ImageSet, Tensor]:
        """Return validation images, by class in proportion and from as few row groups as that takes, and which others are left."""
        labels = train.labels.numpy()
        count = round(self.val_fraction * len(labels))
        wanted = np.bincount(labels[stratified(train.labels, count, seed)[0].numpy()], minlength=labels.max() + 1)
        stream: StreamedImages = train.images
        groups = stream.shards.group_of(stream.rows.numpy())
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
        place = np.empty(int(groups.max()) + 1, dtype=np.int64)
        turns = random.permutation(np.unique(groups))
        place[turns] = np.arange(len(turns))
        order = np.lexsort((random.permutation(len(labels)), place[groups]))
        chosen = np.zeros(len(labels), dtype=bool)
        for label, amount in enumerate(wanted):
            chosen[order[labels[order] == label][:amount]] = True
        return train.subset(torch.from_numpy(np.flatnonzero(chosen))), torch.from_numpy(np.flatnonzero(~chosen))


def _decoded(image_set: ImageSet) -> ImageSet:
    return dataclasses.replace(image_set, images=torch.cat(list(image_set.images.split(512))))


def _roles(files: ParquetFiles) -> tuple[dict[Role, list[Path]], Literal["test", "val"], list[str]]:
    """Return the files of the splits that are used, what the test images are, and notes; UserError without train or test."""
    splits = dict(files.splits)
    if files.unsplit or "train" not in splits or len(splits) == 1:
        there = "files without a split" if files.unsplit else f"only {' and '.join(splits)}"
        raise UserError(
            f"{files.folder} must hold train-*.parquet and test-*.parquet (or validation-*.parquet) to be streamed, got "
            f"{there}; add the others, or use --data.name parquet"
        )
    if "test" in splits:
        return splits, "test", []
    note = "there is no test split, so the test images are those of the validation split"
    return {"train": splits["train"], "test": splits["val"]}, "val", [note]


def _columns(folder: Path, role: str, files: list[Path]) -> tuple[tuple[str, str], list[str]]:
    """Return the columns of images and labels of a split's files, and notes; UserError if the files differ."""
    chosen = [(choose_column(file, IMAGE), choose_column(file, LABEL)) for file in files]
    if len({(image, label) for (image, _), (label, _) in chosen}) > 1:
        raise UserError(f"{folder}: the {role} files name their columns differently; rewrite them with the same names")
    (image, note), (label, other) = chosen[0]
    return (image, label), [each for each in (note, other) if each is not None]


def _number(
    folder: Path, names: list[list[str] | None], values: dict[Role, np.ndarray]
) -> tuple[dict[Role, Tensor], tuple[str, ...], tuple[str, ...]]:
    """Return the labels as class numbers, the class names and notes; UserError if the files name different classes."""
    if any(each != names[0] for each in names):
        raise UserError(f"{folder}: the files name different classes; rewrite them with one list")
    if names[0] is not None:
        return {role: by_name(folder, each, names[0]) for role, each in values.items()}, tuple(names[0]), ()
    numbered, classes, notes = number_labels(*values.values())
    return dict(zip(values, numbered, strict=True)), classes, notes
