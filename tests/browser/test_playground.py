"""The playground as its visitors meet it, in a real browser; and as those meet it who go round the page."""

from __future__ import annotations

import json
import re

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from support import encoded

ATTACKED = 60_000  # milliseconds


@pytest.fixture
def page(browser: Browser, duel):
    """Return a page whose requests are kept; none may go to another host, and none may fail."""
    context = browser.new_context(viewport={"width": 1360, "height": 1000})
    opened = context.new_page()
    asked: list[str] = []
    errors: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.set_default_timeout(20_000)
    yield opened
    context.close()
    assert asked
    host = duel.address.split("/playground")[0]
    assert [url for url in asked if not url.startswith((f"{host}/", "data:", "blob:"))] == []
    assert errors == []


def start(page: Page, duel, query: str = "") -> None:
    page.goto(duel.address + query)
    expect(page.locator("#run")).to_be_visible()


def give(page: Page, name: str, kind: str, content: bytes) -> None:
    page.get_by_role("tab", name="Upload").click()
    page.locator("#upload input[type=file]").set_input_files({"name": name, "mimeType": kind, "buffer": content})


def test_an_uploaded_image_fools_the_standard_model_and_not_the_hardened_one(page, duel):
    start(page, duel)
    give(page, "digit.png", "image/png", encoded(duel.comparison.images.images[duel.index, 0].numpy()))
    expect(page.locator("#chosen")).to_contain_text("Your file")
    expect(page.locator("#chosen")).to_contain_text("not part of the link")
    page.locator("#run").click()
    verdict = page.locator("#verdict")
    expect(verdict).to_contain_text(f"standard now says {duel.fooled}", timeout=ATTACKED)
    expect(verdict).to_contain_text(f"on the untouched image it says {duel.label}")
    expect(verdict).to_contain_text(f"hardened still says {duel.label}")
    expect(verdict).to_contain_text("white-box")
    cards = page.locator("#results section")
    expect(cards).to_have_count(2)
    expect(cards.nth(0).locator(".badge")).to_have_text("fooled")
    expect(cards.nth(1).locator(".badge")).to_have_text("holds")
    expect(cards.nth(0)).to_contain_text("change ×3.3")
    expect(cards.nth(0)).to_contain_text("tried on hardened")
    expect(cards.nth(0)).to_contain_text("Detector")
    assert page.locator("#results img").evaluate_all("all => all.every(one => one.naturalWidth === 8 && one.alt)")
    expect(page.locator("#plot")).to_contain_text("smallest change found", timeout=ATTACKED)
    expect(page.locator("#plot svg[role=img]")).to_be_visible()
    expect(page.locator("#link")).to_contain_text("without your own image")
    assert "image=" not in page.url and "attack=pgd" in page.url


def test_a_link_restores_what_was_chosen_and_what_came_of_it(page, duel):
    start(page, duel)
    page.locator("#index input").fill(str(duel.index))
    page.locator("#index input").press("Tab")
    expect(page.locator("#chosen")).to_contain_text(f"Test image {duel.index} of 120")
    page.locator("#steps input[type=number]").fill("30")
    page.locator("#steps input[type=number]").press("Tab")
    page.locator("#run").click()
    expect(page.locator("#verdict")).to_contain_text("standard now says", timeout=ATTACKED)
    expect(page.locator("#plot svg")).to_be_visible(timeout=ATTACKED)
    wanted = f"?image={duel.index}&attack=pgd&norm=linf&eps=0.15&steps=30&seed=0"
    expect(page).to_have_url(duel.address + wanted)
    expect(page.locator("#link input, #link textarea")).to_have_value(duel.address + wanted)
    said = page.locator("#verdict .verdict").inner_text()

    page.goto("about:blank")
    start(page, duel, wanted)
    expect(page.locator("#verdict .verdict")).to_have_text(said, timeout=ATTACKED)
    expect(page.locator("#index input")).to_have_value(str(duel.index))
    expect(page.locator("#truth input")).to_have_value(duel.label)
    expect(page.locator("#steps input[type=number]")).to_have_value("30")


def test_a_link_says_other_choices_too(page, duel):
    start(page, duel, "?image=3&attack=square&norm=l2&eps=0.3&steps=5&seed=4&class=")
    expect(page.locator("#eps input[type=number]")).to_have_value("0.3")
    expect(page.locator("#eps")).to_contain_text("root of the summed squares")
    expect(page.locator("#norm label", has_text="L2").locator("input")).to_be_checked()
    expect(page.locator("#attack input")).to_have_value("Square – only asks questions")
    expect(page.locator("#truth input")).to_have_value("take each model's own answer")
    expect(page.locator("#verdict")).to_contain_text("Square (L2, ε = 0.3, 5 times 25 questions)", timeout=ATTACKED)


@pytest.mark.parametrize("query", ["?image=120", "?steps=201", "?eps=0.6", "?attack=%3Cscript%3E"])
def test_a_broken_link_is_said_and_not_followed(page, duel, query):
    start(page, duel, query)
    expect(page.locator(".toast-body")).to_contain_text("The link was not followed")
    expect(page.locator("#eps input[type=number]")).to_have_value("0.15")
    expect(page.locator("#verdict")).to_contain_text("Choose an image")


@pytest.mark.parametrize(
    ("name", "kind", "content", "words"),
    [
        ("a.svg", "image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "SVG, which is no raster image"),
        ("huge.png", "image/png", encoded(np.zeros((6000, 6000), np.uint8)), "25 megapixels"),
        ("broken.jpg", "image/jpeg", b"\xff\xd8\xff\xe0" + b"0" * 40, "not a readable image"),
        ("long.png", "image/png", b"\x89PNG" + b"0" * (8 * 2**20), "maximum allowed size"),
    ],
)
def test_a_bad_file_is_said_in_a_sentence(page, duel, name, kind, content, words):
    start(page, duel)
    give(page, name, kind, content)
    expect(page.locator(".toast-body")).to_contain_text(words)
    expect(page.locator("#chosen")).to_contain_text("Test image 0")  # what was chosen before still is
    expect(page.locator("#upload")).not_to_contain_text(name)  # nothing refused stays listed
    expect(page.locator("#upload input[type=file]")).to_have_count(1)


def test_a_drawing_is_attacked(page, duel):
    start(page, duel)
    page.get_by_role("tab", name="Draw").click()
    page.locator("#use").click()
    expect(page.locator(".toast-body")).to_contain_text("nothing is drawn yet")
    box = page.locator("#canvas canvas").bounding_box()
    page.mouse.move(box["x"] + 112, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + 112, box["y"] + 190, steps=8)
    page.mouse.up()
    page.locator("#canvas canvas").focus()
    for key in ("ArrowLeft", "ArrowLeft", " "):  # without a mouse, square by square
        page.keyboard.press(key)
    page.locator("#use").click()
    expect(page.locator("#chosen")).to_contain_text("Your drawing")
    expect(page.locator("#chosen")).to_contain_text("squashed to 8×8 grey")
    corner = """image => {
        const canvas = document.createElement('canvas'); canvas.width = canvas.height = 8;
        const pen = canvas.getContext('2d'); pen.drawImage(image, 0, 0);
        return [[0, 0], [3, 4], [2, 4]].map(([x, y]) => pen.getImageData(x, y, 1, 1).data[0]);
    }"""
    dark, line, square = page.locator("#chosen img").evaluate(corner)
    assert dark == 0 and line > 100 and square > 100, (dark, line, square)
    expect(page.locator("#truth input")).to_have_value("take each model's own answer")


def test_the_whole_way_without_a_mouse(page, duel):
    start(page, duel)
    expect(page.locator("#gallery img").first).to_be_visible()  # before, there is nothing in it to be reached
    reached = []
    for _ in range(80):
        page.keyboard.press("Tab")
        inside = page.evaluate(
            "['gallery', 'index', 'truth', 'attack', 'norm', 'eps', 'steps', 'run']"
            ".find(id => document.getElementById(id)?.contains(document.activeElement))"
        )
        if inside and inside not in reached:
            reached.append(inside)
            if inside == "gallery":
                page.keyboard.press("Tab")
                page.keyboard.press("Enter")  # the second example
        if inside == "run":
            break
    assert reached == ["gallery", "index", "truth", "attack", "norm", "eps", "steps", "run"]
    expect(page.locator("#chosen")).to_contain_text("Test image 1 of 120")
    page.locator("#run").press("Enter")  # focused again: what arrives meanwhile may redraw parts of the page
    expect(page.locator("#verdict")).to_contain_text("Under PGD", timeout=ATTACKED)


def test_the_leaderboard_ranks_by_the_chosen_attack(page, duel):
    start(page, duel)
    page.get_by_role("tab", name="Attack the leaderboard").click()
    expect(page.locator("#board")).to_contain_text("not evaluated yet")
    page.locator("#count input[type=number]").fill("24")
    page.locator("#count input[type=number]").press("Tab")
    page.locator("#go").click()
    expect(page.locator("#board")).to_contain_text("Ranked by what holds here", timeout=ATTACKED)
    rows = page.locator("#board tbody tr")
    expect(rows.nth(0)).to_contain_text("hardened")
    expect(rows.nth(1)).to_contain_text("standard")
    expect(rows.nth(0)).to_contain_text("n = 24")


def test_small_screens_need_no_sideways_scrolling(browser, duel):
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    start(page, duel, f"?image={duel.index}")
    expect(page.locator("#plot svg")).to_be_visible(timeout=ATTACKED)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()


# Round the page


def send(duel, button: str, data: list) -> str:
    """Return what the server says when the button's event is sent ``data``, whatever the widgets would allow."""
    config = httpx.get(f"{duel.address}config").json()
    number = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == button)
    event = next(d["id"] for d in config["dependencies"] if [number, "click"] in [list(t) for t in d["targets"]])
    api = f"{duel.address}gradio_api/queue"
    sent = {"data": data, "fn_index": event, "session_hash": f"test{button}"}
    joined = httpx.post(f"{api}/join", json=sent)
    if joined.status_code != 200:
        return f"{joined.status_code}: {joined.text}"
    with httpx.stream("GET", f"{api}/data", params={"session_hash": sent["session_hash"]}, timeout=60) as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if message.get("msg") == "process_completed":
                return "done" if message["success"] else str(message["output"]["error"])
    return "nothing"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["1", "pgd", "linf", 0.15, 2, 0], "^done$"),
        (["1", "pgd", "linf", 0.15, 100_000, 0], "200"),
        (["1", "pgd", "linf", 0.15, 2.5, 0], "steps: must be a whole number"),
        (["1", "pgd", "linf", 0.15, "many", 0], "."),
        (["1", "pgd", "linf", 5, 2, 0], "0.5"),
        (["1", "pgd", "linf", -1, 2, 0], "."),
        (["1", "pgd", "linf", None, 2, 0], "."),
        (["1", "rays", "linf", 0.15, 2, 0], "rays"),
        (["1", "pgd", "l0", 0.15, 2, 0], "l0"),
        (["11", "pgd", "linf", 0.15, 2, 0], "11"),
        (["1", "pgd", "linf", 0.15, 2, -3], "."),
        (
            ["1", {"path": "http://127.0.0.1:1/", "meta": {"_type": "gradio.FileData"}}, "linf", 0.15, 2, 0],
            "^400: .*events name",
        ),
        (
            ["1", {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "linf", 0.15, 2, 0],
            "^400: .*events name",
        ),
    ],
)
def test_limits_hold_whatever_is_sent(duel, values, words):
    said = send(duel, "run", [None, *values])
    assert re.search(words, said) and (words == "^done$" or said != "done"), said
    assert str(duel.files) not in said


def test_the_leaderboards_limits_hold(duel):
    assert send(duel, "go", ["pgd", "linf", 0.15, 2, 2]) == "done"
    for count in (65, 0, 10**9, None, 1.5):
        assert send(duel, "go", ["pgd", "linf", 0.15, 2, count]) != "done"


def test_no_file_of_the_server_is_given_out(duel):
    (duel.files / "secret.png").write_bytes(encoded(np.zeros((4, 4), np.uint8)))
    for path in ("/etc/passwd", f"{duel.files}/secret.png", f"{duel.files}/standard/config.yaml", "log", "../log"):
        assert httpx.get(f"{duel.address}gradio_api/file={path}").status_code == 404
    assert httpx.get(f"{duel.address}gradio_api/file=http://127.0.0.1:1/").status_code == 404
    long = {"files": ("a.png", b"0" * (8 * 2**20 + 5000))}
    assert httpx.post(f"{duel.address}gradio_api/upload", files=long).status_code == 413


def test_the_page_stands_beside_the_api(duel):
    host = duel.address.removesuffix("playground/")
    assert httpx.get(host).headers["location"] == "/playground/"
    assert httpx.get(f"{host}healthz").json()["models"] == ["standard", "hardened"]
    config = httpx.get(f"{duel.address}config").json()
    assert config["analytics_enabled"] is False
    assert {d["api_visibility"] for d in config["dependencies"]} == {"private"}
