"""Which number a class has: the order of names, and labels that are not 0 … K − 1."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

_NAMED = 5  # classes that a note names


def class_order(names: Iterable[str]) -> list[str]:
    """Return the distinct names in the order of their class numbers: as numbers where all are integers, else as text.

    >>> class_order(["10", "9", "0"]), class_order(["10", "9", "zero"])
    (['0', '9', '10'], ['10', '9', 'zero'])
    """
    distinct = sorted(set(names))
    if all(re.fullmatch(r"[+-]?[0-9]{1,4000}", name) for name in distinct):
        return sorted(distinct, key=int)
    return distinct


def number_labels(
    *splits: Sequence[str] | Sequence[int] | np.ndarray | Tensor,
) -> tuple[list[Tensor], tuple[str, ...], tuple[str, ...]]:
    """Number the classes of labels that have no list of names: 0 … K − 1, in the order of ``class_order``.

    Integers that begin at 0 and lack few values keep their numbers, and a class without an image its place: what lacks an image
    here may have one elsewhere. Any others (1 … K; 0, 90, 180, 270; text) are numbered in ascending order and keep their value as
    name, which a note says. Negative integers stay, for ``data.base.check`` to refuse. So K is at most twice the number of images.

    Args:
        splits: for each split (n,) integers, or n texts; those of one data set together.

    Returns:
        The labels of each split, (n,) int64; the K names; and notes, one sentence each.

    >>> labels, names, notes = number_labels([1, 2, 3], [3])
    >>> labels, names, notes[0][:35]
    ([tensor([0, 1, 2]), tensor([2])], ('1', '2', '3'), 'labels are not 0 … 2 but 1, 2, 3: n')
    """
    arrays = [np.asarray(split) for split in splits]
    filled = [array for array in arrays if array.size]
    if any(array.dtype.kind not in "biu" for array in filled):
        return _number_texts([[str(value) for value in array.tolist()] for array in arrays])
    numbers = [array.astype(np.int64) for array in arrays]
    values = np.unique(np.concatenate([np.empty(0, np.int64), *numbers]))
    values = values[values >= 0]
    if not len(values) or (values[0] == 0 and values[-1] < 2 * len(values)):
        names = tuple(map(str, range(int(values[-1]) + 1 if len(values) else 0)))
        empty = sorted(set(range(len(names))) - set(values.tolist()))
        note = f"no image has the label {_listed(list(map(str, empty)))}" if empty else None
        return list(map(torch.from_numpy, numbers)), names, (note,) if note else ()
    names = tuple(map(str, values.tolist()))
    note = (
        f"labels are not 0 … {len(names) - 1} but {_listed(names)}: numbered 0 … {len(names) - 1} in ascending order, "
        f"so class number 0 is {names[0]!r}"
    )
    labels = [np.where(array < 0, array, np.searchsorted(values, array)) for array in numbers]
    return list(map(torch.from_numpy, labels)), names, (note,)


def _number_texts(splits: Sequence[Sequence[str]]) -> tuple[list[Tensor], tuple[str, ...], tuple[str, ...]]:
    names = class_order(name for split in splits for name in split)
    number = {name: k for k, name in enumerate(names)}
    labels = [torch.tensor([number[name] for name in split], dtype=torch.int64) for split in splits]
    return labels, tuple(names), ()


def _listed(names: Sequence[str]) -> str:
    if len(names) <= _NAMED + 1:
        return ", ".join(names)
    return f"{', '.join(names[:_NAMED])} … {names[-1]} ({len(names)} values)"
