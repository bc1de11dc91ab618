"""What FastAPI cannot know for the OpenAPI document: how a body looks, what refusals mean, which names there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from clead.inference.models import ServedModel
from clead.inference.problems import MEDIA_TYPE, ProblemDetails
from clead.inference.request_parsing import NPY
from clead.inference.settings import ServeSettings

_REFUSALS = {
    400: "The body cannot be read.",
    401: "The API key is missing or wrong.",
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
}
ANY_PATH = (400, 403, 421, 429, 431)
"""Statuses that any path may answer with."""


def refusals(statuses: Iterable[int] = _REFUSALS, *, locked: bool, unavailable: str = "") -> dict[Any, dict[str, Any]]:
    """Return how these refusals look; 401 only where an API key is asked for. ``unavailable``: what 503 means here."""
    meanings = _REFUSALS | ({503: unavailable} if unavailable else {})
    return {
        status: {"model": ProblemDetails, "description": meanings[status], "content": {MEDIA_TYPE: {}}}
        for status in statuses
        if locked or status != 401
    }


def body(models: Iterable[ServedModel], settings: ServeSettings) -> dict[str, Any]:
    """Return what the body of a request may be."""

    def arrays(shape: tuple[int, ...], pixels: str, inner: dict[str, Any], required: list[str]) -> dict[str, Any]:
        for side in reversed(shape):
            inner = {"type": "array", "minItems": side, "maxItems": side, "items": inner}
        properties = {"images": several(inner), "pixels": {"type": "string", "enum": [pixels]}}
        return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}

    def several(items: dict[str, Any]) -> dict[str, Any]:
        return {"type": "array", "minItems": 1, "maxItems": settings.max_images, "items": items}

    unit, byte = {"type": "number", "minimum": 0, "maximum": 1}, {"type": "integer", "minimum": 0, "maximum": 255}
    choices = [
        choice
        for shape in dict.fromkeys(model.shape for model in models)
        for choice in (arrays(shape, "unit", unit, ["images"]), arrays(shape, "uint8", byte, ["images", "pixels"]))
    ]
    file = {"type": "string", "format": "binary"}
    form = {
        "type": "object",
        "additionalProperties": False,
        "required": ["images"],
        "properties": {"images": several(file)},
    }
    array = {**file, "description": "A .npy file (n, C, H, W): uint8, or float32 or float64 in [0, 1]."}
    schemas = {"multipart/form-data": form, "application/json": {"anyOf": choices}, NPY: array}
    for kind in ("png", "jpeg", "webp", "bmp"):
        schemas[f"image/{kind}"] = {**file, "description": "One image."}
    return {"requestBody": {"required": True, "content": {kind: {"schema": each} for kind, each in schemas.items()}}}


def complete(document: dict[str, Any], models: Mapping[str, ServedModel]) -> None:
    """Write the names of models and classes into the document, and that refusals are problem details."""
    classes = list(dict.fromkeys(name for model in models.values() for name in model.classes))
    galleries = dict.fromkeys(name for model in models.values() if model.gallery for name in model.gallery.classes)
    for where, operation in ((where, each) for where, path in document["paths"].items() for each in path.values()):
        known = list(galleries) if where == "/v1/search" else classes
        if "requestBody" not in operation:
            operation["responses"].pop("422", None)
        for parameter in operation.get("parameters", []):
            if names := {"model": list(models), "of": known}.get(parameter["name"]):
                parameter["schema"] = {"type": "string", "enum": names}
        for status, response in operation["responses"].items():
            if status != "200" and (schema := response.get("content", {}).pop("application/json", None)):
                response["content"][MEDIA_TYPE] = schema
