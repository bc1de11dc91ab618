"""One perturbation for all images, against closed forms on linear models, and end to end as a command that nothing else names."""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import clead
from clead import api, cli
from clead.errors import UserError
from clead.evaluation.state import ResumableResults
from clead.interfaces import ImageSet
from clead.measurements.base import Computation, Measured, MeasurementRecord
from clead.measurements.universal import UniversalResult, _Fit, evaluate_universal
from clead.report.html import RunResult, write_report
from clead.threats.l1 import L1
from clead.threats.l2 import L2
from clead.threats.linf import Linf
from support import Nesting

SHAPE = (1, 3, 4)


def linear(seed: int = 0) -> nn.Sequential:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False)).double().float()
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(2, 12, generator=torch.Generator().manual_seed(seed)))
    return net


def images(n: int, share: float, seed: int = 0) -> ImageSet:
    """Images near mid-grey, so that no pixel is clipped, of which ``share`` are of class 0."""
    x = 0.4 + 0.2 * torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return ImageSet(x, (torch.arange(n) >= share * n).long())


def fit(model: nn.Module, threat, source: ImageSet, *, clip: float = 0.0, steps: int = 60) -> Tensor:
    search = _Fit(model, threat, clip, steps, 0, torch.device("cpu"))
    return search.fit(source, len(source), ResumableResults(None, {}), lambda *_, **__: None)


def mean_loss(model: nn.Module, source: ImageSet, delta: Tensor) -> float:
    with torch.no_grad():
        return nn.functional.cross_entropy(model(source.images + delta), source.labels).item()


@pytest.mark.parametrize("share", [1.0, 0.75, 0.2])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_perturbation_of_a_linear_model_is_the_closed_form(norm, share):
    """Every image's gradient is parallel to v = w₁ − w₀, so the mean loss depends on v·δ alone, and is convex in it: the largest is
    at an end, ± the dual vector of v, whichever is higher."""
    model, source = linear(), images(40, share)
    v = (model[1].weight[1] - model[1].weight[0]).detach().view(SHAPE)
    eps = {"linf": 0.05, "l2": 0.2, "l1": 0.3}[norm]
    top = torch.zeros(12)
    top[v.flatten().abs().argmax()] = v.flatten()[v.flatten().abs().argmax()].sign()
    ends = {"linf": v.sign(), "l2": v / v.norm(), "l1": top.view(SHAPE)}[norm] * eps
    best = max((ends, -ends), key=lambda delta: mean_loss(model, source, delta))
    found = fit(model, {"linf": Linf, "l2": L2, "l1": L1}[norm](eps=eps), source)
    torch.testing.assert_close(found, best, atol=2e-3 * eps if norm != "l1" else 0.05 * eps, rtol=0)
    assert mean_loss(model, source, found) == pytest.approx(mean_loss(model, source, best), rel=1e-3)


def test_a_clipped_loss_leaves_hopeless_images_alone():
    """One image far on the wrong side outweighs all others without a limit on its loss: v·δ falls by 1 for each of two others."""
    model = linear()
    v = (model[1].weight[1] - model[1].weight[0]).detach()
    direction = (v / v.norm()).view(SHAPE)

    class Steep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = ((x - 0.5) * direction).flatten(1).sum(1)
            return torch.stack([torch.zeros_like(z), 40 * z], 1)

    # Two images of class 0 gain from +v little as they are right; three of class 1 are wrong by 20 and gain from −v fully.
    x = torch.stack([0.5 - 0.02 * direction] * 4 + [0.5 - 0.5 * direction] * 3)
    source = ImageSet(x.clamp(0, 1), torch.tensor([0, 0, 0, 0, 1, 1, 1]))
    along = {clip: (fit(Steep(), L2(eps=0.1), source, clip=clip) * direction).sum().item() for clip in (0.0, 4.0)}
    assert along[0.0] == pytest.approx(-0.1, abs=1e-3) and along[4.0] == pytest.approx(0.1, abs=1e-3)


def test_flags_are_those_of_plain_numpy():
    model, source, other = linear(3), images(30, 0.5), images(50, 0.5, seed=1)
    extremes = ImageSet((3 * other.images - 1).clamp(0, 1), other.labels)  # many pixels at 0 and 1: δ is clipped there
    threat = Linf(eps=0.2)
    result = evaluate_universal(model, source, extremes, threat, Computation(batch_size=7, show=False), steps=20)
    delta = fit_again(model, source, threat)
    w = model[1].weight.detach().numpy().astype(np.float64)
    x = extremes.images.numpy().astype(np.float64).reshape(50, -1)
    x_adv = np.clip(x + delta.reshape(-1), 0, 1)
    before, after, y = (x @ w.T).argmax(1), (x_adv @ w.T).argmax(1), extremes.labels.numpy()
    assert result.clean_flags == (before == y).tolist()
    assert result.robust_flags == ((before == y) & (after == y)).tolist()
    assert result.fooled_flags == (before != after).tolist() and 0 < result.fooled.accuracy < 1
    assert result.max_distance == pytest.approx(np.abs(x_adv - x).max(), abs=1e-6) and result.max_distance <= 0.2 + 1e-6
    assert (result.n, result.fitted) == (50, 30)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(result.picture)))) / 255
    np.testing.assert_allclose(pixels, 0.5 + 0.5 * delta[0] / np.abs(delta).max(), atol=1 / 255)


def fit_again(model: nn.Module, source: ImageSet, threat: Linf) -> np.ndarray:
    search = _Fit(model, threat, 9.0, 20, 0, torch.device("cpu"))
    return search.fit(source, 7, ResumableResults(None, {}), lambda *_, **__: None).numpy()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"images": images(0, 1)}, "needs images to fit on and others"),
        ({"source": images(0, 1)}, "needs images to fit on and others"),
        ({"num_classes": 3}, "the model returns 2 logits, the data has 3 classes"),
        ({"threat": clead.load_recipe("digits-standard", ["--threat.norm", "l0", "--threat.eps", "3"]).threat}, "got l0"),
    ],
)  # fmt: skip
def test_what_it_refuses(change, says):
    arguments = {"source": images(9, 0.5), "images": images(9, 0.5, 1), "threat": Linf(eps=0.1), **change}
    with pytest.raises(UserError, match=says):
        evaluate_universal(linear(), steps=2, how=Computation(show=False), **arguments)


def test_a_gradient_that_is_nan_is_said():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = (x.flatten(1).sum(1) * 0).abs().sqrt()  # its slope at 0 is infinite
            return torch.stack([z, z + 1], 1)

    with pytest.raises(UserError, match="NaN or infinite"):
        fit(Broken(), Linf(eps=0.1), images(4, 0.5))


# ----------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("universal") / "run"
    small = ["--train.budget", "20", "--train.validate_images", "8", "--eval.images", "40"]
    api.train(clead.load_recipe("digits-standard", small), out=out, show=False)
    return out


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


WORDS = ("--eval.steps", "70", "--threat.eps", "0.3", "--eval.batch_size", "15")


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clead", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


@pytest.mark.slow
def test_the_command_is_there_and_says_what_was_found(run, command):
    code, out, err = command("universal", run, *WORDS)
    assert code == 0, err
    record = MeasurementRecord.model_validate(json.loads((run / "results" / "universal.json").read_text()))
    result = record.result
    assert isinstance(result, UniversalResult) and record.kind == "universal"
    assert record.settings == {"clip": 9.0, "steps": 70, "batch_size": 15}
    splits = clead.load_recipe("digits-standard").data.load(0)
    assert (result.fitted, result.fitted_on, result.n) == (len(splits.val), "validation images", 40)
    assert result.indices == list(range(40)) and result.fooled.accuracy > 0.2
    assert result.robust.accuracy < result.clean.accuracy and 0.1 < result.max_distance <= 0.3 + 1e-6
    flat = " ".join(out.split())
    for part in ("fitted on", "validation images, changes", "answer changed by δ", "universal.json"):
        assert part in flat, out
    assert not list((run / "results").glob("*.state"))
    _, out, _ = command("--help")
    assert "universal" in out
    code, out, _ = command("universal", "--help")
    assert code == 0 and "--clip" in out and "--eval.steps" not in out
    code, _, err = command("universal", run, "--threat.norm", "l0", "--threat.eps", "3")
    assert code == 2 and err.count("\n") == 1 and "got l0" in err
    code, _, err = command("universal", run, "--clip", "-1")
    assert code == 2 and "clip: input should be greater than or equal to 0, got -1.0" in err


def test_images_that_are_scored_are_never_fitted_on(run):
    """Without enough validation images, and on validation images, half is fitted and the other half measured."""
    config = clead.load_recipe(str(run / "config.yaml"), ["--eval.split", "val", "--eval.steps", "3"])
    record = clead.measure(run, "universal", config=config, show=False)
    result = record.result
    stored = record.model_dump_json()
    old = stored.replace('"max_distance":', '"largest":')
    assert old != stored and MeasurementRecord.model_validate_json(old) == record, "as version 0.1 wrote it"
    assert result.fitted_on == "other val images" and result.fitted + result.n == record.data.n == 40
    assert len(set(result.indices)) == result.n < 40
    splits = config.data.load(0)
    few = clead.interfaces.Splits(splits.train, splits.val.subset(torch.arange(20)), splits.test, splits.classes, "few")
    config = clead.load_recipe(str(run / "config.yaml"), ["--eval.steps", "3"])
    result = clead.measure(run, "universal", config=config, data=few, show=False).result
    assert result.fitted_on == "other test images" and result.fitted + result.n == 40


def test_a_stopped_call_goes_on_and_gives_the_same(run, command, monkeypatch):
    code, _, err = command("universal", run, *WORDS)
    assert code == 0, err
    whole = json.loads((run / "results" / "universal.json").read_text())["result"]
    put, calls = ResumableResults.save, []

    class Killed(BaseException):
        pass

    for after in (1, 3):

        def killed(self, key, *part, after=after):
            put(self, key, *part)
            calls.append(key)
            if len(calls) >= after:
                raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(ResumableResults, "save", killed)
            command("universal", run, *WORDS)
    assert calls == ["fit-000050", "fit-000070", "batch-000000"]
    code, _, err = command("universal", run, *WORDS)
    assert code == 0, err
    resumed = json.loads((run / "results" / "universal.json").read_text())["result"]
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}


def test_the_report_shows_it(run, command):
    for arguments in (("universal", run, *WORDS), ("attack", run, "--attack.steps", "1", "--eval.images", "5")):
        code, _, err = command(*arguments)
        assert code == 0, err
    (evaluated,) = (run / "results").glob("attack-*.json")
    record = MeasurementRecord.model_validate_json((run / "results" / "universal.json").read_text())
    shown = RunResult("a", api.read_record(evaluated), measurements={"universal": record})
    page = write_report([shown], run / "report.html", title="t").read_text()
    assert Nesting(page).faults == []
    assert '<section id="universal"' in page and f"data:image/png;base64,{record.result.picture}" in page
    assert f"{100 * record.result.fooled.accuracy:.1f}\N{NO-BREAK SPACE}%" in page
    section = UniversalResult.section([Measured(0, "a", record)])
    assert section.blocks[1].rows[0][-3:] == [record.result.clean, record.result.robust, record.result.fooled]
    with pytest.raises(ValueError, match="picture"):
        UniversalResult.model_validate({**record.result.model_dump(), "picture": '"><script>'})
