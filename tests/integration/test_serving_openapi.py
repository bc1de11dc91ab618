"""The server keeps to its own OpenAPI document: schemathesis makes requests from it, valid and invalid ones."""

from __future__ import annotations

import io

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode

import clead
from clead.serving import ServeSettings, create_app

EXAMPLES = 100
MEDIA = {"multipart/form-data", "application/json", "application/octet-stream"}
MEDIA |= {f"image/{kind}" for kind in ("png", "jpeg", "webp", "bmp")}
OPERATIONS = [
    ("POST", "/v1/predict"),
    ("POST", "/v1/explain"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
]


def _npy(values):
    buffer = io.BytesIO()
    np.save(buffer, np.full((len(values), 1, 8, 8), np.array(values)[:, None, None, None], np.uint8))
    return buffer.getvalue()


def _image(kind):
    def encoded(value):
        buffer = io.BytesIO()
        Image.new("L", (3, 4), value).save(buffer, kind)
        return buffer.getvalue()

    return st.integers(0, 255).map(encoded)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("serving") / "small"
    clead.train(clead.load_recipe("digits-standard", ["--train.budget", "3", "--model.name", "small_cnn"]), out=path)
    app = create_app([path], ServeSettings(threads=1, max_images=2))
    # What a string of bytes cannot say in OpenAPI: which bytes are an image, or an array.
    schemathesis.openapi.media_type(
        "application/octet-stream", st.lists(st.integers(0, 255), min_size=1, max_size=2).map(_npy)
    )
    for kind in ("png", "jpeg", "webp", "bmp"):
        schemathesis.openapi.media_type(f"image/{kind}", _image(kind.upper()))
    schemathesis.openapi.format("binary", _image("PNG"))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def check(operation, mode):
    """Return the (media type, status) of requests that were made and found to be answered as the document says."""
    seen = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def one(case):
        seen.add((case.media_type, case.call_and_validate().status_code))

    one()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_valid_requests_are_answered_as_the_document_says(document, method, path):
    seen = check(document[path][method], GenerationMode.POSITIVE)
    assert {media for media, status in seen if status == 200} == (MEDIA if method == "POST" else {None})


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/predict", "/v1/explain"])
def test_invalid_requests_are_refused_as_the_document_says(document, path):
    statuses = {status for _, status in check(document[path]["POST"], GenerationMode.NEGATIVE)}
    assert 422 in statuses


def test_nothing_in_the_document_is_left_out(document):
    found = {(found.ok().method.upper(), found.ok().path) for found in document.get_all_operations()}
    assert found == set(OPERATIONS)
