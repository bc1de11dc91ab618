"""YAML in: safe, of bounded size, and without what hides a mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.error import MarkedYAMLError

from clead.errors import UserError

_LARGEST_YAML = 1_000_000


def yaml_text(path: Path) -> str:
    """Return the text of a recipe or a run's configuration; raises UserError if it is too large to be one."""
    with path.open("rb") as file:
        content = file.read(_LARGEST_YAML + 1)  # not its size on disk, which a pipe or device does not tell
    if len(content) > _LARGEST_YAML:
        raise UserError(f"a recipe must be under {_LARGEST_YAML} bytes, got more: {path}")
    return content.decode()


class _Loader(yaml.SafeLoader):
    """Safe YAML without what hides a mistake or explodes: a key given twice and aliases are errors."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise MarkedYAMLError(None, None, f"aliases are not supported, got *{event.anchor}", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise MarkedYAMLError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, source: str) -> Any:
    """Return what safe YAML holds; raises UserError naming the line of a syntax error."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{source} is not valid YAML{where}: {getattr(error, 'problem', None) or 'cannot be parsed'}"
        ) from None


def parse_value(text: str) -> Any:
    """Return the scalar or list that a value on the command line is, or the text itself where it is no YAML."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        return text
