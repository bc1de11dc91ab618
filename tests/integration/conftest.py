"""A trained run that tests may spoil; files that need another one have fixtures of the same names."""

import shutil

import pytest

import clead
from clead.config import load_recipe
from support import TINY


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A small run on digits with its evaluation, which no test changes."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    clead.train(load_recipe("digits-standard", TINY), out=folder, show=False)
    clead.evaluate_run(folder, show=False)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of ``trained``."""
    return shutil.copytree(trained, tmp_path / "run")
