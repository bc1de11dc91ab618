"""What became of old names: renamed ones work until version 0.3 and say once what to write instead; retired keys say why."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any

from clead.output import tell

VALUES: dict[str, dict[str, str]] = {"eval.suite": {"queries": "black_box"}}
"""Key of the configuration → old value → new one."""
FIELDS = {"broken": "num_successes", "largest": "max_distance"}
"""Old name of a field of records and of results of measurements → new one."""
_ANY = object()
RETIRED: dict[tuple[str, str], Any] = {
    ("train", "parts"): _ANY,
    ("method", "contrastive_ramp"): "constant",
    ("method", "temperature_end"): None,
    ("method", "stop_gradient"): False,
    ("method", "negatives"): "all",
    ("method", "hardness"): 1.0,
    ("method", "asymmetry"): 0.8,
    ("method", "contrastive_layer"): None,
    ("method", "queue"): 0,
    ("method", "momentum"): 0.99,
    ("method", "pseudo_label_confidence"): None,
}
"""Keys of earlier versions, which stand in the configurations of their runs, and their value that changed nothing."""
RETIRED_VALUES = {("method", "contrastive_loss"): ("prototype", "asymmetric")}
_warned: set[str] = set()


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Say in a DeprecationWarning that the Python name ``old`` is called ``new`` now, at its first use."""
    if old not in _warned:
        _warned.add(old)
        warnings.warn(
            f"{old}: write {new}; the old name goes with version 0.3", DeprecationWarning, stacklevel=stacklevel
        )


def note_renamed(old: str, new: str) -> None:
    """Say on standard error that what a user wrote as ``old`` is called ``new`` now, at its first use."""
    if old not in _warned:
        _warned.add(old)
        tell(f"note: {old} is called {new} now; the old name goes with version 0.3")


def current_value(key: str, value: Any) -> Any:
    """Return the new name of what a user gave as ``key``, and say so if it was the old one."""
    new = VALUES[key].get(value, value) if isinstance(value, str) else value
    if new != value:
        note_renamed(f"{key} {value}", new)
    return new


def updated(stored: Any) -> Any:
    """Return what a file holds, nested mappings, with the new names in place of the old ones; nothing is said of it."""
    if isinstance(stored, list):
        return [updated(each) for each in stored]
    if not isinstance(stored, Mapping):
        return stored
    renamed = {key.rpartition(".")[2]: values for key, values in VALUES.items()}
    return {
        key: renamed[key].get(value, value) if key in renamed and isinstance(value, str) else updated(value)
        for key, value in stored.items()
    }


def current_field(fields: Collection[str], name: str) -> str:
    """Return the name in ``fields`` that the old name of a field has now, or ``name`` where it has none."""
    new = FIELDS.get(name, name)
    return new if new in fields else name


class RenamedFields(dict[str, Any]):
    """A result whose values are found by the old names of ``FIELDS`` too."""

    def __missing__(self, name: str) -> Any:
        if (new := current_field(self, name)) == name:
            raise KeyError(name)
        warn_renamed(name, new)
        return self[new]


def old_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module whose names were changed or have moved.

    names: old name → new one, or ``package.module:name``, or ``package.module:`` where it is called the same.
    """

    def getattr_(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        where, _, new = names[name].rpartition(":")
        new = new or name
        warn_renamed(f"{module}.{name}", f"{where or module}.{new}")
        return getattr(import_module(where or module), new)

    return getattr_


def keep_old_methods(cls: Any, methods: Mapping[str, str]) -> None:
    """Let a class of a plug-in that has a method by its old name be called by the new one, and the reverse.

    methods: old name → new name.
    """
    for old, new in methods.items():
        name, attributes = f"{cls.__name__}.{old}", vars(cls)
        if old in attributes and new not in attributes:
            warn_renamed(name, new, stacklevel=5)
            setattr(cls, new, attributes[old])
        elif new in attributes and callable(attributes[new]) and not hasattr(cls, old):
            setattr(cls, old, _renamed_method(name, new))


def _renamed_method(old: str, new: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **keywords: Any) -> Any:
        warn_renamed(old, new)
        return getattr(self, new)(*args, **keywords)

    return method


def retired_problem(group: str, key: str, value: Any) -> str:
    """Say why a key of an earlier version, or a value of one, can be used no more."""
    if RETIRED.get((group, key)) is _ANY:
        return f"{group}.{key}: is no setting any more; leave it out: any number of processes trains alike"
    return (
        f"{group}.{key}: left with version 0.2.0, because it gained nothing, got {value!r}; leave it out, or run it at the git "
        "tag studies-1: git checkout studies-1"
    )


def without_retired(group: str, values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the keys that still exist, and what is wrong with the others: nothing, if they changed nothing."""
    problems = [
        retired_problem(group, key, value)
        for key, value in values.items()
        if ((group, key) in RETIRED and RETIRED[group, key] not in (_ANY, value))
        or value in RETIRED_VALUES.get((group, key), ())
    ]
    gone = {key for key in values if (group, key) in RETIRED or values[key] in RETIRED_VALUES.get((group, key), ())}
    return {key: value for key, value in values.items() if key not in gone}, problems
