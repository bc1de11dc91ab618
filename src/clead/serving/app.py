"""The application: its paths, their OpenAPI document, and what stands around them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response, Security
from fastapi.security import APIKeyHeader

from clead import __version__
from clead.errors import MissingExtra
from clead.inference.hosts import hosts_of
from clead.inference.models import open_models
from clead.inference.settings import ServeSettings
from clead.serving import openapi
from clead.serving.auth_limits import Gate
from clead.serving.error_handlers import HANDLERS
from clead.serving.metrics import Metrics
from clead.serving.schemas import ExplainAnswer, Health, PredictAnswer, SearchAnswer
from clead.serving.service import Service

_ABOUT = """
Images go in as files (multipart, under the name `images`, or one image as the body), as nested JSON lists, or as a NumPy `.npy`
array. Files of any size are resized as the training images were; arrays must have the model's shape. Nothing that is sent is kept.
"""


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
    service = Service(open_models(runs, settings, overrides), settings, Metrics())
    app = FastAPIOffline(
        title="clead",
        version=__version__,
        summary="Hardened image classifiers",
        description=_ABOUT,
        lifespan=service.lifespan,
        swagger_ui_oauth2_redirect_url="/docs/oauth2-redirect",
        exception_handlers=HANDLERS,
    )
    app.state.models = service.models
    app.state.metrics = service.metrics
    app.state.batchers = service.batchers
    app.state.draining = False
    # ``serve`` adds what it is bound to.
    app.state.hosts = hosts_of(settings.allowed_hosts) if settings.allowed_hosts else None
    app.add_middleware(Gate, settings=settings, metrics=service.metrics)
    _add_paths(app, service, settings)
    documented = app.openapi

    def with_names() -> dict[str, Any]:
        if app.openapi_schema is None:
            openapi.complete(documented(), service.models)
        return documented()

    app.openapi = with_names  # FastAPI documents this way
    return app


def _add_paths(app: FastAPI, service: Service, settings: ServeSettings) -> None:
    locked = settings.api_key is not None
    header = APIKeyHeader(name="X-API-Key", auto_error=False, description="Or as a Bearer token.")
    key: dict[str, Any] = {"dependencies": [Security(header)] if locked else []}
    images: dict[str, Any] = {
        "methods": ["POST"],
        "responses": openapi.refusals(locked=locked),
        "openapi_extra": openapi.body(service.models.values(), settings),
        **key,
    }
    app.add_api_route("/v1/predict", service.predict, summary="Classify images", response_model=PredictAnswer, **images)
    if settings.detector is not None:
        about = "Classify images, and show their nearest training images and how suspicious they are"
        app.add_api_route("/v1/explain", service.explain, summary=about, response_model=ExplainAnswer, **images)

    if settings.gallery is not None:
        about = "Find the items of the gallery that are nearest to images"
        app.add_api_route("/v1/search", service.search, summary=about, response_model=SearchAnswer, **images)

    def unwell(meaning: str) -> dict[Any, dict[str, Any]]:
        return openapi.refusals((*openapi.ANY_PATH, 503), locked=locked, unavailable=meaning)

    app.add_api_route(
        "/healthz",
        service.healthz,
        summary="Say whether the server lives: if not (503), restart it",
        response_model=Health,
        responses=unwell("A model's worker has ended or hangs."),
    )
    app.add_api_route(
        "/readyz",
        service.readyz,
        summary="Say whether the server takes requests: if not (503), send them elsewhere",
        response_model=Health,
        responses=unwell("It starts or stops, or a model's worker does not answer."),
    )
    text = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus's text format."}
    app.add_api_route(
        "/metrics",
        service.counters,
        summary="Counters for Prometheus",
        response_class=Response,
        responses={200: text, **openapi.refusals((*openapi.ANY_PATH, 401), locked=locked)},
        **key,
    )
