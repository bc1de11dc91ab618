"""What an evaluation is to do: model, images, threat, attacks, and how the images are divided."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clead import __version__
from clead.attacks.capabilities import weakness_warning
from clead.attacks.objectives import NEED_FEATURES
from clead.attacks.runner import logits_of
from clead.config import Eval
from clead.errors import UserError
from clead.evaluation.correctness import MicrobatchLimit, to_float
from clead.evaluation.processes import Shard, folders, rank
from clead.evaluation.state import Part, ResumableResults
from clead.evaluation.suites import DRAWS, NamedAttack, describe, suite
from clead.evaluation.transfer import Transfer
from clead.interfaces import ImageSet, Threat
from clead.models.split import has_features, weights, wrapped
from clead.results.target import EvaluationTarget, digest
from clead.settings import Ratio
from clead.tasks import Task, task_name
from clead.tasks.classification import CLASSIFICATION
from clead.tasks.segmentation import SEGMENTATION
from clead.threats.geometry import contains
from clead.weights.files import fingerprint

MAP_POINTS = 300
"""Images whose features are drawn as a map."""


@dataclass(frozen=True)
class EvaluationOptions:
    """How an evaluation is carried out; the flags do not depend on it.

    Attributes:
        device: where to compute; that of the model's parameters if None.
        state: a directory for the finished parts: an evaluation that was killed goes on from there. Kept until the caller, who
            has written the record, discards it.
        shard: compute only every so manieth batch; ``state`` then holds the shard.
        merge: take the batches from the states of all shards, which lie beside ``state``.
        trust_state: continue states that another user or another machine made; the record says so.
        keep_adversarial: return every adversarial image, not only those for the pictures.
        show: whether to show progress.
    """

    device: torch.device | None = None
    state: Path | None = None
    shard: Shard | None = None
    merge: bool = False
    trust_state: bool = False
    keep_adversarial: bool = False
    show: bool = True


@dataclass(frozen=True)
class EvaluationPlan:
    """Everything that the parts of one evaluation share."""

    model: nn.Module
    images: ImageSet
    threat: Threat
    settings: Eval
    target: EvaluationTarget
    attacks: tuple[NamedAttack, ...]
    suite: str
    survivors_only: bool
    """Whether each attack is made only on the images that those before it left right."""
    device: torch.device
    batch_size: int
    keep_adversarial: bool
    microbatch: MicrobatchLimit = field(default_factory=MicrobatchLimit)

    @property
    def task(self) -> Task:
        """What is right."""
        return self.target.task

    @property
    def num_classes(self) -> int:
        """Number of classes of the data."""
        return len(self.target.classes)

    @property
    def num_pictures(self) -> int:
        """How many images pictures and maps are drawn of."""
        return min(max(self.settings.gallery, MAP_POINTS), len(self.images))

    @property
    def num_saved(self) -> int:
        """Adversarial images are kept for the first so many."""
        return len(self.images) if self.keep_adversarial else self.num_pictures

    @property
    def batches(self) -> int:
        """Number of batches."""
        return -(-len(self.images) // self.batch_size)

    @property
    def source(self) -> nn.Module | None:
        """The first model whose adversarial images are tried on this one."""
        return next((named.attack.source for named in self.attacks if isinstance(named.attack, Transfer)), None)

    @staticmethod
    def key(batch: int, stage: int) -> str:
        """Return the name of a finished part; ``stage`` −1 is the clean pass."""
        return f"{batch:06d}-{stage + 1:02d}"

    def keys(self) -> Iterator[str]:
        """Yield the names of all parts."""
        for batch in range(self.batches):
            yield from (self.key(batch, stage) for stage in range(-1, len(self.attacks)))

    def parts(self, store: ResumableResults, stage: int) -> list[Part]:
        """Return the finished parts of an attack, or of the clean pass, batch by batch."""
        return [store.parts[self.key(batch, stage)] for batch in range(self.batches)]

    def flags(self, store: ResumableResults, stage: int) -> Tensor:
        """Return which images are right after an attack, or when clean, (N,)."""
        return torch.cat([tensors["flags"] for tensors, _ in self.parts(store, stage)])

    @property
    def draws(self) -> int:
        """How often a randomised model is asked for one verdict."""
        return DRAWS if self.suite == "rand" else 1

    def where(self, batch: int) -> slice:
        """Return which images are in a batch."""
        return slice(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self.images)))

    def inputs(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Return float images in [0, 1] and labels, on the device."""
        return to_float(self.images.images[rows].to(self.device)), self.images.labels[rows].to(self.device)

    def contains(self, x_adv: Tensor, x: Tensor) -> bool:
        """Say whether all of ``x_adv`` is in the threat set around ``x`` and in the pixel box, to rounding; not if it is NaN."""
        return bool(contains(self.threat, x_adv, x).all())

    def header(self, shard: Shard) -> dict[str, Any]:
        """Return everything that decides the flags: a state is continued only by the same."""
        structure = hashlib.sha256(repr(self.model).encode()).hexdigest()[:8]  # which the weights do not tell
        return {
            "model": fingerprint(weights(self.model)) + structure,
            "images": digest(self.images),
            "threat": f"{self.threat.norm} {Ratio(self.threat.eps).text}",
            "suite": self.suite,
            "attacks": [{"name": named.name, **describe(named)} for named in self.attacks],
            "seed": self.settings.seed,
            "batch_size": self.batch_size,
            "precision": self.settings.precision,
            "images_kept": self.num_saved,
            "shard": f"{shard.index}/{shard.count}",
            "device": self.device.type,
            "clead": __version__,
            **({} if self.task == CLASSIFICATION else {"task": repr(self.task)}),
            **(
                {"eval.gallery": self.settings.gallery} if self.task == SEGMENTATION else {}
            ),  # of masks no more are kept
            # What neither weights nor structure tell: another constant in the model's code gives other answers.
            "answers": [
                f"{value:.2g}" for value in logits_of(self.model, self.inputs(slice(0, 1))[0]).flatten()[:10].tolist()
            ],
        }


def further_state(
    name: str,
    model: nn.Module,
    images: ImageSet,
    threat: Threat,
    settings: Eval,
    options: EvaluationOptions,
    **decides: Any,
) -> ResumableResults:
    """Return the state of what a task measures beside the suite: a folder ``name`` inside this process's state.

    It goes with that when the record is written; ``decides`` is what the result depends on besides the arguments.
    """
    header = {
        "model": fingerprint(weights(model)) + hashlib.sha256(repr(model).encode()).hexdigest()[:8],
        "images": digest(images),
        "threat": f"{threat.norm} {Ratio(threat.eps).text}",
        "steps": settings.steps,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "clead": __version__,
        **decides,
    }
    path = None if options.state is None else folders(options.state)[rank()] / name
    return ResumableResults(path, header, trust=options.trust_state)


def make_plan(
    model: nn.Module,
    images: ImageSet,
    threat: Threat,
    settings: Eval,
    target: EvaluationTarget,
    *,
    attacks: Sequence[NamedAttack] | None,
    more: Sequence[NamedAttack],
    options: EvaluationOptions,
) -> tuple[EvaluationPlan, list[str]]:
    """Return the plan of ``evaluate_model``, and what a record must say of it; raises UserError if nothing can be attacked."""
    if not len(images):
        raise UserError("there is no image to evaluate, got 0; give images (N, C, H, W) and labels (N,), N at least 1")
    model = wrapped(model)
    device = options.device or next((p.device for p in model.parameters()), torch.device("cpu"))
    notes: list[str] = []
    suite_name, survivors_only = "attacks", False
    if attacks is None:
        suite_name, survivors_only = settings.suite, settings.suite != "pgd"
        attacks, notes = suite(
            settings.suite, threat.norm, len(target.classes), steps=settings.steps, task=task_name(target.task)
        )
        attacks, left_out = _possible(attacks, model)
        notes += left_out
    notes += [warning for named in attacks if (warning := weakness_warning(named.attack, threat))]
    plan = EvaluationPlan(
        model,
        images,
        threat,
        settings,
        target,
        (*attacks, *more),
        suite_name,
        survivors_only,
        device,
        batch_size=settings.batch_size or _automatic_batch_size(images, device),
        keep_adversarial=options.keep_adversarial,
    )
    return plan, notes


def _possible(attacks: Sequence[NamedAttack], model: nn.Module) -> tuple[list[NamedAttack], list[str]]:
    """Return the attacks that can be made on ``model``, and a note on those that need features where none are known."""
    if has_features(model):
        return list(attacks), []
    left_out = [named.name for named in attacks if named.objective in NEED_FEATURES]
    notes = [
        f"no features of the model are known, so the attacks on them are left out: {', '.join(left_out)}; name the layer that "
        "makes the logits of features (B, D): --model.classifier NAME (in Python: clead.adapt)"
    ]
    possible = [named for named in attacks if named.name not in left_out]
    if attacks and not possible:
        raise UserError(*notes)
    return possible, notes if left_out else []


def _automatic_batch_size(images: ImageSet, device: torch.device) -> int:
    """Return how many images are attacked at once: enough to keep the device busy; halved where memory is short."""
    size = images.images[0].numel()
    if device.type == "cpu":
        return max(1, min(256, 256 * 3072 // size))
    return max(1, min(2048, 2048 * 3072 // size))
