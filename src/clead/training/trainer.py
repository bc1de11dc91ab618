"""The trainer: setup, then batch → method → backward → optimiser → log → validate → checkpoint until the last step."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_avg_fn

from clead.attacks.pgd import PGD
from clead.config import RunConfig
from clead.data.base import shuffle_if_sorted
from clead.data.channels import mean_std
from clead.data.label_sampling import for_method
from clead.data.loaders import Loader, ViewSettings, make_generator
from clead.devices import device_of, keep_freed_memory
from clead.distributed import (
    SlicedThreat,
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
from clead.interfaces import Batch, Splits, Threat
from clead.models.external import ModelError
from clead.models.modes import set_forward_mode
from clead.models.split import SplitModel, copied, weights
from clead.progress import progress
from clead.runs.directory import PROJECTION, RunDir
from clead.runs.resume import Checkpoints
from clead.tasks.classification import Classification
from clead.training.batch_statistics import measure_statistics
from clead.training.finite import REMEDY, NonFiniteLoss, check_loss, last_good, non_finite_gradient, non_finite_weights
from clead.training.freezing import depths, train_classifier_only, unfreeze
from clead.training.offline_adversaries import store_images
from clead.training.optim import make_optimizer, make_schedule, parameter_groups
from clead.training.overfitting import Cause, cause_of, collapsed, parted
from clead.training.signals import Interrupted, catch_signals
from clead.training.step import Step, cost_per_image, first_images, mean_output, microbatches, threat_at
from clead.training.teacher import load_teacher
from clead.training.tensorboard import tensorboard
from clead.weights.files import check_weights, save_weights

_log = logging.getLogger("clead")
LOG_STEPS = 10
_VALIDATION_SHARE = 0.05
_TICKS = 10_000  # of the clock, for the learning rate
_PERTURBATION = 7  # the stream of random starts, apart from the loader's streams
PARTS = ("data", "views", "loss", "backward", "optimiser")
"""What a step is made of, as ``clead train --profile`` names it."""
PRECISION = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AfterValidation = Callable[[float, float, float], None]
"""Is told of a validation: part of the training that lies behind, in (0, 1], clean accuracy, robust accuracy."""


@dataclass(frozen=True)
class Callbacks:
    """What is called after every step, and after every validation of a method that trains the classifier.

    An exception of theirs ends the training.
    """

    after_step: Callable[[], None] | None = None
    after_validation: AfterValidation | None = None


@dataclass
class TrainState:
    """Where a training stands; what resume needs besides tensors."""

    step: int = 0
    seconds: float = 0.0
    clock: float = 0.0
    validation_seconds: float = 0.0
    validated_at: float = 0.0
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
    cpu_seconds: float | None = None
    """CPU time of all processes and threads, if ``train.clock`` is cpu."""


def fit(
    config: RunConfig,
    splits: Splits,
    model: SplitModel,
    run: RunDir,
    *,
    resume: bool = False,
    show: bool = True,
    callbacks: Callbacks | None = None,
    stored: Path | None = None,
) -> TrainResult:
    """Train ``model`` in place and leave weights, metrics and a resume state in ``run``.

    Every batch, view and perturbation is a function of (seed, step), so a resumed run continues bit-identically on a CPU.

    Args:
        config: the run's.
        splits: the images.
        model: with its initial weights.
        run: the directory.
        resume: go on from the run's last checkpoint.
        show: show progress.
        callbacks: what is called meanwhile.
        stored: where images that are attacked before the first step are kept; None: ``RUN/stored``.

    Raises NonFiniteLoss, Interrupted (state saved), or UserError if a checkpoint does not fit.
    """
    device = local_device(device_of(config.train.device))
    world = init_world(device)
    several = world.world_size > 1
    with (
        raise_on_lost_worker(str(run.path)) if several else contextlib.nullcontext(),
        synchronised(model) if several and config.train.sync_batch_norm else contextlib.nullcontext(),
    ):
        trainer = Trainer(config, splits, model, run, world, device, callbacks or Callbacks())
        trainer.setup(resume=resume, show=show and world.is_main, stored=stored)
        return trainer.fit()


class Trainer:
    """Trains a model in place: ``setup``, then ``fit``, which repeats ``train_step``, ``validate`` and ``save_checkpoint``."""

    def __init__(
        self,
        config: RunConfig,
        splits: Splits,
        model: SplitModel,
        run: RunDir,
        world: World,
        device: torch.device,
        callbacks: Callbacks,
    ) -> None:
        self.config, self.settings = config, config.train
        self.splits, self.run, self.callbacks = splits, run, callbacks
        self.model, self.world, self.device = model, world, device
        self.whole_model = model
        """All weights, whatever the processes shard."""
        self.is_sharded = self.settings.shard and world.world_size > 1
        self.batch_images = min(config.data.batch_size, len(splits.train))
        self.state = TrainState()
        self.layout = torch.channels_last if self.settings.channels_last else torch.contiguous_format
        self.validation = shuffle_if_sorted(splits.val).subset(
            torch.arange(min(self.settings.validate_images, len(splits.val)))
        )
        self._unread: list[dict[str, Tensor]] = []
        self._recent: dict[str, float] = {}
        self._draw: Callable[[dict[str, Any]], None] | None = None

    # ---------------------------------------------------------------------------------------------------- setup

    def setup(self, *, resume: bool, show: bool, stored: Path | None = None) -> None:
        """Prepare model, batches and optimiser, and go on from the last checkpoint if ``resume``."""
        config, settings = self.config, self.settings
        _check_shares(config, self.world, self.batch_images)
        self.show = show
        if config.method.uses_embedding and self.model.projection is None:
            self.model.add_projection(config.method.embedding_dim, seed=settings.seed)
        self.model.to(device=self.device, memory_format=self.layout)  # ty: ignore[no-matching-overload]
        set_forward_mode(self.model, settings.forward_mode)
        adversaries = self._store_adversaries(self.run.path / "stored" if stored is None else stored)
        self._cpu_start = time.process_time()
        if settings.trainable == "classifier":
            train_classifier_only(self.model)
        self.loader = self._make_loader(adversaries)
        self.method_state = config.method.state(self.model, tuple(self.splits.train.images.shape[1:]))
        if self.method_state is not None:
            self.method_state.to(self.device)
        sample = first_images(self.loader.batch(0, 0), 2)
        self.teacher = load_teacher(config, self.model, self.splits)
        if self.teacher is not None:
            self.teacher.to(device=self.device, memory_format=self.layout)  # ty: ignore[no-matching-overload]
        self.cost = cost_per_image(config, self.model, sample, self.method_state, self.teacher)
        if self.method_state is not None and config.method.remembers_images:
            cast(Any, self.method_state).for_images(len(self.loader.labels))
        self._shard()
        self._plan_length()
        self._make_optimizer()
        torch.manual_seed(settings.seed)  # dropout and the like inside a user's model draw from the global generator
        if resume:
            self.load_checkpoint()
        if not self.state.step:
            self.state.seconds = self.state.clock = self.stored_seconds
        if settings.compile:
            self.model.compile()

    def _store_adversaries(self, folder: Path) -> Tensor | None:
        """Return the adversarial images that are made before the first step, if the method uses such; and note their cost."""
        self.stored_forwards, self.stored_seconds, images = 0.0, 0.0, None
        if not self.config.method.uses_stored:
            return None
        try:
            # Process 0 makes them, the others find them made, one after another.
            for turn in range(self.world.world_size):
                if turn == self.world.rank:
                    images, self.stored_forwards, self.stored_seconds = store_images(
                        self.config, self.splits, self.model, folder, device=self.device, show=self.show
                    )
                self.world.barrier()
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped while images were stored; continue with --resume --out {self.run.path}"
            ) from None
        return images

    def _make_loader(self, adversaries: Tensor | None) -> Loader:
        data, method = self.config.data, self.config.method
        return Loader(
            for_method(self.splits.train, method.uses_unlabelled, balanced=data.sampling == "balanced"),
            data.batch_size,
            device=self.device,
            seed=self.settings.seed,
            drop_last=True,
            views=ViewSettings(
                first=data.augment,
                second=data.view if method.uses_second_view else None,
                cutmix=data.cutmix,
                num_classes=len(self.splits.classes),
                stored=adversaries,
            ),
            world=self.world,
            microbatches=self.settings.accumulate,
        )

    def _shard(self) -> None:
        """Share weights, gradients and optimiser state out over the processes, if ``train.shard``."""
        if not self.settings.shard:
            return
        from clead.training import sharding  # takes a second to import

        sharding.check(self.config, self.method_state)
        if self.is_sharded:
            self.model = sharding.sharded(self.whole_model, self.world.world_size, self.device)
            self.whole_model.to("cpu" if not self.world.is_main else self.device)

    def _plan_length(self) -> None:
        """Set the number of steps, and how many lie between validations."""
        settings, n_train = self.settings, len(self.splits.train)
        self.steps_per_epoch = self.loader.steps_per_epoch
        if settings.minutes is not None:
            self.steps = 0  # nobody knows
            views = (self.config.data.augment, self.config.data.view)
            if self.config.method.replays > 1 and any(each is not None and each.anneal for each in views):
                raise UserError(
                    f"train.minutes: a batch that is replayed must not change with the clock, got {settings.minutes:g} with "
                    "data.augment.anneal or data.view.anneal; give --train.epochs instead"
                )
        elif settings.epochs is not None:
            images_seen = settings.epochs * (self.steps_per_epoch * self.batch_images)
            self.steps = max(1, round(images_seen / self.batch_images))
        else:
            images_seen = (settings.budget or 0) / self.cost * n_train
            self.steps = max(1, round(images_seen / self.batch_images))
        self.validate_every = max(1, round(settings.validate_every * self.steps_per_epoch))

    @property
    def progress(self) -> float:
        """The part of the training that lies behind, in [0, 1]."""
        if self.settings.minutes is not None:
            # Of the time that is left before the last validation.
            seconds = max(60 * self.settings.minutes - self.state.validation_seconds, 1e-9)
            return min(1.0, self.state.clock / seconds)
        return self.state.step / self.steps

    def _make_optimizer(self) -> None:
        """Make optimiser, schedule, loss scaler, weight average, and what all steps have in common."""
        settings, state = self.settings, self.method_state
        self.trainable_params = [
            *(p for p in self.model.parameters() if p.requires_grad or settings.trainable == "all"),
            *(p for p in (state.parameters() if state else ()) if p.requires_grad),
        ]
        optim = self.config.optim
        by_depth = settings.unfreeze or optim.encoder_lr != 1 or optim.first_layer_lr != 1
        depth_of = depths(self.model) if by_depth else {}
        self.depths = {parameter: depth for parameter, depth in depth_of.items() if parameter.requires_grad}
        groups = parameter_groups(self.trainable_params, self.depths, optim) if by_depth else self.trainable_params
        self.optimizer = make_optimizer(groups, optim)
        for group in self.optimizer.param_groups if self.is_sharded else ():
            group["fused"] = None  # knows no sharded weights
        self.schedule = make_schedule(self.optimizer, optim, self.steps or _TICKS)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "float16")
        self.average: AveragedModel | None = None
        if settings.ema:
            self.average = AveragedModel(copied(self.model), multi_avg_fn=self._move_average, use_buffers=True)
        elif settings.swa_start is not None:  # its multi_avg_fn refuses integer buffers
            self.average = AveragedModel(copied(self.model), avg_fn=get_swa_avg_fn(), use_buffers=True)
        lower = settings.precision != "float32"
        autocast = torch.autocast(self.device.type, dtype=PRECISION[settings.precision], enabled=lower)
        self.step = Step(self.config, self.model, state, autocast, self.scaler, self.world, self.teacher)

    # ------------------------------------------------------------------------------------------------ the loop

    def fit(self) -> TrainResult:
        """Train until the last step, or until validation has not improved for ``train.patience`` times."""
        state, single, keeps_memory = self.state, self.world.world_size == 1, False
        self._start = self._last_save = time.monotonic()
        self._seconds_before, self._clock_before = state.seconds, state.clock
        validated: dict[str, float] = {}
        log = tensorboard(self.run.path / "tensorboard", state.step) if self.world.is_main else contextlib.nullcontext()
        minutes = self.settings.minutes
        whole, done = (self.steps, state.step) if minutes is None else (round(60 * minutes), state.clock)
        bar = progress(f"train {self.config.name}", whole, done=done, show=self.show)
        with catch_signals(single) as interrupted, log as self._draw, bar as tick:
            while self.progress < 1 and not state.stopped_early:
                stop, checkpoint_due = self.train_step(interrupted())
                keeps_memory = keeps_memory or keep_freed_memory(self.device)
                advance = self._read_clocks()
                if self.callbacks.after_step is not None:
                    self.callbacks.after_step()
                finished = self.progress >= 1
                if finished:
                    self._average_the_last()
                due = finished or (state.step % self.validate_every == 0 and not self._validated_lately())
                if state.step % LOG_STEPS == 0 or due or stop or checkpoint_due:
                    self._read_metrics()
                if state.step % LOG_STEPS == 0 or finished:
                    self._log_training()
                if due:
                    validated = self.validate()
                    if minutes is not None:
                        advance += self._read_clocks(after_validation=True)
                tick(advance, **validated, **self._recent)
                if stop or (single and interrupted()):
                    self.save_checkpoint()
                    length = self.steps if minutes is None else f"as many as fit into {minutes:g} minutes"
                    raise Interrupted(
                        f"stopped at step {state.step} of {length}; continue with --resume --out {self.run.path}"
                    )
                if checkpoint_due and not finished and not state.stopped_early:
                    self.save_checkpoint()
                    self._last_save = time.monotonic()
        self.save_checkpoint()  # first: it refuses weights that are not finite
        return self._finish()

    def _read_clocks(self, *, after_validation: bool = False) -> float:
        """Note the time that is spent; return how far the training went on: one step, or so many seconds of ``train.clock``."""
        state, before = self.state, self.state.clock
        state.seconds = self._seconds_before + time.monotonic() - self._start
        if self.settings.minutes is None:
            return 1.0
        if self.settings.clock == "wall":
            state.clock = self.world.broadcast(state.seconds)
        else:
            mean = torch.tensor(time.process_time() - self._cpu_start, dtype=torch.float64)
            self.world.all_reduce_mean([mean])
            state.clock = self._clock_before + self.world.world_size * float(mean)
        if after_validation:
            state.validation_seconds = min(state.clock - before, state.validation_seconds or math.inf)
            state.validated_at = state.clock
        while self.schedule.last_epoch < int(self.progress * _TICKS):
            self.schedule.step()
        return state.clock - before

    def _validated_lately(self) -> bool:
        """Return whether a validation now would take more than its share of the time, if the length is one in minutes."""
        trained = self.state.clock - self.state.validated_at
        return self.settings.minutes is not None and trained < self.state.validation_seconds / _VALIDATION_SHARE

    def train_step(self, interrupted: bool) -> list[bool]:
        """Take one step; return whether to stop, and whether a checkpoint is due, which all processes agree on."""
        state, settings = self.state, self.settings
        with record_function("data"):
            batch = self._next_batch()
        self.optimizer.zero_grad(set_to_none=True)
        if settings.unfreeze:
            unfreeze(self.depths, self.progress, settings.unfreeze)
        outputs = []
        threats = self._threats(batch)
        for microbatch, threat in zip(microbatches(batch, settings.accumulate), threats, strict=True):
            generator = make_generator(self.device, settings.seed, state.step, _PERTURBATION)
            try:
                outputs.append(self.step.forward_backward(microbatch, self.progress, generator, threat))
            except ModelError as error:
                raise ModelError(f"{error} (batch of step {state.step}; {last_good(self.run)})") from error
        loss, metrics = mean_output(outputs)
        self._unread.append({"loss": loss.detach(), **metrics})
        on_cpu = self.device.type == "cpu"
        if on_cpu:  # on a GPU every reading waits for the device: see ``fit``
            self._read_metrics()
        if len(outputs) > 1:
            for parameter in self.trainable_params:
                if parameter.grad is not None:
                    parameter.grad /= len(outputs)
        late = time.monotonic() - self._last_save >= settings.checkpoint_seconds
        whole_params = [
            p for p in self.trainable_params if not hasattr(p, "to_local")
        ]  # sharded ones are averaged already
        flags = average_gradients(self.world, whole_params, [interrupted, late and self.world.is_main])
        # In float16 the scaler leaves such a step out; elsewhere one bad gradient would spoil every weight.
        check = on_cpu or state.step % LOG_STEPS == 0
        if check and not self.scaler.is_enabled() and (bad := non_finite_gradient(self.model, self.trainable_params)):
            raise NonFiniteLoss(
                f"the gradient became NaN or infinite at step {state.step} (first in {bad}); {last_good(self.run)}; {REMEDY}"
            )
        with record_function("optimiser"):
            if self.config.optim.clip_norm is not None:
                self.scaler.unscale_(self.optimizer)
                clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if settings.minutes is None:
                self.schedule.step()
        state.step += 1
        if self.average is not None and (settings.ema or self._averages_now()):
            self.average.update_parameters(self.model)
        return flags

    def _next_batch(self) -> Batch:
        """Return the batch of this step; a method may replay one for several steps."""
        replays = self.config.method.replays
        turn = self.state.step // replays
        progress = self.progress if self.settings.minutes is not None else turn * replays / self.steps
        batch = self.loader.batch(*divmod(turn, self.steps_per_epoch), progress)
        if not self.settings.channels_last:
            return batch
        images = {name: getattr(batch, name) for name in ("images", "second_view", "stored")}
        return batch._replace(
            **{name: each.contiguous(memory_format=self.layout) for name, each in images.items() if each is not None}
        )

    def _threats(self, batch: Batch) -> list[Threat]:
        """Return the threat of each microbatch: random starts are drawn for the whole batch, whoever has which of its images."""
        count, threat = self.settings.accumulate, threat_at(self.config, self.progress)
        if self.world.world_size * count == 1:
            return [threat]
        whole = len(batch.labels) * self.world.world_size
        positions = self.loader.positions(whole).chunk(count)
        return [cast(Threat, SlicedThreat(threat, each, whole)) for each in positions]

    def _move_average(self, averaged: Any, current: Any, _: Any) -> None:
        """Move the average towards the weights: early by so much that a short training's first weights do not stay in it."""
        taken = self.state.step - 1
        get_ema_multi_avg_fn(min(self.settings.ema, (1 + taken) / (10 + taken)))(averaged, current, taken)

    def _averages_now(self) -> bool:
        """Say whether stochastic weight averaging takes the weights in: after every epoch from its start on, and at the end."""
        step, start = self.state.step, self.settings.swa_start or 0
        begun = step >= start * self.steps if self.steps else self.progress >= start
        return step == self.steps or (step % self.steps_per_epoch == 0 and begun)

    def _average_the_last(self) -> None:
        """Take the last weights of a training by the clock into the mean: their step did not know that it was the last."""
        by_the_clock = self.settings.minutes is not None and self.settings.swa_start is not None
        if by_the_clock and self.average is not None and self.state.step % self.steps_per_epoch:
            self.average.update_parameters(self.model)

    # ------------------------------------------------------------------------------------------------- metrics

    def _read_metrics(self) -> None:
        """Read the metrics of the steps since the last call; raises NonFiniteLoss if a loss is not finite."""
        state, first = self.state, self.state.step - len(self._unread)
        if self._unread and self.device.type == "cpu":
            first = state.step  # read before the step is counted
        for offset, metrics in enumerate(self._unread):
            # One transfer for all metrics: synchronises the device.
            read = dict(
                zip(metrics, torch.stack([v.detach().double() for v in metrics.values()]).tolist(), strict=True)
            )
            check_loss(first + offset, read, self.run)
            for name, value in read.items():
                state.sums[name] = state.sums.get(name, 0.0) + value
            state.sum_steps += 1
            self._recent = {k: read[k] for k in ("robust_accuracy", "clean_accuracy", "loss") if k in read}
        self._unread.clear()

    def _log_training(self) -> None:
        """Log the means over the steps since the last line."""
        state = self.state
        recent = {name: total / state.sum_steps for name, total in state.sums.items()}
        state.robust_training = recent.get("robust_accuracy", math.nan)
        state.robust_images = state.sum_steps * self.batch_images
        state.sums, state.sum_steps = {}, 0
        self._log("train", learning_rate=float(self.schedule.get_last_lr()[0]), **recent)

    def _log(self, kind: str, **figures: float | str) -> None:
        if self._draw is None:
            return
        where = {
            "step": self.state.step,
            "epoch": round(self.state.step / self.steps_per_epoch, 4),
            "seconds": round(self.state.seconds, 2),
            "forward_equivalents": round(self.forward_equivalents, 2),
        }
        line = {"kind": kind, **where, **figures}
        self.run.log(line)
        if kind != "warning":
            self._draw(line)

    @property
    def forward_equivalents(self) -> float:
        """What was spent so far, in forward passes per training image."""
        spent = self.state.step * self.batch_images * self.cost / len(self.splits.train)
        return self.stored_forwards + spent

    # ---------------------------------------------------------------------------------------------- validation

    def validate(self) -> dict[str, float]:
        """Measure the model on validation images, keep the best weights, and return what the progress bar shows."""
        state, settings, eval_model = self.state, self.settings, self.eval_model()
        if settings.batch_norm_images:
            images = shuffle_if_sorted(self.splits.train.labelled_subset())
            images = images.subset(torch.arange(min(settings.batch_norm_images, len(images))))
            measure_statistics(
                eval_model,
                images,
                self.config.threat,
                batch_size=self.batch_images,
                seed=settings.seed,
                device=self.device,
                task=self.config.task,
            )
        if self.config.method.uses_classifier:
            figures = self._accuracies(eval_model)
            clean, robust = figures["clean_accuracy"], figures["robust_accuracy"]
            shown = {"validation_robust": robust, "validation_clean": clean}
            shown |= {f"validation_{name}": value for name, value in figures.items() if name.endswith("miou")}
            # A method that never sees an attack is selected by clean accuracy: by robust accuracy its least trained weights win.
            score = robust if self.config.method.uses_attack else clean
        else:
            train = self.splits.train.labelled_subset()
            knn = (
                neighbours_accuracy(eval_model, train, self.validation, device=self.device)
                if self.world.is_main
                else 0.0
            )
            score = self.world.broadcast(knn)
            self._log("validation", knn_accuracy=score, images=len(self.validation))
            shown = {"validation_knn": score}
        state.validations_since_best += 1
        if score > state.best:
            state.validations_since_best = 0
        if score >= state.best:  # of equals the later one, which has learnt longer
            state.best, state.best_step = score, state.step
            if self.world.is_main:
                self._save_weights("best", eval_model)
        patience = settings.patience
        state.stopped_early = patience is not None and state.validations_since_best >= patience
        return shown

    def _accuracies(self, eval_model: SplitModel) -> dict[str, float]:
        """Return what ``accuracy_under_attack`` says of the validation images; warn if training batches are far more robust."""
        config = self.config
        attack = PGD(steps=self.settings.validate_steps, step_schedule="linear")
        figures = self.world.broadcast(
            accuracy_under_attack(
                eval_model,
                self.validation,
                config.threat,
                attack,
                "margin",
                seed=self.settings.seed,
                device=self.device,
                task=config.task,
            )
            if self.world.is_main
            else {}
        )
        self._log("validation", **figures, images=len(self.validation))
        robust = figures["robust_accuracy"]
        if self.callbacks.after_validation is not None and self.world.is_main:
            self.callbacks.after_validation(self.progress, figures["clean_accuracy"], robust)
        if warning := self._overfitting_warning(robust, eval_model):
            kind, message = warning
            self._log("warning", message=message, cause=kind)
            if self.world.is_main:
                _log.warning(message)
        return figures

    def _overfitting_warning(self, robust: float, eval_model: SplitModel) -> tuple[str, str] | None:
        """Return the cause, and what to say, if robust accuracy on training batches and validation images parts; once for each."""
        state = self.state
        training, images = state.robust_training, state.robust_images
        if "robust_accuracy" in state.sums and math.isnan(training):  # validated before the first line of the log
            training, images = state.sums["robust_accuracy"] / state.sum_steps, state.sum_steps * self.batch_images
        lost = state.collapsed_at < 0 and collapsed(training, robust, state.best)
        if lost:
            state.collapsed_at = state.step
        if not (lost or parted(training, images, robust, len(self.validation))):
            return None
        state.partings += 1
        if not lost and state.partings & (state.partings - 1):  # measured at the 1st, 2nd, 4th, 8th … time
            return None
        cause = Cause("", "the model is spread over processes, so the cause was not measured", {})
        if not isinstance(self.config.task, Classification):
            cause = Cause("", "the cause is measured where an image has one class", {})
        elif self.world.world_size == 1 and not self.settings.shard:
            cause = cause_of(self.model, eval_model, self.splits.train, self.config, self.device, training, robust)
        if cause.kind in state.warned and not lost:
            return None
        state.warned.append(cause.kind)
        figures = f"{training:.1%} on training batches, {robust:.1%} under multi-step validation PGD"
        if not lost:
            return cause.kind, f"robust accuracy parts at step {state.step}: {figures}: {cause.text}"
        best = ""
        if state.best > 0:
            best = f" (best {state.best:.1%} at step {state.best_step}; best.safetensors keeps those weights)"
        return cause.kind, f"robust accuracy has collapsed at step {state.step}: {figures}{best}: {cause.text}"

    def eval_model(self) -> SplitModel:
        """Return the model that is validated and kept: the average of the weights, once there is one."""
        if self.is_sharded:
            from clead.training import sharding

            sharding.gather(self.model, self.whole_model)
            return self.whole_model
        average = self.average
        if average is not None and (self.settings.ema or average.n_averaged > 0):
            return cast(SplitModel, average.module)
        return self.model

    # --------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self) -> None:
        """Write all that resume needs; raises NonFiniteLoss instead of keeping weights that are not finite."""
        self._read_metrics()
        model_state, optimizer_state = self._weights_and_optimizer()
        if broken := non_finite_weights(self.model):
            raise NonFiniteLoss(
                f"the weights became NaN or infinite by step {self.state.step} (first in {broken}); {last_good(self.run)}; "
                f"{REMEDY}"
            )
        method_state = None
        if self.method_state is not None:
            method_state = self.config.method.gather_state(self.method_state, self.world)
        if not self.world.is_main:
            return
        state = {
            "model": model_state,
            "average": None if self.average is None else self.average.state_dict(),
            "memory": method_state,
            "optimizer": optimizer_state,
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "position": dict(vars(self.state)),
            "log_size": self.run.log_size(),
            "data": self.splits.trained_on,
        }
        try:
            Checkpoints(self.run.path).save(state)
        except UserError as error:
            earlier = "none was before"
            if Checkpoints(self.run.path).exist():
                earlier = "the checkpoint before is kept, --resume continues from it"
            raise UserError(f"{error} (training stopped at step {self.state.step}; {earlier})") from error

    def _weights_and_optimizer(self) -> tuple[dict[str, Any], dict[str, Any]]:
        if not self.settings.shard:
            return self.model.state_dict(), self.optimizer.state_dict()
        from clead.training import sharding

        return sharding.states(self.model, self.optimizer)

    def load_checkpoint(self) -> None:
        """Take up the run's last checkpoint; without one the training begins anew."""
        saved, note = Checkpoints(self.run.path).load()
        if saved is None:
            if self.world.is_main:
                self.run.truncate_log(0)  # stopped before its first checkpoint: everything is done again
            return
        if note:
            _log.warning("%s: %s", self.run.path, note)
        with _of_this_training(self.run):
            self._take_up(saved)

    def _take_up(self, saved: dict[str, Any]) -> None:
        if saved["data"] != self.splits.trained_on:
            raise UserError(
                f"--resume continues on the same images; the data of {self.run.path} has changed since; restore it, or train anew"
            )
        for note in check_weights(self.model.state_dict(), saved["model"], f"{self.run.path}/resume.state"):
            _log.warning("%s", note)
        if self.settings.shard:
            from clead.training import sharding

            sharding.restore(self.model, self.optimizer, saved["model"], saved["optimizer"])
        else:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        if self.method_state is not None:
            self.method_state.load_state_dict(self.config.method.shard_state(saved["memory"], self.world))
        self.schedule.load_state_dict(saved["schedule"])
        self.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"])
        # train.device may change on resume: as many generators as there are here.
        for index, rng in enumerate(saved["cuda_rng"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(rng, index)
        if self.world.is_main:
            self.run.truncate_log(saved["log_size"])
        self.state = TrainState(**saved["position"])

    def _save_weights(self, name: str, model: SplitModel) -> None:
        metadata = {
            "classes": list(self.splits.classes),
            "shape": list(self.splits.train.images.shape[1:]),
            "mean_std": [*mean_std(self.splits)],
            "step": self.state.step,
            "validation_accuracy": self.state.best if name == "best" else None,
            "forward_equivalents_per_step_image": self.cost,
            "data_fingerprint": self.splits.fingerprint,
            "config": self.config.to_dict(),
        }
        save_weights(self.run.path / f"{name}.safetensors", weights(model), metadata)

    def _finish(self) -> TrainResult:
        """Write the last weights and return what the training reports."""
        state, final = self.state, self.eval_model()
        by_cpu = self.settings.minutes is not None and self.settings.clock == "cpu"
        if by_cpu:
            self._read_clocks()
        self.whole_model.to(self.device)
        if self.world.is_main:
            self._save_weights("last", final)
            if (head := final.projection) is not None:  # not deployed, but a training that starts from here takes it up
                save_weights(self.run.path / PROJECTION, head.state_dict(), {})
        self.world.barrier()
        return TrainResult(
            steps=state.step,
            epochs=state.step / self.steps_per_epoch,
            seconds=state.seconds,
            forward_equivalents=self.forward_equivalents,
            best_validation=state.best,
            best_step=state.best_step,
            stopped_early=state.stopped_early,
            collapsed_at=state.collapsed_at,
            cpu_seconds=state.clock if by_cpu else None,
        )


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


def _check_shares(config: RunConfig, world: World, batch_images: int) -> None:
    """Raise UserError unless a batch can be shared out."""
    accumulate = config.train.accumulate
    shares = world.world_size * accumulate
    if batch_images % shares:
        raise UserError(
            f"a batch of {batch_images} images cannot be shared out to {shares} equal parts ({world.world_size} processes, "
            f"train.accumulate {accumulate}); set --data.batch_size to a multiple of {shares}"
        )
    shared = config.data.labelled_share is not None or config.data.extra is not None
    if shares > 1 and shared and batch_images // shares < 2:
        raise UserError(
            f"a part of a batch must have at least 2 images, got {batch_images // shares}; take larger batches"
        )
    if accumulate > 1 and config.method.replays > 1:
        raise UserError(
            f"train.accumulate must be 1 where a method replays its batches, got {accumulate} with "
            f"{config.method.replays} replays; leave it out"
        )
