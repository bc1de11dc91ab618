"""The one parent of all datasets: read, check, decode, split, fingerprint."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from clead.data.bounded import read_file
from clead.data.classes import ClassNames, Renumbering, class_counts, match_names, renumbering
from clead.data.decoding import REMARKS, ResizeSpec, decode, fit_arrays, readable
from clead.data.duplicates import HASHED, Split, digests_of, find_duplicates, repeats
from clead.data.groups import cut_groups, group_names, shared_groups
from clead.data.label_sampling import hide_labels, label_keys, strata, stratified
from clead.data.views import Augmentation
from clead.errors import UserError, did_you_mean, memory_of, printable
from clead.interfaces import ImageSet, Splits
from clead.renamed import old_names
from clead.settings import setting, settings

_log = logging.getLogger("clead")
_NAMED = 10  # unreadable images that a warning names
_TEST_SEED = 0  # of the test images that are cut from training images
_LIMIT_SEED = 0  # which images a limit keeps does not depend on the run's seed
_GROUP = "data.group_by"  # the column of a part that says which images belong together
_MOST_CLASSES = 1_000_000
T = TypeVar("T")

Role = Literal["train", "val", "test"]
_SPLITS: dict[str, Role] = {
    **dict.fromkeys(("train", "training", "trainval", "trainset", "trainingset"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation", "valset", "validationset"), "val"),
    **dict.fromkeys(("test", "testing", "holdout", "heldout", "testset"), "test"),
}
_ALL_SPLITS = ("set", "sets", "data", "dataset", "images", "image", "imgs", "img", "split")  # what names of splits add


def split_role(name: str) -> Role | None:
    """Return what a split of this name is for; None if it is no name of a split.

    >>> split_role("Validation"), split_role("train_set"), split_role("val2017"), split_role("train_station")
    ('val', 'train', 'val', None)
    """
    return split_words(name)[0] if not split_words(name)[1] else None


def split_words(name: str) -> tuple[Role | None, str]:
    """Return the split that a word of a name says, None if none or several do, and the other words that name no kind of data.

    >>> split_words("seg_train"), split_words("held-out"), split_words("TestImages"), split_words("dogs")
    (('train', 'seg'), ('test', ''), ('test', ''), (None, 'dogs'))
    """
    tokens = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_]+", name)]
    if whole := _SPLITS.get("".join(tokens)):
        return whole, ""
    roles = {_SPLITS[word] for word in tokens if word in _SPLITS}
    if len(roles) != 1:
        return None, " ".join(tokens)
    return roles.pop(), " ".join(word for word in tokens if word not in _SPLITS and word not in _ALL_SPLITS)


@dataclass(frozen=True)
class RawSplit:
    """One split as a reader found it, not yet decoded.

    Args:
        images: decoded (N, C, H, W) uint8 with C 1 or 3, or the bytes of N image files.
        labels: (N,) int64, or the targets of another task: (N, L) of several labels, (N, H, W) of a mask.
        names: what to call each image in an error, such as its path; for decoded images empty.
        columns: other values of each image, such as a scene or a patient, as text: name -> N values.
    """

    images: Tensor | list[bytes]
    labels: Tensor
    names: Sequence[str] = ()
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def subset(self, index: Tensor) -> RawSplit:
        """Return the images at ``index``, (n,) int64."""
        chosen = index.tolist()
        images = self.images[index] if isinstance(self.images, Tensor) else [self.images[i] for i in chosen]
        names = [self.names[i] for i in chosen] if self.names else ()
        columns = {key: [values[i] for i in chosen] for key, values in self.columns.items()}
        return RawSplit(images, self.labels[index], names, columns)


NO_IMAGES = RawSplit([], torch.zeros(0, dtype=torch.int64))


class RawSplits(NamedTuple):
    """What a reader returns, not yet checked.

    Args:
        train: training images.
        test: test images.
        classes: the K class names; label k is of the class ``classes[k]``.
        val: validation images, if the data set has a split of its own for them.
        skipped: one line for each file that is there and was not read: ``"PATH: reason"``.
        notes: what a user must know to understand a figure on these images, one sentence each.
        ordered: whether the data set itself says the order of its classes (a list of names, numbered labels), so that no reader
            had to guess it from the names of folders.
        unsplit: whether ``train`` holds all images of data that knows no splits, so that to evaluate a model all of them serve.
    """

    train: RawSplit = NO_IMAGES
    test: RawSplit = NO_IMAGES
    classes: tuple[str, ...] = ()
    val: RawSplit | None = None
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ordered: bool = False
    unsplit: bool = False

    @property
    def parts(self) -> dict[str, Any]:
        """The splits that there are."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return {role: split for role, split in splits.items() if split is not None}


def read_files(
    files: Sequence[str | Path], labels: Tensor, columns: Mapping[str, Sequence[str]] | None = None
) -> RawSplit:
    """Return image files with their labels, (N,) int64; raises UserError if one cannot be read."""
    return RawSplit([read_file(Path(file)) for file in files], labels, [str(file) for file in files], columns or {})


@settings
class InMemoryDataset(ABC):
    """Labelled images. A dataset is one file in ``datasets/`` with a ``read`` method."""

    batch_size: int = setting(128, "Images per training step.", unit="images", ge=1)
    val_fraction: float = setting(
        0.1,
        "Part of the training images kept back to choose the best epoch; test images never choose anything.",
        unit="fraction",
        gt=0,
        le=0.5,
    )
    limit_train: int | None = setting(
        None,
        "Keep so many training images (before validation is cut), evenly by class; for quick trials.",
        unit="images",
        ge=1,
    )
    limit_test: int | None = setting(
        None, "Keep so many test images, evenly by class; for quick trials.", unit="images", ge=1
    )
    image_size: int | None = setting(
        None, "Resize images to a square of this side; by default they must all have one size.", unit="pixels", ge=1
    )
    resize: Literal["squash", "crop"] = setting(
        "squash", "How to make them square: squash both sides, or resize the shorter one and crop the centre."
    )
    channels: Literal[1, 3] | None = setting(
        None, "Channels: 1 (grey) or 3 (RGB); by default 1 if every image is grey, else 3."
    )
    background: Literal["white", "black"] = setting("white", "What transparent pixels are composed on.")
    skip_unreadable: bool = setting(
        False,
        "Leave out image files that cannot be decoded instead of stopping; how many is said, and RUN/unreadable.txt lists them.",
    )
    only: str | None = setting(
        None,
        "Keep the images that have these values in the columns that came with them, such as 'severity=3' of CIFAR-10-C or "
        "'corruption=fog severity=1'. None: all.",
    )
    keep_classes: str | None = setting(
        None,
        "Keep the images of these classes, by name, with commas, and leave all others unseen: cat,dog,deer; * stands for any "
        "letters, such as Latin/*. For retrieval: train on some classes, measure on others. None: all.",
    )
    classes: ClassNames = setting(
        None,
        "The class names in the order of the model's outputs: cat,dog; a list, whose items may be lists of names that mean the "
        "same; or a file: one name a line, a JSON or YAML list, a map id: name. Labels are numbered so, by name, and a class "
        "without an image keeps its number; labels without names get these. None: folder names, as numbers or else as text.",
    )
    group_by: str | None = setting(
        None,
        "What says which images belong together (frames of one scene, pictures of one patient), so that they are never parted into "
        "training and validation: a regular expression on the file names, whose first parentheses are the group, or a column.",
    )
    augment: Augmentation = setting(default_factory=Augmentation, doc="Random view of the training images.")
    view: Augmentation = setting(default_factory=Augmentation, doc="Second random view, for contrastive methods.")
    cutmix: float = setting(
        0.0,
        "α of CutMix: images swap a box with others of their batch, its share of the area drawn from Beta(α, α), and their labels "
        "mix alike; the second view is not mixed, and supcon goes by the label of the image around the box; 0: off.",
        ge=0,
    )

    sampling: Literal["shuffled", "balanced"] = setting(
        "shuffled",
        "How training images are drawn: shuffled, each once per epoch, or balanced, every class equally often whatever its number "
        "of images, so that those of rare classes come several times; validation and test images stay as they are.",
    )
    extra: Path | None = setting(
        None,
        "Auxiliary images for training alone: a folder or file of any layout, or a folder of images without labels. Their labels "
        "count where their class names are the data's; pseudo_labels_from gives others theirs. Images that equal, or nearly equal, "
        "validation or test images are left out. Epochs and budget go by the data's own images.",
    )
    extra_share: float = setting(
        0.5,
        "Part of every training batch that is drawn from the auxiliary images (0.5 in Carmon et al. 2019, arXiv:1905.13736; up to "
        "0.8 in Gowal et al. 2021, arXiv:2110.09468).",
        unit="fraction",
        gt=0,
        lt=1,
    )
    labelled: float = setting(
        1.0,
        "Part of the training images whose labels training may look at, evenly by class and at least one of each, counted after "
        "validation is cut: the labels of val_fraction come on top, so make it small in a study of few labels.",
        unit="fraction",
        gt=0,
        le=1,
    )
    labelled_share: float | None = setting(
        None,
        "Part of every batch that is drawn from the labelled images; an epoch is then one pass over the others. None: as they "
        "come. A method without a use for unlabelled images draws labelled ones only.",
        unit="fraction",
        gt=0,
        lt=1,
    )
    label_noise: float = setting(
        0.0,
        "Part of the labels of training images (of labelled ones) that are replaced by another class, drawn uniformly; validation "
        "and test labels never are.",
        unit="fraction",
        ge=0,
        lt=1,
    )
    pseudo_labels_from: str | None = setting(
        None,
        "A run directory of the same classes (in a stage of a recipe: the name of an earlier one), whose model labels the "
        "unlabelled training images, and auxiliary ones, once, at the start; with method.name trades robust self-training (Carmon "
        "et al. 2019, arXiv:1905.13736, algorithm 1). Trained on the same data, it must have seen the same labels only: the same "
        "labelled, label_noise, val_fraction, limit_train and seed. None: they have no label.",
    )

    def problems(self) -> list[str]:
        """Return which settings do not go together, one line each."""
        problems = [
            f"data.{key}: changes nothing while every image has a label, got {value}; set data.labelled below 1{other}"
            for key, other in (("labelled_share", ""), ("pseudo_labels_from", ", or data.extra"))
            if (value := getattr(self, key)) is not None and self.labelled == 1 and not (other and self.extra)
        ]
        if self.extra is None and self.extra_share != 0.5:
            problems.append(
                f"data.extra_share: changes nothing without auxiliary images, got {self.extra_share:g}; add --data.extra FOLDER"
            )
        for key, given in (("labelled_share", self.labelled < 1 and self.labelled_share), ("extra", self.extra)):
            if given and self.batch_size < 2:
                kinds = "labelled and one unlabelled" if key == "labelled_share" else "auxiliary and one other"
                problems.append(
                    f"data.batch_size: {key} needs one {kinds} image at least, got {self.batch_size}; raise it"
                )
        if self.sampling == "balanced" and self.labelled < 1 and not (self.labelled_share or self.pseudo_labels_from):
            problems.append(
                f"data.sampling: images without a label have no class to balance, got balanced and labelled {self.labelled:g}; "
                "add --data.labelled_share 0.5"
            )
        return problems

    @abstractmethod
    def read(self) -> RawSplits:
        """Return the images as they are stored; raises UserError if they cannot be found or understood."""

    @memory_of("reading the images", "data.image_size")
    def load(self, seed: int, *, training: bool = True) -> Splits:
        """Read, check, decode and split; without ``training``, test images alone will do.

        ``seed`` decides only which training images become validation images, which of the others are labelled, and which labels are
        wrong: test images, and the images that a limit keeps, are the same for every seed.

        Raises:
            UserError: a path is missing, an image is broken, labels or classes are not as they should be.
                Everything that can be checked without decoding is checked first.
        """
        raw = self.read()
        # Folders and files name the classes: no name may command a terminal.
        raw = raw._replace(classes=tuple(map(printable, raw.classes)))
        raw, origin = assign_splits(self.grouped(self.selected(raw)), training)
        self._check(raw, training)
        order = None if self.classes is None else renumber(raw, self.classes)
        fit, unreadable = ResizeSpec(self.image_size, self.resize, self.channels, self.background), ()
        remarks: Counter[str] = Counter()
        try:
            train, val, test = _decode(raw, fit, remarks)
        except UserError:
            if not self.skip_unreadable:
                raise
            raw, unreadable = _without_unreadable(raw, fit)
            self._check(raw, training)
            remarks.clear()
            train, val, test = _decode(raw, fit, remarks)
        notes = (*raw.notes, *say_remarks(remarks, self.background))
        marks = {
            "training": _marks(raw.train, train),
            "validation": _marks(raw.val, val),
            "test": _marks(raw.test, test),
        }
        sets = [train, *([] if val is None else [val]), test]
        notes = (*notes, *repeats(sets, [digest for each in marks.values() for _, digest in each]))
        groups = raw.train.columns.get(_GROUP)
        if self.limit_train is not None and self.limit_train < len(train):
            chosen = cut(train.labels, groups, self.limit_train, _LIMIT_SEED, least=2, spare=0)[0]
            train, groups = train.subset(chosen), at(groups, chosen) or None
            marks["training"] = at(marks["training"], chosen)
        if self.limit_test is not None and self.limit_test < len(test):
            chosen = stratified(test.labels, self.limit_test, _LIMIT_SEED, least=0, spare=0)[0]
            test, marks["test"] = test.subset(chosen), at(marks["test"], chosen)
        if val is None:
            chosen, rest = cut(train.labels, groups, round(self.val_fraction * len(train)), seed)
            train, val = train.subset(rest), train.subset(chosen)
            marks["validation"], marks["training"] = at(marks["training"], chosen), at(marks["training"], rest)
        notes = (*notes, *_leaks({"training": train, "validation": val, "test": test}, marks))
        classes = raw.classes
        if order is not None:  # after the cuts, which are the same in every order of the classes
            train, val, test, classes = order.of(train), order.of(val), order.of(test), order.classes
            notes = (*notes, *order.notes)
        digest = fingerprint([train, val, test], classes)  # of the true labels, whatever is hidden or wrong below
        train = hide_labels(train, self.labelled, self.label_noise, len(classes), seed, share=self.labelled_share)
        return Splits(train, val, test, classes, digest, unreadable, raw.skipped, notes, origin)

    def selected(self, raw: RawSplits) -> RawSplits:
        """Return the images that ``only`` and ``keep_classes`` leave."""
        raw = raw if self.only is None else with_values(raw, self.only)
        return raw if self.keep_classes is None else with_classes(raw, self.keep_classes)

    def grouped(self, raw: RawSplits) -> RawSplits:
        """Return the data with the group of each image, if ``group_by`` is set."""
        if self.group_by is None:
            return raw
        root, parts, single = str(getattr(self, "path", None) or ""), {}, 0
        for name, split in raw.parts.items():
            if len(split.labels):
                files = split.columns.get("file", split.names)  # what a table calls its images
                groups, lonely = group_names(self.group_by, files, split.columns, root)
                parts[name], single = replace(split, columns={**split.columns, _GROUP: groups}), single + lonely
        titles = {"train": "training", "val": "validation", "test": "test"}
        notes = shared_groups({titles[name]: split.columns[_GROUP] for name, split in parts.items()})
        if single:
            notes.append(f"data.group_by matches {single} names not, and each of these images is a group of its own")
        return raw._replace(**parts, notes=(*raw.notes, *notes))

    @staticmethod
    def groups_of(split: RawSplit) -> Sequence[str] | None:
        """Return the group of each image, as ``grouped`` has found them, or None."""
        return split.columns.get(_GROUP)

    def _check(self, raw: RawSplits, training: bool) -> None:
        if training:
            check(raw, limit_train=self.limit_train)
        elif not len(raw.test.labels):
            raise UserError("there must be test images, got none; check --data.path")
        else:
            check_labels(raw)


def _marks(split: RawSplit | None, images: ImageSet | None) -> list[tuple[str, bytes]]:
    """Return the name, or "", and a digest of each image."""
    if split is None or images is None:
        return []
    return list(zip(split.names or [""] * len(images), digests_of(images.images), strict=True))


def _leaks(sets: Mapping[str, ImageSet], marks: Mapping[str, Sequence[tuple[str, bytes]]]) -> list[str]:
    """Return notes on images that are there twice; nearly equal ones are looked for among not too many image files."""
    splits = {}
    for name, subset in sets.items():
        if len(subset):
            names, digests = zip(*marks[name], strict=True)
            images = list(subset.images.permute(0, 2, 3, 1).numpy())
            splits[name] = Split(images, label_keys(subset.labels), names if all(names) else (), digests)
    files = all(len(split.names) == len(split.images) <= HASHED for split in splits.values())
    near = files and sum(map(len, sets.values())) <= HASHED and find_spec("imagehash") is not None
    return find_duplicates(splits, near=near).leaks()


def at(values: Sequence[T] | None, index: Tensor) -> list[T]:
    """Return the values at ``index``, (n,) int64; none of none."""
    return [values[i] for i in index.tolist()] if values else []


def with_values(raw: RawSplits, only: str) -> RawSplits:
    """Return the images whose columns have the values of ``only``, ``"COLUMN=VALUE …"``; UserError if there are none."""
    parts = raw.parts
    columns = sorted({column for split in parts.values() for column in split.columns})
    for word in shlex.split(only):
        column, _, value = word.partition("=")
        given = {each for split in parts.values() for each in split.columns.get(column, ())}
        if value not in given:
            known = did_you_mean(value, given) if given else f"there are the columns {', '.join(columns) or 'none'}"
            raise UserError(f"data.only must be COLUMN=VALUE of images that are there, got {word!r}; {known}")
        for name, split in parts.items():
            rows = [row for row, each in enumerate(split.columns.get(column, ())) if each == value]
            parts[name] = split.subset(torch.tensor(rows, dtype=torch.int64))
    note = f"only images with {only} are read (data.only)"
    return raw._replace(**parts, notes=(*raw.notes, note))


def with_classes(raw: RawSplits, names: str) -> RawSplits:
    """Return the images of the classes of these names or patterns, numbered anew in their order; UserError if one fits no class."""
    chosen: set[int] = set()
    for name in filter(None, map(str.strip, names.split(","))):
        fitting = [k for k, each in enumerate(raw.classes) if each == name or fnmatchcase(each, name)]
        if not fitting:
            raise UserError(
                f"data.keep_classes must name classes that are there, got {name!r}; {did_you_mean(name, raw.classes)}"
            )
        chosen.update(fitting)
    check_labels(raw)
    numbers = torch.full((len(raw.classes),), -1)
    numbers[sorted(chosen)] = torch.arange(len(chosen))
    parts = {}
    for role, split in raw.parts.items():
        left = split.subset((numbers[split.labels] >= 0).nonzero()[:, 0])
        parts[role] = replace(left, labels=numbers[left.labels])
    note = f"only images of {len(chosen)} of {len(raw.classes)} classes are read (data.keep_classes {names})"
    classes = tuple(raw.classes[k] for k in sorted(chosen))
    return raw._replace(**parts, classes=classes, notes=(*raw.notes, note))


def assign_splits(raw: RawSplits, training: bool) -> tuple[RawSplits, Literal["test", "val", "train", "all"]]:
    """Return the data with test images, and what they are: see ``Splits.origin``."""
    if len(raw.test.labels) or not (len(raw.train.labels) or raw.val):
        return raw, "test"
    if raw.val is not None and len(raw.val.labels):
        note = "there is no test split, so the test images are those of the validation split"
        return raw._replace(test=raw.val, val=None, notes=(*raw.notes, note)), "val"
    if raw.unsplit and not training:
        note = "the data has no splits, so the test images are all its images; a model trained on some of them remembers those"
        return raw._replace(train=NO_IMAGES, test=raw.train, val=None, notes=(*raw.notes, note)), "all"
    check(raw._replace(test=raw.train))
    note = "there is no test split and no validation split, so the test images are a fixed fifth of the training images"
    labels, groups = raw.train.labels, raw.train.columns.get(_GROUP)
    chosen, rest = cut(labels, groups, round(0.2 * len(labels)), _TEST_SEED)
    train, test = raw.train.subset(rest), raw.train.subset(chosen)
    return raw._replace(train=train, test=test, val=None, notes=(*raw.notes, note)), "train"


def cut(
    labels: Tensor, groups: Sequence[str] | None, count: int, seed: int, *, least: int = 1, spare: int = 1
) -> tuple[Tensor, Tensor]:
    """Choose ``count`` images, evenly by class (``stratified``); with ``groups`` about so many, and whole groups, at least one."""
    if groups is None:
        return stratified(labels, count, seed, least=least, spare=spare)
    return cut_groups(labels, groups, max(1, count), seed, spare=spare)


def renumber(raw: RawSplits, names: Sequence[str | Sequence[str]]) -> Renumbering:
    """Say how the labels become those of a list of names; raises UserError if a class with images is not in it."""
    labels = [split.labels for split in raw.parts.values()]
    if any(each.dim() == 2 for each in labels):
        raise UserError("data.classes: is for data with one class per image or pixel; leave it out, these have names")
    return renumbering(raw.classes, class_counts(labels, len(raw.classes)), names)


def say_remarks(remarks: Mapping[str, int], background: str) -> list[str]:
    """Say what decoding has counted, a sentence each."""
    return [text.format(remarks[key], background=background) for key, text in REMARKS.items() if remarks[key]]


def _decode(raw: RawSplits, fit: ResizeSpec, remarks: Counter[str]) -> tuple[ImageSet, ImageSet | None, ImageSet]:
    """Return training, validation and test images, all of one shape."""
    parts = list(raw.parts.values())
    filled = [split for split in parts if len(split.labels)]
    decoded: dict[int, Tensor] = {}
    if all(isinstance(split.images, Tensor) for split in filled):
        for split in filled:
            decoded[id(split)] = fit_arrays(cast(Tensor, split.images), fit)
        first = decoded[id(filled[0])]
        for split in filled[1:]:
            if decoded[id(split)].shape[1:] != first.shape[1:]:
                raise UserError(
                    f"training images are {_shape(first)} (channels x height x width) but test images "
                    f"{_shape(decoded[id(split)])}; set --data.image_size and --data.channels to bring them together"
                )
    else:
        blobs = [blob for split in filled for blob in cast(list[bytes], split.images)]
        first = decode(blobs, [name for split in filled for name in split.names], fit, remarks=remarks)
        for split, images in zip(filled, first.split([len(split.labels) for split in filled]), strict=True):
            decoded[id(split)] = images
    sets = [ImageSet(decoded.get(id(split), first[:0]), split.labels) for split in parts]
    return sets[0], None if raw.val is None else sets[1], sets[-1]


def _without_unreadable(raw: RawSplits, fit: ResizeSpec) -> tuple[RawSplits, tuple[str, ...]]:
    """Return what can be decoded, and the names of the rest, which a warning counts."""
    parts, skipped = raw.parts, []
    for name, split in raw.parts.items():
        if not isinstance(split.images, Tensor):
            good = torch.tensor(readable(split.images, split.names, fit), dtype=torch.bool)
            skipped += [split.names[i] for i in (~good).nonzero()[:, 0].tolist()]
            parts[name] = split.subset(good.nonzero()[:, 0])
    if skipped:
        say_left_out(skipped, sum(len(split.labels) for split in raw.parts.values()))
    return raw._replace(**parts), tuple(skipped)


def say_left_out(skipped: Sequence[str], count: int) -> None:
    """Warn that the images called ``skipped`` of ``count`` cannot be read."""
    more = ", …" if len(skipped) > _NAMED else ""
    _log.warning(
        "%d of %d images cannot be read and are left out (data.skip_unreadable): %s%s",
        *(len(skipped), count, ", ".join(skipped[:_NAMED]), more),
    )


def say_skipped(skipped: Sequence[str]) -> None:
    """Warn that files were not read; the first ones are named."""
    if skipped:
        more = "; …" if len(skipped) > _NAMED else ""
        _log.warning("%d files are not read: %s%s", len(skipped), "; ".join(skipped[:_NAMED]), more)


def check_labels(raw: RawSplits) -> None:
    """Raise UserError unless all labels are in [0, K); a task checks those that are no classes."""
    if raw.train.labels.dim() > 1 or raw.test.labels.dim() > 1:
        return
    classes, parts = raw.classes, [("training", raw.train), ("validation", raw.val), ("test", raw.test)]
    labels = {name: split.labels.numpy() for name, split in parts if split is not None and len(split.labels)}
    remedy = "number the labels from 0 and name every class"
    if labels and min(each.min() for each in labels.values()) == 1:
        remedy = "the labels begin at 1: subtract 1 from all of them"
    problems = [
        f"{name} labels must be in [0, {len(classes)}), one per class name, got {bad[0]} in row {row[0]}; {remedy}"
        for name, values in labels.items()
        if len(row := np.flatnonzero((values < 0) | (values >= len(classes)))) and len(bad := values[row])
    ]
    if problems:
        raise UserError(*problems)


def check(raw: RawSplits, *, limit_train: int | None = None) -> None:
    """Raise UserError, listing every problem, unless labels and classes allow training and testing."""
    train, test, classes = raw[:3]
    if len(train.labels) == 0 or len(test.labels) == 0:
        raise UserError(
            f"there must be training and test images, got {len(train.labels)} and {len(test.labels)}; add the others at "
            "--data.path (only clead evaluate --model does without training images)"
        )
    check_labels(raw)
    if train.labels.dim() > 1:
        return
    problems = []
    counts = np.bincount(train.labels.numpy(), minlength=len(classes))
    if np.count_nonzero(counts) < 2:
        only = classes[int(counts.argmax())]
        raise UserError(f"a classifier needs at least 2 classes with training images, got only {only!r}; add another")
    for split, images in (("test", test), ("validation", raw.val)):
        labels = np.empty(0, np.int64) if images is None else images.labels.numpy()
        lacking = np.flatnonzero((np.bincount(labels, minlength=len(classes)) > 0) & (counts == 0))
        if len(lacking):
            problems.append(
                f"{split} images have {_listed('class', [classes[k] for k in lacking])} without any training image; "
                + _alike(classes[lacking[0]], [classes[k] for k in np.flatnonzero(counts)])
            )
    if single := [classes[k] for k in np.flatnonzero(counts == 1)]:
        problems.append(
            f"every class needs at least 2 training images (one for validation), got 1 of "
            f"{_listed('class', single)}; add images or remove the class"
        )
    needed = 2 * np.count_nonzero(counts)
    if limit_train is not None and limit_train < needed:
        problems.append(
            f"limit_train must keep at least 2 images of each class, {needed} here, got {limit_train}; "
            "raise --data.limit_train"
        )
    if problems:
        raise UserError(*problems)


def _alike(name: str, known: Sequence[str]) -> str:
    """Say what to do with a class that training does not know: another name of a known one, or a further class."""
    (same, _) = match_names([name], [(each,) for each in known])
    numbers = [each for each in known if re.fullmatch("[0-9]+", each + name) and int(each) == int(name)]
    if same or numbers:
        other = known[same[name]] if same else numbers[0]
        return f"{name!r} and {other!r} differ in writing only: rename one as the other"
    return "add training images or remove the class"


def shuffle_if_sorted(image_set: ImageSet) -> ImageSet:
    """Return images that lie class by class (as folders hold them) in a fixed random order, others as they are.

    So the first n of them stand for all classes. Several files that are sorted each, one behind the other, count as sorted too:
    the class changes less than a quarter as often from image to image as in a random order.
    """
    labels = strata(image_set.labels).numpy()
    changes, counts = np.count_nonzero(np.diff(labels)), np.unique(labels, return_counts=True)[1]
    by_chance = len(labels) - (counts**2).sum() / max(1, len(labels))
    if changes != len(counts) - 1 and changes >= by_chance / 4:
        return image_set
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(_LIMIT_SEED)))
    return image_set.subset(torch.from_numpy(random.permutation(len(labels))))


def fingerprint(sets: Sequence[ImageSet], classes: Sequence[str]) -> str:
    """Return a SHA-256 hex digest of images, labels and class names, order included."""
    digest = hashlib.sha256(repr(tuple(classes)).encode())
    for image_set in sets:
        for tensor in (image_set.images, image_set.labels):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def resolve_path(path: Path) -> Path:
    """Return the path with ``~`` expanded; raises UserError with the closest name if nothing is there."""
    path = path.expanduser()
    if not path.exists():
        parent = path.parent
        if os.sep == "/" and re.search(r"^[A-Za-z]:|\\", str(path)):
            hint = (
                "this is a path of Windows; give it as this system names it, for instance /mnt/c/… for C:\\… under WSL"
            )
        elif parent.is_dir():
            hint = did_you_mean(str(path), [str(entry) for entry in parent.iterdir() if not entry.name.startswith(".")])
        else:
            hint = f"the folder {parent} does not exist either"
        raise UserError(f"data.path must exist, got {str(path)!r}; {hint}")
    return path


def default_names(*labels: Tensor) -> tuple[str, ...]:
    """Return "0" … "K-1" for labels without names, K - 1 being the largest label; UserError if that is a million or more."""
    count = 1 + max((int(each.max()) for each in labels if len(each)), default=-1)
    if count > _MOST_CLASSES:
        raise UserError(f"a label must be below {_MOST_CLASSES:,}, got {count - 1}; number the classes from 0")
    return tuple(map(str, range(count)))


def _shape(images: Tensor) -> str:
    return "x".join(map(str, images.shape[1:]))


def _listed(noun: str, names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{noun} {shown}"


__getattr__ = old_names(
    __name__, {"Found": "RawSplits", "Part": "RawSplit", "existing": "resolve_path", "mixed": "shuffle_if_sorted"}
)
