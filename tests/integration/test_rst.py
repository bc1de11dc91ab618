"""Pseudo-labels of another run: robust self-training, exact on resume, and honest about how many are right."""

from __future__ import annotations

import dataclasses
import shlex
import shutil

import pytest
import torch

import clead
from clead.api.training import PSEUDO_LABELS
from clead.config import load_recipe
from clead.data.base import InMemoryDataset
from clead.errors import UserError
from clead.methods.clead import CLead
from clead.runs.directory import RunDir
from clead.training.step import Step
from clead.weights.files import load_weights
from support import same, saved_weights

TINY = shlex.split("""--model.width 4 --model.features 8 --data.limit_train 80 --data.batch_size 16 --attack.steps 1
--train.validate_every 1 --train.validate_steps 1 --train.device cpu --optim.lr 0.01 --optim.clip_norm null
--data.labelled 0.3""")


def config(recipe, *overrides, epochs="2"):
    return load_recipe(recipe, [*TINY, "--train.epochs", epochs, *overrides])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Stage A: plain training on the labelled images."""
    out = tmp_path_factory.mktemp("rst") / "teacher"
    clead.train(config("digits-standard", epochs="20"), out=out, show=False)
    return out


def student(teacher, out, *overrides, **keys):
    chosen = config("digits-trades", "--data.pseudo_labels_from", str(teacher), *overrides)
    return clead.train(chosen, out=out, **{"show": False, **keys})


def predicted(teacher, images):
    with torch.no_grad():
        return clead.load(teacher, weights=RunDir(teacher).config().eval.weights)(images.float() / 255).argmax(1)


@pytest.mark.slow
def test_stages_b_and_c_are_trades_on_the_predicted_labels(teacher, tmp_path, capsys):
    """As data whose labels were replaced by hand, and every image labelled (Carmon et al. 2019, algorithm 1)."""
    student(teacher, tmp_path / "rst", show=True)
    said = capsys.readouterr().err
    splits = config("digits-trades").data.load(0)
    train = splits.train
    labels = torch.where(train.labelled, train.labels, predicted(teacher, train.images))
    hidden = ~train.labelled
    agreement = (labels == train.labels)[hidden].double().mean().item()
    assert 0.3 < agreement < 1, "neither useless nor the truth: else this test could not fail"
    by_hand = dataclasses.replace(train, labels=labels, labelled=None)
    clead.train(
        config("digits-trades"), data=dataclasses.replace(splits, train=by_hand), out=tmp_path / "hand", show=False
    )
    assert same(saved_weights(tmp_path / "rst"), saved_weights(tmp_path / "hand"))
    clead.train(config("digits-trades", "--data.labelled", "1"), out=tmp_path / "truth", show=False)
    assert not same(saved_weights(tmp_path / "rst"), saved_weights(tmp_path / "truth"))
    assert f"{agreement:.1%} of {int(hidden.sum())} pseudo-labels by {teacher} are right" in said
    tensors, about = load_weights(tmp_path / "rst" / PSEUDO_LABELS)
    assert torch.equal(tensors["labels"][hidden], labels[hidden]) and about["agreement"] == agreement
    assert (about["from"], about["unlabelled"], about["data"]) == ("teacher", int(hidden.sum()), splits.fingerprint)


def test_hidden_labels_are_for_the_report_only(teacher, tmp_path):
    student(teacher, tmp_path / "a")
    chosen = config("digits-trades", "--data.pseudo_labels_from", str(teacher))
    splits = chosen.data.load(0)
    train = splits.train
    other = torch.where(train.labelled, train.labels, (train.labels + 1) % 10)
    changed = dataclasses.replace(splits, train=dataclasses.replace(train, labels=other))
    clead.train(chosen, data=changed, out=tmp_path / "b", show=False)
    assert same(saved_weights(tmp_path / "a"), saved_weights(tmp_path / "b"))
    agreement = [load_weights(tmp_path / name / PSEUDO_LABELS)[1]["agreement"] for name in "ab"]
    assert agreement[0] > agreement[1]


def test_half_of_a_batch_can_be_labelled_as_in_the_paper(teacher, tmp_path, monkeypatch):
    batches = []
    views = CLead.views
    monkeypatch.setattr(
        CLead, "views", lambda self, model, batch, step: batches.append(batch) or views(self, model, batch, step)
    )
    student(teacher, tmp_path / "rst", "--data.labelled_share", "0.5")
    mask = config("digits-trades").data.load(0).train.labelled
    assert all(mask[batch.index].sum() == 8 and batch.labelled is None for batch in batches[1:])
    assert batches[0].index is not None and all(batch.labels.min() >= 0 for batch in batches)


def test_resume_is_exact_even_when_the_source_is_gone(teacher, tmp_path, monkeypatch):
    source = shutil.copytree(teacher, tmp_path / "source")
    student(source, tmp_path / "straight")
    count, step = 0, Step.forward_backward

    def stop(*arguments):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Step, "forward_backward", stop)
        student(source, tmp_path / "stopped", "--train.checkpoint_seconds", "0")
    shutil.rmtree(source)
    student(source, tmp_path / "stopped", "--train.checkpoint_seconds", "0", resume=True)
    assert same(saved_weights(tmp_path / "straight"), saved_weights(tmp_path / "stopped"))
    load = InMemoryDataset.load

    def less(self, seed):
        splits = load(self, seed)
        return dataclasses.replace(splits, fingerprint="other")

    monkeypatch.setattr(InMemoryDataset, "load", less)
    with pytest.raises(UserError, match="pseudo_labels.safetensors is of other images; --resume continues on the same"):
        student(source, tmp_path / "stopped", "--train.checkpoint_seconds", "0", resume=True)


def test_mistakes_are_one_line_and_leave_nothing(teacher, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"^data.pseudo_labels_from: .*nowhere is not a run directory") as error:
        student(tmp_path / "nowhere", out)
    assert len(error.value.problems) == 1 and not out.exists()
    splits = config("digits-trades").data.load(0)
    chosen = config("digits-trades", "--data.pseudo_labels_from", str(teacher))
    renamed = dataclasses.replace(splits, classes=tuple("abcdefghij"))
    with pytest.raises(UserError, match=r"^data.pseudo_labels_from: .*trained on classes 0, 1, .* the data has a, b"):
        clead.train(chosen, data=renamed, out=out, show=False)
    wider = dataclasses.replace(splits.train, images=splits.train.images.repeat(1, 1, 1, 2))
    with pytest.raises(
        UserError, match=r"^data.pseudo_labels_from: .*images of shape \(1, 8, 8\), the data has \(1, 8, 16\)"
    ):
        clead.train(chosen, data=dataclasses.replace(splits, train=wider), out=out, show=False)
    labelled = dataclasses.replace(splits, train=dataclasses.replace(splits.train, labelled=None))
    with pytest.raises(UserError, match=r"^data.pseudo_labels_from: every image has a label already"):
        clead.train(chosen, data=labelled, out=out, show=False)
    assert not out.exists()


@pytest.mark.parametrize(
    ("teachers", "said"),
    [
        ("--data.labelled 1", "data.labelled 1.0 there, 0.3 here"),
        ("--train.seed 1", "train.seed 1 there, 0 here"),
        (
            "--data.val_fraction 0.2 --data.label_noise 0.1",
            "data.label_noise 0.1 there, 0.0 here, data.val_fraction 0.2 there, 0.1 here",
        ),
    ],
)
def test_a_teacher_that_saw_other_labels_is_refused(teachers, said, tmp_path):
    """Else its predictions carry labels that are said to be hidden, and the gain is none."""
    clead.train(config("digits-standard", *shlex.split(teachers), epochs="1"), out=tmp_path / "teacher", show=False)
    with pytest.raises(UserError) as error:
        student(tmp_path / "teacher", tmp_path / "run")
    assert error.value.problems == (
        f"data.pseudo_labels_from: {tmp_path / 'teacher'} may have learnt labels that are hidden here, got {said}; "
        "train it with the same",
    )
    assert not (tmp_path / "run").exists()


STAGED = """
data: {name: digits, batch_size: 16, labelled: 0.1, limit_train: 300}
model: {width: 4, features: 8}
threat: {eps: 0.15}
attack: {steps: 1}
method: {name: trades}
optim: {name: adamw, lr: 0.01}
train: {epochs: 2, device: cpu}
eval: {weights: last}
stages:
  - name: teacher
    method: {name: standard}
    train: {epochs: 8}
  - name: student
    data: {pseudo_labels_from: teacher}
"""


def staged(path, *overrides, text=STAGED):
    (path / "staged.yaml").write_text(text)
    return load_recipe(path / "staged.yaml", list(overrides))


def after(teacher, training, **data):
    """A stage's training as a run of its own, after that of its teacher."""
    return dataclasses.replace(
        training,
        data=dataclasses.replace(training.data, pseudo_labels_from=str(teacher), **data),
        train=dataclasses.replace(training.train, start_from=str(teacher)),
    )


@pytest.mark.slow
def test_a_stage_learns_from_the_labels_of_an_earlier_stage(tmp_path, capsys, monkeypatch):
    """As two runs, the second with the first's labels and from its weights; and again when it is resumed."""
    chosen = staged(tmp_path)
    clead.train(chosen, out=tmp_path / "run")
    kept = tmp_path / "run" / "stages" / "2-student" / PSEUDO_LABELS
    tensors, about = load_weights(kept)
    first = tmp_path / "run" / "stages" / "1-teacher"
    assert not (first / PSEUDO_LABELS).exists() and not (tmp_path / "run" / PSEUDO_LABELS).exists()
    train = chosen.data.load(0).train
    assert torch.equal(tensors["labels"], predicted(first, train.images)) and about["from"] == "teacher"
    assert 0.3 < about["agreement"] < 1
    assert f"{about['agreement']:.1%} of {int((~train.labelled).sum())} pseudo-labels by stage teacher are" in (
        capsys.readouterr().err
    )
    alone = chosen.trainings()[1]
    by_hand = after(first, alone)
    clead.train(by_hand, out=tmp_path / "hand", show=False)
    assert same(saved_weights(tmp_path / "run"), saved_weights(tmp_path / "hand"))

    step, count = Step.forward_backward, 0

    def stop(*arguments):
        nonlocal count
        count += 1
        if (tmp_path / "killed" / "stages" / "2-student" / PSEUDO_LABELS).exists() and count % 5 == 0:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Step, "forward_backward", stop)
        clead.train(staged(tmp_path, "--train.checkpoint_seconds", "0"), out=tmp_path / "killed", show=False)
    clead.train(staged(tmp_path, "--train.checkpoint_seconds", "0"), out=tmp_path / "killed", show=False, resume=True)
    assert same(saved_weights(tmp_path / "run"), saved_weights(tmp_path / "killed"))


@pytest.mark.slow
def test_a_stage_draws_its_own_share_of_labelled_images(tmp_path):
    """As two runs, the second with the share."""
    chosen = staged(tmp_path, "--stages.student.data.labelled_share", "0.5")
    clead.train(chosen, out=tmp_path / "run", show=False)
    first, alone = tmp_path / "run" / "stages" / "1-teacher", chosen.trainings()[1]
    for share in (0.5, None):
        clead.train(after(first, alone, labelled_share=share), out=tmp_path / f"{share}", show=False)
    assert same(saved_weights(tmp_path / "run"), saved_weights(tmp_path / "0.5"))
    assert not same(saved_weights(tmp_path / "run"), saved_weights(tmp_path / "None"))


def test_a_stage_names_an_earlier_one(tmp_path):
    rule = r"must be an earlier stage \(before it there is {}\), got '{}'; a run directory is given outside of stages$"
    start = r"^stages.{}.data.pseudo_labels_from: "
    with pytest.raises(UserError, match=start.format("student") + rule.format("teacher", "nobody")):
        staged(tmp_path, "--stages.student.data.pseudo_labels_from", "nobody")
    with pytest.raises(UserError, match=start.format("teacher") + rule.format("none", "student")):
        staged(tmp_path, "--stages.teacher.data.pseudo_labels_from", "student")
    with pytest.raises(
        UserError, match="changes nothing while every image has a label, got teacher; set data.labelled"
    ):
        staged(tmp_path, "--data.labelled", "1")
    splits = load_recipe("digits-standard").data.load(0)
    with pytest.raises(
        UserError, match=r"^data.pseudo_labels_from: every image has a label already, got teacher; leave it out"
    ):
        clead.train(staged(tmp_path), data=splits, out=tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()
