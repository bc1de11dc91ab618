"""A run of some digits, asked about digits that it never saw: evaluation, attack, measurement, comparison and report."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

import clead
from clead.attacks import UNRESTRICTED
from clead.cli.app import app
from clead.errors import UserError
from clead.tasks.retrieval import Retrieval

pytestmark = pytest.mark.slow

SMALL = "--eval.images 20 --eval.check_images 0 --eval.curve_points 0 --eval.steps 3 --data.keep_classes 7,8,9"
SMALL = SMALL.split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("retrieval") / "seven"
    settings = ["--data.keep_classes", "0,1,2,3,4,5,6", "--train.budget", "6", "--model.name", "small_cnn"]
    clead.train(clead.load_recipe("digits-standard", settings), out=path, show=False)
    return path


def command(*words: object):
    from clead.cli import main  # registers the commands

    del main
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)


def test_unseen_classes_are_evaluated_reported_compared_and_measured(run, tmp_path):
    result = command("evaluate", run, "--task", "retrieval", "--suite", "quick", *SMALL, "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["task"] == "retrieval" and record["data"]["classes"] == ["7", "8", "9"] and record["data"]["n"] == 20
    assert any("the training saw none of the 3 classes" in note for note in record["notes"])
    assert record["worst"]["accuracy"] < record["clean"]["accuracy"] > 0.5
    figures = {metric["name"]: metric for metric in record["metrics"]}
    assert (
        len(figures) == 6 and figures["mean average precision"]["robust"] <= figures["mean average precision"]["clean"]
    )
    assert figures["recall@1 with an attacked item"]["clean"] == record["clean"]["accuracy"]
    page = (run / "report.html").read_text()
    assert "mean average precision" in page and "ROC" in page
    assert not list((run / "results").glob("*.state"))
    shutil.copytree(run, tmp_path / "copy")
    compared = command("compare", run, tmp_path / "copy")
    assert compared.exit_code == 0 and "mean average precision" in compared.output, compared.output
    attacked = command("attack", run, "--attack.name", "fgsm", "--task", "retrieval", *SMALL[:2], *SMALL[-2:])
    assert attacked.exit_code == 0 and "FGSM" in attacked.output, attacked.output
    patched = command(
        *(
            "attack",
            run,
            "--attack.name",
            "patch",
            "--attack.place",
            "corner",
            "--attack.steps",
            "2",
            "--task",
            "retrieval",
        ),
        *(*SMALL[:2], *SMALL[-2:]),
    )
    assert patched.exit_code == 0 and "withstand the patch attack" in " ".join(patched.output.split()), patched.output


def test_a_gallery_from_a_folder_must_fit_the_queries(run, tmp_path):
    splits = clead.load_recipe("digits-standard").data.load(0)
    config = clead.load_recipe(str(run / "config.yaml"), ["--eval.suite", "quick", *SMALL])
    import dataclasses

    from PIL import Image

    def ask(gallery):
        changed = dataclasses.replace(config, task=Retrieval(gallery=gallery))
        return clead.evaluate_run(run, config=changed, out=tmp_path / "out", show=False).record

    for name in "789":
        (tmp_path / "good" / name).mkdir(parents=True)
        for index in (splits.train.labels == int(name)).nonzero()[:4, 0].tolist():
            Image.fromarray(splits.train.images[index, 0].numpy()).save(tmp_path / "good" / name / f"{index}.png")
    record = ask(tmp_path / "good")
    assert any("the gallery is 12 images of 3 classes" in note for note in record.notes) and record.clean_accuracy > 0.5
    for name in "ab":
        (tmp_path / "good" / "7").rename(tmp_path / "seven") if name == "a" else None
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.fromarray(splits.train.images[0, 0].numpy()).save(tmp_path / "other" / name / "0.png")
        Image.fromarray(splits.train.images[1, 0].numpy()).save(tmp_path / "other" / name / "1.png")
    with pytest.raises(UserError, match="no image of the data is of a class of the gallery, a, b …, got 7, 8, 9"):
        ask(tmp_path / "other")
    with pytest.raises(UserError, match="data.path must exist|must exist"):
        ask(tmp_path / "nowhere")
    assert any(
        "images of classes that the gallery has no item of are left out" in n for n in ask(tmp_path / "good").notes
    )


def test_a_run_is_asked_by_its_features_alone(run):
    config = clead.load_recipe(str(run / "config.yaml"), ["--task", "retrieval", "--task.features", "output"])
    with pytest.raises(
        UserError, match="task.features: what a run returns are the logits of its own classes, got output"
    ):
        clead.evaluate_run(run, config=config, show=False)


def test_a_patch_in_a_corner_is_in_a_corner_and_nowhere_else():
    patch = UNRESTRICTED.get("patch")(size=2, steps=2, restarts=2, place="corner")
    x = torch.full((6, 1, 8, 8), 0.5)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    y = model(x).argmax(1)
    x_adv = patch.worst(model, x, y, generator=torch.Generator().manual_seed(0))
    assert patch.allows(x_adv, x).all() and (x_adv != x).any()
    elsewhere = x.clone()
    elsewhere[:, :, 3:5, 3:5] = 1
    assert not patch.allows(elsewhere, x).any() and UNRESTRICTED.get("patch")(size=2).allows(elsewhere, x).all()
