"""certify, detect, corruptions, distances and the unrestricted attacks, from the command line: content, kills, mistakes."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clead import api, cli
from clead.attacks.patch import Patch
from clead.config import load_recipe
from clead.errors import UserError
from clead.evaluation.state import ResumableResults
from clead.interfaces import ImageSet
from clead.measurements.base import Computation, MeasurementRecord
from clead.measurements.certification import Certification, certify
from clead.measurements.detection import DetectionProtocol, Mahalanobis, evaluate_detection
from clead.measurements.distances import evaluate_minimum_norm
from clead.measurements.unrestricted import evaluate_unrestricted
from clead.tasks.classification import CLASSIFICATION
from clead.threats.linf import Linf
from clead.weights.files import fingerprint
from support import Killed

# Name of the JSON file -> arguments after the run.
COMMANDS: dict[str, tuple[str, ...]] = {
    "certify": ("--n", "60", "--n0", "10", "--sigma", "0.1", "--alpha", "0.01", "--eval.images", "25"),
    "detect": (
        *("--detectors", "mahalanobis,nearest_neighbours", "--eval.steps", "1"),
        *("--eval.images", "30", "--eval.batch_size", "20"),
    ),
    "corruptions": ("--severities", "1,5", "--eval.images", "30"),
    "distances": ("--attacks", "fmn,deepfool", "--eval.steps", "5", "--eval.images", "30", "--eval.batch_size", "20"),
    "attack-spatial": (
        *("--attack.name", "spatial", "--attack.degrees", "20", "--attack.angles", "3", "--attack.shifts", "3"),
        *("--attack.pixels=1", "--eval.images", "30", "--eval.batch_size", "20"),
    ),
    "attack-patch": (
        *("--attack.name=patch", "--attack.size", "3", "--attack.steps", "5", "--attack.restarts", "2"),
        *("--eval.images", "30", "--eval.batch_size", "20"),
    ),
}
# Pieces that are kept on the way, each once but for the detectors': one per threshold.
PIECES = {
    "certify": 3,
    "detect": 2 * 2 + 2 * 2 * 7,
    "corruptions": 1 + 15 * 2,
    "distances": 2 * 2,
    "attack-spatial": 2,
    "attack-patch": 2,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("measure") / "run"
    config = load_recipe("digits-standard", ["--train.budget", "20", "--train.validate_images", "8"])
    api.train(config, out=out, show=False)
    return out


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``clead …`` in this process; return (exit code, stdout, stderr)."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clead", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def words(name: str, run: Path, *more: str) -> list[str]:
    return [name.split("-")[0], str(run), *COMMANDS[name], *more]


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    """Everything but when, how long and by which command."""
    if isinstance(record, dict):
        left_out = ("created", "seconds", "command", "versions")
        return {key: comparable(value) for key, value in record.items() if key not in left_out}
    return [comparable(value) for value in record] if isinstance(record, list) else record


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What each command writes when it is left alone."""
    run = shutil.copytree(trained, tmp_path_factory.mktemp("alone") / "run")
    found = {}
    for name in COMMANDS:
        out = io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(SystemExit) as stopped,
            contextlib.redirect_stdout(out),
        ):
            patch.setattr(sys, "argv", ["clead", *words(name, run, "--json", str(run / f"{name}.copy.json"))])
            cli.main()
        assert not stopped.value.code, name
        found[name] = json.loads((run / "results" / f"{name}.json").read_text())
        assert found[name] == json.loads((run / f"{name}.copy.json").read_text())
        PRINTED[name] = out.getvalue()
    assert not list((run / "results").glob("*.state")) and not list((run / "results").glob(".*"))
    return found


PRINTED: dict[str, str] = {}
"""What the commands of ``alone`` printed."""


# ------------------------------------------------------------------------------------------------------------- content


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_record_says_what_was_measured_on_what(name, alone, trained):
    record = alone[name]
    MeasurementRecord.model_validate(record)
    model = api.load(trained, weights=record["model"]["weights"])
    assert (record["kind"], record["run"], record["schema_version"]) == (name, "run", 2)
    assert record["command"].startswith(f"clead {name.split('-')[0]} ")
    assert record["data"]["split"] == "test" and record["data"]["n"] == (25 if name == "certify" else 30)
    assert record["data"]["name"] == "digits" and len(record["data"]["images"]) == 32
    assert record["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["model"]["fingerprint"] == fingerprint(model.state_dict())
    assert record["seed"] == 0 and record["seconds"] > 0 and "torch" in record["versions"]
    assert (record["threat"] is not None) == (name in ("detect", "distances"))


def test_certificates_are_those_of_the_function(alone, trained):
    result = alone["certify"]["result"]
    images = load_recipe("digits-standard").data.load(0).test.subset(torch.arange(25))
    model = api.load(trained, weights=alone["certify"]["model"]["weights"])
    settings, quiet = Certification(sigma=0.1, n=60, n0=10, alpha=0.01), Computation(show=False)
    plain = certify(model, images, settings, quiet)
    assert comparable(result) == comparable(plain.model_dump(mode="json"))
    # An image's noise is its own: neither how many follow nor how they are grouped matters.
    fewer = certify(model, images.subset(torch.arange(13)), settings, quiet)
    assert fewer.lower == plain.lower[:13] and fewer.predicted == plain.predicted[:13]
    alike = certify(model, images.subset(torch.zeros(20).long()), replace(settings, sigma=0.5), quiet)
    assert alike.lower[:10] != alike.lower[10:], "the next images that are kept together have other noise"


def test_what_the_other_records_hold(alone):
    detection = alone["detect"]["result"]
    assert [part["name"] for part in detection["detectors"]] == ["mahalanobis", "nearest_neighbours"]
    splits = load_recipe("digits-standard").data.load(0)
    assert (detection["fitted"], detection["calibrated"]) == (len(splits.train), len(splits.val))
    assert alone["detect"]["threat"] == {"norm": "linf", "eps": 0.15, "eps_text": "0.15"} and detection["steps"] == 1

    spoilt = alone["corruptions"]["result"]
    assert spoilt["severities"] == [1, 5] and len(spoilt["cells"]) == 30
    clean = spoilt["clean"]["accuracy"]

    distances = alone["distances"]["result"]
    assert [part["attack"] for part in distances["attacks"]] == ["fmn", "deepfool"]
    assert all(part["settings"]["steps"] == 5 for part in distances["attacks"])
    for name in ("attack-spatial", "attack-patch"):
        result = alone[name]["result"]
        assert result["clean_flags"].count("1") == 30 * clean == 30 * distances["clean"]["accuracy"]
        assert result["robust"]["accuracy"] == result["robust_flags"].count("1") / 30 < clean
        assert all(a >= b for a, b in zip(result["clean_flags"], result["robust_flags"], strict=True))
    assert alone["attack-spatial"]["result"]["settings"] == {"degrees": 20, "pixels": 1, "angles": 3, "shifts": 3}
    assert alone["attack-patch"]["result"]["settings"]["size"] == "3"


@pytest.mark.parametrize("read", [api.read_record, lambda path: api.compare([path, path])])
def test_a_measurement_is_not_compared_and_the_reason_is_one_line(read, alone, tmp_path):
    (path := tmp_path / "attack-patch.json").write_text(json.dumps(alone["attack-patch"]))
    with pytest.raises(UserError) as refused:
        read(path)
    reason = "is the measurement attack-patch of run, which has no worst case over a suite to compare; use clead report"
    assert reason in str(refused.value) and "\n" not in str(refused.value)


def test_what_is_printed(alone):
    expected = {
        "certify": ("noise σ 0.1", "right and certified", "abstains", "at L2 radius 0", "was trained with noise σ 0"),
        "detect": (
            "mahalanobis",
            "AUROC",
            "attacks oblivious | aware",
            "held at 5%",
            "held at 10%",
            "under one that does",
        ),
        "corruptions": ("severity 5", "gaussian noise", "mean accuracy", "worst is"),
        "distances": ("nearest of all", "deepfool", "median", "half fall within", "at radius 0.15"),
        "attack-spatial": ("none (clean)", "withstand the spatial attack (degrees 20", "are right when clean"),
    }
    for name, said in expected.items():
        flat = " ".join(PRINTED[name].split())
        for part in (*said, f"/run/results/{name}.json", f"run, {alone[name]['data']['n']} test images"):
            assert part in flat, (name, part, PRINTED[name])


def test_several_runs_give_a_list(run, command, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    code, _, err = command(
        "corruptions", run, other, "--severities=1", "--eval.images=5", "--json", tmp_path / "a.json"
    )
    assert code == 0, err
    first, second = json.loads((tmp_path / "a.json").read_text())
    assert (first["run"], second["run"]) == ("run", "other") and first["result"] == second["result"]


def test_lists_and_help(command):
    code, out, _ = command("list")
    assert code == 0 and "unrestricted attacks: patch, spatial" in out
    assert "measurements: attack, certify, corruptions, detect, distances, probe, universal" in out
    code, out, _ = command("--help")
    for name in ("certify", "detect", "corruptions", "distances"):
        (line,) = [line for line in out.splitlines() if line.strip().startswith(f"{name} ")]
        assert len(line.split()) > 3


# ------------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_resume_equals_uninterrupted_run_and_repeats_nothing(name, run, alone, command, monkeypatch):
    put, calls = ResumableResults.save, []
    pieces = PIECES[name]

    def kill_at(count):
        def counted(self, key, tensors, data):
            put(self, key, tensors, data)
            calls.append((key, data.get("thresholds")))
            if len(calls) == count:
                raise Killed

        return counted

    state = run / "results" / f"{name}.state"
    for after in (1, max(2, pieces // 4 + 1)):
        monkeypatch.setattr(ResumableResults, "save", kill_at(after))
        with pytest.raises(Killed):
            command(*words(name, run))
        assert list(state.glob("*.safetensors")) and not (run / "results" / f"{name}.json").exists()
    monkeypatch.setattr(ResumableResults, "save", kill_at(-1))
    code, _, err = command(*words(name, run))
    assert code == 0, err
    resumed = json.loads((run / "results" / f"{name}.json").read_text())
    assert any(note.startswith("continued from a state with ") for note in resumed["notes"])
    assert comparable({**resumed, "notes": []}) == comparable(alone[name])
    assert len(calls) == len(set(calls)) == pieces
    assert not state.exists()


@pytest.mark.slow
@pytest.mark.parametrize("after", [2, 13, 16])
def test_a_detector_is_attacked_on_from_where_it_was_left(after, trained, tmp_path, monkeypatch):
    """To the last bit, images too: with a single start all depends on the best image so far."""
    splits = load_recipe("digits-standard").data.load(0)
    images = splits.test.subset(torch.arange(30))
    model = api.load(trained)

    def look(state: ResumableResults) -> dict[str, Any]:
        protocol = DetectionProtocol([Mahalanobis()], steps=3, restarts=1)
        how = Computation(batch_size=20, state=state, show=False)
        evaluate_detection(model, splits.train, images, Linf(eps=0.08), protocol, how)
        return {key: tensors for key, (tensors, _) in state.parts.items()}

    whole = look(ResumableResults(None, {}))
    put, calls = ResumableResults.save, []

    def killed(self, key, *part):
        put(self, key, *part)
        calls.append(key)
        if len(calls) == after:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ResumableResults, "save", killed)
        look(ResumableResults(tmp_path / "state", {}))
    resumed = look(ResumableResults(tmp_path / "state", {}))
    assert resumed.keys() == whole.keys()
    for key, tensors in whole.items():
        assert all(torch.equal(resumed[key][name], tensor) for name, tensor in tensors.items()), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("certify", ("--sigma", "0.2"), "sigma: 0.1 there, 0.2 here"),
        ("certify", ("--n", "70"), "n: 60 there, 70 here"),
        ("certify", ("--eval.images", "24"), "images: "),
        ("certify", ("--eval.seed", "1"), "seed: 0 there, 1 here"),
        ("detect", ("--threat.eps", "0.2"), 'threat: "linf 0.15" there, "linf 0.2" here'),
        ("detect", ("--detectors", "mahalanobis"), "detectors: "),
        ("corruptions", ("--severities", "1,2"), "severities: [1, 5] there, [1, 2] here"),
        ("distances", ("--attacks", "fmn"), "attacks: "),
        ("attack-spatial", ("--attack.degrees", "25"), "attack: "),
    ],
)
def test_the_state_of_another_measurement_is_refused(name, change, says, run, command, monkeypatch):
    put = ResumableResults.save

    def killed(self, *part):
        put(self, *part)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ResumableResults, "save", killed)
        command(*words(name, run))
    code, _, err = command(*words(name, run, *change))
    assert code == 2 and err.count("\n") == 1 and says in err and "--fresh" in err
    assert list((run / "results" / f"{name}.state").glob("*.safetensors")), "it may still be continued"
    if "detect" not in name:  # which takes its time
        code, _, err = command(*words(name, run, *change, "--fresh"))
        assert code == 0, err


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("certify", "--sigma", "0"), "sigma must be above 0"),
        (("certify", "--sigma", "much"), "Invalid value for '--sigma'"),
        (("certify", "--alpha", "2"), "alpha must be in (0, 0.5)"),
        (("certify", "--n", "0"), "n must be at least 1"),
        (("certify", "--threat.eps", "0.1"), "--threat.eps: changes nothing here"),
        (("certify", "--eval.suite", "quick"), "--eval.suite: changes nothing here"),
        (("certify", "--train.seed", "3"), "--train.seed: changes nothing here"),
        (("certify", "--eval.image", "3"), "eval.image: unknown key; did you mean 'images'"),
        (("certify", "--data.path", "nowhere"), "nowhere"),
        (("detect", "--detectors", "mahalanobi"), "unknown detector 'mahalanobi'; did you mean 'mahalanobis'"),
        (("detect", "--detectors", ","), "name each detector once"),
        (("detect", "--eval.split", "val"), "use test"),
        (("detect", "--threat.eps", "8"), "did you mean 8/255"),
        (("corruptions", "--severities", "1,6"), "a severity must be 1, 2, 3, 4 or 5, got 6"),
        (("corruptions", "--severities", "1,high"), "severities.1: input should be a valid integer"),
        (("corruptions", "--severities", "2,2"), "may be named once"),
        (("corruptions", "--severities", ""), "at least one corruption and one severity are needed"),
        (("distances", "--attacks", "fnm"), "unknown attack 'fnm'; did you mean 'fmn'"),
        (("distances", "--attacks", "pgd"), "pgd needs a radius"),
        (("distances", "--attacks", "deepfool", "--threat.norm", "l1"), "is an attack for linf, l2, got l1"),
        (("distances", "--attacks", "fmn,fmn"), "may be named once"),
        (("distances", "--attacks", ""), "at least one image and one attack"),
        (("attack", "--attack.name", "spatail"), "unknown attack 'spatail'; did you mean 'spatial'"),
        (("attack", "--attack.name", "zzzzzz"), "known: apgd, cw, deepfool"),
        (("attack", "--attack.name", "zzzzzz"), "patch, pgd, pgd_cd, rays, spatial, square"),
        (("attack", "--attack.name", "spatial", "--attack.degree", "3"), "attack.degree: unknown key; did you mean"),
        (("attack", "--attack.name", "spatial", "--attack.degrees", "999"), "attack.degrees: "),
        (("attack", "--attack.name", "spatial", "--threat.eps", "0.1"), "--threat.eps: changes nothing here"),
        (("attack", "--attack.name", "spatial", "--objective", "margin"), "--objective: changes nothing"),
        (("attack", "--attack.name", "patch", "--save", "x.npz"), "--save: changes nothing"),
        (("attack", "--verify", "a.parquet", "--fresh"), "--fresh: with --verify nothing is attacked"),
        (("attack", "--attack.name", "patch", "--attack.size", "9"), "the patch must fit into the image"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(arguments, says, run, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name, *options = arguments
    code, _, err = command(name, run, *options, "--json", "out.json")
    assert code == 2 and err.count("\n") == 1 and err.startswith("clead: error: ") and says in err, err
    assert not (run / "results").exists() and sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("name", ["certify", "detect", "corruptions", "distances"])
def test_no_run_is_a_mistake(name, command, tmp_path):
    code, _, err = command(name)
    assert code == 2 and "which run?" in err
    code, _, err = command(name, tmp_path / "nothing")
    assert code == 2 and err.count("\n") == 1 and "is not a run directory" in err


# -------------------------------------------------------------------------------------------------- unrestricted, alone


class Bright(torch.nn.Module):
    """Class 1 where any pixel is brighter than 0.9: every patch with one such pixel fools it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top = x.flatten(1).amax(1)
        return torch.stack([torch.full_like(top, 0.9), top], 1)


def test_an_unrestricted_attack_against_a_closed_form():
    x = torch.full((5, 1, 6, 6), 102, dtype=torch.uint8)
    y = torch.tensor([0, 0, 1, 0, 0])  # the third is wrong when clean
    model = Bright()
    result = evaluate_unrestricted(
        model, ImageSet(x, y), Patch(size=2, steps=20), Computation(batch_size=2, show=False)
    )
    assert result.clean_flags == [True, True, False, True, True]
    assert not any(result.robust_flags) and result.robust.accuracy == 0
    # A single pixel that hardly moves from where it was drawn is too bright in one draw of ten.
    many = ImageSet(x[:1].repeat(60, 1, 1, 1), torch.zeros(60, dtype=torch.int64))
    dull = Patch(size=1, steps=1, step_size=1e-6, stride=0, restarts=1)
    kept = [
        evaluate_unrestricted(model, many, dull, Computation(seed=seed, show=False)).robust.accuracy
        for seed in range(5)
    ]
    assert 0.8 < sum(kept) / 5 < 1 and len(set(kept)) > 1, "each seed draws its own"


def test_an_attack_that_leaves_its_set_is_found_out():
    class Cheat(Patch):
        def worst(self, model, x, y, *, generator=None):
            return 1 - x

    with pytest.raises(UserError, match="left the images that it allows"):
        evaluate_unrestricted(
            Bright(),
            ImageSet(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)),
            Cheat(size=2),
            Computation(show=False),
        )


def test_success_by_rounding_of_the_folded_model_is_searched_again(monkeypatch):
    """The attack may be told that an image has fallen which the model itself gets right."""
    from contextlib import contextmanager

    from clead.attacks import runner as attacks
    from clead.measurements import unrestricted as module

    @contextmanager
    def lying(model, x, precision=torch.float32):
        yield lambda x: model(x).flip(1)  # every image has fallen already

    monkeypatch.setattr(attacks, "optimized", lying)
    monkeypatch.setattr(module, "optimized", lying)
    x, y = torch.full((3, 1, 6, 6), 0.4), torch.zeros(3, dtype=torch.int64)
    assert not CLASSIFICATION.correct(Bright()(x).flip(1), y).any()
    result = evaluate_unrestricted(Bright(), ImageSet(x, y), Patch(size=2, steps=20), Computation(show=False))
    assert result.clean.accuracy == 1 and result.robust.accuracy == 0


def test_steps_replace_those_of_each_attack():
    x, y = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4, dtype=torch.int64)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 2))
    result = evaluate_minimum_norm(model, ImageSet(x, y), "l2", ["fmn", "cw"], steps=3)
    assert [part.settings["steps"] for part in result.attacks] == [3, 3]
    with pytest.raises(UserError, match="may be named once"):
        evaluate_minimum_norm(model, ImageSet(x, y), "l2", ["fmn", "fmn"])
