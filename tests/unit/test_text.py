"""Text in and out: YAML is what it looks like, and what comes from elsewhere stays text wherever it is shown."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from clead.config import RunConfig, dump_yaml, load_recipe, parse_overrides, parse_yaml
from clead.config.yaml_io import parse_text, parse_value
from clead.errors import UserError
from clead.settings import Ratio

PLAIN = {
    "010": 10,
    "0o17": 15,
    "0x1F": 31,
    "+5": 5,
    "-0": 0,
    "1e3": 1000.0,
    "1E-3": 0.001,
    ".5": 0.5,
    "5.": 5.0,
    "-.5e1": -5.0,
    "1.50": 1.5,
    ".inf": float("inf"),
    "true": True,
    "False": False,
    "~": None,
    "null": None,
    "1:30": "1:30",
    "190:20:30": "190:20:30",
    "1_000": "1_000",
    "0b1": "0b1",
    "no": "no",
    "NO": "NO",
    "off": "off",
    "yes": "yes",
    "On": "On",
    "y": "y",
    "2020-01-01": "2020-01-01",
    "2001-12-14 21:59:43": "2001-12-14 21:59:43",
    "=": "=",
    "<<": "<<",
    "1e": "1e",
    "0o8": "0o8",
    "8/255": "8/255",
}


@pytest.mark.parametrize("text, value", PLAIN.items())
def test_a_plain_word_is_what_yaml_1_2_says(text, value):
    for got in (parse_value(text), parse_yaml(f"key: {text}", "file")["key"], parse_value(f"[{text}]")[0]):
        assert got == value and isinstance(got, type(value))


@pytest.mark.parametrize("text", ["!!int '3'", "!!binary aGk=", "!!python/name:os.system ''", "!x 1", "a: !!set {b}"])
def test_tags_are_refused(text):
    with pytest.raises(UserError, match="tags are not supported"):
        parse_yaml(text, "file")


HOSTILE = {
    "aliases": "a: &a [1]\nb: *a",
    "bomb": "a: &a [x,x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(30)),
    "deep": "[" * 5000,
    "deep mapping": "".join(" " * i + "a:\n" for i in range(1500)),
    "number": "a: " + "9" * 100_000,
    "twice": "a: 1\na: 2",
    "two documents": "a: 1\n---\nb: 2",
    "tab": "a:\n\t- b",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml_is_one_line(text):
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "file.yaml")
    (message,) = caught.value.problems
    assert message.startswith("file.yaml is not valid YAML") and len(message) < 300


NAMES = ["010", "2024", "no", "on", "1e3", ".5", "1.50", "true", "True", "0x1F", "1:30", "1_000", "a #2", "[x]", "a: b"]
NAMES += [
    "2020-01-01",
    "=",
    "<<",
    "*star",
    "&and",
    "!bang",
    "- dash",
    "日本 ü",
    "tab\there",
    "-1",
    "~user",
    "%41",
    "{x",
    "null.d",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_its_text_whatever_it_looks_like(name):
    config = load_recipe("digits-standard", [f"--data.path={name}"])
    assert config.data.path == Path(name)
    again = RunConfig.from_dict(parse_yaml(config.to_yaml(), "config.yaml"))
    assert again == config and again.data.path == Path(name)
    assert yaml.safe_load(config.to_yaml())["data"]["path"] == name  # by YAML 1.1, too


@pytest.mark.parametrize("name", ["010", "2024", "1e3", ".5", "1.50", "0x1F", "no", "1:30", "off", "2020-01-01"])
def test_a_path_in_a_recipe_is_its_text_too(name, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{name: auto, path: {name}}}\ntrain: {{epochs: 1}}")
    assert load_recipe(str(recipe)).data.path == Path(name)


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("eval.images", "1e3", 1000),
        ("eval.images", "010", 10),
        ("eval.images", "1_000", 1000),
        ("eval.images", "0x10", 16),
        ("optim.lr", ".5", 0.5),
        ("optim.lr", "1e-3", 0.001),
        ("train.compile", "no", False),
        ("train.compile", "on", True),
        ("threat.eps", "1e-3", 0.001),
        ("train.patience", "~", None),
    ],
)
def test_a_number_or_switch_is_what_it_looks_like(key, text, value):
    config = load_recipe("digits-standard", [f"--{key}", text])
    group, name = key.split(".")
    got = getattr(getattr(config, group), name)
    assert got == value and type(got) in (type(value), Ratio)


@pytest.mark.parametrize(
    "key, text", [("eval.images", "0b1"), ("eval.images", "1:30"), ("eval.images", "1.5"), ("optim.lr", "2020-01-01")]
)
def test_what_is_no_number_is_refused_with_the_text_given(key, text):
    with pytest.raises(UserError, match=f"{key}: .*got .*") as caught:
        load_recipe("digits-standard", [f"--{key}", text])
    assert text in str(caught.value) or "fractional" in str(caught.value)


@pytest.mark.parametrize("arguments", [["--train.start_from", ""], ["--train.start_from="], ["--data.path="]])
def test_an_empty_value_is_not_taken_for_none(arguments):
    with pytest.raises(UserError, match="the value is empty; give --"):
        parse_overrides(arguments)


def test_quotes_make_text_of_null():
    assert parse_text("'null'") == "null" and parse_text("null") is None and parse_text("'half") == "'half"


looks_like_something = st.one_of(
    st.sampled_from(
        [*PLAIN, *NAMES, "", " ", "'", '"', "a\nb", "\x85", "\u2028", "\ufeff", "#", ": ", "...", "---", "\x7f"]
    ),
    st.from_regex(r"[-+]?[0-9_]{0,8}\.?[0-9_]{0,8}([eE][-+]?[0-9]{1,3})?", fullmatch=True),
    st.from_regex(r"[0-9]{1,4}[-:][0-9]{1,2}[-:][0-9]{1,2}", fullmatch=True),
    st.text(max_size=30),
    st.floats().map(repr),
    st.text(alphabet="0123456789.eE+-_:xobinfa ", max_size=8),
)
leaves = st.one_of(
    looks_like_something, st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.just(1e-05)
)


@pytest.mark.slow
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(looks_like_something, inner, max_size=4),
        max_leaves=8,
    )
)
@example(1e-05)
@example(1e22)
@example("1e3")
def test_what_is_dumped_is_read_as_it_was(tree):
    def kinds(value):
        if isinstance(value, dict):
            return {key: kinds(each) for key, each in value.items()}
        if isinstance(value, list):
            return [kinds(each) for each in value]
        return next(kind for kind in (bool, int, float, str, type(None)) if isinstance(value, kind))

    text = dump_yaml(tree)
    for again in (parse_yaml(text, "file"), yaml.safe_load(text)):
        assert again == tree and kinds(again) == kinds(tree)


@pytest.mark.parametrize(
    "name", ["1e3", "0o17", "08", "1e-3", "12e03", "010", "no", "1:30", "1_000", "=", "2020-01-01"]
)
def test_configurations_written_before_load_as_they_did(name):
    """They were dumped by YAML 1.1's rules, by which ``1e3`` and ``08`` are text without quotes."""
    tree = load_recipe("digits-standard", ["--data.path", "x"]).to_dict()
    tree["data"]["path"] = name
    old = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    assert RunConfig.from_dict(parse_yaml(old, "config.yaml")).data.path == Path(name)
    tree["threat"]["eps"] = "1e-3"
    old = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    assert RunConfig.from_dict(parse_yaml(old, "config.yaml")).threat.eps.text == "1e-3"


def test_shipped_recipes_are_the_same_by_both_versions_of_yaml():
    from clead.config import recipe_names, recipe_text

    for name in recipe_names():
        text = recipe_text(name)[1]
        assert parse_yaml(text, name) == yaml.safe_load(text)
