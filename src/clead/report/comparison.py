"""What may be compared with what, and what a reader must know before believing the numbers."""

from __future__ import annotations

from collections.abc import Sequence

from clead.evaluation.suites import in_words, other_steps
from clead.report.run import RunResult
from clead.results.format import balanced_sentence, first_sentence, percent
from clead.results.record import Record


def same_images(a: Record, b: Record) -> bool:
    """Whether two records attacked the same images within the same threat."""
    return (a.data.images, a.threat.norm, a.threat.eps) == (b.data.images, b.threat.norm, b.threat.eps)


def comparable(a: Record, b: Record) -> bool:
    """Whether two records attacked the same images within the same threat and under the same suite."""
    return same_images(a, b) and protocol(a) == protocol(b)


def protocol(record: Record) -> tuple[str, ...]:
    """Return what two evaluations must share; attacks given by hand have the suite pgd, so there each one counts."""
    by_hand = [attack.name for attack in record.attacks] if record.suite in ("pgd", "attacks") else []
    return record.suite, other_steps(record), *by_hand


def on_survivors(record: Record) -> bool:
    """Whether each attack met what those before it left, so that its accuracy is that after all of them."""
    return record.suite not in ("pgd", "attacks", "none", "sea", "sea-quick")


def caveats(run: RunResult, *, many: bool) -> list[str]:
    """Return what a reader must know before believing the numbers of ``run``."""
    record, notes = run.record, []
    name = f"{run.name}: " if many else ""
    if not record.attacks:
        notes.append(f"{name}no attack was made: its robust accuracy is the clean one, and says nothing of robustness.")
    for check in record.checks:
        if not check.passed:
            notes.append(
                f"{name}the check of gradient masking “{check.name}” failed: {first_sentence(check.explanation)}"
            )
    notes += [f"{name}{note.rstrip('.')}." for note in [*filter(None, [balanced_sentence(record)]), *record.notes]]
    notes += [f"{name}training: {line['message']}." for line in run.history if line.get("kind") == "warning"]
    if record.data.split != "test":
        notes.append(f"{name}measured on the {record.data.split} split, not on test images.")
    for attack in record.attacks:
        if attack.max_distance > record.threat.eps * (1 + 1e-4) + 1e-6:
            notes.append(
                f"{name}{attack.name} went outside the threat: its largest perturbation is {attack.max_distance:.5g}, "
                f"ε is {record.threat.eps:.5g}; its numbers do not count."
            )
    for a in record.curve:
        above = [b for b in record.curve if b.attack == a.attack and b.eps > a.eps and b.robust.low > a.robust.high]
        if above:
            notes.append(
                f"{name}accuracy under {a.attack} rises from {percent(a.robust.accuracy)} at ε = {a.eps_text} to "
                f"{percent(above[0].robust.accuracy)} at ε = {above[0].eps_text}; a larger ball cannot be harder to "
                "attack, so the attack fails (a sign of gradient masking)."
            )
            break
    trained = run.trained_radius()
    if trained and abs(trained[0] - record.threat.eps) > 1e-9 and trained[2] == record.threat.norm.lower():
        notes.append(f"{name}the training threat has ε = {trained[1]}, the evaluation ε = {record.threat.eps_text}.")
    for kind in run.stale:
        notes.append(
            f"{name}results/{kind}.json was measured on other weights than this evaluation, so it is left out; measure again."
        )
    return notes


def caveats_together(runs: Sequence[RunResult]) -> list[str]:
    """Return why the runs of one report may not be compared with each other."""
    notes = []
    if any(not same_images(runs[0].record, run.record) for run in runs):
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
