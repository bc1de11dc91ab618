"""The configuration of a run: one frozen tree, whose leaves are the settings of the objects themselves; YAML in and out.

YAML and command-line overrides go through the same validation, and every problem is listed at once.
"""

from clead.config.overrides import parse_overrides
from clead.config.recipes import evaluation_config, load_recipe, read_recipe, recipe_names, recipe_text
from clead.config.reference import choice_keys, documented_keys, key_reference, rows_of
from clead.config.run import RunConfig
from clead.config.schema import GROUPS, TUNE, Eval, Optim, Train
from clead.config.stages import Stage
from clead.config.yaml_io import dump_yaml, parse_yaml, yaml_text
from clead.renamed import old_names

__all__ = [
    "GROUPS",
    "TUNE",
    "Eval",
    "Optim",
    "RunConfig",
    "Stage",
    "Train",
    "evaluation_config",
    "choice_keys",
    "documented_keys",
    "key_reference",
    "load_recipe",
    "parse_overrides",
    "dump_yaml",
    "parse_yaml",
    "read_recipe",
    "recipe_names",
    "recipe_text",
    "rows_of",
    "yaml_text",
]

__getattr__ = old_names(__name__, {"bare_config": "evaluation_config"})
