"""What a model is asked in the task retrieval: a gallery of items, and queries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from clead.attacks.runner import image_gradient
from clead.data.base import shuffle_if_sorted
from clead.data.classes import match_names
from clead.data.datasets.auto import Auto
from clead.data.duplicates import equal_or_near
from clead.data.loaders import make_generator, to_float
from clead.errors import UserError
from clead.interfaces import ImageSet
from clead.losses.precision import exact_float32
from clead.models.external import ExternalModel
from clead.models.modes import attack_mode
from clead.models.nearest import NearestItem, OutputEncoder, unit_features
from clead.models.seeding import fork_rng
from clead.models.split import SplitModel, adapt, has_features
from clead.runs.loading import OpenedModel, OpenedRun
from clead.tasks.retrieval import Retrieval
from clead.weights.files import load_weights

_ORDER = 0  # of the images of a class; which are items does not depend on the seed
_CHUNK = 256  # images at once
_COMPARED = 8192  # queries that are compared with the items at once
_NAMED = 3  # classes that a note names
Opened = TypeVar("Opened", bound=OpenedModel)


class Gallery(NamedTuple):
    """Items, the queries that they answer, labels of both counting the same K classes, and what must be said of them."""

    items: ImageSet
    queries: ImageSet
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def with_gallery(opened: Opened) -> Opened:
    """Return what answers by its gallery if the task is retrieval, else ``opened`` as it is.

    The images are the queries then, the classes those of the gallery, and its items stand for the training images.
    """
    task = opened.config.task
    if not isinstance(task, Retrieval):
        return opened
    options, splits = opened.config.eval, opened.splits
    seen = _seen(opened)
    if isinstance(opened, OpenedRun):
        if task.features == "output":
            raise UserError(
                "task.features: what a run returns are the logits of its own classes, got output; leave it out, which compares "
                "the features that make them"
            )
        task = dataclasses.replace(task, features="classifier")
    sets, notes = [splits.test if options.split == "test" else splits.val], []
    if options.split == "test" and splits.origin == "train" and seen is not None and not seen:
        sets = [splits.train, splits.val, splits.test]
        notes = ["the training saw none of the classes, so the images that would be training images are evaluated, too"]
    images = shuffle_if_sorted(joined(sets))
    gallery = make_gallery(task, images, splits.classes)
    queries = gallery.queries
    if options.images is not None:
        queries = queries.subset(torch.arange(min(options.images, len(queries))))
    encoder, compared = encoder_of(opened.model, task, images)
    model = nearest_item(encoder, gallery.items, gallery.classes, opened.device)
    splits = dataclasses.replace(
        splits, train=gallery.items, val=queries.subset(torch.arange(0)), test=queries, classes=gallery.classes
    )
    target = dataclasses.replace(opened.target, classes=gallery.classes, total=len(gallery.queries))
    seen_note = _seen_note(seen, splits.classes)
    all_notes = (*opened.notes, *notes, *gallery.notes, *compared, *seen_note)
    return dataclasses.replace(opened, model=model, images=queries, splits=splits, target=target, notes=all_notes)


def make_gallery(task: Retrieval, images: ImageSet, classes: Sequence[str]) -> Gallery:
    """Return the gallery that ``task`` names, or that is cut from ``images``; raises UserError if there is no query left."""
    if task.gallery is None:
        items, queries = cut_gallery(images, task.items)
        notes = [
            f"the gallery is {len(items)} of the images, {task.items} of each class; the other {len(queries)} are the queries"
        ]
        if copies := int(_copies(queries, items).sum()):
            notes.append(
                f"{copies} queries are copies of items, equal or nearly so, and find themselves: the figures are too good"
            )
        return Gallery(items, queries, tuple(classes), tuple(notes))
    items, names = read_gallery(task.gallery, tuple(images.images.shape[1:]))
    numbers, _ = match_names(classes, [(name,) for name in names])
    known = torch.tensor([numbers.get(name, -1) for name in classes])[images.labels]
    queries = dataclasses.replace(images, labels=known).subset((known >= 0).nonzero()[:, 0])
    asked = ~_copies(queries, items)
    same = int((~asked).sum())
    if same and same == len(queries):
        raise UserError(
            f"task.gallery: all {same} images to ask with are items of {task.gallery} or copies, and would find themselves; "
            "give one of other images, or leave --task.gallery out"
        )
    queries = queries.subset(asked.nonzero()[:, 0])
    if not len(queries):
        raise UserError(
            f"task.gallery: no image of the data is of a class of the gallery, {', '.join(names[:_NAMED])} …, got "
            f"{', '.join(classes[:_NAMED])} …; name the classes alike, or leave --task.gallery out"
        )
    notes = [f"the gallery is {len(items)} images of {len(names)} classes in {task.gallery}"]
    if same:
        notes.append(
            f"{same} images that are items of the gallery, or nearly equal ones, are left out: they would find themselves"
        )
    if len(queries) + same < len(images):
        notes.append(
            f"{len(images) - len(queries) - same} images of classes that the gallery has no item of are left out"
        )
    return Gallery(items, queries, names, tuple(notes))


def _copies(queries: ImageSet, items: ImageSet) -> Tensor:
    """Return which queries are among the items, or are nearly equal to one: resized, or saved with loss, (Q,) bool."""
    flags = [torch.zeros(0, dtype=torch.bool)]
    for start in range(0, len(queries), _COMPARED):
        equal, near = equal_or_near(queries.images[start : start + _COMPARED], items.images[:])
        flags.append(equal | near)
    return torch.cat(flags)


def cut_gallery(images: ImageSet, per_class: int) -> tuple[ImageSet, ImageSet]:
    """Return ``per_class`` images of each class, drawn at random, as gallery, and the others as queries, in their order.

    Raises UserError if no query is left.
    """
    order = torch.randperm(len(images), generator=make_generator(torch.device("cpu"), _ORDER))
    item = torch.zeros(len(images), dtype=torch.bool)
    for label in images.labels.unique().tolist():
        item[order[images.labels[order] == label][:per_class]] = True
    if item.all():
        raise UserError(
            f"no image is left to ask with: no class has more than {per_class} images, got {len(images)} images in all; "
            "put fewer into the gallery: --task.items 1"
        )
    return images.subset(item.nonzero()[:, 0]), images.subset((~item).nonzero()[:, 0])


def read_gallery(path: Path, shape: Sequence[int]) -> tuple[ImageSet, tuple[str, ...]]:
    """Return all images at a path, of any layout, as (C, H, W) ``shape``, and the names of their classes.

    Raises UserError if there is none, or if they cannot be made to have that shape.
    """
    size = {"image_size": shape[1]} if shape[1] == shape[2] else {}
    splits = Auto(path=path, channels=shape[0], **size).load(0, training=False)
    images = joined([splits.train, splits.val, splits.test])
    if tuple(images.images.shape[1:]) != tuple(shape):
        raise UserError(
            f"task.gallery: images must be of shape {tuple(shape)}, as those of the model, got "
            f"{tuple(images.images.shape[1:])}; resize them"
        )
    return images, splits.classes


def encoder_of(model: nn.Module, task: Retrieval, images: ImageSet) -> tuple[SplitModel, list[str]]:
    """Return what makes the features that are compared, and what must be said of them: see ``Retrieval.features``.

    Raises UserError if they are not known, or if no gradient goes through what the model returns.
    """
    if isinstance(model, ExternalModel):
        channels, height, width = images.images.shape[1:]
        model = adapt(model.module, sample_shape=(channels, height, width), output=model.io.output)
    if task.features != "output" and isinstance(model, SplitModel) and has_features(model):
        if (name := getattr(model, "classifier_name", None)) is None:
            return model, []
        other = "; if that is the embedding, give --task.features output" if task.features is None else ""
        note = f"what is compared are the features that the layer {name!r} gets, not what the model returns{other}"
        return model, [note]
    if task.features == "classifier":
        raise UserError(
            "task.name: retrieval compares features, and no layer of the model is known that makes logits of features (B, D); "
            "name it: --model.classifier NAME"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with fork_rng(0):
        gradient = image_gradient(model, to_float(images.images[:1]).to(device))
    if gradient is None or not isinstance(model, SplitModel):
        raise UserError(
            "task.name: retrieval attacks the embedding, and no gradient goes through the model (it detaches its images, or is no "
            "PyTorch code, such as an ONNX file); give the PyTorch module: --model FILE:NAME"
        )
    note = f"what is compared is what the model returns, {model.num_classes} numbers per image"
    return OutputEncoder(model), [note, *getattr(model, "notes", ())]  # they say which of several outputs that is


def nearest_item(encoder: SplitModel, items: ImageSet, classes: Sequence[str], device: torch.device) -> NearestItem:
    """Return what answers by the nearest of ``items``; raises UserError for a bad gallery."""
    gallery = embed(encoder.to(device), items, device)
    return NearestItem(encoder, gallery, items.labels, classes, items.images)


def embed(model: SplitModel, images: ImageSet, device: torch.device) -> Tensor:
    """Return the unit features of all images, (N, d), on the device; the model is left as it is."""
    if not len(images):
        return torch.zeros(0, model.feature_dim, device=device)
    with attack_mode(model), torch.no_grad(), exact_float32():
        chunks = (to_float(images.images[start : start + _CHUNK]) for start in range(0, len(images), _CHUNK))
        return torch.cat([unit_features(model, chunk.to(device)) for chunk in chunks])


def joined(sets: Sequence[ImageSet]) -> ImageSet:
    """Return the images of all sets, one after the other; of one alone as they are, streamed ones too."""
    filled = [each for each in sets if len(each)] or sets[:1]
    if len(filled) == 1:
        return filled[0]
    images, labels = (torch.cat([getattr(each, key) for each in filled]) for key in ("images", "labels"))
    return ImageSet(images, labels)


def _seen(opened: OpenedModel) -> list[str] | None:
    """Return the classes of the data that the training saw, by name; None if it is not known what it saw."""
    if not isinstance(opened, OpenedRun):
        return None
    _, metadata = load_weights(opened.run.weights(opened.config.eval.weights))
    return [name for name in opened.splits.classes if name in metadata["classes"]]


def _seen_note(seen: Sequence[str] | None, classes: Sequence[str]) -> list[str]:
    """Return what must be said of classes that the training saw."""
    if seen is None:
        return []
    if not seen:
        return [f"the training saw none of the {len(classes)} classes"]
    more = ", …" if len(seen) > _NAMED else ""
    return [
        f"the training saw {len(seen)} of the {len(classes)} classes ({', '.join(seen[:_NAMED])}{more}), so the figures are not of "
        "unseen classes alone; --data.keep_classes leaves them out"
    ]
