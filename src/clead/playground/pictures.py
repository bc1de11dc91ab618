"""What was found, as HTML: pictures are data URIs, text is escaped, and every picture has its words for those who cannot see it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from torch import Tensor

from clead.evaluation.suites import in_words
from clead.inference.png import png_uri
from clead.playground.choices import NORM_WORDS, OFFERS, AttackSettings
from clead.playground.comparison import (
    Comparison,
    EpsilonCurve,
    LeaderboardRow,
    Outcome,
    PlaygroundModel,
    Prediction,
)
from clead.results.figure import MUTED, PALETTE, PALETTE_DARK, draw, head, new_axes, percent_axis, style
from clead.results.format import duration, interval, percent, threat_of
from clead.results.record import Estimate

_SHOWN = 5
_METHODS = {
    "pgd_at": "PGD-AT",
    "trades": "TRADES",
    "mart": "MART",
    "fgsm_rs": "FGSM-RS",
    "free": "free adversarial training",
    "clead": "C-LEAD",
    "clead_published": "C-LEAD as published",
    "acl": "ACL",
}


def css() -> str:
    """Return the page's own rules, over gradio's colours, light and dark."""
    light = "".join(f"--p{i}:{color};" for i, color in enumerate(PALETTE))
    dark = "".join(f"--p{i}:{color};" for i, color in enumerate(PALETTE_DARK))
    return (
        f".clead{{--ink:var(--body-text-color);--muted:#556070;--line:var(--border-color-primary);{light}"
        "color:var(--ink);font-size:15px;line-height:1.45}"
        f".dark .clead{{--muted:#a9b4c2;{dark}}}" + _RULES
    )


_RULES = """
.clead p{margin:.3em 0}
.clead h3{font-size:17px;font-weight:650;margin:0 0 .15em}
.clead .muted{color:var(--muted);font-size:13.5px}
.clead .card{border:1px solid var(--line);border-radius:10px;padding:14px 16px;margin:0 0 14px;
background:var(--block-background-fill)}
.clead .badge{display:inline-block;border-radius:999px;padding:0 10px;font-size:13px;font-weight:650;color:#fff;vertical-align:2px}
.clead .fooled{background:#a23d00}.clead .held{background:#00664a}.clead .other{background:#55595f}
.clead .three{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:16px;margin-top:10px}
.clead figure{margin:0;min-width:0}
.clead figcaption{font-weight:600;font-size:14px;margin:0 0 4px}
.clead img.pixels{image-rendering:pixelated;width:100%;max-width:190px;aspect-ratio:var(--ratio,1);border:1px solid var(--line);
border-radius:6px;display:block;background:#808080}
.clead ul.bars{list-style:none;margin:8px 0 0;padding:0;max-width:190px}
.clead ul.bars li{display:grid;grid-template-columns:minmax(0,1fr) max-content;column-gap:8px;
font-size:13.5px;margin:0 0 3px;padding:0}
.clead ul.bars .who{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.clead ul.bars .much{text-align:right;font-variant-numeric:tabular-nums}
.clead ul.bars .line{grid-column:1/3;height:5px;border-radius:3px;background:var(--line);overflow:hidden}
.clead ul.bars .line i{display:block;height:100%;background:var(--muted)}
.clead ul.bars .right .line i{background:#00855f}.clead ul.bars .wrong .line i{background:#d55e00}
.clead .verdict{font-size:17px;line-height:1.5}
.clead svg.plot{width:100%;max-width:660px;height:auto;display:block;font-family:inherit}
.clead .key{display:flex;gap:6px 18px;flex-wrap:wrap;font-size:13.5px;margin:2px 0 0}
.clead .key b{display:inline-block;width:18px;height:4px;border-radius:2px;margin-right:6px;vertical-align:3px}
.clead .wide{overflow-x:auto}

.clead table,.clead tr{border:0!important}
.clead table{border-collapse:collapse;width:100%;font-size:14.5px;margin:6px 0}
.clead th,.clead td{padding:7px 10px;border:0 solid var(--line)!important;border-bottom-width:1px!important;
text-align:left;vertical-align:top}
.clead th{font-weight:600}.clead td.n{font-variant-numeric:tabular-nums;white-space:nowrap}
.clead .small{color:var(--muted);font-size:13px}
#gallery .grid-container{grid-template-columns:repeat(8,minmax(0,1fr))!important;gap:4px!important;padding-top:26px!important;
grid-template-rows:none!important;grid-auto-rows:max-content!important}
#gallery .grid-wrap{overflow:visible!important;height:auto!important;min-height:0!important;max-height:none!important}
#gallery .gallery-item,#gallery .thumbnail-item,#gallery .thumbnail-lg{aspect-ratio:1!important;height:auto!important}
#chosen img.pixels{width:96px}
#chosen .row{display:flex;gap:14px;align-items:flex-start}
@media (max-width:640px){.clead .three{gap:8px}.clead ul.bars{max-width:none}.clead .card{padding:12px 10px}}
"""


HEAD = (
    "<style>.gradio-container{max-width:1320px!important;margin:0 auto!important}"
    "@media (max-width:640px){.gradio-container .main.fillable{padding:12px 8px!important}}</style>"
)
"""Rules for what stands around the page's contents, where gradio does not let ``css`` reach."""


def trained(entrant: PlaygroundModel | LeaderboardRow) -> str:
    """Return in words how a model was trained."""
    if entrant.method == "standard":
        return "trained without attacks"
    return f"trained against attacks: {_METHODS.get(entrant.method, entrant.method)}"


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
    """Return the chosen image with its words; ``lines`` are plain text."""
    said = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<div class="clead"><div class="row">{_picture(image, "the chosen image: " + lines[0])}<div>{said}</div></div></div>'


def note(text: str) -> str:
    """Return a muted line of plain text."""
    return f'<div class="clead"><p class="muted">{escape(text)}</p></div>'


def verdict(outcomes: Sequence[Outcome], classes: Sequence[str], settings: AttackSettings) -> str:
    """Return one sentence per model: what it says now, and what it said before."""
    said = " ".join(_sentence(outcome, classes) for outcome in outcomes)
    return (
        f'<div class="clead" role="status"><p class="verdict">Under {escape(_attack(settings))}: {said}</p>'
        '<p class="muted">The attack was run on each model by itself, with full access to it (white-box). Where a model holds, a '
        "stronger attack may still break it.</p></div>"
    )


def outcomes(found: Sequence[Outcome], contest: Comparison, image: Tensor, settings: AttackSettings) -> str:
    """Return each model's clean image, change and adversarial image side by side, with probabilities and the detector's verdict."""
    cards = [
        _card(outcome, entrant, contest, image, settings) for outcome, entrant in zip(found, contest.pair, strict=True)
    ]
    return f'<div class="clead">{"".join(cards)}</div>'


def curve(found: Sequence[EpsilonCurve], entrants: Sequence[PlaygroundModel], settings: AttackSettings) -> str:
    """Return the plot of the right class's probability against ε, and the smallest ε that breaks each model, in words."""
    norm = NORM_WORDS[settings.norm][0]
    figure, axes = new_axes(470, 210)
    unit = 255 if settings.eps.text.endswith("/255") else 1
    head(
        axes,
        "Probability of the right class, the lowest found within ε",
        f"ε ({norm}{', in 255ths' if unit > 1 else ''})",
    )
    percent_axis(axes)
    axes.axvline(unit * settings.eps, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
    axes.text(unit * settings.eps, 1.02, " chosen ε", color=MUTED, fontsize=9, va="top")
    rows, key, said = [], [], []
    for i, decline in enumerate(found):
        said.append(_smallest(decline, norm, settings))
        if decline.smallest == 0:  # not attacked, so it would be drawn as if nothing could move it
            continue
        color, marker, dash = style(i)
        at = [unit * radius for radius in decline.radii]
        axes.plot(at, decline.probabilities, color=color, marker=marker, markersize=4, linestyle=dash, linewidth=1.8)
        if decline.smallest is not None and decline.smallest <= decline.radii[-1]:
            axes.axvline(unit * decline.smallest, color=color, linewidth=1.2, linestyle=dash, ymax=0.94)
        rows += [(decline.name, radius, p) for radius, p in zip(decline.radii, decline.probabilities, strict=True)]
        key.append((decline.name, i))
    axes.set_xlim(0, 1.03 * unit * found[0].radii[-1])
    columns = ("model", f"epsilon ({settings.norm})", "probability of the right class")
    drawn = draw(figure, "decline", _described(found, norm), columns, rows, key)
    legend = "".join(
        f'<span><b style="background:var(--p{i})"></b>{escape(entrant.name)}, {escape(trained(entrant))}</span>'
        for i, entrant in enumerate(entrants)
        if found[i].smallest != 0
    )
    return (
        f'<div class="clead"><section class="card" aria-label="How far each model holds">'
        "<h3>How far each model holds on this image</h3>"
        f'{drawn.svg}<div class="key">{legend}</div>'
        f"{''.join(f'<p>{line}</p>' for line in said)}"
        '<p class="muted">PGD of 20 steps at each ε, halving the way to the smallest, and FMN; upright lines stand where the '
        "answer turns wrong. What was found is an upper bound: a stronger attack may need less.</p></section></div>"
    )


def _described(found: Sequence[EpsilonCurve], norm: str) -> str:
    """Return what the plot shows, for those who cannot see it."""
    parts = [
        f"{decline.name} falls from {decline.probabilities[0]:.0%} at ε 0 to {decline.probabilities[-1]:.0%} at ε "
        f"{decline.radii[-1]:.3g}"
        for decline in found
        if decline.smallest != 0
    ]
    return f"Lowest probability of the right class found within {norm} ε: {'; '.join(parts)}"


def leaderboard(rows: Sequence[LeaderboardRow], settings: AttackSettings | None = None) -> str:
    """Return the leaderboard: what was measured here, if anything was, and what the runs' records say."""
    here = settings is not None and any(row.held is not None for row in rows)
    heads = ["", "model", "training"]
    if here:
        heads += ["clean, here", "holds, here"]
    heads += ["clean, recorded", "worst case, recorded", "under"]
    body = []
    for place, row in enumerate(rows, 1):
        cells = [f'<td class="n">{place}</td><td><b>{escape(row.name)}</b></td><td>{escape(trained(row))}</td>']
        if here:
            cells += [_estimate(row.clean), _estimate(row.held)]
        if row.record is None:
            cells.append('<td colspan="3" class="small">not evaluated yet: clead evaluate does</td>')
        else:
            suite = f"{threat_of(row.record)}; {in_words(row.record)}"
            cells += [
                _estimate(row.record.clean),
                _estimate(row.record.worst),
                f'<td class="small">{escape(suite)}</td>',
            ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    table = (
        f'<div class="wide"><table><thead><tr>{"".join(f"<th scope=col>{head}</th>" for head in heads)}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
    said = (
        f"<p>Ranked by what holds here, under {escape(_attack(settings))}.</p>"
        if here and settings is not None
        else "<p>Ranked by the recorded worst case. Choose an attack above to rank the models by what holds against it.</p>"
    )
    return (
        f'<div class="clead" role="status">{said}{table}<p class="muted">In brackets the Wilson 95 % interval, and the number of '
        "images: on few images it is wide, and models whose intervals overlap much cannot be told apart. Holds: right when clean "
        "and after the attack. Recorded is what clead evaluate measured, with its own attacks and number of images.</p></div>"
    )


def _estimate(found: Estimate | None) -> str:
    if found is None:
        return "<td></td>"
    span = f'<span class="small">({interval(found)}, n = {found.n})</span>'
    return f'<td class="n">{percent(found.accuracy)}<br>{span}</td>'


def _attack(settings: AttackSettings) -> str:
    steps = f", {settings.steps} {OFFERS[settings.attack].steps}" if OFFERS[settings.attack].steps else ""
    label = OFFERS[settings.attack].label.partition(" – ")[0]
    return f"{label} ({NORM_WORDS[settings.norm][0]}, ε = {settings.eps.text}{steps})"


def _sentence(outcome: Outcome, classes: Sequence[str]) -> str:
    name, now, was = f"<b>{escape(outcome.name)}</b>", outcome.adversarial, outcome.clean
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


def _card(
    outcome: Outcome, entrant: PlaygroundModel, contest: Comparison, image: Tensor, settings: AttackSettings
) -> str:
    clean = image.float() / 255
    drawn, k = change(outcome.x_adv - clean)
    kind, badge = (
        ("other", "wrong already")
        if not outcome.attacked
        else ("fooled", "fooled")
        if outcome.broken
        else ("held", "holds")
    )
    label = outcome.label
    right = contest.classes[label]
    size = f"size {_radius(outcome.size, settings)} of ε = {settings.eps.text} ({NORM_WORDS[settings.norm][0]})"
    if not outcome.attacked:
        facts = ["not attacked"]
    elif outcome.size == 0:
        facts = ["the attack found nothing within ε and gives the image back as it was"]
    else:
        facts = ["grey is no change", size]
    if outcome.attacked:
        facts.append(f"{outcome.passes} passes through the model, {duration(outcome.seconds)}")
    if outcome.attacked and outcome.size > 0:
        for name, answer in outcome.elsewhere.items():
            says = f"says {contest.classes[answer]}"
            facts.append(
                f"tried on {name}, which it was not made for: {says}" + (" (right)" if answer == label else " (wrong)")
            )
    own = "the model's own answer stands for the true class" if outcome.own else f"true class: {right}"
    shown = "".join(f'<p class="muted">{escape(fact)}</p>' for fact in facts)
    return (
        f'<section class="card" aria-label="{escape(entrant.name)}"><h3>{escape(entrant.name)} '
        f'<span class="badge {kind}">{badge}</span></h3><p class="muted">{escape(trained(entrant))}; {escape(own)}</p>'
        f'<div class="three"><figure><figcaption>clean</figcaption>{_picture(image, f"the clean image, {right}")}'
        f"{_bars(outcome.clean, outcome, contest.classes)}</figure>"
        f"<figure><figcaption>change ×{k:g}</figcaption>{_picture(drawn, 'what the attack changed')}{shown}</figure>"
        f"<figure><figcaption>adversarial</figcaption>{_picture(outcome.x_adv, 'the image after the attack')}"
        f"{_bars(outcome.adversarial, outcome, contest.classes)}</figure></div>{_detected(outcome, entrant)}</section>"
    )


def _picture(image: Tensor, alt: str) -> str:
    _, height, width = image.shape
    return (
        f'<img class="pixels" style="--ratio:{width}/{height}" src="{png_uri(image)}" alt="{escape(alt, quote=True)}">'
    )


def _bars(sight: Prediction, outcome: Outcome, classes: Sequence[str]) -> str:
    """Return the most probable classes; the right one, and the answers before and after, are always among them."""
    order = sorted(range(len(classes)), key=lambda k: -sight.probabilities[k])
    must = list(dict.fromkeys([outcome.label, outcome.clean.answer, outcome.adversarial.answer]))
    rest = [k for k in order if k not in must]
    keep = sorted(
        [*must, *rest[: max(0, min(_SHOWN, len(classes)) - len(must))]], key=lambda k: -sight.probabilities[k]
    )
    lines = []
    for k in keep:
        p = sight.probabilities[k]
        kind = "right" if k == outcome.label else "wrong" if k == sight.answer else ""
        name = escape(classes[k]) + (" ✓" if k == outcome.label else "")
        strong = f"<b>{name}</b>" if k == sight.answer else name
        lines.append(
            f'<li class="{kind}"><span class="who">{strong}</span><span class="much">{percent(p)}</span>'
            f'<span class="line"><i style="width:{100 * p:.1f}%"></i></span></li>'
        )
    return f'<ul class="bars">{"".join(lines)}</ul>'


def _detected(outcome: Outcome, entrant: PlaygroundModel) -> str:
    """Return what the detector says of both images."""
    guard, before, after = entrant.detector, outcome.clean.score, outcome.adversarial.score
    if guard is None or before is None or after is None:
        return ""
    name = escape(guard.name.replace("_", " "))
    if guard.threshold is None:
        return (
            f'<p class="muted">Detector ({name}): too few validation images for a threshold, so it rejects nothing.</p>'
        )

    def says(score: float) -> str:
        assert guard is not None and guard.threshold is not None
        return f"{'<b>rejects it</b>' if score > guard.threshold else 'lets it pass'} (score {score:.3g})"

    adversarial = f"; the adversarial one: {says(after)}" if outcome.attacked and outcome.size > 0 else ""
    return (
        f'<p style="margin-top:10px">Detector – the clean image: {says(before)}{adversarial}.</p>'
        f'<p class="muted">It is {name}, fitted on {guard.fitted} training images; threshold {guard.threshold:.3g}, which about '
        f"{percent(guard.rate, 0)} of clean images exceed. This attack does not know the detector; one that does can "
        "often pass it.</p>"
    )


def _smallest(decline: EpsilonCurve, norm: str, settings: AttackSettings) -> str:
    name = f"<b>{escape(decline.name)}</b>"
    if decline.smallest is None:
        return f"{name}: no change was found that makes its answer wrong."
    if decline.smallest == 0:
        return f"{name} is wrong without any change, so there is nothing to draw."
    return f"{name}: the smallest change found that makes its answer wrong has {norm} ε = {_radius(decline.smallest, settings)}."


def _radius(size: float, settings: AttackSettings) -> str:
    """Return a radius as the chosen one was written: in 255ths, or as a plain number."""
    return f"{255 * size:.3g}/255" if settings.eps.text.endswith("/255") else f"{size:.3g}"
