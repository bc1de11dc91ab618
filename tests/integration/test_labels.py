"""Few labels and wrong labels: which images keep theirs, what a batch shows of them, and that nothing hidden reaches training."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import clead
from clead.config import load_recipe
from clead.data.label_sampling import corrupt_labels, for_method, hide_labels, stratified
from clead.data.loaders import Loader, ViewSettings
from clead.data.views import Augmentation
from clead.errors import UserError
from clead.interfaces import ImageSet
from clead.methods.clead import CLead
from clead.runs.directory import RunDir
from clead.runs.resume import Checkpoints
from clead.training.signals import Interrupted
from clead.training.step import Step
from support import same, saved_weights

TINY = shlex.split("""--model.width 4 --model.features 8 --data.limit_train 80 --data.batch_size 16 --attack.steps 1
--train.validate_every 1 --train.validate_steps 1 --train.device cpu --optim.lr 0.002 --optim.clip_norm null""")


def image_set(labels, **keys):
    """Every image is constant, its value is its number."""
    labels = torch.as_tensor(labels)
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    return ImageSet(images, labels, **keys)


def numbers(batch):
    return (batch.images[:, 0, 0, 0] * 255).round().long().tolist()


def flagged(count, labelled):
    """``count`` images of 3 classes, the first ``labelled`` with a label."""
    return image_set(torch.arange(count) % 3, labelled=torch.arange(count) < labelled)


def tiny(*overrides, recipe="digits-standard"):
    length = [] if "--train.budget" in overrides else ["--train.epochs", "2"]
    return load_recipe(recipe, [*TINY, *length, *overrides])


def fit(out, *overrides, recipe="digits-standard", **keys):
    return clead.train(tiny(*overrides, recipe=recipe), out=out, show=False, **keys)


def log(path):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in RunDir(path).history()]


# ----------------------------------------------------------------------------------------------------- which images


@pytest.mark.parametrize("fraction", [0.004, 0.02, 0.1, 0.5, 0.97])
def test_labels_are_kept_by_class_in_proportion_and_one_of_each_at_least(fraction):
    sizes = {0: 700, 1: 200, 2: 90, 3: 10}
    labels = torch.cat([torch.full((size,), k) for k, size in sizes.items()])
    chosen = hide_labels(image_set(labels), fraction, 0.0, 4, seed=3)
    counts = {k: int(chosen.labelled[labels == k].sum()) for k in sizes}
    assert all(count >= 1 for count in counts.values())
    assert all(abs(counts[k] - fraction * size) < 1 or counts[k] == 1 for k, size in sizes.items())
    assert chosen.labelled.sum() == max(round(fraction * 1000), 4)
    assert torch.equal(chosen.labels, labels) and len(chosen) == 1000, "nothing else is changed"


def test_the_choice_follows_the_seed_and_is_not_that_of_validation_images():
    labels = torch.arange(300) % 3
    masks = [hide_labels(image_set(labels), 0.1, 0.0, 3, seed=s).labelled for s in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert masks[0].nonzero()[:, 0].tolist() != stratified(labels, 30, 0)[0].tolist()
    all_of_them = hide_labels(image_set(labels), 1.0, 0.0, 3, seed=0)
    assert all_of_them.labelled is None and torch.equal(all_of_them.visible_labels, labels)
    assert hide_labels(image_set(torch.arange(3)), 0.5, 0.0, 3, seed=0).labelled is None, "one of each is all"


def test_exactly_the_share_of_labels_is_wrong_and_drawn_evenly():
    labels = torch.arange(4000) % 4
    for fraction in (0.0, 0.2503, 0.999):
        wrong = corrupt_labels(labels, fraction, 4, seed=5)
        assert (wrong != labels).sum() == round(fraction * 4000)
        assert wrong.min() >= 0 and wrong.max() <= 3
    away = Counter(((corrupt_labels(labels, 0.9, 4, seed=1) - labels) % 4).tolist())
    # Of 3600 each of three classes gets 1200, standard deviation 28.
    assert away[0] == 400 and all(abs(away[k] - 1200) < 120 for k in (1, 2, 3))
    a, b, c = (corrupt_labels(labels, 0.5, 4, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert set(corrupt_labels(torch.zeros(50, dtype=torch.int64), 0.5, 2, seed=0).tolist()) == {0, 1}


def test_noise_is_in_labelled_training_labels_only_and_leaves_the_fingerprint():
    data = tiny("--data.limit_train", "600").data
    clean = data.load(4)
    few = dataclasses.replace(data, labelled=0.25)
    spoilt = dataclasses.replace(few, label_noise=0.4).load(4)
    mask = spoilt.train.labelled
    assert mask is not None and torch.equal(mask, few.load(4).train.labelled), "the noise does not choose the images"
    differs = spoilt.train.labels != clean.train.labels
    assert differs.sum() == round(0.4 * int(mask.sum())) > 0 and not (differs & ~mask).any()
    for part in ("val", "test"):
        a, b = getattr(spoilt, part), getattr(clean, part)
        assert torch.equal(a.labels, b.labels) and torch.equal(a.images, b.images) and a.labelled is None
    assert torch.equal(spoilt.train.images, clean.train.images) and spoilt.fingerprint == clean.fingerprint
    everywhere = dataclasses.replace(data, label_noise=0.4).load(4).train
    assert everywhere.labelled is None and (everywhere.labels != clean.train.labels).sum() == round(0.4 * len(mask))


def test_detectors_are_fitted_on_labelled_images_only(tmp_path):
    fit(tmp_path / "run", "--data.limit_train", "400", "--data.labelled", "0.3", "--train.epochs", "1")
    given = {"detectors": ["nearest_neighbours"], "restarts": 1, "show": False}
    config = tiny("--data.limit_train", "400", "--data.labelled", "0.3", "--eval.images", "20", "--eval.steps", "1")
    found = clead.api.measure(tmp_path / "run", "detect", config=config, **given)
    assert found.result.fitted == round(0.3 * 360)


def test_what_is_known():
    data = dataclasses.replace(flagged(10, 4), labelled_share=0.5)
    assert data.labelled_subset().labels.tolist() == [0, 1, 2, 0] and data.labelled_subset().images[
        :, 0, 0, 0
    ].tolist() == [0, 1, 2, 3]
    assert data.labelled_subset().labelled is None and image_set([1, 2]).labelled_subset().labels.tolist() == [1, 2]
    with_pseudo = dataclasses.replace(data, pseudo_labels=torch.full((10,), 7))
    assert with_pseudo.labelled_subset().labels.tolist() == [0, 1, 2, 0] + [7] * 6


def test_a_subset_keeps_what_is_hidden():
    whole = flagged(10, 4)
    whole = dataclasses.replace(whole, pseudo_labels=torch.arange(10), labelled_share=0.5)
    part = whole.subset(torch.tensor([9, 0, 5]))
    assert part.labelled.tolist() == [False, True, False] and part.pseudo_labels.tolist() == [9, 0, 5]
    assert part.labelled_share == 0.5 and part.visible_labels.tolist() == [9, 0, 5]
    assert flagged(10, 4).subset(torch.tensor([3, 4])).visible_labels.tolist() == [0, -1]
    plain = image_set([1, 2]).subset(torch.tensor([1]))
    assert plain.labelled is None and plain.pseudo_labels is None and plain.visible_labels.tolist() == [2]


# ---------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("share", [None, 0.3])
def test_labels_of_unlabelled_images_are_in_no_batch(share):
    data = dataclasses.replace(flagged(40, 9), labelled_share=share)
    seen = set()
    for epoch in range(3):
        for batch in Loader(data, 8, seed=2).epoch(epoch):
            assert batch.labelled.tolist() == [n < 9 for n in numbers(batch)]
            assert batch.labels.tolist() == [n % 3 if n < 9 else -1 for n in numbers(batch)]
            assert batch.index.tolist() == numbers(batch)
            seen |= set(numbers(batch))
    assert seen == set(range(40)) and data.labels.min() == 0
    with pytest.raises(IndexError, match="out of bounds"):
        F.cross_entropy(torch.zeros(len(batch.labels), 3), batch.labels)


def test_without_few_labels_batches_are_as_they_were():
    one, other = Loader(image_set(torch.arange(30) % 3), 8, seed=1), Loader(flagged(30, 11), 8, seed=1)
    for a, b in zip(one.epoch(2), other.epoch(2), strict=True):
        assert a.labelled is None and torch.equal(a.images, b.images), "a mask alone changes no order"


@pytest.mark.parametrize(
    ("share", "size", "labelled", "of_batch"),
    [(0.5, 10, 12, 5), (0.01, 10, 12, 1), (0.99, 10, 12, 9), (0.5, 10, 2, 5), (0.25, 64, 12, 10), (0.5, 2, 39, 1)],
)
def test_a_share_of_every_batch_is_labelled(share, size, labelled, of_batch):
    data = dataclasses.replace(flagged(40, labelled), labelled_share=share)
    loader = Loader(data, size, seed=7, drop_last=True)
    size = min(size, 40)
    assert loader.steps_per_epoch == max(1, (40 - labelled) // (size - of_batch))
    drawn: dict[bool, list[int]] = {True: [], False: []}
    for epoch in range(4):
        for batch in loader.epoch(epoch):
            assert len(batch.labels) == size and batch.labelled.sum() == of_batch
            for number in numbers(batch):
                drawn[number < labelled].append(number)
    for kind, pool in ((True, range(labelled)), (False, range(labelled, 40))):
        # All of a kind, in a new random order, before one comes again.
        turns = [drawn[kind][at : at + len(pool)] for at in range(0, len(drawn[kind]), len(pool))]
        whole = [turn for turn in turns if len(turn) == len(pool)]
        assert all(sorted(turn) == list(pool) for turn in whole)
        assert len(pool) < 6 or len({tuple(turn) for turn in whole}) == len(whole)
        assert len(set(turns[-1])) == len(turns[-1])


def test_every_part_of_a_batch_gets_its_share_of_labelled_images():
    """A part without a label would halve the weight of the cross-entropy where gradients are averaged over two parts."""
    data = dataclasses.replace(flagged(40, 9), labelled_share=0.5)
    whole = Loader(data, 16, seed=7, drop_last=True).batch(0, 0)
    batch = Loader(data, 16, seed=7, drop_last=True, microbatches=4).batch(0, 0)
    assert [int(part.sum()) for part in batch.labelled.chunk(4)] == [2, 2, 2, 2]
    assert sorted(numbers(batch)) == sorted(numbers(whole)), "the same images, in another order"
    third = Loader(dataclasses.replace(data, labelled_share=0.3), 16, seed=7, drop_last=True, microbatches=4).batch(
        0, 0
    )
    assert sorted(int(part.sum()) for part in third.labelled.chunk(4)) == [1, 1, 1, 2]


@pytest.mark.parametrize("share", [None, 0.4, 1.0])
def test_batches_do_not_depend_on_history(share):
    data = dataclasses.replace(flagged(50, 7), labelled_share=share)
    make = lambda seed: Loader(data, 6, seed=seed, views=ViewSettings(Augmentation(crop=1)), drop_last=True)  # noqa: E731
    straight = make(3)
    run = [batch for epoch in range(5) for batch in straight.epoch(epoch)]
    resumed = [*make(3).epoch(3, start=2), *make(3).epoch(4)]
    assert len(resumed) > 3
    for a, b in zip(run[-len(resumed) :], resumed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if x is not None)
    again = make(3).batch(0, 0)  # out of order too
    make(3).batch(4, 1)
    assert torch.equal(run[0].images, again.images) and not torch.equal(make(4).batch(0, 0).index, again.index)


def test_a_method_without_use_for_the_others_draws_labelled_images_only():
    data = for_method(flagged(40, 9), uses_unlabelled=False)
    loader = Loader(data, 8, seed=1, drop_last=True)
    assert loader.steps_per_epoch == 5, "an epoch is as long as with all labels"
    counts = Counter(n for epoch in range(9) for batch in loader.epoch(epoch) for n in numbers(batch))
    assert counts == dict.fromkeys(range(9), 40), "9 epochs of 40 images are 40 passes over 9"
    assert all(b.labelled is None and b.labels.min() >= 0 for b in loader.epoch(0)), "for it all images have a label"
    assert for_method(flagged(40, 9), uses_unlabelled=True).labelled_share is None
    assert for_method(image_set([0, 1]), uses_unlabelled=False).labelled_share is None
    with_pseudo = dataclasses.replace(flagged(40, 9), pseudo_labels=torch.full((40,), 2))
    batches = list(Loader(for_method(with_pseudo, uses_unlabelled=False), 8, seed=1).epoch(0))
    assert sorted(n for batch in batches for n in numbers(batch)) == list(range(40))
    assert all(b.labels.tolist() == [n % 3 if n < 9 else 2 for n in numbers(b)] for b in batches)
    assert all(batch.labelled is None for batch in batches)


def test_pseudo_labelled_images_can_have_a_share_too():
    data = dataclasses.replace(flagged(40, 8), pseudo_labels=torch.full((40,), 2), labelled_share=0.5)
    for batch in Loader(for_method(data, uses_unlabelled=False), 8, seed=1).epoch(0):
        assert sum(n < 8 for n in numbers(batch)) == 4 and batch.labelled is None and batch.labels.min() >= 0


def test_labelled_images_alone_can_be_mixed():
    batch = Loader(for_method(flagged(9, 3), False), 4, views=ViewSettings(cutmix=1.0, num_classes=3)).batch(0, 0)
    assert batch.soft_labels.shape == (4, 3)


# --------------------------------------------------------------------------------------------------------- training


def hidden_changed(splits):
    """The same images with other labels where they are hidden."""
    train = splits.train
    other = torch.where(train.labelled, train.labels, (train.labels + 1) % 10)
    assert (other != train.labels).sum() > len(train) / 2
    return dataclasses.replace(splits, train=dataclasses.replace(train, labels=other))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["digits-standard", "digits-pgd-at", "digits-trades", "digits-clead"])
def test_nothing_learns_from_a_hidden_label(recipe, tmp_path):
    config = tiny("--data.labelled", "0.2", recipe=recipe)
    splits = config.data.load(0)
    runs = [tmp_path / "a", tmp_path / "b"]
    for path, data in zip(runs, (splits, hidden_changed(splits)), strict=True):
        clead.train(config, data=data, out=path, show=False)
    assert same(*map(saved_weights, runs)) and log(runs[0]) == log(runs[1])
    seen = dataclasses.replace(splits, train=dataclasses.replace(splits.train, labels=(splits.train.labels + 1) % 10))
    clead.train(config, data=seen, out=tmp_path / "c", show=False)
    assert not same(saved_weights(runs[0]), saved_weights(tmp_path / "c")), "labels that are not hidden matter"


def watched(monkeypatch):
    """Return a list that fills with what each step's method was given."""
    given = []
    views = CLead.views

    def watch(self, model, batch, step):
        given.append(batch)
        return views(self, model, batch, step)

    monkeypatch.setattr(CLead, "views", watch)
    return given


@pytest.mark.slow
def test_baselines_see_labelled_images_only_at_the_same_cost(tmp_path, monkeypatch):
    given = watched(monkeypatch)
    outcomes = {}
    for name, recipe, labelled in (
        ("few", "digits-pgd-at", "0.2"),
        ("all", "digits-pgd-at", "1"),
        ("semi", "digits-clead", "0.2"),
    ):
        given.clear()
        out = fit(tmp_path / name, "--train.budget", "20", "--data.labelled", labelled, recipe=recipe)
        outcomes[name] = out.outcome
        train = tiny("--data.labelled", labelled).data.load(0).train
        used = {n for batch in given for n in batch.index.tolist()}
        if name == "few":
            assert used == set(train.labelled.nonzero()[:, 0].tolist()) and len(used) < len(train)
            assert all(batch.labelled is None for batch in given)
            assert all(torch.equal(batch.labels, train.labels[batch.index]) for batch in given)
        else:
            assert len(used) > 0.9 * len(train)
        if name == "semi":
            for batch in given:
                assert torch.equal(batch.labelled, train.labelled[batch.index])
                assert (batch.labels == -1).equal(~batch.labelled)
    few, every, semi_run = outcomes["few"], outcomes["all"], outcomes["semi"]
    assert (few.steps, few.forward_equivalents, few.epochs) == (every.steps, every.forward_equivalents, every.epochs)
    # Whole steps: the budget is met up to half a step of either.
    step = max(o.forward_equivalents / o.steps for o in outcomes.values())
    assert abs(semi_run.forward_equivalents - few.forward_equivalents) <= step


@pytest.mark.slow
@pytest.mark.parametrize("share", ["null", "0.5"])
def test_resume_is_exact(share, tmp_path):
    options = ["--data.labelled", "0.2", "--data.labelled_share", share, "--data.label_noise", "0.3"]
    options += ["--train.checkpoint_seconds", "0"]
    fit(tmp_path / "straight", *options, recipe="digits-clead")
    whole = saved_weights(tmp_path / "straight")
    steps = RunDir(tmp_path / "straight").history()[-1]["step"]
    count, step = 0, Step.forward_backward

    def stop(*arguments):
        nonlocal count
        count += 1
        if count == steps // 2 + 1:  # one more than those that the cost is measured with
            raise KeyboardInterrupt
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises((KeyboardInterrupt, Interrupted)):
        patch.setattr(Step, "forward_backward", stop)
        fit(tmp_path / "stopped", *options, recipe="digits-clead")
    assert Checkpoints(tmp_path / "stopped").exist()
    fit(tmp_path / "stopped", *options, recipe="digits-clead", resume=True)
    assert same(whole, saved_weights(tmp_path / "stopped"))
    other = [*options[:-3], "0.1", *options[-2:]]
    with pytest.raises(UserError, match=r"data.label_noise: the run has 0.3, got 0.1"):
        fit(tmp_path / "stopped", *other, recipe="digits-clead", resume=True)


@pytest.mark.slow
def test_every_option_changes_the_result(tmp_path):
    few = ("--data.labelled", "0.2")
    variants = {
        "all": (),
        "few": few,
        "fewer": ("--data.labelled", "0.15"),
        "noise": ("--data.label_noise", "0.3"),
        "share": (*few, "--data.labelled_share", "0.5"),
        "less": (*few, "--data.labelled_share", "0.2"),
    }
    for name, options in variants.items():
        fit(tmp_path / name, *options, "--train.epochs", "1", recipe="digits-clead")
    weights = [
        torch.cat([w.flatten().float() for w in saved_weights(tmp_path / name).values()]).numpy() for name in variants
    ]
    assert len(np.unique(np.stack(weights), axis=0)) == len(variants)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.labelled", "0"], "data.labelled: input should be greater than 0, got 0"),
        (["--data.labelled", "1.5"], "data.labelled: input should be less than or equal to 1, got 1.5"),
        (
            ["--data.labelled_share", "1", "--data.labelled", "0.1"],
            "data.labelled_share: input should be less than 1, got 1",
        ),
        (["--data.label_noise", "1"], "data.label_noise: input should be less than 1, got 1"),
        (
            ["--data.labelled_share", "0.5"],
            "data.labelled_share: changes nothing while every image has a label, got 0.5; set data.labelled below 1",
        ),
        (
            ["--data.pseudo_labels_from", "runs/a"],
            "data.pseudo_labels_from: changes nothing while every image has a label, got runs/a; set data.labelled below 1, "
            "or data.extra",
        ),
        (
            ["--data.labelled", "0.1", "--data.labelled_share", "0.5", "--data.batch_size", "1"],
            "data.batch_size: labelled_share needs one labelled and one unlabelled image at least, got 1; raise it",
        ),
        (
            ["--method.name", "clead", "--data.labelled", "0.1", "--data.cutmix", "1"],
            "data.cutmix: mixes labels, which images without one have not, got 1; set it to 0, or data.labelled 1",
        ),
        (
            shlex.split("--method.name clead --method.contrastive_level features --train.trainable classifier"),
            "train.trainable: a contrastive loss trains encoder and projection head, which are frozen then, got classifier; "
            "set it to all, or take a method without that term (method.name standard)",
        ),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(UserError) as error:
        tiny(*options)
    assert message in error.value.problems
    assert tiny("--data.labelled", "0.1", "--data.cutmix", "1").data.cutmix == 1, "of labelled images only"
