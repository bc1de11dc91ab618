"""What a study leaves: the best recipe, its trials as a table, and plots."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from clead.atomic_io import write_atomically
from clead.config import TUNE, dump_yaml
from clead.errors import printable
from clead.output import csv_text
from clead.results.figure import PALETTE, Drawing, draw, head, new_axes
from clead.tuning.space import SearchSpec

_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
_SIZE = 520, 280  # points


@dataclasses.dataclass(frozen=True)
class Result:
    """One trial.

    Attributes:
        number: from 0 on.
        state: complete, pruned, failed, running or waiting.
        values: of the space's keys.
        score: (1 − w)·robust + w·clean on validation images, None unless complete.
        robust: robust accuracy in [0, 1].
        clean: clean accuracy in [0, 1].
        images: validation images of one seed.
        seconds: what its attempts that came to an end took.
        attempts: how often it was begun or taken up.
        why: what made it fail.
    """

    number: int
    state: str
    values: Mapping[str, Any]
    score: float | None
    robust: float | None
    clean: float | None
    images: int | None
    seconds: float
    attempts: int
    why: str

    def summary(self) -> str:
        """Return its accuracies in words, or what became of it."""
        if self.score is None:
            return f"{self.state}{f', {self.why}' if self.why else ''}"
        return f"robust {self.robust:.1%}, clean {self.clean:.1%}, score {self.score:.4f}"


def results(study: optuna.Study, search: SearchSpec) -> list[Result]:
    """Return every trial of a study, in order."""
    return [_result(frozen, search) for frozen in study.get_trials(deepcopy=False)]


def _result(frozen: FrozenTrial, search: SearchSpec) -> Result:
    attributes = frozen.user_attrs
    complete = frozen.state == TrialState.COMPLETE
    clean, robust = (attributes.get("clean"), attributes.get("robust")) if complete else (None, None)
    score = search.score(clean, robust) if clean is not None and robust is not None else None
    return Result(
        number=frozen.number,
        state="failed" if attributes.get("why") else _STATES[frozen.state],
        values={key: frozen.params[key] for key in search.distributions if key in frozen.params},
        score=score,
        robust=robust,
        clean=clean,
        images=attributes.get("images"),
        seconds=attributes.get("seconds", 0.0),
        attempts=attributes.get("attempts", 0),
        why=attributes.get("why", ""),
    )


def front(results: Sequence[Result]) -> list[Result]:
    """Return the trials that no other one surpasses in both accuracies, by robust accuracy; of equal ones the first."""
    best: list[Result] = []
    complete = [result for result in results if result.score is not None]
    for result in sorted(complete, key=lambda r: (-(r.robust or 0), -(r.clean or 0), r.number)):
        if not best or (result.clean or 0) > (best[-1].clean or 0):
            best.append(result)
    return best


def best_of(results: Sequence[Result]) -> Result | None:
    """Return the trial of the best score, of equal ones the first; None if none is complete."""
    complete = [result for result in results if result.score is not None]
    return max(complete, key=lambda result: (result.score or 0, -result.number), default=None)


def write_results(path: Path, search: SearchSpec, results: Sequence[Result], *, plots: bool = True) -> Result | None:
    """Write best.yaml, trials.csv, trials.json and plots into the study's directory, each whole; return the best trial."""
    best = best_of(results)
    rows = [dataclasses.asdict(result) for result in results]
    content = {"search": search.definition(), "best": best.number if best else None, "trials": rows}
    write_atomically(path / "trials.json", (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomically(path / "trials.csv", _csv(search, results).encode())
    if best is None:
        return None
    write_atomically(path / "best.yaml", _recipe(search, best).encode())
    if search.settings.pareto:
        for result in front(results):
            write_atomically(path / "front" / f"trial-{result.number:04}.yaml", _recipe(search, result).encode())
    if plots:
        for plot in _plots(search, results, best):
            for suffix, content in plot.pictures().items():
                write_atomically(path / f"{plot.name}{suffix}", content)
    return best


def _csv(search: SearchSpec, results: Sequence[Result]) -> str:
    keys = list(search.distributions)
    columns = ("number", "state", "score", "robust", "clean", "images", "seconds", "attempts", "why")
    rows = [
        [*(getattr(result, column) for column in columns), *(result.values.get(key) for key in keys)]
        for result in results
    ]
    return csv_text([[*columns, *keys], *rows])


def _recipe(search: SearchSpec, best: Result) -> str:
    """Return a complete recipe that clead train and clead tune take."""
    tree = {**search.found_config(best.values).to_dict(), TUNE: search.group()}
    seeds = search.settings.seeds
    lines = [
        f"# trial {best.number} of a search of {search.config.name} (clead tune), chosen on validation images; the test set was "
        "not looked at",
        f"# validation: robust {best.robust:.2%} ({search.settings.suite} suite), clean {best.clean:.2%}, {best.images} images, "
        f"{seeds} seed{'s' * (seeds > 1)}; the best of many is less good than it looks",
        *(f"# found: {key} {printable(str(value))}" for key, value in best.values.items()),
        *(f"# trials alone: {key} {printable(str(value))}" for key, value in search.settings.during.items()),
    ]
    return "\n".join(lines) + "\n" + dump_yaml(tree)


# ------------------------------------------------------------------------------------------------ plots


def _plots(search: SearchSpec, results: Sequence[Result], best: Result) -> list[Drawing]:
    shares = importances(search, results)
    return [_history(results), _front(results, best), *([_importance(shares, results)] if len(shares) > 1 else [])]


def importances(search: SearchSpec, results: Sequence[Result]) -> dict[str, float]:
    """Return each key's share of what decides whether a trial is among the best, by Optuna's PED-ANOVA, largest first.

    Of complete trials alone; empty if there are too few, or if all have the same score.
    """
    complete = [result for result in results if result.score is not None]
    if len({result.score for result in complete}) < 2 or len(complete) < 4:
        return {}
    study = optuna.create_study(direction="maximize")
    for result in complete:
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(result.values), distributions=search.distributions, value=result.score
            )
        )
    return optuna.importance.get_param_importances(study)


def _drawing(name: str, title: str, xlabel: str, ylabel: str, figure: Any, axes: Any) -> Drawing:
    head(axes, title, xlabel)
    axes.set_ylabel(ylabel)
    return draw(figure, name, title, (), ())


def _history(results: Sequence[Result]) -> Drawing:
    complete = [result for result in results if result.score is not None]
    figure, axes = new_axes(*_SIZE)
    axes.plot([r.number for r in complete], [r.score for r in complete], "o", color=PALETTE[0], label="complete")
    so_far = [max((o.score or 0) for o in complete if o.number <= r.number) for r in complete]
    axes.step([r.number for r in complete], so_far, where="post", color=PALETTE[1], label="best so far")
    low = min(r.score or 0 for r in complete)
    for state, marker in (("pruned", "x"), ("failed", "v")):
        numbers = [r.number for r in results if r.state == state]
        if numbers:
            axes.plot(numbers, [low] * len(numbers), marker, color="#6b6f76", label=f"{state} (no score)")
    axes.legend(frameon=False, fontsize=9)
    return _drawing("history", "Scores of the trials on validation images", "trial", "score", figure, axes)


def _front(results: Sequence[Result], best: Result) -> Drawing:
    complete = [result for result in results if result.score is not None]
    figure, axes = new_axes(*_SIZE)
    axes.plot([r.clean for r in complete], [r.robust for r in complete], "o", color=PALETTE[0], label="trial")
    line = front(results)
    axes.step([r.clean for r in line], [r.robust for r in line], where="pre", color=PALETTE[1], label="front")
    axes.plot([best.clean], [best.robust], "s", markersize=9, mfc="none", color=PALETTE[2], label="best score")
    for result in line:
        axes.annotate(str(result.number), (result.clean, result.robust), textcoords="offset points", xytext=(5, 4))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    axes.legend(frameon=False, fontsize=9)
    title = "Robust against clean accuracy, validation images"
    return _drawing("front", title, "clean accuracy", "robust accuracy", figure, axes)


def _importance(shares: Mapping[str, float], results: Sequence[Result]) -> Drawing:
    count = sum(result.score is not None for result in results)
    figure, axes = new_axes(*_SIZE)
    names = list(shares)[::-1]
    axes.barh(names, [shares[name] for name in names], color=PALETTE[0])
    title = f"What decides the score (PED-ANOVA, {count} complete trials)"
    return _drawing("importance", title, "share", "", figure, axes)
