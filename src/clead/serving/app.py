"""The application: paths, their OpenAPI document, and what stands behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Query, Request, Response, Security
from fastapi.security import APIKeyHeader
from pydantic_core import to_json

from clead import __version__
from clead.errors import MissingExtra, did_you_mean
from clead.serving import problems
from clead.serving.auth_limits import Gate
from clead.serving.batching import Batcher
from clead.serving.hosts import hosts_of
from clead.serving.metrics import CONTENT_TYPE_LATEST, Metrics
from clead.serving.models import Outputs, ServedModel, open_models
from clead.serving.problems import Problem, ProblemDetails
from clead.serving.request_parsing import NPY, Buffers, body_kind, read_body, read_images
from clead.serving.schemas import ExplainAnswer, ExplainQuery, Health, PredictAnswer, PredictQuery
from clead.serving.settings import ServeSettings
from clead.tasks.classification import CLASSIFICATION

T = TypeVar("T")

_SHOWN = 640  # training images in one answer; with 32×32 pixels some 2 MB

_ABOUT = """
Images go in as files (multipart, under the name `images`, or one image as the body), as nested JSON lists, or as a NumPy `.npy`
array. Files of any size are resized as the training images were; arrays must have the model's shape. Nothing that is sent is kept.
"""
_EVERYWHERE = (400, 403, 421, 429, 431)  # statuses that any path may answer with
_DEAD = 10  # a worker counts as dead when a batch takes so many times as long as a request may
_WARNING = (
    "An attacker who knows the detector can evade it: a low score is no proof that an image was not tampered with."
)


def create_app(
    runs: Sequence[str | Path], settings: ServeSettings | None = None, overrides: Sequence[str] = ()
) -> FastAPI:
    """Return an application that answers for ``runs``, with their models loaded.

    Args:
        runs: run directories; the first one answers where a request names none.
        settings: engine, detector and limits; None: the defaults.
        overrides: settings of the runs, such as ``["--data.path", "other/place", "--train.device", "cpu"]``.

    ``app.state.models`` maps names to ``ServedModel``. Raises UserError if a run cannot be served, MissingExtra without FastAPI's
    companions.
    """
    settings = settings or ServeSettings()
    try:
        from fastapi_offline import FastAPIOffline
    except ImportError:
        raise MissingExtra("fastapi-offline", "serve", "serving") from None
    models, metrics = open_models(runs, settings, overrides), Metrics()
    service = _Service(models, settings, metrics)

    app = FastAPIOffline(
        title="clead",
        version=__version__,
        summary="Hardened image classifiers",
        description=_ABOUT,
        lifespan=service.lifespan,
        swagger_ui_oauth2_redirect_url="/docs/oauth2-redirect",
    )
    app.state.models = models
    app.state.metrics = metrics
    app.state.batchers = service.batchers
    app.state.draining = False
    app.state.hosts = (
        hosts_of(settings.allowed_hosts) if settings.allowed_hosts else None
    )  # ``serve`` adds what it is bound to
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    problems.install(app)
    locked: Any = (
        [Security(APIKeyHeader(name="X-API-Key", auto_error=False, description="Or as a Bearer token."))]
        if settings.api_key
        else []
    )
    body = {"requestBody": {"required": True, "content": _content(list(models.values()), settings)}}
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ProblemDetails, "description": text, "content": {problems.MEDIA_TYPE: {}}}
        for status, text in {
            400: "The body cannot be read.",
            **({401: "The API key is missing or wrong."} if settings.api_key else {}),
            403: "A page from elsewhere asks (Origin).",
            408: "The body did not arrive in time.",
            413: "Too many bytes or pixels.",
            415: "Not a format that is read.",
            422: "Too many images, values out of range, or unknown names.",
            421: "The server does not answer to this name (Host).",
            429: "Too many connections from one address.",
            431: "The head of the request is too large.",
            500: "The model failed on these images.",
            503: "Too much work at the moment, or no worker; see Retry-After.",
        }.items()
    }

    @app.post(
        "/v1/predict",
        summary="Classify images",
        response_model=PredictAnswer,
        responses=refusals,
        openapi_extra=body,
        dependencies=locked,
    )
    async def predict(request: Request, query: Annotated[PredictQuery, Query()]) -> Response:
        model = service.model(query)
        async with service.outputs(request, model) as (outputs, _):
            predictions = service.predictions(model, outputs, query)
        return _json({"model": model.name, "classes": model.classes, "predictions": predictions})

    if settings.detector is not None:

        @app.post(
            "/v1/explain",
            summary="Classify images, and show their nearest training images and how suspicious they are",
            response_model=ExplainAnswer,
            responses=refusals,
            openapi_extra=body,
            dependencies=locked,
        )
        async def explain(request: Request, query: Annotated[ExplainQuery, Query()]) -> Response:
            model = service.model(query)
            label = _label(model, query.of)
            async with service.outputs(request, model) as (outputs, deadline):
                if (shown := len(outputs.probabilities) * query.neighbours) > _SHOWN:
                    raise Problem(
                        422,
                        f"neighbours: at most {_SHOWN} training images are shown in one answer, got {len(outputs.probabilities)} "
                        f"images times {query.neighbours} neighbours, {shown}; ask for fewer",
                    )
                work = asyncio.get_running_loop().run_in_executor(
                    service.pool,
                    lambda: _explained(
                        model, outputs, service.predictions(model, outputs, query), query, label, settings
                    ),
                )
                return _json(await service.in_time(work, deadline))

    _add_state(app, service, locked, refusals)
    plain = app.openapi

    def with_names() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(plain(), models)
        return plain()

    app.openapi = with_names  # FastAPI documents this way
    return app


def _add_state(app: FastAPI, service: _Service, locked: Any, refusals: dict[int | str, dict[str, Any]]) -> None:
    """Add the paths that say how the server is: /healthz, /readyz and /metrics."""
    always = {status: refusals[status] for status in _EVERYWHERE}

    def health(status: Literal["ok", "ready"]) -> Health:
        return Health(status=status, version=__version__, models=list(service.models))

    unwell = {"model": ProblemDetails, "content": {problems.MEDIA_TYPE: {}}}

    @app.get(
        "/healthz",
        summary="Say whether the server lives: if not (503), restart it",
        response_model=Health,
        responses={**always, 503: {**unwell, "description": "A model's worker has ended or hangs."}},
    )
    async def healthz() -> Health:
        if trouble := service.dead():
            raise Problem(503, trouble)
        return health("ok")

    @app.get(
        "/readyz",
        summary="Say whether the server takes requests: if not (503), send them elsewhere",
        response_model=Health,
        responses={
            **always,
            503: {**unwell, "description": "It starts or stops, or a model's worker does not answer."},
        },
    )
    async def readyz() -> Health:
        if trouble := "the server is stopping" if app.state.draining else service.trouble():
            raise Problem(503, trouble, {"Retry-After": "5"})
        return health("ready")

    @app.get(
        "/metrics",
        summary="Counters for Prometheus",
        response_class=Response,
        dependencies=locked,
        responses={
            200: {
                "content": {"text/plain": {"schema": {"type": "string"}}},
                "description": "Prometheus's text format.",
            },
            **always,
            **({401: refusals[401]} if 401 in refusals else {}),
        },
    )
    async def counters() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


class _Service:
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
        self.working = 0

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncGenerator[None, None]:
        """Run the batchers; when the server stops, its requests have been answered."""
        for batcher in self.batchers.values():
            batcher.start()
        yield
        for batcher in self.batchers.values():
            await asyncio.to_thread(batcher.stop, min(5.0, self.settings.drain_seconds))

    def trouble(self) -> str | None:
        """Say why some model's worker gives no answers at present, or None."""
        return next((trouble for batcher in self.batchers.values() if (trouble := batcher.trouble())), None)

    def dead(self) -> str | None:
        """Say which worker will give no answers any more: it has ended, or nobody has waited for its batch for long."""
        for batcher in self.batchers.values():
            if (trouble := batcher.trouble()) and not 0 < batcher.busy_seconds < _DEAD * self.settings.request_seconds:
                return trouble
        return None

    def model(self, query: PredictQuery) -> ServedModel:
        """Return the model that a request names, the first one by default."""
        name = next(iter(self.models)) if query.model is None else query.model
        if name not in self.models:
            raise Problem(
                422, f"model: no such run is served, got {name[:60]!r}; {did_you_mean(name[:60], self.models)}"
            )
        return self.models[name]

    @asynccontextmanager
    async def outputs(self, request: Request, model: ServedModel) -> AsyncGenerator[tuple[Outputs, float], None]:
        """Read the images of a request; give what the model says of them, and until when the answer must be ready.

        A request takes one of the ``max_requests`` places when it has arrived, so that slow ones take none, until the end of the
        context.
        """
        body_kind(request)
        self._free_place()
        async with read_body(request, self.settings, self.buffers) as body:
            self._free_place()
            self.working += 1
            self.metrics.in_flight.inc()
            try:
                deadline = asyncio.get_running_loop().time() + self.settings.request_seconds

                async def computed() -> Outputs:
                    images = await read_images(request, body, model, self.settings, self.pool)
                    return await self.batchers[model.name].outputs(images)

                outputs = await self.in_time(computed(), deadline)
                self.metrics.images.labels(model.name).inc(len(outputs.probabilities))
                yield outputs, deadline
            finally:
                self.working -= 1
                self.metrics.in_flight.dec()

    def _free_place(self) -> None:
        if self.working >= self.settings.max_requests:
            self.metrics.refused.labels("503").inc()
            raise Problem(
                503,
                f"the server works on {self.settings.max_requests} requests already, which is its limit; come back in a second",
                {"Retry-After": "1", "Connection": "close"},
            )

    async def in_time(self, work: Awaitable[T], deadline: float) -> T:
        """Await, but give up at ``deadline``, ``request_seconds`` after the request has arrived."""
        try:
            return await asyncio.wait_for(work, max(0.0, deadline - asyncio.get_running_loop().time()))
        except asyncio.TimeoutError:
            raise Problem(
                503,
                f"the answer took more than {self.settings.request_seconds:g} seconds; send fewer images, or come back later",
                {"Retry-After": "5"},
            ) from None

    def predictions(self, model: ServedModel, outputs: Outputs, query: PredictQuery) -> list[dict[str, Any]]:
        """Return one ``Prediction`` per image, as plain data."""
        best = CLASSIFICATION.predict(outputs.probabilities).tolist()
        rows = outputs.probabilities.astype("float64").round(6).tolist()
        predictions: list[dict[str, Any]] = [
            {"label": model.classes[k], "probability": row[k], "probabilities": row, "suspicion": None}
            for k, row in zip(best, rows, strict=True)
        ]
        if model.guard is None or outputs.suspicion is None:
            return predictions
        threshold, count = model.guard.threshold, 0
        for prediction, score in zip(predictions, outputs.suspicion.tolist(), strict=True):
            rejected = threshold is not None and score > threshold
            prediction["suspicion"] = {"score": score, "threshold": threshold, "rejected": rejected}
            count += rejected
            if rejected and query.reject == "true":
                prediction["label"] = None
        self.metrics.rejected.labels(model.name).inc(count)
        return predictions


def _explained(
    model: ServedModel,
    found: Outputs,
    predictions: list[dict[str, Any]],
    query: ExplainQuery,
    label: int | None,
    settings: ServeSettings,
) -> dict[str, Any]:
    assert model.reference is not None and model.guard is not None  # explain exists with a detector only
    reference, guard = model.reference, model.guard
    for prediction, near in zip(predictions, reference.nearest(found.features, query.neighbours, label), strict=True):
        prediction["neighbours"] = [
            {
                "index": one.index,
                "label": model.classes[one.label],
                "similarity": round(one.similarity, 6),
                "thumbnail": reference.thumbnail(one.place) if settings.thumbnails else None,
            }
            for one in near
        ]
    measured = None
    if guard.measured is not None:
        detection, point = guard.measured.detection, guard.measured.point
        measured = {
            "command": guard.measured.command,
            "images": detection.images,
            "norm": detection.norm,
            "eps": detection.eps_text,
            "fitted": detection.fitted,
            "rate": point.rate,
            "clean_rejected": point.clean_rejected,
            "without_detector": detection.robust,
            "attacker_unaware": point.oblivious,
            "attacker_aware": point.aware,
        }
    return {
        "model": model.name,
        "classes": model.classes,
        "explanations": predictions,
        "detector": {
            "name": guard.detector.name,
            "rate": guard.rate,
            "threshold": guard.threshold,
            "fitted": guard.fitted,
            "calibrated": guard.calibrated,
            "warning": _WARNING
            if measured
            else f"{_WARNING} By how much was not measured for these weights; clead detect does.",
            "measured": measured,
        },
    }


def _label(model: ServedModel, name: str | None) -> int | None:
    if name is None:
        return None
    if name not in model.classes:
        raise Problem(
            422,
            f"of: {model.name} has no such class, got {name[:60]!r}; {did_you_mean(name[:60], model.classes)}",
        )
    return model.classes.index(name)


def _json(content: dict[str, Any]) -> Response:
    return Response(to_json(content), media_type="application/json")


def _content(models: list[ServedModel], settings: ServeSettings) -> dict[str, Any]:
    """Return what the body may be, for the OpenAPI document."""
    shapes = list(dict.fromkeys(model.shape for model in models))

    def nested(shape: tuple[int, ...], pixel: dict[str, Any]) -> dict[str, Any]:
        inner = pixel
        for side in reversed(shape):
            inner = {"type": "array", "minItems": side, "maxItems": side, "items": inner}
        return {"type": "array", "minItems": 1, "maxItems": settings.max_images, "items": inner}

    def arrays(shape: tuple[int, ...], pixels: str, pixel: dict[str, Any], required: list[str]) -> dict[str, Any]:
        return {
            "type": "object",
            "additionalProperties": False,
            "required": required,
            "properties": {"images": nested(shape, pixel), "pixels": {"type": "string", "enum": [pixels]}},
        }

    unit, byte = {"type": "number", "minimum": 0, "maximum": 1}, {"type": "integer", "minimum": 0, "maximum": 255}
    choices = [
        choice
        for shape in shapes
        for choice in (arrays(shape, "unit", unit, ["images"]), arrays(shape, "uint8", byte, ["images", "pixels"]))
    ]
    file = {"type": "string", "format": "binary"}
    files = {"type": "array", "minItems": 1, "maxItems": settings.max_images, "items": file}
    form = {"type": "object", "additionalProperties": False, "required": ["images"], "properties": {"images": files}}
    return {
        "multipart/form-data": {"schema": form},
        "application/json": {"schema": {"anyOf": choices}},
        NPY: {"schema": {**file, "description": "A .npy file (n, C, H, W): uint8, or float32 or float64 in [0, 1]."}},
        **{
            kind: {"schema": {**file, "description": "One image."}}
            for kind in ("image/png", "image/jpeg", "image/webp", "image/bmp")
        },
    }


def _complete(document: dict[str, Any], models: dict[str, ServedModel]) -> None:
    """Write the names of models and classes into the OpenAPI document, and that refusals are problem details."""
    classes = list(dict.fromkeys(name for model in models.values() for name in model.classes))
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None) if "requestBody" not in operation else None
            for parameter in operation.get("parameters", []):
                known = {"model": list(models), "of": classes}.get(parameter["name"])
                if known:
                    parameter["schema"] = {"type": "string", "enum": known}
            for status, response in operation["responses"].items():
                if status != "200":
                    schema = response.get("content", {}).pop("application/json", None)
                    if schema:
                        response["content"][problems.MEDIA_TYPE] = schema
