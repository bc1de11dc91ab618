"""The command line, from a newcomer's side: whole ways through it, and what it prints."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import clead
from clead import api, cli, config
from clead.evaluation import masking
from clead.progress import progress
from clead.results.record import Check
from clead.runs.directory import RunDir
from clead.runs.loading import open_run
from clead.weights.files import load_weights
from support import ROOT, encoded

TINY = shlex.split("""--model.width 4 --model.features 8 --data.limit_train 60 --data.limit_test 40 --data.batch_size 16
--attack.steps 1 --train.epochs 2 --train.validate_steps 1 --eval.steps 2 --eval.curve_points 2 --eval.curve_steps 1
--eval.gallery 3 --eval.check_images 0 --train.device cpu""")
SMALL = TINY[4:]  # for other models


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run ``clead …`` in an empty directory, in this process; return (exit code, stdout, stderr)."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["clead", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two evaluated runs, made through Python."""
    folder = tmp_path_factory.mktemp("runs")
    for name, method in (("plain", "standard"), ("robust", "pgd_at")):
        clead.train(clead.load_recipe(f"digits-{method.replace('_', '-')}", TINY), out=folder / name, show=False)
        clead.evaluate_run(folder / name, show=False)
    return folder


@pytest.fixture
def runs(trained, command, monkeypatch):
    """Copies of them, where the command runs: plain and robust. No pages are drawn: they have tests of their own."""
    monkeypatch.setattr(api, "write_report", lambda sources, path, **keys: path)
    for name in ("plain", "robust"):
        shutil.copytree(trained / name, name)


def read(path):
    return json.loads(Path(path).read_text())


def well(result):
    code, out, err = result
    assert code == 0, err
    assert "Traceback" not in err and "error" not in err
    return out


@pytest.mark.slow
def test_the_whole_way_on_digits(command):
    out = well(command("train", "digits-clead", *TINY, "--out", "a"))
    assert "6 steps, 2.0 epochs" in out and "next: clead evaluate a" in out
    well(command("train", *TINY, "digits-standard", "--out=b", "--train.seed=3"))  # options before the recipe

    out = well(command("evaluate", "a", "--suite", "pgd", "--json", "a.json", "--threat.eps", "8/255"))
    assert "worst case per image" in out and "a: 40 test images, linf 8/255" in out
    record = read("a.json")
    assert (
        record["threat"]["eps_text"] == "8/255"
        and record["data"]["n"] == 40
        and record["training"]["method"] == "clead"
    )
    assert record == read("a/results/evaluation.json")
    assert os.path.getsize("a/report.html") > 10_000
    assert RunDir.open(Path("a")).config().threat.eps == 0.15  # the run itself is not changed

    out = well(command("evaluate", "--suite=pgd", "--eval.steps=1", "--json", "both.json", "a", "b"))
    assert [r["run"] for r in read("both.json")] == ["a", "b"]

    out = well(
        command(
            "attack", "a", "--save", "a.npz", "--json", "attack.json", "--attack.steps", "3", "--objective", "margin"
        )
    )
    assert "PGD-3 margin" in out and "record: a/results/attack-pgd-3-margin.json" in out
    arrays = np.load("a.npz")
    assert arrays["x"].shape == arrays["x_adv"].shape == (40, 1, 8, 8) and arrays["labels"].shape == arrays[
        "robust"
    ].shape == (40,)
    assert np.abs(arrays["x"] - arrays["x_adv"]).max() <= 0.15 + 1e-6
    model, _ = clead.load("a"), torch.manual_seed(0)
    right = (model(torch.from_numpy(arrays["x_adv"])).argmax(1) == torch.from_numpy(arrays["labels"])).numpy()
    assert (arrays["robust"] <= right).all()  # robust images are right under attack
    settings = read("attack.json")["attacks"][0]["settings"]
    assert settings["steps"] == 3 and settings["objective"] == "margin"
    well(command("attack", "a", "--attack.name", "fgsm"))
    # What is not given is a strong attack's, not that of the training.
    strong = read("attack.json")["attacks"][0]["settings"]
    assert strong["steps"] == 3 and strong["keep"] == "best" and strong["step_size"] is None

    out = well(command("compare", "a", "b", "--json", "c.json", "--out", "c.html"))
    assert "a against b:" in out and "McNemar exact p = " in out
    comparison = read("c.json")
    assert [row["run"] for row in comparison["rows"]] == ["a", "b"] and len(comparison["pairs"]) == 1
    assert all(0 <= row["robust_accuracy"] <= row["clean_accuracy"] <= 1 for row in comparison["rows"])
    assert well(command("compare", "a.json", "b/results/evaluation.json"))  # records as well as runs
    out = well(command("report", "a.json", "b/results/evaluation.json"))
    assert "report: report.html" in out and os.path.exists("report.html") and os.path.exists("c.html")
    out = well(command("train", "digits-clead", *TINY, "--out", "a", "--resume"))
    assert "6 steps" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "attacks", "said"),
    [
        (
            "standard",
            ["APGD-CE", "APGD-T", "FAB-T", "Square"],
            "suite standard with 1 step instead of its own, not AutoAttack",
        ),
        ("quick", ["APGD-CE", "APGD-T"], "suite quick with 1 step instead of its own, not AutoAttack"),
        ("black_box", ["Square", "RayS"], "suite black_box with 1 step instead of its own, not AutoAttack"),
        ("pgd", ["FGSM", "PGD-1 CE", "PGD-1 margin"], "FGSM, PGD-1 CE and PGD-1 margin, not AutoAttack"),
    ],
)
def test_a_suite_ends_with_a_sentence_to_quote(command, runs, suite, attacks, said):
    out = well(command("evaluate", "robust", "--suite", suite, "--eval.steps", "1", "--json", "r.json"))
    record = read("r.json")
    assert record["schema_version"] == 3 and record["suite"] == suite and record["checks"] == []
    assert [part["name"] for part in record["attacks"]] == attacks
    worst = record["worst"]
    # The figures stand in the record, as text in the last line: nothing to be put together by hand.
    assert out.splitlines()[-1] == (
        f"robust: {worst['accuracy']:.1%} of 40 test images (95 % interval {worst['low']:.1%} – {worst['high']:.1%}) "
        f"withstand linf 0.15 under {said}; {record['clean']['accuracy']:.1%} are right when clean."
    )
    assert worst["accuracy"] == record["robust_flags"].count("1") / 40
    assert "note: 1 step instead of the suite's own" in out


def test_failed_checks_are_said_beside_the_sentence(command, runs, monkeypatch):
    checks = [
        Check(name="steps", passed=False, explanation="longer attacks break more", numbers={"more": 9.0}),
        Check(name="noise", passed=True, explanation="noise breaks less", numbers={"less": 1.0}),
        Check(name="black box", passed=False, explanation="Square breaks more", numbers={"more": 7.0}),
    ]
    arguments = ("evaluate", "plain", "--suite", "pgd", "--eval.steps", "1", "--eval.check_images", "8")
    for expected in (checks, checks[1:2]):
        monkeypatch.setattr(masking, "run_checks", lambda *args, expected=expected, **keys: expected)
        out = well(command(*arguments, "--json", "r.json"))
        assert [check["name"] for check in read("r.json")["checks"]] == [check.name for check in expected]
        *_, sentence, last = out.splitlines()
        if expected is checks:
            assert last == "Do not trust it yet: checks of gradient masking failed: steps, black box."
            assert " withstand linf 0.15 under " in sentence and "check steps failed: longer attacks break more" in out
        else:
            assert "Do not trust" not in out and "check " not in out


def test_only_runs_under_the_same_attacks_are_paired(command, runs):
    def evaluated(run, steps):
        config_ = config.load_recipe(f"{run}/config.yaml", ["--eval.suite", "quick", "--eval.steps", str(steps)])
        clead.evaluate_run(run, config=config_, show=False)

    evaluated("plain", 1)
    assert "McNemar" not in well(command("compare", "plain", "robust", "--json", "c.json"))
    assert read("c.json")["pairs"] == [] and [row["suite"] for row in read("c.json")["rows"]] == ["quick", "standard"]
    evaluated("robust", 2)  # the same suite, but a longer search
    assert "McNemar" not in well(command("compare", "plain", "robust"))
    evaluated("robust", 1)
    assert "plain against robust: " in well(command("compare", "plain", "robust"))


def test_saved_adversarial_images_are_scored_again(command, runs):
    short = ("--suite", "pgd", "--threat.eps", "0.3")
    out = well(command("evaluate", "plain", *short, "--save-adversarial", "x.parquet", "--json", "r.json"))
    assert "images: x.parquet" in out
    held = read("r.json")["robust_flags"].count("1")
    out = well(command("attack", "plain", "--verify", "x.parquet", "--json", "v.json"))
    assert out.startswith(
        f"plain: of 40 images {40 - held} are stated as broken, {40 - held} of these are classified wrong"
    )
    assert "0 outside; " in out and "after rounding to 8 bits" in out
    result = read("v.json")
    assert (result["n"], result["num_successes"], result["wrong"], result["outside"]) == (40, 40 - held, 40 - held, 0)
    assert (
        result["same_model"]
        and result["accuracy"] == held / 40
        and 0 < result["max_distance"] <= result["eps"] + 1e-6
        and result["eps"] == 0.3
    )
    # What broke one model, on another.
    out = well(command("attack", "robust", "--verify", "x.parquet", "--json", "v.json"))
    assert "made for another model, plain, so what is right here is no robustness" in out
    other = read("v.json")
    assert (
        other["run"] == "robust"
        and other["num_successes"] == 40 - held
        and other["max_distance"] == result["max_distance"]
    )
    assert not list(Path("plain/results").glob("attack-*"))


def test_an_attack_towards_a_class_counts_what_is_taken_for_it(command):
    shutil.copytree(ROOT / "tests/data/models/digits-clead", "model")
    large = ("--threat.eps", "0.3", "--attack.steps", "10", "--eval.images", "40", "--train.device", "cpu")
    out = well(command("attack", "model", "--target", "3", *large, "--json", "a.json", "--save", "x.npz"))
    record = read("a.json")
    (part,) = record["attacks"]
    labels = open_run("model", None, None, None).images.labels[:40]
    left = int((labels != 3).sum())
    assert part["name"] == "PGD-10 CE towards 3" and part["settings"]["target"] == 3
    assert record["data"]["n"] == left == len(part["flags"]) and record["data"]["total"] is None
    taken = sum(pair == ("1", "0") for pair in zip(record["clean_flags"], part["flags"], strict=True))
    assert taken == part["num_successes"] > 0 and part["attacked"] == record["clean_flags"].count("1")
    assert f"note: {40 - left} of 40 images are of class 3, the target, and are left out" in out
    assert f"{taken} of {part['attacked']} images that are right when clean are taken for 3" in out
    assert "worst case per image" not in out
    saved = np.load("x.npz")
    x_adv, robust = torch.from_numpy(saved["x_adv"]), torch.from_numpy(saved["robust"])
    predicted = clead.load("model", weights="last")(x_adv).argmax(1)
    attacked = torch.tensor([flag == "1" for flag in record["clean_flags"]])[: len(x_adv)]
    assert torch.equal(predicted[attacked] == 3, ~robust[: len(x_adv)][attacked])
    again = command("attack", "model", "--target", "3", *large, "--json", "b.json")
    well(again)
    assert read("b.json")["robust_flags"] == record["robust_flags"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ("--target", "cat"),
            "--target cat: no class of the data; known: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 or a number from 0 to 9",
        ),
        (
            ("--target", "3", "--attack.name", "deepfool"),
            "DeepFool cannot aim at a class; leave out the target, or use",
        ),
        (
            ("--target", "3", "--attack.name", "spatial"),
            "--target: the spatial attack cannot aim at a class; leave it out",
        ),
        (
            ("--target", "3", "--objective", "kl"),
            "objective 'kl' knows no target; give --objective cross_entropy or margin",
        ),
        (("--target", "3", "--verify", "x.parquet"), "--target: changes nothing with --verify"),
    ],
)
def test_targets_that_cannot_be_are_refused(command, runs, arguments, words):
    code, _, err = command("attack", "plain", *arguments)
    assert code == 2 and words in err and not list(Path("plain/results").glob("attack-*"))


@pytest.mark.parametrize("name", ["torchattacks:PGD", "foolbox:LinfPGD"])
def test_attacks_of_other_libraries_by_name(command, runs, name):
    pytest.importorskip("foolbox")
    arguments = ("attack", "plain", "robust", f"--attack.name={name}", "--attack.steps", "3", "--json", "a.json")
    out = well(command(*arguments))
    slug = name.lower().replace(":", "-")
    for run, record in zip(("plain", "robust"), read("a.json"), strict=True):
        (part,) = record["attacks"]
        assert part["name"] == name and part["settings"]["name"] == name and part["settings"]["steps"] == 3
        assert record["run"] == run and record["suite"] == "attacks" and record["worst"]["accuracy"] < 1
        assert (
            f"record: {run}/results/attack-{slug}.json" in out and read(f"{run}/results/attack-{slug}.json") == record
        )


@pytest.mark.slow
def test_images_of_another_run_are_tried_too(command, runs):
    out = well(command("evaluate", "plain", "--suite", "pgd", "--transfer-from", "robust", "--json", "r.json"))
    *own, last = read("r.json")["attacks"]
    assert len(own) == 3 and last["name"] == "transfer from robust" and last["settings"]["source"] == "robust"
    assert "transfer from robust" in out
    twice = ("--transfer-from", "robust", "--transfer-from", "plain")
    well(command("evaluate", "plain", "--suite", "pgd", *twice, "--json", "r.json"))
    assert [part["name"] for part in read("r.json")["attacks"][3:]] == ["transfer from robust", "transfer from plain"]


@pytest.mark.slow
def test_shards_and_what_a_stopped_evaluation_left(command, runs):
    common = ("plain", "--suite", "pgd", "--eval.batch_size", "8")
    well(command("evaluate", *common, "--json", "whole.json"))
    os.remove("plain/results/evaluation.json")
    for index in (2, 1):
        out = well(command("evaluate", *common, "--shard", f"{index}/2", "--json", "part.json"))
        assert f"shard {index}/2 is done: plain/results/evaluation.state.shard-{index}-of-2" in out and "--merge" in out
        assert not os.path.exists("plain/results/evaluation.json") and not os.path.exists("part.json")
    well(command("evaluate", *common, "--merge", "--json", "merged.json"))
    assert read("merged.json")["robust_flags"] == read("whole.json")["robust_flags"]
    # A state of other settings is said, and goes when it is asked to.
    well(command("evaluate", *common, "--shard", "1/2"))
    other = ("evaluate", *common, "--shard", "1/2", "--eval.seed", "5")
    code, _, err = command(*other)
    assert code == 2 and "seed: 0 there, 5 here" in err and "--fresh" in err
    assert "shard 1/2 is done" in well(command(*other, "--fresh"))


@pytest.mark.slow
def test_shards_of_several_runs(command, runs):
    common = ("plain", "robust", "--suite", "pgd", "--eval.batch_size", "8")
    for index in (1, 2):
        out = well(command("evaluate", *common, "--shard", f"{index}/2"))
        for run in ("plain", "robust"):
            assert f"shard {index}/2 is done: {run}/" in out
    assert well(command("evaluate", *common, "--merge")).count("withstand") == 2


def test_default_run_directories_and_resume_by_name(command):
    out = well(command("train", "digits-standard", *TINY))
    (made,) = [line.removeprefix("run: ") for line in out.splitlines() if line.startswith("run: ")]
    assert made.startswith("runs/digits-standard-")
    # A longer name is another recipe's.
    os.makedirs("runs/digits-standard-mine-20300101-000000")
    open("runs/digits-standard-mine-20300101-000000/config.yaml", "w").close()
    assert f"run: {made}\n" in well(command("train", "digits-standard", *TINY, "--resume"))
    code, _, err = command("train", "digits-trades", *TINY, "--resume")
    assert code == 2 and err.startswith("clead: error: --resume: there is no run of digits-trades in runs/")


def noise(*shape, seed):
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


@pytest.mark.slow
def test_an_image_folder_of_many_sizes(command):
    for part, count in (("train", 8), ("test", 4)):
        for c, name in enumerate(("cat", "dög")):
            os.makedirs(f"pets/{part}/{name}")
            for n in range(count):
                with open(f"pets/{part}/{name}/{n}.png", "wb") as file:
                    file.write(encoded(noise(9 + n, 12 - n, 3, seed=10 * c + n)))
    common = ("--data.name", "auto", "--data.path", "pets", *TINY[:4], *TINY[8:], "--data.augment.flip", "true")
    code, _, err = command("train", "digits-clead", *common)
    assert code == 2 and "--data.image_size" in err and err.count("\n") == 1 and not os.path.exists("runs")
    well(command("train", "digits-clead", *common, "--data.image_size", "12", "--data.resize", "crop", "--out", "run"))
    assert "8 test images" in well(command("evaluate", "run"))
    assert load_weights(Path("run/best.safetensors"))[1]["classes"] == ["cat", "dög"]


@pytest.mark.slow
def test_parquet_in_the_hugging_face_layout(command):
    import pyarrow as pa
    import pyarrow.parquet as pq

    os.mkdir("flags")
    for part, count in (("train", 20), ("test", 6)):
        images = [{"bytes": encoded(noise(8, 8, 3, seed=n)), "path": None} for n in range(count)]
        table = pa.table({"img": images, "label": [n % 2 for n in range(count)]})
        info = {"info": {"features": {"label": {"names": ["red", "blue"], "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        pq.write_table(table, f"flags/{part}-00000-of-00001.parquet")
    common = ("--data.name", "parquet", "--data.path", "flags", *TINY[:4], *TINY[8:])
    well(command("train", "digits-clead", *common, "--out", "run"))
    assert "6 test images" in well(command("evaluate", "run", "--json", "r.json"))
    assert read("r.json")["data"]["classes"] == ["red", "blue"]


@pytest.mark.slow
def test_arrays_and_a_users_model_from_a_file(command):
    labels = np.arange(30) % 3
    np.savez("a.npz", x_train=noise(30, 6, 6, seed=0), y_train=labels, x_test=noise(9, 6, 6, seed=1), y_test=labels[:9])
    os.mkdir("nets")
    with open("nets/mine.py", "w") as file:
        file.write(
            "from torch import nn\n\ndef factory(num_classes):\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, num_classes))\n"
        )
    common = ("--data.name", "auto", "--data.path", "a.npz", *TINY[8:], "--model.name", "nets/mine.py:factory")
    well(command("train", "digits-clead", *common, "--out", "run"))
    assert "9 test images" in well(command("evaluate", "run", "--eval.steps", "1"))
    model = clead.load("run")
    assert model.num_classes == 3 and model.module[3].weight.shape == (3, 8)
    well(command("report", "run"))


def test_show_prints_a_recipe_that_can_be_used(command):
    out = well(command("train", "digits-clead", "--threat.eps", "8/255", "--show"))
    assert "eps: 8/255" in out and not os.path.exists("runs")
    with open("mine.yaml", "w") as file:
        file.write(out)
    assert well(command("train", "mine.yaml", "--show")) == out


def test_help_documents_every_key(command):
    out = well(command("train", "--help"))
    assert config.key_reference() in out
    for option in ("--out", "--resume", "--show", "digits-clead"):
        assert option in out
    out = well(command("--help"))
    for name in ("train", "attack", "evaluate", "compare", "report", "demo", "list"):
        assert name in out
        assert well(command(name, "--help"))
    code, out, err = command()
    assert code == 2 and "Usage" in err and "error" not in err


def test_list_and_version(command):
    out = well(command("list"))
    for word in ("digits-clead", "resnet18", "linf", "pgd", "trades", "margin"):
        assert word in out
    assert well(command("--version")) == f"clead {clead.__version__}\n"


def test_too_little_memory_is_one_line(command, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 1"
        )

    monkeypatch.setattr(api, "train", fail)
    code, _, err = command("train", "digits-standard", "--out", "run")
    assert (code, err) == (
        1,
        "clead: error: not enough memory; lower data.batch_size, eval.batch_size or data.limit_train "
        "(such as --data.batch_size 16)\n",
    )


def test_missing_report_libraries_do_not_lose_the_record(command, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    run = trained / "plain"
    out = well(command("evaluate", run, "--eval.steps", "1"))
    assert "record: " in out and "no report: " in out and "pip install 'clead[report]'" in out


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_help_is_quick():
    """Neither the help nor ``import clead`` waits for PyTorch."""
    code = "import sys; import clead; from clead import cli; sys.argv = ['clead', '--help']\n"
    code += "try: cli.main()\nexcept SystemExit: pass\n"
    result = python(code + "print([m for m in ('torch', 'numpy', 'pydantic', 'sklearn') if m in sys.modules])")
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "[]", result.stderr


@pytest.mark.slow
def test_a_real_process(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    clead_ = [sys.executable, "-m", "clead"]
    wrong = subprocess.run(
        [*clead_, "train", "digits-claed"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith("clead: error: unknown recipe 'digits-claed'")
    arguments = ["train", "digits-standard", *TINY, "--train.epochs", "100000", "--out", "run"]
    process = subprocess.Popen([*clead_, *arguments], stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    for _ in range(3000):
        if (tmp_path / "run" / "metrics.jsonl").exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)  # what Ctrl-C sends
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and error.count("\n") == 1
    assert error.startswith("clead: stopped at step ") and "--resume --out run" in error
    assert (tmp_path / "run" / "resume.state").exists()


def test_progress_in_a_log_is_one_line_at_the_end(capsys):
    with progress("work", 3) as tick:
        for n in range(4):  # one more than was foreseen
            tick(1, loss=0.123456, validation_robust=float(n))
    assert capsys.readouterr().err == "work: 3/3 in 0 s  loss 0.123  val robust 2\n"
    with progress("work", 3, show=False) as tick:
        tick(3)
    assert capsys.readouterr().err == ""


def test_progress_fits_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    with progress("train digits-clead", 9999, done=10) as tick:
        tick(1, loss=0.5, clean_accuracy=0.25, robust_accuracy=0.125, validation_robust=0.1)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).splitlines()
    shown = [line for line in lines if "11/9999" in line]
    assert shown and "loss 0.5" in shown[-1] and all(len(line.rstrip()) <= 80 and "…" not in line for line in lines)
