"""YAML in and out: safe, of bounded size, without what hides a mistake; a plain word is what it looks like.

Words mean what YAML 1.2 says (its core schema), not 1.1: ``no``, ``on``, ``1:30``, ``1_000``, ``0b1``, ``2020-01-01`` and ``<<``
are text, ``010`` is ten and ``1e3`` a number. Numbers remember how they were written, so that a path ``010`` stays one. What is
written here is quoted so that YAML 1.1 reads the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.error import MarkedYAMLError

from clead.atomic_io import open_regular
from clead.errors import UserError
from clead.settings import WrittenFloat, WrittenInt

_LARGEST_YAML = 1_000_000

_NULL = re.compile(r"(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_SIGNS = list("-+.0123456789")


def yaml_text(path: Path) -> str:
    """Return the text of a recipe or a run's configuration; raises UserError if it is too large to be one."""
    with open_regular(path) as file:
        content = file.read(_LARGEST_YAML + 1)
    if len(content) > _LARGEST_YAML:
        raise UserError(
            f"a recipe must be under {_LARGEST_YAML} bytes, got more: {path}; give a recipe, or a run's config.yaml"
        )
    return content.decode()


class _Loader(yaml.SafeLoader):
    """Safe YAML without what hides a mistake or explodes: a key given twice, aliases and tags are errors."""

    yaml_implicit_resolvers: dict[Any, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise MarkedYAMLError(None, None, f"aliases are not supported, got *{event.anchor}", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise MarkedYAMLError(None, None, f"tags are not supported, got {event.tag}", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise MarkedYAMLError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return super().construct_mapping(node, deep)


def _number(loader: Any, node: Any) -> int | float:
    """Return a number as YAML 1.2 reads it, with its text."""
    text = node.value
    if _INT.match(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return WrittenInt(int(text[2:] if base != 10 else text, base), text)
    return WrittenFloat(float(re.sub(r"\.(?=[a-zA-Z])", "", text)), text)


for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", _BOOL, list("tTfF")),
    ("tag:yaml.org,2002:int", _INT, _SIGNS),
    ("tag:yaml.org,2002:float", _FLOAT, _SIGNS),
):
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would take for something else."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", _INT, _SIGNS)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _SIGNS)
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        # Line breaks of Unicode in plain text are folded to spaces; escaped they stay.
        "tag:yaml.org,2002:str",
        text,
        style=None if text.isprintable() else '"',
    ),
)
_Dumper.add_representer(
    float,
    lambda dumper, value: dumper.represent_scalar(
        # With a dot: YAML 1.1 takes 1e-05 for text.
        "tag:yaml.org,2002:float",
        re.sub(r"^(-?\d+)e", r"\1.0e", repr(value)).replace("inf", ".inf").replace("nan", ".nan"),
    ),
)


def dump_yaml(tree: Any, **options: Any) -> str:
    """Return plain nested dicts, lists and numbers as YAML that ``parse_yaml`` reads as they were."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **options)


def parse_yaml(text: str, source: str) -> Any:
    """Return what safe YAML holds; raises UserError naming the line of a syntax error."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{source} is not valid YAML{where}: {getattr(error, 'problem', None) or 'cannot be parsed'}; "
            "mend that line, with one key: value per line"
        ) from None


def parse_value(text: str) -> Any:
    """Return the scalar or list that a value on the command line is, or the text itself where it is no YAML."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        return text


def parse_text(text: str) -> str | None:
    """Return the text that a value on the command line is, such as a path, or None for ``null``; quotes around it are taken off.

    >>> parse_text("010"), parse_text("my data #2"), parse_text("null"), parse_text("'null'")
    ('010', 'my data #2', None, 'null')
    """
    if _NULL.match(text):
        return None
    quoted = parse_value(text) if text[0] in "'\"" else None
    return quoted if isinstance(quoted, str) else text
