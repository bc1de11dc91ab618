"""Other measurements of runs: certified radii, detection, corruptions, linear probe, distances, attacks without a norm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from clead.api.opened import open_run
from clead.attacks.unrestricted import Unrestricted
from clead.config import RunConfig
from clead.errors import UserError, did_you_mean
from clead.evaluation.corruptions import SEVERITIES, evaluate_corruptions
from clead.evaluation.detection import DETECTORS, evaluate_detection
from clead.evaluation.linear_probe import STRENGTHS, evaluate_linear_probe
from clead.evaluation.measurement import Measurement, Result
from clead.evaluation.minimum_norm import evaluate_minimum_norm
from clead.evaluation.smoothing import certify
from clead.evaluation.state import ResumableResults
from clead.evaluation.unrestricted import described, evaluate_unrestricted
from clead.interfaces import Splits

DETECT_IMAGES = 300
"""So many images are attacked by ``detect_run`` if no number is given: each is attacked once per threshold of each detector."""


def certify_run(
    path: str | Path,
    *,
    config: RunConfig | None = None,
    model: nn.Module | None = None,
    data: Splits | None = None,
    sigma: float = 0.25,
    n: int = 10_000,
    n0: int = 100,
    alpha: float = 0.001,
    fresh: bool = False,
    trust_state: bool = False,
    out: str | Path | None = None,
    show: bool = True,
) -> Measurement:
    """Certify a run in L2 by randomised smoothing, and leave ``RUN/results/certify.json``.

    A call that was stopped goes on where it was, as do the functions below. ``out`` is a folder for the file instead.
    ``sigma``, ``n``, ``n0`` and ``alpha`` are those of ``clead.evaluation.smoothing.certify``; the rest is as of ``evaluate_run``.
    """
    run = open_run(path, config, model, data)
    settings = {"sigma": sigma, "n": n, "n0": n0, "alpha": alpha, "batch_size": run.config.eval.batch_size or 1000}

    def work(state: ResumableResults) -> Result:
        return certify(
            run.model, run.images, **run.common, **settings, num_classes=run.num_classes, state=state, show=show
        )

    return run.measure("certify", work, settings, fresh=fresh, trust_state=trust_state, out=out)


def detect_run(
    path: str | Path,
    *,
    config: RunConfig | None = None,
    model: nn.Module | None = None,
    data: Splits | None = None,
    detectors: Sequence[str] = tuple(DETECTORS),
    restarts: int = 3,
    fresh: bool = False,
    trust_state: bool = False,
    out: str | Path | None = None,
    show: bool = True,
) -> Measurement:
    """Measure detectors of adversarial images on a run, and leave ``RUN/results/detect.json``.

    They are fitted on the training images that have a label, their thresholds set on the validation images, both clean;
    ``eval.images`` of the test images, 300 if it is not given, are attacked in ``eval.steps`` steps, 100 if not given.

    ``detectors`` are names of ``clead.evaluation.detection.DETECTORS``, ``restarts`` those of the attack that knows the detector;
    the rest is as of ``evaluate_run``.
    """
    for name in detectors:
        if name not in DETECTORS:
            raise UserError(f"unknown detector {name!r}; {did_you_mean(name, DETECTORS)}")
    if not detectors or len(set(detectors)) < len(detectors):
        raise UserError(
            f"name each detector once, at least one of {', '.join(DETECTORS)}, got {', '.join(detectors) or 'none'}; "
            "take out the repeated"
        )
    run = open_run(path, config, model, data, images=DETECT_IMAGES)
    if run.config.eval.split != "test":
        raise UserError(
            f"eval.split: the validation images set the detectors' thresholds, got {run.config.eval.split}; use test"
        )
    options = {
        "steps": run.config.eval.steps or 100,
        "restarts": restarts,
        "batch_size": run.config.eval.batch_size or 256,
    }

    def work(state: ResumableResults) -> Result:
        return evaluate_detection(
            run.model,
            run.splits.train.labelled_subset(),
            run.images,
            run.config.threat,
            calibration=run.splits.val,
            detectors=[DETECTORS[name]() for name in detectors],
            **run.common,
            **options,
            state=state,
            show=show,
        )

    return run.measure(
        "detect",
        work,
        {"detectors": list(detectors), **options},
        threat=run.config.threat,
        fresh=fresh,
        trust_state=trust_state,
        out=out,
    )


def corruptions_run(
    path: str | Path,
    *,
    config: RunConfig | None = None,
    model: nn.Module | None = None,
    data: Splits | None = None,
    severities: Sequence[int] = SEVERITIES,
    names: Sequence[str] | None = None,
    fresh: bool = False,
    trust_state: bool = False,
    out: str | Path | None = None,
    show: bool = True,
) -> Measurement:
    """Measure a run under common corruptions, and leave ``RUN/results/corruptions.json``.

    ``severities`` and ``names`` are those of ``clead.evaluation.corruptions.evaluate_corruptions``, the rest those of
    ``evaluate_run``.
    """
    run = open_run(path, config, model, data)
    settings = {
        "severities": list(severities),
        "names": None if names is None else list(names),
        "batch_size": run.config.eval.batch_size or 256,
    }

    def work(state: ResumableResults) -> Result:
        return evaluate_corruptions(run.model, run.images, **run.common, **settings, state=state, show=show)

    return run.measure("corruptions", work, settings, fresh=fresh, trust_state=trust_state, out=out)


def probe_run(
    path: str | Path,
    *,
    config: RunConfig | None = None,
    model: nn.Module | None = None,
    data: Splits | None = None,
    strengths: Sequence[float] = STRENGTHS,
    fresh: bool = False,
    trust_state: bool = False,
    out: str | Path | None = None,
    show: bool = True,
) -> Measurement:
    """Fit a linear classifier on a run's frozen features, attack through both, and leave ``RUN/results/probe.json``.

    ``config.data`` may be of other classes than the run's, if the images have the same shape: its training images are fitted, its
    validation images choose C, its test images are measured. ``strengths`` are those of
    ``clead.evaluation.linear_probe.evaluate_linear_probe``, ``eval.steps`` is the length of PGD, 50 if not given; the rest is as of
    ``evaluate_run``.
    """
    run = open_run(path, config, model, data, same_classes=False)
    if run.config.eval.split != "test":
        raise UserError(f"eval.split: the validation images choose C, got {run.config.eval.split}; use test")
    settings = {
        "steps": run.config.eval.steps or 50,
        "strengths": list(strengths),
        "batch_size": run.config.eval.batch_size or 256,
    }
    # What a classifier of other data is fitted on decides the result as much as the images that are measured.
    fitted = {"labelled": run.config.data.labelled, "label_noise": run.config.data.label_noise}

    def work(state: ResumableResults) -> Result:
        return evaluate_linear_probe(
            run.model,
            run.splits.train,
            run.splits.val,
            run.images,
            run.config.threat,
            num_classes=run.num_classes,
            **run.common,
            **settings,
            state=state,
            show=show,
        )

    return run.measure(
        "probe", work, {**settings, **fitted}, threat=run.config.threat, fresh=fresh, trust_state=trust_state, out=out
    )


def distances_run(
    path: str | Path,
    *,
    config: RunConfig | None = None,
    model: nn.Module | None = None,
    data: Splits | None = None,
    attacks: Sequence[str] = ("fmn",),
    fresh: bool = False,
    trust_state: bool = False,
    out: str | Path | None = None,
    show: bool = True,
) -> Measurement:
    """Look for the nearest adversarial image of each image, and leave ``RUN/results/distances.json``.

    The norm is that of ``config.threat``. ``attacks`` are names of attacks for the smallest perturbation, such as ``fmn`` and
    ``deepfool``; ``eval.steps`` replaces their own numbers of steps. The rest is as of ``evaluate_run``.
    """
    run = open_run(path, config, model, data)
    settings = {
        "attacks": list(attacks),
        "steps": run.config.eval.steps,
        "batch_size": run.config.eval.batch_size or 256,
    }

    def work(state: ResumableResults) -> Result:
        norm = run.config.threat.norm
        return evaluate_minimum_norm(
            run.model, run.images, norm, **run.common, **settings, classes=run.num_classes, state=state, show=show
        )

    return run.measure(
        "distances", work, settings, threat=run.config.threat, fresh=fresh, trust_state=trust_state, out=out
    )


def unrestricted_run(
    path: str | Path,
    attack: Unrestricted,
    *,
    config: RunConfig | None = None,
    model: nn.Module | None = None,
    data: Splits | None = None,
    fresh: bool = False,
    trust_state: bool = False,
    out: str | Path | None = None,
    show: bool = True,
) -> Measurement:
    """Attack a run by rotations and shifts or by patches, and leave ``RUN/results/attack-NAME.json``.

    ``attack`` is such as ``clead.attacks.spatial.Spatial()``; the rest is as of ``evaluate_run``.
    """
    name, values = described(attack)
    run = open_run(path, config, model, data)
    batch_size = run.config.eval.batch_size or 256
    settings = {"attack": {"name": name, **values}, "batch_size": batch_size}

    def work(state: ResumableResults) -> Result:
        return evaluate_unrestricted(
            run.model,
            run.images,
            attack,
            **run.common,
            batch_size=batch_size,
            classes=run.num_classes,
            state=state,
            show=show,
        )

    return run.measure(f"attack-{name}", work, settings, fresh=fresh, trust_state=trust_state, out=out)
