"""The demo, shortened: everything it leaves behind is there and agrees."""

import json
import sys

import pytest

from clead import cli, demo
from clead.config import load_recipe
from clead.data.datasets import digit_scenes
from clead.errors import UserError

SHORT = (
    *("--train.budget", "12", "--model.width", "4", "--data.limit_train", "60", "--data.limit_test", "40"),
    *("--eval.steps", "2", "--eval.curve_points", "2", "--eval.curve_steps", "2", "--train.validate_steps", "1"),
    *("--eval.check_images", "0"),
)


@pytest.mark.slow
def test_the_demo_leaves_a_summary_and_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(demo.DEMOS, "classification", demo.DEMOS["classification"]._replace(quick=SHORT))
    monkeypatch.setattr(sys, "argv", ["clead", "demo", "--quick", "--out", str(tmp_path / "demo")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    rows = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert [row["method"] for row in rows] == ["standard", "pgd-at", "trades", "clead"]
    for row in rows:
        assert row["n"] == 40 and 0 <= row["robust_accuracy"] <= row["clean_accuracy"] <= 1
        assert row["robust_accuracy"] <= min(row["attacks"].values()) and row["method"] in out
        record = json.loads((tmp_path / "demo" / row["method"] / "results" / "evaluation.json").read_text())
        assert record["worst"]["accuracy"] == row["robust_accuracy"]
        assert record["suite"] == row["suite"] == "pgd"
    # Equal compute: to within half a step of the costliest method.
    costs = [row["forward_equivalents"] for row in rows]
    assert max(costs) - min(costs) < 20 and min(costs) > 0
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "C-LEAD demo" in page and "(quick)" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert str(tmp_path / "demo" / "report.html") in out and "McNemar" in out


SHORT_MASKS = (
    *(
        "--train.epochs",
        "1",
        "--train.validate_steps",
        "1",
        "--train.validate_images",
        "4",
        "--train.validate_every",
        "1",
    ),
    *("--model.width", "4", "--model.levels", "2"),
    *("--eval.steps", "2", "--eval.curve_points", "0", "--eval.check_images", "0", "--eval.gallery", "2"),
)


@pytest.mark.slow
def test_the_demo_of_masks_leaves_a_summary_and_a_report_with_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(demo.DEMOS, "segmentation", demo.DEMOS["segmentation"]._replace(quick=SHORT_MASKS))
    monkeypatch.setattr(digit_scenes, "_TRAIN", 40)  # as many are drawn as are used
    monkeypatch.setattr(digit_scenes, "_TEST", 6)
    arguments = ["clead", "demo", "--task", "segmentation", "--quick", "--out", str(tmp_path / "demo")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    rows = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert [row["method"] for row in rows] == ["standard", "pgd-at"]
    for row in rows:
        clean, robust = row["metrics"]["mIoU"]
        assert (row["n"], row["suite"], row["task"]) == (6, "sea-quick", "segmentation")
        assert 0 <= robust <= clean <= 1 and row["robust_accuracy"] <= min(row["attacks"].values())
        assert f"{row['run']} falls from {clean:.0%} to {robust:.0%}" in out
        history = (tmp_path / "demo" / row["method"] / "metrics.jsonl").read_text()
        assert '"robust_miou"' in history
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "two ways to learn masks" in page and "(quick)" in page
    assert (
        page.count("of the pixels right when clean") == 2 * 4
    )  # two pictures of each run, each named for those who see none


def test_a_demo_of_another_task_is_refused(tmp_path):
    with pytest.raises(UserError, match="--task: there is no demo of 'masks'"):
        demo.run_demo(tmp_path / "demo", task="masks")
    assert not (tmp_path / "demo").exists()


def test_the_demo_compares_like_with_like():
    """The four recipes differ in the method only, and the quick demo only shortens."""
    for overrides in (demo._SUITE, (*demo._SUITE, *demo._QUICK)):
        trees = [load_recipe(recipe, overrides).to_dict() for recipe in demo.RECIPES]
        for tree in trees:
            # How often is looked changes nothing; standard training has several times as many epochs for its budget.
            del tree["name"], tree["method"], tree["train"]["validate_every"]
        assert all(tree == trees[0] for tree in trees)
    assert trees[0]["train"]["budget"] < load_recipe(demo.RECIPES[0]).train.budget


def test_the_demo_never_writes_into_a_used_directory(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").write_text("")
    monkeypatch.setattr(sys, "argv", ["clead", "demo", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_demo_misses_a_library_before_it_computes(tmp_path, monkeypatch):
    find = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "jinja2" else find(name))
    with pytest.raises(UserError, match=r"the demo needs jinja2, .* run: pip install 'clead\[demo\]'"):
        demo.run_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
