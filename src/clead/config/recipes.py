"""Recipes: those that are shipped and those in files, read with overrides."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from clead.config.overrides import apply_overrides, parse_overrides
from clead.config.run import RunConfig
from clead.config.yaml_io import parse_yaml, yaml_text
from clead.errors import UserError, did_you_mean


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    folder = resources.files("clead") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def recipe_text(recipe: str) -> tuple[str, str]:
    """Return (name, YAML text) of a shipped recipe's name or of a YAML file's path; raises UserError if there is neither."""
    if recipe in recipe_names():
        return recipe, (resources.files("clead") / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    path = Path(recipe)
    if path.is_file():
        try:
            return path.stem, yaml_text(path)
        except UnicodeDecodeError:
            raise UserError(
                f"a recipe must be YAML text, got a binary file: {path}; save it as UTF-8 text, or name a recipe of clead list"
            ) from None
    raise UserError(f"unknown recipe {recipe!r}, neither shipped nor a file; {did_you_mean(recipe, recipe_names())}")


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply overrides ``--group.key VALUE``; raises UserError that lists every problem.

    Naming another threat, attack, model or method starts from that one's defaults; naming another dataset keeps the keys
    that it knows too (batch size, augmentation …). A ``data.path`` for a dataset that has none (digits) means ``auto``.
    Of ``train.epochs``, ``train.budget`` and ``train.minutes``, the one given replaces the others. Code that an override names as
    the model may run, see ``clead.allow_code``.
    """
    named = [value for path, value in parse_overrides(overrides) if path in (["model", "name"], ["model", "factory"])]
    if code := [value for value in named if isinstance(value, str) and ":" in value]:
        from clead.models.user_model import allow_code

        allow_code(*code)
    return read_recipe(recipe, overrides)


def read_recipe(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe as ``load_recipe`` does, with overrides that need not be the user's: they allow no code."""
    name, text = recipe_text(recipe)
    tree = parse_yaml(text, recipe)
    return apply_overrides({"name": name, **tree} if isinstance(tree, dict) else tree, overrides)


def evaluation_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return a configuration without a recipe, to evaluate a model made elsewhere: the data at ``--data.path``."""
    # Nothing is trained, but the complete configuration says how long.
    return apply_overrides({"name": name, "data": {"name": "auto"}, "train": {"epochs": 1}}, overrides)
