"""What stands behind the paths: requests become images, go through a model, and are answered within the limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import numpy as np
import torch
from fastapi import FastAPI, Query, Request, Response
from pydantic_core import to_json

from clead import __version__
from clead.errors import did_you_mean
from clead.inference.models import FittedDetector, Outputs, ServedModel
from clead.inference.png import mask_uri
from clead.inference.problems import Problem
from clead.inference.request_parsing import Buffers, body_kind, read_body, read_images, run
from clead.inference.settings import ServeSettings
from clead.serving.batching import Batcher
from clead.serving.metrics import CONTENT_TYPE_LATEST, Metrics
from clead.serving.schemas import ExplainQuery, Health, PredictQuery, SearchQuery
from clead.tasks import task_name

_MAX_SHOWN = 640  # training images in one answer; with 32×32 pixels some 2 MB
_DEAD = 10  # a worker counts as dead when a batch takes so many times as long as a request may
_WARNING = (
    "An attacker who knows the detector can evade it: a low score is no proof that an image was not tampered with."
)
_UNMEASURED = " By how much was not measured for these weights; clead detect does."


class Service:
    """What requests share: the models with their batchers, and threads for what would hold up other requests."""

    def __init__(self, models: dict[str, ServedModel], settings: ServeSettings, metrics: Metrics) -> None:
        self.models = models
        self.settings = settings
        self.metrics = metrics
        self.pool = ThreadPoolExecutor(2, "clead-serving")
        self.batchers = {
            name: Batcher(model.answer, settings.max_batch, name, metrics, settings.request_seconds)
            for name, model in models.items()
        }
        self.buffers = Buffers(max(settings.max_buffered, settings.max_body))
        self.places = asyncio.Semaphore(settings.max_requests)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncGenerator[None, None]:
        """Run the batchers; when the server stops, its requests have been answered."""
        for batcher in self.batchers.values():
            batcher.start()
        yield
        for batcher in self.batchers.values():
            await asyncio.to_thread(batcher.stop, min(5.0, self.settings.drain_seconds))

    async def predict(self, request: Request, query: Annotated[PredictQuery, Query()]) -> Response:
        """Answer with one prediction per image."""
        model = self._model(query)

        def predicted(outputs: Outputs) -> dict[str, Any]:
            predictions = self._predictions(model, outputs, query)
            return {"model": model.name, "classes": model.classes, "predictions": predictions}

        return await self._answer(request, model, predicted)

    async def explain(self, request: Request, query: Annotated[ExplainQuery, Query()]) -> Response:
        """Answer with predictions, the nearest training images, and what the detector is worth."""
        model = self._model(query)
        label = _class_index(model.name, model.classes, query.of)
        if model.detector is None:
            text = f"model: {model.name} is of the task {task_name(model.task)}, which has no detector; ask /v1/predict"
            raise Problem(422, text)

        def explained(outputs: Outputs) -> dict[str, Any]:
            count = len(outputs.probabilities)
            if (shown := count * query.neighbours) > _MAX_SHOWN:
                text = f"neighbours: at most {_MAX_SHOWN} training images are shown in one answer, got {count} images times"
                raise Problem(422, f"{text} {query.neighbours} neighbours, {shown}; ask for fewer")
            assert (
                model.reference is not None and model.detector is not None
            )  # there is no such path without a detector
            explanations = self._predictions(model, outputs, query)
            neighbours = model.reference.nearest(outputs.features, query.neighbours, label)
            for explanation, nearest in zip(explanations, neighbours, strict=True):
                explanation["neighbours"] = nearest
            answer = {"model": model.name, "classes": model.classes, "explanations": explanations}
            return answer | {"detector": _about(model.detector)}

        return await self._answer(request, model, explained, in_thread=True)

    async def search(self, request: Request, query: Annotated[SearchQuery, Query()]) -> Response:
        """Answer with the nearest items of the gallery."""
        model = self._model(query)
        gallery = model.gallery
        assert gallery is not None  # there is no such path without a gallery
        label = _class_index(f"the gallery of {model.name}", gallery.classes, query.of)

        def sought(outputs: Outputs) -> dict[str, Any]:
            count = len(outputs.features)
            if (shown := count * query.items) > _MAX_SHOWN:
                text = f"items: at most {_MAX_SHOWN} items are shown in one answer, got {count} images times"
                raise Problem(422, f"{text} {query.items} items, {shown}; ask for fewer")
            nearest = gallery.nearest(outputs.features, query.items, label)
            scores = self._suspicions(model, outputs)
            results = [{"items": each, "suspicion": score} for each, score in zip(nearest, scores, strict=True)]
            return {"model": model.name, "classes": gallery.classes, "results": results}

        return await self._answer(request, model, sought, in_thread=True)

    async def healthz(self) -> Health:
        """Say that the server lives, or which worker will give no answers any more."""
        for batcher in self.batchers.values():
            # Ended, or nobody has waited for its batch for long.
            if (trouble := batcher.trouble()) and not 0 < batcher.busy_seconds < _DEAD * self.settings.request_seconds:
                raise Problem(503, trouble)
        return self._health("ok")

    async def readyz(self, request: Request) -> Health:
        """Say that requests are taken, or why they are not at present."""
        troubles = [batcher.trouble() for batcher in self.batchers.values()]
        if request.app.state.draining:
            troubles = ["the server is stopping"]
        if trouble := next(filter(None, troubles), None):
            raise Problem(503, trouble, {"Retry-After": "5"})
        return self._health("ready")

    async def counters(self) -> Response:
        """Answer in Prometheus's text format."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    def _health(self, status: Literal["ok", "ready"]) -> Health:
        return Health(status=status, version=__version__, models=list(self.models))

    def _model(self, query: PredictQuery | SearchQuery) -> ServedModel:
        """Return the model that a request names, the first one by default."""
        name = next(iter(self.models)) if query.model is None else query.model
        if name not in self.models:
            known = did_you_mean(name[:60], self.models)
            raise Problem(422, f"model: no such run is served, got {name[:60]!r}; {known}")
        return self.models[name]

    async def _answer(
        self,
        request: Request,
        model: ServedModel,
        content: Callable[[Outputs], dict[str, Any]],
        *,
        in_thread: bool = False,
    ) -> Response:
        """Read the images of a request, and answer with what ``content`` makes of the model's outputs.

        A request takes one of the ``max_requests`` places when it has arrived, so that slow ones take none. It is given up
        ``request_seconds`` after that.
        """

        async def computed(body: bytes) -> dict[str, Any]:
            images = await read_images(request, body, model, self.settings, self.pool)
            outputs = await self.batchers[model.name].outputs(images)
            self.metrics.images.labels(model.name).inc(len(images))
            return await run(lambda: content(outputs), self.pool if in_thread else None)

        body_kind(request)
        self._check_places()
        async with read_body(request, self.settings, self.buffers) as body:
            self._check_places()
            async with self.places:
                with self.metrics.in_flight.track_inprogress():
                    try:
                        result = await asyncio.wait_for(computed(body), self.settings.request_seconds)
                    except asyncio.TimeoutError:
                        text = f"the answer took more than {self.settings.request_seconds:g} seconds"
                        text += "; send fewer images, or come back later"
                        raise Problem(503, text, {"Retry-After": "5"}) from None
        return Response(to_json(result), media_type="application/json")

    def _check_places(self) -> None:
        if self.places.locked():
            self.metrics.refused.labels("503").inc()
            limit = self.settings.max_requests
            text = f"the server works on {limit} requests already, which is its limit; come back in a second"
            raise Problem(503, text, {"Retry-After": "1", "Connection": "close"})

    def _predictions(self, model: ServedModel, outputs: Outputs, query: PredictQuery) -> list[dict[str, Any]]:
        """Return one ``Prediction``, or ``MaskPrediction``, per image, as plain data."""
        decided = model.task.decide(torch.from_numpy(outputs.probabilities))
        if decided.ndim == 3:
            return [_mask(*pair) for pair in zip(decided.numpy(), outputs.probabilities, strict=True)]
        answers = decided.tolist()
        rows = outputs.probabilities.astype("float64").round(6).tolist()
        predictions: list[dict[str, Any]] = [
            {**_named(answer, model.classes, row), "probabilities": row, "suspicion": None}
            for answer, row in zip(answers, rows, strict=True)
        ]
        for prediction, suspicion in zip(predictions, self._suspicions(model, outputs), strict=True):
            prediction["suspicion"] = suspicion
            if suspicion is not None and suspicion["rejected"] and query.reject == "true":
                prediction["label"] = None
        return predictions

    def _suspicions(self, model: ServedModel, outputs: Outputs) -> list[dict[str, Any] | None]:
        """Return one ``Suspicion`` per image, as plain data, and count those that the detector rejects."""
        if model.detector is None or outputs.suspicion is None:
            return [None] * len(outputs.features)
        threshold = model.detector.threshold
        suspicions: list[dict[str, Any] | None] = []
        for score in outputs.suspicion.tolist():
            rejected = threshold is not None and score > threshold
            suspicions.append({"score": score, "threshold": threshold, "rejected": rejected})
            self.metrics.rejected.labels(model.name).inc(rejected)
        return suspicions


def _named(answer: int | list[int], classes: Sequence[str], probabilities: list[float]) -> dict[str, Any]:
    """Return what a prediction names: the class, or of several labels (0 or 1 each) those that are present."""
    if isinstance(answer, int):
        return {"label": classes[answer], "probability": probabilities[answer]}
    present = [name for name, is_present in zip(classes, answer, strict=True) if is_present]
    return {"label": None, "labels": present, "probability": max(probabilities)}


def _mask(mask: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Return a ``MaskPrediction`` of classes (H, W) and probabilities (K, H, W)."""
    shares = np.bincount(mask.ravel(), minlength=len(probabilities)) / mask.size
    sure = float(probabilities.max(0).astype("float64").mean())
    return {
        "mask": mask_uri(mask.astype(np.uint8)),
        "shares": shares.round(6).tolist(),
        "probability": min(1.0, sure),
        "suspicion": None,
    }


def _about(detector: FittedDetector) -> dict[str, Any]:
    """Return a ``DetectorAnswer`` as plain data."""
    facts = {key: getattr(detector, key) for key in ("name", "rate", "threshold", "fitted", "calibrated", "measured")}
    return facts | {"warning": _WARNING if detector.measured else _WARNING + _UNMEASURED}


def _class_index(owner: str, classes: tuple[str, ...], name: str | None) -> int | None:
    if name is None:
        return None
    if name not in classes:
        known = did_you_mean(name[:60], classes)
        raise Problem(422, f"of: {owner} has no such class, got {name[:60]!r}; {known}")
    return classes.index(name)
