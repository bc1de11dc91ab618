"""The JSON record of one evaluation: what a figure in a table or report must carry to be believed and obtained again.

Accuracies are fractions in [0, 1]; intervals are Wilson 95 %; per-image flags are in the order of the evaluated images.
Records of the same ``data.images``, norm and eps can be paired image by image (McNemar).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, field_validator, model_validator

from clead.errors import printable
from clead.renamed import VALUES, current_field, old_names, warn_renamed

SCHEMA_VERSION = 3  # 2 wrote flags as lists of true and false


def _flags(value: Any) -> Any:
    """Return ``"0110"`` as a list of booleans, and a list as it is."""
    if isinstance(value, str):
        if set(value) - {"0", "1"}:
            raise ValueError("flags are a text of 0 and 1, a character per image")
        return [character == "1" for character in value]
    return value


Flags = Annotated[
    list[bool],
    BeforeValidator(_flags),
    PlainSerializer(lambda flags: "".join("01"[f] for f in flags), str, when_used="json"),
]
"""A flag per image, in their order; JSON has them as a text of 0 and 1."""


class RecordModel(BaseModel):
    """What a record or a part of one holds: immutable, nothing unknown, read from files with the old names of fields too."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _current_names(cls, stored: Any) -> Any:
        if not isinstance(stored, Mapping):
            return stored
        missing = cls.model_fields.keys() - stored.keys()
        return {current_field(missing, key): value for key, value in stored.items()}

    @field_validator("*", mode="after")
    @classmethod
    def _no_codes(cls, value: Any) -> Any:
        """Escape what would command a terminal: a record may come from elsewhere."""
        if isinstance(value, str):
            return printable(value)
        if isinstance(value, list) and value and isinstance(value[0], str):
            return [printable(each) for each in value]
        return value

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            """Return the field that had another name in version 0.1."""
            if (new := current_field(type(self).model_fields, name)) == name:
                return super().__getattr__(name)
            warn_renamed(f"{type(self).__name__}.{name}", new)
            return getattr(self, new)


class Estimate(RecordModel):
    """A fraction of n images with its Wilson 95 % interval; of masks a fraction of their pixels with one by bootstrap."""

    accuracy: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)
    n: int = Field(ge=1)


class ThreatModel(RecordModel):
    """The threat model; ``eps_text`` keeps how the radius was written, such as ``8/255``."""

    norm: str
    eps: float = Field(ge=0)
    eps_text: str


class EvaluatedModel(RecordModel):
    """Which model was attacked: ``fingerprint`` is a hex digest of its weights."""

    name: str
    parameters: int
    weights: str
    fingerprint: str


class EvaluatedData(RecordModel):
    """Which images were attacked: ``fingerprint`` digests the whole data set, ``images`` the evaluated ones.

    ``origin`` says what the test images are (``clead.interfaces.Splits``); ``skipped`` has one line for each file of the data set
    that was not read, ``"PATH: reason"``; of ``total`` images of the split the first ``n`` were evaluated.
    """

    name: str
    split: Literal["train", "val", "test"]
    n: int = Field(ge=1)
    classes: list[str]
    fingerprint: str
    images: str
    origin: Literal["test", "val", "train", "all"] = "test"
    skipped: list[str] = Field(default_factory=list)
    total: int | None = None

    @property
    def which(self) -> str:
        """Which images, such as ``first 1000 of 10000 test images of mnist``."""
        count = f"first {self.n} of {self.total}" if self.total is not None and self.total > self.n else f"{self.n}"
        kind = {"val": "validation", "train": "training"}.get(self.split, "test")
        return f"{count} {kind} images of {self.name}{f' ({self.caveat})' if self.caveat else ''}"

    @property
    def caveat(self) -> str:
        """What the test images are where the data has no test split, or nothing."""
        origins = {"val": "its validation split, it has no test split", "train": "set aside from its training images"}
        return origins.get(self.origin, "") if self.split == "test" else ""


class AttackResult(RecordModel):
    """One attack: ``attacked`` images were right before it, ``num_successes`` of them are wrong after it.

    In a suite whose attacks follow each other (all but ``pgd``) an attack meets the survivors of those before it, and ``robust``
    and ``flags`` are what is left after it; in ``pgd`` each attack meets all images that are right when clean.
    ``forwards`` and ``backwards`` are passes per evaluated image; ``max_distance`` is the size of the largest
    perturbation, measured again in the threat's norm. ``lost`` are the indices of images at which the attack met a gradient that
    is NaN or infinite: nothing is known of them, so they count as successes.
    """

    name: str
    settings: dict[str, Any]
    attacked: int
    num_successes: int
    robust: Estimate
    flags: Flags
    seconds: float
    forwards: float
    backwards: float
    max_distance: float
    lost: list[int] = Field(default_factory=list)


class CurvePoint(RecordModel):
    """Robust accuracy at another radius, for the curve against epsilon."""

    eps: float
    eps_text: str
    attack: str
    robust: Estimate


class ClassAccuracy(RecordModel):
    """Accuracy of the images of one class."""

    name: str
    n: int
    clean_accuracy: float
    robust_accuracy: float


class BalancedAccuracy(RecordModel):
    """Means of the accuracies per class, in which every class counts alike; n is the number of all images."""

    clean: Estimate
    robust: Estimate


class Check(RecordModel):
    """One sign of gradient masking: what was measured, whether it is as it should be, and what it means in plain words."""

    name: str
    passed: bool
    numbers: dict[str, float]
    explanation: str


class TransferResult(RecordModel):
    """Images that were made for another model, before this one was trained: no worst case, and no part of ``worst``.

    ``fooled`` is the fraction of them that the other model gets wrong, ``max_distance`` the size of the largest perturbation in the
    threat's norm, which may be beyond eps; ``robust`` and ``flags`` are of the first n evaluated images, right when clean and as
    stored.
    """

    name: Literal["stored images (transferred)"] = "stored images (transferred)"
    settings: dict[str, Any]
    fooled: float
    robust: Estimate
    flags: Flags
    max_distance: float


class Predictions(RecordModel):
    """What each evaluated image is taken for; numbers of classes, in the order of the images.

    ``attacked`` is the answer to the image of the first attack that broke it: of the true class's rivals the one with the largest
    logit. Where no attack did, and where the image is wrong when clean and was not attacked, it is the answer to the clean image.
    """

    labels: list[int]
    clean: list[int]
    attacked: list[int]


class Memory(RecordModel):
    """The most memory in use, in bytes: ``process``, all that it held since it began; ``device``, tensors on the GPU meanwhile.

    None where the system does not tell, and without a GPU. Of an evaluation that was continued or shared out: of its last process.
    """

    process: int | None
    device: int | None


class Metric(RecordModel):
    """A figure of a task beside the accuracies of images, as a fraction, clean and in the worst case.

    ``about`` says in a sentence what it counts; ``n`` is how many cases it is of. The intervals are 95 %, low and high, if there
    is a way to give them.
    """

    name: str
    about: str
    n: int
    clean: float | None
    robust: float | None
    clean_interval: tuple[float, float] | None = None
    robust_interval: tuple[float, float] | None = None


class ClassIou(RecordModel):
    """IoU of one class over all images, clean and in the worst case; None of a class that is in no mask and no answer."""

    name: str
    pixels: int
    clean: float | None
    robust: float | None


class MaskResult(RecordModel):
    """What masks have beside the share of right pixels, which is the record's accuracy; ``metrics`` has the mIoU.

    Attributes:
        size: height and width of the masks.
        void: pixels that count for nothing.
        attack_miou: mIoU under each attack alone, in their order.
        classes: IoU per class.
        clean: the pixels of each image: of each class that is there or predicted its number, right, predicted, true pixels, as text
            such as ``0 12 15 14, 3 8 9 8``.
        lowest_accuracy: the same after the attack that left the fewest right pixels of the image.
        lowest_miou: the same after the attack that was chosen for the image to lower the mIoU of all.
    """

    size: tuple[int, int]
    void: int
    attack_miou: list[float]
    classes: list[ClassIou]
    clean: list[str]
    lowest_accuracy: list[str]
    lowest_miou: list[str]


class Training(RecordModel):
    """What the training cost: ``forward_equivalents`` per training image (forward 1, backward to inputs 1, full backward 2)."""

    method: str
    epochs: float
    steps: int
    seconds: float
    forward_equivalents: float
    seed: int


class Record(RecordModel):
    """One model, one set of images, one threat: clean accuracy, each attack, and the worst case per image over all.

    ``task`` says what is right, and ``metrics`` are further figures of it. Of masks accuracies are shares of pixels with bootstrap
    intervals over images, there are no flags, and ``masks`` holds the rest.
    """

    schema_version: Literal[2, 3] = SCHEMA_VERSION
    run: str
    created: str
    command: str
    seed: int
    suite: str
    notes: list[str]
    model: EvaluatedModel
    data: EvaluatedData
    threat: ThreatModel
    clean: Estimate
    clean_flags: Flags
    worst: Estimate
    robust_flags: Flags
    attacks: list[AttackResult]
    curve: list[CurvePoint]
    checks: list[Check]
    per_class: list[ClassAccuracy]
    balanced: BalancedAccuracy | None = None
    training: Training | None
    transferred: TransferResult | None = None
    predictions: Predictions | None = None
    memory: Memory | None = None
    task: str = "classification"
    metrics: list[Metric] = Field(default_factory=list)
    masks: MaskResult | None = None
    versions: dict[str, str]
    seconds: float

    @field_validator("suite", mode="before")
    @classmethod
    def _current_suite(cls, name: Any) -> Any:
        return VALUES["eval.suite"].get(name, name) if isinstance(name, str) else name

    @property
    def clean_accuracy(self) -> float:
        """Fraction of the images classified right without an attack."""
        return self.clean.accuracy

    @property
    def robust_accuracy(self) -> float:
        """Fraction of the images classified right when clean and under every attack."""
        return self.worst.accuracy

    @property
    def robust(self) -> list[bool]:
        """Per image: classified right when clean and under every attack."""
        return self.robust_flags


__getattr__ = old_names(
    __name__,
    {
        "AttackPart": "AttackResult",
        "CheckPart": "Check",
        "ClassPart": "ClassAccuracy",
        "DataPart": "EvaluatedData",
        "MemoryPart": "Memory",
        "ModelPart": "EvaluatedModel",
        "PredictionsPart": "Predictions",
        "ThreatPart": "ThreatModel",
        "TrainingPart": "Training",
        "TransferredPart": "TransferResult",
    },
)
