"""An evaluation that is killed, shared out, or moved between machines gives the flags of one that was left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import clead
from clead import api
from clead.cli import main
from clead.config import Eval, load_recipe
from clead.errors import UserError
from clead.evaluation.evaluator import evaluate_model
from clead.evaluation.plan import EvaluationOptions
from clead.evaluation.processes import Shard
from clead.evaluation.state import ResumableResults, UntrustedState
from clead.interfaces import ImageSet
from clead.results.target import EvaluationTarget
from clead.signature import is_signed, keyless, sign
from clead.threats import THREATS
from clead.weights.files import load_weights, save_weights
from support import Killed

EVAL = ("--eval.steps", "2", "--eval.images", "30", "--eval.batch_size", "10", "--eval.curve_points", "2")
EVAL += ("--eval.curve_steps", "1", "--eval.check_images", "4")
SMALL = ("--model.width", "8", "--model.features", "16")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of a few steps on digits."""
    out = tmp_path_factory.mktemp("state") / "run"
    config = load_recipe("digits-pgd-at", [*SMALL, "--train.budget", "20", "--train.validate_images", "8"])
    api.train(config, out=out, show=False)
    return out


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory) -> dict[str, Any]:
    """The record of an uninterrupted evaluation."""
    path = shutil.copytree(trained, tmp_path_factory.mktemp("alone") / "run")
    return evaluated(path)


def config(path: Path, *overrides: str):
    return load_recipe(str(path / "config.yaml"), [*EVAL, *overrides])


def evaluated(path: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    record = api.evaluate_run(path, config=config(path, *overrides), show=False, **options).record
    return comparable(json.loads(record.model_dump_json()))


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    """Everything but when, how long and by which command."""
    record = {
        key: value
        for key, value in record.items()
        if key not in ("created", "seconds", "command", "run", "versions", "memory")
    }
    record["notes"] = [note for note in record["notes"] if not note.startswith("continued from a state")]
    for part in record["attacks"]:
        part.pop("seconds")
    return record


def parts(path: Path) -> list[str]:
    return sorted(file.name for file in (path / "results" / "evaluation.state").glob("*.safetensors"))


@pytest.mark.parametrize("after", [1, 4, 9, 16, 17])  # clean images, then each batch's attacks, the radii, the checks
def test_resume_equals_uninterrupted_run_and_repeats_nothing(run, alone, after, monkeypatch):
    put, calls = ResumableResults.save, []

    def kill_at(count):
        def counted(self, key, *part):
            put(self, key, *part)
            calls.append(key)
            if len(calls) == count:
                raise Killed

        return counted

    monkeypatch.setattr(ResumableResults, "save", kill_at(after))
    with pytest.raises(Killed):
        evaluated(run)
    assert len(parts(run)) == after
    monkeypatch.setattr(ResumableResults, "save", kill_at(-1))
    assert evaluated(run) == alone
    assert len(calls) == len(set(calls)) == 3 * 5 + 2 + 1  # batches × (clean and four attacks), two radii, the checks
    assert not (run / "results" / "evaluation.state").exists()


def test_kill_9_in_a_real_process(run, alone):
    """Twice, at whatever moment it comes."""
    arguments = [sys.executable, "-m", "clead", "evaluate", str(run), *EVAL]
    for wanted in (2, 7):
        process = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(6000):
            if len(parts(run)) >= wanted or process.poll() is not None:
                break
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was over before the kill: give it more to do"
        assert len(parts(run)) >= wanted
    assert evaluated(run) == alone


def test_a_damaged_part_is_computed_again(run, alone, monkeypatch):
    monkeypatch.setattr("clead.evaluation.saving.discard", lambda path: None)
    assert evaluated(run) == alone
    first, second = (run / "results" / "evaluation.state" / name for name in parts(run)[1:3])
    first.write_bytes(first.read_bytes()[:-3])
    second.write_bytes(second.read_bytes()[:-1] + bytes([second.read_bytes()[-1] ^ 1]))
    assert evaluated(run) == alone


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("--threat.eps", "0.2"), 'threat: "linf 0.15" there, "linf 0.2" here'),
        (("--eval.seed", "1"), "seed: 0 there, 1 here"),
        (("--eval.images", "29"), "images: "),
        (("--eval.suite", "quick"), 'suite: "standard" there, "quick" here'),
        (("--eval.steps", "3"), "attacks: "),
        (("--eval.batch_size", "15"), "batch_size: 10 there, 15 here"),
        (("--eval.weights", "last"), "model: "),
    ],
)
def test_the_state_of_another_evaluation_is_refused(run, change, says, monkeypatch):
    def killed(self, key, *part):
        put(self, key, *part)
        raise Killed

    put = ResumableResults.save

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ResumableResults, "save", killed)
        evaluated(run)
    weights = run / "last.safetensors"
    if "last" in change:
        from clead.weights.files import load_weights, save_weights

        content, metadata = load_weights(weights)
        api_weights = {key: value + 1 if key.endswith("bias") else value for key, value in content.items()}
        save_weights(weights, api_weights, metadata)
    with pytest.raises(UserError) as caught:
        evaluated(run, *change)
    message = str(caught.value)
    assert says in message and "is the state of another evaluation" in message and "--fresh" in message
    assert "\n" not in message
    evaluated(run, *change, "--eval.curve_points", "0", "--eval.check_images", "0", fresh=True)


# ------------------------------------------------------------------------------------------------ states that lie


def small(state: Path | None, attacks: Any = None, **options: Any) -> dict[str, Any]:
    """Evaluate a linear model on 30 images in four batches, each attacked four times."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        x = torch.rand(30, 1, 4, 4)
    y = net(x).argmax(1)
    y[::7] = (y[::7] + 1) % 3  # some are wrong when clean
    settings = Eval(steps=2, batch_size=8, curve_points=0, check_images=0)
    target = EvaluationTarget("small", "Linear", "given", "given", "test", "given", ("a", "b", "c"))
    threat = THREATS.get("linf")(eps=0.03)
    how = EvaluationOptions(state=state, show=False, **options)
    found = evaluate_model(net, ImageSet(x, y), threat, settings, target, attacks=attacks, options=how)
    assert found is not None
    return json.loads(found.record.model_dump_json())


@pytest.fixture(scope="module")
def small_alone() -> dict[str, Any]:
    record = comparable(small(None))
    assert 0 < record["robust_flags"].count("1") < record["clean_flags"].count("1") < 30
    return record


@pytest.fixture
def state(tmp_path, monkeypatch) -> Path:
    """The state of an evaluation that was stopped after 16 of its 20 parts."""
    put, calls = ResumableResults.save, []

    def kill_at(self, key, *part):
        put(self, key, *part)
        calls.append(key)
        if len(calls) == 16:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ResumableResults, "save", kill_at)
        small(tmp_path / "state")
    return tmp_path / "state"


def rewrite(file: Path, change, *, signed_by: ResumableResults | None = None) -> bool:
    """Change a part and make its checksum right again, as a forger would, and its signature too where ``signed_by`` is given."""
    tensors, data = load_weights(file)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    signature = data.pop("signature")
    change(tensors)
    if signed_by is not None:
        signature = sign(signed_by._text(file.stem, (tensors, data)))
    save_weights(file, tensors, {**data, "signature": signature})
    return any(
        before[name].dtype != tensor.dtype or not torch.equal(before[name], tensor) for name, tensor in tensors.items()
    )


def all_robust(tensors: dict[str, torch.Tensor]) -> None:
    tensors["flags"] = torch.ones_like(tensors["flags"])


def none_robust(tensors: dict[str, torch.Tensor]) -> None:
    tensors["flags"] = torch.zeros_like(tensors["flags"])


def pixels_moved(tensors: dict[str, torch.Tensor]) -> None:
    if "x_adv" in tensors:
        tensors["x_adv"] = (tensors["x_adv"] + 0.5).clamp(0, 1)


def another_type(tensors: dict[str, torch.Tensor]) -> None:
    tensors["flags"] = tensors["flags"].long()


FORGERIES = {f.__name__: f for f in (all_robust, none_robust, pixels_moved, another_type)}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_state_is_not_continued(state, small_alone, name):
    for file in state.glob("*.safetensors"):
        rewrite(file, FORGERIES[name])
    with pytest.raises(UserError) as caught:
        small(state)
    message = str(caught.value)
    assert "holds 16 finished parts" in message and "were not made by you on this machine" in message
    assert "--fresh" in message and "--trust-state" in message and "\n" not in message
    assert len(list(state.glob("*.safetensors"))) == 16, "a refusal takes nothing away"


def test_a_part_of_another_place_or_evaluation_is_no_part_of_this_one(state):
    """Rightly signed, but for another batch; then for another evaluation."""
    first, second = (state / f"00000{batch}-02.safetensors" for batch in (0, 1))
    kept = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=r"1 of them were not made by you"):
        small(state)
    second.write_bytes(kept)
    header = {**json.loads((state / "state.json").read_text()), "seed": 1}
    (state / "state.json").write_text(json.dumps(header))
    with (
        pytest.raises(UntrustedState, match=r"16 of them were not made by you"),
        ResumableResults(state, header).opened(),
    ):
        pass


def test_a_state_of_another_key_is_continued_only_if_asked(state, small_alone, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    with pytest.raises(UserError, match="16 of them were not made by you on this machine"):
        small(state)
    record = small(state, trust_state=True)
    assert comparable(record)["robust_flags"] == small_alone["robust_flags"]
    assert any(note.startswith("continued from a state with 16 finished parts") for note in record["notes"])
    assert any("16 of these parts were made by another user" in note for note in record["notes"])
    assert "16 finished parts, the last of 20" in caplog.text


@pytest.mark.parametrize("whose", ["folder", "file"])
def test_what_another_owner_holds_is_foreign_though_it_is_signed(state, monkeypatch, whose):
    others = {"folder": lambda path: path != state, "file": lambda path: path.name != "000000-01.safetensors"}
    monkeypatch.setattr("clead.evaluation.state.owned", others[whose])
    with pytest.raises(UserError, match=f"{16 if whose == 'folder' else 1} of them were not made by you"):
        small(state)


def test_a_state_that_was_moved_by_its_user_goes_on(state, small_alone, monkeypatch, tmp_path, caplog):
    moved = tmp_path / "elsewhere"
    state.rename(moved)
    calls: list[str] = []
    put = ResumableResults.save
    monkeypatch.setattr(
        ResumableResults, "save", lambda self, key, *part: (calls.append(key), put(self, key, *part))[1]
    )
    record = small(moved)
    assert sum(note.startswith("continued from a state with 16") for note in record["notes"]) == 1
    assert comparable(record) == small_alone
    assert len(calls) == 20 - 16 and "16 finished parts" in caplog.text


@pytest.mark.parametrize("name", FORGERIES)
@pytest.mark.parametrize("stage", ["00", "01", "02"])
def test_parts_that_the_model_contradicts_are_computed_again(state, small_alone, name, stage, caplog):
    """Signed by the user's own key: what can be seen again is seen again all the same."""
    own = ResumableResults(None, json.loads((state / "state.json").read_text()))
    changed = rewrite(state / f"000000-{stage}.safetensors", FORGERIES[name], signed_by=own)
    record = small(state)
    again = [note for note in record["notes"] if "do not agree with the model, computed again: 000000-" in note]
    assert len(again) == changed and ("do not agree with the model" in caplog.text) is changed
    record["notes"] = [note for note in record["notes"] if note not in again]
    assert comparable(record) == small_alone


def test_a_part_of_an_earlier_version_that_lacks_figures_is_computed_again(state, small_alone):
    own = ResumableResults(None, json.loads((state / "state.json").read_text()))
    tensors, data = load_weights(state / "000000-01.safetensors")
    data = {key: value for key, value in data.items() if key not in ("signature", "calls")}
    signature = sign(own._text("000000-01", (tensors, data)))
    save_weights(state / "000000-01.safetensors", tensors, {**data, "signature": signature})
    record = small(state)
    again = [note for note in record["notes"] if "computed again: 000000-01" in note]
    assert len(again) == 1
    record["notes"] = [note for note in record["notes"] if note not in again]
    assert comparable(record) == small_alone


def test_trusted_forgeries_that_can_be_seen_are_seen(state, small_alone):
    for file in state.glob("*-00.safetensors"):
        rewrite(file, all_robust)
    for file in state.glob("*-01.safetensors"):
        rewrite(file, none_robust)
    record = small(state, trust_state=True)
    assert record["robust_flags"] == small_alone["robust_flags"]
    assert record["clean_flags"] == small_alone["clean_flags"]


def test_shards_of_other_machines_are_merged_only_if_asked(small_alone, monkeypatch, tmp_path):
    for index in (1, 2):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / f"machine {index}"))
        with pytest.raises(AssertionError):  # a shard makes no record
            small(tmp_path / "state", shard=Shard(index, 2))
    with pytest.raises(UserError, match="not made by you on this machine.*--trust-state"):
        small(tmp_path / "state", merge=True)
    record = small(tmp_path / "state", merge=True, trust_state=True)
    assert record["robust_flags"] == small_alone["robust_flags"]
    assert any(note.startswith("shard 1/2: ") and "taken on trust" in note for note in record["notes"])


def test_the_command_line_refuses_a_forged_state(run, monkeypatch, capsys):
    quick = ("--suite", "quick", "--eval.steps", "1", "--eval.images", "10", "--eval.batch_size", "5")
    arguments = ["clead", "evaluate", str(run), *quick, "--eval.curve_points", "0", "--eval.check_images", "0"]
    put, calls = ResumableResults.save, []

    def kill_at(self, key, *part):
        put(self, key, *part)
        calls.append(key)
        if len(calls) == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ResumableResults, "save", kill_at)
        patch.setattr(sys, "argv", arguments)
        main()
    for file in (run / "results" / "evaluation.state").glob("*.safetensors"):
        rewrite(file, all_robust)
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2 and "were not made by you on this machine" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*arguments, "--fresh"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert "not made by you" not in capsys.readouterr().err


def test_other_measurements_do_not_continue_a_forged_state(run, monkeypatch):
    options: dict[str, Any] = {"severities": (1,), "names": ("contrast", "fog"), "show": False}
    options["config"] = config(run, "--eval.images", "10")
    whole = api.measure(run, "corruptions", **options)
    put = ResumableResults.save

    def killed(self, key, *part):
        put(self, key, *part)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ResumableResults, "save", killed)
        api.measure(run, "corruptions", **options)
    (file,) = (run / "results" / "corruptions.state").glob("*.safetensors")
    rewrite(file, all_robust)
    with pytest.raises(UserError, match="not made by you on this machine"):
        api.measure(run, "corruptions", **options)
    assert api.measure(run, "corruptions", **options, fresh=True).result == whole.result


# ------------------------------------------------------------------------------------------------ the key


def test_the_key_is_secret_made_once_and_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "one"))
    first = sign("text")
    file = tmp_path / "one" / "clead" / "key"
    assert file.stat().st_mode & 0o777 == 0o600 and len(file.read_bytes()) == 32
    assert is_signed("text", first) and not is_signed("texts", first)
    assert not any(is_signed("text", wrong) for wrong in (None, "", 7, first[:-1], "ä" * 64))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "two"))
    assert not is_signed("text", first)
    code = "import sys; from clead.signature import is_signed; sys.exit(not is_signed('text', sys.argv[1]))"
    for name, expected in (("one", 0), ("two", 1)):
        environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / name)}
        assert subprocess.run([sys.executable, "-c", code, first], env=environment).returncode == expected


def test_without_a_place_for_the_key_a_state_ends_with_its_process(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert is_signed("text", sign("text")) and "cannot be kept" in keyless()
    with ResumableResults(tmp_path / "state", {"a": 1}).opened() as state:
        state.save("part", {}, {})
    assert "is continued after a stop only with --trust-state" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
@pytest.mark.parametrize(("mode", "content"), [(0o644, b"k" * 32), (0o660, b"k" * 32), (0o600, b"short")])
def test_a_key_that_others_can_read_is_refused(tmp_path, monkeypatch, mode, content):
    (tmp_path / "clead").mkdir()
    file = tmp_path / "clead" / "key"
    file.write_bytes(content)
    file.chmod(mode)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="remove it: rm "):
        sign("text")


def test_two_processes_on_one_state_are_refused(run):
    state = ResumableResults(run / "state", {"a": 1})
    with (
        state.opened(),
        pytest.raises(UserError, match="is in use by another evaluation"),
        ResumableResults(run / "state", {"a": 1}).opened(),
    ):
        pass


def test_a_full_disk_keeps_what_was_finished(run, alone, monkeypatch):
    put, calls = ResumableResults.save, []

    def full(self, key, *part):
        calls.append(key)
        if len(calls) == 6:
            raise UserError("cannot write: No space left on device; free some space")
        put(self, key, *part)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(ResumableResults, "save", full)
        evaluated(run)
    assert len(parts(run)) == 5 and not (run / "results" / "evaluation.json").exists()
    assert evaluated(run) == alone


def test_shards_equal_one_process(run, alone):
    for index in (3, 1, 2):
        with pytest.raises(api.ShardDone, match=f"shard {index}/3 is done"):
            evaluated(run, shard=f"{index}/3")
    assert evaluated(run, merge=True) == alone
    assert not list((run / "results").glob("*.state*"))


def test_shards_that_do_not_fit_together_are_refused(run, tmp_path):
    def merge(*overrides):
        with pytest.raises(UserError) as caught:
            evaluated(run, *overrides, merge=True)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no shard" in merge()
    with pytest.raises(api.ShardDone):
        evaluated(run, shard="2/2")
    assert "shard 1/2 is missing" in merge()
    with pytest.raises(api.ShardDone):
        evaluated(run, shard="1/2")
    results = run / "results"
    assert "threat" in merge("--threat.eps", "0.2")
    unfinished = results / "evaluation.state.shard-1-of-2"
    victim = sorted(unfinished.glob("*.safetensors"))[3]
    kept = victim.read_bytes()
    victim.unlink()
    assert "shard 1/2 is not finished" in merge()
    victim.write_bytes(kept)
    shutil.copytree(unfinished, results / "evaluation.state.shard-1-of-3")
    assert "several divisions (n = 2, 3)" in (said := merge()) and "shard-1-of-2" in said and "shard-1-of-3" in said
    shutil.rmtree(results / "evaluation.state.shard-1-of-3")
    evaluated(run, merge=True)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/2/3", "a/b", "-1/2", ""])
def test_shard_numbers_are_checked(text):
    with pytest.raises(UserError, match="must be i/n with 1 ≤ i ≤ n"):
        Shard.parse(text)


def test_two_processes_equal_one(run, alone):
    """Under torchrun, with gloo; one batch more than a multiple of two."""
    port = str(29000 + os.getpid() % 2000)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    arguments = ["-m", "clead", "evaluate", str(run), *EVAL, "--json", str(run / "record.json")]
    done = subprocess.run([*torchrun, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("record: ") == 1, "rank 0 alone speaks"
    assert comparable(json.loads((run / "record.json").read_text())) == alone
    assert not list((run / "results").glob("*.state*"))


def test_adversarial_images_are_saved_exactly_and_score_as_they_did(run, alone, tmp_path, capsys):
    file = tmp_path / "adversarial.parquet"
    evaluation = api.evaluate_run(run, config=config(run), save_adversarial=file, show=False)
    record = evaluation.record
    assert record.robust_flags == [flag == "1" for flag in alone["robust_flags"]]
    assert evaluation.adversarial is not None
    result = api.verify(run, file)
    broken = sum(record.clean_flags) - sum(record.robust_flags)
    assert result["n"] == 30 and result["num_successes"] == 30 - sum(record.robust_flags)
    assert result["wrong"] == result["num_successes"] and result["outside"] == 0 and broken > 0
    assert result["accuracy"] == record.robust_accuracy
    assert 0.1 < result["max_distance"] <= 0.15 + 1e-6
    import pyarrow.parquet as pq

    rows = pq.read_table(file).to_pylist()
    assert {row["attack"] for row in rows} <= {"", *(part.name for part in record.attacks)}
    assert sum(bool(row["attack"]) for row in rows) == broken
    assert all(row["image"]["bytes"].startswith(b"\x89PNG") for row in rows)
    # Another model's file on other images, and files that are none.
    with pytest.raises(UserError, match="holds other images"):
        api.verify(run, file, config=config(run, "--eval.split", "val"))
    wrong = tmp_path / "wrong.parquet"
    wrong.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="is not a file of clead evaluate"):
        api.verify(run, wrong)
    with pytest.raises(UserError, match="no file of adversarial images"):
        api.verify(run, tmp_path / "nothing.parquet")


def test_images_of_another_run_are_tried_after_the_suite(run, alone, tmp_path):
    record = evaluated(run, transfer_from=[run])
    assert [part["name"] for part in record["attacks"]][-1] == "transfer from run"
    assert record["attacks"][-1]["attacked"] == alone["robust_flags"].count("1")
    assert record["attacks"][-1]["settings"]["fingerprint"] == record["model"]["fingerprint"]
    assert all(new <= old for new, old in zip(record["robust_flags"], alone["robust_flags"], strict=True))


def test_in_python_the_state_is_a_directory_that_goes_away(tmp_path, monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        x = torch.rand(30, 1, 4, 4)
    y = net(x).argmax(1)
    settings: dict[str, Any] = {"steps": 2, "batch_size": 8, "curve_points": 0, "check_images": 0, "eps": 0.02}
    whole = clead.evaluate(net, x, y, **settings)
    put, calls = ResumableResults.save, []

    def killed(self, key, *part):
        put(self, key, *part)
        calls.append(key)
        if len(calls) == 5:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ResumableResults, "save", killed)
        clead.evaluate(net, x, y, state=tmp_path / "state", **settings)
    assert (tmp_path / "state" / "state.json").exists()
    with pytest.raises(UserError, match="another evaluation"):
        clead.evaluate(net, x.flip(0), y, state=tmp_path / "state", **settings)
    assert clead.evaluate(net, x, y, state=tmp_path / "state", **settings).robust == whole.robust
    assert not (tmp_path / "state").exists()


def test_parts_without_a_header_are_of_nobody(tmp_path):
    """What a kill inside the removal of a state can leave."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    x = torch.rand(20, 1, 4, 4)
    y = net(x).argmax(1)
    settings: dict[str, Any] = {"steps": 2, "curve_points": 0, "check_images": 0}
    expected = clead.evaluate(net, x, y, eps=0.1, **settings).robust
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clead.api.evaluation.discard", lambda path: (path / "state.json").unlink())
        assert clead.evaluate(net, x, y, eps=0.0001, state=tmp_path / "state", **settings).robust != expected
    assert list((tmp_path / "state").glob("*.safetensors"))
    assert clead.evaluate(net, x, y, eps=0.1, state=tmp_path / "state", **settings).robust == expected


def test_the_same_weights_with_another_constant_are_another_model(tmp_path, monkeypatch):
    class Scaled(torch.nn.Module):
        def __init__(self, k: float) -> None:
            super().__init__()
            self.fc, self.k = torch.nn.Linear(16, 3), k

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.k * self.fc(x.flatten(1))

    a, b = Scaled(1), Scaled(-1)
    b.load_state_dict(a.state_dict())
    x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 3
    monkeypatch.setattr("clead.api.evaluation.discard", lambda path: None)
    clead.evaluate(a, x, y, steps=1, state=tmp_path / "state", curve_points=0, check_images=0)
    with pytest.raises(UserError, match="answers: "):
        clead.evaluate(b, x, y, steps=1, state=tmp_path / "state", curve_points=0, check_images=0)


RANKS = """
import sys, torch, clead
import torch.distributed as dist
dist.init_process_group("gloo")
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
x = torch.rand(20, 1, 4, 4) + (0 if dist.get_rank() == 0 else -0.01)
clead.evaluate(net, x.clamp(0, 1), net(x).argmax(1), steps=1, batch_size=5, curve_points=0, check_images=0)
"""


def test_processes_with_different_images_are_told_so(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    port = str(31000 + os.getpid() % 2000)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "ranks.py")], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0 and "process 1 evaluates something else than process 0: images: " in done.stderr


ONE_OF_TWO = """
import time
from datetime import timedelta
import torch
import torch.distributed as dist
import clead
from clead.evaluation import processes
dist.init_process_group("gloo")
processes._MEETING = timedelta(seconds=3)
if dist.get_rank() == 0:
    images = torch.rand(4, 1, 4, 4)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    clead.evaluate(model, images, torch.zeros(4, dtype=torch.long), suite="pgd", eps=0.1)
else:
    time.sleep(30)
"""


def test_an_evaluation_in_one_of_two_processes_does_not_wait_for_ever(tmp_path):
    (tmp_path / "one.py").write_text(ONE_OF_TWO)
    port = str(27000 + os.getpid() % 2000)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "one.py")], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "but some of them did not begin it within 3 seconds; call it in every process" in done.stderr


# ------------------------------------------------------------------------------------------------ results elsewhere


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


SHORT = ("--eval.steps", "1", "--eval.images", "6", "--eval.curve_points", "0", "--eval.check_images", "0")


@pytest.mark.parametrize(
    ("command", "made"),
    [
        (("evaluate", "--suite", "pgd", *SHORT), {"evaluation.json", "evaluation.safetensors", "report.html"}),
        (
            ("attack", "--attack.steps", "1", "--eval.images", "6"),
            {"attack-pgd-1-ce.json", "attack-pgd-1-ce.safetensors"},
        ),
        (("distances", "--eval.images", "4", "--eval.steps", "2"), {"distances.json"}),
        (("corruptions", "--eval.images", "4", "--severities", "1"), {"corruptions.json"}),
    ],
)
def test_results_go_to_another_folder_and_the_run_is_left_as_it_was(run, tmp_path, monkeypatch, capsys, command, made):
    before = files(run)
    monkeypatch.setattr(
        sys, "argv", ["clead", command[0], str(run), *command[1:], "--out", str(tmp_path / "elsewhere")]
    )
    with pytest.raises(SystemExit) as caught:
        main()
    out = capsys.readouterr()
    assert caught.value.code == 0, out.err
    assert files(run) == before and set(files(tmp_path / "elsewhere")) == made
    assert f"record: {tmp_path}/elsewhere/" in out.out


def test_a_read_only_run_says_that_the_results_need_a_folder(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("clead.runs.loading.os.access", lambda path, mode: False)
    for command in ("evaluate", "distances", "attack"):
        monkeypatch.setattr(sys, "argv", ["clead", command, str(run)])
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr().err
        assert (
            caught.value.code == 2 and "is read-only; add --out DIR for the results" in said and said.count("\n") == 1
        )
    monkeypatch.setattr(sys, "argv", ["clead", "evaluate", str(run), str(run), "--out", "x"])
    with pytest.raises(SystemExit):
        main()
    assert "--out is the folder of one run's results, got 2 runs" in capsys.readouterr().err


def test_a_stopped_evaluation_goes_on_in_the_other_folder(run, tmp_path, monkeypatch):
    put, calls = ResumableResults.save, []

    def kill_at(self, key, *part):
        put(self, key, *part)
        calls.append(key)
        if len(calls) == 3:
            raise Killed

    short = load_recipe(str(run / "config.yaml"), [*SHORT, "--eval.batch_size", "3", "--eval.suite", "pgd"])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ResumableResults, "save", kill_at)
        api.evaluate_run(run, config=short, out=tmp_path / "elsewhere", show=False)
    assert (tmp_path / "elsewhere" / "evaluation.state" / "state.json").exists() and not (run / "results").exists()
    record = api.evaluate_run(run, config=short, out=tmp_path / "elsewhere", show=False).record
    assert any("continued from a state with 3 finished parts" in note for note in record.notes)
