"""A run that answers: its model in one of two engines, its detector with a threshold, and its training images to compare with."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from clead.api.opened import evaluated_images, load_model
from clead.atomic_io import JSON_LIMIT, read_regular
from clead.checkpoint import RunDir, fingerprint, load_weights
from clead.config import RunConfig, load_recipe
from clead.data.base import stratified
from clead.data.decoding import ResizeSpec
from clead.devices import device_of
from clead.errors import MissingExtra, UserError
from clead.evaluation.correctness import exact_float32
from clead.export.onnx import AGREE, to_onnx
from clead.interfaces import ImageSet, Splits
from clead.measurements.base import MeasurementRecord
from clead.measurements.detection import DETECTORS, Detection, DetectionPoint, Detector, threshold_at
from clead.models.split import SplitModel, weights
from clead.progress import progress
from clead.serving.logs import log
from clead.serving.settings import ServeSettings


class Outputs(NamedTuple):
    """What a model says of n images: probabilities (n, K), features (n, D), and suspicion (n,) or None, float32."""

    probabilities: np.ndarray
    features: np.ndarray
    suspicion: np.ndarray | None

    def split(self, sizes: Sequence[int]) -> Iterator[Outputs]:
        """Return the outputs of the first ``sizes[0]`` images, of the next ``sizes[1]``, and so on."""
        start = 0
        for size in sizes:
            rows = slice(start, start + size)
            start += size
            yield self.chosen(rows)

    def chosen(self, rows: slice) -> Outputs:
        """Return these rows."""
        return Outputs(
            self.probabilities[rows], self.features[rows], None if self.suspicion is None else self.suspicion[rows]
        )

    def first_not_finite(self) -> int | None:
        """Return the first row that holds NaN or infinity, or None."""
        finite = np.isfinite(self.probabilities).all(1) & np.isfinite(self.features).all(1)
        if self.suspicion is not None:
            finite &= np.isfinite(self.suspicion)
        return None if finite.all() else int(finite.argmin())

    @staticmethod
    def join(parts: Sequence[Outputs]) -> Outputs:
        """Undo ``split``."""
        scores = [part.suspicion for part in parts if part.suspicion is not None]
        return Outputs(
            np.concatenate([part.probabilities for part in parts]),
            np.concatenate([part.features for part in parts]),
            np.concatenate(scores) if scores else None,
        )


@dataclass(frozen=True)
class Measured:
    """What ``clead detect`` measured of this detector and these weights, at the clean rejection rate nearest to the server's."""

    detection: Detection
    point: DetectionPoint
    command: str


@dataclass(frozen=True)
class FittedDetector:
    """A fitted detector; images that score above ``threshold`` are rejected. None: no threshold is sure to keep to the rate."""

    detector: Detector
    threshold: float | None
    rate: float
    fitted: int
    calibrated: int
    measured: Measured | None


@dataclass(frozen=True)
class Neighbour:
    """One training image: its place in the run's training set, its class, and the cosine of its features with the image's."""

    index: int
    label: int
    similarity: float
    place: int


@dataclass(frozen=True)
class Reference:
    """Training images (N, C, H, W) uint8, labels (N,), places in the training set (N,), and directions of features (N, D)."""

    images: Tensor
    labels: Tensor
    index: Tensor
    directions: Tensor

    def nearest(self, features: np.ndarray, k: int, label: int | None = None) -> list[list[Neighbour]]:
        """Return for each row of features (n, D) the ``k`` training images of most similar direction, of one class if given."""
        among = torch.arange(len(self.labels)) if label is None else (self.labels == label).nonzero()[:, 0]
        directions = self.directions if label is None else self.directions[among]
        similar = functional.normalize(torch.from_numpy(features), dim=1) @ directions.T
        values, places = similar.topk(min(k, len(among)), dim=1)
        return [
            [
                Neighbour(int(self.index[p]), int(self.labels[p]), min(1.0, max(-1.0, v)), int(p))
                for v, p in zip(row.tolist(), among[where].tolist(), strict=True)
            ]
            for row, where in zip(values, places, strict=True)
        ]

    def thumbnail(self, place: int) -> str:
        """Return the image as a PNG in a data URI, in its own size."""
        array = self.images[place].permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class ServedModel:
    """A run, ready to answer.

    Attributes:
        name: what requests call it.
        classes: K names, in the order of probabilities.
        shape: (C, H, W) of the images that it was trained on.
        fit: how image files come to that shape: as the training's did.
        model: the PyTorch model, in eval mode on ``device``.
        network: what computes: ``model``, or the same exported to onnxruntime.
        guard: the detector, or None.
        reference: training images, or None.
    """

    def __init__(self, name: str, path: str | Path, settings: ServeSettings, overrides: Sequence[str] = ()) -> None:
        run = RunDir.open(Path(path))
        trained = run.config()
        config = load_recipe(str(run.path / "config.yaml"), overrides)
        which = config.eval.weights
        self.name = name
        self.device = device_of(config.train.device)
        self.model = load_model(run, config, which, None).to(self.device).requires_grad_(False)
        _, metadata = load_weights(run.path / f"{which}.safetensors")
        self.classes: tuple[str, ...] = tuple(metadata["classes"])
        channels, height, width = self.shape = tuple(metadata["shape"])
        # The training's own way of resizing; without one its images were of one size already.
        self.fit = ResizeSpec(
            height if height == width else None, trained.data.resize, channels, trained.data.background
        )
        if settings.engine == "onnx":
            self.network: SplitModel = OnnxNetwork(self.model, self.shape, settings)
            self.device = torch.device("cpu")
        else:
            self.network = self.model
        self.reference: Reference | None = None
        self.guard: FittedDetector | None = None
        if settings.detector is not None:
            self._compare_with(_data(run, config, trained, name), run, settings)

    def _compare_with(self, splits: Splits, run: RunDir, settings: ServeSettings) -> None:
        """Fit the detector on training images and set its threshold on validation images, both clean."""
        labels = splits.train.visible_labels
        index = (labels >= 0).nonzero()[:, 0]
        if len(index) > settings.reference:
            index = index[stratified(labels[index], settings.reference, 0, spare=0)[0]]
        images, labels = splits.train.images[index], labels[index]
        work = len(index) + len(splits.val)
        with progress(f"{self.name}: reading training images", work, show=work > 2000) as tick:
            features = self._features(images, tick)
            detector: Detector = DETECTORS[str(settings.detector)]()
            detector.fit(features, labels.to(self.device))
            scores = self._scores(detector, splits.val, tick)
        threshold = threshold_at(scores, settings.reject)
        if math.isinf(threshold):
            log.warning(
                "%s: %d validation images are too few for a threshold that rejects %g of clean images: nothing is rejected",
                self.name,
                len(scores),
                settings.reject,
            )
        self.reference = Reference(images, labels, index, functional.normalize(features, dim=1).cpu())
        self.guard = FittedDetector(
            detector,
            None if math.isinf(threshold) else threshold,
            settings.reject,
            len(labels),
            len(scores),
            _measured(run, self.model, detector.name, settings.reject),
        )

    def _features(self, images: Tensor, tick: Any) -> Tensor:
        found = []
        with exact_float32(), torch.inference_mode():
            for part in images.split(256):
                found.append(self.network.features(_pixels(part, self.device)))
                tick(len(part))
        features = torch.cat(found).clone()
        if not torch.isfinite(features).all():
            raise UserError(
                f"{self.name}: the features of a training image are NaN or infinite; serve with --detector none"
            )
        return features

    def _scores(self, detector: Detector, images: ImageSet, tick: Any) -> Tensor:
        found = []
        with exact_float32(), torch.inference_mode():
            for part in images.images.split(256):
                found.append(detector.score(self.network, _pixels(part, self.device)))
                tick(len(part))
        scores = torch.cat(found).cpu()
        if not torch.isfinite(scores).all():
            raise UserError(f"{self.name}: a score of {detector.name} is NaN or infinite; serve with --detector none")
        return scores

    def answer(self, images: Sequence[np.ndarray]) -> Outputs:
        """Return the outputs of images, each array (n, C, H, W) uint8, or float32 in [0, 1].

        The arrays never change, whatever the model does with its input. Raises ValueError if the model does not answer each image
        with one row of K logits: rows that are missing would be another request's.
        """
        x = torch.cat(
            [_pixels(torch.from_numpy(array), self.device) for array in images]
        )  # new memory, whatever they were
        with exact_float32(), torch.inference_mode():
            features, logits = self.network.features_and_logits(x.clone())
            if logits.shape != (len(x), len(self.classes)) or features.ndim != 2 or len(features) != len(x):
                raise ValueError(
                    f"{self.name} answered {len(x)} images of {len(self.classes)} classes with logits {tuple(logits.shape)} and "
                    f"features {tuple(features.shape)}"
                )
            scores = None if self.guard is None else self.guard.detector.score(self.network, x, (features, logits))
            probabilities = logits.float().softmax(1)
        return Outputs(
            probabilities.cpu().numpy(), features.cpu().numpy(), None if scores is None else scores.cpu().numpy()
        )


class OnnxNetwork(SplitModel):
    """``model`` on onnxruntime: exported in memory with features and logits as outputs, for any batch size.

    Raises UserError if the export fails, or answers otherwise than the model by more than 1e-4 per logit.
    """

    def __init__(self, model: SplitModel, shape: tuple[int, int, int], settings: ServeSettings) -> None:
        super().__init__(model.num_classes, model.feature_dim)
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtra("onnxruntime", "serve", "the onnx engine") from None
        try:
            content = to_onnx(model, shape, features=True)
        except MissingExtra:
            raise
        except UserError as error:
            raise UserError(f"{str(error).partition(';')[0]}; serve with --engine torch") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.threads
        options.log_severity_level = 3
        # A thread that spins while it waits takes the core that reads requests.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session: Any = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
        with exact_float32(), torch.inference_mode():
            expected = model.features_and_logits(x.to(next(model.parameters()).device))[1].cpu()
        difference = (self._split(x)[1] - expected).abs().max().item()
        if not difference <= AGREE * max(1.0, expected.abs().max().item()):
            raise UserError(
                f"the exported model's logits differ from PyTorch's by {difference:.2g}, more than {AGREE:g} of the largest; "
                "serve with --engine torch"
            )

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self._session.run(["features", "logits"], {"images": x.numpy()})
        return torch.from_numpy(features), torch.from_numpy(logits)


def open_models(
    runs: Sequence[str | Path], settings: ServeSettings, overrides: Sequence[str] = ()
) -> dict[str, ServedModel]:
    """Return the runs by their names: the directory's, or the path where two are called alike."""
    if not runs:
        raise UserError("which run? give one or several run directories, got none")
    opened = [RunDir.open(Path(run)) for run in runs]
    if len({run.path.resolve() for run in opened}) < len(opened):
        raise UserError(f"each run is served once, got one twice: {', '.join(map(str, runs))}")
    names = [run.name for run in opened]
    names = [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, opened, strict=True)]
    torch.set_num_threads(settings.threads)
    return {name: ServedModel(name, run.path, settings, overrides) for name, run in zip(names, opened, strict=True)}


def _data(run: RunDir, config: RunConfig, trained: RunConfig, name: str) -> Splits:
    try:
        return evaluated_images(run, config, trained, None)[1]
    except UserError as error:
        raise UserError(
            *error.problems,
            f"{name}: without its training images serve with --detector none, or give --data.path",
        ) from None


def _measured(run: RunDir, model: SplitModel, name: str, rate: float) -> Measured | None:
    """Return what ``results/detect.json`` says of this detector on these very weights, if it does."""
    path = run.path / "results" / "detect.json"
    try:
        record = MeasurementRecord.model_validate_json(read_regular(path, JSON_LIMIT))
    except (OSError, ValidationError):
        return None
    if not isinstance(record.result, Detection) or record.model.fingerprint != fingerprint(weights(model)):
        return None
    for part in record.result.detectors:
        if part.name == name:
            point = min(part.curve, key=lambda point: abs(point.rate - rate))
            return Measured(record.result, point, record.command)
    return None


def _pixels(images: Tensor, device: torch.device) -> Tensor:
    images = images.to(device)
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()
