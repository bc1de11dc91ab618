"""The report: one HTML file, no network, for one or several evaluated runs.

It shows what the records say and computes no statistics of its own; what a record cannot support is said in the text.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from clead.errors import MissingExtra, UserError, did_you_mean
from clead.evaluation.suites import NOT, in_words, is_autoattack, other_steps
from clead.report import plots
from clead.report.record import Estimate, Record

GALLERY_BYTES = 2_500_000
"""Encoded size that the images of all galleries may take together; what does not fit is left out, and said."""

_THUMBNAIL = 112
_NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1"}
"""Ends the note of an evaluation whose attacks had another number of steps, such as ``20 steps instead of …``."""
"""So many attacks without the name of a suite are named in a sentence; more are counted."""
_X_AXES = (
    ("forward_equivalents", "forward-equivalents per training image"),
    ("epoch", "epoch"),
    ("step", "step"),
)
_NOT_A_TERM = (
    "kind",
    "step",
    "epoch",
    "forward",
    "accuracy",
    "rate",
    "second",
    "norm",
    "memory",
    "time",
    "eps",
    "scale",
)


@dataclass(frozen=True)
class RunResult:
    """What a report shows of one run; everything but the record is optional, and what is missing drops its section.

    Args:
        name: how the report calls the run; unique within one report.
        record: the evaluation.
        artifacts: for the gallery ``x``, ``x_adv`` (n, C, H, W) float in [0, 1], ``labels`` (n,), ``probabilities``,
            ``probabilities_adv`` (n, K); for the map ``embedding_clean``, ``embedding_adv`` (m, D),
            ``embedding_labels`` (m,).
        history: the lines of ``metrics.jsonl``.
        config: the configuration as nested groups (data, model, threat …).
    """

    name: str
    record: Record
    artifacts: dict[str, np.ndarray] = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    config: dict = field(default_factory=dict)


def write_report(runs: Sequence[RunResult], path: Path, *, title: str, pairs: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write the report of ``runs`` to ``path`` atomically (a reader sees the old file or all of the new one); return it.

    Args:
        runs: at least one; names must differ. Colours follow this order.
        path: the file written; missing folders are made.
        title: the heading.
        pairs: McNemar's exact tests between runs: ``a``, ``b`` (names), ``only_a``, ``only_b`` (images that only one of
            them held), ``p_value``. Shown for runs that were attacked on the same images within the same threat and under
            the same suite.

    Raises:
        UserError: no runs, repeated names, an unknown name in ``pairs``, or artifacts whose shapes disagree.
        MissingExtra: matplotlib, jinja2 or (for the embedding map) scikit-learn is not installed.
    """
    names = [run.name for run in runs]
    if not runs:
        raise UserError("a report needs at least one run, got none; give the folder of an evaluated run")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UserError(f"the names of a report's runs must differ, got {twice} more than once; rename one of them")
    for pair in pairs:
        for side in (pair["a"], pair["b"]):
            if side not in names:
                raise UserError(
                    f"a pair names the run {side!r}, which the report does not hold; {did_you_mean(side, names)}"
                )
    html = _template().render(title=title, **_context(runs, pairs))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(html, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra("jinja2", "report", "the report") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "interval": interval,
        "duration": duration,
        "p_value": p_value,
        "count": count,
    }
    return environment.get_template("report.html.jinja")


def percent(fraction: float, digits: int = 1) -> str:
    """Return 0.541 as ``54.1 %`` with a space that does not break."""
    return f"{100 * fraction:.{digits}f}\N{NO-BREAK SPACE}%"


def interval(estimate: Estimate) -> str:
    """Return the 95 % interval as ``51.0–57.2 %``."""
    return f"{100 * estimate.low:.1f}–{percent(estimate.high)}"


def count(number: float) -> str:
    """Return 11173962 as ``11,173,962``; fractions keep one digit."""
    return f"{number:,.0f}" if float(number).is_integer() or number >= 1000 else f"{number:,.1f}"


def duration(seconds: float) -> str:
    """Return seconds as ``850 ms``, ``12.3 s``, ``4 min 5 s`` or ``2 h 3 min``."""
    space = "\N{NO-BREAK SPACE}"
    if seconds < 1:
        return f"{1000 * seconds:.0f}{space}ms"
    if seconds < 60:
        return f"{seconds:.1f}{space}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{space}min{space}{rest}{space}s"
    return f"{minutes // 60:,}{space}h{space}{minutes % 60}{space}min"


def p_value(p: float) -> str:
    """Return a p-value with two digits, or ``< 0.001``."""
    return "<\N{NO-BREAK SPACE}0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _threat(record: Record) -> str:
    text = f"{_NORMS.get(record.threat.norm.lower(), record.threat.norm)} ε = {record.threat.eps_text}"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _same_images(a: Record, b: Record) -> bool:
    """Whether two records attacked the same images within the same threat."""
    return (a.data.images, a.threat.norm, a.threat.eps) == (b.data.images, b.threat.norm, b.threat.eps)


def _comparable(a: Record, b: Record) -> bool:
    """Whether two records attacked the same images within the same threat and under the same suite."""
    return _same_images(a, b) and _protocol(a) == _protocol(b)


def _protocol(record: Record) -> tuple[str, ...]:
    """Return what two evaluations must share; attacks given by hand have the suite pgd, so there each one counts."""
    by_hand = [attack.name for attack in record.attacks] if record.suite in ("pgd", "attacks") else []
    return record.suite, other_steps(record), *by_hand


def _on_survivors(record: Record) -> bool:
    """Whether each attack met what those before it left, so that its accuracy is that after all of them."""
    return record.suite not in ("pgd", "attacks", "none")


def _label(record: Record) -> str:
    """Return the suite, to stand beside a figure that is not AutoAttack's; nothing for one that is."""
    return "" if is_autoattack(record) else in_words(record)


def _under(record: Record) -> str:
    """Return the suite as a clause after ``under``, with its commas."""
    words = in_words(record)
    head = words.removesuffix(NOT)
    if head == words:
        return f"{words},"
    return f"the {head}, which is not AutoAttack," if re.search(r"\bsuite\b", head) else f"{words},"


def _context(runs: Sequence[RunResult], pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return everything the template shows."""
    records = [run.record for run in runs]
    groups: list[list[int]] = []
    for i, record in enumerate(records):
        for group in groups:
            if _comparable(records[group[0]], record):
                group.append(i)
                break
        else:
            groups.append([i])
    by_name = {run.name: run.record for run in runs}
    context = {
        "runs": [_run(i, run) for i, run in enumerate(runs)],
        "groups": groups,
        "threats_differ": any(not _same_images(records[0], record) for record in records),
        "attacks": list(
            dict.fromkeys(attack.name for record in records if not _on_survivors(record) for attack in record.attacks)
        ),
        "overview": len(runs) > 1 or not _on_survivors(records[0]),
        "suites": list(dict.fromkeys(in_words(record) for record in records)),
        "others": list(dict.fromkeys(label for record in records if (label := _label(record)))),
        "stages": _stages(runs),
        "pairs": [
            {**pair, "label": _label(by_name[pair["a"]])}
            for pair in pairs
            if _comparable(by_name[pair["a"]], by_name[pair["b"]])
        ],
        "care": [note for run in runs for note in _care(run, many=len(runs) > 1)] + _care_together(runs),
        "curves": _curves(runs),
        "training": _training(runs),
        "classes": _classes(runs),
        "galleries": _galleries(runs),
        "maps": _maps(runs),
        "created": max(record.created for record in records),
        "palette": list(zip(plots.PALETTE, plots.PALETTE_DARK, strict=True)),
    }
    present = {
        "verdict": ("Verdict", True),
        "trained": ("What was trained", True),
        "results": ("Results per attack", True),
        "checks": ("Checks of gradient masking", True),
        "epsilon": ("Robustness against ε", context["curves"]),
        "training": ("Training", context["training"]),
        "gallery": ("Gallery", context["galleries"]),
        "classes": ("Per class", context["classes"]),
        "embedding": ("Embedding map", context["maps"]),
        "cost": ("Attacks and cost", True),
        "made": ("How it was made", True),
    }
    context["sections"] = [(key, heading) for key, (heading, shown) in present.items() if shown]
    return context


def _run(index: int, run: RunResult) -> dict[str, Any]:
    style, record = plots.style(index), run.record
    method = run.config.get("method")
    configured = method.get("name", "unknown") if isinstance(method, Mapping) else method or "unknown"
    return {
        "index": index,
        "name": run.name,
        "record": record,
        "color": f"var(--p{index % len(plots.PALETTE)})",
        "marker": style.marker,
        "dash": "" if style.dash == "solid" else " ".join(str(length) for length in style.dash[1]),
        "threat": _threat(record),
        "method": record.training.method if record.training else str(configured),
        "yaml": yaml.safe_dump(_plain(run.config), sort_keys=False, allow_unicode=True) if run.config else "",
        "attacks": {} if _on_survivors(record) else {attack.name: attack for attack in record.attacks},
        "suite": in_words(record),
        "label": _label(record),
        "under": _under(record),
        "failed": [check.name for check in record.checks if not check.passed],
    }


def _plain(value: object) -> Any:
    """Return ``value`` as what YAML knows; a radius keeps how it was written."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(text := getattr(value, "text", None), str):
        return text
    if isinstance(value, np.generic):
        value = value.item()
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def _care(run: RunResult, *, many: bool) -> list[str]:
    """Return what a reader must know before believing the numbers of ``run``."""
    record, notes = run.record, []
    who = f"{run.name}: " if many else ""
    if not record.attacks:
        notes.append(f"{who}no attack was made: its robust accuracy is the clean one, and says nothing of robustness.")
    for check in record.checks:
        if not check.passed:
            notes.append(
                f"{who}the check of gradient masking “{check.name}” failed: {_first_sentence(check.explanation)}"
            )
    notes += [f"{who}{note.rstrip('.')}." for note in record.notes]
    if record.data.split != "test":
        notes.append(f"{who}measured on the {record.data.split} split, not on test images.")
    for attack in record.attacks:
        if attack.largest > record.threat.eps * (1 + 1e-4) + 1e-6:
            notes.append(
                f"{who}{attack.name} went outside the threat: its largest perturbation is {attack.largest:.5g}, "
                f"ε is {record.threat.eps:.5g}; its numbers do not count."
            )
    for a in record.curve:
        above = [b for b in record.curve if b.attack == a.attack and b.eps > a.eps and b.robust.low > a.robust.high]
        if above:
            notes.append(
                f"{who}accuracy under {a.attack} rises from {percent(a.robust.accuracy)} at ε = {a.eps_text} to "
                f"{percent(above[0].robust.accuracy)} at ε = {above[0].eps_text}; a larger ball cannot be harder to "
                "attack, so the attack fails (a sign of gradient masking)."
            )
            break
    trained = _trained(run)
    if trained and abs(trained[0] - record.threat.eps) > 1e-9 and trained[2] == record.threat.norm.lower():
        notes.append(f"{who}the training threat has ε = {trained[1]}, the evaluation ε = {record.threat.eps_text}.")
    return notes


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", text.strip(), maxsplit=1)[0].rstrip(".") + "."


def _care_together(runs: Sequence[RunResult]) -> list[str]:
    """Return why the runs of one report may not be compared with each other."""
    notes = []
    if any(not _same_images(runs[0].record, run.record) for run in runs):
        notes.append(
            "The runs were attacked on different images or within different threats; do not compare them directly."
        )
    suites = list(dict.fromkeys(in_words(run.record) for run in runs))
    if len(suites) > 1:
        notes.append(
            f"The runs were evaluated under different suites ({'; '.join(suites)}); do not compare their robust accuracies: "
            "a worst case over more or longer attacks is lower for that alone."
        )
    elif len({tuple(sorted(attack.name for attack in run.record.attacks)) for run in runs}) > 1:
        notes.append(
            "The runs were not attacked with the same attacks; a worst case over more attacks is lower for that alone."
        )
    return notes


def _trained(run: RunResult) -> tuple[float, str, str] | None:
    """Return radius, how it was written, and norm of the threat in the run's configuration."""
    threat = run.config.get("threat")
    if not isinstance(threat, Mapping):
        return None
    eps = plots.parse_eps(threat.get("eps"))
    if eps is None:
        return None
    norm = str(threat.get("norm") or threat.get("name") or run.record.threat.norm).lower()
    text = str(_plain(threat["eps"]))
    return eps, run.record.threat.eps_text if abs(eps - run.record.threat.eps) < 1e-9 else text, norm


def _stages(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return figure and rows of each run whose attacks met the survivors of those before them."""
    found = []
    for i, run in enumerate(runs):
        record = run.record
        if not _on_survivors(record):
            continue
        steps = "; ".join(
            f"after {attack.name} {percent(attack.robust.accuracy)} ({count(attack.broken)} of {count(attack.attacked)} broken)"
            for attack in record.attacks
        )
        label = (
            f"{run.name}, {in_words(record)}: {percent(record.clean.accuracy)} clean; {steps}; "
            f"worst case {percent(record.worst.accuracy)}."
        )
        svg = plots.stages(record, i, title=run.name, prefix=f"stages-{i}", label=label)
        found.append({"svg": svg, "name": run.name, "suite": in_words(record), "record": record})
    return found


def _curves(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return one plot and one table of robust accuracy against ε per norm."""
    found = []
    with_curve = [i for i, run in enumerate(runs) if run.record.curve]
    for norm in dict.fromkeys(runs[i].record.threat.norm.lower() for i in with_curve):
        indices = [i for i in with_curve if runs[i].record.threat.norm.lower() == norm]
        trained = {t[0]: t[1] for i in indices if (t := _trained(runs[i])) and t[2] == norm}
        records = [runs[i].record for i in indices]
        points = {p.eps: p.eps_text for r in records for p in r.curve}
        attacks = list(dict.fromkeys(p.attack for r in records for p in r.curve))
        rows = []
        for eps in sorted(points):
            cells = [[p for p in r.curve if p.eps == eps] for r in records]
            rows.append((points[eps], cells))
        ends = [(runs[i].name, max(runs[i].record.curve, key=lambda p: p.eps)) for i in indices]
        label = f"Robust accuracy against ε ({_NORMS.get(norm, norm)}). " + "; ".join(
            f"{name}: {percent(record.clean.accuracy)} without attack, "
            f"{percent(end.robust.accuracy)} at ε = {end.eps_text}"
            for record, (name, end) in zip(records, ends, strict=True)
        )
        svg = plots.epsilon_curve(records, trained, prefix=f"eps-{len(found)}", label=label, indices=indices)
        names = [(i, runs[i].name) for i in indices]
        labels = list(dict.fromkeys(text for record in records if (text := _label(record))))
        found.append(
            {"svg": svg, "norm": _NORMS.get(norm, norm), "names": names, "rows": rows, "attacks": attacks, "labels": labels}
        )  # fmt: skip
    return found


def _training(runs: Sequence[RunResult]) -> dict[str, Any] | None:
    """Return the training plots, all runs over one horizontal axis that every run with a history logged."""
    histories = [run.history for run in runs]
    logged = [history for history in histories if history]
    axes = [axis for axis in _X_AXES if logged and all(any(axis[0] in line for line in h) for h in logged)]
    if not axes:
        return None
    x, xlabel = axes[0]
    wanted = [("clean_accuracy", "Clean accuracy"), ("robust_accuracy", "Robust accuracy"), ("loss", "Loss")]
    found = []
    for metric, title in wanted:
        last = [
            f"{run.name} {percent(v) if metric != 'loss' else format(v, '.3g')}"
            for run in runs
            if (v := _last(run.history, metric)) is not None
        ]
        if last:
            label = f"{title} during training against {xlabel}. Last values: {'; '.join(last)}."
            svg = plots.training_curves(
                histories, metric, x=x, xlabel=xlabel, title=title, prefix=f"train-{metric}", label=label
            )
            found.append({"svg": svg, "caption": f"{title}, last: {', '.join(last)}."})
    for i, run in enumerate(runs):
        keys = dict.fromkeys(key for line in run.history if line.get("kind") == "train" for key in line)
        terms = [
            key
            for key in keys
            if key != "loss" and not any(word in key for word in _NOT_A_TERM) and _last(run.history, key) is not None
        ][:8]
        if terms:
            last = ", ".join(f"{term.replace('_', ' ')} {_last(run.history, term):.3g}" for term in terms)
            title = "Loss terms" if len(runs) == 1 else f"Loss terms of {run.name}"
            svg = plots.loss_terms(
                run.history,
                terms,
                x=x,
                xlabel=xlabel,
                title=title,
                prefix=f"terms-{i}",
                label=f"{title}. Last: {last}.",
            )
            found.append({"svg": svg, "caption": f"{title}, last: {last}."})
    return {"plots": found, "x": xlabel, "equal": x == "forward_equivalents"} if found else None


def _last(history: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Return the last value of ``key``: of validation if it was logged there, else of training."""
    for kind in ("validation", "train"):
        values = [line[key] for line in history if line.get("kind") == kind and plots.is_number(line.get(key))]
        if values:
            return float(values[-1])
    return None


def _classes(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return the bars of each run that has accuracies per class."""
    found = []
    for i, run in enumerate(runs):
        parts = run.record.per_class
        if parts:
            worst, best = (choose(parts, key=lambda part: part.robust_accuracy) for choose in (min, max))
            under = f" ({text})" if (text := _label(run.record)) else ""
            caption = (
                f"{run.name}{under}: least robust is {worst.name} ({percent(worst.robust_accuracy)} of {worst.n}), "
                f"most robust {best.name} ({percent(best.robust_accuracy)} of {best.n})."
            )
            svg = plots.class_bars(
                parts, i, title=run.name, prefix=f"class-{i}", label=f"Accuracy per class. {caption}"
            )
            found.append({"svg": svg, "caption": caption, "parts": parts, "name": run.name + under})
    return found


def _arrays(run: RunResult, *keys: str) -> list[np.ndarray] | None:
    """Return the artifacts called ``keys``; None if one is missing or empty; UserError if their lengths differ."""
    if any(key not in run.artifacts for key in keys):
        return None
    arrays = [np.asarray(run.artifacts[key]) for key in keys]
    lengths = {key: len(array) for key, array in zip(keys, arrays, strict=True)}
    if len(set(lengths.values())) > 1:
        raise UserError(f"artifacts of run {run.name!r} must have one row per image, got {lengths}; write them again")
    return arrays if len(arrays[0]) else None


def _maps(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return the planar map of each run that stored embeddings."""
    found = []
    limit = 400 if len(runs) <= 4 else 150
    for i, run in enumerate(runs):
        arrays = _arrays(run, "embedding_clean", "embedding_adv", "embedding_labels")
        if arrays is None:
            continue
        clean, adv, labels = (array[:limit] for array in arrays)
        finite = np.isfinite(clean).all(1) & np.isfinite(adv).all(1)
        clean, adv, labels = clean[finite], adv[finite], labels[finite]
        if len(clean) < 3:
            continue
        lengths = np.linalg.norm(clean, axis=1) * np.linalg.norm(adv, axis=1)
        cosine = float(np.median((clean * adv).sum(1) / np.maximum(lengths, 1e-12)))
        a, b, how = plots.project(clean, adv)
        caption = (
            f"{run.name}: {len(clean)} images in {clean.shape[1]} dimensions, drawn by {how}; the median cosine similarity "
            f"of an image with its adversarial version is {cosine:.2f}."
        )
        svg = plots.embedding_map(
            a,
            b,
            labels,
            run.record.data.classes,
            title=run.name,
            prefix=f"map-{i}",
            label=f"Embedding map. {caption}",
        )
        found.append({"svg": svg, "caption": caption, "how": how})
    return found


def _galleries(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return the images of each run that stored them, within the byte budget of the file."""
    keys = ("x", "x_adv", "labels", "probabilities", "probabilities_adv")
    stored = [(i, run, arrays) for i, run in enumerate(runs) if (arrays := _arrays(run, *keys))]
    found = []
    for i, run, (x, x_adv, labels, before, after) in stored:
        budget = GALLERY_BYTES // len(stored)
        classes = run.record.data.classes
        delta = x_adv.astype(np.float64) - x
        # One factor per run, so that perturbations can be compared; a few outliers may saturate (L2, L1).
        reach = float(np.quantile(np.abs(delta), 0.999)) or float(np.abs(delta).max())
        factor = max(1, round(0.5 / reach)) if reach > 0 else 1
        items = []
        for k in range(len(x)):
            pictures = [_png(x[k]), _png(0.5 + factor * delta[k], sharp=True), _png(x_adv[k])]
            budget -= sum(map(len, pictures))
            if budget < 0:
                break
            first, second, truth = int(before[k].argmax()), int(after[k].argmax()), int(labels[k])
            outcome = "wrong anyway" if first != truth else "held" if second == truth else "broken"
            items.append(
                {
                    "number": k + 1,
                    "pictures": pictures,
                    "truth": _class(classes, truth),
                    "before": _class(classes, first),
                    "after": _class(classes, second),
                    "p_before": float(before[k, first]),
                    "p_after": float(after[k, second]),
                    "outcome": outcome,
                }
            )
        if items:
            outcomes = {
                name: sum(item["outcome"] == name for item in items) for name in ("held", "broken", "wrong anyway")
            }
            truths = {_class(classes, int(k)) for k in np.unique(labels[: len(items)])}
            names = [name for name in classes if name in truths] + sorted(truths - set(classes))
            found.append(
                {"index": i, "name": run.name, "items": items, "factor": factor, "stored": len(x), "outcomes": outcomes,
                 "classes": names, "size": f"{x.shape[-1]} × {x.shape[-2]}", "small": max(x.shape[-2:]) <= 64}
            )  # fmt: skip
    return found


def _class(classes: Sequence[str], index: int) -> str:
    return classes[index] if 0 <= index < len(classes) else str(index)


def _png(image: np.ndarray, *, sharp: bool = False) -> str:
    """Return (C, H, W) in [0, 1] as a PNG data URI, at most 112 pixels a side; ``sharp`` shrinks by picking pixels."""
    pixels = (np.clip(np.nan_to_num(image), 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels.mean(2).round().astype(np.uint8))
    if max(picture.size) > _THUMBNAIL:
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
