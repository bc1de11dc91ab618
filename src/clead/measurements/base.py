"""What a measurement is: frozen settings that are run on a model, and a result that can be printed, kept and drawn.

Each leaves one JSON file, whole or not there, and is continued after a kill.
"""

from __future__ import annotations

import abc
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator
from torch import nn

from clead.atomic_io import write_atomically
from clead.errors import UserError, memory_of
from clead.evaluation.state import ResumableResults, discard
from clead.interfaces import ImageSet, Splits, Threat
from clead.measurements import MEASUREMENTS
from clead.models.split import weights
from clead.results.provenance import command, environment
from clead.results.record import Estimate, EvaluatedData, EvaluatedModel, RecordModel, ThreatModel
from clead.results.section import DistanceCurves, Section
from clead.results.target import EvaluationTarget
from clead.settings import Ratio
from clead.weights.files import fingerprint

if TYPE_CHECKING:
    from rich.table import Table as TerminalTable

    from clead.config import RunConfig

SCHEMA_VERSION = 2  # 1 wrote flags as lists of true and false


@dataclass(frozen=True)
class MeasurementTarget:
    """What is measured, and where.

    Attributes:
        model: takes pixels in [0, 1], returns logits (B, K).
        images: what is measured; all of them.
        splits: the data that ``images`` are of; its other images may be fitted on.
        threat: norm and radius.
        seed: of all randomness.
        device: where to compute.
        batch_size: images per forward pass.
        steps: of attacks, or None: each attack's own.
        about: names and fingerprints for the record.
        labels: how many labels of the training images are known, and how many are wrong.
        notes: what a reader must know of the images and weights.
        show: whether to show progress.
    """

    model: nn.Module
    images: ImageSet
    splits: Splits
    threat: Threat
    seed: int
    device: torch.device
    batch_size: int
    steps: int | None
    about: EvaluationTarget
    labels: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    show: bool = True

    @property
    def num_classes(self) -> int:
        """Number of classes of the data."""
        return len(self.splits.classes)

    def computation(self, state: ResumableResults) -> Computation:
        """Return how it is computed, with what is finished in ``state``."""
        return Computation(self.batch_size, self.seed, self.device, state, self.show)


@dataclass(frozen=True)
class Computation:
    """How a measurement is computed.

    Attributes:
        batch_size: images, or noisy copies of one, per forward pass.
        seed: of all randomness.
        device: where to compute; that of the model's parameters if None.
        state: keeps what is finished: a call that was stopped goes on from there. By default nothing is kept.
        show: whether to show progress.
    """

    batch_size: int = 256
    seed: int = 0
    device: torch.device | None = None
    state: ResumableResults = field(default_factory=lambda: ResumableResults(None, {}))
    show: bool = True

    def device_of(self, model: nn.Module) -> torch.device:
        """Return ``device``, or that of the model's parameters."""
        return self.device or next((p.device for p in model.parameters()), torch.device("cpu"))

    @property
    def seconds(self) -> float:
        """What the finished parts took."""
        return self.state.seconds


class Result(RecordModel, abc.ABC):
    """What a measurement found: plain data that can be printed and drawn."""

    @abc.abstractmethod
    def table(self, record: MeasurementRecord) -> TerminalTable:
        """Return the table for the terminal."""

    @abc.abstractmethod
    def sentence(self, record: MeasurementRecord) -> str:
        """Return one sentence that can be quoted, with the images that it is about."""

    @classmethod
    def section(cls, measured: Sequence[Measured]) -> Section | None:
        """Return the section of a report on runs with such a result, at least one; None: it has none of its own."""
        return None

    def distance_curves(self) -> DistanceCurves | None:
        """Return how far each image is from a wrong answer, if that was measured: the report draws it against the radius."""
        return None


class Measurement(abc.ABC):
    """The settings of a measurement: its fields are options of its command and keywords of ``clead.measure``.

    The first paragraph of a class's docstring is the command's help.
    """

    result: ClassVar[type[Result]]
    """What ``run`` returns, and what the JSON file is read as."""
    tasks: ClassVar[tuple[str, ...]] = ()
    """The tasks that it knows beside classification and its kinds, by name."""
    keys: ClassVar[tuple[str, ...]] = ("eval.batch_size",)
    """Groups and keys of the configuration that matter, besides those of data, images, weights, seed and device."""
    images: ClassVar[int | None] = None
    """So many images are measured if ``eval.images`` is not given; None: all."""
    batch_size: ClassVar[int] = 256
    """If ``eval.batch_size`` is not given."""
    steps: ClassVar[int | None] = None
    """If ``eval.steps`` is not given; only where ``keys`` names it."""
    other_classes: ClassVar[bool] = False
    """Whether the data may be of other classes than the run's."""
    validation_images: ClassVar[str] = ""
    """What they are used for, such as ``choose C``: then only test images can be measured. Nothing: any split can be."""

    @abc.abstractmethod
    def run(self, target: MeasurementTarget, state: ResumableResults) -> Result:
        """Measure; what ``state`` has already is not computed again, and what is finished is saved there."""

    @property
    def kind(self) -> str:
        """Name of the JSON file without its suffix: the registered name, maybe with more after a hyphen."""
        return next(name for name, cls in MEASUREMENTS.items() if cls is type(self))

    def decides(self, target: MeasurementTarget) -> dict[str, Any]:
        """Return what decides the result, besides model, images, threat, seed and device, as plain data."""
        steps = {"steps": target.steps} if "eval.steps" in self.keys else {}
        return {**plain_settings(self), **steps, "batch_size": target.batch_size}

    def cautions(self, config: RunConfig) -> list[str]:
        """Return what a user should know of a run of this configuration before the work begins."""
        return []


def plain_settings(settings: Any) -> dict[str, Any]:
    """Return frozen settings as plain data; fractions keep how they were written."""
    values = {each.name: getattr(settings, each.name) for each in fields(settings)}
    return {
        key: value.text if isinstance(value, Ratio) else list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
    }


def measurement_class(kind: str) -> type[Measurement]:
    """Return the class of a JSON file's kind, such as ``certify`` or ``attack-patch``; raises UserError if there is none."""
    return MEASUREMENTS.get(kind.partition("-")[0])


class MeasurementRecord(RecordModel):
    """A result with what it must carry to be believed and obtained again.

    ``settings`` are those of the command, ``threat`` is None where none is involved; ``seconds`` counts the work that was done
    before an interruption too.
    """

    schema_version: Literal[1, 2] = SCHEMA_VERSION
    kind: str
    run: str
    created: str
    command: str
    seed: int
    settings: dict[str, Any]
    model: EvaluatedModel
    data: EvaluatedData
    threat: ThreatModel | None
    result: SerializeAsAny[Result]
    notes: list[str] = Field(default_factory=list)
    versions: dict[str, str]
    seconds: float

    @field_validator("result", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        return measurement_class(info.data.get("kind", "")).result.model_validate(value)

    @property
    def about(self) -> str:
        """Name of the run and its images, such as ``net, 500 test images``: how a sentence begins."""
        return f"{self.run}, {self.data.n} {self.data.split} images"


class Measured(NamedTuple):
    """What a section is given of one run: its place in the report, which decides its colour, its name there, its record."""

    index: int
    name: str
    record: MeasurementRecord


def new_table(record: MeasurementRecord, what: str, *columns: str) -> TerminalTable:
    """Return an empty table for the terminal, titled by run, images and ``what``; the first column is of text."""
    from rich.table import Table

    table = Table(title=f"{record.run}: {record.data.n} {record.data.split} images, {what}", caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def cells(estimate: Estimate) -> tuple[str, str]:
    """Return a fraction and its interval, as a row of the terminal's table shows them."""
    return f"{estimate.accuracy:.2%}", span(estimate)


def span(estimate: Estimate) -> str:
    """Return the 95 % interval for the terminal."""
    return f"{estimate.low:.1%} – {estimate.high:.1%}"


@memory_of("the measurement", "eval.batch_size", "eval.images")
def measure_target(
    measurement: Measurement, target: MeasurementTarget, path: Path, *, fresh: bool, trust_state: bool = False
) -> MeasurementRecord:
    """Run a measurement, write its record to ``path``, and only then drop its state, ``path`` with ``.state``.

    Args:
        measurement: its settings.
        target: what is measured.
        path: the JSON file.
        fresh: forget what a stopped call has left.
        trust_state: continue a state that another user or another machine made.

    Raises UserError if the state is of other settings, another model or other images.
    """
    threat = None
    if "threat" in measurement.keys:
        eps = Ratio(target.threat.eps)
        threat = ThreatModel(norm=target.threat.norm, eps=float(eps), eps_text=eps.text)
    model = EvaluatedModel(
        name=target.about.model,
        parameters=sum(p.numel() for key, p in target.model.named_parameters() if not key.startswith("projection.")),
        weights=target.about.weights,
        fingerprint=fingerprint(weights(target.model)),
    )
    data = target.about.evaluated_data(target.images)
    settings = measurement.decides(target)
    header = {
        "kind": measurement.kind,
        "model": model.fingerprint,
        "structure": hashlib.sha256(repr(target.model).encode()).hexdigest()[:8],  # which the weights do not tell
        "images": data.images,
        "data": data.fingerprint,
        "threat": None if threat is None else f"{threat.norm} {threat.eps_text}",
        "seed": target.seed,
        "device": target.device.type,
        **settings,
    }
    state = ResumableResults(path.with_suffix(".state"), header, trust=trust_state)
    if fresh:
        discard(path.with_suffix(".state"))
    result = measurement.run(target, state)
    record = MeasurementRecord(
        kind=measurement.kind,
        run=target.about.name,
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        command=command(),
        seed=target.seed,
        settings=settings,
        model=model,
        data=data,
        threat=threat,
        result=result,
        notes=[*target.notes, *state.notes],
        versions=environment(),
        seconds=state.seconds,
    )
    write_atomically(path, record.model_dump_json(indent=1).encode())
    discard(path.with_suffix(".state"))
    return record


def check_classes(num_classes: int | None, logits: int) -> None:
    """Raise UserError if a model's logits are of another number than the data's classes; None: the data does not say."""
    if num_classes is not None and num_classes != logits:
        raise UserError(
            f"the model returns {logits} logits, the data has {num_classes} classes; give data of its classes"
        )
