"""The configuration: round trips, overrides, and mistakes, each said in one line."""

import dataclasses
from typing import get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from clead.attacks import ATTACKS
from clead.attacks.pgd import PGD
from clead.config import (
    GROUPS,
    Optim,
    RunConfig,
    Train,
    choice_keys,
    documented_keys,
    key_reference,
    load_recipe,
    parse_overrides,
    parse_yaml,
    recipe_names,
)
from clead.config.schema import TASK_SUITES, SuiteName
from clead.data.datasets import DATASETS
from clead.data.datasets.digits import Digits
from clead.errors import UserError
from clead.evaluation.suites import SUITE_TITLES, suite
from clead.methods import METHODS
from clead.models import MODELS
from clead.tasks import TASKS
from clead.threats import THREATS

CHOSEN = {
    "data": (DATASETS, "name"),
    "task": (TASKS, "name"),
    "model": (MODELS, "name"),
    "threat": (THREATS, "norm"),
    "attack": (ATTACKS, "name"),
    "method": (METHODS, "name"),
}
REQUIRED = {"network": "timm:resnet18", "path": "somewhere", "factory": "a.py:b"}


def problems(call):
    with pytest.raises(UserError) as caught:
        call()
    found = caught.value.problems
    assert found and all(p and "\n" not in p and len(p) < 500 for p in found)
    return list(found)


def tree(**groups):
    return {"data": {"name": "digits"}, "train": {"epochs": 1}, **groups}


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_round_trips(recipe):
    config = load_recipe(recipe)
    assert config.name == recipe
    assert RunConfig.from_dict(config.to_dict()) == config
    assert RunConfig.from_dict(yaml.safe_load(config.to_yaml())) == config
    assert RunConfig.from_dict(parse_yaml(config.to_yaml(), "it")).to_yaml() == config.to_yaml()


@pytest.mark.parametrize("group, name", [(group, name) for group, (r, _) in CHOSEN.items() for name in r.names()])
def test_every_registered_class_round_trips(group, name):
    registry, key = CHOSEN[group]
    fields = registry.get(name).__pydantic_fields__
    given = {k: v for k, v in REQUIRED.items() if k in fields and fields[k].is_required()}
    taught = {"train": {"epochs": 1, "teacher": "start"}} if getattr(registry.get(name), "needs_teacher", False) else {}
    config = RunConfig.from_dict(tree(**{group: {key: name, **given}}, **taught))
    assert type(getattr(config, group)) is registry.get(name)
    assert config.to_dict()[group][key] == name
    assert set(config.to_dict()[group]) - {key} == set(fields)
    assert RunConfig.from_dict(yaml.safe_load(config.to_yaml())) == config


@settings(max_examples=40, deadline=None)
@given(
    eps=st.one_of(st.floats(0, 1), st.integers(0, 255).map(lambda n: f"{n}/255")),
    lr=st.floats(1e-12, 1e12),
    milestones=st.lists(st.floats(0, 1, exclude_min=True), max_size=4),
    patience=st.one_of(st.none(), st.integers(1, 10**9)),
    seed=st.integers(0, 2**63 - 1),
    crop=st.integers(0, 10),
    area=st.one_of(st.none(), st.just([0.08, 1.0])),
)
def test_any_values_round_trip(eps, lr, milestones, patience, seed, crop, area):
    view = {"random_resized_crop": area} if area else {"crop": crop}
    given_tree = {
        "data": {"name": "digits", "view": view},
        "threat": {"eps": eps},
        "optim": {"lr": lr, "milestones": milestones},
        "train": {"epochs": 1, "patience": patience, "seed": seed},
    }
    config = RunConfig.from_dict(given_tree)
    again = RunConfig.from_dict(yaml.safe_load(config.to_yaml()))
    assert again == config and again.to_yaml() == config.to_yaml()
    assert config.optim.lr == lr and list(config.optim.milestones) == milestones and config.train.seed == seed


def test_python_and_yaml_defaults_agree():
    assert RunConfig(data=Digits(), train=Train(epochs=1)) == RunConfig.from_dict(tree(name="run"))


def test_a_fraction_stays_text():
    config = RunConfig.from_dict(tree(threat={"eps": "8/255"}, attack={"step_size": "2/255"}))
    assert config.threat.eps == 8 / 255 and config.to_dict()["threat"]["eps"] == "8/255"
    assert config.to_dict()["attack"]["step_size"] == "2/255"
    assert load_recipe("digits-clead", ["--threat.eps", "8/255"]).to_dict()["threat"]["eps"] == "8/255"
    assert load_recipe("digits-clead", ["--threat.eps", "0.1"]).to_dict()["threat"]["eps"] == 0.1


def test_configuration_is_frozen():
    config = RunConfig(data=Digits(), train=Train(epochs=1))
    for target, name in ((config, "train"), (config.train, "epochs"), (config.optim, "lr"), (config.threat, "eps")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(target, name, 1)


def test_python_refuses_what_is_not_settings():
    found = problems(lambda: RunConfig(data=Digits(), train={"epochs": 1}, threat="linf", method=PGD()))
    assert [p.split(":")[0] for p in found] == ["threat", "method", "train"]
    assert problems(lambda: RunConfig(data=None, train=Train(epochs=1)))[0].startswith("data: must be")


# ------------------------------------------------------------------------------------------------ overrides


@pytest.mark.slow
def test_override_forms():
    assert parse_overrides(["--a.b", "1", "--a.c=2.5", "--a.d", "[x, y]", "--a.e=a=b", "--a.f-g", "null"]) == [
        (["a", "b"], 1),
        (["a", "c"], 2.5),
        (["a", "d"], ["x", "y"]),
        (["a", "e"], "a=b"),
        (["a", "f_g"], None),
    ]
    assert parse_overrides(["--data.augment.crop", "-1"]) == [(["data", "augment", "crop"], -1)]
    assert parse_overrides(["--a.b", "2024-13-45"]) == [(["a", "b"], "2024-13-45")]  # YAML takes it for a date, in vain
    assert parse_overrides(["--a.b", "["]) == [(["a", "b"], "[")]
    assert parse_overrides(["--a.b", "[" * 5000])[0][1] == "[" * 5000


def test_override_mistakes_are_all_listed():
    found = problems(lambda: parse_overrides(["--train.seed", "--epochs", "3", "stray", "--fast=1", "--optim.lr"]))
    assert found == [
        "--train.seed: a value is missing; give --train.seed VALUE",
        "--epochs: unknown option; did you mean --train.epochs?",
        "unexpected argument 'stray'; settings are given as --group.key VALUE",
        f"--fast: unknown option; settings are --group.key with {', '.join(GROUPS)}",
        "--optim.lr: a value is missing; give --optim.lr VALUE",
    ]
    assert "--eval.steps or" not in problems(lambda: parse_overrides(["--lr", "1"]))[0]
    assert "--attack.steps or --eval.steps" in problems(lambda: parse_overrides(["--steps", "1"]))[0]


def test_nested_and_typed_overrides():
    config = load_recipe(
        "digits-clead",
        ["--data.augment.crop", "1", "--optim.lr=1e-3", "--train.patience", "3", "--optim.milestones", "[0.2]"],
    )
    assert config.data.augment.crop == 1 and config.data.augment.flip is False
    assert config.optim.lr == 1e-3 and config.train.patience == 3 and config.optim.milestones == (0.2,)


def test_the_last_override_wins():
    assert load_recipe("digits-clead", ["--train.seed", "1", "--train.seed", "2"]).train.seed == 2


@pytest.mark.parametrize("recipe, given, other", [("digits-clead", "epochs", "budget")])
def test_one_length_replaces_the_other(recipe, given, other, tmp_path):
    assert getattr(load_recipe(recipe).train, other)
    train = load_recipe(recipe, [f"--train.{given}", "2"]).train
    assert getattr(train, given) == 2 and getattr(train, other) is None
    file = tmp_path / "mine.yaml"
    file.write_text("data: {name: digits}\ntrain: {epochs: 5}\n")
    assert load_recipe(str(file), ["--train.budget=7"]).train == Train(budget=7)
    assert load_recipe(str(file), ["--train.epochs", "null", "--train.budget", "7"]).train == Train(budget=7)
    both = problems(lambda: load_recipe(str(file), ["--train.budget", "7", "--train.epochs", "3"]))
    assert both == ["train: give exactly one of epochs, budget, minutes, got epochs=3.0, budget=7.0"]
    assert "exactly one" in problems(lambda: load_recipe(str(file), ["--train.epochs", "null"]))[0]


def test_both_lengths_in_a_recipe_are_refused():
    assert problems(lambda: RunConfig.from_dict(tree(train={"epochs": 1, "budget": 2})))[0].startswith(
        "train: give exactly"
    )
    assert problems(lambda: RunConfig.from_dict(tree(train={})))[0].startswith("train: give exactly")


def test_another_choice_starts_from_its_defaults():
    config = load_recipe("digits-clead", ["--threat.norm", "l2", "--method.name", "trades", "--attack.name", "fgsm"])
    assert config.threat == THREATS.get("l2")() and config.method == METHODS.get("trades")()
    assert config.attack == ATTACKS.get("fgsm")()
    kept = load_recipe("digits-clead", ["--threat.norm", "linf", "--attack.name", "pgd"])
    assert kept == load_recipe("digits-clead") and kept.threat.eps == 0.15


def test_naming_the_default_choice_keeps_the_recipes_keys(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("data: {name: digits}\ntrain: {epochs: 1}\nthreat: {eps: 0.3}\nmethod: {kl_weight: 2}\n")
    config = load_recipe(str(file), ["--threat.norm", "linf", "--method.name", "clead"])
    assert config.threat.eps == 0.3 and config.method.kl_weight == 2


def test_keys_given_beside_a_choice_stay_in_any_order():
    for overrides in (["--threat.norm", "l2", "--threat.eps", "0.7"], ["--threat.eps", "0.7", "--threat.norm", "l2"]):
        threat = load_recipe("digits-clead", overrides).threat
        assert threat == THREATS.get("l2")(eps=0.7)


def test_another_dataset_keeps_the_keys_it_knows():
    config = load_recipe(
        "digits-clead",
        ["--data.name", "auto", "--data.path", "here", "--data.augment.crop", "2", "--data.batch_size", "7"],
    )
    assert type(config.data) is DATASETS.get("auto") and str(config.data.path) == "here"
    assert (config.data.batch_size, config.data.augment.crop) == (7, 2)
    assert (
        load_recipe("digits-clead", ["--data.name=cifar10"]).data.batch_size
        == load_recipe("digits-clead").data.batch_size
    )


def test_a_model_can_be_named_by_its_file():
    config = load_recipe("digits-clead", ["--model.name", "nets/mine.py:Net", "--model.classifier", "fc"])
    assert config.model == MODELS.get("custom")(factory="nets/mine.py:Net", classifier="fc")
    assert RunConfig.from_dict(config.to_dict()) == config


# ------------------------------------------------------------------------------------------------ mistakes


def test_every_problem_is_listed_at_once():
    given_tree = {
        "data": {"name": "digits", "bach_size": 3, "augment": {"flop": True}},
        "model": {"name": "resnet19"},
        "threat": {"eps": 8},
        "attack": {"steps": 0, "step_size": "big"},
        "method": {"temperature": -1, "inner": "kll"},
        "optim": {"lr": "fast", "milestones": [0.5, 7]},
        "train": {"epochs": 1, "precision": "half", "seed": -1},
        "eval": {"suite": "standart", "steps": 0, "check_images": -1},
        "trian": {},
    }
    found = problems(lambda: RunConfig.from_dict(given_tree))
    by_key = {p.split(":")[0]: p for p in found}
    assert set(by_key) == {
        "trian", "data.bach_size", "data.augment.flop", "model.name", "threat.eps", "attack.steps", "attack.step_size",
        "method.temperature", "method.inner", "optim.lr", "optim.milestones.1", "train.precision", "train.seed",
        "eval.suite", "eval.steps", "eval.check_images",
    }  # fmt: skip
    assert "did you mean 'train'" in by_key["trian"]
    assert "did you mean 'batch_size'" in by_key["data.bach_size"]
    assert "did you mean 'flip'" in by_key["data.augment.flop"]
    assert "resnet18" in by_key["model.name"]
    assert by_key["threat.eps"].endswith("got 8; did you mean 8/255?")
    assert "8/255" in by_key["attack.step_size"] and "'big'" in by_key["attack.step_size"]
    assert "got 'kll'" in by_key["method.inner"] and "'kl'" in by_key["method.inner"]
    assert "got 'fast'" in by_key["optim.lr"] and "got -1" in by_key["train.seed"]
    assert "'standard'" in by_key["eval.suite"] and "got 'standart'" in by_key["eval.suite"]
    assert "got 0" in by_key["eval.steps"] and "got -1" in by_key["eval.check_images"]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("value", [5, "text", [], [1], False, {"nonsense": {"deep": 1}}])
def test_a_group_of_the_wrong_kind(group, value):
    found = problems(lambda: RunConfig.from_dict({**tree(), group: value}))
    assert all(p.startswith(group) for p in found)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), ".inf", "nan"])
@pytest.mark.parametrize(
    "key", ["train.epochs", "train.budget", "optim.lr", "optim.clip_norm", "threat.eps", "attack.step_size"]
)
def test_infinity_and_nan_are_refused(key, bad):
    group, name = key.split(".")
    given_tree = tree()
    given_tree[group] = {**given_tree.get(group, {}), name: bad}
    if name == "budget":
        del given_tree["train"]["epochs"]
    assert problems(lambda: RunConfig.from_dict(given_tree))[0].startswith(key)


def test_a_batch_of_one_has_no_negatives():
    for method in (
        {"name": "clead"},
        {"name": "pgd_at", "inner": "contrastive"},
        {"name": "pgd_at", "inner": "supcon"},
    ):
        found = problems(lambda m=method: RunConfig.from_dict(tree(data={"name": "digits", "batch_size": 1}, method=m)))
        assert found[0].startswith("data.batch_size: a contrastive loss needs at least 2 images")
    beside = tree(data={"name": "digits", "batch_size": 1}, optim={"lr": -1})
    assert len(problems(lambda: RunConfig.from_dict(beside))) == 2
    for method in ("standard", "pgd_at", "trades"):
        RunConfig.from_dict(tree(data={"name": "digits", "batch_size": 1}, method={"name": method}))


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", None, ["x"]])
def test_a_name_that_is_no_directory_name(name):
    if name is None:
        assert RunConfig.from_dict(tree(name=name)).name == "run"
    else:
        assert problems(lambda: RunConfig.from_dict(tree(name=name)))[0].startswith("name:")


def test_what_is_required_is_said():
    assert problems(lambda: RunConfig.from_dict({"train": {"epochs": 1}}))[0].startswith(
        "data.name: is required; known: "
    )
    assert problems(lambda: RunConfig.from_dict(tree(data={"name": "auto"}))) == ["data.path: is required"]
    assert problems(lambda: RunConfig.from_dict(tree(model={"name": "custom"}))) == ["model.factory: is required"]


def test_unknown_recipes_get_suggestions(tmp_path):
    assert "did you mean 'digits-clead'" in problems(lambda: load_recipe("digits-claed"))[0]
    assert "neither shipped nor a file" in problems(lambda: load_recipe(str(tmp_path)))[0]


@pytest.mark.parametrize(
    "content, said",
    [
        (b"data: {name: digits\ntrain: 1", "line 2"),
        (b"data: {name: digits}\ntrain: {epochs: 1}\ntrain: {epochs: 2}\n", "line 3: the key 'train' is given twice"),
        (b"train: {epochs: 1, epochs: 2}", "'epochs' is given twice"),
        (b"a: &x [1]\nb: [*x, *x]\n", "line 2: aliases are not supported, got *x"),
        (b"&a [*a]", "aliases are not supported"),
        (b"just words", "must be a mapping"),
        (b"- a\n- b", "must be a mapping"),
        (b"", "must be a mapping"),
        (b"!!python/object/apply:os.system [echo]", "line 1: tags are not supported"),
        (b"data: 2024-13-45\ntrain: {epochs: 1}", "must be a mapping of keys, got '2024-13-45'"),
        (b"[" * 20000, "cannot be parsed"),
        (bytes(range(256)), "binary file"),
        (b"\x00", "not valid YAML"),
        (b"? [1, 2]\n: 3", "not valid YAML"),
        (b"#" * 1_000_001, "under 1000000 bytes"),
    ],
    ids=range(15),
)
def test_broken_recipe_files(content, said, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    found = problems(lambda: load_recipe(str(file)))
    assert len(found) == 1 and said in found[0]


def test_a_long_value_is_not_printed_whole():
    assert len(problems(lambda: RunConfig.from_dict(tree(optim={"lr": "x" * 10**6})))[0]) < 200


# ------------------------------------------------------------------------------------------------ documentation


def _fields(cls, prefix=""):
    for name, field in cls.__pydantic_fields__.items():
        default = field.get_default(call_default_factory=True)
        if dataclasses.is_dataclass(default):
            yield from _fields(type(default), f"{prefix}{name}.")
        else:
            yield prefix + name, field


def test_every_key_is_documented():
    rows = {
        (group, name, key): (default, allowed, doc) for group, name, key, default, allowed, doc in documented_keys()
    }
    text = key_reference()
    classes = [(group, name, cls) for group, (registry, _) in CHOSEN.items() for name, cls in registry.items()]
    fixed = {"optim": Optim, "train": Train}
    for group, name, cls in [*classes, *((group, "", cls) for group, cls in fixed.items())]:
        for key, field in _fields(cls):
            default, allowed, doc = rows.pop((group, name, key))
            assert len(doc.split()) >= 1 and doc == field.description
            assert f"--{group}.{key}  (" in text and doc in text
            assert (default == "required") == field.is_required()
            assert allowed == "" or allowed in text
    assert {group for group, _, _ in rows} == {"eval"}
    for group, (key, default, names) in choice_keys().items():
        assert f"--{group}.{key}  (" in text and all(name in text for name in names)
        assert default is None or default in names


def test_shared_keys_are_printed_once():
    text = key_reference()
    for key in (
        "--data.batch_size",
        "--data.view.crop",
        "--model.classifier",
        "--method.separate_forwards",
        "--attack.random_start",
    ):
        assert text.count(f"{key}  (") == 1
    assert "default clead/clead_pixels/trades 6.0, else 0.0; ≥ 0" in text
    assert "--data.channels  (default null; 1 | 3)" in text
    assert "--optim.lr  (default 0.1; > 0)" in text and "--train.ema  (default 0.0; ≥ 0, < 1)" in text
    assert "--train.checkpoint_seconds  (default 60.0; ≥ 0; seconds)" in text
    # A key has a line per meaning, however many classes have it, besides the five keys that choose a class.
    meanings = {(group, key, allowed, doc) for group, _, key, _, allowed, doc in documented_keys()}
    assert sum(line.startswith("  --") for line in text.splitlines()) == len(meanings) + len(choice_keys())


@pytest.mark.parametrize("name", get_args(SuiteName))
def test_every_suite_can_be_named_and_made(name):
    assert RunConfig.from_dict(tree(eval={"suite": name})).eval.suite == name
    task = next((task for task, names in TASK_SUITES.items() if name in names), "classification")
    attacks, _ = suite(name, "linf", 10, steps=1, task=task)
    assert attacks and SUITE_TITLES[name]


def test_a_task_with_suites_of_its_own_has_the_first_by_default():
    task = {"name": "segmentation"}
    assert RunConfig.from_dict(tree(task=task)).eval.suite == "sea"
    assert RunConfig.from_dict(tree(task=task, eval={"suite": "sea-quick"})).eval.suite == "sea-quick"


def test_suites_are_those_of_the_evaluation():
    (allowed,) = [row[4] for row in documented_keys() if row[0] == "eval" and row[2] == "suite"]
    assert allowed == " | ".join(repr(name) for name in get_args(SuiteName))
    for gone in ("fgsm", "restarts", "objectives"):
        assert problems(lambda gone=gone: RunConfig.from_dict(tree(eval={gone: 1})))[0].startswith(
            f"eval.{gone}: unknown"
        )


def test_a_path_for_a_dataset_that_has_none_means_the_users_own_images():
    config = load_recipe("digits-clead", ["--data.path", "my/images"])
    assert config.to_dict()["data"]["name"] == "auto"
    assert str(config.data.path) == "my/images"
    assert config.data.batch_size == load_recipe("digits-clead").data.batch_size
