"""The training step for a loop that is not ours: views, attack and loss of a batch; backward and optimiser are the caller's."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clead.attacks.runner import check_inputs, logits_of
from clead.config import RunConfig
from clead.config.schema import REGISTRY_GROUPS, chosen_name, plain, type_problem
from clead.data.loaders import _SECOND_VIEW, make_generator
from clead.data.views import Augmentation
from clead.errors import UserError
from clead.interfaces import Batch, StepOutput
from clead.methods import METHODS, check_task
from clead.models.external import io_of
from clead.models.modes import set_forward_mode
from clead.models.seeding import fork_rng
from clead.models.split import SplitModel, adapt, copied, require_features
from clead.settings import validated
from clead.tasks.classification import CLASSIFICATION, Classification
from clead.tasks.segmentation import SEGMENTATION
from clead.training.step import Step, threat_at
from clead.training.teacher import START
from clead.training.trainer import _PERTURBATION

_SHARE = 8  # images move by up to their height over this


def robust_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    method: Any,
    *,
    eps: float | str | None = None,
    norm: str = "linf",
    attack: Any = "pgd",
    steps: int | None = None,
    step_size: float | str | None = None,
    second_view: Tensor | None = None,
    generator: torch.Generator | int | None = None,
    task: Any = "classification",
    **settings: Any,
) -> StepOutput:
    """Attack a batch and return the loss to call ``backward`` on, and detached metrics: one training step of ``clead train``.

    For methods that look at logits only and keep nothing from step to step: ``RobustLoss`` is for all others. Under several
    processes wrap that.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K), of masks (B, K, H, W); learns in the mode that it is in, and is
            attacked in evaluation mode.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K); or soft labels, (B, K) float with rows of sum 1; of another task its targets, such as masks
            (B, H, W) of classes, 255 for void.
        method: a name of ``clead list``, such as trades, pgd_at, mart or standard; or its settings object.
        eps: radius in pixel units of [0, 1], a number or text such as ``"8/255"``; needed unless the method makes no attack.
        norm: linf, l2, l1 or l0.
        attack: the inner attack: a name, its settings object, or a dictionary of ``name`` and settings.
        steps: of the attack, if it has that setting.
        step_size: of the attack, if it has that setting.
        second_view: another augmentation of the same images, for methods that contrast it; None: these, shifted at random.
        generator: of the random starts, on the device of ``x``, or its seed; None: seeded by PyTorch's global one.
        task: what is right: multilabel, segmentation, or another name of ``clead list``, or its settings object.
        **settings: of the method, such as ``kl_weight=3``.

    Raises UserError on wrong settings, pixels outside [0, 1] or wrong labels.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(8, 1, 2, 2), torch.arange(8) % 3
    >>> loss, metrics = robust_loss(net, x, y, "trades", eps="8/255", kl_weight=3, generator=0)
    >>> loss.backward()
    >>> sorted(metrics)
    ['clean_accuracy', 'clean_cross_entropy', 'kl', 'robust_accuracy']
    """
    config = step_config(method, {"norm": norm, "eps": eps}, attack, settings, task, steps=steps, step_size=step_size)
    _check_bare(model)
    split = model if isinstance(model, SplitModel) else _LogitsOnly(model, config.task == SEGMENTATION)
    if lacking := _lacking(config, split, x):
        raise UserError(
            f"method {_name(config)} {lacking}: make step = clead.RobustLoss(model, {tuple(x.shape[1:])}, "
            f'"{_name(config)}", ...) once, and call step(x, y)'
        )
    if generator is None:
        generator = int(torch.randint(2**63 - 1, ()))
    if isinstance(generator, int):
        generator = torch.Generator(x.device).manual_seed(generator)
    batch = make_batch(config, x, y, second_view, generator)
    if not isinstance(config.task, Classification):
        _check_outputs(config, split, batch)
    return _step(config, split, None).forward(batch, 0.0, generator)


class RobustLoss(nn.Module):
    """``robust_loss`` with what has to be kept: the projection head, what the method remembers, and where the training stands.

    ``parameters()`` are those of the model, of the head and of the method, for the optimiser; ``state_dict()`` is all that a
    resumed training needs of it. The model is not copied: when training is done, use it as it is, without this.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K), of masks (B, K, H, W).
        shape: (C, H, W) of the images.
        method: as of ``robust_loss``, as the five that follow.
        eps: radius.
        norm: of the threat.
        attack: the inner attack.
        steps: of the attack.
        step_size: of the attack.
        view: the second view, of methods that contrast it: settings of ``data.view``, such as ``{"crop": 4, "flip": True}``; None:
            the image shifted at random by up to an eighth.
        teacher: a classifier that methods such as rslad learn from; None: the model as it is now. ``state_dict`` has it, too.
        seed: of the head, the random starts and the second views; with it each step's randomness is fixed.
        config: a run's configuration, as ``clead.load_recipe`` makes it, instead of all these: method, attack, threat with its
            eps_ramp, second view, attack_mode, forward_mode, task and seed are its own.
        total_steps: so many calls make the training, for methods that change in the course of it.
        task: what is right, as of ``robust_loss``.
        **settings: of the method.

    Attributes:
        model: the model with its features, and the head as ``model.projection``.
        replays: how many calls in a row are made with the same batch: 8 by default with method free, 1 with most others.
        steps: calls so far.

    Under several processes wrap this object: ``DistributedDataParallel(clead.RobustLoss(net, ...))``; images are contrasted with
    those of the same process.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> step = RobustLoss(net, (1, 2, 2), "clead", eps=0.1, attack="fgsm")
    >>> optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    >>> loss, metrics = step(torch.rand(8, 1, 2, 2), torch.arange(8) % 3)
    >>> loss.backward(); optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, int, int],
        method: Any = None,
        *,
        eps: float | str | None = None,
        norm: str = "linf",
        attack: Any = "pgd",
        steps: int | None = None,
        step_size: float | str | None = None,
        view: Augmentation | Mapping[str, Any] | None = None,
        teacher: nn.Module | None = None,
        seed: int = 0,
        config: RunConfig | None = None,
        total_steps: int | None = None,
        task: Any = "classification",
        **settings: Any,
    ) -> None:
        super().__init__()
        given = (eps, norm, attack, steps, step_size, view, seed, task, settings)
        defaults = (None, "linf", "pgd", None, None, None, 0, "classification", {})
        if (method is None) == (config is None) or (config and given != defaults):
            raise UserError(
                "what a step does must be said once; give either a method with its options, such as "
                '"trades", eps="8/255", or config=... alone'
            )
        if config is None:
            inner = {"steps": steps, "step_size": step_size}
            config = step_config(method, {"norm": norm, "eps": eps}, attack, settings, task, **inner)
        else:
            _check_one_step(config)
            check_task(config.method, config.task)
            view, seed = config.data.view, config.train.seed
        _check_bare(model)
        if config.method.uses_stored:
            raise UserError(
                f"method {_name(config)} attacks the whole training set before the first step; use clead train, or another method"
            )
        self.config, self.seed, self.total_steps, self.steps = config, seed, total_steps, 0
        if given[5] is not None and not config.method.uses_second_view:
            raise UserError(f"view: method {_name(config)} looks at no second view, got {view}; leave it out")
        self.view = validated(Augmentation, dict(view), "view") if isinstance(view, Mapping) else view
        if total_steps is None and (
            config.train.eps_ramp[1]
            or getattr(config.method, "reweight", 0)
            or config.method.changes_over_training
            or (self.view and self.view.anneal)
        ):
            raise UserError(
                "total_steps: is required where the radius, the weights of the terms or the views change; give it"
            )
        self.model = adapt(model, sample_shape=shape)
        if config.method.uses_features:
            require_features(self.model, shape, f"method {_name(config)}")
        if config.method.uses_embedding and self.model.projection is None:
            self.model.add_projection(config.method.embedding_dim, seed=seed)
        self.teacher: SplitModel | None = None
        if config.method.needs_teacher:
            self.teacher = copied(self.model if teacher is None else adapt(teacher, sample_shape=shape))
            self.teacher.eval().requires_grad_(False)
        elif teacher is not None:
            raise UserError(f"teacher: method {_name(config)} has no use for one; leave it out")
        if config.method.remembers_images:
            raise UserError(
                f"recipe: method {_name(config)} has to know the training images, and a step sees a batch; "
                "use clead train, or take another method: --method.name n_fgsm"
            )
        self.state = config.method.state(self.model, shape)

    @property
    def replays(self) -> int:
        """How many calls in a row are made with the same batch."""
        return self.config.method.replays

    def forward(self, x: Tensor, y: Tensor | None = None, *, second_view: Tensor | None = None) -> StepOutput:
        """Return the loss to call ``backward`` on and detached metrics; counts a step.

        Args:
            x: (B, C, H, W) float in [0, 1].
            y: (B,) int64 in [0, K), or soft labels, (B, K) float; of another task its targets; None for methods that look at no
                label (acl).
            second_view: another augmentation of the same images; None: made of ``x`` as ``view`` says.
        """
        if y is None and self.config.method.uses_classifier:
            raise UserError(f"method {_name(self.config)} needs labels; give step(x, y)")
        config, progress = self.config, min(self.steps / self.total_steps, 1.0) if self.total_steps else 0.0
        if config.train.forward_mode != "train":
            set_forward_mode(self.model, config.train.forward_mode)
        y = torch.zeros(len(x), dtype=torch.int64, device=x.device) if y is None else y
        if second_view is None and self.view is not None and config.method.uses_second_view:
            drawn = make_generator(x.device, self.seed, 0, self.steps, _SECOND_VIEW)
            second_view = self.view(x, generator=drawn, strength=self.view.strength(progress))
        generator = make_generator(x.device, self.seed, self.steps, _PERTURBATION)
        batch = make_batch(config, x, y, second_view, generator)
        if not self.steps and config.method.uses_classifier:
            _check_outputs(config, self.model, batch)
        step = _step(config, self.model, self.state, self.teacher)
        output = step.forward(batch, progress, generator, threat_at(config, progress))
        self.steps += 1
        return output

    def get_extra_state(self) -> Tensor:
        """Return what ``state_dict`` has beside tensors: the count of steps."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Take up the count of steps."""
        self.steps = int(state)


class _LogitsOnly(SplitModel):
    """A user's module, untouched, for methods that never look at the features."""

    has_features = False

    def __init__(self, module: nn.Module, per_pixel: bool) -> None:
        super().__init__(0, 0)
        self.module, self.io = module, io_of(module)
        self.io.per_pixel = per_pixel

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.io(self.module, x)
        return logits, logits


def step_config(
    method: Any,
    threat: dict[str, Any],
    attack: Any,
    settings: dict[str, Any],
    task: Any = "classification",
    **inner: Any,
) -> RunConfig:
    """Return the configuration that a step goes by; raises UserError that lists every problem.

    Args:
        method: its name or settings object.
        threat: norm and eps.
        attack: a name, settings object or dictionary.
        settings: of the method.
        task: a name or settings object.
        **inner: settings of the attack; those that are None are left out.
    """
    tree = {
        "data": {"name": "digits"},  # none is loaded
        "train": {"epochs": 1, "teacher": START if _needs_teacher(method) else None},
        "threat": {key: value for key, value in threat.items() if value is not None},
        "attack": _tree("attack", attack) | {key: value for key, value in inner.items() if value is not None},
        "method": _tree("method", method) | settings,
        "task": _tree("task", task),
    }
    config = RunConfig.from_dict(tree)
    check_task(config.method, config.task, lambda key, value: f"{'method' if key == 'name' else key}={value!r}")
    if threat["eps"] is None and config.method.uses_attack:
        raise UserError('eps: is required, in pixel units of [0, 1]; give such as eps="8/255"')
    return config


def make_batch(
    config: RunConfig,
    x: Tensor,
    y: Tensor,
    second_view: Tensor | None,
    generator: torch.Generator,
) -> Batch:
    """Return images, labels and the second view, if the method wants one, as a batch; raises UserError if they are not valid.

    A second view that is not given is the image, shifted at random.
    """
    one_class = isinstance(config.task, Classification)
    soft = y if one_class and isinstance(y, Tensor) and y.dim() == 2 and y.is_floating_point() else None
    labels = y if soft is None else CLASSIFICATION.predict(soft)
    if not one_class and isinstance(y, Tensor):
        labels = config.task.as_target(y, len(x))
    check_inputs(x, labels, task=config.task)
    if soft is not None and not torch.allclose(soft.sum(1), soft.new_ones(()), atol=1e-3):
        raise UserError("soft labels must have rows of sum 1; give y.softmax(1), or class numbers of shape (B,)")
    if not config.method.uses_second_view:
        if second_view is not None:
            raise UserError(f"second_view: method {_name(config)} looks at none; leave it out")
    elif second_view is None:
        second_view = Augmentation(crop=max(1, x.shape[2] // _SHARE))(x, generator=generator)
    elif second_view.shape != x.shape:
        raise UserError(
            f"second_view must have the shape of x, {tuple(x.shape)}, got {tuple(second_view.shape)}; give one of each image"
        )
    return Batch(x, labels, second_view, soft_labels=soft)


def _check_outputs(config: RunConfig, model: SplitModel, batch: Batch) -> None:
    """Raise UserError unless what the model returns and the targets belong together, by a forward of one image."""
    with fork_rng(0):
        config.task.check(logits_of(model, batch.images[:1]), batch.labels)


def _step(config: RunConfig, model: SplitModel, state: nn.Module | None, teacher: SplitModel | None = None) -> Step:
    scaler = torch.amp.GradScaler(enabled=False)
    return Step(config, model, state, contextlib.nullcontext(), scaler, teacher=teacher)


def _tree(group: str, value: Any) -> dict[str, Any]:
    """Return a choice and its settings as a configuration has them."""
    key = REGISTRY_GROUPS[group][1]
    if isinstance(value, str):
        return {key: value}
    if not isinstance(value, Mapping) and (problem := type_problem(group, value)):
        raise UserError(f"{group}: {problem}; give one, or a name of clead list")
    return dict(value) if isinstance(value, Mapping) else {**chosen_name(group, value), **plain(value)}


def _needs_teacher(method: Any) -> bool:
    return (
        isinstance(method, str)
        and method in METHODS.names()
        and METHODS.get(method).needs_teacher
        or bool(getattr(method, "needs_teacher", False))
    )


def _name(config: RunConfig) -> str:
    return chosen_name("method", config.method)["name"]


def _lacking(config: RunConfig, model: SplitModel, x: Tensor) -> str:
    """Say what a step of this method needs that a function cannot keep or know; nothing if there is no such thing."""
    method = config.method
    if method.uses_embedding:
        return "trains a projection head"
    if method.needs_teacher:
        return "learns from a teacher"
    if method.uses_features and not model.has_features:
        return "looks at the features"
    return "" if method.state(model, tuple(x.shape[1:])) is None else "remembers something from step to step"


def _check_one_step(config: RunConfig) -> None:
    """Raise UserError for what a configuration asks of more than one step's loss."""
    train = config.train
    given = {"awp": train.awp, "unfreeze": train.unfreeze, "trainable classifier": train.trainable == "classifier"}
    problems = [f"train.{key}" for key, value in given.items() if value] + ["stages"] * bool(config.stages)
    if problems:
        raise UserError(f"{', '.join(problems)}: is no part of one step; leave it out, or use clead train")


def _check_bare(model: nn.Module) -> None:
    """Raise UserError for a model in data parallelism, whose gradients would not be averaged."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        kind = type(model).__name__
        raise UserError(
            f"model is wrapped in {kind}, which would not see the attack; wrap the step: {kind}(clead.RobustLoss(net, ...))"
        )
