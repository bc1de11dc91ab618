"""The training loop, top to bottom: batch → method → backward → step → log → validate → checkpoint."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.profiler import record_function
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_avg_fn

from clead.attacks.pgd import PGD
from clead.checkpoint import PROJECTION, RunDir, check_weights, save_weights
from clead.config import RunConfig, Train
from clead.data.base import shuffle_if_sorted
from clead.data.label_sampling import for_method
from clead.data.loaders import Loader, make_generator
from clead.distributed import (
    SINGLE_PROCESS,
    Parted,
    World,
    average_gradients,
    init_world,
    local_device,
    raise_on_lost_worker,
    synchronised,
)
from clead.errors import UserError, out_of_memory
from clead.evaluation.correctness import accuracy_under_attack
from clead.evaluation.knn import neighbours_accuracy
from clead.interfaces import Batch, Splits, StepOutput, Threat
from clead.methods.base import StepContext, Views
from clead.methods.free_adversary import PersistentDelta
from clead.models.compute_cost import CostMeter
from clead.models.external import ModelError
from clead.models.split import SplitModel, copied, weights
from clead.progress import progress
from clead.training.awp import perturbed_weights
from clead.training.freezing import train_classifier_only
from clead.training.offline_adversaries import store_images
from clead.training.optim import make_optimizer, make_schedule
from clead.training.overfitting import Cause, cause_of, collapsed, parted
from clead.training.tensorboard import tensorboard

_log = logging.getLogger("clead")
_LOG_STEPS = 10
_REMEDY = "lower optim.lr, set optim.clip_norm, or use precision float32"
_PERTURBATION = 7  # the stream of random starts, apart from the loader's streams
PARTS = ("data", "views", "loss", "backward", "optimiser")
"""What a step is made of, as ``clead train --profile`` names it."""
AfterValidation = Callable[[float, float, float], None]
"""Is told of a validation: part of the training that lies behind, in (0, 1], clean accuracy, robust accuracy."""
PRECISION = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message names step, term and the last good checkpoint."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the step was finished and the state saved."""


@dataclass
class TrainState:
    """Where a run stands; what resume needs besides tensors."""

    step: int = 0
    seconds: float = 0.0
    best: float = -1.0
    best_step: int = -1
    validations_since_best: int = 0
    collapsed_at: int = -1
    stopped_early: bool = False
    robust_training: float = math.nan
    robust_images: int = 0
    partings: int = 0
    warned: list[str] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    sum_steps: int = 0


@dataclass(frozen=True)
class TrainResult:
    """What a finished training reports."""

    steps: int
    epochs: float
    seconds: float
    forward_equivalents: float
    best_validation: float
    best_step: int
    stopped_early: bool
    collapsed_at: int


def device_of(name: str) -> torch.device:
    """Return the device that ``train.device`` means; raises UserError if there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"train.device: no device {name!r} here ({reason}); use auto, cpu, cuda or cuda:N") from None
    return device


def cost_per_image(config: RunConfig, model: SplitModel, images: Batch, memory: nn.Module | None = None) -> float:
    """Return what one training step costs per image in forward-equivalents, measured on copies of the model and of ``memory``.

    Forward 1, backward to inputs only 1, backward to inputs and weights 2, over all views and attack steps.
    """
    probe = copied(model).train()
    memory = None if memory is None else copied(memory)
    others = [] if memory is None else [part for part in memory.modules() if isinstance(part, SplitModel)]
    with torch.random.fork_rng(devices=[]), contextlib.ExitStack() as stack:
        meters = [stack.enter_context(CostMeter(part)) for part in (probe, *others)]
        generator = torch.Generator(images.images.device).manual_seed(0)
        scaler = torch.amp.GradScaler(enabled=False)
        _forward_backward(config, probe, images, [generator], 0.0, memory, contextlib.nullcontext(), scaler)
    return sum(meter.forward_equivalents for meter in meters) / len(images.labels)


def _forward_backward(
    config: RunConfig,
    model: SplitModel,
    batch: Batch,
    generators: Sequence[torch.Generator],
    progress: float,
    memory: nn.Module | None,
    amp: contextlib.AbstractContextManager[Any],
    scaler: torch.amp.GradScaler,
    processes: World = SINGLE_PROCESS,
) -> StepOutput:
    """Make the views and leave in the weights the gradient of their loss, where ``train.awp`` wants it to be taken.

    generators: one for each part of the batch. The gradient of one of several ``processes`` is to be averaged with theirs.
    """
    size, alone = len(batch.labels), processes.world_size == 1
    threat = config.threat if len(generators) == 1 else cast(Threat, Parted(config.threat, generators, size))
    gather = None if alone else processes.all_gather
    step = StepContext(threat, config.attack, generators[0], progress, memory, len(generators), gather)
    with record_function("views"), amp:
        views = config.method.views(model, batch, step)
    if not alone:
        views = Views(views.images, _of_all(views.batch, processes), views.batch)

    def output() -> StepOutput:
        join = None if alone else lambda outputs: processes.gather_with_grad(outputs, size)
        with record_function("loss"), amp, model.gathering_outputs(join):
            return config.method.loss(model, views, step)

    kept = [(part, part.clone()) for part in memory.buffers()] if config.train.awp and memory is not None else []
    average = None if alone else processes.all_reduce_mean
    with perturbed_weights(model, lambda: scaler.scale(output().loss), config.train.awp, average):
        for part, before in kept:  # the ascent leaves the memory's buffers as they are, as it does the model's
            part.copy_(before)
        found = output()
        with record_function("backward"):
            scaler.scale(found.loss).backward()
    return found


def _of_all(batch: Batch, processes: World) -> Batch:
    """Return the batch with what belongs to the labels, of all processes; the images stay those of this one."""
    names = ("labels", "index", "soft_labels", "labelled")
    return batch._replace(
        **{name: processes.all_gather(part) for name in names if (part := getattr(batch, name)) is not None}
    )


def _pieces(batch: Batch, count: int) -> list[Batch]:
    """Return the batch in ``count`` equal parts."""
    if count == 1:
        return [batch]
    parts = [[None] * count if part is None else part.chunk(count) for part in batch]
    return [Batch(*piece) for piece in zip(*parts, strict=True)]


def fit(
    config: RunConfig,
    splits: Splits,
    model: SplitModel,
    run: RunDir,
    *,
    resume: bool = False,
    show: bool = True,
    after_step: Callable[[], None] | None = None,
    after_validation: AfterValidation | None = None,
    stored: Path | None = None,
) -> TrainResult:
    """Train ``model`` in place and leave weights, metrics and a resume state in ``run``.

    Every batch, view and perturbation is a function of (seed, step), so a resumed run continues bit-identically on a CPU.
    ``after_step`` is called after every step, ``after_validation`` after every validation of a method that trains the classifier;
    an exception of theirs ends the training. ``stored`` is where images that are attacked before the first step are kept,
    RUN/stored if None. Raises NonFiniteLoss, Interrupted (state saved), or UserError if a checkpoint does not fit.
    """
    settings = config.train
    device = local_device(device_of(settings.device))
    processes = init_world(device)
    with (
        raise_on_lost_worker(str(run.path)) if processes.world_size > 1 else contextlib.nullcontext(),
        synchronised(model) if processes.world_size > 1 and settings.sync_batch_norm else contextlib.nullcontext(),
    ):
        return _fit(
            config,
            splits,
            model,
            run,
            device=device,
            processes=processes,
            resume=resume,
            show=show and processes.is_main,
            after_step=after_step,
            after_validation=after_validation,
            stored=stored,
        )


def _fit(
    config: RunConfig,
    splits: Splits,
    model: SplitModel,
    run: RunDir,
    *,
    device: torch.device,
    processes: World,
    resume: bool,
    show: bool,
    after_step: Callable[[], None] | None,
    after_validation: AfterValidation | None,
    stored: Path | None,
) -> TrainResult:
    settings = config.train
    parts = settings.parts or processes.world_size * settings.accumulate
    batch_images = min(config.data.batch_size, len(splits.train))
    _check_parts(config, parts, processes, batch_images)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    if config.method.uses_embedding and model.projection is None:
        model.add_projection(config.method.embedding_dim, seed=settings.seed)
    model.to(device=device, memory_format=layout).train()  # ty: ignore[no-matching-overload]
    kept_images, prior, prior_seconds = None, 0.0, 0.0
    if config.method.uses_stored:
        folder = run.path / "stored" if stored is None else stored
        try:
            for turn in range(
                processes.world_size
            ):  # the first one makes them, the others find them made, one after another
                if turn == processes.rank:
                    kept_images, prior, prior_seconds = store_images(
                        config, splits, model, folder, device=device, show=show
                    )
                processes.barrier()
        except KeyboardInterrupt:
            raise Interrupted(f"stopped while images were stored; continue with --resume --out {run.path}") from None
    if settings.trainable == "classifier":
        train_classifier_only(model)
    loader = Loader(
        for_method(splits.train, config.method.uses_unlabelled),
        config.data.batch_size,
        device=device,
        seed=settings.seed,
        drop_last=True,
        augment=config.data.augment,
        view=config.data.view if config.method.uses_second_view else None,
        cutmix=config.data.cutmix,
        num_classes=len(splits.classes),
        stored=kept_images,
        parts=parts,
        rank=processes.rank,
        size=processes.world_size,
    )
    memory = config.method.state(
        model, images=len(splits.train), num_classes=len(splits.classes), shape=tuple(splits.train.images.shape[1:])
    )
    if memory is not None:
        memory.to(device)
    cost = cost_per_image(config, model, _first(loader.batch(0, 0), 2), memory)
    deployed = model  # whole, whatever the processes share out
    if settings.shard:
        from clead.training import sharding  # takes a second to import

        sharding.check(config, memory)
    if shard := settings.shard and processes.world_size > 1:
        model = sharding.sharded(deployed, processes.world_size, device)
        deployed.to("cpu" if not processes.is_main else device)
    per_epoch = loader.steps_per_epoch
    epochs = settings.epochs if settings.epochs is not None else (settings.budget or 0) / cost
    images_seen = epochs * (per_epoch * batch_images if settings.epochs is not None else len(splits.train))
    steps = max(1, round(images_seen / batch_images))
    every = max(1, round(settings.validate_every * per_epoch))

    trainable_params = [
        *(p for p in model.parameters() if p.requires_grad or settings.trainable == "all"),
        *(p for p in (memory.parameters() if memory else ()) if p.requires_grad),
    ]
    optimizer = make_optimizer(trainable_params, config.optim)
    for group in optimizer.param_groups if shard else ():
        group["fused"] = None  # knows no weights that are shared out
    schedule = make_schedule(optimizer, config.optim, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
    average: AveragedModel | None = None
    if settings.ema:
        average = AveragedModel(copied(model), multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)
    elif settings.swa_start is not None:
        average = AveragedModel(
            copied(model), avg_fn=get_swa_avg_fn(), use_buffers=True
        )  # multi: refuses integer buffers
    at = TrainState()
    torch.manual_seed(settings.seed)  # dropout and the like inside a user's model draw from the global generator
    if resume:
        restore = sharding.restore if settings.shard else None
        at = _restore(run, splits, model, average, memory, optimizer, schedule, scaler, processes, restore)
    if not at.step:
        at.seconds = prior_seconds
    if settings.compile:
        model.compile()

    def make_eval_model() -> SplitModel:
        if shard:
            sharding.gather(model, deployed)
            return deployed
        started = average is not None and (settings.ema or average.n_averaged > 0)
        return cast(SplitModel, average.module) if average is not None and started else model

    def save() -> None:
        of_model, of_optimizer = (
            sharding.states(model, optimizer) if settings.shard else (model.state_dict(), optimizer.state_dict())
        )
        if broken := _first_not_finite(model):
            raise NonFiniteLoss(
                f"the weights became NaN or infinite by step {at.step} (first in {broken}); {_last_good(run)}; {_REMEDY}"
            )
        remembered = memory.state_dict() if memory is not None else None
        if isinstance(memory, PersistentDelta):  # each process has those of its own images
            remembered = {name: processes.all_gather(part) for name, part in memory.state_dict().items()}
        if not processes.is_main:
            return
        state = {
            "model": of_model,
            "average": average.state_dict() if average is not None else None,
            "memory": remembered,
            "optimizer": of_optimizer,
            "schedule": schedule.state_dict(),
            "scaler": scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if device.type == "cuda" else [],
            "position": dict(vars(at)),
            "log_size": run.log_size(),
            "data": splits.fingerprint,
        }
        try:
            run.save_state(state)
        except UserError as error:
            kept = "the checkpoint before is kept, --resume continues from it" if run.has_state() else "none was before"
            raise UserError(f"{error} (training stopped at step {at.step}; {kept})") from error

    def forward_equivalents() -> float:
        return prior + at.step * batch_images * cost / len(splits.train)

    amp = torch.autocast(device.type, dtype=PRECISION[settings.precision], enabled=settings.precision != "float32")
    validation = shuffle_if_sorted(splits.val).subset(torch.arange(min(settings.validate_images, len(splits.val))))
    validation_attack = PGD(steps=settings.validate_steps, step_schedule="linear")
    started, last_save, seconds_before = time.monotonic(), time.monotonic(), at.seconds

    with (
        _signals(processes.world_size == 1) as interrupted,
        tensorboard(run.path / "tensorboard", at.step) if processes.is_main else contextlib.nullcontext() as draw,
        progress(f"train {config.name}", steps, done=at.step, show=show) as tick,
    ):

        def log(kind: str, **figures: float | str) -> None:
            if draw is None:
                return
            line = {"kind": kind, **_where(at, per_epoch, forward_equivalents()), **figures}
            run.log(line)
            if kind != "warning":
                draw(line)

        validated: dict[str, float] = {}
        while at.step < steps and not at.stopped_early:
            with record_function("data"):
                turn = at.step // config.method.replays
                batch = loader.batch(*divmod(turn, per_epoch), turn * config.method.replays / steps)
                if settings.channels_last:
                    names = ("images", "second_view", "stored")
                    views = {name: part for name in names if (part := getattr(batch, name)) is not None}
                    batch = batch._replace(
                        **{name: part.contiguous(memory_format=layout) for name, part in views.items()}
                    )
            optimizer.zero_grad(set_to_none=True)
            found = []
            for piece, generators in zip(
                _pieces(batch, settings.accumulate),
                _generators(device, parts, processes, settings, at.step),
                strict=True,
            ):
                try:
                    found.append(
                        _forward_backward(
                            config, model, piece, generators, at.step / steps, memory, amp, scaler, processes
                        )
                    )
                except ModelError as error:
                    raise ModelError(f"{error} (batch of step {at.step}; {_last_good(run)})") from error
            loss, metrics = _mean(found)
            if not math.isfinite(loss.item()):  # synchronises the device
                raise NonFiniteLoss(_not_finite(at.step, loss.item(), metrics, run))
            if len(found) > 1:
                for part in trainable_params:
                    if part.grad is not None:
                        part.grad /= len(found)
            checkpoint_due = time.monotonic() - last_save >= settings.checkpoint_seconds
            own = [
                part for part in trainable_params if not hasattr(part, "to_local")
            ]  # the others are averaged already
            stop, checkpoint_due = average_gradients(
                processes, own, [bool(interrupted()), checkpoint_due and processes.is_main]
            )
            # In float16 the scaler leaves such a step out; elsewhere one bad gradient would spoil every weight.
            if not scaler.is_enabled() and (broken := _bad_gradient(model, trainable_params)):
                raise NonFiniteLoss(
                    f"the gradient became NaN or infinite at step {at.step} (first in {broken}); {_last_good(run)}; {_REMEDY}"
                )
            with record_function("optimiser"):
                if config.optim.clip_norm is not None:
                    scaler.unscale_(optimizer)
                    clip_grad_norm_(model.parameters(), config.optim.clip_norm)
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
            at.step += 1
            if average is not None and (settings.ema or _averages(at.step, steps, per_epoch, settings.swa_start)):
                average.update_parameters(model)
            at.seconds = seconds_before + time.monotonic() - started

            if after_step is not None:
                after_step()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                at.sums[name] = at.sums.get(name, 0.0) + value.item()
            at.sum_steps += 1
            if at.step % _LOG_STEPS == 0 or at.step == steps:
                recent = {name: total / at.sum_steps for name, total in at.sums.items()}
                at.robust_training = recent.get("robust_accuracy", math.nan)
                at.robust_images = at.sum_steps * batch_images
                at.sums, at.sum_steps = {}, 0
                log("train", learning_rate=float(schedule.get_last_lr()[0]), **recent)
            status = {k: metrics[k].item() for k in ("robust_accuracy", "clean_accuracy") if k in metrics}
            status["loss"] = loss.item()

            if at.step % every == 0 or at.step == steps:
                eval_model = make_eval_model()
                if config.method.uses_classifier:
                    clean, robust = processes.broadcast(
                        accuracy_under_attack(
                            eval_model,
                            validation,
                            config.threat,
                            validation_attack,
                            "margin",
                            seed=settings.seed,
                            device=device,
                        )
                        if processes.is_main
                        else (0.0, 0.0)
                    )
                    log("validation", clean_accuracy=clean, robust_accuracy=robust, images=len(validation))
                    validated = {"validation_robust": robust, "validation_clean": clean}
                    if after_validation is not None and processes.is_main:
                        after_validation(at.step / steps, clean, robust)
                    if message := _parting(
                        at, robust, len(validation), batch_images, model, eval_model, splits, config, device, processes
                    ):
                        log("warning", message=message)
                        if processes.is_main:
                            _log.warning(message)
                    # A method that never sees an attack is selected by clean accuracy: by robust accuracy its least trained
                    # weights win.
                    score = robust if config.method.uses_attack else clean
                else:
                    score = processes.broadcast(
                        neighbours_accuracy(eval_model, splits.train.labelled_subset(), validation, device=device)
                        if processes.is_main
                        else 0.0
                    )
                    log("validation", knn_accuracy=score, images=len(validation))
                    validated = {"validation_knn": score}
                at.validations_since_best += 1
                if score > at.best:
                    at.validations_since_best = 0
                if score >= at.best:  # of equals the later one, which has learnt longer
                    at.best, at.best_step = score, at.step
                    if processes.is_main:
                        _save(run, "best", eval_model, config, splits, at, cost)
                at.stopped_early = settings.patience is not None and at.validations_since_best >= settings.patience
            tick(1, **validated, **status)
            if stop or (processes.world_size == 1 and interrupted()):
                save()
                raise Interrupted(f"stopped at step {at.step} of {steps}; continue with --resume --out {run.path}")
            if checkpoint_due and at.step < steps and not at.stopped_early:
                save()
                last_save = time.monotonic()
    save()  # first: it refuses weights that are not finite
    final = make_eval_model()
    deployed.to(device)
    if processes.is_main:
        _save(run, "last", final, config, splits, at, cost)
        if (head := final.projection) is not None:  # not deployed, but a training that starts from here takes it up
            save_weights(run.path / PROJECTION, head.state_dict(), {})
    processes.barrier()
    return TrainResult(
        steps=at.step,
        epochs=at.step / per_epoch,
        seconds=at.seconds,
        forward_equivalents=forward_equivalents(),
        best_validation=at.best,
        best_step=at.best_step,
        stopped_early=at.stopped_early,
        collapsed_at=at.collapsed_at,
    )


def _check_parts(config: RunConfig, parts: int, processes: World, batch_images: int) -> None:
    """Raise UserError unless a batch can be shared out."""
    settings = config.train
    if parts % (processes.world_size * settings.accumulate):
        raise UserError(
            f"train.parts must be a multiple of processes × train.accumulate, {processes.world_size} × {settings.accumulate}, got "
            f"{parts}; start another number of processes"
        )
    if batch_images % parts:
        raise UserError(
            f"a batch of {batch_images} images cannot be shared out to {parts} equal parts ({processes.world_size} processes, "
            f"train.accumulate {settings.accumulate}); set --data.batch_size to a multiple of {parts}"
        )
    if parts > 1 and config.data.labelled_share is not None and batch_images // parts < 2:
        raise UserError(
            f"a part of a batch must have at least 2 images, got {batch_images // parts}; take larger batches"
        )
    if settings.accumulate > 1 and config.method.replays > 1:
        raise UserError(
            f"train.accumulate must be 1 where a method replays its batches, got {settings.accumulate} with "
            f"{config.method.replays} replays; leave it out"
        )


def _generators(
    device: torch.device, parts: int, processes: World, settings: Train, step: int
) -> list[list[torch.Generator]]:
    """Return where random starts are drawn from in a step, for each piece of a batch a generator per part."""
    if parts == 1:
        return [[make_generator(device, settings.seed, step, _PERTURBATION)]]
    here = parts // processes.world_size
    own = [
        make_generator(device, settings.seed, step, _PERTURBATION, part)
        for part in range(processes.rank * here, (processes.rank + 1) * here)
    ]
    each = here // settings.accumulate
    return [own[start : start + each] for start in range(0, here, each)]


def _mean(found: Sequence[StepOutput]) -> StepOutput:
    """Return the mean loss and metrics of the pieces of a batch."""
    if len(found) == 1:
        return found[0]
    names = found[0].metrics
    return StepOutput(
        torch.stack([part.loss.detach() for part in found]).mean(),
        {name: torch.stack([part.metrics[name] for part in found]).mean() for name in names},
    )


def _first(batch: Batch, n: int) -> Batch:
    return Batch(batch.images[:n], batch.labels[:n], *(part if part is None else part[:n] for part in batch[2:]))


def _averages(step: int, steps: int, per_epoch: int, start: float | None) -> bool:
    """Say whether stochastic weight averaging takes the weights in: after every epoch from ``start`` on, and at the end."""
    return step == steps or (step % per_epoch == 0 and step >= (start or 0) * steps)


def _where(at: TrainState, per_epoch: int, forward_equivalents: float) -> dict[str, Any]:
    return {
        "step": at.step,
        "epoch": round(at.step / per_epoch, 4),
        "seconds": round(at.seconds, 2),
        "forward_equivalents": round(forward_equivalents, 2),
    }


def _parting(
    at: TrainState,
    robust: float,
    n: int,
    batch_images: int,
    model: SplitModel,
    eval_model: SplitModel,
    splits: Splits,
    config: RunConfig,
    device: torch.device,
    processes: World,
) -> str:
    """Return what to say if robust accuracy on training batches and on n validation images part; once for each cause."""
    training, images = at.robust_training, at.robust_images
    if "robust_accuracy" in at.sums and math.isnan(training):  # validated before the first line of the log
        training, images = at.sums["robust_accuracy"] / at.sum_steps, at.sum_steps * batch_images
    lost = at.collapsed_at < 0 and collapsed(training, robust, at.best)
    if lost:
        at.collapsed_at = at.step
    if not (lost or parted(training, images, robust, n)):
        return ""
    at.partings += 1
    if not lost and at.partings & (at.partings - 1):  # measured at the 1st, 2nd, 4th, 8th … time
        return ""
    cause = Cause("", "the model is spread over processes, so the cause was not measured", {})
    if processes.world_size == 1 and not config.train.shard:
        cause = cause_of(model, eval_model, splits.train, config, device, training, robust)
    if cause.kind in at.warned and not lost:
        return ""
    at.warned.append(cause.kind)
    figures = f"{training:.1%} on training batches, {robust:.1%} under multi-step validation PGD"
    if not lost:
        return f"robust accuracy parts at step {at.step}: {figures}: {cause.text}"
    best = f" (best {at.best:.1%} at step {at.best_step}; best.safetensors keeps those weights)" if at.best > 0 else ""
    return f"robust accuracy has collapsed at step {at.step}: {figures}{best}: {cause.text}"


def _not_finite(step: int, loss: float, metrics: dict[str, torch.Tensor], run: RunDir) -> str:
    terms = [name for name, value in metrics.items() if not math.isfinite(value.item())] or ["loss"]
    return f"loss became {loss} at step {step} (in {', '.join(terms)}); {_last_good(run)}; {_REMEDY}"


def _last_good(run: RunDir) -> str:
    good = run.path / "resume.state"
    return f"the last good checkpoint is {good}" if run.has_state() else "no checkpoint had been written yet"


def _first_not_finite(model: nn.Module) -> str:
    """Return the name of the first parameter that is NaN or infinite, or an empty string."""
    # Not of buffers: a user's model may hold infinities there on purpose, such as a mask.
    return next((name for name, part in model.named_parameters() if not torch.isfinite(_local(part)).all()), "")


def _local(part: torch.Tensor) -> torch.Tensor:
    """Return this process's part of what is shared out, anything else as it is."""
    return part.to_local() if hasattr(part, "to_local") else part  # ty: ignore[not-callable]


def _bad_gradient(model: nn.Module, trainable_params: Sequence[nn.Parameter]) -> str:
    """Return the name of the first parameter whose gradient is NaN or infinite, or an empty string."""
    gradients = [_local(part.grad) for part in trainable_params if part.grad is not None]
    if not gradients or math.isfinite(get_total_norm(gradients, norm_type=math.inf).item()):
        return ""
    named = ((name, _local(part.grad)) for name, part in model.named_parameters() if part.grad is not None)
    return next((name for name, grad in named if not torch.isfinite(grad).all()), "the method's own weights")


def _save(
    run: RunDir, name: str, model: nn.Module, config: RunConfig, splits: Splits, at: TrainState, cost: float
) -> None:
    metadata = {
        "classes": list(splits.classes),
        "shape": list(splits.train.images.shape[1:]),
        "mean_std": [*mean_std(splits)],
        "step": at.step,
        "validation_accuracy": at.best if name == "best" else None,
        "forward_equivalents_per_step_image": cost,
        "data_fingerprint": splits.fingerprint,
        "config": config.to_dict(),
    }
    save_weights(run.path / f"{name}.safetensors", weights(model), metadata)


def mean_std(splits: Splits) -> tuple[list[float], list[float]]:
    """Return per-channel mean and standard deviation of the training images, in [0, 1]; a constant channel gets std 1.

    Of images that are streamed a sample counts, see ``StreamedImages.histogram``.
    """
    # By histogram: exact, and without a float copy of the whole set.
    images = splits.train.images
    if isinstance(images, torch.Tensor):
        counts = torch.stack([torch.bincount(channel.reshape(-1), minlength=256) for channel in images.unbind(1)])
    else:
        counts = images.histogram()
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts * value).sum(1) / counts.sum(1)
    std = ((counts * value**2).sum(1) / counts.sum(1) - mean**2).clamp_min(0).sqrt()
    std = torch.where(std < 1e-6, torch.ones_like(std), std)
    return [round(v, 6) for v in mean.tolist()], [round(v, 6) for v in std.tolist()]


def _restore(
    run: RunDir,
    splits: Splits,
    model: SplitModel,
    average: Any,
    memory: Any,
    optimizer: Any,
    schedule: Any,
    scaler: Any,
    processes: World,
    restore: Callable[[Any, Any, Any, Any], None] | None,
) -> TrainState:
    state, note = run.load_state()
    if state is None:
        if processes.is_main:
            run.truncate_log(0)  # stopped before its first checkpoint: everything is done again
        return TrainState()
    if note:
        _log.warning("%s: %s", run.path, note)
    with _of_this_training(run):
        return _take_up(state, run, splits, model, average, memory, optimizer, schedule, scaler, processes, restore)


@contextlib.contextmanager
def _of_this_training(run: RunDir) -> Generator[None, None, None]:
    """Raise UserError if a checkpoint, whole as it is, holds something else than this training's state."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"the checkpoint of {run.path} is not of this training ({type(error).__name__}: {reason}); start the run again "
            "elsewhere: clead train RECIPE --out DIR"
        ) from error


def _take_up(
    state: dict[str, Any],
    run: RunDir,
    splits: Splits,
    model: SplitModel,
    average: Any,
    memory: Any,
    optimizer: Any,
    schedule: Any,
    scaler: Any,
    processes: World,
    restore: Callable[[Any, Any, Any, Any], None] | None,
) -> TrainState:
    if state["data"] != splits.fingerprint:
        raise UserError(
            f"--resume continues on the same images; the data of {run.path} has changed since; restore it, or train anew"
        )
    for note in check_weights(model.state_dict(), state["model"], f"{run.path}/resume.state"):
        _log.warning("%s", note)
    if restore is None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        restore(model, optimizer, state["model"], state["optimizer"])
    if average is not None:
        average.load_state_dict(state["average"])
    if memory is not None:
        remembered = state["memory"]
        if isinstance(memory, PersistentDelta):
            remembered = {name: part[processes.local_slice(len(part))] for name, part in remembered.items()}
        memory.load_state_dict(remembered)
    schedule.load_state_dict(state["schedule"])
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    # train.device may change on resume: as many generators as there are here.
    for index, rng in enumerate(state["cuda_rng"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(rng, index)
    if processes.is_main:
        run.truncate_log(state["log_size"])
    return TrainState(**state["position"])


@contextlib.contextmanager
def _signals(alone: bool) -> Generator[Any, None, None]:
    """Turn Ctrl-C, SIGTERM and a hang-up into a flag that the loop reads between steps; a second Ctrl-C stops at once.

    One of several processes leaves SIGTERM as it is: torchrun sends it when another is lost, for which this one would wait.
    """
    numbers = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)
    if alone and hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
        numbers = (*numbers, signal.SIGHUP)
    caught: list[int] = []

    def remember(number: int, frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {number: signal.signal(number, remember) for number in numbers}
    except ValueError:  # not the main thread: signals stay with the caller
        yield lambda: False
        return
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
