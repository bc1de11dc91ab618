"""The report is one complete file whose numbers are the record's, whose strings are escaped; it asks no network.

The second half is about the other measurements, predictions and memory, the figures' files, and which sources it takes.
"""

import csv
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from clead import api
from clead.cli.app import app
from clead.config import Eval
from clead.errors import MissingExtra, UserError
from clead.evaluation.evaluator import evaluate_model
from clead.evaluation.plan import EvaluationOptions
from clead.evaluation.suites import SUITE_TITLES
from clead.interfaces import ImageSet
from clead.measurements.base import MeasurementRecord
from clead.report.html import RunResult, write_report
from clead.report.sections.epsilon import epsilon
from clead.report.sections.stages import draw_stages
from clead.results.figure import PALETTE, inline_svg
from clead.results.record import Memory, Predictions, Record
from clead.results.target import EvaluationTarget
from clead.threats import THREATS
from support import ROOT, Nesting

RECORDS = sorted((ROOT / "tests/data/records").glob("cifar10-small-*-s0-standard.json"))
DIGITS = load_digits()


def wilson(k, n):
    z, p = 1.959964, k / n
    middle, half = (
        (p + z * z / 2 / n) / (1 + z * z / n),
        z * np.sqrt(p * (1 - p) / n + z * z / 4 / n**2) / (1 + z * z / n),
    )
    return {"accuracy": p, "low": max(0.0, middle - half), "high": min(1.0, middle + half), "n": n}


def fake_record(
    name="clead",
    robust=0.541,
    clean=0.82,
    *,
    n=1000,
    classes=None,
    images="a1b2",
    curve=True,
    suite="standard",
    **changes,
):
    classes = classes or [f"digit {k}" for k in range(10)]
    if suite == "pgd":  # each on all images
        left = [("FGSM CE", robust + 0.06, 1), ("PGD-50 CE", robust + 0.012, 50), ("PGD-50 margin", robust + 0.008, 50)]
    else:  # each on the survivors of those before it
        left = [("APGD-CE", robust + 0.06, 100), ("APGD-T", robust + 0.004, 900), ("FAB-T", robust + 0.004, 900),
                ("Square", robust, 0)]  # fmt: skip
    attacks, before = [], round(clean * n)
    for a, r, b in left:
        k = round(min(r, clean) * n)
        attacks.append({
            "name": a, "settings": {"steps": b, "step_size": 2 / 255}, "attacked": before, "num_successes": before - k,
            "robust": wilson(k, n), "flags": [True], "seconds": 1.3 * b, "forwards": b + 1, "backwards": b,
            "max_distance": 8 / 255,
        })  # fmt: skip
        before = before if suite == "pgd" else k
    hard = np.linspace(-0.15, 0.15, len(classes))
    parts = {
        "run": f"runs/{name}",
        "created": "2025-06-01 12:34",
        "command": f"clead evaluate runs/{name} --attack 'pgd' --out <b>here</b>",
        "seed": 0,
        "suite": suite,
        "notes": [],
        "model": {"name": "small_cnn", "parameters": 1234567, "weights": "ema", "fingerprint": f"f00d{name}"},
        "data": {"name": "digits", "split": "test", "n": n, "classes": classes, "fingerprint": "d", "images": images},
        "threat": {"norm": "linf", "eps": 8 / 255, "eps_text": "8/255"},
        "clean": wilson(round(clean * n), n),
        "clean_flags": [True, False],
        "worst": wilson(round(robust * n), n),
        "robust_flags": [True, False],
        "attacks": attacks,
        "curve": [
            {"eps": e / 255, "eps_text": f"{e}/255", "attack": "pgd-20",
             "robust": wilson(round(n * clean * (robust / clean) ** ((e / 8) ** 1.2)), n)}
            for e in (2, 4, 6, 8, 12, 16)
        ] if curve else [],
        "checks": [
            {"name": "noise", "passed": True, "numbers": {"noise": 3.0, "gradient": 31.0},
             "explanation": "Ten draws of noise break 3 of 82 images, the gradient 31. The gradient finds far more."},
            {"name": "black box", "passed": True, "numbers": {"standing": 51.0}, "explanation": "Square breaks 0. Good."},
        ],
        "per_class": [
            {"name": c, "n": n // len(classes), "clean_accuracy": float(np.clip(clean + h / 2, 0, 1)),
             "robust_accuracy": float(np.clip(robust * (1 + h), 0, clean))}
            for c, h in zip(classes, hard, strict=True)
        ],
        "training": {"method": name, "epochs": 30, "steps": 50, "seconds": 4000.0, "forward_equivalents": 660.0, "seed": 7},
        "versions": {"clead": "0.1.0", "torch": "2.13.0"},
        "seconds": 321.0,
    }  # fmt: skip
    return Record.model_validate(parts | changes)


def fake_run(name="clead", robust=0.541, clean=0.82, *, per_step=11, m=20, **changes):
    rng = np.random.default_rng(len(name))
    n = 32
    x = (DIGITS.images[:n, None] / 16).astype(np.float32)
    x_adv = np.clip(x + rng.choice([-0.1, 0.1], x.shape), 0, 1).astype(np.float32)
    labels = DIGITS.target[:n]

    def probabilities(accuracy):
        logits = (
            rng.normal(size=(n, 10)) + 5 * np.eye(10)[np.where(rng.random(n) < accuracy, labels, (labels + 3) % 10)]
        )
        return (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)

    centres = rng.normal(size=(10, 32)) * 1.1
    which = DIGITS.target[:m]
    clean_points = centres[which] + rng.normal(size=(m, 32)) * 0.5
    drift = (1 - robust) * 0.8 * (centres[(which + 1) % 10] - centres[which]) + rng.normal(size=(m, 32)) * 0.2
    history = []
    for step in range(0, 600, 4):
        t = step / 600
        line = {
            "kind": "train",
            "step": step,
            "epoch": 30 * t,
            "forward_equivalents": per_step * 60 * t,
            "learning_rate": 0.1,
        }
        line |= {"loss": 2.3 * np.exp(-2 * t) + 0.08 * rng.normal(), "cross_entropy": 1.9 * np.exp(-2 * t)}
        line |= {
            "contrastive": 0.4 * np.exp(-t),
            "clean_accuracy": clean * (1 - np.exp(-6 * t)) + 0.02 * rng.normal(),
        }
        line |= {"robust_accuracy": robust * (1 - np.exp(-4 * t)) + 0.02 * rng.normal()}
        history.append(line)
        if step % 40 == 0:
            history.append({**line, "kind": "validation", "clean_accuracy": clean * (1 - np.exp(-6 * t)),
                            "robust_accuracy": robust * (1 - np.exp(-4 * t)), "loss": float("nan")})  # fmt: skip
    return RunResult(
        name,
        fake_record(name, robust, clean, **changes),
        {
            "x": x, "x_adv": x_adv, "labels": labels, "probabilities": probabilities(clean),
            "probabilities_adv": probabilities(robust), "embedding_clean": clean_points,
            "embedding_adv": clean_points + drift, "embedding_labels": which,
        },
        history,
        {"data": {"name": "digits"}, "threat": {"name": "linf", "eps": "8/255"}, "method": {"name": name}},
    )  # fmt: skip


class Page(HTMLParser):
    """Ids, references, headings, alternatives and visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.images, self.tags, self.words = [], [], [], [], []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        self.links += [attrs[key] for key in ("href", "src", "xlink:href", "action", "data", "srcset") if key in attrs]
        self.links += re.findall(r"url\(([^)]*)\)", " ".join(str(value) for value in attrs.values()))
        if tag == "img":
            self.images.append(attrs)

    def handle_data(self, data):
        self.words.append(data)


def write(tmp_path, *runs, **options):
    path = write_report(runs, tmp_path / "deep" / "report.html", title="A <i>title</i> & more", **options)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]  # nothing half-written is left
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    runs = [fake_run(), fake_run("standard", 0.003, 0.94, per_step=3)]
    pairs = [{"a": "clead", "b": "standard", "only_a": 539, "only_b": 1, "p_value": 1e-80}]
    return write(tmp_path_factory.mktemp("report"), *runs, pairs=pairs)


def test_numbers_of_the_records_appear(several):
    text = several[1].text.replace("\N{NO-BREAK SPACE}", " ")
    for number in (
        "54.1 %", "51.0–57.2 %", "0.3 %", "94.0 %", "L∞ ε = 8/255", "1,000 test images", "1,234,567", "539",
        "< 0.001", "1 h 6 min", "660", "5 min 21 s", "f00dclead", "upper bound", "under AutoAttack standard,", "torch",
        "perturbation × 5", "training ε = 8/255",
    ):  # fmt: skip
        assert number in text, number
    assert " nan" not in text  # a validation line without a loss falls back to the training loss


def test_file_is_complete_small_and_asks_no_network(several):
    html, page = several
    assert len(html.encode()) < 5_000_000
    assert page.links and all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= {"http://www.w3.org/2000/svg"}
    assert not {"link", "iframe", "object", "embed"} & set(page.tags)
    assert "@import" not in html


def test_ids_are_unique_and_every_reference_resolves(several):
    _, page = several
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_page_can_be_read_without_seeing(several):
    html, page = several
    assert page.tags.count("h1") == 1 and 'lang="en"' in html
    assert len(page.images) == 2 * 32 * 3 and all(image["alt"] for image in page.images)
    assert html.count('<svg class="plot"') == len(
        re.findall(r'<svg class="plot"[^>]*role="img" aria-label="[^"]{20,}"', html)
    )
    assert "prefers-color-scheme" in html and "@media print" in html and "focus-visible" in html


@pytest.mark.slow
def test_same_runs_give_the_same_file(tmp_path):
    run = fake_run()
    assert write(tmp_path / "a", run)[0] == write(tmp_path / "b", run)[0]


@pytest.mark.slow
def test_strings_are_escaped_everywhere(tmp_path):
    evil = "<script>alert(1)</script>"
    tricky = ["<b>x</b>", '"quoted" id="y" #0072b2', "_under", "$x_$", "猫 & 🐈", evil, *"abcd"]
    run = fake_run(evil, classes=tricky)
    run.history[0][evil] = 1.0
    run.config["data"]["name"] = f"{evil} url(#x)"
    html, page = write(tmp_path, run, fake_run("_b"))
    assert evil not in html and "<b>x</b>" not in html and "<i>title" not in html
    assert page.tags.count("script") == 1
    for name in (*tricky, "A <i>title</i> & more"):
        assert name in page.text
    assert len(page.ids) == len(set(page.ids))


def test_missing_artifacts_drop_their_sections(tmp_path):
    bare = RunResult("bare", fake_record(curve=False, per_class=[], training=None))
    _, page = write(tmp_path, bare)
    assert {"verdict", "trained", "results", "checks", "cost", "made"} <= set(page.ids)
    assert not {"epsilon", "training", "gallery", "classes", "embedding"} & set(page.ids)
    _, page = write(tmp_path, bare, fake_run())
    assert {"epsilon", "training", "gallery", "classes", "embedding"} <= set(page.ids)


def test_mcnemar_is_shown_for_the_same_images_only(tmp_path):
    pair = {"a": "a", "b": "b", "only_a": 12345, "only_b": 0, "p_value": 0.04}
    a, b = RunResult("a", fake_record()), RunResult("b", fake_record(images="others"))
    _, page = write(tmp_path, a, b, pairs=[pair])
    assert "12,345" not in page.text and "do not compare" in page.text
    _, page = write(tmp_path, a, RunResult("b", fake_record()), pairs=[pair])
    assert "12,345" in page.text and "0.040" in page.text


def test_signs_of_a_failed_attack_are_said(tmp_path):
    record = fake_record()
    far = record.attacks[0].model_copy(update={"max_distance": 9 / 255})
    rising = [p.model_copy(update={"robust": record.clean}) if p.eps_text == "16/255" else p for p in record.curve]
    _, page = write(tmp_path, RunResult("a", record.model_copy(update={"attacks": [far], "curve": rising})))
    assert "went outside the threat" in page.text and "gradient masking" in page.text
    _, page = write(tmp_path, RunResult("a", record))
    assert "Read with care" not in page.text


def test_the_mean_over_classes_is_said_where_they_are_of_unequal_size(tmp_path):
    classes = [
        {"name": name, "n": n, "clean_accuracy": 0.8, "robust_accuracy": robust}
        for name, n, robust in (("cat", 900, 0.6), ("dog", 100, 0.1))
    ]
    _, page = write(tmp_path, RunResult("a", changed(fake_record(classes=["cat", "dog"]), per_class=classes)))
    said = page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "classes have 100 to 900 images; where every class counts alike, 35.0 % are robust (95 % interval 31" in said
    assert "and 80.0 % right when clean" in said


def section(page_text, key):
    """Return the visible text of one section, with plain spaces."""
    part = page_text.partition(f'<section id="{key}"')[2].partition("</section>")[0]
    return Page(part).text.replace("\N{NO-BREAK SPACE}", " ")


def changed(record, **update):
    return Record.model_validate(record.model_dump() | update)


@pytest.mark.parametrize("suite", [*SUITE_TITLES, "none"])
def test_the_verdict_names_the_suite(tmp_path, suite):
    record = fake_record(suite=suite)
    html, _ = write(tmp_path, RunResult("a", record if suite != "none" else changed(record, attacks=[])))
    verdict, care = section(html, "verdict"), "Read with care" in html
    sentence = verdict.partition("on 1,000 test images of digits, ")[2].partition(".")[0]
    words = {
        "quick": "the quick suite, which is not AutoAttack,",
        "black_box": "attacks by queries only, not AutoAttack,",
        "pgd": "FGSM CE, PGD-50 CE and PGD-50 margin, not AutoAttack,",
        "attacks": "APGD-CE, APGD-T, FAB-T and Square, not AutoAttack,",
        "sea-quick": "the quick suite, which is not SEA,",
        "none": "no attack,",
    }.get(suite, SUITE_TITLES.get(suite, "") + ",")
    assert sentence.startswith(f"under {words} a still classifies 54")
    full, yardstick = (
        suite in ("standard", "plus", "rand", "adaptive", "sea"),
        "SEA" if "sea" in suite else "AutoAttack",
    )
    assert full == (f"settings are those of {yardstick}" in verdict) == ("was not run as its protocol" not in verdict)
    assert care == (suite == "none")


@pytest.mark.parametrize(
    ("suite", "notes", "label"),
    [
        ("quick", [], "quick suite, not AutoAttack"),
        ("standard", ["20 steps instead of the suite's own"], "suite standard with 20 steps instead of its own, not AutoAttack"),
        ("standard", ["3 classes: 2 targets instead of the protocol's"], None),
    ],
)  # fmt: skip
def test_a_figure_of_another_protocol_is_labelled_wherever_it_stands(tmp_path, suite, notes, label):
    run = fake_run(suite=suite, notes=notes)
    html, page = write(tmp_path, run)
    places = {key: section(html, key) for key in ("results", "epsilon", "classes", "gallery", "trained")}
    places["bar"] = re.search(r'class="bar" role="img" aria-label="([^"]*)"', html)[1]
    places["score"] = re.search(r'class="big">(.*?)</span>', html, re.DOTALL)[1]
    for place, text in places.items():
        assert (label in text) if label else ("not AutoAttack" not in text), place
    care = section(html, "verdict").partition("Read with care")[2]
    assert all(f"{note}." in care for note in notes)


def test_names_of_attacks_do_not_make_an_autoattack(tmp_path):
    html, page = write(tmp_path, RunResult("a", changed(fake_record(), suite="pgd")))
    assert "under APGD-CE, APGD-T, FAB-T and Square, not AutoAttack, a still" in section(html, "verdict")
    many = changed(fake_record(), suite="pgd", attacks=[a.model_dump() for a in fake_record().attacks * 2])
    assert "under 8 attacks, each on all images, not AutoAttack, a still" in section(
        write(tmp_path, RunResult("a", many))[0], "verdict"
    )


def test_stages_are_shown_of_attacks_on_survivors_only(tmp_path):
    html, page = write(tmp_path, RunResult("a", fake_record()))
    results = section(html, "results")
    svg = re.search(r'<svg class="plot".*?</svg>', html.partition('<section id="results"')[2], re.DOTALL)[0]
    drawn = Page(svg).text
    for text in ("clean", "82.0 %", "APGD-CE", "60.1 %, −219 of 820", "54.5 %, −56 of 601", "54.5 %, 0 of 545",
                 "54.1 %, −4 of 545", "worst case"):  # fmt: skip
        assert text in drawn, text
    assert "after APGD-T 54.5\N{NO-BREAK SPACE}% (56 of 601 broken)" in re.search(r'aria-label="([^"]*)"', svg)[1]
    cells = re.findall(r"<tr><th scope=\"row\">APGD-T</th><td>(\d+)</td><td>(\d+)</td><td>([\d.]+)", html)
    assert cells == [("601", "56", "54.5")]
    assert "under each attack on all images" not in results and "met" in results
    html, page = write(tmp_path, RunResult("a", fake_record(suite="pgd")))
    results = section(html, "results")
    assert "under each attack on all images" in results and "FGSM CE" in results and "still right" not in results
    assert '<svg class="plot"' not in html.partition('<section id="results"')[2].partition("</section>")[0]


def test_bars_of_the_stages_are_as_long_as_the_accuracies():
    record = fake_record()
    svg = draw_stages(record, 0, title="t", name="p", label="l").svg
    bars = re.findall(
        r'<path d="M ([\d.]+) [\d.]+\s+L ([\d.]+) [^"]*\sz\s*"[^>]*fill: var\(--p0[^;"]*(; opacity)?', svg
    )
    lengths = {pale: [float(b) - float(a) for a, b, p in bars if bool(p) == pale] for pale in (True, False)}
    left = [record.clean.accuracy, *(attack.robust.accuracy for attack in record.attacks), record.worst.accuracy]
    unit = lengths[False][0] / left[0]
    assert lengths[False] == pytest.approx([unit * value for value in left], abs=0.05)
    assert lengths[True] == pytest.approx([unit * value for value in (left[0], *left[:-2], left[-1])], abs=0.05)


@pytest.mark.slow
def test_threat_is_repeated_per_run_only_where_it_differs(tmp_path):
    a = RunResult("a", fake_record())
    html, _ = write(tmp_path, a, RunResult("b", fake_record(suite="quick")))
    assert "Threat, images" not in section(html, "results")
    html, _ = write(tmp_path, a, RunResult("b", fake_record(images="others")))
    assert "Threat, images" in section(html, "results")


@pytest.mark.slow
def test_runs_of_different_suites_are_not_paired(tmp_path):
    pair = {"a": "a", "b": "b", "only_a": 12345, "only_b": 0, "p_value": 0.04}
    a = RunResult("a", fake_record())
    shortened = fake_record(notes=["20 steps instead of the suite's own"])
    by_hand = changed(fake_record(suite="pgd"), attacks=[fake_record(suite="pgd").attacks[0].model_dump()])
    for one, other in [
        (a, fake_record(suite="quick")),
        (a, fake_record(suite="pgd")),
        (a, shortened),
        (RunResult("a", fake_record(suite="pgd")), by_hand),
    ]:
        html, page = write(tmp_path, one, RunResult("b", other), pairs=[pair])
        assert "12,345" not in page.text and "under different suites" in section(html, "verdict")
        assert "different images" not in page.text
        assert section(html, "verdict").count(" still classifies ") == 2  # a sentence for each suite
    quick = [RunResult(name, fake_record(suite="quick")) for name in "ab"]
    html, page = write(tmp_path, *quick, pairs=[pair])
    assert "12,345" in page.text and "different suites" not in page.text
    assert "a against b quick suite, not AutoAttack" in section(html, "results")


def test_checks_are_said_in_words_and_a_failed_one_in_the_verdict(tmp_path):
    record = fake_record()
    failed = {
        "name": "black <box>",
        "passed": False,
        "numbers": {"pgd_50": 51.0, "share": 0.123456},
        "explanation": "Of the 51 images that stand, square breaks 12.5 % more. An attack that sees no gradient wins. Do more.",
    }
    bad = changed(record, checks=[record.checks[0].model_dump(), failed])
    html, page = write(tmp_path, RunResult("a", bad))
    checks, verdict = section(html, "checks"), section(html, "verdict")
    assert "1 of 2 checks passed; ✗ failed: black <box>" in checks
    assert re.search(r"noise ✓ passed noise 3, gradient 31 Ten draws .* finds far more\.", checks)
    assert re.search(r"black <box> ✗ failed pgd 50 51, share 0.1235 Of the 51 .* Do more\.", checks)
    care = verdict.partition("Read with care")[2]
    assert (
        "the check of gradient masking “black <box>” failed: Of the 51 images that stand, square breaks 12.5 % more."
        in care
    )
    assert "An attack that sees" not in verdict and "noise" not in care
    assert "no checks of gradient masking were made" not in page.text
    html, _ = write(tmp_path, RunResult("good", record), RunResult("bare", changed(record, checks=[])))
    checks = section(html, "checks")
    assert "good: 2 of 2 checks passed" in checks and "bare: no checks of gradient masking were made." in checks
    assert "good: no checks" not in checks and "Read with care" not in section(html, "verdict")


def test_large_images_stay_within_the_size_limit(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.random((64, 3, 150, 150), dtype=np.float32)
    p = rng.random((64, 10))
    arrays = {
        "x": x,
        "x_adv": x[::-1].copy(),
        "labels": np.arange(64) % 10,
        "probabilities": p,
        "probabilities_adv": p,
    }
    html, page = write(tmp_path, RunResult("noise", fake_record(), arrays))
    assert len(html.encode()) < 5_000_000 and page.images
    assert "of 64 stored images" in page.text


def test_many_classes_and_few_points(tmp_path):
    names = [f"class {k}" for k in range(100)]
    arrays = {
        "embedding_clean": np.eye(4),
        "embedding_adv": -np.eye(4),
        "embedding_labels": np.array([0, 1, 98, 99]),
    }
    html, page = write(tmp_path, RunResult("many", fake_record(classes=names), arrays))
    assert "20 least robust of 100" in page.text and "drawn by PCA" in page.text and "class 99" in page.text


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        ([], {}, "at least one run"),
        ([RunResult("a", fake_record())] * 2, {}, "must differ"),
        (
            [RunResult("clead", fake_record())],
            {"pairs": [{"a": "clead", "b": "claed"}]},
            "did you mean 'clead'",
        ),
        (
            [RunResult("a", fake_record(), {**fake_run().artifacts, "labels": np.zeros(3)})],
            {},
            "one row per image",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, runs, options, message):
    with pytest.raises(UserError, match=message):
        write_report(runs, tmp_path / "r.html", title="t", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["matplotlib.figure", "jinja2", "sklearn.manifold"])
def test_missing_library_names_the_extra(tmp_path, monkeypatch, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingExtra, match=r"clead\[report\]"):
        write_report([fake_run()], tmp_path / "r.html", title="t")


def test_plot_takes_the_colours_of_the_page():
    run = fake_run("a <label>")
    svg = epsilon([run])[0]["drawing"].svg
    assert svg.startswith("<svg ") and "a &lt;label&gt;" in svg.partition(">")[0] and "<style" not in svg
    assert f"var(--p0,{PALETTE[0]})" in svg and PALETTE[1] not in svg
    left = set(re.findall(r"(?<!,)#[0-9a-f]{6}", svg))
    assert left <= {"#000000", "#ffffff"}, left
    other = inline_svg(epsilon([run])[0]["drawing"].figure, "another", "label")
    ids, others = (set(re.findall(r' id="([^"]*)"', text)) for text in (svg, other))
    assert ids and others and not ids & others


@pytest.mark.parametrize(("given", "eps"), [("8/255", 8 / 255), (0.5, 0.5), ("x", None), (None, None)])
def test_radius_is_parsed(given, eps):
    run = RunResult("a", fake_record(), config={"threat": {"norm": "linf", "eps": given}})
    assert (run.trained_radius() or [None])[0] == eps


def curve(norm_radii, fractions, n):
    return [
        {"eps": e, "eps_text": f"{e:.4g}", "attack": "fmn+deepfool", "robust": wilson(round(f * n), n)}
        for e, f in zip(norm_radii, fractions, strict=True)
    ]


def measured(record, n=200):
    """Return one measurement of each kind, of the weights of ``record``."""
    distances = [None if k < 20 else 0.0 if k > 180 else 0.001 * (k % 60) for k in range(n)]
    others = [None if d is None else d * 1.1 for d in distances]
    radii = sorted({d for d in distances if d is not None})
    left = [sum(d is None or d > r for d in distances) / n for r in radii]
    results = {
        "distances": {
            "norm": "linf", "seed": 0, "n": n, "clean": wilson(180, n), "median": 0.03, "distances": distances,
            "attacks": [
                {"attack": name, "settings": {}, "n": n, "found": 180, "median": 0.03, "distances": values, "seconds": 1.0}
                for name, values in (("fmn", distances), ("deepfool", others))
            ],
            "curve": curve(radii, left, n),
        },
        "corruptions": {
            "n": n, "seed": 0, "names": ["fog", "gaussian_noise"], "severities": [1, 2, 3, 4, 5], "clean": wilson(180, n),
            "cells": [
                {"name": name, "severity": s, "accuracy": wilson(190 - 20 * s - 7 * (name == "fog"), n)}
                for name in ("fog", "gaussian_noise") for s in range(1, 6)
            ],
            "mean_accuracy": 0.6325,
        },
        "detect": {
            "images": n, "fitted": 500, "calibrated": 100, "norm": "linf", "eps": 8 / 255, "eps_text": "8/255", "steps": 50,
            "restarts": 3, "seed": 0, "clean": wilson(180, n), "robust": wilson(77, n), "seconds": 3.0,
            "detectors": [
                {"name": name, "settings": {}, "attacks": [
                    {"name": "PGD-50 margin", "n": 90, "auroc": 0.875, "fpr95": 0.4375},
                    {"name": "knows it", "n": 0, "auroc": None, "fpr95": None}],
                 "curve": [
                    {"rate": r, "threshold": None if r == 0 else 1.0, "clean_rejected": wilson(round(r * n), n),
                     "accepted_accuracy": None if r == 0.5 else wilson(150, n), "oblivious": wilson(100 + round(r * 100), n),
                     "aware": wilson(79 + round(r * 20), n)} for r in (0, 0.05, 0.1, 0.5)]}
                for name in ("mahalanobis", "nearest_neighbours")
            ],
        },
        "certify": {
            "sigma": 0.25, "n0": 10, "n": 1000, "alpha": 0.001, "seed": 0, "images": n, "predicted": [0], "right": [True],
            "lower": [0.9], "radii": [0.3], "accuracy": wilson(150, n), "abstained": wilson(13, n), "average_radius": 0.321,
            "curve": [{"radius": r, "certified": wilson(150 - round(200 * r), n)} for r in (0, 0.125, 0.25, 0.5)],
            "seconds": 2.0,
        },
        "attack-spatial": {
            "attack": "spatial <b>", "settings": {"degrees": 30.0}, "n": n, "seed": 0, "clean": wilson(180, n),
            "clean_flags": [True], "robust": wilson(31, n), "robust_flags": [True], "seconds": 1.0,
        },
    }  # fmt: skip
    return {
        kind: MeasurementRecord.model_validate(
            {
                "kind": kind, "run": record.run, "created": "2025-06-02", "command": f"clead {kind} runs/x", "seed": 0,
                "settings": {"attacks": ["a", "b"], "steps": None, "sigma": 0.25, "attack": {"name": "spatial"}},
                "model": record.model.model_dump(), "data": {**record.data.model_dump(), "n": n}, "result": result,
                "threat": record.threat.model_dump(), "versions": {"clead": "0.1.0"}, "seconds": 61.0,
            }
        )
        for kind, result in results.items()
    }  # fmt: skip


def full_run(name="clead", robust=0.541, **changes):
    base = fake_run(name, robust, **changes)
    labels = [k % 10 for k in range(1000)]
    attacked = [k if i % 3 else (k + 1) % 10 for i, k in enumerate(labels)]
    clean = [k if i % 50 else (k + 2) % 10 for i, k in enumerate(labels)]
    record = base.record.model_copy(
        update={
            "predictions": Predictions(labels=labels, clean=clean, attacked=attacked),
            "memory": Memory(process=536870912, device=None),
        }
    )
    return RunResult(name, record, base.artifacts, base.history, base.config, measured(record))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    runs = [full_run(name, robust) for name, robust in (("a", 0.5), ("b", 0.4), ("c <i>", 0.3), ("d", 0.2))]
    return write_report(runs, tmp_path_factory.mktemp("four") / "page.html", title="Four").read_text()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    runs, path = [full_run("a", 0.5), full_run("b", 0.4)], tmp_path_factory.mktemp("two")
    write_report(runs, path / "page.html", title="Two", figures=path / "page-figures")
    return runs, path


def rows(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.mark.slow
def test_page_of_four_runs_with_every_section_is_small_and_well_formed(four):
    html = four
    assert len(html.encode()) < 5_000_000
    keys = re.findall(r'<section id="(\w+)"', html)
    every = "verdict trained results checks epsilon training gallery classes confusion embedding"
    more = "detection certified corruptions beyond cost made"
    assert keys == [*every.split(), *more.split()]
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= {"http://www.w3.org/2000/svg"}
    page = Nesting(html)
    assert page.faults == []
    assert page.headings[:2] == [1, 2] and all(
        b - a <= 1 for a, b in zip(page.headings, page.headings[1:], strict=False)
    )
    assert len(page.labels) == len(set(page.labels))
    assert '<a class="skip" href="#verdict">' in html and "<main>" in html and "<nav " in html


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(w * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4) for w, c in
               zip((0.2126, 0.7152, 0.0722), parts, strict=True))  # fmt: skip


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_on_light_and_dark(four):
    html = four
    themes = [
        dict(re.findall(r"--([\w-]+):(#[0-9a-f]{3,6})[;}]", block)) for block in re.findall(r":root\{[^}]*\}", html)
    ]
    assert len(themes) == 2
    for theme in themes:
        theme = {
            key: "#" + "".join(2 * c for c in value[1:]) if len(value) == 4 else value for key, value in theme.items()
        }
        pairs = [(text, ground) for text in ("ink", "muted", "accent") for ground in ("page", "card")]
        pairs += [
            ("ink", "soft"),
            ("caveats", "caveats-bg"),
            ("ink", "caveats-bg"),
            ("good", "card"),
            ("bad", "card"),
            ("card", "accent"),
        ]
        for text, ground in pairs:
            assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
        for k in range(10):
            assert contrast(theme[f"p{k}"], theme["card"]) >= 3, k  # marks and lines
            # A cell of a map, at its darkest, under its number.
            mixed = [
                round(0.4 * int(theme[f"p{k}"][i : i + 2], 16) + 0.6 * int(theme["card"][i : i + 2], 16))
                for i in (1, 3, 5)
            ]
            assert contrast(theme["ink"], "#" + "".join(f"{c:02x}" for c in mixed)) >= 4.5, k


def test_numbers_of_the_measurements_appear(four):
    html = four
    for key, numbers in {
        "epsilon": ("fmn", "deepfool", "nearest of fmn and deepfool", "200 and 1,000 images", "pgd-20"),
        "confusion": ("a, 1,000 images", "digit 0 as digit 1 (34 of 100)", "numbers of images"),
        "detection": ("nearest neighbours", "38.5 % are right without a detector", "40.0 %", "87.5 %", "43.8 %", "attack knows it"),
        "certified": ("noise σ = 0.25", "62.5 %", "0.125", "average certified radius 0.321", "abstains on 6.5 %"),
        "corruptions": ("gaussian noise", "severity 5", "worst is fog", "61.5 %", "41.5 %"),
        "beyond": ("spatial <b>", "15.5 %", "200 (test)", "degrees 30"),
        "cost": ("512 MiB", "none used", "certify", "attacks a + b, sigma 0.25, name spatial", "1 min 1 s"),
        "made": ("clead certify runs/x",),
    }.items():  # fmt: skip
        text = section(html, key)
        for number in numbers:
            assert number in text, (key, number, text[:1500])


@pytest.mark.slow
def test_csv_holds_the_numbers_of_the_records(two):
    runs, path = two
    folder = path / "page-figures"
    for i, run in enumerate(runs, 1):
        stages = {row["after"]: row for row in rows(folder / f"stages-{i}.csv")}
        assert float(stages["worst case"]["still right (fraction)"]) == run.record.worst.accuracy
        for part in run.record.attacks:
            assert float(stages[part.name]["still right (fraction)"]) == part.robust.accuracy
            assert int(stages[part.name]["broken (images)"]) == part.num_successes
        per_class = [
            (row["class"], float(row["robust accuracy (fraction)"])) for row in rows(folder / f"classes-{i}.csv")
        ]
        assert per_class == [(part.name, part.robust_accuracy) for part in run.record.per_class]
        cells = [(r["corruption"], int(r["severity (1 to 5)"]), float(r["accuracy (fraction)"])) for r in
                 rows(folder / f"corruptions-{i}.csv")]  # fmt: skip
        assert cells == [
            (c.name, c.severity, c.accuracy.accuracy) for c in run.measurements["corruptions"].result.cells
        ]
        matrix = np.zeros((10, 10), int)
        np.add.at(matrix, (run.record.predictions.labels, run.record.predictions.attacked), 1)
        counts = [int(row["number (images)"]) for row in rows(folder / f"confusion-{i}-under-attack.csv")]
        assert counts == matrix.flatten().tolist()
        aware = [float(r["right or rejected (fraction)"]) for r in rows(folder / f"detection-{i}-aware.csv")
                 if r["detector"] == "mahalanobis"]  # fmt: skip
        assert aware == [p.aware.accuracy for p in run.measurements["detect"].result.detectors[0].curve]
    epsilon = rows(folder / "epsilon-linf.csv")
    radius = next(key for key in epsilon[0] if key.startswith("epsilon"))
    assert radius == "epsilon (linf, pixels in [0, 1])"
    for run in runs:
        mine = [row for row in epsilon if row["run"] == run.name]
        drawn = {(row["attack"], float(row[radius])): float(row["accuracy (fraction)"]) for row in mine}
        assert all(drawn[p.attack, p.eps] == p.robust.accuracy for p in run.record.curve)
        assert drawn["worst case over all attacks", run.record.threat.eps] == run.record.worst.accuracy
        exact = {p.eps: p.robust.accuracy for p in run.measurements["distances"].result.curve if p.eps <= 16 / 255}
        assert exact and all(drawn["nearest of fmn and deepfool", eps] == value for eps, value in exact.items())
    certified = [float(row["accuracy (fraction)"]) for row in rows(folder / "certified.csv") if row["run"] == "b"]
    assert certified == [p.certified.accuracy for p in runs[1].measurements["certify"].result.curve]


def test_every_plot_is_there_as_png_svg_and_csv_and_in_the_index(two):
    folder = two[1] / "page-figures"
    names = [row["figure"] for row in rows(folder / "index.csv")]
    drawn = (two[1] / "page.html").read_text().count('<svg class="plot"')
    assert len(names) == len(set(names)) == drawn > 20
    assert {path.name for path in folder.iterdir()} == {f"{n}.{s}" for n in names for s in ("png", "svg", "csv")} | {
        "index.csv"
    }
    for name in names:
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.size[0] > 900
        svg = (folder / f"{name}.svg").read_text()
        assert "<svg" in svg and "<image" not in svg and "var(--" not in svg
        assert len(rows(folder / f"{name}.csv")) > 1, name


@pytest.mark.slow
def test_figures_of_an_earlier_report_go_and_foreign_files_stay(tmp_path):
    folder = tmp_path / "figures"
    write_report([full_run()], tmp_path / "page.html", title="t", figures=folder)
    assert (folder / "certified.png").exists()
    (folder / "mine.txt").write_text("kept")
    write_report([RunResult("a", fake_record())], tmp_path / "page.html", title="t", figures=folder)
    names = {row["figure"] for row in rows(folder / "index.csv")}
    assert names == {"stages-1", "classes-1", "epsilon-linf"}
    assert {path.stem for path in folder.iterdir()} == {*names, "index", "mine"}
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "stages-1.png").write_text("a holiday")
    with pytest.raises(UserError, match="holds no figures of clead"):
        write_report([RunResult("a", fake_record())], tmp_path / "other.html", title="t", figures=foreign)
    assert (foreign / "stages-1.png").read_text() == "a holiday" and not (tmp_path / "other.html").exists()


def test_only_a_report_is_replaced(tmp_path):
    mine = tmp_path / "thesis.html"
    mine.write_text("<html>ten years of work</html>")
    with pytest.raises(UserError, match=r"no report of clead; remove it, or give another name"):
        write_report([RunResult("a", fake_record())], mine, title="t")
    assert "ten years" in mine.read_text()
    for name, message in (("report.pdf", r"ends in \.html"), ("folder.html", "is a directory")):
        (tmp_path / "folder.html").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=message):
            write_report([RunResult("a", fake_record())], tmp_path / name, title="t")


def test_measurements_of_other_weights_are_left_out_and_said(tmp_path):
    run = full_run()
    other = run.measurements["certify"].model_copy(
        update={"model": run.record.model.model_copy(update={"fingerprint": "other"})}
    )
    changed = RunResult("a", run.record, measurements={**run.measurements, "certify": other})
    html = write_report([changed], tmp_path / "r.html", title="t").read_text()
    assert '<section id="certified"' not in html and '<section id="detection"' in html
    assert "results/certify.json was measured on other weights" in section(html, "verdict")


@pytest.mark.slow
def test_names_from_outside_cannot_break_page_or_files(tmp_path):
    evil = '<script>alert("1")</script>, "x"\n../up'
    run = full_run(evil, classes=[evil, "$x_$", "猫", *map(str, range(7))])
    write_report([run, full_run("_b")], tmp_path / "r.html", title=evil, figures=tmp_path / "f")
    html = (tmp_path / "r.html").read_text()
    assert html.count("<script>") == 1 and "alert(&#34;1&#34;)" in html and Nesting(html).faults == []
    assert {path.name for path in tmp_path.iterdir()} == {"r.html", "f"}
    inert = evil.replace("\n", "\\n")
    assert {row["run"] for row in rows(tmp_path / "f/certified.csv")} == {inert, "_b"}
    assert inert in {row["class"] for row in rows(tmp_path / "f/classes-1.csv")}


def test_many_classes_have_a_list_of_errors_and_no_matrix(tmp_path):
    names = [f"class {k}" for k in range(100)]
    record = full_run(classes=names).record
    html = write_report([RunResult("a", record)], tmp_path / "r.html", title="t", figures=tmp_path / "f").read_text()
    text = section(html, "confusion")
    assert "no matrix is drawn" in text and "class 0 as class 1 (34 of 100)" in text
    assert not (tmp_path / "f/confusion-1-clean.csv").exists()


def run_cli(*words):
    return CliRunner().invoke(app, ["report", *map(str, words)])


@pytest.mark.slow
def test_records_alone_make_a_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(RECORDS) >= 4
    result = run_cli(*RECORDS, "--title", "Small models")
    assert result.exit_code == 0, result.output
    assert "report: report.html" in result.output and "figures: report-figures" in result.output
    html = (tmp_path / "report.html").read_text()
    assert "<h1>Small models</h1>" in html and Nesting(html).faults == []
    assert '<section id="gallery"' not in html and "McNemar" in html
    stages = rows(tmp_path / "report-figures/stages-1.csv")
    assert float(stages[-1]["still right (fraction)"]) == json.loads(RECORDS[0].read_text())["worst"]["accuracy"]


def test_an_evaluations_folder_is_a_source_with_what_lies_in_it(tmp_path):
    folder = tmp_path / "evaluations" / "net"
    folder.mkdir(parents=True)
    run = full_run("net")
    (folder / "evaluation.json").write_text(run.record.model_dump_json())
    (folder / "certify.json").write_text(run.measurements["certify"].model_dump_json())
    # An attack in a norm ball leaves a record under such a name, which is no measurement.
    (folder / "attack-pgd-50-ce.json").write_text(fake_record().model_dump_json())
    result = run_cli(folder, "--no-figures")
    assert result.exit_code == 0, result.output
    html = (folder / "report.html").read_text()
    assert "Robustness of runs/net" in html and '<section id="certified"' in html
    assert not (folder / "report-figures").exists()
    (folder / "certify.json").write_text('{"kind": "certify"}')
    with pytest.raises(UserError, match=r"certify\.json is not a measurement of clead: "):
        api.write_report([folder], folder / "report.html")


def test_the_rule_of_the_folder_is_in_the_help():
    words = "".join(CliRunner().invoke(app, ["report", "--help"]).output.split())
    assert "intothefolderNAME-figuresbesidethepageNAME.html" in words


@pytest.mark.parametrize("suite", ["quick", "pgd"])
def test_predictions_are_the_answers_to_the_images_that_were_counted(suite):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 5))
    x, y = torch.rand(40, 1, 4, 4), torch.randint(5, (40,))
    with torch.no_grad():
        y[:30] = net(x[:30]).argmax(1)
    threat = THREATS.get("linf")(eps=0.08)
    target = EvaluationTarget("net", "net", "given", "given", "test", "given", tuple("abcde"))
    evaluation = evaluate_model(
        net,
        ImageSet(x, y),
        threat,
        Eval(suite=suite, steps=10, check_images=0, batch_size=16, curve_points=0),
        target,
        options=EvaluationOptions(keep_adversarial=True, show=False),
    )
    record, adversarial = evaluation.record, evaluation.adversarial
    part = record.predictions
    with torch.no_grad():
        assert part.clean == net(x).argmax(1).tolist()
        answers = net(adversarial).argmax(1).tolist()
    assert part.labels == y.tolist()
    broken = [c and not r for c, r in zip(record.clean_flags, record.robust_flags, strict=True)]
    assert 5 < sum(broken) < sum(record.clean_flags)
    expected = [a if b else c for a, b, c in zip(answers, broken, part.clean, strict=True)]
    assert part.attacked == expected
    right = [a == label for a, label in zip(part.attacked, part.labels, strict=True)]
    assert right == record.robust_flags
    assert record.memory.process > 2**24 and record.memory.device is None
    again = Record.model_validate_json(record.model_dump_json(exclude={"predictions", "memory"}))  # one of before
    assert again.predictions is None and again.robust_flags == record.robust_flags
