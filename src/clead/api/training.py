"""Train a model into a run directory, or measure where the time of a training goes."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clead.atomic_io import locked, write_atomically
from clead.attacks import ATTACKS
from clead.attacks.capabilities import capabilities
from clead.attacks.runner import image_gradient
from clead.config import RunConfig
from clead.data.base import say_skipped
from clead.data.classes import match_names
from clead.data.extra import with_extra
from clead.devices import device_of
from clead.distributed import World, init_world, local_device
from clead.errors import UserError, memory_of
from clead.interfaces import Splits
from clead.methods import check_task
from clead.models.external import backward_of
from clead.models.library import RANDOM, Library
from clead.models.modes import attack_mode
from clead.models.seeding import fork_rng
from clead.models.split import AdaptedModel, SplitModel, adapt, copied, require_features
from clead.output import tell
from clead.results.provenance import environment
from clead.runs.directory import NOTES, RunDir
from clead.runs.loading import build, evaluated_images, image_shape, load_model
from clead.tasks import Task, task_name
from clead.tasks.classification import Classification
from clead.tasks.segmentation import Segmentation
from clead.training.freezing import start_from, unfrozen_afterwards
from clead.training.profile import profile_training
from clead.training.pseudo_labels import PSEUDO_LABELS, pseudo_labels, unlabelled_sets, with_pseudo_labels
from clead.training.stages import fit_stages, write_outcome
from clead.training.teacher import START, load_teacher
from clead.training.trainer import AfterValidation, Callbacks, TrainResult, fit
from clead.weights.files import load_weights, save_weights

_log = logging.getLogger("clead")


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A finished training: its directory, the model with the best validation robust accuracy, and what it cost."""

    path: Path
    model: SplitModel
    outcome: TrainResult


def train(
    config: RunConfig,
    *,
    model: nn.Module | None = None,
    data: Splits | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    show: bool = True,
    after_validation: AfterValidation | None = None,
) -> TrainedRun:
    """Train as ``config`` says and leave a run directory.

    Args:
        config: the complete configuration; ``clead.load_recipe`` makes one.
        model: your own module (pixels in [0, 1] -> logits) instead of ``config.model``; trained in place.
        data: loaded images instead of ``config.data``.
        out: the run directory, new or empty; ``runs/NAME-TIME`` if None.
        resume: continue the run in ``out`` if there is one.
        show: show progress on stderr.
        after_validation: called as ``after_validation(part, clean, robust)`` after every validation (of the last stage), with the
            part of the training that lies behind and both accuracies; an exception that it raises ends the training.

    Returns:
        The run. Raises UserError for a mistake of the user, NonFiniteLoss if training diverges.
    """
    processes = init_world(local_device(device_of(config.train.device)))
    path = processes.broadcast(Path(out) if out is not None else RunDir.default_path(config.name))
    continuing = processes.broadcast(resume and (path / "config.yaml").exists())
    config = _described(config, RunDir.open(path).config() if continuing else None)
    if not continuing:
        RunDir.check_free(path)
    device_of(config.train.device)
    _check_starts(config)
    splits, extra_note = with_extra(config.data, data if data is not None else config.data.load(config.train.seed))
    _check_extra(config, splits)
    config.task.check_data(splits.train.labels, splits.classes)
    if show and processes.is_main:
        say_skipped(splits.skipped)
        for note in (*splits.notes, *filter(None, [extra_note])):
            _log.warning("%s", note)
    processes.check_same({"configuration": config.to_yaml(), "data": splits.trained_on, **_versions()})
    show = show and processes.is_main
    splits, new_labels = _as_seen(config, splits, path, show=show)
    begun = continuing and any(path.rglob("*.state"))  # its own weights are loaded, so no others are
    split_model, notes = _beginning(config, splits, model, processes, begun=begun)
    taken = f"{path} is in use by another training; wait for it, or give another --out"
    with locked(path, taken) if processes.is_main else nullcontext():
        if processes.is_main:
            run = RunDir(path) if continuing else RunDir.create(path, config)
            run.note_environment()
            listed = {
                "unreadable.txt": splits.unreadable,
                "skipped.txt": splits.skipped,
                NOTES: [] if begun else [*filter(None, [extra_note]), *notes],
            }
            for name, lines in listed.items():
                if lines:
                    write_atomically(path / name, "".join(f"{line}\n" for line in lines).encode())
            if new_labels is not None:
                save_weights(path / PSEUDO_LABELS, *new_labels)
        processes.barrier()
        run = RunDir(path)
        # Leave the caller's global random state, and what of the model is frozen, as they were.
        callbacks = Callbacks(after_validation=after_validation)
        memory = memory_of("the training", "data.batch_size", "model.width")
        with fork_rng(config.train.seed), unfrozen_afterwards(split_model), memory:
            if config.stages:
                outcome = fit_stages(config, splits, split_model, run, show=show, callbacks=callbacks)
            else:
                outcome = fit(config, splits, split_model, run, resume=continuing, show=show, callbacks=callbacks)
        if processes.is_main:
            write_outcome(path, outcome)
        processes.barrier()
    split_model.drop_projection()
    best, _ = load_weights(path / "best.safetensors")
    split_model.load_state_dict(best)
    return TrainedRun(path, split_model.eval(), outcome)


def _described(config: RunConfig, stored: RunConfig | None) -> RunConfig:
    """Return the configuration with what its network's library has to be asked for, as in the run that it continues, if it does.

    Raises UserError if that run has another configuration.
    """
    network = config.model
    if isinstance(network, Library):
        if stored is not None and isinstance(stored.model, Library):
            network = dataclasses.replace(network, description=stored.model.description)
        config = dataclasses.replace(config, model=network.described())
    if stored is not None:
        _same_config(config, stored)
    return config


def _beginning(
    config: RunConfig, splits: Splits, model: nn.Module | None, processes: World, *, begun: bool
) -> tuple[SplitModel, list[str]]:
    """Return the model with the weights that ``config`` begins with, and what is said of how it was made, which is printed.

    begun: the run has weights of its own already. Raises UserError if the model, those weights or a teacher do not fit.
    """
    taught_by_start = any(training.train.teacher == START for training in config.trainings())
    if model is not None:
        made = adapt(model, sample_shape=image_shape(splits), num_classes=len(splits.classes))
    else:
        made = build(config, splits, pretrained=not begun or taught_by_start)
    images = min(config.data.batch_size, len(splits.train))
    _check_model(made, config, splits, max(1, images // (processes.world_size * config.train.accumulate)))
    drawn = config.train.start_from is None
    origin = made.origin if isinstance(made, AdaptedModel) else []
    notes = [f"model: {note}" for note in origin if drawn or RANDOM not in note]
    for note in notes if processes.is_main and not begun else ():
        tell(note)
    if not drawn:
        first = config.trainings()[0].method
        dim = first.embedding_dim if first.uses_embedding else None
        notes += start_from(made, Path(config.train.start_from), dim=dim, classes=splits.classes)
    for training in config.trainings():
        if training.train.teacher not in (None, START):
            load_teacher(training, made, splits)
    return made, notes


def profile(config: RunConfig, *, model: nn.Module | None = None, data: Splits | None = None) -> dict[str, Any]:
    """Make a few training steps as ``config`` says, keep nothing, and return where their time went.

    See ``clead.training.profile.profile_training`` for what comes back; arguments as for ``train``.
    """
    if config.stages:
        names = ", ".join(stage.name for stage in config.stages)
        raise UserError(f"--profile looks at one training, got the stages {names}; give a recipe without stages")
    device_of(config.train.device)
    _check_start(config)
    splits, _ = with_extra(config.data, data if data is not None else config.data.load(config.train.seed))
    _check_extra(config, splits)
    splits, _ = _as_seen(config, splits, None, show=False)
    adapted = None if model is None else adapt(model, sample_shape=image_shape(splits), num_classes=len(splits.classes))
    with fork_rng(config.train.seed), memory_of("the training", "data.batch_size"):
        return profile_training(config, splits, adapted if adapted is not None else build(config, splits))


def _versions() -> dict[str, str]:
    """Return the versions on which all processes of a training must agree."""
    return {f"version of {name}": version for name, version in environment().items() if name in ("clead", "torch")}


def _check_starts(config: RunConfig) -> None:
    """Raise UserError for every training of ``config`` that could not begin."""
    problems = []
    for training, stage in zip(config.trainings(), config.stages or (None,), strict=True):
        try:
            _check_start(training)
        except UserError as error:
            problems += [problem if stage is None else f"stages.{stage.name}.{problem}" for problem in error.problems]
    if problems:
        raise UserError(*problems)


def _check_start(config: RunConfig) -> None:
    """Raise UserError if the method does not know the task, or if the inner attack has no objective or starts where it is flat."""
    task, method = config.task, config.method
    check_task(method, task)
    if not isinstance(task, Classification):
        data = config.data
        given = {"cutmix": data.cutmix, "extra": data.extra, "sampling": data.sampling == "balanced"}
        if classes_only := [f"data.{key}" for key, value in given.items() if value]:
            raise UserError(
                f"{', '.join(classes_only)}: is for one class per image, got task {task_name(task)}; leave it out"
            )
    if config.method.uses_attack and capabilities(config.attack).searches:
        usable = ", ".join(name for name, kind in ATTACKS.items() if not capabilities(kind).searches)
        raise UserError(
            f"attack.name: training needs an attack that maximises the method's objective ({usable}), got "
            f"{config.to_dict()['attack']['name']}, which searches by itself; use it with clead attack"
        )
    if config.train.clock == "cpu" and (device := device_of(config.train.device)).type != "cpu":
        raise UserError(
            f"train.clock: CPU time says little where {device} computes, got cpu; set --train.clock wall, or --train.device cpu"
        )
    inner = getattr(config.method, "inner", "")
    if (
        config.method.uses_attack
        and inner in ("kl", "embedding")
        and not getattr(config.method, "inner_contrastive_weight", 0)
        and getattr(config.attack, "random_start", True) is False
    ):
        raise UserError(
            f"attack.random_start: method.inner {inner} is smallest, so without slope, at the image itself, got false; "
            "set attack.random_start true, or method.inner cross_entropy"
        )


def _check_extra(config: RunConfig, splits: Splits) -> None:
    """Raise UserError if auxiliary images have no label and nothing in ``config`` can use them."""
    extra, trainings = splits.train.extra, config.trainings()
    if extra is None or extra.labelled is None:
        return
    unlabelled = [each for each in trainings if each.data.pseudo_labels_from is None and each.method.uses_unlabelled]
    remedy = "let a model label them: --data.pseudo_labels_from RUN"
    if not unlabelled and all(each.data.pseudo_labels_from is None for each in trainings):
        name = trainings[-1].to_dict()["method"]["name"]
        raise UserError(
            f"data.extra: method {name} has no use for images without a label, got {config.data.extra}; {remedy}"
        )
    if mixed := [each.data.cutmix for each in unlabelled if each.data.cutmix]:
        raise UserError(
            f"data.cutmix: mixes labels, which the images of data.extra have not, got {mixed[0]:g}; set it to 0, or {remedy}"
        )


def _as_seen(
    config: RunConfig, splits: Splits, path: Path | None, *, show: bool
) -> tuple[Splits, tuple[dict[str, Tensor], dict[str, Any]] | None]:
    """Return the images with the labels that training sees, and pseudo-labels to be kept in the run, if there are any new ones.

    Those that the run in ``path`` keeps already are taken up, so that it goes on as it began whatever became of their source.
    """
    sources = [
        each.data.pseudo_labels_from
        for each in (config, *config.trainings())
        if each.data.pseudo_labels_from is not None
    ]
    if sources and not unlabelled_sets(splits):
        raise UserError(f"data.pseudo_labels_from: every image has a label already, got {sources[0]}; leave it out")
    source = config.data.pseudo_labels_from
    if source is None:
        return splits, None
    file = None if path is None else path / PSEUDO_LABELS
    if file is not None and file.exists():
        pseudo, new = load_weights(file), None
    else:
        pseudo = new = _pseudo_labels(config, splits, source)
    return with_pseudo_labels(splits, *pseudo, source=source, file=file, show=show), new


def _pseudo_labels(config: RunConfig, splits: Splits, source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what the model of the run ``source`` takes the training images for, and what to know of it."""
    try:
        run = RunDir.open(Path(source))
        trained = run.config()
        model = load_model(run, trained, trained.eval.weights, None)
        _, aligned = evaluated_images(run, trained, trained, splits)
        _check_labels_hidden(config, trained, source)
        numbers, _ = match_names(aligned.classes, [(each,) for each in splits.classes])
        if lacking := [each for each in aligned.classes if each not in numbers]:
            raise UserError(
                f"{source} may say {lacking[0]!r}, which is no class of the data; train it on the same classes"
            )
    except UserError as error:
        raise UserError(*(f"data.pseudo_labels_from: {problem}" for problem in error.problems)) from None
    order = torch.tensor([numbers[each] for each in aligned.classes])
    return pseudo_labels(model, splits, run.name, device_of(config.train.device), order)


def _check_labels_hidden(config: RunConfig, teacher: RunConfig, source: str) -> None:
    """Raise UserError if the teacher has learnt from labels of the same data that this training hides, or validates with."""
    same = type(teacher.data) is type(config.data)
    if not same or getattr(teacher.data, "path", None) != getattr(config.data, "path", None):
        return
    of_teacher, of_student = (
        {f"data.{key}": getattr(each.data, key) for key in ("labelled", "label_noise", "val_fraction", "limit_train")}
        | {"train.seed": each.train.seed}
        for each in (teacher, config)
    )
    if differences := [
        f"{key} {of_teacher[key]} there, {of_student[key]} here"
        for key in of_student
        if of_teacher[key] != of_student[key]
    ]:
        raise UserError(
            f"{source} may have learnt labels that are hidden here, got {', '.join(differences)}; train it with the same"
        )


def _check_answers(logits: Tensor, task: Task, name: str) -> None:
    """Raise UserError unless ``logits`` are per image or per pixel, as ``task`` needs them."""
    per_pixel = logits.dim() == 4
    if per_pixel != isinstance(task, Segmentation):
        given = "pixel, which is for segmentation" if per_pixel else "image"
        network = "small_cnn" if per_pixel else "unet"
        remedy = f"give --model.name {network}" + ", or --task segmentation and data with masks" * per_pixel
        raise UserError(f"model {name} answers per {given}, got task {task_name(task)}; {remedy}")


def _check_model(model: SplitModel, config: RunConfig, splits: Splits, piece: int) -> None:
    """Raise UserError, before anything is written, if a training of ``config`` cannot go on with this model.

    It is run in the modes and with the numbers of images that training will use: in evaluation mode, and a copy of it in training
    mode on 2 images and on ``piece``, as many as go forward at once.
    """
    shape = image_shape(splits)
    name = type(model.module).__name__ if isinstance(model, AdaptedModel) else config.to_dict()["model"]["name"]
    device = next((p.device for p in model.parameters()), None)
    for training in config.trainings():
        if training.method.uses_features:
            require_features(model, shape, f"method {training.to_dict()['method']['name']}")
    if not any(True for _ in model.parameters()):
        raise UserError(
            f"model {name} has no parameters, so there is nothing to train; evaluate it with clead evaluate"
        )
    pixels, budget = torch.Size(shape).numel(), 64 * 3 * 32 * 32
    counts = {min(2, piece): None, piece if piece * pixels <= budget else 2: None}
    try:
        with fork_rng(0):
            with attack_mode(model), torch.no_grad():
                logits = model(torch.zeros(2, *shape, device=device))
            _check_answers(logits, config.task, name)
            if not isinstance(model, AdaptedModel):
                return
            methods = [training.method for training in config.trainings()]
            if any(method.uses_attack for method in methods):
                _check_gradient(model, torch.rand(2, *shape).to(device), name)
            probe = copied(model).train()
            for count in counts:
                with torch.set_grad_enabled(count == 2):
                    logits = probe(torch.rand(count, *shape).to(device))
                if logits.requires_grad:
                    learnt = [p for p in probe.parameters() if p.requires_grad]
                    with backward_of(probe):
                        torch.autograd.grad(logits.sum(), learnt, allow_unused=True)
                if logits.shape[1] != model.num_classes:
                    raise UserError(
                        f"model {name} returns {logits.shape[1]} logits in train mode, {model.num_classes} in eval mode; "
                        "name the right ones: --model.output NAME"
                    )
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"model {name} fails on images of shape {shape}: {type(error).__name__}: {reason}; "
            "mend its forward for images (B, C, H, W), or set data.image_size and data.channels"
        ) from error


def _check_gradient(model: SplitModel, x: Tensor, name: str) -> None:
    """Raise UserError if no gradient reaches the images ``x``, which the inner attack climbs; warn if it is 0 everywhere."""
    gradient = image_gradient(model, x)
    if gradient is None:
        raise UserError(
            f"no gradient of {name} reaches the images (it detaches them, or runs under no_grad), and adversarial training attacks "
            "along it; take that out, or train with --method.name standard"
        )
    if not gradient.any():
        _log.warning(
            "model %s: the gradient of the logits to the images is 0 everywhere (rounding, argmax or a sign in the model?), so the "
            "inner attack finds nothing",
            name,
        )


def _same_config(given: RunConfig, stored: RunConfig) -> None:
    differences = [
        f"{key}: the run has {old!r}, got {new!r}"
        for key, old, new in _differences(stored.to_dict(), given.to_dict(), "")
        if key != "train.device"
    ]
    if differences:
        raise UserError(
            *(
                f"--resume continues the same configuration; {difference}; restore it, or train anew"
                for difference in differences
            )
        )


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: str) -> list[tuple[str, Any, Any]]:
    differences = []
    for key in {**a, **b}:
        old, new = a.get(key), b.get(key)
        if key == "stages" and isinstance(old, list) and isinstance(new, list):
            old, new = ({stage["name"]: stage for stage in stages} for stages in (old, new))
        if isinstance(old, dict) and isinstance(new, dict):
            differences += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            differences.append((prefix + key, old, new))
    return differences
