"""Which number a class has: the order of names, labels that are not 0 … K − 1, a list of names, and a model's own names."""

from __future__ import annotations

import dataclasses
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import yaml
from pydantic import BeforeValidator
from torch import Tensor

from clead.errors import UserError, did_you_mean, first_line
from clead.interfaces import ImageSet, Splits
from clead.losses.pixels import VOID

_NAMED = 5  # classes that a note names
_LARGEST_LIST = 4_000_000  # bytes of a file of class names
_MOST_CLASSES = 200_000
_LISTS = ("id2label", "label2id", "classes", "class_names", "label_names", "names", "idx_to_class", "class_to_idx")
"""Keys of a JSON or YAML file under which tools keep class names."""


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
    ([tensor([0, 1, 2]), tensor([2])], ('1', '2', '3'), 'labels begin at 1, not at 0, they a')
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
    kind = f"begin at {names[0]}, not at 0" if values[0] > 0 else f"are not 0 … {len(names) - 1}"
    note = (
        f"labels {kind}, they are {_listed(names)}: numbered 0 … {len(names) - 1} in ascending order, "
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


def class_text(name: Any) -> str:
    r"""Return a class name as text; bytes are UTF-8.

    >>> class_text(b"caf\xc3\xa9"), class_text(90), class_text("cat")
    ('café', '90', 'cat')
    """
    if isinstance(name, bytes):
        return name.rstrip(b"\0").decode("utf-8", errors="replace")
    if isinstance(name, np.generic):
        return class_text(name.item())
    return str(name)


def class_list(value: Any) -> tuple[str | tuple[str, ...], ...] | None:
    """Return the names of class 0 … K − 1: for each class its name, or several that mean the same.

    Args:
        value: a list; text with commas; a map id -> name or name -> id; or the path of a file that holds one of them as JSON or
            YAML (also under a key such as ``id2label``), or one name a line. Ids are 0 … K − 1, or 1 … K, which become 0 … K − 1.

    Raises:
        UserError: the file cannot be read, a name is given twice, or ids are not 0 … K − 1.

    >>> class_list("cat, dog"), class_list({"0": ["n01440764", "tench"]})
    (('cat', 'dog'), (('n01440764', 'tench'),))
    """
    if value is None:
        return None
    content = _file_or_text(value) if isinstance(value, (str, Path)) else value
    if isinstance(content, Mapping):
        content = _by_id(content)
    if not isinstance(content, (list, tuple)):
        raise UserError(f"{_RULE}, got {value!r:.80}")
    entries = tuple(_names_of(entry) for entry in content)
    if not 1 <= len(entries) <= _MOST_CLASSES:
        raise UserError(f"must name 1 to {_MOST_CLASSES} classes, got {len(entries)}; give one name per class")
    seen: dict[str, int] = {}
    for k, entry in enumerate(entries):
        if not all(name.strip() for name in entry) or not entry:
            raise UserError(f"every class must have a name, got {content[k]!r:.80} for class {k}; give it one")
        if len(entry) == 1 and entry[0] in seen:
            raise UserError(f"names must differ, got {entry[0]!r} for class {seen[entry[0]]} and {k}; leave one out")
        seen |= {name: k for name in entry}
    return tuple(entry[0] if len(entry) == 1 else entry for entry in entries)


_RULE = (
    "must be names with commas, a list, a map id: name, or a file of one name a line, JSON or YAML, such as "
    "--data.classes cat,dog or --data.classes labels.txt"
)
ClassNames = Annotated[tuple[str | tuple[str, ...], ...] | None, BeforeValidator(class_list)]
"""A setting that names the classes in order; what ``class_list`` returns."""


def _file_or_text(value: str | Path) -> Any:
    """Return what a file holds: a list or a mapping; without such a file, what stands between commas."""
    path, text = Path(value).expanduser(), str(value)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long for a name, or with a null byte
        is_file = False
    if not is_file:
        if "," not in text or path.suffix.lower() in (".txt", ".json", ".yaml", ".yml", ".csv"):
            raise UserError(f"{_RULE}; got {text!r}, which is no file")
        return [name.strip() for name in text.split(",") if name.strip()]
    with path.open("rb") as file:
        content = file.read(_LARGEST_LIST + 1)
    if len(content) > _LARGEST_LIST:
        raise UserError(f"a file of class names must have under {_LARGEST_LIST} bytes, got more: {path}")
    try:
        text = content.decode("utf-8-sig")
        if path.suffix.lower() == ".json" or text.lstrip()[:1] in ("{", "["):
            return _inside(json.loads(text))
        if path.suffix.lower() in (".yaml", ".yml"):
            return _inside(yaml.load(text, _Loader))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{_RULE}; got {str(path)!r}, which is not readable ({first_line(error)})") from None
    return _lines(text)


class _Loader(yaml.BaseLoader):
    """Makes nothing but text, lists and maps; no aliases, a few lines of which can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node; raises YAMLError at an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def _inside(content: Any) -> Any:
    """Return the list or map of names inside what a JSON or YAML file holds."""
    for key in _LISTS if isinstance(content, Mapping) else ():
        if isinstance(content.get(key), (list, Mapping)) and content[key]:
            return content[key]
    return content


def _lines(text: str) -> list[Any]:
    """Return the names of a text file: one a line, also with its number or its WordNet id before it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    numbered = [re.match(r"(\d+)[\s:,;]+(\S.*)", line) for line in lines]
    if lines and all(match and int(match[1]) == k for k, match in enumerate(numbered)):
        return [match[2] for match in numbered if match]
    wordnet = [re.match(r"(n\d{8})\s+(\S.*)", line) for line in lines]
    if lines and all(wordnet):
        return [match.groups() for match in wordnet if match]
    return lines


def _by_id(content: Mapping[Any, Any]) -> list[Any]:
    """Return the names of a map id -> name, or name -> id, in the order of the ids."""
    pairs = list(content.items())
    if not all(_is_id(key) for key, _ in pairs) and all(_is_id(number) for _, number in pairs):
        pairs = [(number, name) for name, number in pairs]
    if not all(_is_id(key) for key, _ in pairs):
        odd = next(key for key, _ in pairs if not _is_id(key))
        raise UserError(f"ids must be the numbers 0 … K - 1, got {odd!r:.60}; give {{0: NAME, 1: NAME}}")
    by_id = sorted((int(str(key)), name) for key, name in pairs) if pairs else []
    ids = [number for number, _ in by_id]
    if ids not in (list(range(len(ids))), list(range(1, len(ids) + 1))):
        odd = next(
            number for number, k in zip(ids, range(ids[0], ids[0] + len(ids)), strict=True) if number != k or ids[0] > 1
        )
        raise UserError(
            f"ids must be 0 … {len(ids) - 1}, each once, got {ids[0]} … {ids[-1]} ({odd} is out of place); "
            "name every class, also those without an image"
        )
    return [name for _, name in by_id]


def _is_id(value: Any) -> bool:
    return not isinstance(value, (bool, float)) and re.fullmatch(r"\d{1,9}", str(value)) is not None


def _names_of(entry: Any) -> tuple[str, ...]:
    if isinstance(entry, bool):
        raise UserError(f"a name must be text, got {entry}; put it in quotes, such as '\"yes\"'")
    if isinstance(entry, (list, tuple)):
        return tuple(class_text(name).strip() for name in entry)
    if isinstance(entry, Mapping) or entry is None:
        raise UserError(f"a name must be text, got {entry!r:.60}; give one name per class")
    return (class_text(entry).strip(),)


def _loose(name: str) -> str:
    """Return what names that differ by case, blanks, hyphens and underscores alone have in common."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name)).strip().casefold()


def match_names(names: Sequence[str], known: Sequence[Sequence[str]]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Find the number of each name: its place in ``known``, where a class may have several names.

    Exact names come first; of others case, blanks, hyphens and underscores do not count where that leaves one class only.

    Returns:
        name -> number for the names that were found, and (name, known name) for those that are not written alike.

    >>> match_names(["Sea_Lion", "owl"], [("cat",), ("sea lion", "otary")])
    ({'Sea_Lion': 1}, [('Sea_Lion', 'sea lion')])
    """
    exact: dict[str, set[int]] = {}
    loose: dict[str, set[int]] = {}
    for k, entry in enumerate(known):
        for name in entry:
            exact.setdefault(name, set()).add(k)
            for form in {_loose(name), *(_loose(synonym) for synonym in name.split(",")[:1])}:
                loose.setdefault(form, set()).add(k)
    numbers, differing = {}, []
    taken: set[int] = set()
    for name in names:
        if len(exact.get(name, ())) == 1:
            numbers[name] = next(iter(exact[name]))
            taken.add(numbers[name])
    for name in names:
        candidates = loose.get(_loose(name), set()) - taken
        if name not in numbers and len(candidates) == 1:
            numbers[name] = next(iter(candidates))
            taken.add(numbers[name])
            differing.append((name, known[numbers[name]][0]))
    return numbers, differing


@dataclasses.dataclass(frozen=True)
class Renumbering:
    """Class k of the data becomes ``numbers[k]``, −1 for a class without an image; ``classes`` are the names in the new order."""

    numbers: Tensor
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __call__(self, labels: Tensor) -> Tensor:
        """Return the new labels, (N,) int64, or masks, (N, H, W) uint8, void where they were."""
        if labels.dim() < 3:
            return self.numbers[labels] if len(labels) else labels
        table = torch.full((VOID + 1,), VOID, dtype=torch.uint8)
        table[: len(self.numbers)] = self.numbers.where(self.numbers >= 0, VOID).to(torch.uint8)
        return table[labels.int()]

    def of(self, images: ImageSet) -> ImageSet:
        """Return the images with their new labels."""
        pseudo = None if images.pseudo_labels is None else self(images.pseudo_labels)
        return dataclasses.replace(images, labels=self(images.labels), pseudo_labels=pseudo)


def class_counts(labels: Iterable[Tensor], num_classes: int) -> list[int]:
    """Return how many labels of all splits are of each class; of masks how many pixels, void left out.

    >>> class_counts([torch.tensor([2, 0]), torch.tensor([2])], 3)
    [1, 0, 2]
    """
    counts = torch.zeros(num_classes, dtype=torch.int64)
    for each in labels:
        for piece in each.split(64) if each.dim() > 1 else [each]:  # pixels become int64 on the way
            counts += torch.bincount(piece.flatten().long(), minlength=num_classes)[:num_classes]
    return counts.tolist()


def renumbering(
    classes: Sequence[str], counts: Sequence[int], known: Sequence[str | Sequence[str]], *, source: str = "data.classes"
) -> Renumbering:
    """Say how the labels of data become those of a list of names.

    Names are looked up in the list. Data without names of its own (its classes are called 0 … K − 1, and the list has no such
    names) has numbers: label k is class k of the list.

    Args:
        classes: the data's K class names.
        counts: images of each class; a class without an image need not be in the list.
        known: for each class of the list its name, or several.
        source: what the list is, for messages.

    Raises:
        UserError: a class with images is not in the list, or two classes of the data are one there.
    """
    known = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in known]
    filled = [name for name, count in zip(classes, counts, strict=True) if count]
    numbers, differing = match_names(filled, known)
    names = [entry[0] for entry in known]
    unnamed = list(classes) == [str(k) for k in range(len(classes))] and not numbers
    if unnamed:
        if len(classes) > len(known):
            beyond = [int(name) for name in filled if int(name) >= len(known)]
            if beyond:
                raise UserError(
                    f"{source} names {len(known)} classes, 0 … {len(known) - 1}, but the data has the label {beyond[0]}; "
                    "name every class, or number the labels from 0"
                )
        numbers = {name: int(name) for name in filled}
    elif lacking := [name for name in filled if name not in numbers]:
        hint = did_you_mean(lacking[0], [name for entry in known for name in entry])
        raise UserError(
            f"{source} lacks {_quoted(lacking)}, which the data has images of; {hint}; name every class in --data.classes"
        )
    else:  # the name that the data uses, of several
        for column in range(max(map(len, known))):
            if any(name in (entry[column] for entry in known if len(entry) > column) for name in filled):
                names = [entry[min(column, len(entry) - 1)] for entry in known]
                break
    mapping = torch.tensor([numbers.get(name, -1) for name in classes], dtype=torch.int64)
    notes = []
    if differing:
        shown = ", ".join(f"{a!r} as {b!r}" for a, b in differing[:_NAMED])
        more = f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
        notes.append(
            f"class names that differ in case, blanks or underscores only are taken for the same: {shown}{more}"
        )
    if len(filled) < len(known):
        notes.append(f"the data has images of {len(filled)} of the {len(known)} classes of {source}")
    return Renumbering(mapping, tuple(names), tuple(notes))


def align_classes(
    splits: Splits,
    model_classes: Sequence[str] | None,
    *,
    source: str = "the model",
    names_must_agree: bool = False,
    order_given: bool = False,
) -> tuple[Splits, tuple[str, ...]]:
    """Number the data's classes as the model does, by name, and say what that changed.

    Args:
        splits: the data.
        model_classes: the model's K class names in the order of its outputs; None, or names that say nothing (``0`` … ``K-1``,
            ``LABEL_0`` …), leave the data as it is.
        source: what the model is, for messages.
        names_must_agree: refuse data whose names the model does not know; otherwise, if none agrees, label k stays class k.
        order_given: the user has said the order (``data.classes``): a disagreement is noted, and the order stays.

    Returns:
        The data in the model's numbers, with the model's classes, and notes.

    Raises:
        UserError: the model knows some of the data's classes but not all of them, or none if ``names_must_agree``.
    """
    names = None if model_classes is None else tuple(map(class_text, model_classes))
    if names is None or names == splits.classes or (not names_must_agree and _says_nothing(names, splits.classes)):
        return splits, ()
    if splits.test.labels.dim() == 2:
        return _columns_in_order(splits, names, source)
    counts = class_counts((each.labels for each in (splits.train, splits.val, splits.test)), len(splits.classes))
    filled = [name for name, count in zip(splits.classes, counts, strict=True) if count]
    known = [(name,) for name in names]
    numbers, _ = match_names(filled, known)
    disagreeing = [
        name for name in filled if numbers.get(name, splits.classes.index(name)) != splits.classes.index(name)
    ]
    if order_given and not names_must_agree:
        if not disagreeing and len(numbers) == len(filled):
            return splits, ()
        return splits, (f"{_disagreement(splits, names, filled, numbers)}; --data.classes holds",)
    if not names_must_agree and len(numbers) < len(filled) and not disagreeing:
        if len(names) != len(splits.classes) and not _unnamed(splits.classes):
            raise UserError(_unknown(filled, numbers, names, source))
        lacking = [name for name in filled if name not in numbers]
        note = f"label k is taken for class k of {source}, whose names for them are others: " + ", ".join(
            f"{name!r} is {names[k]!r}" for name in lacking[:_NAMED] if (k := splits.classes.index(name)) < len(names)
        )
        if _unnamed(splits.classes):
            note = f"the data has no class names: label k is taken for class k of {source} (0 is {names[0]!r})"
            splits = dataclasses.replace(splits, classes=names) if len(names) >= len(splits.classes) else splits
        return splits, (note,)
    if len(numbers) < len(filled):
        raise UserError(_unknown(filled, numbers, names, source))
    new = renumbering(splits.classes, counts, known, source=source)
    notes = list(new.notes)
    if disagreeing:
        notes.append(f"{_disagreement(splits, names, filled, numbers)}: labels were numbered as {source} does, by name")
    sets = [new.of(images) for images in (splits.train, splits.val, splits.test)]
    changed = dataclasses.replace(splits, train=sets[0], val=sets[1], test=sets[2], classes=names)
    return changed, tuple(notes)


def _columns_in_order(splits: Splits, names: tuple[str, ...], source: str) -> tuple[Splits, tuple[str, ...]]:
    """Return data of several labels with its columns as the model has them; a label that the data lacks is unknown."""
    if lacking := [name for name in splits.classes if name not in names]:
        raise UserError(
            f"{source} knows the labels {_listed(names)}, not {lacking[0]!r} of the data; {did_you_mean(lacking[0], names)}"
        )
    place = {name: k for k, name in enumerate(splits.classes)}

    def ordered(images: ImageSet) -> ImageSet:
        unknown = torch.full((len(images),), -1)
        columns = [images.labels[:, place[name]] if name in place else unknown for name in names]
        return dataclasses.replace(images, labels=torch.stack(columns, 1))

    train, val, test = map(ordered, (splits.train, splits.val, splits.test))
    note = f"the labels are in the order of {source}; those that the data lacks are unknown"
    return dataclasses.replace(splits, train=train, val=val, test=test, classes=names), (note,)


def _unnamed(names: Sequence[str]) -> bool:
    return list(names) == [str(k) for k in range(len(names))]


def _says_nothing(names: Sequence[str], data: Sequence[str]) -> bool:
    """Tell whether names are numbers or placeholders that say nothing of data with other names."""
    if all(re.fullmatch(rf"(LABEL|class)[_ ]?{k}", name, re.IGNORECASE) for k, name in enumerate(names)):
        return True
    return _unnamed(names) and not set(names) & set(data)


def _unknown(filled: Sequence[str], numbers: Mapping[str, int], names: Sequence[str], source: str) -> str:
    lacking = [name for name in filled if name not in numbers]
    return (
        f"{source} was trained on classes {_listed(names)}, the data has {_listed(lacking)}, which it does not know; "
        f"{did_you_mean(lacking[0], names)} (if the names alone differ, give those of the model in the order of the data's "
        f"labels: --data.classes {','.join(names[:3])}{',…' if len(names) > 3 else ''})"
    )


def _disagreement(splits: Splits, names: Sequence[str], filled: Sequence[str], numbers: Mapping[str, int]) -> str:
    pairs = [(splits.classes.index(name), name) for name in filled]
    odd = [(k, name) for k, name in pairs if k >= len(names) or names[k] != name]
    shown = "; ".join(
        f"class {k} is {name!r} in the data and {names[k]!r} in the model" for k, name in odd[:3] if k < len(names)
    )
    lacking = [name for name in filled if name not in numbers]
    unknown = f"; the model does not name {_quoted(lacking)}" if lacking else ""
    more = f"; and {len(odd) - 3} more" if len(odd) > 3 else ""
    return f"the order of the classes differs: {shown}{more}{unknown}"


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_NAMED])) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
