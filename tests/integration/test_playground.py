"""The playground without a browser: what may be chosen, what is computed, what is drawn, and which paths are open."""

from __future__ import annotations

import struct
import sys
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastapi import FastAPI, Request, Response
from PIL import Image
from starlette.testclient import TestClient

import clead
from clead.cli import main
from clead.errors import UserError
from clead.inference.models import open_models
from clead.inference.png import to_array
from clead.inference.settings import ServeSettings
from clead.models.split import weights
from clead.playground import comparison as computing
from clead.playground import pictures
from clead.playground.choices import ATTACK_OPTIONS, AttackSettings, checked, query, radii, read_query
from clead.playground.comparison import attack_image, attack_leaderboard, epsilon_curves, open_comparison, read_image
from clead.playground.gradio_path_filter import MAX_EVENT, GradioPathFilter, Uploads
from clead.results.statistics import estimate
from clead.settings import Ratio
from clead.weights.files import fingerprint
from support import encoded

TINY = ("--train.validate_every", "100", "--train.device", "cpu", "--data.limit_test", "80", "--train.budget")
SERVED = ServeSettings(threads=1)
RGB = radii((3, 32, 32), "linf", Ratio("8/255"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("playground")
    for name, recipe, budget in (("plain", "digits-standard", "6"), ("hard", "digits-pgd-at", "14")):
        clead.train(clead.load_recipe(recipe, [*TINY, budget]), out=folder / name, show=False)
    return [folder / "plain", folder / "hard"]


@pytest.fixture(scope="module")
def comparison(runs):
    return open_comparison(open_models(runs, SERVED))


@pytest.fixture
def right(comparison):
    """The number of a test image that both models classify right."""
    images, labels = comparison.images.images.float() / 255, comparison.images.labels
    flags = torch.stack([e.model(images).argmax(1) == labels for e in comparison.models]).all(0)
    return int(flags.nonzero()[0])


# What may be chosen


def test_the_radii_start_where_the_hardened_model_was_trained(comparison):
    assert comparison.start.norm == "linf" and comparison.start.eps == 0.15
    assert comparison.radii["linf"].default == 0.15
    assert RGB["linf"].default.text == "8/255" and 0.3 < RGB["l2"].default < 1 and 5 < RGB["l1"].default < 20
    assert radii((3, 32, 32), "l2", Ratio("30"))["l2"] == (30, 30)  # its own radius is never out of range


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"eps": "0.3"}, "eps: must be at most 0.251"),
        ({"eps": "0"}, "greater than 0"),
        ({"eps": "-1/255"}, "greater than 0"),
        ({"eps": "nan"}, "must be a number"),
        ({"norm": "l2", "eps": "14"}, "at most 13.86 for L2"),
        ({"norm": "l0"}, "norm: input should be"),
        ({"attack": "rays"}, "attack: input should be"),
        ({"steps": 201}, "steps: must be a whole number from 1 to 200"),
        ({"steps": 0}, "steps: must be a whole number from 1 to 200"),
        ({"attack": "apgd", "steps": 3}, "apgd needs at least 4 steps"),
        ({"seed": -1}, "seed"),
        ({"query": 1}, "unknown key"),
    ],
)
def test_what_is_out_of_range_is_refused(values, words):
    with pytest.raises(UserError, match=words) as error:
        checked(values, RGB)
    assert "\n" not in str(error.value)


def test_a_link_says_what_was_chosen():
    start = AttackSettings()
    settings = checked({"attack": "fab", "norm": "l2", "eps": "1/2", "steps": 7, "seed": 5}, RGB)
    text = query(settings, 12, "cat")
    assert text == "?image=12&class=cat&attack=fab&norm=l2&eps=1/2&steps=7&seed=5"
    given = dict(part.split("=") for part in text[1:].split("&"))
    linked = read_query(given, RGB, 20, ("cat", "dog"), start)
    assert linked == (settings, 12, "cat") and linked.settings.eps.text == "1/2"
    assert "image" not in query(settings, None, None) and "class=&" in query(settings, 1, "")
    assert read_query({"__theme": "dark"}, RGB, 20, ("cat",), start) is None
    # A norm alone brings a radius of its own size.
    assert read_query({"norm": "l1"}, RGB, 20, ("cat",), start).settings.eps == RGB["l1"].default


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"image": "20"}, "image: must be a whole number from 0 to 19, got '20'"),
        ({"image": "-1"}, "image: must be"),
        ({"image": "../../etc/passwd"}, "image: must be"),
        ({"image": "1.5"}, "image: must be"),
        ({"steps": "1e9"}, "steps: must be a whole number from 1 to 200"),
        ({"class": "<b>"}, "no such class"),
        ({"eps": "9" * 600}, "longer than 500"),
        ({"eps": "1"}, "at most 0.251"),
    ],
)
def test_a_broken_link_is_refused(given, words):
    with pytest.raises(UserError, match=words):
        read_query(given, RGB, 20, ("cat", "dog"), AttackSettings())


# Images that visitors bring


def test_a_file_comes_to_the_models_shape_as_in_training(comparison):
    exact = comparison.images.images[3]
    image, size = read_image(encoded(exact[0].numpy()), comparison)
    assert torch.equal(image, exact) and size == (8, 8)
    large = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image, size = read_image(encoded(large), comparison)
    expected = np.asarray(Image.fromarray(large).convert("L").resize((8, 8), Image.Resampling.BILINEAR))
    assert size == (60, 40) and np.array_equal(image[0].numpy(), expected)


def _claims(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and is not."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + struct.pack(">I", 100) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + chunks + b"0" * 20


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG, which is no raster image"),
        (b"PK\x03\x04" + b"0" * 50, "zip archive"),
        (_claims(30_000, 30_000), "25 megapixels"),
        (_claims(5_001, 5_000), "25 megapixels"),
        (encoded(np.random.default_rng(0).integers(0, 256, (50, 50), dtype=np.uint8))[:1500], "not a readable image"),
        (b"0" * (8 * 2**20 + 1), "at most 8 MiB"),
    ],
)
def test_what_is_no_image_is_refused(comparison, content, words):
    with pytest.raises(UserError, match=words) as error:
        read_image(content, comparison)
    assert "\n" not in str(error.value)


# What is computed


def test_each_model_is_attacked_by_itself(comparison, right):
    settings = AttackSettings(attack="pgd", eps=0.2, steps=7, seed=3)
    image, label = comparison.images.images[right], int(comparison.images.labels[right])
    before = [fingerprint(weights(e.model)) for e in comparison.models]
    plain, hard = attack_image(comparison.pair, image, label, settings)
    x, y = image[None].float() / 255, torch.tensor([label])
    for outcome, model, other in ((plain, *comparison.pair), (hard, *comparison.pair[::-1])):
        expected = clead.attacks.pgd(model.model, x, y, eps=0.2, steps=7, seed=3)
        assert torch.allclose(outcome.x_adv, expected[0], atol=1e-6)
        assert outcome.adversarial.answer == int(model.model(expected).argmax())
        assert outcome.adversarial.probabilities == pytest.approx(
            model.model(expected).softmax(1)[0].tolist(), abs=1e-4
        )
        assert outcome.elsewhere == {other.name: int(other.model(expected).argmax())}
        assert outcome.passes == 8 and outcome.size <= 0.2 + 1e-6 and outcome.attacked and not outcome.label_is_answer
        assert outcome.broken == (outcome.adversarial.answer != label)
    assert not torch.equal(plain.x_adv, hard.x_adv)
    assert before == [fingerprint(weights(e.model)) for e in comparison.models]


@pytest.mark.parametrize("name", ATTACK_OPTIONS)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_every_attack_runs_in_every_norm(comparison, right, name, norm):
    settings = checked(
        {"attack": name, "norm": norm, "eps": comparison.radii[norm].default.text, "steps": 4}, comparison.radii
    )
    seen: list[float] = []
    found = attack_image(
        comparison.pair, comparison.images.images[right], None, settings, lambda done, words: seen.append(done)
    )
    assert [o.model.name for o in found] == ["plain", "hard"]
    assert all(0 <= o.size <= settings.eps * 1.0001 for o in found)
    assert seen == sorted(seen) and all(0 <= done <= 1 for done in seen)
    assert name == "noise" or len(seen) >= 2


def test_what_is_wrong_already_is_not_attacked(comparison, right):
    image, label = comparison.images.images[right], int(comparison.images.labels[right])
    found = attack_image(comparison.pair, image, (label + 1) % 10, AttackSettings(eps=0.2))
    assert not any(o.attacked or o.broken or o.size or o.passes for o in found)
    own = attack_image(comparison.pair, image, None, AttackSettings(eps=0.2, steps=2))
    assert all(o.label_is_answer and o.label == label == o.clean.answer for o in own)
    words = pictures.verdict(found, comparison.classes, AttackSettings())
    assert "nothing to attack" in words
    assert [d.smallest for d in epsilon_curves(image, found, AttackSettings(eps=0.2), 0.5)] == [0, 0]


def test_an_attack_that_takes_too_long_is_stopped(comparison, right, monkeypatch):
    monkeypatch.setattr(computing, "ATTACK_SECONDS", -1.0)
    with pytest.raises(UserError, match="took too long"):
        attack_image(comparison.pair, comparison.images.images[right], None, AttackSettings(eps=0.2))
    with pytest.raises(UserError, match="took too long"):
        attack_leaderboard(comparison, AttackSettings(eps=0.2), 4)


def test_probability_only_falls_with_eps_and_the_smallest_breaks(comparison, right):
    settings = AttackSettings(eps=0.2, steps=10)
    image, label = comparison.images.images[right], int(comparison.images.labels[right])
    outcomes = attack_image(comparison.pair, image, label, settings)
    found = epsilon_curves(image, outcomes, settings, 0.5)
    for decline, outcome, model in zip(found, outcomes, comparison.pair, strict=True):
        assert decline.radii[0] == 0 and decline.radii[-1] == pytest.approx(0.4) and 0.2 in decline.radii
        assert decline.probabilities == sorted(decline.probabilities, reverse=True)
        assert decline.probabilities[0] == pytest.approx(outcome.clean.probabilities[label])
        assert decline.smallest is not None and 0 < decline.smallest <= 1
        if outcome.broken:
            assert decline.smallest <= outcome.size + 1e-6
        x, y = image[None].float() / 255, torch.tensor([label])
        hit = clead.attacks.apgd(model.model, x, y, eps=min(1.0, 1.1 * decline.smallest), steps=50)
        assert int(model.model(hit).argmax()) != label
    text = pictures.epsilon_plot(found, settings)
    assert 'role="img"' in text and "plain" in text and "http" not in text.replace("http://www.w3.org", "")


def test_the_leaderboard_counts_what_holds(comparison):
    settings = AttackSettings(eps=0.1, steps=5)
    rows = attack_leaderboard(comparison, settings, 20)
    x, y = comparison.images.images[:20].float() / 255, comparison.images.labels[:20]
    for model in comparison.models:
        row = next(row for row in rows if row.model.name == model.name)
        flags = model.model(x).argmax(1) == y
        assert row.clean == estimate(flags.tolist())
        x_adv = clead.attacks.pgd(model.model, x[flags], y[flags], eps=0.1, steps=5)
        flags[flags.clone()] = model.model(x_adv).argmax(1) == y[flags]
        assert row.robust == estimate(flags.tolist())
    held = [row.robust.accuracy for row in rows]
    assert held == sorted(held, reverse=True) and rows[0].model.name == "hard"
    text = pictures.leaderboard(rows, settings)
    assert "n = 20" in text and "not evaluated yet" in text
    for n in (0, 65, 10**9, None, "x", 2.5):
        with pytest.raises(UserError, match="images: must be a whole number from 1 to 64"):
            attack_leaderboard(comparison, settings, n)


def test_runs_that_do_not_go_together_are_refused(runs, tmp_path):
    other = tmp_path / "other"
    clead.train(clead.load_recipe("digits-standard", [*TINY, "1", "--data.limit_test", "40"]), out=other, show=False)
    pair = [runs[0], other]
    with pytest.raises(UserError, match="other test images than plain"):
        open_comparison(open_models(pair, SERVED))
    with pytest.raises(UserError, match="takes 1 to 8 runs, got 9"):
        open_comparison(dict.fromkeys(map(str, range(9))))


# What is drawn


def test_names_are_text_and_pictures_have_words(comparison, right):
    classes = ("<script>alert(1)</script>", *comparison.classes[1:])
    settings = AttackSettings(eps=0.2, steps=3)
    found = attack_image(comparison.pair, comparison.images.images[right], None, settings)
    evil = '"><img src=x onerror=alert(1)>'
    found = [replace(outcome, label=0, model=replace(outcome.model, name=evil)) for outcome in found]
    text = pictures.verdict(found, classes, settings) + pictures.cards(
        found, classes, comparison.images.images[right], settings
    )
    assert "<script" not in text and "<img src=x" not in text and "&lt;script&gt;" in text
    assert text.count("<img ") == text.count('alt="') == 6 and 'alt=""' not in text
    assert "rejects it" in text or "lets it pass" in text  # the detector's verdict


def test_the_change_is_drawn_as_large_as_fits():
    delta = torch.tensor([[[0.0, 0.03], [-0.015, 0.0]]])
    shown, k = pictures.change(delta)
    assert k == 16 and torch.allclose(shown, 0.5 + 16 * delta)
    assert pictures.change(torch.zeros(1, 2, 2))[1] == 1
    assert pictures.change(torch.full((1, 2, 2), 0.9))[1] == 1
    assert to_array(torch.rand(3, 5, 4)).shape == (5, 4, 3)


# Which paths are open


@pytest.fixture(scope="module")
def filtered():
    app = FastAPI()

    @app.api_route("/{rest:path}", methods=["GET", "POST", "PUT"])
    async def reached(request: Request) -> Response:
        return Response(await request.body())

    app.add_middleware(GradioPathFilter, path="/playground", files="/tmp/own", max_upload=1000)
    return TestClient(app)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/predict", 200),
        ("GET", "/playground", 200),
        ("GET", "/playground/", 200),
        ("GET", "/playground/config", 200),
        ("GET", "/playground/assets/index.js", 200),
        ("GET", "/playground/gradio_api/queue/data", 200),
        ("POST", "/playground/gradio_api/queue/join", 200),
        ("POST", "/playground/gradio_api/upload", 200),
        ("GET", "/playground/gradio_api/file=/tmp/own/a.png", 200),
        ("GET", "/playground/gradio_api/file=/tmp/own/../x", 404),
        ("GET", "/playground/gradio_api/file=/etc/passwd", 404),
        ("GET", "/playground/gradio_api/file=http://127.0.0.1:22/", 404),
        ("GET", "/playground/gradio_api/proxy=http://127.0.0.1/", 404),
        ("POST", "/playground/gradio_api/api/predict", 404),
        ("POST", "/playground/gradio_api/component_server", 404),
        ("POST", "/playground/gradio_api/vibe-edit", 404),
        ("POST", "/playground/login", 404),
        ("GET", "/playground/monitoring", 404),
        ("PUT", "/playground/", 404),
    ],
)
def test_only_the_pages_own_paths_are_open(filtered, method, path, status):
    assert filtered.request(method, path).status_code == status


def test_what_is_sent_is_bounded_and_names_no_address(filtered):
    join = "/playground/gradio_api/queue/join"
    assert filtered.post(join, json={"data": [{"path": "/tmp/own/a.png"}]}).status_code == 200
    assert filtered.post(join, json={"data": [None, "a/path", {"path": None}]}).status_code == 200
    for path in ("http://127.0.0.1/", " https://x", "file:///etc/passwd", "/etc/passwd", "/tmp/own/../x", "a.png", ""):
        sent = {"data": [1, {"value": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}]}
        assert filtered.post(join, json=sent).status_code == 400
    assert filtered.post(join, content=b"{").status_code == 400
    assert filtered.post(join, content=b'{"data": [{"path": "/tmp/own/a", "path": "/etc/passwd"}]}').status_code == 400
    twice = filtered.post(join, content=b'{"data": [{"path": "/etc/passwd", "path": "/tmp/own/a"}]}')
    assert twice.status_code == 200 and b"passwd" not in twice.content  # nothing behind may read the other one
    assert filtered.post(join, content=b"[" * 5000).status_code == 400
    assert filtered.post(join, content=b" " * (MAX_EVENT + 1)).status_code == 413
    assert filtered.post("/playground/gradio_api/upload", content=b"0" * 6000).status_code == 413
    assert filtered.post("/v1/predict", content=b"0" * 6000).status_code == 200


def test_refusals_of_the_playground_are_problems(filtered):
    for answer in (
        filtered.get("/playground/monitoring"),
        filtered.post("/playground/gradio_api/queue/join", content=b"{"),
        filtered.post("/playground/gradio_api/upload", content=b"0" * 6000),
    ):
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == answer.status_code and answer.json()["detail"]


def test_one_file_is_uploaded_at_a_time(filtered):
    upload = "/playground/gradio_api/upload"
    assert filtered.post(upload, files=[("files", ("a.png", b"a"))]).status_code == 200
    assert filtered.post(upload, files=[("files", (f"{i}.png", b"a")) for i in range(2)]).status_code == 422
    quoted = {"content-type": 'multipart/form-data; boundary="x y"'}
    assert filtered.post(upload, content=b"--x y\r\n" * 3, headers=quoted).status_code == 422


def _stored(folder, number, size):
    path = folder / f"{number:064x}" / "x.png"
    path.parent.mkdir()
    path.write_bytes(bytes(size))
    return str(path)


def test_uploads_have_so_much_room_and_the_oldest_go_first(tmp_path):
    uploads, paths = Uploads(limit=100, seconds=3600), []
    for number in range(10):
        uploads.make_room(30)
        paths.append(_stored(tmp_path, number, 30))
        uploads.add(paths[-1], 30)
        assert sum(file.stat().st_size for file in tmp_path.rglob("*.png")) <= 100
    assert sorted(map(str, tmp_path.rglob("*.png"))) == paths[-3:] and len(list(tmp_path.iterdir())) == 3
    uploads.add(paths[-3], 30)  # the same content again: counted once, and young again
    uploads.make_room(30)
    assert sorted(map(str, tmp_path.rglob("*.png"))) == [paths[-3], paths[-1]]


def test_uploads_go_when_they_are_old_and_a_file_that_is_gone_is_no_error(tmp_path):
    uploads = Uploads(limit=100, seconds=0.05)
    for number in range(3):
        uploads.add(_stored(tmp_path, number, 1), 1)
    (tmp_path / f"{0:064x}" / "x.png").unlink()
    time.sleep(0.1)
    uploads.make_room()
    assert not uploads.files and not list(tmp_path.rglob("*.png"))


def test_what_gradio_makes_of_an_upload_is_counted_and_removed(tmp_path):
    app, made = FastAPI(), []

    @app.post("/playground/gradio_api/upload")
    async def stored(request: Request) -> list[str]:
        made.append(_stored(tmp_path, len(made), len(await request.body())))
        return [made[-1]]

    app.add_middleware(GradioPathFilter, path="/playground", files=str(tmp_path), max_upload=1000)
    client = TestClient(app)
    client.get("/playground/")  # builds the middleware
    fence = app.middleware_stack
    while not isinstance(fence, GradioPathFilter):
        fence = fence.app
    fence.uploads = Uploads(limit=2000, seconds=3600)
    for _ in range(6):
        assert client.post("/playground/gradio_api/upload", files=[("files", ("a.png", bytes(700)))]).status_code == 200
    assert (
        sum(file.stat().st_size for file in tmp_path.rglob("*.png")) <= 2000
        and str(list(fence.uploads.files)[-1]) == made[-1]
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/nothing"], "runs/nothing is not a run directory"),
        ([], "which run?"),
        (["{run}", "--train.budget", "3"], "changes nothing here"),
        (["{run}", "--port", "99999"], "--port"),
    ],
)
def test_a_users_mistake_is_one_line(runs, arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["clead", "playground", *(argument.format(run=runs[0]) for argument in arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == ""
    assert said.err.startswith("clead: error: ") and words in said.err and said.err.count("\n") == 1
