"""Folder discovery, duplicates, and suggestions for unknown names."""

from __future__ import annotations

import sys

import pytest

from clead.attacks import ATTACKS, OBJECTIVES
from clead.data.datasets import DATASETS
from clead.errors import MissingExtra, UserError, did_you_mean
from clead.methods import METHODS
from clead.models import MODELS
from clead.registry import Registry
from clead.threats import THREATS


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A package made for the test: one file that registers, one that does not."""
    package = tmp_path / "made_for_a_test"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from clead.registry import Registry\nTHINGS = Registry('thing', 'made_for_a_test')\n"
    )
    (package / "apple.py").write_text(
        "from made_for_a_test import THINGS\n@THINGS.register('apple')\nclass Apple:\n    pass\n"
    )
    (package / "helper.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package
    for name in [name for name in sys.modules if name.startswith("made_for_a_test")]:
        del sys.modules[name]


def things() -> Registry:
    from made_for_a_test import THINGS

    return THINGS


def test_a_file_in_the_folder_is_found_on_the_first_look_up(folder):
    registry = things()
    assert "made_for_a_test.apple" not in sys.modules, "discovery is lazy"
    assert registry.names() == ["apple"]
    assert registry.get("apple").__name__ == "Apple"
    assert registry.items() == [("apple", registry.get("apple"))]


def test_a_new_file_is_all_it_takes(folder):
    (folder / "pear.py").write_text(
        "from made_for_a_test import THINGS\n@THINGS.register('pear')\ndef pear():\n    return 2\n"
    )
    assert things().names() == ["apple", "pear"]
    assert things().get("pear")() == 2


def test_a_name_given_twice_raises(folder):
    (folder / "other.py").write_text(
        "from made_for_a_test import THINGS\n@THINGS.register('apple')\nclass Other:\n    pass\n"
    )
    with pytest.raises(ValueError, match="thing 'apple' is registered twice: .*Apple.* and .*Other"):
        things().names()


def test_register_returns_what_it_files(folder):
    def plum() -> int:
        return 3

    assert things().register("plum")(plum) is plum
    assert things().get("plum") is plum


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("aple", "unknown thing 'aple'; did you mean 'apple'?"),
        ("zzz", "unknown thing 'zzz'; known: apple"),
        (3, "unknown thing 3; known: apple"),
        ("", "unknown thing ''; known: apple"),
    ],
)
def test_an_unknown_name_gets_suggestions(folder, name, says):
    with pytest.raises(UserError) as caught:
        things().get(name)
    assert str(caught.value) == says


def test_did_you_mean():
    assert did_you_mean("x", []) == "known: none"
    assert did_you_mean("step", ["steps", "step_size", "norm"]) == "did you mean 'steps' or 'step_size'?"


def test_what_is_shipped_is_registered():
    assert {"linf", "l2", "l1"} <= set(THREATS.names())
    assert {"fgsm", "pgd"} <= set(ATTACKS.names())
    assert {"cross_entropy", "margin", "dlr", "kl", "embedding", "contrastive"} <= set(OBJECTIVES.names())
    assert {"clead", "standard", "pgd_at", "trades"} <= set(METHODS.names())
    assert MODELS.names() and DATASETS.names()


def test_several_problems_are_one_error_with_a_line_each():
    error = UserError("a: is required", "b: is required")
    assert str(error) == "a: is required\nb: is required" and error.problems == ("a: is required", "b: is required")
    missing = MissingExtra("pyarrow", "data", "reading parquet")
    assert str(missing) == "reading parquet needs pyarrow, which is not installed; run: pip install 'clead[data]'"
