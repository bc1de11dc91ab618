"""The examples run, on digits and on a reader's own folder, and print what their comments promise.

They stand as they are, but for shorter attacks and no masking checks where a recipe is evaluated: ``SHORT``.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clead import api, config
from clead.weights.files import load_weights
from support import ROOT

SHORT = ["--eval.steps", "10", "--eval.check_images", "0", "--eval.curve_points", "0", "--train.device", "cpu"]
EXAMPLES = ROOT / "examples"
LOOPS = ("plain_loop.py", "lightning_loop.py", "transformers_trainer.py")
FOUND = re.compile(r"clean (\d+\.\d)%, withstand .*?(\d+\.\d)% \(95 % interval (\d+\.\d)% – (\d+\.\d)%, n = (\d+)")


@pytest.fixture
def example(monkeypatch, capsys, tmp_path):
    """Run an example in an empty directory; return the lines that it prints."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    load = config.load_recipe
    monkeypatch.setattr(config, "load_recipe", lambda recipe, given=(): load(recipe, [*SHORT, *given]))

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def photos(tmp_path):
    """Colour images of two sizes: dark and bright ones."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 10)):
        for name, level in (("dark", 40), ("bright", 160)):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 60, (12 + index % 3, 14, 3)) + level
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "photos"


def test_they_are_short():
    for path in EXAMPLES.glob("*.py"):
        most = 40 if path.name in LOOPS else 50
        assert len(path.read_text().splitlines()) < most, path.name
    assert len(list(EXAMPLES.glob("*.py"))) == 3 + len(LOOPS)


def figures(line):
    found = FOUND.search(line)
    assert found, line
    clean, robust, low, high = (float(text) for text in found.groups()[:4])
    assert low <= robust <= high and robust <= clean
    return clean, robust, int(found[5])


def test_own_model_on_digits(example):
    plain, hardened = (figures(line) for line in example("own_model.py", "--budget", "24"))
    assert plain[2] == hardened[2] == 200
    assert plain[0] > 80  # the network learns at all
    assert hardened[1] > plain[1]  # which is the point of it; by far, at this eps
    assert api.read_record("runs/own-clead").training.method == "clead"


def test_own_model_on_own_images(example, photos):
    lines = example("own_model.py", photos, "--size", "8", "--budget", "15", "--out", "elsewhere")
    assert [figures(line)[2] for line in lines] == [20, 20]
    record = api.read_record("elsewhere/own-standard")
    assert record.data.classes == ["bright", "dark"] and record.threat.eps_text == "8/255"


def test_few_labels_on_digits(example):
    *lines, last = example("few_labels.py", "--budget", "8")
    assert [line.split(":")[0] for line in lines] == ["trades", "clead"] and all(
        figures(line)[2] == 200 for line in lines
    )
    assert last == "then: clead compare runs/few-trades runs/few-clead"
    for name in ("trades", "clead"):  # the same labels, the same compute
        text = (Path("runs") / f"few-{name}" / "config.yaml").read_text()
        assert "labelled: 0.1" in text
    costs = [api.read_record(f"runs/few-{name}").training.forward_equivalents for name in ("trades", "clead")]
    assert abs(costs[0] - costs[1]) < 2


def test_few_labels_on_own_images(example, photos):
    lines = example("few_labels.py", photos, "--size", "8", "--budget", "15", "--labelled", "0.5")
    assert figures(lines[0])[2] == 20


def test_somebody_elses_model_that_ends_in_a_softmax(example):
    first, *checks = example("somebody_elses_model.py", "--images", "60")
    assert figures(first)[2] == 60
    verdicts = {line[5:].split(":")[0]: line[:4].strip() for line in checks}
    assert verdicts["logits"] == "FAIL" and "They are probabilities, not logits" in "\n".join(checks)
    assert verdicts["mode"] == verdicts["normalisation"] == "ok"


def test_somebody_elses_model_with_its_weights(example, photos):
    Path("nets.py").write_text(
        "from torch import nn\n\ndef make_net(num_classes):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))\n"
    )
    # bright, dark: the brighter the mean, the more the first.
    weights = {"2.weight": torch.tensor([[9.0] * 3, [-9.0] * 3]), "2.bias": torch.tensor([-12.0, 12.0])}
    save_file(weights, "net.safetensors")
    arrays = {"x_test": np.full((20, 6, 6, 3), 200, np.uint8), "y_test": np.zeros(20, np.int64)}
    arrays["x_test"][10:] = 30
    arrays["y_test"][10:] = 1
    np.savez("test.npz", **arrays)
    first, *checks = example("somebody_elses_model.py", "nets.py:make_net", "test.npz", "net.safetensors")
    assert figures(first) == (
        100.0,
        100.0,
        20,
    )  # grey levels 200 and 30 are further than 8 from where the answer changes
    assert len(checks) > 5  # as many as suite quick has the passes for


def test_a_plain_loop(example):
    first, second, last = example("plain_loop.py", 2)
    assert first.startswith("epoch 0: clean_cross_entropy ") and "robust_accuracy" in second
    found = re.fullmatch(r"clean (\d+\.\d)%, withstand the quick suite (\d+\.\d)% of 397", last)
    assert float(found[1]) > 70 and float(found[2]) > 30


@pytest.mark.filterwarnings("ignore")  # those libraries' own
@pytest.mark.parametrize(("name", "least"), [("lightning_loop.py", 0.2), ("transformers_trainer.py", 0)])
def test_the_trainers_of_other_libraries(example, name, least):
    example(name, 1)
    content, about = load_weights(Path("best.safetensors"))
    assert content and least <= about["robust_accuracy"] <= about["clean_accuracy"]
    assert (about["eps"], about["images"]) == ("0.15", 397)
