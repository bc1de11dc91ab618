"""A study: trials that any number of processes run, each trial by one of them, to the end, whatever dies on the way."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.study import StudyDirection
from optuna.trial import Trial, TrialState

from clead.atomic_io import check_inside, remove_tree_inside
from clead.devices import device_of
from clead.errors import UserError
from clead.progress import progress
from clead.runs.directory import RunDir
from clead.tuning.leases import Leases, exclusive
from clead.tuning.results import Result, results, write_results
from clead.tuning.space import SearchSpec, differences, open_search, suggest
from clead.tuning.storage import JOURNAL, open_storage, reason, silence_optuna
from clead.tuning.trial import Failed, TrialPruned, run_trial

_POLL = 0.5
_MUTEX = "study"
_DEFINITION = "definition"
_TARGET = "trials"
_TRIALS_BEFORE_PRUNING = 5
_FIRST_PRUNING = 3  # of RUNGS: before, all are bad alike
_MOST_ATTEMPTS = 20  # a trial that kills its process each time would keep the study from ending

Run = Callable[[SearchSpec, Mapping[str, Any], Path, Any], dict[str, float]]


class _Lost(Exception):
    """Another process took this one for dead and has taken its trial over."""


@dataclasses.dataclass(frozen=True)
class TunedStudy:
    """A finished study.

    Attributes:
        path: its directory, with ``best.yaml``, ``trials.csv``, ``trials.json``, plots, and the trials' run directories.
        search: the recipe and its space.
        results: of every trial, in order.
        best: the one of the best score, or None if no trial came to its end.
        trials_here: how many trials this process ran.
    """

    path: Path
    search: SearchSpec
    results: tuple[Result, ...]
    best: Result | None
    trials_here: int


def tune(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    storage: str | None = None,
    study: str | None = None,
    silence: float = 60.0,
    show: bool = True,
    say: Callable[[str], None] = print,
    run: Run = run_trial,
) -> TunedStudy:
    """Search the space of a recipe's ``tune`` group, on validation images only, and write the best recipe.

    Started again with the same ``out`` (and ``storage``) it goes on, started several times at once the processes share the trials.
    It returns when the study has all its trials, those of the other processes included.

    Args:
        recipe: a shipped name or a YAML file.
        overrides: ``--group.key VALUE`` and ``--tune.key VALUE``, as on the command line.
        out: the study's directory, new, empty, or a study's; ``runs/NAME-tune-TIME`` if None.
        storage: URL of a database that all processes reach; None: a journal in ``out``.
        study: name of the study in the database; the recipe's if None.
        silence: seconds after which a process that only the database knows counts as dead when nothing was heard of it.
        show: show progress on stderr.
        say: is given one line per trial.
        run: measures one trial.

    Returns:
        The study. Raises UserError for a mistake of the user, such as a study with another space.
    """
    silence_optuna()
    search = open_search(recipe, overrides)
    device_of(search.config.train.device)
    search.trial_config({}).data.load(
        search.config.train.seed
    )  # what is wrong with the data is said before anything is made
    path = _directory(out, search.config.name, storage)
    fresh, new = not _holds_study(path), not path.exists()
    try:
        stored, leases = open_storage(path, storage, study or search.config.name, silence)
        opened = _join(stored, leases, study or search.config.name, search, asked=_names_trials(overrides))
    except UserError:
        if fresh:
            _clean(path, new)
        raise
    say(f"study: {path}")
    worker = _Worker(opened, leases, search, path, say, run)
    try:
        with progress(f"tune {search.config.name}", worker.target(), done=worker.finished(), show=show) as tick:
            worker.work(tick)
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
        raise UserError(
            f"--storage went away: {reason(error)}; nothing is lost, give the command again with --out {path}"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or path}: {error.strerror or error}; free some space, then give the command again with "
            f"--out {path}: nothing is lost"
        ) from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"stopped; the same command with --out {path} goes on where it was") from error
    trials = results(opened, search)
    best = write_results(path, search, trials)
    return TunedStudy(path, search, tuple(trials), best, worker.trials_here)


def _names_trials(overrides: Sequence[str]) -> bool:
    return any(override.split("=")[0] == "--tune.trials" for override in overrides)


def _directory(out: str | Path | None, name: str, storage: str | None) -> Path:
    path = Path(out) if out is not None else RunDir.default_path(f"{name}-tune")
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not _holds_study(path)):
        raise UserError(f"--out {path} is neither empty nor a study; give a new directory, or that of a study to go on")
    check_inside(path, "study")
    if storage is not None and (path / JOURNAL).exists():
        raise UserError(
            f"--storage: the study in {path} keeps a journal, got a database; leave it out, or give another --out"
        )
    return path


def _holds_study(path: Path) -> bool:
    """Say whether a study is kept here, or is just being made by a process that was started at the same time."""
    return (path / JOURNAL).exists() or (path / "locks").is_dir()


def _clean(path: Path, new: bool) -> None:
    """Remove what was made before a mistake was found."""
    remove_tree_inside(path / "locks")
    (path / JOURNAL).unlink(missing_ok=True)
    if new and path.exists():
        path.rmdir()


def _join(
    storage: optuna.storages.BaseStorage, leases: Leases, name: str, search: SearchSpec, *, asked: bool
) -> optuna.Study:
    """Open the study, or make it; raises UserError naming what differs from its definition."""
    definition = search.definition()
    directions = [StudyDirection.MAXIMIZE] * (2 if search.settings.pareto else 1)
    with exclusive(leases, _MUTEX):
        try:
            study = optuna.load_study(storage=storage, study_name=name, pruner=_pruner(search))
        except KeyError:
            study = optuna.create_study(storage=storage, study_name=name, directions=directions, pruner=_pruner(search))
        there = study.user_attrs.get(_DEFINITION)
        if there is None:
            study.set_user_attr(_DEFINITION, definition)
        elif problems := differences(there, definition):
            more = [f"… and {len(problems) - 8} more"] if len(problems) > 8 else []
            raise UserError(
                *(f"this study is of another search; {problem}" for problem in problems[:8]),
                *more,
                "give another --out (and --study, in a database) for a new study, or the settings that this one has",
            )
        if asked or _TARGET not in study.user_attrs:
            study.set_user_attr(_TARGET, search.settings.trials)
    return study


def _pruner(search: SearchSpec) -> optuna.pruners.BasePruner:
    if not search.prunes:
        return NopPruner()
    return MedianPruner(n_startup_trials=_TRIALS_BEFORE_PRUNING, n_warmup_steps=_FIRST_PRUNING)


class _Worker:
    """One process of a study."""

    def __init__(
        self, study: optuna.Study, leases: Leases, search: SearchSpec, path: Path, say: Callable[[str], None], run: Run
    ) -> None:
        self._study, self._leases, self._search, self._path = study, leases, search, path
        self._say, self._run = say, run
        self.trials_here = 0

    def target(self) -> int:
        """Return how many trials the study is to have; another process may have raised it."""
        return self._study.user_attrs[_TARGET]

    def finished(self) -> int:
        """Return how many trials have a result."""
        return sum(trial.state.is_finished() for trial in self._study.get_trials(deepcopy=False))

    def work(self, tick: Any) -> None:
        """Run trials until the study has all its trials and none is being run anywhere."""
        shown, waiting = self.finished(), False
        while True:
            with exclusive(self._leases, _MUTEX):
                trial = self._claim()
            if trial is not None:
                waiting = False
                try:
                    self._run_one(trial)
                finally:
                    self._leases.release(_lease(trial.number))
            elif self.finished() >= len(self._study.get_trials(deepcopy=False)) >= self.target():
                tick(max(0, self.finished() - shown))
                return
            else:
                if not waiting:
                    waiting = True
                    running = len(self._study.get_trials(deepcopy=False)) - self.finished()
                    self._say(f"waiting for {running} trial{'s' * (running > 1)} of other processes")
                time.sleep(_POLL)
            tick(max(0, self.finished() - shown))
            shown = self.finished()

    def _claim(self) -> Trial | None:
        """Return a trial that is ours now: one whose process died, or a new one; None if there is nothing to do.

        Called by one process at a time.
        """
        trials = self._study.get_trials(deepcopy=False)
        for frozen in trials:
            if frozen.state == TrialState.RUNNING and self._leases.acquire(_lease(frozen.number)):
                # Its process may have finished it and given it back after the list was read.
                if self._study.get_trials(deepcopy=False)[frozen.number].state == TrialState.RUNNING:
                    self._draw_for(frozen.number)
                    return self._begun(Trial(self._study, frozen._trial_id))
                self._leases.release(_lease(frozen.number))
        queued = [frozen.number for frozen in trials if frozen.state == TrialState.WAITING]
        if not queued and len(trials) >= self.target():
            return None
        if not trials and (start := self._search.own_values()) is not None:
            self._study.enqueue_trial(start)  # first of all the recipe as it is, which the others have to beat
        self._draw_for(min(queued, default=len(trials)))
        trial = self._study.ask()
        if not self._leases.acquire(_lease(trial.number)):  # we were silent for so long that it has been taken over
            return None
        return self._begun(trial)

    def _draw_for(self, number: int) -> None:
        # From the number alone: several processes draw different values, and a search by one process can be repeated.
        self._study.sampler = TPESampler(seed=(self._search.settings.seed * 1_000_003 + number) % 2**32)

    def _begun(self, trial: Trial) -> Trial:
        """Draw the values that the trial, whose lease is ours, does not have yet, while nobody else draws."""
        try:
            suggest(trial, self._search.distributions)
            attempts = trial.user_attrs.get("attempts", 0) + 1
            trial.set_user_attr("attempts", attempts)
            if attempts > 1:
                self._say(
                    f"trial {trial.number}: the process that ran it has ended; it goes on here (attempt {attempts})"
                )
        except BaseException:
            self._leases.release(_lease(trial.number))
            raise
        return trial

    def _run_one(self, trial: Trial) -> None:
        values = suggest(trial, self._search.distributions)
        folder = self._path / "trials" / f"{trial.number:04}"
        started = time.monotonic()
        reported = self._study.get_trials(deepcopy=False)[trial.number].intermediate_values

        def report(rung: int, score: float) -> bool:
            if not self._leases.is_held(_lease(trial.number)):
                raise _Lost
            if rung > max(reported, default=0):  # not told before the process died
                trial.report(score, rung)
            return trial.should_prune()

        state, outcome, why = TrialState.COMPLETE, None, ""
        try:
            if trial.user_attrs["attempts"] > _MOST_ATTEMPTS:
                raise Failed(f"its process died {_MOST_ATTEMPTS} times")
            try:
                self._search.trial_config(values)
            except UserError as error:  # each value alone is right, these together are not
                raise Failed(error.problems[0]) from None
            outcome = self._run(self._search, values, folder, report if self._search.prunes else None)
        except TrialPruned:
            state = TrialState.PRUNED
        except Failed as failed:
            # Not FAIL, of which the sampler learns nothing: without a value it counts as worse than every other.
            state, why = TrialState.PRUNED, str(failed)
        except _Lost:
            self._say(f"trial {trial.number}: this process was silent for too long and another one has it; left to it")
            return
        seconds = time.monotonic() - started
        self._tell(trial, state, outcome, why, seconds)

    def _tell(
        self, trial: Trial, state: TrialState, outcome: Mapping[str, float] | None, why: str, seconds: float
    ) -> None:
        if not self._leases.is_held(_lease(trial.number)):
            self._say(f"trial {trial.number}: another process has it; its result is the one that counts")
            return
        values = None
        try:
            for key, value in (outcome or {}).items():
                trial.set_user_attr(key, value)
            trial.set_user_attr("seconds", round(trial.user_attrs.get("seconds", 0) + seconds, 1))
            if why:
                trial.set_user_attr("why", why)
            if outcome is not None:
                score = self._search.score(outcome["clean"], outcome["robust"])
                values = [outcome["robust"], outcome["clean"]] if self._search.settings.pareto else [score]
            self._study.tell(trial, values, state=state)
        except UpdateFinishedTrialError:
            return
        self.trials_here += 1
        trials = results(self._study, self._search)
        write_results(self._path, self._search, trials, plots=False)
        self._say(_line(trials[trial.number], trials))


def _lease(number: int) -> str:
    return f"trial-{number:04}"


def _line(result: Result, trials: Sequence[Result]) -> str:
    """Return one trial in one line, and the best so far."""
    values = ", ".join(f"{key.removeprefix('method.')} {_short(value)}" for key, value in result.values.items())
    how = result.summary()
    complete = [other for other in trials if other.score is not None]
    best = max(complete, key=lambda other: other.score or 0, default=None)
    so_far = f"; best {best.score:.4f} by trial {best.number}" if best is not None else ""
    return f"trial {result.number}: {how} ({values}), {result.seconds:.0f} s{so_far}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
