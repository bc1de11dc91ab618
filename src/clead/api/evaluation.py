"""Evaluate a run, somebody else's model, or saved adversarial images."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from clead.api.batches import images_and_labels
from clead.api.external_model import load_external_model
from clead.api.opened import (
    data_name,
    data_notes,
    evaluated_images,
    image_shape,
    load,
    load_model,
    open_run,
    results_folder,
    split_facts,
)
from clead.atomic_io import JSON_LIMIT, check_inside, read_regular, remove_leftovers, write_atomically
from clead.attacks.runner import check_inputs, logits_of
from clead.checkpoint import RunDir, fingerprint
from clead.config import Eval, RunConfig
from clead.data.base import shuffle_if_sorted
from clead.data.classes import align_classes
from clead.devices import device_of
from clead.errors import UserError, did_you_mean
from clead.evaluation import adversarial_dataset
from clead.evaluation.correctness import correct_mask, exact_float32, to_float
from clead.evaluation.evaluator import Evaluation, EvaluationTarget, digest, evaluate_model
from clead.evaluation.processes import Shard, folders, rank, shards
from clead.evaluation.state import discard
from clead.evaluation.suites import NamedAttack
from clead.evaluation.transfer import stored_test, transfer, transferred
from clead.interfaces import ImageSet, Splits
from clead.models.external import prepare
from clead.models.model_input import ModelInput
from clead.models.onnx import is_onnx
from clead.models.seeding import fork_rng
from clead.models.split import weights as model_weights
from clead.models.split import wrapped
from clead.output import tell
from clead.results.record import Record, TransferredPart
from clead.settings import validated
from clead.threats import THREATS


def evaluate(
    model: nn.Module,
    images: Any,
    labels: Any = None,
    *,
    suite: str = "standard",
    norm: str = "linf",
    eps: float | str = "8/255",
    seed: int = 0,
    classes: Sequence[str] | None = None,
    name: str = "model",
    output: str | int | None = None,
    state: str | Path | None = None,
    show: bool = False,
    **settings: Any,
) -> Record:
    """Attack any classifier on the images and return the record: clean, each attack of the suite, worst case per image.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        images: (N, C, H, W) float in [0, 1], or uint8; or, without ``labels``, batches of both, such as a DataLoader.
        labels: (N,) integers in [0, K).
        suite: standard (AutoAttack), plus, rand, quick, adaptive, queries or pgd.
        norm: linf, l2 or l1 (l0 with suite pgd).
        eps: radius in pixel units of [0, 1]; text such as ``"8/255"`` is kept in the record.
        seed: of the attacks' randomness.
        classes: K names.
        name: the model's name in the record.
        output: name or index of the logits, if the model returns more than that and they are not recognised.
        state: a directory; an evaluation that was stopped goes on from there, and removes it in the end.
        show: show progress on stderr.
        **settings: other keys of the ``eval`` group, such as ``batch_size=256``, ``steps=20``, ``check_images=0``.

    Returns:
        The record, with ``clean_accuracy``, ``robust_accuracy`` and ``robust``, one flag per image. Raises UserError on pixels
        outside [0, 1], NaN, wrong labels, or an eps of the wrong scale.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> record = evaluate(net, torch.rand(8, 1, 2, 2), torch.zeros(8, dtype=torch.long), suite="quick", eps=0.1)
    >>> record.robust_accuracy <= record.clean_accuracy
    True
    """
    threat = validated(THREATS.get(norm), {"eps": eps})
    options = validated(Eval, {"suite": suite, "seed": seed, **settings})
    kind = type(model).__name__
    model = wrapped(model, output)
    images, labels = images_and_labels(images, labels)
    if images.is_floating_point():
        check_inputs(images, labels)
        images = images.float()
    else:
        check_inputs(images[:1] / 255, labels[:1])
    if len(images) != len(labels):
        raise UserError(
            f"there must be one label per image, got {len(images)} images and {len(labels)} labels; "
            "give labels of shape (N,), in the order of the images"
        )
    first = to_float(images[:2])
    with fork_rng(options.seed):
        prepare(model, first)
    if classes is None:
        first = first[:1].to(next(model.parameters(), first).device)
        classes = [str(k) for k in range(logits_of(model, first).shape[1])]
    chosen = ImageSet(images.cpu(), labels.cpu())
    if options.images is not None:
        chosen = chosen.subset(torch.arange(min(options.images, len(chosen))))
    target = EvaluationTarget(name, kind, "given", "given", options.split, "given", tuple(classes))
    where = None if state is None else Path(state)
    evaluation = evaluate_model(model, chosen, threat, options, target, state=where, show=show)
    assert evaluation is not None
    if where is not None and rank() == 0:
        for done in folders(where):
            discard(done)
    return evaluation.record


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
    part = Shard.parse(shard) if shard else None
    folder = results_folder(RunDir.open(Path(path)), out)
    opened = open_run(path, config, model, data)
    device = opened.device
    sources = _sources(transfer_from, opened.images, opened.model.num_classes, device)
    stored = None
    if attacks is None and opened.config.eval.split == "test":
        stored = stored_test(opened.run.path / "stored", opened.splits.fingerprint)
    tried = None if stored is None else transferred(opened.model, opened.images, stored, opened.config.threat, device)
    images, notes, about = opened.images, opened.notes, opened.target
    if target is not None:
        images, attacks, left_out = _towards(images, attacks or (), target, opened.splits.classes)
        notes = [*notes, left_out]
        about = dataclasses.replace(about, total=None)  # they are not the first images of the split any more
    return _evaluate_into(
        folder,
        result,
        opened.model,
        images,
        opened.config,
        about,
        part,
        tried=tried,
        notes=notes,
        fresh=fresh,
        save_adversarial=None if save_adversarial is None else Path(save_adversarial),
        attacks=attacks,
        more=[transfer(name, other) for name, other in sources],
        source=sources[0][1] if sources else None,
        merge=merge,
        trust_state=trust_state,
        device=device,
        show=show,
    )


def evaluate_foreign(
    model: str | nn.Module,
    config: RunConfig,
    *,
    weights: str | Path | None = None,
    output: str | int | None = None,
    input: ModelInput | str | None = None,
    classifier: str | None = None,
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
        model: ``module:factory``, a path ending in ``.onnx``, or the module itself; pixels in [0, 1] -> logits.
        config: data, threat and eval settings; ``clead.config.evaluation_config`` makes one.
        weights: for what the factory makes, what ``clead.weights.read_weights`` reads; None: as it is made.
        output: name or index of the logits, if the model returns more than that and they are not recognised.
        input: how it wants its pixels, such as ``"layout=nhwc range=0..255"``, see ``ModelInput``; None: (B, C, H, W) in [0, 1].
        classifier: name of the layer whose input are the features; None: it is found.
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
    part = Shard.parse(shard) if shard else None
    splits = config.data.load(config.train.seed, training=False)
    name = model if isinstance(model, str) else type(model).__name__
    foreign = load_external_model(
        model,
        weights=weights,
        sample_shape=image_shape(splits),
        num_classes=len(splits.classes),
        output=output,
        input=input,
        classifier=classifier,
    )
    order_given = getattr(config.data, "classes", None) is not None
    splits, class_notes = align_classes(splits, foreign.classes, source=name, order_given=order_given)
    splits = dataclasses.replace(splits, notes=(*splits.notes, *class_notes))
    images = shuffle_if_sorted(splits.test if config.eval.split == "test" else splits.val)
    if config.eval.images is not None:
        images = images.subset(torch.arange(min(config.eval.images, len(images))))
    device = device_of(config.train.device)
    sources = _sources(transfer_from, images, len(splits.classes), device)
    if isinstance(model, str) and weights is None and not is_onnx(model):
        foreign.notes.append(f"no --weights given: those that {Path(name).name} makes")
    target = EvaluationTarget(
        name=Path(name).stem if is_onnx(model) else name.rpartition(":")[2],
        model=Path(name).name,
        weights=Path(weights).name if weights else "given",
        data=data_name(config),
        split=config.eval.split,
        data_fingerprint=splits.fingerprint,
        classes=splits.classes,
        **split_facts(splits, config.eval.split),
    )
    if splits.origin == "train" and config.eval.split == "test":
        foreign.notes.append(
            f"{target.name} may have been trained on these images: a figure on training images says nothing of new ones; "
            "put images that it has never seen into test/CLASS"
        )
    return _evaluate_into(
        Path(out),
        result,
        foreign.model.to(device),
        images,
        config,
        target,
        part,
        fresh=fresh,
        save_adversarial=None if save_adversarial is None else Path(save_adversarial),
        notes=[*data_notes(splits), *foreign.notes],
        attacks=attacks,
        more=[transfer(name, other) for name, other in sources],
        source=sources[0][1] if sources else None,
        merge=merge,
        trust_state=trust_state,
        device=device,
        show=show,
    )


def verify(path: str | Path, file: str | Path, *, config: RunConfig | None = None) -> dict[str, Any]:
    """Score the adversarial images of a file, made for this run or for another, and measure them anew.

    Args:
        path: a run directory.
        file: what ``save_adversarial`` wrote.
        config: the run's configuration with changes (the data's path); the run's own if None.

    Returns:
        ``made_for``, the run that was attacked, and whether this is the ``same_model``; ``n``; ``broken``, so many the file
        states; ``wrong``, so many of them this run classifies wrong; ``accuracy`` on all images, and ``accuracy_8_bits`` on the
        same rounded to 8 bits, as a picture file or a camera would hold them; ``largest``
        perturbation, ``eps`` and how many are ``outside``. Raises UserError if the images are not those that the run is
        evaluated on.
    """
    run = RunDir.open(Path(path))
    trained = run.config()
    config = config or trained
    model = load_model(run, config, config.eval.weights, None)
    x_adv, as_bytes, about = adversarial_dataset.load(Path(file))
    changed = dataclasses.replace(config, eval=dataclasses.replace(config.eval, images=len(x_adv)))
    images, _ = evaluated_images(run, changed, trained, None)
    if digest(images) != about["images"]:
        raise UserError(
            f"{file} holds other images than the first {len(x_adv)} of {path}; give the same data (--data.path, --eval.split)"
        )
    threat = validated(THREATS.get(about["threat"]["norm"]), {"eps": about["threat"]["eps_text"]})
    x, labels = to_float(images.images), images.labels
    size = threat.distance(x_adv - x)
    in_box = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)  # False for NaN
    with exact_float32():
        right = torch.cat([correct_mask(model, a, y) for a, y in zip(x_adv.split(256), labels.split(256), strict=True)])
        as_file = torch.cat(
            [correct_mask(model, to_float(a), y) for a, y in zip(as_bytes.split(256), labels.split(256), strict=True)]
        )
    return {
        "run": run.name,
        "made_for": about["run"],
        "same_model": about["model"] == fingerprint(model_weights(model)),
        "n": len(labels),
        "broken": int((~about["robust"]).sum()),
        "wrong": int((~right & ~about["robust"]).sum()),
        "accuracy": right.double().mean().item(),
        "accuracy_8_bits": as_file.double().mean().item(),
        "largest": size.max().item(),
        "eps": threat.eps,
        "outside": int((~((size <= threat.eps * (1 + 1e-5) + 1e-6) & in_box)).sum()),
    }


def _towards(
    images: ImageSet, attacks: Sequence[NamedAttack], target: str | int, classes: Sequence[str]
) -> tuple[ImageSet, list[NamedAttack], str]:
    """Return the images of other classes, the attacks aimed at the class ``target``, and how many images are left out."""
    number = class_number(target, classes)
    name = classes[number]
    other = (images.labels != number).nonzero()[:, 0]
    if not len(other):
        raise UserError(
            f"--target {target}: all {len(images)} images are of that class; aim at another, or give more images"
        )
    aimed = [dataclasses.replace(each, name=f"{each.name} towards {name}", target=number) for each in attacks]
    left_out = len(images) - len(other)
    return (
        images.subset(other),
        aimed,
        f"{left_out} of {len(images)} images are of class {name}, the target, and are left out",
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


class ShardDone(Exception):
    """A shard is computed; the record is made when all are."""


def _sources(
    paths: Sequence[str | Path], images: ImageSet, num_classes: int, device: torch.device
) -> list[tuple[str, nn.Module]]:
    """Return names and models of the runs whose images are tried; raises UserError unless they take these images."""
    found = []
    for path in paths:
        other = load(path, weights=RunDir.open(Path(path)).config().eval.weights).to(device)
        if other.num_classes != num_classes:
            raise UserError(
                f"--transfer-from {path} has {other.num_classes} classes, the data has {num_classes}; "
                "give a run on the same classes"
            )
        logits_of(other, to_float(images.images[:1].to(device)))
        found.append((Path(path).resolve().name, other))
    return found


def _evaluate_into(
    folder: Path,
    result: str,
    model: nn.Module,
    images: ImageSet,
    config: RunConfig,
    target: EvaluationTarget,
    shard: Shard | None,
    *,
    fresh: bool,
    save_adversarial: Path | None,
    tried: TransferredPart | None = None,
    notes: Sequence[str] = (),
    **options: Any,
) -> Evaluation:
    """Evaluate, write the record, the pictures' tensors and the adversarial images, and only then drop the state."""
    if folder.is_dir():
        check_inside(folder, "folder of results", only=result)
    state = folder / f"{result}.state"
    if fresh:
        discard(shard.folder(state) if shard else folders(state)[rank()])
    if save_adversarial is not None:
        adversarial_dataset.check_writable(save_adversarial)
    if rank() == 0:
        remove_leftovers(folder, (f"{result}.json", f"{result}.safetensors"))
    evaluation = evaluate_model(
        model,
        images,
        config.threat,
        config.eval,
        target,
        state=state,
        shard=shard,
        keep_adversarial=save_adversarial is not None,
        **options,
    )
    if evaluation is None:
        assert shard is not None
        raise ShardDone(f"shard {shard.index}/{shard.count} is done: {shard.folder(state)}; when all are, use --merge")
    if tried is not None:
        evaluation = dataclasses.replace(evaluation, record=evaluation.record.model_copy(update={"transferred": tried}))
    if notes:
        all_notes = [*evaluation.record.notes, *notes]
        evaluation = dataclasses.replace(evaluation, record=evaluation.record.model_copy(update={"notes": all_notes}))
    if rank() > 0:
        return evaluation
    _archive_record(folder, result, evaluation.record)
    write_atomically(folder / f"{result}.json", evaluation.record.model_dump_json(indent=1).encode())
    if evaluation.artifacts:
        content = {key: value.contiguous() for key, value in evaluation.artifacts.items()}
        write_atomically(folder / f"{result}.safetensors", to_safetensors(content))
    if save_adversarial is not None:
        assert evaluation.adversarial is not None
        adversarial_dataset.save(save_adversarial, evaluation.adversarial, images.labels, evaluation.record)
    for done in [*(shards(state) if options.get("merge") else ()), state, *folders(state)]:
        discard(done)
    return evaluation


def _archive_record(folder: Path, result: str, record: Record) -> None:
    """Move a record that ``record`` does not repeat to ``folder/earlier``, with its pictures: it may have taken hours."""
    path = folder / f"{result}.json"
    try:
        old = Record.model_validate_json(read_regular(path, JSON_LIMIT))
    except (OSError, ValueError):  # there is none, or it cannot be read
        return

    def what(record: Record) -> list[str]:
        threat = f"{record.threat.norm}-{record.threat.eps_text.replace('/', '_')}"
        parts = [record.suite, threat, str(record.data.n), record.data.images[:8], record.model.fingerprint[:8]]
        return [re.sub(r"[^\w.+-]+", "_", part)[:60] for part in parts]  # a record from elsewhere may hold paths

    if what(old) == what(record):
        return
    for suffix in (".safetensors", ".json"):
        kept = folder / "earlier" / f"{'-'.join(what(old))}{suffix}"
        if path.with_suffix(suffix).exists():
            kept.parent.mkdir(exist_ok=True)
            path.with_suffix(suffix).replace(kept)
    tell(f"note: the record before, of another evaluation, is kept as {kept}")
