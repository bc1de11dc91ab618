"""Images that belong together, such as frames of one scene, which must not be parted into training and validation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath

import numpy as np
import torch
from torch import Tensor

from clead.data.label_sampling import strata
from clead.errors import UserError, did_you_mean


def group_names(
    group_by: str, names: Sequence[str], columns: Mapping[str, Sequence[str]], root: str = ""
) -> tuple[list[str], int]:
    r"""Return the group of each image, and how many images match nothing and are a group of their own.

    Args:
        group_by: the name of a column, or a regular expression that is looked for in each file name, and in the path below ``root``
            if it contains ``/``; its first group of parentheses is the image's group, else all that it matches.
        names: paths of N image files.
        columns: column name -> N values.
        root: folder of the data set.

    Raises:
        UserError: not a regular expression, or one that matches no name.

    >>> group_names(r"(scene\d+)_", ["a/scene1_01.png", "b/scene1_02.png", "b/x.png"], {})
    (['scene1', 'scene1', 'b/x.png'], 1)
    """
    if group_by in columns:
        return [str(value) for value in columns[group_by]], 0
    known = f"; {did_you_mean(group_by, columns)}" if columns else ""
    if not names:
        raise UserError(
            f"data.group_by: these images have no file names and no column {group_by!r}{known}; use image files or a Parquet column"
        )
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise UserError(
            f"data.group_by must be a regular expression or a column, got {group_by!r} ({error}); such as "
            f"--data.group_by '^(.+)_[0-9]+'"
        ) from None
    below = [_below(name, root) for name in names]
    searched = below if "/" in group_by else [PurePath(name).name for name in names]
    matches = [pattern.search(name) for name in searched]
    if not any(matches):
        examples = ", ".join(searched[:: max(1, len(searched) // 3)][:3])
        raise UserError(
            f"data.group_by {group_by!r} matches none of the {len(names)} names, such as {examples}{known}; mend the expression"
        )
    single = sum(match is None for match in matches)
    return [
        own_name if match is None else next((value for value in match.groups() if value is not None), match[0])
        for match, own_name in zip(matches, below, strict=True)
    ], single


def _below(name: str, root: str) -> str:
    try:
        return PurePath(name).relative_to(root).as_posix() if root else PurePath(name).as_posix()
    except ValueError:
        return PurePath(name).as_posix()


def cut_groups(
    labels: Tensor, groups: Sequence[str], count: int, seed: int, *, spare: int = 1
) -> tuple[Tensor, Tensor]:
    """Choose about ``count`` images, whole groups only, with every class in proportion as far as the groups allow.

    Groups come in random order, and one is taken where that brings the counts of its classes nearer to their proportion.

    Args:
        labels: (N,) int64.
        groups: N group names.
        count: images to choose.
        seed: decides which groups come first.
        spare: images to leave over of each class at least.

    Returns:
        The chosen indices and the others, both (n,) int64, ascending.

    Raises:
        UserError: no group can be taken without leaving a class without images.
    """
    values = strata(labels).numpy()
    _, number = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    sizes = np.bincount(values).astype(float)
    target = sizes * (count / max(1, len(values)))
    weight = 1 / np.maximum(target, 0.5)
    codes, amounts = np.unique(number * len(sizes) + values, return_counts=True)
    owner, label = codes // len(sizes), codes % len(sizes)
    first = np.searchsorted(owner, np.arange(number.max() + 2 if len(number) else 1))
    taken, chosen = np.zeros(len(sizes)), np.zeros(len(first) - 1, dtype=bool)

    def change(group: int) -> tuple[float, bool]:
        """Return how much nearer the counts come (negative) by this group, and whether enough is left over."""
        rows = slice(first[group], first[group + 1])
        k, more = label[rows], amounts[rows]
        gain = weight[k] * ((taken[k] + more - target[k]) ** 2 - (taken[k] - target[k]) ** 2)
        return float(gain.sum()), bool((taken[k] + more <= sizes[k] - spare).all())

    def take(group: int) -> None:
        chosen[group] = True
        rows = slice(first[group], first[group + 1])
        taken[label[rows]] += amounts[rows]

    for group in np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed))).permutation(len(chosen)):
        nearer, allowed = change(group)
        if allowed and nearer < 0:
            take(group)
    if not chosen.any() and count:
        ranked = sorted(
            (nearer, group) for group in range(len(chosen)) for nearer, allowed in [change(group)] if allowed
        )
        if not ranked:
            raise UserError(
                f"data.group_by makes {len(chosen)} groups of {len(values)} images, of which none can be kept back without taking "
                "a class all its images; give each class two groups or more, or leave data.group_by out"
            )
        take(ranked[0][1])
    mask = chosen[number] if len(number) else np.zeros(0, dtype=bool)
    return torch.from_numpy(np.flatnonzero(mask)), torch.from_numpy(np.flatnonzero(~mask))


def shared_groups(splits: Mapping[str, Sequence[str]]) -> list[str]:
    """Return one sentence for each pair of given splits that share groups.

    >>> shared_groups({"training": ["a", "a", "b"], "test": ["b", "b", "c"]})
    ['1 of 2 groups of the test images are among the training images too (2 images): their figures are too good']
    """
    counts = {name: Counter(groups) for name, groups in splits.items() if len(groups)}
    notes = []
    names = list(counts)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if both := counts[one].keys() & counts[other].keys():
                images = sum(counts[other][group] for group in both)
                notes.append(
                    f"{len(both)} of {len(counts[other])} groups of the {other} images are among the {one} images too "
                    f"({images} images): their figures are too good"
                )
    return notes
