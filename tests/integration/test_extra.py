"""Auxiliary images: read with or without labels, never equal to a held-out image, a share of every batch, exact on resume."""

import dataclasses
import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import clead
from clead.api.training import PSEUDO_LABELS
from clead.config import load_recipe
from clead.data.duplicates import equal_or_near
from clead.data.extra import with_extra
from clead.data.loaders import Loader
from clead.errors import UserError
from clead.runs.directory import RunDir
from clead.weights.files import load_weights
from support import Killed, same, saved_weights

TINY = shlex.split("""--model.width 4 --model.features 8 --data.limit_train 80 --data.batch_size 16 --attack.steps 1
--train.validate_every 1 --train.validate_steps 1 --train.device cpu --optim.lr 0.01 --optim.clip_norm null --eval.suite quick
--eval.images 20 --eval.steps 2""")


def config(*overrides, recipe="digits-trades", epochs="1"):
    return load_recipe(recipe, [*TINY, "--train.epochs", epochs, *map(str, overrides)])


def image(seed, side=8):
    return np.random.default_rng(seed).integers(0, 256, (side, side)).astype(np.uint8)


def predicted(run, images):
    with torch.no_grad():
        return clead.load(run, weights=RunDir(run).config().eval.weights)(images.float() / 255).argmax(1)


@pytest.fixture
def flat(tmp_path):
    """30 images without labels in a folder and one below it."""
    folder = tmp_path / "flat"
    (folder / "more").mkdir(parents=True)
    for i in range(30):
        Image.fromarray(image(i, 8 + i % 3)).save(folder / ("more" if i % 2 else "") / f"{i}.png")
    return folder


def arrays(path, names=None, labels=None, seed=100, count=40):
    images = np.stack([image(seed + i) for i in range(count)])
    labels = np.arange(count) % 10 if labels is None else labels
    np.savez(
        path,
        x_train=images,
        y_train=labels,
        x_test=images[:2],
        y_test=labels[:2],
        **({"classes": names} if names else {}),
    )
    return path


def loaded(*overrides, **keys):
    chosen = config(*overrides, **keys)
    return with_extra(chosen.data, chosen.data.load(0))


def test_a_folder_without_classes_has_no_labels(flat):
    splits, note = loaded("--data.extra", flat, "--data.image_size", "8")
    extra = splits.train.extra
    assert (
        len(extra) == 30
        and extra.images.shape == (30, 1, 8, 8)
        and not extra.labelled.any()
        and (extra.labels == -1).all()
    )
    assert note == f"30 auxiliary images of {flat} are 50% of each training batch (without labels)"
    assert len(splits.train) == len(config().data.load(0).train), "they are not counted"
    assert splits.fingerprint == config().data.load(0).fingerprint != splits.trained_on


def test_a_stray_image_does_not_hide_the_class_folders(tmp_path):
    for k in range(10):
        (tmp_path / "more" / str(k)).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(image(10 * k + i)).save(tmp_path / "more" / str(k) / f"{i}.png")
    Image.fromarray(image(7)).save(tmp_path / "more/preview.png")
    splits, note = loaded("--data.extra", tmp_path / "more")
    assert splits.train.extra.labels.bincount().tolist() == [2] * 10
    assert "with their own labels" in note and "1 files there are not read" in note


def test_labels_are_those_of_the_classes_of_the_data(tmp_path):
    splits, note = loaded("--data.extra", arrays(tmp_path / "a.npz"), "--data.extra_share", "0.7")
    assert splits.train.extra.labels.tolist() == [k % 10 for k in range(40)] and splits.train.extra.labelled is None
    assert "are 70% of each training batch (with their own labels)" in note
    # By name, in another order: here class 0 of the file is called 9.
    names = [str(k) for k in reversed(range(10))]
    splits, _ = loaded("--data.extra", arrays(tmp_path / "b.npz", names))
    assert splits.train.extra.labels.tolist() == [9 - k % 10 for k in range(40)]
    with pytest.raises(UserError, match=r"may have the classes of the data \('0', '1', '2', …\), got 'cat'.*RUN"):
        loaded("--data.extra", arrays(tmp_path / "c.npz", [*names[:9], "cat"]))
    splits, note = loaded("--data.extra", tmp_path / "c.npz", "--data.pseudo_labels_from", "runs/teacher")
    assert not splits.train.extra.labelled.any() and "labelled by runs/teacher" in note


def test_held_out_images_are_left_out(tmp_path):
    own = config().data.load(0)
    digits = (load_digits().images * 15.9).astype(np.uint8)
    held = torch.cat([own.val.images[:3], own.test.images[:5]])[:, 0].numpy()
    nearly = (own.test.images[5:9, 0].numpy().astype(int) + np.random.default_rng(0).integers(0, 3, (4, 8, 8))).clip(
        0, 255
    )
    training = own.train.images[:6, 0].numpy()
    fresh = np.stack([image(500 + i) for i in range(20)])
    images = np.concatenate([fresh, held, nearly.astype(np.uint8), training])
    np.savez(
        tmp_path / "x.npz",
        x_train=images,
        y_train=np.zeros(len(images), int) + np.arange(len(images)) % 10,
        x_test=digits[:1],
        y_test=[0],
    )
    splits, note = loaded("--data.extra", tmp_path / "x.npz")
    assert np.array_equal(splits.train.extra.images[:, 0].numpy(), np.concatenate([fresh, training]))
    assert (
        "8 that equal and 4 that nearly equal validation or test images are left out; 6 equal training images" in note
    )
    np.savez(tmp_path / "y.npz", x_train=held, y_train=np.arange(8), x_test=digits[:1], y_test=[0])
    with pytest.raises(UserError, match="all 8 images of .* equal validation or test images"):
        loaded("--data.extra", tmp_path / "y.npz")


def test_near_is_what_a_slow_oracle_says():
    random = np.random.default_rng(3)
    images = random.integers(0, 256, (40, 3, 16, 16)).astype(np.uint8)
    others = images[:20].astype(int) + random.normal(0, np.linspace(0.6, 20, 20)[:, None, None, None], (20, 3, 16, 16))
    others = others.clip(0, 255).astype(np.uint8)
    equal, near = equal_or_near(torch.from_numpy(images), torch.from_numpy(others))

    def thumb(array):
        grey = np.asarray(Image.fromarray(array.transpose(1, 2, 0)).convert("L"), float)
        return (grey - grey.mean()) / grey.std()

    distance = np.array([[np.sqrt(((thumb(a) - thumb(b)) ** 2).mean()) for b in others] for a in images])
    assert np.array_equal((equal | near).numpy(), distance.min(1) < 0.12) and 3 < near.sum() < 20
    flat = torch.full((2, 3, 16, 16), 7, dtype=torch.uint8)
    assert not equal_or_near(flat, torch.from_numpy(others))[1].any()


def test_images_of_another_shape_are_brought_to_it_or_refused(tmp_path, flat):
    with pytest.raises(UserError, match="data.extra must exist"):
        loaded("--data.extra", tmp_path / "nowhere")
    (flat / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="broken.png"):
        loaded("--data.extra", flat)
    splits, note = loaded("--data.extra", flat, "--data.skip_unreadable", "true")
    assert splits.train.extra.images.shape == (30, 1, 8, 8) and "1 cannot be read and are left out" in note


def test_a_training_draws_them_and_its_record_says_so(tmp_path):
    extra = arrays(tmp_path / "a.npz")
    options = ["--data.extra", extra, "--data.extra_share", "0.25"]
    run = clead.train(config(*options, epochs="2"), out=tmp_path / "run", show=False)
    splits, note = loaded(*options)
    steps = len(splits.train) // 12
    assert run.outcome.steps == 2 * steps, "an epoch is a pass over the data's own images, 12 of 16 in each batch"
    assert run.outcome.epochs == 2
    clead.train(config(epochs="2"), out=tmp_path / "plain", show=False)
    assert not same(saved_weights(tmp_path / "run"), saved_weights(tmp_path / "plain"))
    record = clead.evaluate_run(tmp_path / "run", show=False).record
    assert note in record.notes and "40 auxiliary images" in note
    assert record.data.fingerprint == clead.evaluate_run(tmp_path / "plain", show=False).record.data.fingerprint
    means = [
        sum(getattr(each, key) for each in record.per_class) / len(record.per_class)
        for key in ("clean_accuracy", "robust_accuracy")
    ]
    assert [record.balanced.clean.accuracy, record.balanced.robust.accuracy] == pytest.approx(means)
    # The images decide: a shuffled share of another file gives other weights, and equal ones the same.
    again = clead.train(config(*options, epochs="2"), out=tmp_path / "again", show=False)
    assert same(saved_weights(tmp_path / "run"), saved_weights(again.path))


def stopped(chosen, out, monkeypatch, at):
    """Train until a kill at the ``at``-th batch."""
    original, calls = Loader.batch, []

    def batch(self, *args):
        calls.append(1)
        if len(calls) > at:
            raise Killed
        return original(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Loader, "batch", batch)
        clead.train(chosen, out=out, show=False)


def test_resume_is_exact_and_needs_the_same_images(tmp_path, monkeypatch):
    extra = arrays(tmp_path / "a.npz")
    chosen = config("--data.extra", extra, "--data.sampling", "balanced", "--train.checkpoint_seconds", "0", epochs="2")
    clead.train(chosen, out=tmp_path / "whole", show=False)
    stopped(chosen, tmp_path / "stopped", monkeypatch, 6)
    shutil.copytree(tmp_path / "stopped", tmp_path / "other")
    clead.train(chosen, out=tmp_path / "stopped", resume=True, show=False)
    assert same(saved_weights(tmp_path / "whole"), saved_weights(tmp_path / "stopped"))
    arrays(extra, seed=900)
    with pytest.raises(UserError, match="continues on the same images"):
        clead.train(chosen, out=tmp_path / "other", resume=True, show=False)


def test_a_model_labels_what_has_no_label(tmp_path, flat, capsys):
    teacher = clead.train(config(recipe="digits-standard", epochs="8"), out=tmp_path / "teacher", show=False)
    options = ["--data.extra", flat, "--data.pseudo_labels_from", teacher.path]
    clead.train(config(*options), out=tmp_path / "student")
    tensors, about = load_weights(tmp_path / "student" / PSEUDO_LABELS)
    splits, _ = loaded(*options)
    expected = predicted(teacher.path, splits.train.extra.images)
    assert torch.equal(tensors["extra"], expected) and set(tensors) == {"extra"} and about["extra"] == 30
    assert f"30 auxiliary images have labels by {teacher.path}" in capsys.readouterr().err
    # As if the images had come with these labels.
    own = config().data.load(0)
    train = dataclasses.replace(
        own.train, extra=dataclasses.replace(splits.train.extra, labels=expected, labelled=None)
    )
    by_hand = dataclasses.replace(own, train=train)
    clead.train(config(), data=by_hand, out=tmp_path / "hand", show=False)
    assert same(saved_weights(tmp_path / "student"), saved_weights(tmp_path / "hand"))


def test_a_stage_labels_them_for_the_next(tmp_path, flat):
    stages = [
        {"name": "teacher", "method": {"name": "standard"}},
        {"name": "student", "method": {"name": "trades"}, "data": {"pseudo_labels_from": "teacher"}},
    ]
    tree = {**config("--data.extra", flat).to_dict(), "stages": stages}
    chosen = clead.RunConfig.from_dict(tree)
    run = clead.train(chosen, out=tmp_path / "run", show=False)
    folder = run.path / "stages/2-student"
    tensors, about = load_weights(folder / PSEUDO_LABELS)
    assert len(tensors["extra"]) == 30 and about["from"] == "teacher" and "labels" not in tensors
    assert not (run.path / "stages/1-teacher" / PSEUDO_LABELS).exists()
    # The teacher has seen the data's own images only, and each of its batches is full of them.
    clead.train(config("--method.name", "standard"), out=tmp_path / "alone", show=False)
    assert same(saved_weights(tmp_path / "alone"), saved_weights(run.path / "stages/1-teacher"))


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("digits-trades", [], "data.extra: method trades has no use for images without a label, got "),
        (
            "digits-clead",
            ["--data.cutmix", "1"],
            "data.cutmix: mixes labels, which the images of data.extra have not, got 1",
        ),
    ],
)
def test_images_that_nothing_can_use_are_refused(recipe, options, message, flat, tmp_path):
    with pytest.raises(UserError) as error:
        clead.train(config("--data.extra", flat, *options, recipe=recipe), out=tmp_path / "run", show=False)
    assert str(error.value).startswith(message) and "--data.pseudo_labels_from RUN" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_contrast_uses_images_without_labels(flat, tmp_path):
    run = clead.train(config("--data.extra", flat, recipe="digits-clead"), out=tmp_path / "run", show=False)
    assert run.outcome.steps == 70 // 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--data.extra_share", "0.7"],
            "data.extra_share: changes nothing without auxiliary images, got 0.7; add --data.extra FOLDER",
        ),
        (
            ["--data.extra", "more", "--data.batch_size", "1"],
            "data.batch_size: extra needs one auxiliary and one other image at least, got 1; raise it",
        ),
        (
            ["--data.sampling", "balanced", "--data.labelled", "0.1"],
            "data.sampling: images without a label have no class to balance, got balanced and labelled 0.1; add "
            "--data.labelled_share 0.5",
        ),
        (
            ["--method.name", "clead_published", "--data.extra", "more"],
            "data.extra: auxiliary images have no stored adversarial images, got more; leave it out, or take another method "
            "(method.name clead)",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(options, message):
    with pytest.raises(UserError) as error:
        config(*options)
    assert message in error.value.problems


def test_labels_of_their_own_leave_nothing_to_a_model(tmp_path):
    with pytest.raises(UserError, match="every image has a label, those of data.extra too, got runs/a; leave it out"):
        loaded("--data.extra", arrays(tmp_path / "a.npz"), "--data.pseudo_labels_from", "runs/a")


def test_a_teacher_in_another_order_of_classes_gives_the_same_labels(tmp_path, flat):
    digits = load_digits()
    images = (digits.images[:120] * 15.9).astype(np.uint8)
    for name, order in (("a", range(10)), ("b", [3, 1, 4, 0, 5, 9, 2, 6, 8, 7])):
        names = [f"digit {k}" for k in order]
        labels = np.array([list(order).index(k) for k in digits.target[:120]])
        np.savez(
            tmp_path / f"{name}.npz",
            x_train=images[:100],
            y_train=labels[:100],
            x_test=images[100:],
            y_test=labels[100:],
            classes=names,
        )
    options = ["--data.name", "npz", "--data.limit_train", "null", "--data.image_size", "8"]
    teacher = clead.train(
        config(*options, "--data.path", tmp_path / "a.npz", recipe="digits-standard", epochs="3"),
        out=tmp_path / "t",
        show=False,
    )
    student = config(
        *options, "--data.path", tmp_path / "b.npz", "--data.extra", flat, "--data.pseudo_labels_from", teacher.path
    )
    clead.train(student, out=tmp_path / "s", show=False)
    labels = load_weights(tmp_path / "s" / PSEUDO_LABELS)[0]["extra"]
    splits, _ = with_extra(student.data, student.data.load(0))
    said = predicted(teacher.path, splits.train.extra.images)
    assert [splits.classes[k] for k in labels] == [f"digit {k}" for k in said]
