"""Pseudo-labels of another run: robust self-training, exact on resume, and honest about how many are right."""

from __future__ import annotations

import dataclasses
import shlex
import shutil

import pytest
import torch

import clead
from clead.api.training import PSEUDO_LABELS
from clead.checkpoint import RunDir, load_weights
from clead.config import load_recipe
from clead.data.base import InMemoryDataset
from clead.errors import UserError
from clead.methods.clead import CLead
from clead.training import loop

TINY = shlex.split("""--model.width 4 --model.features 8 --data.limit_train 80 --data.batch_size 16 --attack.steps 1
--train.validate_every 1 --train.validate_steps 1 --train.device cpu --optim.lr 0.01 --optim.clip_norm null
--data.labelled 0.3""")


def config(recipe, *overrides, epochs="2"):
    return load_recipe(recipe, [*TINY, "--train.epochs", epochs, *overrides])


def stored(path):
    return load_weights(path / "last.safetensors")[0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


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
    assert same(stored(tmp_path / "rst"), stored(tmp_path / "hand"))
    clead.train(config("digits-trades", "--data.labelled", "1"), out=tmp_path / "truth", show=False)
    assert not same(stored(tmp_path / "rst"), stored(tmp_path / "truth"))
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
    assert same(stored(tmp_path / "a"), stored(tmp_path / "b"))
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
    count, step = 0, loop._forward_backward

    def stop(*arguments):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_forward_backward", stop)
        student(source, tmp_path / "stopped", "--train.checkpoint_seconds", "0")
    shutil.rmtree(source)
    student(source, tmp_path / "stopped", "--train.checkpoint_seconds", "0", resume=True)
    assert same(stored(tmp_path / "straight"), stored(tmp_path / "stopped"))
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
