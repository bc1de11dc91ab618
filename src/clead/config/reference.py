"""Every key of a configuration with its default, range and meaning, for ``--help`` and the documentation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from clead.config.schema import DEFAULT_NAME, GROUPS, PLAIN_GROUPS, REGISTRY_GROUPS, plain
from clead.config.stages import STAGE_GROUPS
from clead.config.yaml_io import dump_yaml
from clead.settings import takes_text


def key_reference() -> str:
    """Return the text of ``clead train --help`` on every key; what classes of a group share is said once."""
    lines, choices, rows = [], choice_keys(), documented_keys()
    for group in GROUPS:
        members = [row for row in rows if row[0] == group]
        classes = list(dict.fromkeys(name for _, name, *_ in members)) if group in PLAIN_GROUPS else choices[group][2]
        texts: dict[tuple[str, str, str], dict[str, str]] = {}
        for _, name, key, default, allowed, doc in members:
            texts.setdefault((key, allowed, doc), {})[name] = default
        owners = {what: tuple(defaults) for what, defaults in texts.items()}
        lines.append(f"\n{group}")
        if group in choices:
            key, default, names = choices[group]
            lines.append(f"  --{group}.{key}  ({f'default {default}' if default else 'required'}; {' | '.join(names)})")
        # Stable: the keys of every class first, then those of some, class by class.
        for owner in sorted(dict.fromkeys(owners.values()), key=lambda names: (-len(names), classes.index(names[0]))):
            if len(owner) < len(classes):
                lines.append(f"\n  only {group} {', '.join(owner)}")
            for (key, allowed, doc), defaults in texts.items():
                if owners[key, allowed, doc] != owner:
                    continue
                shown = _shown_default(defaults)
                lines.append(f"  --{group}.{key}  ({shown}{f'; {allowed}' if allowed else ''})\n      {doc}")
    lines.append(
        "\nstages\n  A recipe may have several trainings, each from the weights of the one before it. --stages.NAME.group.key is\n"
        f"  a setting of one of them, by number too, as --stages.2.train.epochs (groups: {', '.join(STAGE_GROUPS)}); a key\n"
        "  without stages. holds in all."
    )
    return "\n".join(lines)


def _shown_default(defaults: Mapping[str, str]) -> str:
    """Return the default of a key, given class by class, as one phrase."""
    by_value = {value: [name for name in defaults if defaults[name] == value] for value in defaults.values()}
    if len(by_value) == 1:
        value = next(iter(by_value))
        return value if value == "required" else f"default {value}"
    most = max(by_value, key=lambda value: len(by_value[value]))
    shown = [f"{'/'.join(names)} {value}" for value, names in by_value.items() if len(names) <= 3 or value != most]
    return "default " + ", ".join([*shown, *([f"else {most}"] if len(by_value[most]) > 3 else [])])


def documented_keys() -> list[tuple[str, str, str, str, str, str]]:
    """Return (group, class name, key, default, range and unit, doc) of every key of every group, for ``--help``."""
    rows = []
    for group in GROUPS:
        classes = REGISTRY_GROUPS[group][0].items() if group in REGISTRY_GROUPS else [("", PLAIN_GROUPS[group])]
        for name, cls in classes:
            rows.extend((group, name, *row) for row in rows_of(cls))
    return rows


@functools.cache
def text_keys() -> frozenset[tuple[str, str]]:
    """Return (group, key) of every setting that is free text, such as a path."""
    classes = {group: [cls for _, cls in REGISTRY_GROUPS[group][0].items()] for group in REGISTRY_GROUPS}
    classes |= {group: [cls] for group, cls in PLAIN_GROUPS.items()}
    return frozenset(
        (group, key)
        for group, kinds in classes.items()
        for cls in kinds
        for key, field in cls.__pydantic_fields__.items()
        if takes_text(field.annotation)
    )


def choice_keys() -> dict[str, tuple[str, str | None, list[str]]]:
    """Return group -> (key, default, known names) of every group whose class is chosen by name."""
    return {group: (key, DEFAULT_NAME[group], registry.names()) for group, (registry, key) in REGISTRY_GROUPS.items()}


def _choices(annotation: Any) -> list[Any]:
    """Return what a Literal, alone or in a union, allows."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for argument in get_args(annotation) for choice in _choices(argument)]


def rows_of(cls: Any, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Return (key, default, range and unit, doc) of the settings of one class, those inside others with their dots."""
    rows = []
    for key, field in cls.__pydantic_fields__.items():
        default = field.get_default(call_default_factory=True)
        if dataclasses.is_dataclass(default):
            rows.extend(rows_of(type(default), f"{prefix}{key}."))
            continue
        rules = [
            f"{sign} {bound}"
            for rule in field.metadata
            for word, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
            if (bound := getattr(rule, word, None)) is not None
        ]
        choices = [repr(choice) for choice in _choices(field.annotation)]
        unit = (field.json_schema_extra or {}).get("unit", "")
        allowed = "; ".join(filter(None, [" | ".join(choices), ", ".join(rules), unit]))
        shown = "required" if field.is_required() else dump_yaml(plain(default), default_flow_style=True)
        rows.append((prefix + key, shown.replace("...", "").strip(), allowed, field.description or ""))
    return rows
