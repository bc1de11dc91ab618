"""The report is one complete file whose numbers are the record's, whose strings are escaped; it asks no network."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from sklearn.datasets import load_digits

from clead.errors import MissingExtra, UserError
from clead.evaluation.suites import MEANING
from clead.report import plots
from clead.report.html import RunResult, write_report
from clead.report.record import Record

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
            "name": a, "settings": {"steps": b, "step_size": 2 / 255}, "attacked": before, "broken": before - k,
            "robust": wilson(k, n), "flags": [True], "seconds": 1.3 * b, "forwards": b + 1, "backwards": b,
            "largest": 8 / 255,
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


def test_same_runs_give_the_same_file(tmp_path):
    run = fake_run()
    assert write(tmp_path / "a", run)[0] == write(tmp_path / "b", run)[0]


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
    far = record.attacks[0].model_copy(update={"largest": 9 / 255})
    rising = [p.model_copy(update={"robust": record.clean}) if p.eps_text == "16/255" else p for p in record.curve]
    _, page = write(tmp_path, RunResult("a", record.model_copy(update={"attacks": [far], "curve": rising})))
    assert "went outside the threat" in page.text and "gradient masking" in page.text
    _, page = write(tmp_path, RunResult("a", record))
    assert "Read with care" not in page.text


def section(page_text, key):
    """Return the visible text of one section, with plain spaces."""
    part = page_text.partition(f'<section id="{key}"')[2].partition("</section>")[0]
    return Page(part).text.replace("\N{NO-BREAK SPACE}", " ")


def changed(record, **update):
    return Record.model_validate(record.model_dump() | update)


@pytest.mark.parametrize("suite", [*MEANING, "none"])
def test_the_verdict_names_the_suite(tmp_path, suite):
    record = fake_record(suite=suite)
    html, _ = write(tmp_path, RunResult("a", record if suite != "none" else changed(record, attacks=[])))
    verdict, care = section(html, "verdict"), "Read with care" in html
    sentence = verdict.partition("on 1,000 test images of digits, ")[2].partition(".")[0]
    words = {
        "quick": "the quick suite, which is not AutoAttack,",
        "queries": "attacks by queries only, not AutoAttack,",
        "pgd": "FGSM CE, PGD-50 CE and PGD-50 margin, not AutoAttack,",
        "attacks": "APGD-CE, APGD-T, FAB-T and Square, not AutoAttack,",
        "none": "no attack,",
    }.get(suite, MEANING.get(suite, "") + ",")
    assert sentence.startswith(f"under {words} a still classifies 54")
    full = suite in ("standard", "plus", "rand", "adaptive")
    assert full == ("settings are those of AutoAttack" in verdict) == ("was not run as its protocol" not in verdict)
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
    svg = plots.stages(record, 0, title="t", prefix="p", label="l")
    bars = re.findall(r'<path d="M ([\d.]+) [\d.]+ L ([\d.]+) [^"]* z\s*"[^>]*fill: var\(--p0[^;"]*(; opacity)?', svg)
    lengths = {pale: [float(b) - float(a) for a, b, p in bars if bool(p) == pale] for pale in (True, False)}
    left = [record.clean.accuracy, *(attack.robust.accuracy for attack in record.attacks), record.worst.accuracy]
    unit = lengths[False][0] / left[0]
    assert lengths[False] == pytest.approx([unit * value for value in left], abs=0.05)
    assert lengths[True] == pytest.approx([unit * value for value in (left[0], *left[:-2], left[-1])], abs=0.05)


def test_threat_is_repeated_per_run_only_where_it_differs(tmp_path):
    a = RunResult("a", fake_record())
    html, _ = write(tmp_path, a, RunResult("b", fake_record(suite="quick")))
    assert "Threat, images" not in section(html, "results")
    html, _ = write(tmp_path, a, RunResult("b", fake_record(images="others")))
    assert "Threat, images" in section(html, "results")


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
    record = fake_record()
    svg = plots.epsilon_curve([record], {8 / 255: "8/255"}, prefix="p", label="a <label>", indices=[1])
    assert svg.startswith("<svg ") and 'aria-label="a &lt;label&gt;"' in svg and "<style" not in svg
    assert f"var(--p1,{plots.PALETTE[1]})" in svg and plots.PALETTE[0] not in svg
    left = set(re.findall(r"(?<!,)#[0-9a-f]{6}", svg))
    assert left <= {"#000000", "#ffffff"}, left
    assert all(name.startswith("p-") for name in re.findall(r' id="([^"]*)"', svg))


@pytest.mark.parametrize(("given", "eps"), [("8/255", 8 / 255), (0.5, 0.5), ("x", None), (None, None)])
def test_radius_is_parsed(given, eps):
    assert plots.parse_eps(given) == eps
