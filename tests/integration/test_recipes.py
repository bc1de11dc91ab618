"""Every shipped recipe says what it costs and gives, and runs."""

import json
import re
from importlib import resources

import pytest

import clead
from clead.config import load_recipe, recipe_names, recipe_text
from support import noise_png

EXPECTED = {"digits-standard", "digits-gaussian", "digits-pgd-at", "digits-trades", "digits-clead", "mnist-clead"}
EXPECTED |= {f"cifar10-small-{method}" for method in ("standard", "pgd-at", "trades", "clead")}
EXPECTED |= {
    f"{data}-{method}" for data in ("digits", "cifar10-small") for method in ("mart", "fgsm-rs", "free", "trades-awp")
}
EXPECTED |= {
    "digits-acl",
    "digits-supcon",
    *(f"cifar10-small-{method}" for method in ("acl-slf", "acl-alf", "acl-aff", "dynacl-aff")),
}
EXPECTED |= {f"cifar10-resnet18-{method}" for method in ("pgd-at", "trades", "trades-awp", "clead")}


def test_the_promised_recipes_are_shipped():
    assert set(recipe_names()) >= EXPECTED
    folder = resources.files("clead") / "recipes"
    assert all(item.name.endswith(".yaml") for item in folder.iterdir() if item.is_file())


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_header_says_what_to_expect(recipe):
    header = "\n".join(line for line in recipe_text(recipe)[1].splitlines() if line.startswith("#"))
    assert recipe in header.splitlines()[0]
    assert f"clead train {recipe}" in header and "# hardware: " in header and "# measured: " in header
    # Either it was run, with time, accuracies, n and seeds, or it says that it was not.
    measured = re.search(r"\d+ min", header) and "%" in header and re.search(r"images.*seed", header, re.DOTALL)
    assert bool(measured) != ("measured: not run" in header)


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_recipe_fits_its_name(recipe):
    config = load_recipe(recipe)
    tree = config.to_dict()
    methods = "standard|pgd-at|trades|clead|clead-published|gaussian|mart|fgsm-rs|free|dynacl|acl|supcon"
    named = re.sub(rf"^.*?({methods})(-awp|-slf|-alf|-aff|-few-labels)?$", r"\1", recipe)
    assert (config.train.awp > 0) == recipe.endswith("-awp")
    assert tree["method"]["name"].replace("_", "-") == {"gaussian": "standard", "dynacl": "acl", "supcon": "clead"}.get(
        named, named
    )
    assert (tree["data"]["labelled"] < 1) == recipe.endswith("-few-labels")
    assert (tree["data"]["augment"]["gaussian"] > 0) == (named == "gaussian")
    assert recipe.startswith({"parquet_stream": "imagenet"}.get(tree["data"]["name"], tree["data"]["name"]))
    assert config.data.val_fraction > 0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise in the layout and with the shapes of CIFAR-10 and MNIST."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("data")
    for name, shape, image in (("cifar10", (32, 32, 3), "img"), ("mnist", (28, 28), "image")):
        (root / name).mkdir()
        for part, count in (("train", 40), ("test", 10)):
            images = [{"bytes": noise_png(*shape, seed=n), "path": None} for n in range(count)]
            table = pa.table({image: images, "label": [n % 10 for n in range(count)]})
            info = {"info": {"features": {"label": {"names": list("abcdefghij"), "_type": "ClassLabel"}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
            pq.write_table(table, root / name / f"{part}-00000-of-00001.parquet")
    return root


# Of 224 pixels, streamed: tests/integration/test_streaming.py runs it.
SMALL = [recipe for recipe in recipe_names() if not recipe.startswith("imagenet")]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SMALL)
def test_the_recipe_runs(recipe, data, tmp_path, monkeypatch):
    monkeypatch.setenv("CLEAD_DATA", str(data))
    overrides = [
        "--data.limit_train",
        "20",
        "--data.limit_test",
        "2",
        "--data.batch_size",
        "2",
        "--train.device",
        "cpu",
    ]
    overrides += ["--train.validate_images", "2", "--train.validate_steps", "1", "--eval.check_images", "0"]
    overrides += ["--eval.suite", "pgd", "--eval.steps", "1"]
    overrides += ["--eval.curve_points", "0", "--train.epochs", "0.2"]  # one step of 2 images
    if "resnet18" in recipe:  # as it is, but narrower: the full width is tested with the models
        overrides += ["--model.width", "8"]
    if recipe.endswith("-few-labels"):  # one validation image per class, and some without a label
        overrides += ["--data.limit_train", "40", "--train.epochs", "0.06"]
    config = load_recipe(recipe, overrides)
    run = clead.train(config, out=tmp_path / "run", show=False)
    assert run.outcome.steps == len(config.trainings())
    record = clead.evaluate_run(run.path, show=False).record
    assert (
        record.data.n == 2
        and record.threat.norm == config.threat.norm
        and record.training.method == config.to_dict()["method"]["name"]
    )
