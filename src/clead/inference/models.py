"""A run that answers: its model in one of two engines, its detector with a threshold, and its training images to compare with."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor
from torch.nn import functional

from clead.atomic_io import JSON_LIMIT, read_regular
from clead.config import load_recipe
from clead.data.base import stratified
from clead.data.decoding import ResizeSpec
from clead.devices import device_of
from clead.errors import MissingExtra, UserError
from clead.evaluation.correctness import exact_float32, to_float
from clead.export.onnx import AGREE, session, to_onnx
from clead.inference.png import png_uri
from clead.inference.settings import ServeSettings
from clead.measurements.base import MeasurementRecord
from clead.measurements.detection import DETECTORS, Detection, Detector, threshold_at
from clead.models.split import SplitModel, weights
from clead.progress import progress
from clead.results.record import Estimate
from clead.runs.directory import RunDir
from clead.runs.gallery import read_gallery
from clead.runs.loading import evaluated_images, load_model
from clead.tasks import Task
from clead.tasks.classification import Classification
from clead.tasks.retrieval import check_gallery
from clead.tasks.segmentation import SEGMENTATION, upsampled
from clead.weights.files import fingerprint, load_weights

log = logging.getLogger(__name__)


class Outputs(NamedTuple):
    """What a model says of n images: probabilities (n, K) or (n, K, H, W), features (n, D), suspicion (n,) or None, float32."""

    probabilities: np.ndarray
    features: np.ndarray
    suspicion: np.ndarray | None

    def split(self, sizes: Sequence[int]) -> Iterator[Outputs]:
        """Return the outputs of the first ``sizes[0]`` images, of the next ``sizes[1]``, and so on."""
        ends = np.cumsum(sizes)[:-1]
        columns: Any = [[None] * len(sizes) if array is None else np.split(array, ends) for array in self]
        return map(Outputs, *columns)

    def first_not_finite(self) -> int | None:
        """Return the first row that holds NaN or infinity, or None."""
        rows = [np.isfinite(array).reshape(len(array), -1).all(1) for array in self if array is not None]
        finite = np.logical_and.reduce(rows)
        return None if finite.all() else int(finite.argmin())

    @staticmethod
    def join(outputs: Sequence[Outputs]) -> Outputs:
        """Undo ``split``."""
        columns: Any = zip(*outputs, strict=True)
        joined: Any = [None if arrays[0] is None else np.concatenate(arrays) for arrays in columns]
        return Outputs(*joined)


class MeasuredAnswer(BaseModel):
    """From ``clead detect``: the part of all images that is right, or rejected at ``rate``, under attacks.

    The attacker knows the detector, or not; ``without_detector`` is what is right under the attacks that do not.
    """

    command: str
    images: int
    norm: str
    eps: str
    fitted: int
    rate: float
    clean_rejected: Estimate
    without_detector: Estimate
    attacker_unaware: Estimate
    attacker_aware: Estimate


@dataclass(frozen=True)
class FittedDetector:
    """A fitted detector; images that score above ``threshold`` are rejected. None: no threshold is sure to keep to the rate."""

    detector: Detector
    threshold: float | None
    rate: float
    fitted: int
    calibrated: int
    measured: MeasuredAnswer | None

    @property
    def name(self) -> str:
        """The detector's name."""
        return self.detector.name

    def score(self, network: SplitModel, x: Tensor, outputs: tuple[Tensor, Tensor]) -> Tensor:
        """Return the scores (n,) of images, whose features and logits are ``outputs``."""
        return self.detector.score(network, x, outputs)


@dataclass(frozen=True)
class Reference:
    """Images (N, C, H, W) uint8, labels (N,), places in the training set or gallery (N,), and directions of features (N, D)."""

    images: Tensor
    labels: Tensor
    index: Tensor
    directions: Tensor
    classes: tuple[str, ...]
    thumbnails: bool

    def nearest(self, features: np.ndarray, k: int, label: int | None = None) -> list[list[dict[str, Any]]]:
        """Return for each row of features (n, D) the ``k`` images of most similar direction, of one class if given."""
        among = torch.arange(len(self.labels)) if label is None else (self.labels == label).nonzero()[:, 0]
        directions = self.directions if label is None else self.directions[among]
        cosines = functional.normalize(torch.from_numpy(features), dim=1) @ directions.T
        values, positions = cosines.topk(min(k, len(among)), dim=1)
        rows = among[positions]
        return [
            [self._neighbour(row, cosine) for row, cosine in zip(*nearest, strict=True)]
            for nearest in zip(rows.tolist(), values.clamp(-1, 1).tolist(), strict=True)
        ]

    def _neighbour(self, row: int, cosine: float) -> dict[str, Any]:
        return {
            "index": int(self.index[row]),
            "label": self.classes[self.labels[row]],
            "similarity": round(cosine, 6),
            "thumbnail": png_uri(self.images[row]) if self.thumbnails else None,
        }


class ServedModel:
    """A run, ready to answer.

    Attributes:
        name: what requests call it.
        run: its directory.
        config: its configuration, with the overrides.
        trained: the configuration that it was trained with.
        task: what its answers mean.
        classes: K names, in the order of probabilities.
        shape: (C, H, W) of the images that it was trained on.
        fit: how image files come to that shape: as the training's did.
        model: the PyTorch model, in eval mode on ``device``.
        network: what computes: ``model``, or the same exported to onnxruntime.
        detector: the fitted detector, or None.
        reference: training images, or None.
        gallery: the images of ``settings.gallery``, or None.
    """

    def __init__(self, name: str, path: str | Path, settings: ServeSettings, overrides: Sequence[str] = ()) -> None:
        self.name = name
        self.run = RunDir.open(Path(path))
        self.trained = self.run.config()
        self.config = load_recipe(str(self.run.path / "config.yaml"), overrides)
        self.task: Task = self.config.task
        self.device = device_of(self.config.train.device)
        which = self.config.eval.weights
        self.model = load_model(self.run, self.config, which, None).to(self.device).requires_grad_(False)
        _, metadata = load_weights(self.run.weights(which))
        self.classes: tuple[str, ...] = tuple(metadata["classes"])
        channels, height, width = self.shape = tuple(metadata["shape"])
        # The training's own way of resizing; without one its images were of one size already.
        data = self.trained.data
        size = height if height == width else data.image_size
        self.fit = ResizeSpec(size, data.resize, channels, data.background)
        self.network: SplitModel = self.model
        if settings.engine == "onnx":
            self.network, self.device = OnnxNetwork(self.model, self.shape), torch.device("cpu")
        self.reference: Reference | None = None
        self.detector: FittedDetector | None = None
        if settings.detector is not None and not isinstance(self.task, Classification):
            log.warning("%s: the detector %s goes by one class per image: none is served", name, settings.detector)
        elif settings.detector is not None:
            self._fit_detector(settings)
        self.gallery: Reference | None = None
        if settings.gallery is not None and self.task == SEGMENTATION:
            raise UserError(
                f"--gallery: {name} answers with masks, and images are sought by features of whole images; leave it out"
            )
        if settings.gallery is not None:
            items, names = read_gallery(settings.gallery, self.shape)
            with progress(f"{self.name}: reading the gallery", len(items), show=len(items) > 2000) as tick:
                features = self._each(items.images, self.network.features, "the features of a gallery image are", tick)
            directions = functional.normalize(features, dim=1).cpu()
            check_gallery(directions, items.labels, classes=names)
            index = torch.arange(len(items))
            self.gallery = Reference(items.images, items.labels, index, directions, names, settings.thumbnails)

    def _fit_detector(self, settings: ServeSettings) -> None:
        """Fit the detector on training images and set its threshold on validation images, both clean."""
        try:
            splits = evaluated_images(self.run, self.config, self.trained, None)[1]
        except UserError as error:
            remedy = f"{self.name}: without its training images serve with --detector none, or give --data.path"
            raise UserError(*error.problems, remedy) from None
        labels = splits.train.visible_labels
        index = (labels >= 0).nonzero()[:, 0]
        if len(index) > settings.reference:
            index = index[stratified(labels[index], settings.reference, 0, spare=0)[0]]
        images, labels = splits.train.images[index], labels[index]
        count = len(index) + len(splits.val)
        detector: Detector = DETECTORS[str(settings.detector)]()
        with progress(f"{self.name}: reading training images", count, show=count > 2000) as tick:
            features = self._each(images, self.network.features, "the features of a training image are", tick)
            detector.fit(features, labels.to(self.device))
            score = functools.partial(detector.score, self.network)
            scores = self._each(splits.val.images, score, f"a score of {detector.name} is", tick).cpu()
        threshold: float | None = threshold_at(scores, settings.reject)
        if math.isinf(threshold):
            threshold = None
            log.warning(
                "%s: %d validation images are too few for a threshold that rejects %g of clean images: nothing is rejected",
                *(self.name, len(scores), settings.reject),
            )
        directions = functional.normalize(features, dim=1).cpu()
        self.reference = Reference(images, labels, index, directions, self.classes, settings.thumbnails)
        measured = _measured(self.run, self.model, detector.name, settings.reject)
        self.detector = FittedDetector(detector, threshold, settings.reject, len(labels), len(scores), measured)

    def _each(self, images: Tensor, function: Callable[[Tensor], Tensor], what: str, tick: Any) -> Tensor:
        """Return ``function`` of all images, 256 at once; UserError if anything in it is not finite."""
        rows = []
        with exact_float32(), torch.inference_mode():
            for batch in images.split(256):
                rows.append(function(to_float(batch.to(self.device))))
                tick(len(batch))
        values = torch.cat(rows).clone()
        if not torch.isfinite(values).all():
            raise UserError(f"{self.name}: {what} NaN or infinite; serve with --detector none")
        return values

    def answer(self, images: Sequence[np.ndarray]) -> Outputs:
        """Return the outputs of images, each array (n, C, H, W) uint8, or float32 in [0, 1].

        The arrays never change, whatever the model does with its input. Raises ValueError if the model does not answer each image
        with one row of K logits, of masks K in each pixel: rows that are missing would be another request's.
        """
        # New memory, whatever the arrays were.
        x = torch.cat([to_float(torch.from_numpy(array).to(self.device)) for array in images])
        with exact_float32(), torch.inference_mode():
            features, logits = self.network.features_and_logits(x.clone())
            if self.task == SEGMENTATION and logits.ndim == features.ndim == 4:
                logits, features, rest = upsampled(logits, x.shape[2:]), features.mean((2, 3)), x.shape[2:]
            else:
                rest = ()
            if logits.shape != (len(x), len(self.classes), *rest) or features.ndim != 2 or len(features) != len(x):
                raise ValueError(
                    f"{self.name} answered {len(x)} images of {len(self.classes)} classes with logits {tuple(logits.shape)} and "
                    f"features {tuple(features.shape)}"
                )
            scores = None if self.detector is None else self.detector.score(self.network, x, (features, logits))
            probabilities = self.task.probabilities(logits)
        suspicion = None if scores is None else scores.cpu().numpy()
        return Outputs(probabilities.cpu().numpy(), features.cpu().numpy(), suspicion)


class OnnxNetwork(SplitModel):
    """``model`` on onnxruntime: exported in memory with features and logits as outputs, for any batch size.

    Raises UserError if the export fails, or answers otherwise than the model by more than 1e-4 per logit.
    """

    def __init__(self, model: SplitModel, shape: tuple[int, int, int]) -> None:
        super().__init__(model.num_classes, model.feature_dim)
        try:
            content = to_onnx(model, shape, features=True)
        except MissingExtra:
            raise
        except UserError as error:
            raise UserError(f"{str(error).partition(';')[0]}; serve with --engine torch") from error
        # A thread that spins while it waits takes the core that reads requests.
        self._session: Any = session(content, spin=False)
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


def _measured(run: RunDir, model: SplitModel, name: str, rate: float) -> MeasuredAnswer | None:
    """Return what ``results/detect.json`` says of this detector on these very weights, at the rate nearest to ``rate``."""
    try:
        record = MeasurementRecord.model_validate_json(read_regular(run.path / "results" / "detect.json", JSON_LIMIT))
    except (OSError, ValidationError):
        return None
    detection = record.result
    if not isinstance(detection, Detection) or record.model.fingerprint != fingerprint(weights(model)):
        return None
    for curve in (detector.curve for detector in detection.detectors if detector.name == name):
        point = min(curve, key=lambda point: abs(point.rate - rate))
        return MeasuredAnswer(
            command=record.command,
            images=detection.images,
            norm=detection.norm,
            eps=detection.eps_text,
            fitted=detection.fitted,
            rate=point.rate,
            clean_rejected=point.clean_rejected,
            without_detector=detection.robust,
            attacker_unaware=point.oblivious,
            attacker_aware=point.aware,
        )
    return None
