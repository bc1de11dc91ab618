"""What the server answers, and what it refuses."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import threading
import time
import zipfile
import zlib

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

import clead
from clead.errors import UserError
from clead.inference.hosts import hosts_of
from clead.inference.models import Outputs, ServedModel
from clead.inference.problems import Problem
from clead.measurements.detection import Mahalanobis, threshold_at
from clead.serving import ServeSettings, create_app
from clead.serving.batching import Batcher
from clead.serving.logs import JsonFormatter
from clead.serving.metrics import Metrics
from clead.settings import validated
from support import encoded

KEY = "0123456789abcdef"
NPY = {"content-type": "application/octet-stream"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("serving") / "small"
    config = clead.load_recipe(
        "digits-standard", ["--train.budget", "6", "--model.name", "small_cnn", "--eval.images", "6"]
    )
    clead.train(config, out=path)
    return path


@pytest.fixture(scope="module")
def splits(run):
    return clead.load_recipe(str(run / "config.yaml")).data.load(0)


@pytest.fixture(scope="module")
def app(run):
    return create_app([run], ServeSettings(threads=1, max_batch=8, max_images=20))


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app) as client:
        yield client


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def refused(answer, status, *words):
    """Check that this is a problem (RFC 9457) of one sentence with these words in it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status and problem["title"] and "\n" not in problem["detail"]
    for word in words:
        assert word in problem["detail"], problem["detail"]
    return problem["detail"]


def test_files_arrays_and_lists_get_the_answer_of_the_model(client, run, splits):
    images = splits.test.images[:3]
    with torch.no_grad():
        expected = clead.load(run)(images.float() / 255).softmax(1)
    pixels = images.numpy()
    bodies = {
        "npy uint8": {"content": npy(pixels), "headers": NPY},
        "npy float, Fortran order": {"content": npy(np.asfortranarray(pixels / 255)), "headers": NPY},
        "lists uint8": {"json": {"images": pixels.tolist(), "pixels": "uint8"}},
        "lists": {"json": {"images": (pixels / 255).tolist()}},
        "files": {"files": [("images", ("x.png", encoded(image[0]))) for image in pixels]},
    }
    for name, body in bodies.items():
        answer = client.post("/v1/predict", **body)
        assert answer.status_code == 200, (name, answer.text)
        content = answer.json()
        assert content["model"] == "small" and content["classes"] == [str(k) for k in range(10)]
        got = np.array([one["probabilities"] for one in content["predictions"]])
        assert np.allclose(got, expected.numpy(), atol=2e-6), name
        assert [one["label"] for one in content["predictions"]] == [str(k) for k in expected.argmax(1).tolist()]
        assert [one["probability"] for one in content["predictions"]] == got.max(1).tolist()
    alone = client.post("/v1/predict", content=encoded(pixels[0, 0]), headers={"content-type": "image/png"}).json()
    assert np.allclose(alone["predictions"][0]["probabilities"], expected[0], atol=2e-6)


def test_files_are_resized_as_the_training_does(client, splits):
    large = np.kron(splits.test.images[0, 0].numpy(), np.ones((5, 7), np.uint8))
    resized = np.asarray(Image.fromarray(large).resize((8, 8), Image.Resampling.BILINEAR))
    by_us = np.asarray(resized)[None, None]
    colour = np.repeat(large[..., None], 3, axis=2)
    answers = [
        client.post("/v1/predict", content=body, headers=headers).json()["predictions"][0]["probabilities"]
        for body, headers in (
            (npy(by_us), NPY),
            (encoded(large), {"content-type": "image/png"}),
            (encoded(colour, "BMP"), {"content-type": "image/bmp"}),
            (encoded(colour, "WEBP", lossless=True), {"content-type": "image/webp"}),
        )
    ]
    for other in answers[1:]:
        assert np.allclose(other, answers[0], atol=1e-5)


def test_a_batch_answers_as_each_image_does_alone(client, splits):
    pixels = splits.test.images[:19].numpy()  # three batches
    together = client.post("/v1/predict", content=npy(pixels), headers=NPY).json()["predictions"]
    for image, one in zip(pixels, together, strict=True):
        alone = client.post("/v1/predict", content=npy(image[None]), headers=NPY).json()["predictions"][0]
        assert alone["label"] == one["label"]
        assert np.allclose(alone["probabilities"], one["probabilities"], atol=2e-6)
        assert alone["suspicion"]["score"] == pytest.approx(one["suspicion"]["score"], rel=1e-4)


def test_suspicion_is_the_detectors_and_its_threshold_that_of_the_validation_images(client, app, run, splits):
    model = clead.load(run)
    with torch.no_grad():
        detector = Mahalanobis()
        detector.fit(model.features(splits.train.images.float() / 255), splits.train.labels)
        threshold = threshold_at(detector.score(model, splits.val.images.float() / 255), 0.05)
        scores = detector.score(model, splits.test.images[:20].float() / 255)
    got = client.post("/v1/predict", content=npy(splits.test.images[:20].numpy()), headers=NPY).json()["predictions"]
    assert app.state.models["small"].detector.threshold == pytest.approx(threshold, rel=1e-4)
    assert [one["suspicion"]["score"] for one in got] == pytest.approx(scores.tolist(), rel=1e-4)
    assert [one["suspicion"]["rejected"] for one in got] == (scores > threshold).tolist()


def test_a_rejected_image_gets_no_label_where_that_is_asked_for(client):
    noise = np.random.default_rng(0).integers(0, 256, (1, 1, 8, 8), dtype=np.uint8)
    noise[...] = np.where(noise > 127, 255, 0)
    plain = client.post("/v1/predict", content=npy(noise), headers=NPY).json()["predictions"][0]
    asked = client.post("/v1/predict?reject=true", content=npy(noise), headers=NPY).json()["predictions"][0]
    assert plain["suspicion"]["rejected"] and plain["label"] is not None
    assert asked == {**plain, "label": None}


def test_neighbours_are_the_most_similar_training_images(client, run, splits):
    model = clead.load(run)
    with torch.no_grad():
        known = model.features(splits.train.images.float() / 255).double().numpy()
        asked = model.features(splits.train.images[7:8].float() / 255).double().numpy()[0]
    cosine = known @ asked / np.linalg.norm(known, axis=1) / np.linalg.norm(asked)
    answer = client.post("/v1/explain?neighbours=4", content=npy(splits.train.images[7:8].numpy()), headers=NPY).json()
    near = answer["explanations"][0]["neighbours"]
    assert near[0]["index"] == 7 and near[0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert [one["similarity"] for one in near] == pytest.approx(np.sort(cosine)[::-1][:4].tolist(), abs=1e-5)
    for one in near:
        assert one["label"] == str(int(splits.train.labels[one["index"]]))
        assert one["similarity"] == pytest.approx(cosine[one["index"]], abs=1e-5)
        shown = base64.b64decode(one["thumbnail"].removeprefix("data:image/png;base64,"))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown))), splits.train.images[one["index"], 0].numpy())
    of = client.post("/v1/explain?neighbours=2&of=3", content=npy(splits.test.images[:1].numpy()), headers=NPY).json()
    assert [one["label"] for one in of["explanations"][0]["neighbours"]] == ["3", "3"]
    assert "can evade" in answer["detector"]["warning"] and "clead detect" in answer["detector"]["warning"]
    assert answer["detector"]["fitted"] == len(splits.train) and answer["detector"]["calibrated"] == len(splits.val)
    assert answer["detector"]["measured"] is None


def test_what_detect_measured_is_said_of_the_same_weights_only(run, tmp_path):
    record = clead.measure(
        run,
        "detect",
        config=clead.load_recipe(str(run / "config.yaml"), ["--eval.steps", "2"]),
        detectors=["mahalanobis"],
        restarts=1,
    )
    path = run / "results" / "detect.json"
    try:
        model = ServedModel("small", run, ServeSettings(threads=1))
        assert model.detector is not None and model.detector.measured is not None
        assert model.detector.measured.rate == 0.05
        assert (
            model.detector.measured.attacker_aware
            == next(p for p in record.result.detectors[0].curve if p.rate == 0.05).aware
        )
        with TestClient(create_app([run], ServeSettings(threads=1))) as client:
            shown = client.post("/v1/explain", content=npy(np.zeros((1, 1, 8, 8), np.uint8)), headers=NPY).json()[
                "detector"
            ]
        assert shown["measured"]["attacker_aware"]["accuracy"] == model.detector.measured.attacker_aware.accuracy
        assert shown["measured"]["images"] == 6 and "not measured" not in shown["warning"]
        content = json.loads(path.read_text())
        content["model"]["fingerprint"] = "0" * 32
        path.write_text(json.dumps(content))
        other = ServedModel("small", run, ServeSettings(threads=1)).detector
        assert other is not None and other.measured is None
    finally:
        path.unlink()


@pytest.fixture(scope="module")
def bomb():
    """A whole PNG of 30,000 × 30,000 black pixels, 1 bit each: about 110 kB."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(3751 * 1000)) for _ in range(30)) + packer.flush()
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(client, bomb, monkeypatch):
    assert len(bomb) < 10**6
    monkeypatch.setattr("clead.inference.request_parsing.decode", lambda *_: pytest.fail("decoded"))
    for body in (bomb, encoded(np.zeros((10_000, 10_000), bool))):  # above and below where Pillow itself gives up
        refused(client.post("/v1/predict", files=[("images", ("x.png", body))]), 413, "25000000 pixels", "image 0")
    many = [("images", ("x.png", encoded(np.zeros((3000, 3000), bool))))] * 3
    refused(client.post("/v1/predict", files=many), 413, "image 2", "together")


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("size", [(20_000_000, 1), (1, 20_000_000), (24_999, 1000), (3, 8_000_000)])
def test_a_picture_of_extreme_shape_takes_memory_for_its_own_pixels_only(client, app, monkeypatch, size, resize):
    model = app.state.models["small"]
    monkeypatch.setattr(model, "fit", model.fit._replace(resize=resize))
    made, plain = [], Image.Image.resize

    def resized(self, *args, **options):
        result = plain(self, *args, **options)
        made.append(result.width * result.height)
        return result

    monkeypatch.setattr(Image.Image, "resize", resized)
    body = encoded(np.zeros(size[::-1], bool))
    assert len(body) < 200_000
    answer = client.post("/v1/predict", content=body, headers={"content-type": "image/png"})
    assert answer.status_code == 200 and max(made, default=0) <= 2**24


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "a")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (encoded(np.zeros((64, 64), np.uint8), "JPEG")[:-200], 422, ["image 0", "not a readable image"]),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", 415, ["an SVG"]),
        (zipped(), 415, ["a zip archive"]),
        (encoded(np.zeros((8, 8), np.uint8), "GIF"), 415, ["a GIF"]),
        (encoded(np.zeros((8, 8), np.uint8), "TIFF"), 415, ["a TIFF"]),
        (npy(np.zeros(3)), 415, ["a NumPy array"]),
        (b"", 422, ["0 bytes"]),
        (b"\x89PNG\r\n\x1a\n", 415, ["unknown format"]),
        (b"http://127.0.0.1/cat.png", 415, ["unknown format"]),
        (b"/etc/passwd", 415, ["unknown format"]),
    ],
    ids=["truncated JPEG", "SVG", "zip", "GIF", "TIFF", "npy", "empty", "header only", "address", "path"],
)
def test_files_that_are_no_readable_image(client, body, status, words):
    refused(client.post("/v1/predict", files=[("images", ("x.png", body))]), status, *words)
    alone = client.post("/v1/explain", content=body, headers={"content-type": "image/png"})
    refused(alone, status, *words)


def _with(value, dtype=np.float32):
    array = np.zeros((2, 1, 8, 8), dtype)
    array[1, 0, 3, 4] = value
    return array


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (_with(np.nan), ["images[1, 0, 3, 4]", "nan"]),
        (_with(np.inf), ["images[1, 0, 3, 4]", "inf"]),
        (_with(-0.01, np.float64), ["[0, 1]", "-0.01"]),
        (_with(200.0), ["[0, 1]", "200"]),
        (np.zeros((1, 3, 8, 8), np.uint8), ["n×1×8×8", "1×3×8×8"]),
        (np.zeros((1, 1, 8, 9), np.uint8), ["n×1×8×8", "1×1×8×9"]),
        (np.zeros((8, 8), np.uint8), ["got 8×8"]),
        (np.zeros((0, 1, 8, 8), np.uint8), ["1 to 20", "got 0"]),
        (np.zeros((1, 1, 8, 8), np.int64), ["uint8", "int64"]),
        (np.zeros((1, 1, 8, 8), object), ["uint8", "object"]),
    ],
    ids=["nan", "inf", "negative", "above", "channels", "size", "dimensions", "none", "integers", "objects"],
)
def test_arrays_that_are_no_images(client, array, words):
    refused(client.post("/v1/predict", content=npy(array), headers=NPY), 422, *words)


def test_an_array_whose_header_claims_a_terabyte_allocates_nothing(client):
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 1, 8, 8), }\n"
    body = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    refused(client.post("/v1/predict", content=body, headers=NPY), 400, "contradicts")
    refused(client.post("/v1/predict", content=b"\x80\x04\x95", headers=NPY), 400, ".npy")  # a pickle


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, ["not JSON"]),
        (b"[1]", 422, ["body"]),
        (b'{"images": []}', 422, ["images"]),
        (b'{"images": [[[[true]]]]}', 422, ["images.0.0.0.0"]),
        (b'{"images": [[[["0.5"]]]]}', 422, ["images.0.0.0.0"]),
        (b'{"images": [[[[0.5], [0.5, 0.5]]]]}', 422, ["several lengths"]),
        (b'{"images": [[[[0.5]]]]}', 422, ["got 1×1×1×1"]),
        (b'{"url": "http://127.0.0.1/a.png"}', 422, ["images"]),
        (b'{"images": [[[[1]]]], "pixels": "int"}', 422, ["pixels"]),
    ],
)
def test_lists_that_are_no_images(client, body, status, words):
    refused(client.post("/v1/predict", content=body, headers={"content-type": "application/json"}), status, *words)


def test_pixels_in_lists_are_in_the_range_that_is_stated(client):
    for value, pixels, word in (
        ("NaN", "unit", "nan"),
        ("2", "unit", "[0, 1]"),
        ("256", "uint8", "[0, 255]"),
        ("0.5", "uint8", "whole"),
    ):
        body = json.dumps({"images": np.zeros((1, 1, 8, 8)).tolist(), "pixels": pixels}).replace("0.0", value, 1)
        answer = client.post("/v1/predict", content=body.encode(), headers={"content-type": "application/json"})
        refused(answer, 422, "images[0, 0, 0, 0]", word)


@pytest.mark.parametrize("shape", ["(-1, -64)", "(-1, 1, -8, 8)", "(True, 1, 8, 8)"])
def test_shapes_that_no_array_has_are_refused(client, shape):
    body = npy(np.zeros((1, 1, 8, 8), np.uint8))
    at = body.index(b"(1, 1, 8, 8)")
    header = body[:at] + shape.encode() + body[at + 12 : 127 + 12 - len(shape)] + b"\n"
    refused(client.post("/v1/predict", content=(header + body[128:]), headers=NPY), 400, ".npy")


def test_millions_of_empty_lists_are_refused_unread(client, monkeypatch):
    monkeypatch.setattr("clead.inference.request_parsing.Arrays", None)  # would take seconds
    for body in (b'{"images": [' + b"[]," * 10**6 + b"[]]}", b'{"images": [[[[' + b"0," * 10**6 + b"0]]]]}"):
        answer = client.post("/v1/predict", content=body, headers={"content-type": "application/json"})
        refused(answer, 422, "at most 20 images of 1×8×8", "send fewer")


def test_an_answer_shows_so_many_training_images_at_most(client):
    body = npy(np.zeros((20, 1, 8, 8), np.uint8))
    refused(client.post("/v1/explain?neighbours=50", content=body, headers=NPY), 422, "640", "1000", "ask for fewer")
    assert client.post("/v1/explain?neighbours=32", content=body, headers=NPY).status_code == 200


def test_limits_on_images_bytes_and_kinds(client):
    small = encoded(np.zeros((8, 8), np.uint8))
    refused(
        client.post("/v1/predict", content=npy(np.zeros((21, 1, 8, 8), np.uint8)), headers=NPY), 422, "1 to 20", "21"
    )
    refused(client.post("/v1/predict", files=[("images", ("x.png", small))] * 21), 422, "1 to 20")
    refused(client.post("/v1/predict", json={"images": np.zeros((21, 1, 8, 8)).tolist()}), 422, "1 to 20")
    refused(client.post("/v1/predict", content=bytes(16 * 2**20 + 1), headers=NPY), 413, str(16 * 2**20))
    streamed = (bytes(2**20) for _ in range(17))  # no length is stated
    refused(client.post("/v1/predict", content=streamed, headers=NPY), 413, str(16 * 2**20))
    refused(client.post("/v1/predict", content=b"x", headers={"content-type": "text/plain"}), 415, "text/plain")
    refused(client.post("/v1/predict", content=b"<svg/>", headers={"content-type": "image/svg+xml"}), 415, "SVG")
    refused(client.post("/v1/predict", content=b""), 415, "none")
    refused(client.post("/v1/predict", files=[("picture", ("x.png", small))]), 422, "'images'", "'picture'")
    refused(client.post("/v1/predict", data={"images": "x"}, files=[("images", ("x.png", small))]), 422, "plain field")
    broken = {"content-type": "multipart/form-data"}
    refused(client.post("/v1/predict", content=b"x", headers=broken), 400, "multipart")
    refused(
        client.post("/v1/predict", content=b"x", headers={"content-type": "multipart/form-data; boundary=a"}),
        400,
        "multipart",
    )


def test_unknown_names_and_paths(client):
    body = {"content": npy(np.zeros((1, 1, 8, 8), np.uint8)), "headers": NPY}
    refused(client.post("/v1/predict?model=smal", **body), 422, "'smal'", "did you mean 'small'?")
    refused(client.post("/v1/explain?of=cat", **body), 422, "'cat'", "known: 0, 1")
    refused(client.post("/v1/explain?neighbours=0", **body), 422, "neighbours")
    refused(client.post("/v1/predict?rejct=true", **body), 422, "rejct")
    refused(client.get("/v2"), 404)
    assert "POST" in client.get("/v1/predict").headers["allow"]
    refused(client.get("/v1/predict"), 405)


def test_metrics_count_what_was_answered(run, splits):
    with TestClient(create_app([run], ServeSettings(threads=1, max_batch=8))) as client:
        assert client.get("/healthz").json() == {"status": "ok", "version": clead.__version__, "models": ["small"]}
        client.post("/v1/predict", content=npy(splits.test.images[:9].numpy()), headers=NPY)
        client.post("/v1/predict", content=b"x", headers=NPY)
        client.get("/anything/else")
        text = client.get("/metrics").text
    for line in (
        'clead_requests_total{path="/v1/predict",status="200"} 1.0',
        'clead_requests_total{path="/v1/predict",status="400"} 1.0',
        'clead_requests_total{path="other",status="404"} 1.0',
        'clead_images_total{model="small"} 9.0',
        'clead_batch_images_count{model="small"} 2.0',
        'clead_batch_images_sum{model="small"} 9.0',
        'clead_queue_images{model="small"} 0.0',
        "clead_requests_in_flight 0.0",
        'clead_request_seconds_count{path="/v1/predict"} 2.0',
    ):
        assert line in text, line


def test_the_pages_that_describe_it_load_nothing_from_elsewhere(client):
    for path in ("/docs", "/redoc"):
        page = client.get(path)
        assert page.status_code == 200 and "https://" not in page.text
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js"):
        assert client.get(f"/static-offline-docs/{asset}").status_code == 200


def test_the_api_key(run):
    body = {"content": npy(np.zeros((1, 1, 8, 8), np.uint8))}
    settings = validated(ServeSettings, {"threads": 1, "detector": None, "api_key": KEY})
    assert KEY not in repr(settings)
    with TestClient(create_app([run], settings)) as client:
        for headers in ({}, {"x-api-key": KEY[:-1]}, {"authorization": f"Basic {KEY}"}, {"x-api-key": b"\xe9" * 16}):
            answer = client.post("/v1/predict", **body, headers={**NPY, **headers})
            refused(answer, 401, "X-API-Key")
            assert answer.headers["www-authenticate"] == "Bearer"
        refused(client.get("/metrics"), 401)
        for headers in ({"x-api-key": KEY}, {"authorization": f"Bearer {KEY}"}):
            assert client.post("/v1/predict", **body, headers={**NPY, **headers}).status_code == 200
        assert client.get("/healthz").status_code == client.get("/docs").status_code == 200
        assert "APIKeyHeader" in client.get("/openapi.json").json()["components"]["securitySchemes"]
    with pytest.raises(UserError, match="api_key"):
        validated(ServeSettings, {"api_key": "short"})


def test_without_a_detector_there_is_nothing_to_explain(run, tmp_path):
    settings = ServeSettings(threads=1, detector=None)
    with TestClient(create_app([run], settings, ["--data.name", "auto", "--data.path", str(tmp_path)])) as client:
        answer = client.post("/v1/predict", content=npy(np.zeros((1, 1, 8, 8), np.uint8)), headers=NPY)
        assert answer.json()["predictions"][0]["suspicion"] is None
        refused(client.post("/v1/explain", content=b"", headers=NPY), 404)
        assert "/v1/explain" not in client.get("/openapi.json").json()["paths"]
    with pytest.raises(UserError, match="--detector none"):
        create_app([run], ServeSettings(threads=1), ["--data.name", "auto", "--data.path", str(tmp_path)])


def test_several_runs_and_the_same_one_twice(run, tmp_path):
    import shutil

    second = tmp_path / "small"
    shutil.copytree(run, second)
    settings = ServeSettings(threads=1, detector=None)
    names = list(create_app([run, second], settings).state.models)
    assert names == [str(run), str(second)]
    with pytest.raises(UserError, match="twice"):
        create_app([run, run], settings)
    with pytest.raises(UserError, match="which run"):
        create_app([], settings)


def test_more_requests_than_the_limit_are_told_to_come_back_and_slow_bodies_take_no_place(run, monkeypatch):
    app = create_app([run], ServeSettings(threads=1, detector=None, max_requests=1))
    body = npy(np.zeros((1, 1, 8, 8), np.uint8))
    computing, finish, plain = threading.Event(), threading.Event(), ServedModel.answer

    def slow(self, images):
        computing.set()
        assert finish.wait(60)
        return plain(self, images)

    async def scenario():
        begun, go = asyncio.Event(), asyncio.Event()

        async def slowly():
            begun.set()
            await go.wait()
            yield body

        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x") as client,
        ):
            uploading = asyncio.create_task(client.post("/v1/predict", content=slowly(), headers=NPY))
            await begun.wait()
            while_uploading = await client.post("/v1/predict", content=body, headers=NPY)
            monkeypatch.setattr(ServedModel, "answer", slow)
            app.state.batchers["small"]._work = app.state.models["small"].answer
            first = asyncio.create_task(client.post("/v1/predict", content=body, headers=NPY))
            await asyncio.to_thread(computing.wait, 60)
            refusals = [await client.post("/v1/predict", content=body, headers=NPY)]
            health = await client.get("/healthz")
            go.set()
            refusals.append(await uploading)  # arrived when the place was taken
            finish.set()
            return (
                while_uploading,
                await first,
                refusals,
                health,
                await client.post("/v1/predict", content=body, headers=NPY),
            )

    while_uploading, first, refusals, health, last = asyncio.run(scenario())
    for refusal in refusals:
        refused(refusal, 503, "1 requests")
        assert refusal.headers["retry-after"] == "1"
    assert {answer.status_code for answer in (while_uploading, first, health, last)} == {200}


def test_an_answer_that_takes_too_long_is_given_up(run, monkeypatch):
    go, plain = threading.Event(), ServedModel.answer

    def stuck(self, images):
        assert go.wait(60)
        return plain(self, images)

    monkeypatch.setattr(ServedModel, "answer", stuck)
    app = create_app([run], ServeSettings(threads=1, detector=None, request_seconds=0.05))
    with TestClient(app) as client:
        answer = client.post("/v1/predict", content=npy(np.zeros((1, 1, 8, 8), np.uint8)), headers=NPY)
        go.set()
        refused(answer, 503, "0.05 seconds")
        assert answer.headers["retry-after"] == "5"


def test_a_failing_model_is_the_servers_fault_and_the_next_request_is_answered(run, monkeypatch):
    plain = ServedModel.answer

    def broken(self, images):
        if images[0].max() == 255:
            raise RuntimeError("secret")
        return plain(self, images)

    monkeypatch.setattr(ServedModel, "answer", broken)
    app = create_app([run], ServeSettings(threads=1, detector=None))
    with TestClient(app, raise_server_exceptions=False) as client:
        bad = client.post("/v1/predict", content=npy(np.full((1, 1, 8, 8), 255, np.uint8)), headers=NPY)
        assert "secret" not in refused(bad, 500)
        good = client.post("/v1/predict", content=npy(np.zeros((1, 1, 8, 8), np.uint8)), headers=NPY)
        assert good.status_code == 200


def test_what_waits_goes_together_in_order_and_what_was_given_up_is_not_computed():
    begun, go, seen = threading.Event(), threading.Event(), []

    def work(parts):
        begun.set()
        assert go.wait(60)
        values = np.concatenate(parts)[:, 0, 0, 0]
        seen.append(values.tolist())
        return Outputs(values[:, None], values[:, None], None)

    def image(*values):
        return np.array(values, np.float32)[:, None, None, None]

    async def scenario():
        batcher = Batcher(work, 4, "m", Metrics())
        batcher.start()
        first = asyncio.create_task(batcher.outputs(image(0)))
        await asyncio.sleep(0)
        await asyncio.to_thread(begun.wait, 60)  # the thread has gone to work with it
        rest = [
            asyncio.create_task(batcher.outputs(image(*v)))
            for v in ((1,), (2, 3), (4,), (5, 6, 7, 8, 9), (10, 11, 12, 13))
        ]
        await asyncio.sleep(0)
        rest[2].cancel()
        await asyncio.sleep(0)
        go.set()
        found = [await first, await rest[0], await rest[1], await rest[3], await rest[4]]
        with pytest.raises(asyncio.CancelledError):
            await rest[2]
        await asyncio.to_thread(batcher.stop)
        return [one.probabilities[:, 0].tolist() for one in found]

    assert asyncio.run(scenario()) == [[0], [1], [2, 3], [5, 6, 7, 8, 9], [10, 11, 12, 13]]
    assert seen[0] == [0] and seen[1] == [1, 2, 3]
    assert [value for batch in seen for value in batch] == [0, 1, 2, 3, *range(5, 14)]
    assert all(len(batch) <= 4 for batch in seen)


@pytest.mark.slow
def test_the_onnx_engine_answers_as_torch_does(client, run, splits):
    pytest.importorskip("onnxscript")
    pixels = npy(splits.test.images[:20].numpy())
    with TestClient(create_app([run], ServeSettings(threads=1, engine="onnx", max_batch=8, max_images=20))) as other:
        ours = other.post("/v1/explain?neighbours=1", content=pixels, headers=NPY).json()
    torchs = client.post("/v1/explain?neighbours=1", content=pixels, headers=NPY).json()
    assert ours["detector"]["threshold"] == pytest.approx(torchs["detector"]["threshold"], rel=1e-3)
    for a, b in zip(ours["explanations"], torchs["explanations"], strict=True):
        assert a["label"] == b["label"] and np.allclose(a["probabilities"], b["probabilities"], atol=1e-5)
        assert a["suspicion"]["score"] == pytest.approx(b["suspicion"]["score"], rel=1e-3)
        assert a["neighbours"][0]["index"] == b["neighbours"][0]["index"]


# One request fails alone


def arrays(*values):
    """Return images (n, 1, 1, 1), one for each value."""
    return np.array(values, np.float32)[:, None, None, None]


def answered(work, requests, max_batch=8, metrics=None):
    """Return what a batcher answers to ``requests``, which arrive together while its thread is busy."""
    begun, go = threading.Event(), threading.Event()

    def waiting(images):
        if not go.is_set():
            begun.set()
            assert go.wait(60)
            return as_outputs(images)
        return work(images)

    async def scenario():
        batcher = Batcher(waiting, max_batch, "m", metrics or Metrics())
        batcher.start()
        first = asyncio.create_task(batcher.outputs(arrays(0)))
        await asyncio.to_thread(begun.wait, 60)
        tasks = [asyncio.create_task(batcher.outputs(request)) for request in requests]
        await asyncio.sleep(0)
        go.set()
        await first
        answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        assert batcher.trouble() is None  # the thread lives
        after = await asyncio.wait_for(batcher.outputs(arrays(7)), 60) if work is not None else None
        await asyncio.to_thread(batcher.stop)
        return answers, after

    answers, after = asyncio.run(scenario())
    assert after.probabilities[0, 0] == 7
    return [a if isinstance(a, Exception) else a.probabilities[:, 0].tolist() for a in answers]


def as_outputs(images):
    values = np.concatenate(images)[:, 0, 0, 0]
    return Outputs(values[:, None], values[:, None], None)


class _Odd(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "error"),
        (StopIteration(), "error"),  # which no future can hold
        (asyncio.CancelledError(), "exit"),
        (SystemExit(0), "exit"),
        (KeyboardInterrupt(), "exit"),
        (GeneratorExit(), "exit"),
        (_Odd(), "exit"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_one_image_makes_a_model_raise_fails_its_own_request_only(error, kind):
    calls, metrics = [], Metrics()

    def work(images):
        calls.append(sum(map(len, images)))
        if any((image == 5).any() for image in images):
            raise error
        return as_outputs(images)

    requests = [arrays(1), arrays(2, 3), arrays(5), arrays(4), arrays(6), arrays(8, 9)]
    found = answered(work, requests, metrics=metrics)
    assert found[:2] + found[3:] == [[1], [2, 3], [4], [6], [8, 9]]
    assert isinstance(found[2], Problem) and found[2].status == 500
    assert len(calls) <= 8  # halved, not one by one
    assert f'clead_model_failures_total{{kind="{kind}",model="m"}} 1.0' in metrics.text().decode()


def test_two_bad_images_in_one_batch_fail_two_requests():
    def work(images):
        if (np.concatenate(images) > 90).any():
            raise ValueError
        return as_outputs(images)

    found = answered(work, [arrays(1), arrays(91), arrays(2), arrays(3), arrays(92, 4), arrays(6)])
    assert [index for index, one in enumerate(found) if isinstance(one, Problem)] == [1, 4]


def test_nan_at_one_image_fails_its_own_request_and_names_it():
    def work(images):
        outputs = as_outputs(images)
        outputs.probabilities[outputs.probabilities == 5] = np.nan
        return outputs

    found = answered(work, [arrays(1), arrays(2, 5), arrays(3)])
    assert found[0] == [1] and found[2] == [3]
    assert found[1].status == 500 and "image 1: the model answered NaN" in found[1].detail


def test_an_image_that_makes_the_whole_batch_nan_fails_alone():
    def work(images):  # such as a model that normalises over its batch
        outputs = as_outputs(images)
        return (
            Outputs(outputs.probabilities * np.nan, outputs.features, None) if 5 in outputs.probabilities else outputs
        )

    found = answered(work, [arrays(1), arrays(5), arrays(3), arrays(4, 6)])
    assert found[0] == [1] and found[2:] == [[3], [4, 6]] and found[1].status == 500


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"
        ),
        RuntimeError("[ONNXRuntimeError] : 6 : BFCArena: Failed to allocate memory for requested buffer"),
    ],
    ids=["python", "cuda", "cpu", "onnxruntime"],
)
@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_batch_that_does_not_fit_into_memory_is_split_down_to_images(error, most):
    def work(images):
        if sum(map(len, images)) > most:
            raise error
        return as_outputs(images)

    requests = [arrays(1), arrays(2, 3, 4, 5), arrays(6)]
    assert answered(work, requests) == [[1], [2, 3, 4, 5], [6]]


def test_an_image_that_never_fits_is_told_to_come_back():
    def work(images):
        if (np.concatenate(images) == 5).any():
            raise MemoryError
        return as_outputs(images)

    found = answered(work, [arrays(1), arrays(2, 5)])
    assert found[0] == [1] and found[1].status == 503 and found[1].headers["Retry-After"]


def test_a_request_longer_than_a_batch_fails_as_a_whole_and_names_its_image():
    def work(images):
        outputs = as_outputs(images)
        outputs.features[outputs.features == 5] = np.inf
        return outputs

    found = answered(work, [arrays(1, 2, 3, 4, 6, 5, 8), arrays(9)], max_batch=2)
    assert "image 5" in found[0].detail and found[1] == [9]


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_model_that_answers_another_number_of_rows_gives_nobody_anothers_answer(run, monkeypatch, rows):
    model = ServedModel("small", run, ServeSettings(threads=1, detector=None))
    plain = model.network.features_and_logits
    monkeypatch.setattr(
        model.network, "features_and_logits", lambda x: tuple(v[:rows] for v in plain(torch.cat([x, x])))
    )
    with pytest.raises(ValueError, match="2 images of 10 classes"):
        model.answer([np.zeros((1, 1, 8, 8), np.uint8), np.ones((1, 1, 8, 8), np.uint8)])


def test_a_model_that_writes_into_its_input_changes_no_array_and_no_score(run, splits, monkeypatch):
    model = ServedModel("small", run, ServeSettings(threads=1, detector="mahalanobis"))
    pixels = (splits.test.images[:3].float() / 255).numpy()
    before, expected = pixels.copy(), model.answer([pixels])
    plain = model.network.features_and_logits

    def writes(x):
        outputs = plain(x)
        x.zero_()
        return outputs

    monkeypatch.setattr(model.network, "features_and_logits", writes)
    got = model.answer([pixels])
    assert np.array_equal(pixels, before)
    for ours, theirs in zip(got, expected, strict=True):
        assert np.array_equal(ours, theirs)


def test_a_worker_that_ended_is_said_and_requests_do_not_hang(run, monkeypatch):
    app = create_app([run], ServeSettings(threads=1, detector=None))
    body = {"content": npy(np.zeros((1, 1, 8, 8), np.uint8)), "headers": NPY}
    batcher = app.state.batchers["small"]
    with TestClient(app) as client:
        assert client.get("/healthz").json()["status"] == "ok" and client.get("/readyz").json()["status"] == "ready"
        batcher._waiting.put(None)  # ends the thread
        batcher._thread.join(60)
        for path in ("/healthz", "/readyz"):
            refused(client.get(path), 503, "worker of model small", "restart")
        assert client.head("/readyz").status_code == 503
        answer = client.post("/v1/predict", **body)
        refused(answer, 503, "worker of model small")
        assert answer.headers["retry-after"]
        batcher.start()
        assert client.post("/v1/predict", **body).status_code == client.get("/healthz").status_code == 200


def test_requests_that_wait_when_the_worker_ends_are_answered():
    begun, go = threading.Event(), threading.Event()

    def work(images):
        begun.set()
        assert go.wait(60)
        return as_outputs(images)

    async def scenario():
        batcher = Batcher(work, 1, "m", Metrics())
        batcher.start()
        tasks = [asyncio.create_task(batcher.outputs(arrays(0)))]
        await asyncio.to_thread(begun.wait, 60)
        batcher._waiting.put(None)
        tasks += [asyncio.create_task(batcher.outputs(arrays(k))) for k in (1, 2)]
        await asyncio.sleep(0)
        go.set()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)

    first, *rest = asyncio.run(scenario())
    assert first.probabilities[0, 0] == 0
    assert all(isinstance(each, Problem) and each.status == 503 and each.headers["Retry-After"] for each in rest)


def test_an_error_outside_of_the_model_fails_one_batch_and_the_worker_goes_on(monkeypatch):
    async def scenario():
        batcher = Batcher(as_outputs, 4, "m", Metrics())
        batcher.start()
        answers = [await batcher.outputs(arrays(1))]
        monkeypatch.setattr(Batcher, "_compute", lambda self, batch: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(Problem) as caught:
            await asyncio.wait_for(batcher.outputs(arrays(2)), 60)
        monkeypatch.undo()
        answers.append(await asyncio.wait_for(batcher.outputs(arrays(3)), 60))
        await asyncio.to_thread(batcher.stop)
        return answers, caught.value

    answers, problem = asyncio.run(scenario())
    assert [answer.probabilities[0, 0] for answer in answers] == [1, 3] and problem.status == 503


def test_a_model_that_hangs_is_not_ready_and_later_not_alive(run, monkeypatch):
    go, plain = threading.Event(), ServedModel.answer

    def stuck(self, images):
        assert go.wait(60)
        return plain(self, images)

    monkeypatch.setattr(ServedModel, "answer", stuck)
    app = create_app([run], ServeSettings(threads=1, detector=None, request_seconds=0.1))
    body = {"content": npy(np.zeros((1, 1, 8, 8), np.uint8)), "headers": NPY}
    with TestClient(app) as client:
        refused(client.post("/v1/predict", **body), 503, "0.1 seconds")
        deadline = time.monotonic() + 30
        while client.get("/readyz").status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        refused(client.get("/readyz"), 503, "has worked on one batch")
        assert client.get("/healthz").status_code == 200  # it may only be slow
        refused(client.post("/v1/predict", **body), 503, "has worked on one batch")  # at once
        while client.get("/healthz").status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        refused(client.get("/healthz"), 503, "restart")
        go.set()
        while client.get("/readyz").status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert client.post("/v1/predict", **body).status_code == client.get("/healthz").status_code == 200


def test_nothing_waits_for_a_server_that_has_not_started(run):
    app = create_app([run], ServeSettings(threads=1, detector=None))
    client = TestClient(app)  # no lifespan
    refused(client.post("/v1/predict", content=npy(np.zeros((1, 1, 8, 8), np.uint8)), headers=NPY), 503, "does not run")
    refused(client.get("/readyz"), 503)


@pytest.mark.parametrize("size", [1, 20], ids=["at once", "in a thread"])
def test_what_would_end_the_process_while_reading_is_answered_500(run, monkeypatch, size):
    def leaves(*_):
        raise SystemExit(3)

    app = create_app([run], ServeSettings(threads=1, detector=None))
    monkeypatch.setattr("clead.inference.request_parsing.from_json", leaves)
    with TestClient(app, raise_server_exceptions=False) as client:
        body = {"images": np.zeros((size, 1, 80, 80)).tolist()}
        refused(client.post("/v1/predict", json=body), 500)
        assert client.get("/healthz").status_code == 200


def test_too_little_memory_for_reading_is_said(run, monkeypatch):
    def none_left(*_):
        raise MemoryError

    app = create_app([run], ServeSettings(threads=1, detector=None))
    monkeypatch.setattr("clead.inference.request_parsing.from_npy", none_left)
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.post("/v1/predict", content=npy(np.zeros((1, 1, 8, 8), np.uint8)), headers=NPY)
        refused(answer, 503, "memory")
        assert answer.headers["retry-after"]


# What is held in memory


def test_all_bodies_together_are_bounded_and_let_go(run):
    app = create_app([run], ServeSettings(threads=1, detector=None, max_body=4096, max_buffered=6000))
    body = npy(np.zeros((40, 1, 8, 8), np.uint8))  # 2,688 bytes

    async def scenario():
        go, begun = asyncio.Event(), asyncio.Semaphore(0)

        async def slowly():
            yield body[:2000]
            begun.release()
            await go.wait()
            yield body[2000:]

        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x") as client,
        ):
            slow = [asyncio.create_task(client.post("/v1/predict", content=slowly(), headers=NPY)) for _ in range(2)]
            await begun.acquire()
            await begun.acquire()
            third = await client.post("/v1/predict", content=body, headers=NPY)
            go.set()
            return third, await asyncio.gather(*slow), await client.post("/v1/predict", content=body, headers=NPY)

    third, slow, last = asyncio.run(scenario())
    refused(third, 503, "6000 bytes")
    assert third.headers["retry-after"] == "1"
    assert [each.status_code for each in (*slow, last)] == [200] * 3


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"[" * 200_000, 422),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400),
        (b'{"images": ' + b"[" * 3000 + b"]" * 3000 + b"}", 422),
        (b'{"images": [[[[1e99999]]]]}', 422),
        (b'{"images": [[[[' + b"9" * 100_000 + b"]]]]}", 400),
        (b'{"images": [[[["' + b"A" * 500_000 + b'"]]]]}', 422),
        (b'\xff\xfe{"images": 1}', 400),
        (b'{"images": [[[[0.1]]]]} trailing', 400),
    ],
    ids=["lists", "objects", "balanced", "exponent", "digits", "base64", "utf-16", "trailing"],
)
def test_json_that_is_deep_or_long_is_refused_quickly(client, content, status):
    started = time.monotonic()
    answer = client.post("/v1/predict", content=content, headers={"content-type": "application/json"})
    refused(answer, status)
    assert len(answer.content) < 1000 and time.monotonic() - started < 2


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "x"])
def test_packed_bodies_are_not_unpacked(client, coding):
    packed = zlib.compress(npy(np.zeros((1, 1, 8, 8), np.uint8)))
    answer = client.post("/v1/predict", content=packed, headers={**NPY, "content-encoding": coding})
    refused(answer, 415, "content-encoding", coding)


# Names, pages from elsewhere


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("LOCALHOST.:80", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("[0:0:0:0:0:0:0:1]", 200),
        ("demo.example.org", 200),
        ("a.b.proxy.org", 200),
        ("proxy.org", 421),
        ("evilproxy.org", 421),
        ("demo.example.org.evil.org", 421),
        ("evil.org", 421),
        ("127.0.0.1.nip.io", 421),
        ("10.0.0.7", 421),
        ("0.0.0.0", 421),
        ("[::2]", 421),
        ("localhost@evil.org", 400),
        ("localhost:99999", 400),
        ("localhost:80:80", 400),
        ("[::1", 400),
        ("local host", 400),
        ("", 400),
    ],
)
def test_only_the_servers_own_names_are_answered_to(run, host, status):
    app = create_app([run], ServeSettings(threads=1, detector=None, allowed_hosts=("Demo.example.org.", "*.proxy.org")))
    client = TestClient(app)
    for path in ("/healthz", "/openapi.json", "/nothing"):
        answer = client.get(path, headers={"host": host})
        if status == 200:
            assert answer.status_code in (200, 404, 503)
        else:
            refused(answer, status, "Host")


def test_a_second_host_header_and_none_are_refused(run):
    hosts = hosts_of(["demo.org"])
    assert hosts is not None
    assert hosts.refusal({"headers": [(b"host", b"demo.org")]}) is None
    for headers in ([], [(b"host", b"demo.org"), (b"host", b"evil.org")]):
        problem = hosts.refusal({"headers": headers})
        assert problem is not None and problem.status == 400


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 415),
        ("http://localhost", 415),
        ("https://demo.org", 415),
        ("http://DEMO.org:3000", 415),
        ("http://evil.org", 403),
        ("http://demo.org.evil.org", 403),
        ("null", 403),
        ("file://", 403),
        ("chrome-extension://localhost", 403),
        ("http://localhost.evil.org:80", 403),
        ("http://localhost@evil.org", 403),
        ("", 403),
    ],
)
def test_pages_from_elsewhere_may_not_ask(run, origin, status):
    app = create_app([run], ServeSettings(threads=1, detector=None, allowed_hosts=("demo.org",)))
    headers = {"host": "localhost:8000", **({} if origin is None else {"origin": origin})}
    refused(TestClient(app).post("/v1/predict", content=b"x", headers=headers), status)


def test_what_a_server_is_bound_to_decides_what_it_answers_to():
    def good(hosts, name):
        return hosts.refusal({"headers": [(b"host", name.encode())]}) is None

    loopback, everywhere = hosts_of([], "127.0.0.1", "127.0.0.1"), hosts_of([], "0.0.0.0", "0.0.0.0")
    named, six = hosts_of([], "Box.lan", "10.0.0.7"), hosts_of([], "::", "::")
    assert loopback and everywhere and named and six
    assert good(loopback, "localhost:80") and not good(loopback, "10.0.0.7") and not good(loopback, "box.lan")
    # An address cannot be rebound; a page at an address is still a page from elsewhere.
    assert good(everywhere, "192.0.2.1:80") and good(six, "[2001:db8::1]") and not good(everywhere, "evil.org")
    assert everywhere.refusal({"headers": [(b"host", b"10.0.0.7"), (b"origin", b"http://6.6.6.6")]}) is not None
    assert everywhere.refusal({"headers": [(b"host", b"10.0.0.7"), (b"origin", b"http://10.0.0.7:80")]}) is None
    assert (
        good(named, "box.lan")
        and good(named, "10.0.0.7:8000")
        and good(named, "localhost")
        and not good(named, "10.0.0.8")
    )
    assert hosts_of(["*"], "127.0.0.1", "127.0.0.1") is None


@pytest.mark.parametrize(
    "name", ["http://demo.org", "demo.org:80", "demo.org/x", "", "a b", "[::1]:80", "*", "::1", "*.x.org"]
)
def test_allowed_hosts_are_names(name):
    if name in ("*", "::1", "*.x.org"):
        assert validated(ServeSettings, {"allowed_hosts": (name,)}).allowed_hosts == (name,)
        return
    with pytest.raises(UserError, match="--allowed-hosts: must be names or addresses without"):
        validated(ServeSettings, {"allowed_hosts": (name,)})


# HTTP


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"])
def test_head_answers_as_get_without_a_body(client, path):
    got, head = client.get(path), client.head(path)
    assert head.status_code == got.status_code == 200 and head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("OPTIONS", "/v1/predict", 204, "OPTIONS, POST"),
        ("OPTIONS", "/healthz", 204, "GET, HEAD, OPTIONS"),
        ("DELETE", "/v1/explain", 405, "OPTIONS, POST"),
        ("HEAD", "/v1/predict", 405, "OPTIONS, POST"),
        ("POST", "/readyz", 405, "GET, HEAD, OPTIONS"),
        ("BREW", "/healthz", 405, "GET, HEAD, OPTIONS"),
        ("OPTIONS", "/nothing", 404, None),
    ],
)
def test_methods_that_a_path_does_not_take_are_told_which_it_does(client, method, path, status, allow):
    answer = client.request(method, path)
    assert answer.status_code == status and answer.headers.get("allow") == allow
    if status > 400 and method != "HEAD":
        refused(answer, status)


def test_errors_that_others_make_are_problems_too(run):
    from starlette.responses import JSONResponse, PlainTextResponse

    app = create_app([run], ServeSettings(threads=1, detector=None))
    app.add_route("/plain", lambda request: PlainTextResponse("secret", 409, {"Retry-After": "3"}))
    app.add_route("/json", lambda request: JSONResponse({"detail": "the queue is full"}, 499))
    app.add_route("/odd", lambda request: JSONResponse({"detail": "a\x1b[2J"}, 500))
    app.add_route("/list", lambda request: JSONResponse([1], 500))
    client = TestClient(app)
    answer = client.get("/plain")
    assert "secret" not in refused(answer, 409) and answer.headers["retry-after"] == "3"
    assert refused(client.get("/json"), 499) == "the queue is full"
    assert client.head("/json").status_code in (405, 499)
    assert "2J" not in refused(client.get("/odd"), 500) and refused(client.get("/list"), 500)
    refused(client.get("/static-offline-docs/nothing"), 404)


@pytest.mark.parametrize("path", ["/a%0d%0aInjected:%20x", "/%1b[2J", "/%e2%80%ae", "/" + "x" * 5000])
def test_a_path_cannot_forge_log_lines(client, caplog, path):
    caplog.set_level("INFO", "clead.serving")
    refused(client.get(path), 404)
    line = JsonFormatter().format(caplog.records[-1])
    assert line.isprintable() and line.isascii() and len(line) < 2500
    assert json.loads(line)["status"] == 404


def test_every_setting_of_a_server_is_an_option(monkeypatch):
    import clead.serving
    from clead.cli.app import app

    given = []
    monkeypatch.setattr(clead.serving, "serve", lambda make, settings, **kwargs: given.append(settings))
    arguments = ["serve", "runs/x", "--detector", "none", "--no-thumbnails", "--allowed-hosts", "a.org, b.org"]
    numbers = {"threads": 3, "max_batch": 5, "reject": 0.1, "reference": 30, "max_images": 7, "max_body": 2000}
    numbers |= {"max_pixels": 8, "max_requests": 9, "max_buffered": 3000, "max_head": 4000, "max_connections": 10}
    numbers |= {"max_per_client": 11, "read_seconds": 1.5, "min_rate": 12, "request_seconds": 2.5, "drain_seconds": 13}
    for key, value in numbers.items():
        arguments += [f"--{key.replace('_', '-')}", str(value)]
    monkeypatch.setenv("CLEAD_API_KEY", KEY)
    app([*arguments, "--engine", "onnx"], standalone_mode=False)
    fields = ServeSettings.__pydantic_fields__
    expected = {
        **numbers,
        "engine": "onnx",
        "detector": None,
        "gallery": None,
        "thumbnails": False,
        "allowed_hosts": ("a.org", "b.org"),
    }
    assert {**expected, "api_key": given[0].api_key} == {key: getattr(given[0], key) for key in fields}
    assert given[0].api_key.get_secret_value() == KEY
    monkeypatch.delenv("CLEAD_API_KEY")
    app(["serve", "runs/x"], standalone_mode=False)
    assert given[1] == ServeSettings()


def test_search_answers_with_the_nearest_items_of_a_gallery_of_other_classes(run, splits, tmp_path):
    for row, name in enumerate(("cat", "cat", "dog")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{row}.png").write_bytes(encoded(splits.test.images[row][0].numpy()))
    app = create_app([run], ServeSettings(threads=1, detector=None, gallery=tmp_path))
    with TestClient(app) as client:
        x = splits.test.images[:3].numpy()
        answer = client.post("/v1/search?items=2", content=npy(x), headers=NPY).json()
        assert answer["classes"] == ["cat", "dog"]
        assert [result["items"][0]["index"] for result in answer["results"]] == [0, 1, 2]
        assert [result["items"][0]["label"] for result in answer["results"]] == ["cat", "cat", "dog"]
        for result in answer["results"]:
            assert result["items"][0]["similarity"] == pytest.approx(1, abs=1e-5) and len(result["items"]) == 2
            assert result["items"][1]["similarity"] <= result["items"][0]["similarity"] and result["suspicion"] is None
        dogs = client.post("/v1/search?of=dog", content=npy(x[:1]), headers=NPY).json()["results"][0]["items"]
        assert [item["label"] for item in dogs] == ["dog"]
        refused = client.post("/v1/search?of=dgo", content=npy(x[:1]), headers=NPY)
        assert refused.status_code == 422 and "did you mean 'dog'" in refused.json()["detail"]
    (tmp_path / "one" / "test" / "dog").mkdir(parents=True)
    (tmp_path / "dog" / "2.png").rename(tmp_path / "one" / "test" / "dog" / "2.png")
    with pytest.raises(UserError, match="got only 'dog', which would answer every query"):
        create_app([run], ServeSettings(threads=1, detector=None, gallery=tmp_path / "one"))


def test_without_a_gallery_there_is_no_search(client):
    assert client.post("/v1/search", content=b"", headers=NPY).status_code == 404
