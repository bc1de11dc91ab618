"""Results as HTML: pictures are data URIs, text is escaped, and every picture has its words for those who cannot see it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from torch import Tensor

from clead.evaluation.suites import in_words
from clead.inference.png import png_uri
from clead.playground.choices import ATTACK_OPTIONS, AttackSettings
from clead.playground.comparison import EpsilonCurve, LeaderboardRow, Outcome, PlaygroundModel, Prediction
from clead.results.figure import MUTED, PALETTE, PALETTE_DARK, draw, head, new_axes, percent_axis, style
from clead.results.format import duration, interval, norm_of, percent, threat_of
from clead.results.record import Estimate

_SHOWN = 5
_METHODS = {"free": "free adversarial training", "clead": "C-LEAD", "clead_published": "C-LEAD as published"}

HEAD = (
    "<style>.gradio-container{max-width:1320px!important;margin:0 auto!important}"
    "@media (max-width:640px){.gradio-container .main.fillable{padding:12px 8px!important}}</style>"
)
"""Rules for what stands around the page's contents, where gradio does not let ``css`` reach."""


def css() -> str:
    """Return the page's own rules, over gradio's colours, light and dark."""
    light = "".join(f"--p{i}:{color};" for i, color in enumerate(PALETTE))
    dark = "".join(f"--p{i}:{color};" for i, color in enumerate(PALETTE_DARK))
    return (
        f".clead{{--ink:var(--body-text-color);--muted:#556070;--line:var(--border-color-primary);{light}"
        f"color:var(--ink);font-size:15px;line-height:1.45}}.dark .clead{{--muted:#a9b4c2;{dark}}}\n"
        + Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    )


def trained(model: PlaygroundModel) -> str:
    """Return in words how a model was trained."""
    if model.method == "standard":
        return "trained without attacks"
    name = _METHODS.get(model.method, model.method.upper().replace("_", "-"))
    return f"trained against attacks: {name}"


def change(delta: Tensor) -> tuple[Tensor, float]:
    """Return ½ + k·delta in [0, 1], and k: as large as fits, rounded down to two digits, and 1 where nothing changed."""
    largest = float(delta.abs().max())
    if largest == 0:
        return delta + 0.5, 1.0
    k = 0.5 / largest
    step = 10 ** (math.floor(math.log10(k)) - 1)
    k = max(1.0, math.floor(k / step) * step)
    return (0.5 + k * delta).clamp(0, 1), k


def chosen(image: Tensor, lines: Sequence[str]) -> str:
    """Return the chosen image beside ``lines`` of plain text."""
    text = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<div class="clead"><div class="row">{picture(image, "the chosen image: " + lines[0])}<div>{text}</div></div></div>'


def note(text: str) -> str:
    """Return a muted line of plain text."""
    return f'<div class="clead"><p class="muted">{escape(text)}</p></div>'


def verdict(outcomes: Sequence[Outcome], classes: Sequence[str], settings: AttackSettings) -> str:
    """Return one sentence per model: what it says now, and what it said before."""
    sentences = " ".join(_sentence(outcome, classes) for outcome in outcomes)
    return (
        f'<div class="clead" role="status"><p class="verdict">Under {escape(attack_text(settings))}: {sentences}</p>'
        '<p class="muted">The attack was run on each model by itself, with full access to it (white-box). Where a model holds, a '
        "stronger attack may still break it.</p></div>"
    )


def cards(outcomes: Sequence[Outcome], classes: Sequence[str], image: Tensor, settings: AttackSettings) -> str:
    """Return each model's clean image, change and adversarial image side by side, with probabilities and the detector's verdict."""
    return f'<div class="clead">{"".join(_card(outcome, classes, image, settings) for outcome in outcomes)}</div>'


def epsilon_plot(curves: Sequence[EpsilonCurve], settings: AttackSettings) -> str:
    """Return the plot of the right class's probability against ε, and the smallest ε that breaks each model, in words."""
    norm = norm_of(settings.norm)
    figure, axes = new_axes(470, 210)
    unit = 255 if settings.in_255ths else 1
    title = "Probability of the right class, the lowest found within ε"
    head(axes, title, f"ε ({norm}{', in 255ths' if unit > 1 else ''})")
    percent_axis(axes)
    axes.axvline(unit * settings.eps, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
    axes.text(unit * settings.eps, 1.02, " chosen ε", color=MUTED, fontsize=9, va="top")
    rows, key, descriptions, legend = [], [], [], ""
    for i, curve in enumerate(curves):
        if curve.smallest == 0:  # not attacked, so it would be drawn as if nothing could move it
            continue
        color, marker, dash = style(i)
        radii, last = [unit * radius for radius in curve.radii], curve.radii[-1]
        axes.plot(radii, curve.probabilities, color=color, marker=marker, markersize=4, linestyle=dash, linewidth=1.8)
        if curve.smallest is not None and curve.smallest <= last:
            axes.axvline(unit * curve.smallest, color=color, linewidth=1.2, linestyle=dash, ymax=0.94)
        rows += [(curve.model.name, radius, p) for radius, p in zip(curve.radii, curve.probabilities, strict=True)]
        key.append((curve.model.name, i))
        first, end = curve.probabilities[0], curve.probabilities[-1]
        descriptions.append(f"{curve.model.name} falls from {first:.0%} at ε 0 to {end:.0%} at ε {last:.3g}")
        name = escape(f"{curve.model.name}, {trained(curve.model)}")
        legend += f'<span><b style="background:var(--p{i})"></b>{name}</span>'
    axes.set_xlim(0, 1.03 * unit * curves[0].radii[-1])
    columns = ("model", f"epsilon ({settings.norm})", "probability of the right class")
    described = f"Lowest probability of the right class found within {norm} ε: {'; '.join(descriptions)}"
    drawn = draw(figure, "decline", described, columns, rows, key)
    return (
        f'<div class="clead"><section class="card" aria-label="How far each model holds">'
        "<h3>How far each model holds on this image</h3>"
        f'{drawn.svg}<div class="key">{legend}</div>'
        f"{''.join(f'<p>{_smallest(curve, settings)}</p>' for curve in curves)}"
        '<p class="muted">PGD of 20 steps at each ε, halving the way to the smallest, and FMN; upright lines stand where the '
        "answer turns wrong. What was found is an upper bound: a stronger attack may need less.</p></section></div>"
    )


def leaderboard(rows: Sequence[LeaderboardRow], settings: AttackSettings | None = None) -> str:
    """Return the leaderboard: what was measured here under ``settings``, if anything was, and what the runs' records say."""
    columns = ["", "model", "training"]
    if settings is not None:
        columns += ["clean, here", "holds, here"]
    columns += ["clean, recorded", "worst case, recorded", "under"]
    body = []
    for rank, row in enumerate(rows, 1):
        name, record = f"<b>{escape(row.model.name)}</b>", row.model.record
        cells = [f'<td class="n">{rank}</td><td>{name}</td><td>{escape(trained(row.model))}</td>']
        if settings is not None:
            cells += [_estimate(row.clean), _estimate(row.robust)]
        if record is None:
            cells.append('<td colspan="3" class="small">not evaluated yet: clead evaluate does</td>')
        else:
            suite = escape(f"{threat_of(record)}; {in_words(record)}")
            cells += [_estimate(record.clean), _estimate(record.worst), f'<td class="small">{suite}</td>']
        body.append(f"<tr>{''.join(cells)}</tr>")
    ranked = "the recorded worst case. Choose an attack above to rank the models by what holds against it."
    if settings is not None:
        ranked = f"what holds here, under {escape(attack_text(settings))}."
    return (
        f'<div class="clead" role="status"><p>Ranked by {ranked}</p>'
        f'<div class="wide"><table><thead><tr>{"".join(f"<th scope=col>{column}</th>" for column in columns)}</tr></thead>'
        f'<tbody>{"".join(body)}</tbody></table></div><p class="muted">In brackets the Wilson 95 % interval, and the number of '
        "images: on few images it is wide, and models whose intervals overlap much cannot be told apart. Holds: right when clean "
        "and after the attack. Recorded is what clead evaluate measured, with its own attacks and number of images.</p></div>"
    )


def _estimate(value: Estimate | None) -> str:
    if value is None:
        return "<td></td>"
    span = f'<span class="small">({interval(value)}, n = {value.n})</span>'
    return f'<td class="n">{percent(value.accuracy)}<br>{span}</td>'


def attack_text(settings: AttackSettings) -> str:
    """Return an attack with its norm, radius and steps."""
    option = ATTACK_OPTIONS[settings.attack]
    steps = f", {settings.steps} {option.steps}" if option.steps else ""
    return f"{option.label.partition(' – ')[0]} ({norm_of(settings.norm)}, ε = {settings.eps.text}{steps})"


def _sentence(outcome: Outcome, classes: Sequence[str]) -> str:
    name, now, was = f"<b>{escape(outcome.model.name)}</b>", outcome.adversarial, outcome.clean
    sure, before = percent(max(now.probabilities), 0), percent(max(was.probabilities), 0)
    if not outcome.attacked:
        right = escape(classes[outcome.label])
        return (
            f"{name} says <b>{escape(classes[was.answer])}</b> to the untouched image already, where {right} is right, so there is "
            "nothing to attack."
        )
    if outcome.broken:
        return (
            f"{name} now says <b>{escape(classes[now.answer])}</b> ({sure} sure); on the untouched image it says "
            f"{escape(classes[was.answer])} ({before})."
        )
    return f"{name} still says <b>{escape(classes[now.answer])}</b> ({sure} sure, {before} before)."


def _card(outcome: Outcome, classes: Sequence[str], image: Tensor, settings: AttackSettings) -> str:
    drawn, k = change(outcome.x_adv - image.float() / 255)
    kind, badge = ("fooled", "fooled") if outcome.broken else ("held", "holds")
    if not outcome.attacked:
        kind, badge = "other", "wrong already"
    name, right = escape(outcome.model.name), classes[outcome.label]
    target = "the model's own answer stands for the true class" if outcome.label_is_answer else f"true class: {right}"
    facts = "".join(f'<p class="muted">{escape(fact)}</p>' for fact in _facts(outcome, classes, settings))
    return (
        f'<section class="card" aria-label="{name}"><h3>{name} <span class="badge {kind}">{badge}</span></h3>'
        f'<p class="muted">{escape(trained(outcome.model))}; {escape(target)}</p>'
        f'<div class="three"><figure><figcaption>clean</figcaption>{picture(image, f"the clean image, {right}")}'
        f"{_bars(outcome.clean, outcome, classes)}</figure>"
        f"<figure><figcaption>change ×{k:g}</figcaption>{picture(drawn, 'what the attack changed')}{facts}</figure>"
        f"<figure><figcaption>adversarial</figcaption>{picture(outcome.x_adv, 'the image after the attack')}"
        f"{_bars(outcome.adversarial, outcome, classes)}</figure></div>{_detected(outcome)}</section>"
    )


def _facts(outcome: Outcome, classes: Sequence[str], settings: AttackSettings) -> list[str]:
    """Return what is to be said of the change."""
    if not outcome.attacked:
        return ["not attacked"]
    work = f"{outcome.passes} passes through the model, {duration(outcome.seconds)}"
    if outcome.size == 0:
        return ["the attack found nothing within ε and gives the image back as it was", work]
    eps = f"ε = {settings.eps.text} ({norm_of(settings.norm)})"
    facts = ["grey is no change", f"size {_radius(outcome.size, settings)} of {eps}", work]
    for name, answer in outcome.elsewhere.items():
        right = "right" if answer == outcome.label else "wrong"
        facts.append(f"tried on {name}, which it was not made for: says {classes[answer]} ({right})")
    return facts


def picture(image: Tensor, alt: str) -> str:
    """Return an image (C, H, W), uint8 or float in [0, 1], with sharp pixels."""
    _, height, width = image.shape
    return (
        f'<img class="pixels" style="--ratio:{width}/{height}" src="{png_uri(image)}" alt="{escape(alt, quote=True)}">'
    )


def _bars(prediction: Prediction, outcome: Outcome, classes: Sequence[str]) -> str:
    """Return the most probable classes; the right one, and the answers before and after, are always among them."""
    order = sorted(range(len(classes)), key=lambda k: -prediction.probabilities[k])
    always = list(dict.fromkeys([outcome.label, outcome.clean.answer, outcome.adversarial.answer]))
    shown = {*always, *[k for k in order if k not in always][: max(0, min(_SHOWN, len(classes)) - len(always))]}
    lines = []
    for k in [k for k in order if k in shown]:
        p = prediction.probabilities[k]
        kind = "right" if k == outcome.label else "wrong" if k == prediction.answer else ""
        name = escape(classes[k]) + (" ✓" if k == outcome.label else "")
        strong = f"<b>{name}</b>" if k == prediction.answer else name
        lines.append(
            f'<li class="{kind}"><span class="who">{strong}</span><span class="much">{percent(p)}</span>'
            f'<span class="line"><i style="width:{100 * p:.1f}%"></i></span></li>'
        )
    return f'<ul class="bars">{"".join(lines)}</ul>'


def _detected(outcome: Outcome) -> str:
    """Return what the detector says of both images."""
    detector, before, after = outcome.model.detector, outcome.clean.score, outcome.adversarial.score
    if detector is None or before is None or after is None:
        return ""
    name, threshold = escape(detector.name.replace("_", " ")), detector.threshold
    if threshold is None:
        return (
            f'<p class="muted">Detector ({name}): too few validation images for a threshold, so it rejects nothing.</p>'
        )

    def says(score: float) -> str:
        return f"{'<b>rejects it</b>' if score > threshold else 'lets it pass'} (score {score:.3g})"

    adversarial = f"; the adversarial one: {says(after)}" if outcome.attacked and outcome.size > 0 else ""
    return (
        f'<p style="margin-top:10px">Detector – the clean image: {says(before)}{adversarial}.</p>'
        f'<p class="muted">It is {name}, fitted on {detector.fitted} training images; threshold {threshold:.3g}, which about '
        f"{percent(detector.rate, 0)} of clean images exceed. This attack does not know the detector; one that does can "
        "often pass it.</p>"
    )


def _smallest(curve: EpsilonCurve, settings: AttackSettings) -> str:
    name = f"<b>{escape(curve.model.name)}</b>"
    if curve.smallest is None:
        return f"{name}: no change was found that makes its answer wrong."
    if curve.smallest == 0:
        return f"{name} is wrong without any change, so there is nothing to draw."
    radius = f"{norm_of(settings.norm)} ε = {_radius(curve.smallest, settings)}"
    return f"{name}: the smallest change found that makes its answer wrong has {radius}."


def _radius(size: float, settings: AttackSettings) -> str:
    """Return a radius as the chosen one was written: in 255ths, or as a plain number."""
    return f"{255 * size:.3g}/255" if settings.in_255ths else f"{size:.3g}"
