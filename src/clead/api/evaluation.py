"""Evaluate a model, a run, or somebody else's model with the images of a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clead.api.batches import images_and_labels
from clead.attacks.runner import check_inputs, logits_of
from clead.config import Eval, RunConfig
from clead.config.schema import TASK_SUITES
from clead.errors import UserError, did_you_mean
from clead.evaluation.correctness import to_float
from clead.evaluation.plan import EvaluationOptions
from clead.evaluation.processes import Shard, folders, rank
from clead.evaluation.recording import Evaluation
from clead.evaluation.saving import OutputOptions, evaluate_into_folder
from clead.evaluation.state import discard
from clead.evaluation.suites import NamedAttack
from clead.evaluation.tasks import evaluate_task
from clead.evaluation.transfer import stored_test, transfer, transferred
from clead.interfaces import ImageSet, Splits
from clead.models.external import prepare
from clead.models.model_input import ModelInput
from clead.models.one_label import OneLabel
from clead.models.seeding import fork_rng
from clead.models.split import wrapped
from clead.models.threshold import judged
from clead.results.record import Record
from clead.results.target import EvaluationTarget
from clead.runs.directory import RunDir
from clead.runs.external import open_external_model, with_input
from clead.runs.gallery import with_gallery
from clead.runs.loading import OpenedModel, OpenedRun, load, open_run, results_folder
from clead.settings import validated
from clead.tasks import TASKS, Task, task_name
from clead.tasks.classification import CLASSIFICATION
from clead.tasks.multilabel import MultiLabel
from clead.tasks.retrieval import Retrieval
from clead.tasks.segmentation import SEGMENTATION
from clead.threats import THREATS


def evaluate(
    model: nn.Module,
    images: Any,
    labels: Any = None,
    *,
    suite: str | None = None,
    norm: str = "linf",
    eps: float | str = "8/255",
    task: str | Task = "classification",
    seed: int = 0,
    classes: Sequence[str] | None = None,
    name: str = "model",
    output: str | int | None = None,
    input: ModelInput | str | None = None,
    state: str | Path | None = None,
    show: bool = False,
    **settings: Any,
) -> Record:
    """Attack any classifier on the images and return the record: clean, each attack of the suite, worst case per image.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K), or, of task retrieval, embeddings (B, d); left bit-identical.
        images: (N, C, H, W) float in [0, 1], or uint8; or, without ``labels``, batches of both, such as a DataLoader.
        labels: (N,) integers in [0, K).
        suite: standard (AutoAttack), plus, rand, quick, adaptive, black_box or pgd; of masks sea or sea-quick. None: the first.
        norm: linf, l2 or l1 (l0 with suite pgd).
        eps: radius in pixel units of [0, 1]; text such as ``"8/255"`` is kept in the record.
        task: what is right: a name of ``clead list``, or the settings of a task, such as ``Binary(threshold=0.3)``.
        seed: of the attacks' randomness.
        classes: K names.
        name: the model's name in the record.
        output: name or index of the logits, if the model returns more than that and they are not recognised.
        input: how it wants its pixels, such as ``"layout=nhwc range=0..255"``, see ``ModelInput``; None: (B, C, H, W) in [0, 1].
        state: a directory; an evaluation that was stopped goes on from there, and removes it in the end.
        show: show progress on stderr.
        **settings: other keys of the ``eval`` group, such as ``batch_size=256``, ``steps=20``, ``check_images=0``.

    Returns:
        The record, with ``clean_accuracy``, ``robust_accuracy`` and ``robust``, one flag per image. Raises UserError on pixels
        outside [0, 1], NaN, wrong labels, or an eps of the wrong scale.

    >>> import torch
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> record = evaluate(net, torch.rand(8, 1, 2, 2), torch.zeros(8, dtype=torch.long), suite="quick", eps=0.1)
    >>> record.robust_accuracy <= record.clean_accuracy
    True
    """
    threat = validated(THREATS.get(norm), {"eps": eps})
    judge: Task = TASKS.get(task)() if isinstance(task, str) else task
    suite = suite or TASK_SUITES.get(task_name(judge), ("standard",))[0]
    options = validated(Eval, {"suite": suite, "seed": seed, **settings})
    chosen = _checked_images(images, labels, options.images, judge)
    first, kind, notes = to_float(chosen.images[:2]), type(model).__name__, []
    with fork_rng(options.seed):
        if input is None and judge != SEGMENTATION:
            model = wrapped(model, output)
        else:
            c, h, w = first.shape[1:]
            given = None if input is None else ModelInput.parse(input)
            model, notes = with_input(model, given, (c, h, w), output=output)
        prepare(model, first)
    if classes is None and isinstance(judge, Retrieval):
        classes = ()  # those of the gallery
    elif classes is None:
        first = first[:1].to(next(model.parameters(), first).device)
        classes = [str(k) for k in range(logits_of(model, first).shape[1])]
    target = EvaluationTarget(name, kind, "given", "given", options.split, "given", tuple(classes), task=judge)
    folder = None if state is None else Path(state)
    evaluation = evaluate_task(
        model, chosen, threat, options, target, options=EvaluationOptions(state=folder, show=show)
    )
    assert evaluation is not None
    if folder is not None and rank() == 0:
        for done in folders(folder):
            discard(done)
    return evaluation.record.model_copy(update={"notes": [*evaluation.record.notes, *notes]})


def _checked_images(images: Any, labels: Any, limit: int | None, task: Task) -> ImageSet:
    """Return the first ``limit`` images and their labels, on the CPU; raises UserError if they are not valid."""
    images, labels = images_and_labels(images, labels, task=task)
    if images.is_floating_point():
        check_inputs(images, labels, task=task)
        images = images.float()
    else:
        check_inputs(images[:1] / 255, labels[:1], task=task)
    if len(images) != len(labels):
        raise UserError(
            f"there must be one label per image, got {len(images)} images and {len(labels)} labels; "
            "give labels of shape (N,), in the order of the images"
        )
    return ImageSet(images.cpu()[:limit], labels.cpu()[:limit])


def evaluate_run(
    path: str | Path,
    *,
    config: RunConfig | None = None,
    model: nn.Module | None = None,
    data: Splits | None = None,
    out: str | Path | None = None,
    attacks: Sequence[NamedAttack] | None = None,
    target: str | int | None = None,
    transfer_from: Sequence[str | Path] = (),
    result: str = "evaluation",
    fresh: bool = False,
    shard: str | None = None,
    merge: bool = False,
    trust_state: bool = False,
    save_adversarial: str | Path | None = None,
    show: bool = True,
) -> Evaluation:
    """Evaluate a run as its ``eval`` and ``threat`` settings say, and leave the record in ``RUN/results``.

    An evaluation that was stopped goes on where it was when it is called again.

    Args:
        path: a run directory.
        config: the run's configuration with changes (another eps, other data); the run's own if None.
        model: your own module with the architecture that was trained; needed if it was given as an object in Python.
        data: loaded images instead of ``config.data``.
        out: directory of the record and the state, instead of ``RUN/results``.
        attacks: instead of the suite that ``config.eval`` names; each on all images.
        target: name or number of the class that all ``attacks`` aim at; images of that class are left out, and a note says so.
        transfer_from: runs whose adversarial images are tried on this one, after the suite.
        result: file name of the record, without ``.json``.
        fresh: forget what a stopped evaluation has left.
        shard: ``"i/n"``: compute every n-th batch only, from the i-th; raises ShardDone, whose text says how to go on.
        merge: make the record of the shards.
        trust_state: continue a stopped evaluation, or merge shards, of another user or machine.
        save_adversarial: write all adversarial images to this Parquet file.
        show: show progress on stderr.

    Returns:
        The evaluation, with all its images if ``save_adversarial`` is given.
    """
    parsed_shard = Shard.parse(shard) if shard else None
    folder = results_folder(RunDir.open(Path(path)), out)
    output = OutputOptions(folder, result, fresh, parsed_shard, merge, trust_state, save_adversarial, show)
    opened = with_gallery(open_run(path, config, model, data))
    sources = _sources(transfer_from, opened)
    stored = None
    if attacks is None and opened.config.eval.split == "test":
        stored = stored_test(opened.run.path / "stored", opened.splits.fingerprint)
    tried = None
    if stored is not None:
        tried = transferred(
            judged(opened.model, opened.config.task), opened.images, stored, opened.config.threat, opened.device
        )
    if target is not None:
        opened, attacks = _towards(opened, attacks or (), target)
    return evaluate_into_folder(opened, output, attacks=attacks, more=sources, transferred=tried)


def evaluate_external(
    model: str | nn.Module,
    config: RunConfig,
    *,
    weights: str | Path | None = None,
    output: str | int | None = None,
    input: ModelInput | str | None = None,
    classifier: str | None = None,
    args: Mapping[str, Any] | None = None,
    out: str | Path,
    attacks: Sequence[NamedAttack] | None = None,
    transfer_from: Sequence[str | Path] = (),
    result: str = "evaluation",
    fresh: bool = False,
    shard: str | None = None,
    merge: bool = False,
    trust_state: bool = False,
    save_adversarial: str | Path | None = None,
    show: bool = True,
) -> Evaluation:
    """Evaluate a model that this program did not train, and leave the record in ``out``.

    Args:
        model: ``module:factory``, ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME``, a path ending in ``.onnx``, or the module;
            pixels in [0, 1] -> logits.
        config: data, threat and eval settings; ``clead.config.evaluation_config`` makes one.
        weights: for what the factory makes, what ``clead.weights.read_weights`` reads; None: as it is made.
        output: name or index of the logits, if the model returns more than that and they are not recognised.
        input: how it wants its pixels, such as ``"layout=nhwc range=0..255"``, see ``ModelInput``; None: (B, C, H, W) in [0, 1].
        classifier: name of the layer whose input are the features; None: it is found.
        args: arguments of the factory or the library, such as ``{"num_classes": 10}``.
        out: directory of the record and the state.
        attacks: as of ``evaluate_run``, as all that follow.
        transfer_from: runs.
        result: file name.
        fresh: forget what was stopped.
        shard: ``"i/n"``.
        merge: of shards.
        trust_state: of states.
        save_adversarial: Parquet file.
        show: progress.
    """
    parsed_shard = Shard.parse(shard) if shard else None
    output_options = OutputOptions(Path(out), result, fresh, parsed_shard, merge, trust_state, save_adversarial, show)
    opened = with_gallery(
        open_external_model(
            model, config, weights=weights, output=output, input=input, classifier=classifier, args=args
        )
    )
    return evaluate_into_folder(opened, output_options, attacks=attacks, more=_sources(transfer_from, opened))


def _towards(
    opened: OpenedRun, attacks: Sequence[NamedAttack], target: str | int
) -> tuple[OpenedRun, list[NamedAttack]]:
    """Return the run with the images of other classes, and the attacks aimed at the class ``target``; of labels see ``_hiding``."""
    images, classes = opened.images, opened.splits.classes
    if opened.config.task == SEGMENTATION:
        raise UserError(f"--target {target}: attacks on {task_name(opened.config.task)} aim at no class; leave it out")
    number = class_number(target, classes)
    name = classes[number]
    if isinstance(opened.config.task, MultiLabel):
        return _hiding(opened, number), [
            dataclasses.replace(each, name=f"{each.name} hides {name}") for each in attacks
        ]
    other = (images.labels != number).nonzero()[:, 0]
    if not len(other):
        raise UserError(
            f"--target {target}: all {len(images)} images are of that class; aim at another, or give more images"
        )
    aimed = [dataclasses.replace(each, name=f"{each.name} towards {name}", target=number) for each in attacks]
    left_out = f"{len(images) - len(other)} of {len(images)} images are of class {name}, the target, and are left out"
    about = dataclasses.replace(opened.target, total=None)  # they are not the first images of the split any more
    notes = (*opened.notes, left_out)
    return dataclasses.replace(opened, images=images.subset(other), target=about, notes=notes), aimed


def _hiding(opened: OpenedRun, number: int) -> OpenedRun:
    """Return the run as one of two classes, without and with label ``number``, and the images that have it."""
    images, name = opened.images, opened.splits.classes[number]
    rows = (images.labels[:, number] == 1).nonzero()[:, 0]
    if not len(rows):
        raise UserError(
            f"--target {name}: none of the {len(images)} images has that label; name another, or give more images"
        )
    chosen = dataclasses.replace(images.subset(rows), labels=torch.ones(len(rows), dtype=torch.int64))
    about = dataclasses.replace(opened.target, classes=(f"no {name}", name), task=CLASSIFICATION, total=None)
    note = f"the label {name} alone is attacked, to be hidden, on the {len(rows)} of {len(images)} images that have it"
    return dataclasses.replace(
        opened, model=OneLabel(opened.model, number), images=chosen, target=about, notes=(*opened.notes, note)
    )


def class_number(target: str | int, classes: Sequence[str]) -> int:
    """Return the number of a class given by its name or, where no class is called so, its number; raises UserError if unknown."""
    if str(target) in classes and not isinstance(target, int):
        return list(classes).index(str(target))
    if str(target).isdigit() and int(target) < len(classes):
        return int(target)
    raise UserError(
        f"--target {target}: no class of the data; {did_you_mean(str(target), classes)} or a number from 0 to {len(classes) - 1}"
    )


def _sources(paths: Sequence[str | Path], opened: OpenedModel) -> list[NamedAttack]:
    """Return the attacks that take their images from other runs; raises UserError unless these take the images of ``opened``."""
    attacks = []
    for path in paths:
        other = load(path, weights=RunDir.open(Path(path)).config().eval.weights).to(opened.device)
        if other.num_classes != opened.num_classes:
            raise UserError(
                f"--transfer-from {path} has {other.num_classes} classes, the data has {opened.num_classes}; "
                "give a run on the same classes"
            )
        logits_of(other, to_float(opened.images.images[:1].to(opened.device)))
        attacks.append(transfer(Path(path).resolve().name, other))
    return attacks
