"""What queries may say, and what the server answers: the schemas of the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from clead.inference.models import MeasuredAnswer


class PredictQuery(BaseModel):
    """Which model answers, and whether suspicious images get no class."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="Name of the run; the first one by default.")
    reject: Literal["true", "false"] = Field(
        "false", description="true: an image that the detector rejects gets no label (null)."
    )


class ExplainQuery(PredictQuery):
    """How many neighbours, and of which class."""

    neighbours: int = Field(5, ge=1, le=50, description="Training images shown for each image.")
    of: str | None = Field(None, description="Only neighbours of this class: what speaks for it.")


class SearchQuery(BaseModel):
    """Which model answers, how many items are shown, and of which class."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="Name of the run; the first one by default.")
    items: int = Field(5, ge=1, le=50, description="Items of the gallery shown for each image.")
    of: str | None = Field(None, description="Only items of this class of the gallery.")


class Suspicion(BaseModel):
    """The detector's score; larger is more suspicious. ``threshold`` null: no image is rejected."""

    score: float
    threshold: float | None
    rejected: bool


class Prediction(BaseModel):
    """One image: the most probable class (null if rejected, where that was asked for), and all probabilities."""

    label: str | None
    labels: list[str] | None = Field(
        None, description="Of a model of several labels: those that are present; ``label`` is null then."
    )
    probability: float = Field(ge=0, le=1, description="Of the most probable class.")
    probabilities: list[float] = Field(description="In the order of ``classes``, rounded to 6 decimals.")
    suspicion: Suspicion | None = Field(description="null: the server has no detector.")


class MaskPrediction(BaseModel):
    """One image of a model of masks: the class of each pixel, and how much of the image each class takes."""

    mask: str = Field(
        description="Palette PNG of the model's size as data URI: each pixel's value is the number of a class in ``classes``."
    )
    shares: list[float] = Field(
        description="Share of the pixels with each class, in the order of ``classes``, rounded to 6 decimals."
    )
    probability: float = Field(ge=0, le=1, description="Mean over the pixels of the most probable class's.")
    suspicion: None = Field(description="Detectors go by one class per image: always null.")


class PredictAnswer(BaseModel):
    """Predictions in the order of the images."""

    model: str
    classes: list[str]
    predictions: list[Prediction] | list[MaskPrediction]


class NeighbourAnswer(BaseModel):
    """A training image whose features point in a similar direction."""

    index: int = Field(
        description="Its place in the run's training images, after validation images were cut from them."
    )
    label: str
    similarity: float = Field(ge=-1, le=1, description="Cosine of the angle between the features.")
    thumbnail: str | None = Field(description="PNG as data URI, in its own size; null: the server does not show them.")


class Explanation(Prediction):
    """A prediction with its nearest training images, the nearest first."""

    neighbours: list[NeighbourAnswer]


class DetectorAnswer(BaseModel):
    """The detector, how it was calibrated, and what it is worth."""

    name: str
    rate: float = Field(description="Part of clean images that it may reject.")
    threshold: float | None
    fitted: int = Field(description="Training images on which it was fitted.")
    calibrated: int = Field(description="Validation images that set its threshold.")
    warning: str
    measured: MeasuredAnswer | None


class ExplainAnswer(BaseModel):
    """Explanations in the order of the images."""

    model: str
    classes: list[str]
    explanations: list[Explanation]
    detector: DetectorAnswer


class ItemAnswer(NeighbourAnswer):
    """An item of the gallery whose features point in a similar direction."""

    index: int = Field(description="Its place in the gallery, as the images are read.")


class SearchResult(BaseModel):
    """The items nearest to one image, the nearest first, and the detector's score of the image."""

    items: list[ItemAnswer]
    suspicion: Suspicion | None = Field(description="null: the server has no detector.")


class SearchAnswer(BaseModel):
    """Results in the order of the images; ``classes`` are the gallery's."""

    model: str
    classes: list[str]
    results: list[SearchResult]


class Health(BaseModel):
    """The server lives, or is ready for requests; its models are loaded."""

    status: Literal["ok", "ready"]
    version: str
    models: list[str]
