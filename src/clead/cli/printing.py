"""Records and comparisons as tables and sentences in the terminal."""

from __future__ import annotations

from typing import Any


def print_record(record: Any) -> None:
    """Print accuracies, intervals, notes and failed checks."""
    from rich.table import Table

    from clead.output import console
    from clead.results.statistics import unbalanced

    threat = f"{record.threat.norm} {record.threat.eps_text}"
    table = Table(title=f"{record.run}: {record.data.n} {record.data.split} images, {threat}")
    for column in ("attack", "accuracy", "95 % interval", "seconds"):
        table.add_column(column, justify="left" if column == "attack" else "right")
    table.add_row("none (clean)", *_shown(record.clean), "")
    targeted = [attack for attack in record.attacks if "target" in attack.settings]
    for attack in record.attacks:
        label = f"{attack.name}: right when clean, and not taken for it" if attack in targeted else attack.name
        table.add_row(label, *_shown(attack.robust), f"{attack.seconds:.1f}")
    if record.transferred is not None:
        table.add_row(record.transferred.name, *_shown(record.transferred.robust), "")
    if not targeted:
        table.add_row("worst case per image", *_shown(record.worst), f"{record.seconds:.1f}", style="bold")
    if not targeted and (mean := unbalanced(record)) is not None:
        table.add_row("mean over classes (clean)", *_shown(mean.clean), "")
        table.add_row("mean over classes (worst case)", *_shown(mean.robust), "")
    console().print(table)
    if record.metrics:
        console().print(_metrics(record))
    print(about(record))
    for note in record.notes:
        print(f"note: {note}")
    for check in record.checks:
        if not check.passed:
            print(f"check {check.name} failed: {check.explanation}")


def _metrics(record: Any) -> Any:
    """Return the table of a task's own figures."""
    from rich.table import Table

    table = Table(title=f"{record.task}: its own figures")
    for column in ("figure", "clean", "worst case", "cases"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for metric in record.metrics:
        shown = ("–" if value is None else f"{value:.2%}" for value in (metric.clean, metric.robust))
        table.add_row(metric.name, *shown, str(metric.n))
    return table


def about(record: Any) -> str:
    """Return what the figures of a record or measurement are about: images, weights, classes, and what was left out."""
    data, model = record.data, record.model
    names = data.classes if len(data.classes) <= 10 else [*data.classes[:9], "…", data.classes[-1]]
    left_out = f"; {len(data.skipped)} files of the data not read" if data.skipped else ""
    return (
        f"about: {data.which}; {len(data.classes)} classes: {', '.join(names)}; weights {model.weights} of {model.name} "
        f"(fingerprint {model.fingerprint[:8]}){left_out}"
    )


def verdict(record: Any) -> str:
    """Return the sentence that a person can quote."""
    from clead.evaluation.suites import in_words
    from clead.results.format import balanced_sentence

    worst, threat, pixels = record.worst, record.threat, "" if record.masks is None else "the pixels of "
    failed = [check.name for check in record.checks if not check.passed]
    text = (
        f"{record.run}: {worst.accuracy:.1%} of {pixels}{worst.n} {record.data.split} images (95 % interval {worst.low:.1%} – "
        f"{worst.high:.1%}) withstand {threat.norm} {threat.eps_text} under {in_words(record)}; "
        f"{record.clean.accuracy:.1%} are right when clean."
    )
    if (stored := record.transferred) is not None:
        text += (
            f"\nThe {stored.robust.accuracy:.1%} on stored images is not robustness: those were made for another model, which "
            f"{stored.fooled:.1%} of them fool, before this one was trained; an attacker makes them for this one."
        )
    pairs = [metric for metric in record.metrics if None not in (metric.clean, metric.robust)]
    if pairs:
        text += f"\n{record.task}, clean and in the worst case: " + ", ".join(
            f"{metric.name} {metric.clean:.1%} and {metric.robust:.1%}" for metric in pairs[:6]
        )
        text += f", and {len(pairs) - 6} more." if len(pairs) > 6 else "."
    if sentence := balanced_sentence(record):
        text += f"\n{sentence[:1].upper()}{sentence[1:]}."
    if record.data.caveat:
        text += f"\nThese are the {record.data.which}."
    if failed:
        text += f"\nDo not trust it yet: checks of gradient masking failed: {', '.join(failed)}."
    return text


def _shown(estimate: Any) -> tuple[str, str]:
    return f"{estimate.accuracy:.2%}", f"{estimate.low:.1%} – {estimate.high:.1%}"


def print_comparison(comparison: dict[str, Any]) -> None:
    """Print runs beside each other, and the tests between them."""
    from rich.table import Table

    from clead.output import console

    def shown(value: float | None) -> str:
        return "not known" if value is None else f"{value:.1%}"

    rows = comparison["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["attacks"]))
    threats = sorted({row["threat"] for row in rows})
    what = "Right pixels" if {row["task"] for row in rows} == {"segmentation"} else "Accuracy"
    table = Table(title=f"{what} on {', '.join(sorted({str(row['n']) for row in rows}))} images, {', '.join(threats)}")
    stored = ["stored (transferred)"] if any(row["transferred"] is not None for row in rows) else []
    for column in ("run", "clean", *names, *stored, "worst case", "95 % interval", "compute"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for row in rows:
        cells = [f"{row['attacks'][name]:.1%}" if name in row["attacks"] else "–" for name in names]
        cells += [f"{row['transferred']:.1%}" if row["transferred"] is not None else "–" for _ in stored]
        compute = f"{row['forward_equivalents']:.0f}" if row["forward_equivalents"] else "–"
        interval = f"{row['robust_low']:.1%} – {row['robust_high']:.1%}"
        table.add_row(
            row["run"], f"{row['clean_accuracy']:.1%}", *cells, f"{row['robust_accuracy']:.1%}", interval, compute
        )
    console(width=100).print(table)
    for which in dict.fromkeys(row["images"] for row in rows):
        names = ", ".join(row["run"] for row in rows if row["images"] == which)
        print(f"{names}: {which}")
    for row in rows:
        for name, (clean, robust) in row["metrics"].items():
            print(f"{row['run']}, {row['task']}: {name} {shown(clean)} clean, {shown(robust)} in the worst case")
        if row["unbalanced"]:
            clean, robust = (f"{row[key]:.1%}" for key in ("balanced_clean", "balanced_robust"))
            print(
                f"{row['run']}, mean over classes, which have unequal numbers of images: clean {clean}, worst case {robust}"
            )
    print(
        "compute: forward-equivalents per training image. Robust accuracy is an upper bound: a stronger attack can only lower it."
    )
    for pair in comparison["masks"]:
        metric = {"pixel_accuracy": "right pixels", "mean_iou": "mIoU"}[pair["metric"]]
        print(
            f"{pair['a']} less {pair['b']}, worst case, {metric}: {100 * pair['difference']:+.1f} points "
            f"(95 % interval {100 * pair['low']:+.1f} – {100 * pair['high']:+.1f}, over images; p = {pair['p_value']:.2g})"
        )
    if len(rows) > 1 and not comparison["pairs"] and not comparison["masks"]:
        print("not tested against each other: these are not records of the same images, threat and attacks")
    for pair in comparison["pairs"]:
        print(
            f"{pair['a']} against {pair['b']}: {pair['only_a']} images held only by the first, "
            f"{pair['only_b']} only by the second, McNemar exact p = {pair['p_value']:.2g}"
        )
