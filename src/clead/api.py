"""What a user calls from Python: train, load, evaluate, compare. The command line is a thin layer over these."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from clead.attacks import ATTACKS
from clead.attacks.run import check_inputs, logits_of
from clead.attacks.unrestricted import Unrestricted
from clead.checkpoint import RunDir, check_weights, load_weights, save_weights, write_atomically
from clead.config import Eval, RunConfig
from clead.data.base import mixed
from clead.errors import UserError, did_you_mean
from clead.evaluation import adversarial
from clead.evaluation.corruptions import SEVERITIES, evaluate_corruptions
from clead.evaluation.detection import DETECTORS, evaluate_detection
from clead.evaluation.linear_probe import STRENGTHS, evaluate_linear_probe
from clead.evaluation.measurement import Measurement, Result, measure
from clead.evaluation.minimum_norm import evaluate_minimum_norm
from clead.evaluation.processes import Shard, folders, rank, shards
from clead.evaluation.robust import Evaluation, Subject, digest, evaluate_model
from clead.evaluation.smoothing import certify
from clead.evaluation.state import State, discard
from clead.evaluation.statistics import mcnemar
from clead.evaluation.suites import NamedAttack
from clead.evaluation.transfer import stored_test, transfer, transferred
from clead.evaluation.unrestricted import described, evaluate_unrestricted
from clead.evaluation.verdicts import exact_float32, pixels, right_images
from clead.interfaces import ImageSet, Search, Splits, Threat
from clead.methods.contrast import find_layer
from clead.models.build import build_model
from clead.models.custom import make_module
from clead.models.modes import attack_mode
from clead.models.onnx import OnnxModel
from clead.models.seeding import seeded
from clead.models.split import SplitModel, adapt, weights
from clead.report import html
from clead.report.record import Record, TrainingPart, TransferredPart
from clead.settings import validated
from clead.threats import THREATS
from clead.training.loop import Outcome, device_of, fit, mean_std
from clead.training.profile import profile_training
from clead.training.stages import fit_stages, write_outcome
from clead.training.trainable import start_from, unfrozen_afterwards

DETECT_IMAGES = 300
"""So many images are attacked by ``detect_run`` if no number is given: each is attacked once per threshold of each detector."""
PSEUDO_LABELS = "pseudo_labels.safetensors"
"""In a run directory: the pseudo-labels that it was trained with, and how many of them are right."""


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A finished training: its directory, the model with the best validation robust accuracy, and what it cost."""

    path: Path
    model: SplitModel
    outcome: Outcome


def train(
    config: RunConfig,
    *,
    model: nn.Module | None = None,
    data: Splits | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    show: bool = True,
) -> TrainedRun:
    """Train as ``config`` says and leave a run directory.

    Args:
        config: the complete configuration; ``clead.load_recipe`` makes one.
        model: your own module (pixels in [0, 1] -> logits) instead of ``config.model``; trained in place.
        data: loaded images instead of ``config.data``.
        out: the run directory, new or empty; ``runs/NAME-TIME`` if None.
        resume: continue the run in ``out`` if there is one.
        show: show progress on stderr.

    Returns:
        The run. Raises UserError for a mistake of the user, NonFiniteLoss if training diverges.
    """
    path = Path(out) if out is not None else RunDir.default_path(config.name)
    continuing = resume and (path / "config.yaml").exists()
    if continuing:
        _same_config(config, RunDir.open(path).config())
    elif path.is_file() or (path.is_dir() and any(path.iterdir())):
        RunDir.create(path, config)  # raises: there is something else
    device_of(config.train.device)
    _check_starts(config)
    splits = data if data is not None else config.data.load(config.train.seed)
    splits, pseudo_labels = _as_seen(config, splits, path, show=show)
    own = None if model is None else adapt(model, sample_shape=_shape(splits), num_classes=len(splits.classes))
    split_model = own if own is not None else _build(config, splits)
    _dry_run(split_model, _shape(splits), config.to_dict()["model"]["name"])
    for training in config.trainings():  # before anything is written
        if layer := getattr(training.method, "contrastive_layer", None):
            find_layer(split_model, layer)
    if config.train.start_from is not None:
        first = config.trainings()[0].method
        dim = first.embedding_dim if first.uses_embedding else None
        start_from(split_model, Path(config.train.start_from), dim=dim)
    run = RunDir(path) if continuing else RunDir.create(path, config)
    if pseudo_labels is not None:
        save_weights(path / PSEUDO_LABELS, *pseudo_labels)
    # Leave the caller's global random state, and what of the model is frozen, as they were.
    with seeded(config.train.seed), unfrozen_afterwards(split_model):
        if config.stages:
            outcome = fit_stages(config, splits, split_model, run, show=show)
        else:
            outcome = fit(config, splits, split_model, run, resume=continuing, show=show)
    write_outcome(path, outcome)
    split_model.drop_projection()
    best, _ = load_weights(path / "best.safetensors")
    split_model.load_state_dict(best)
    return TrainedRun(path, split_model.eval(), outcome)


def profile(config: RunConfig, *, model: nn.Module | None = None, data: Splits | None = None) -> dict[str, Any]:
    """Make a few training steps as ``config`` says, keep nothing, and return where their time went.

    See ``clead.training.profile.profile_training`` for what comes back; arguments as for ``train``.
    """
    if config.stages:
        names = ", ".join(stage.name for stage in config.stages)
        raise UserError(f"--profile looks at one training, got the stages {names}; give a recipe without stages")
    device_of(config.train.device)
    _check_start(config)
    splits = data if data is not None else config.data.load(config.train.seed)
    splits, _ = _as_seen(config, splits, None, show=False)
    own = None if model is None else adapt(model, sample_shape=_shape(splits), num_classes=len(splits.classes))
    with seeded(config.train.seed):
        return profile_training(config, splits, own if own is not None else _build(config, splits))


def load(path: str | Path, *, weights: str = "best", model: nn.Module | None = None) -> SplitModel:
    """Return the trained model of a run directory, in eval mode, without the projection head.

    Args:
        path: a run directory.
        weights: ``best`` or ``last``.
        model: your own module with the architecture that was trained; needed if it was given as an object in Python.

    Raises UserError if the weights are missing, truncated, a pickle, or of another architecture.

    >>> load("runs/nothing")
    Traceback (most recent call last):
        ...
    clead.errors.UserError: runs/nothing is not a run directory (no config.yaml in it); give a directory that clead train made
    """
    run = RunDir.open(Path(path))
    return _load(run, run.config(), weights, model)


def evaluate(
    model: nn.Module,
    images: Tensor | Iterable[tuple[Tensor, Tensor]],
    labels: Tensor | None = None,
    *,
    suite: str = "standard",
    norm: str = "linf",
    eps: float | str = "8/255",
    seed: int = 0,
    classes: Sequence[str] | None = None,
    name: str = "model",
    state: str | Path | None = None,
    show: bool = False,
    **settings: Any,
) -> Record:
    """Attack any classifier on the images and return the record: clean, each attack of the suite, worst case per image.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        images: (N, C, H, W) float in [0, 1], or uint8; or, without ``labels``, batches of both, such as a DataLoader.
        labels: (N,) int64 in [0, K).
        suite: standard (AutoAttack), plus, rand, quick, adaptive, queries or pgd.
        norm: linf, l2 or l1 (l0 with suite pgd).
        eps: radius in pixel units of [0, 1]; text such as ``"8/255"`` is kept in the record.
        seed: of the attacks' randomness.
        classes: K names.
        name: the model's name in the record.
        state: a directory; an evaluation that was stopped goes on from there, and removes it in the end.
        show: show progress on stderr.
        **settings: other keys of the ``eval`` group, such as ``batch_size=256``, ``steps=20``, ``check_images=0``.

    Returns:
        The record, with ``clean_accuracy``, ``robust_accuracy`` and ``robust``, one flag per image. Raises UserError on pixels
        outside [0, 1], NaN, wrong labels, or an eps of the wrong scale.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> record = evaluate(net, torch.rand(8, 1, 2, 2), torch.zeros(8, dtype=torch.long), suite="quick", eps=0.1)
    >>> record.robust_accuracy <= record.clean_accuracy
    True
    """
    threat = validated(THREATS.get(norm), {"eps": eps})
    options = validated(Eval, {"suite": suite, "seed": seed, **settings})
    if labels is None:
        images, labels = _collected(images)
    if not isinstance(model, nn.Module):
        raise UserError(f"model must be a torch.nn.Module, got a {type(model).__name__}; wrap it in one")
    for name_, value in (("images", images), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise UserError(f"{name_} must be a torch.Tensor, got a {type(value).__name__}; use torch.as_tensor")
    assert isinstance(images, Tensor)
    images, labels = images.detach(), labels.detach()
    if not labels.is_floating_point():
        labels = labels.long()
    if images.is_floating_point():
        check_inputs(images, labels)
        images = images.float()
    else:
        check_inputs(images[:1] / 255, labels[:1])
    if len(images) != len(labels):
        raise UserError(f"there must be one label per image, got {len(images)} images and {len(labels)} labels")
    first = pixels(images[:1])
    if classes is None:
        first = first[:1].to(next(model.parameters(), first).device)
        classes = [str(k) for k in range(logits_of(model, first).shape[1])]
    chosen = ImageSet(images.cpu(), labels.cpu())
    if options.images is not None:
        chosen = chosen.subset(torch.arange(min(options.images, len(chosen))))
    subject = Subject(name, type(model).__name__, "given", "given", options.split, "given", tuple(classes))
    where = None if state is None else Path(state)
    evaluation = evaluate_model(model, chosen, threat, options, subject, state=where, show=show)
    assert evaluation is not None
    if where is not None and rank() == 0:
        for done in folders(where):
            discard(done)
    return evaluation.record


def _collected(batches: Any) -> tuple[Tensor, Tensor]:
    """Return images and labels of a loader, on the CPU; raises UserError if it yields anything else."""
    pairs = []
    if not isinstance(batches, Tensor) and isinstance(batches, Iterable):
        for batch in batches:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(p, Tensor) for p in batch):
                raise UserError(f"batches must be pairs of images and labels, got a {type(batch).__name__}")
            pairs.append((batch[0].cpu(), batch[1].cpu()))
    if not pairs:
        raise UserError(
            f"labels are missing; give evaluate(model, images, labels) or batches of both, got {batches!r:.60}"
        )
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def evaluate_run(
    path: str | Path,
    *,
    config: RunConfig | None = None,
    model: nn.Module | None = None,
    data: Splits | None = None,
    attacks: Sequence[NamedAttack] | None = None,
    transfer_from: Sequence[str | Path] = (),
    result: str = "evaluation",
    fresh: bool = False,
    shard: str | None = None,
    merge: bool = False,
    save_adversarial: str | Path | None = None,
    show: bool = True,
) -> Evaluation:
    """Evaluate a run as its ``eval`` and ``threat`` settings say, and leave the record in ``RUN/results``.

    An evaluation that was stopped goes on where it was when it is called again.

    Args:
        path: a run directory.
        config: the run's configuration with changes (another eps, other data); the run's own if None.
        model: your own module with the architecture that was trained; needed if it was given as an object in Python.
        data: loaded images instead of ``config.data``.
        attacks: instead of the suite that ``config.eval`` names; each on all images.
        transfer_from: runs whose adversarial images are tried on this one, after the suite.
        result: file name of the record, without ``.json``.
        fresh: forget what a stopped evaluation has left.
        shard: ``"i/n"``: compute every n-th batch only, from the i-th; raises ShardDone, whose text says how to go on.
        merge: make the record of the shards.
        save_adversarial: write all adversarial images to this Parquet file.
        show: show progress on stderr.

    Returns:
        The evaluation, with all its images if ``save_adversarial`` is given.
    """
    part = Shard.parse(shard) if shard else None
    opened = _open(path, config, model, data)
    device = opened.device
    sources = _sources(transfer_from, opened.images, opened.model.num_classes, device)
    stored = None
    if attacks is None and opened.config.eval.split == "test":
        stored = stored_test(opened.run.path / "stored", opened.splits.fingerprint)
    tried = None if stored is None else transferred(opened.model, opened.images, stored, opened.config.threat, device)
    return _evaluate_into(
        opened.run.path / "results",
        result,
        opened.model,
        opened.images,
        opened.config,
        opened.subject,
        part,
        tried=tried,
        fresh=fresh,
        save_adversarial=None if save_adversarial is None else Path(save_adversarial),
        attacks=attacks,
        more=[transfer(name, other) for name, other in sources],
        source=sources[0][1] if sources else None,
        merge=merge,
        device=device,
        show=show,
    )


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
    show: bool = True,
) -> Measurement:
    """Certify a run in L2 by randomised smoothing, and leave ``RUN/results/certify.json``.

    A call that was stopped goes on where it was, as do the functions below. ``sigma``, ``n``, ``n0`` and ``alpha`` are those of
    ``clead.evaluation.smoothing.certify``; the rest is as of ``evaluate_run``.
    """
    run = _open(path, config, model, data)
    settings = {"sigma": sigma, "n": n, "n0": n0, "alpha": alpha, "batch_size": run.config.eval.batch_size or 1000}

    def work(state: State) -> Result:
        return certify(run.model, run.images, **run.common, **settings, num_classes=run.k, state=state, show=show)

    return run.measure("certify", work, settings, fresh=fresh)


def detect_run(
    path: str | Path,
    *,
    config: RunConfig | None = None,
    model: nn.Module | None = None,
    data: Splits | None = None,
    detectors: Sequence[str] = tuple(DETECTORS),
    restarts: int = 3,
    fresh: bool = False,
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
        raise UserError(f"name each detector once, at least one of {', '.join(DETECTORS)}, got {', '.join(detectors)}")
    run = _open(path, config, model, data, images=DETECT_IMAGES)
    if run.config.eval.split != "test":
        raise UserError(
            f"eval.split: the validation images set the detectors' thresholds, got {run.config.eval.split}; use test"
        )
    options = {
        "steps": run.config.eval.steps or 100,
        "restarts": restarts,
        "batch_size": run.config.eval.batch_size or 256,
    }

    def work(state: State) -> Result:
        return evaluate_detection(
            run.model,
            run.splits.train.known(),
            run.images,
            run.config.threat,
            calibration=run.splits.val,
            detectors=[DETECTORS[name]() for name in detectors],
            **run.common,
            **options,
            state=state,
            show=show,
        )

    return run.measure("detect", work, {"detectors": list(detectors), **options}, threat=run.config.threat, fresh=fresh)


def corruptions_run(
    path: str | Path,
    *,
    config: RunConfig | None = None,
    model: nn.Module | None = None,
    data: Splits | None = None,
    severities: Sequence[int] = SEVERITIES,
    names: Sequence[str] | None = None,
    fresh: bool = False,
    show: bool = True,
) -> Measurement:
    """Measure a run under common corruptions, and leave ``RUN/results/corruptions.json``.

    ``severities`` and ``names`` are those of ``clead.evaluation.corruptions.evaluate_corruptions``, the rest those of
    ``evaluate_run``.
    """
    run = _open(path, config, model, data)
    settings = {
        "severities": list(severities),
        "names": None if names is None else list(names),
        "batch_size": run.config.eval.batch_size or 256,
    }

    def work(state: State) -> Result:
        return evaluate_corruptions(run.model, run.images, **run.common, **settings, state=state, show=show)

    return run.measure("corruptions", work, settings, fresh=fresh)


def probe_run(
    path: str | Path,
    *,
    config: RunConfig | None = None,
    model: nn.Module | None = None,
    data: Splits | None = None,
    strengths: Sequence[float] = STRENGTHS,
    fresh: bool = False,
    show: bool = True,
) -> Measurement:
    """Fit a linear classifier on a run's frozen features, attack through both, and leave ``RUN/results/probe.json``.

    ``config.data`` may be of other classes than the run's, if the images have the same shape: its training images are fitted, its
    validation images choose C, its test images are measured. ``strengths`` are those of
    ``clead.evaluation.linear_probe.evaluate_linear_probe``, ``eval.steps`` is the length of PGD, 50 if not given; the rest is as of
    ``evaluate_run``.
    """
    run = _open(path, config, model, data, same_classes=False)
    if run.config.eval.split != "test":
        raise UserError(f"eval.split: the validation images choose C, got {run.config.eval.split}; use test")
    settings = {
        "steps": run.config.eval.steps or 50,
        "strengths": list(strengths),
        "batch_size": run.config.eval.batch_size or 256,
    }
    # What a classifier of other data is fitted on decides the result as much as the images that are measured.
    fitted = {"labelled": run.config.data.labelled, "label_noise": run.config.data.label_noise}

    def work(state: State) -> Result:
        return evaluate_linear_probe(
            run.model,
            run.splits.train,
            run.splits.val,
            run.images,
            run.config.threat,
            num_classes=run.k,
            **run.common,
            **settings,
            state=state,
            show=show,
        )

    return run.measure("probe", work, {**settings, **fitted}, threat=run.config.threat, fresh=fresh)


def distances_run(
    path: str | Path,
    *,
    config: RunConfig | None = None,
    model: nn.Module | None = None,
    data: Splits | None = None,
    attacks: Sequence[str] = ("fmn",),
    fresh: bool = False,
    show: bool = True,
) -> Measurement:
    """Look for the nearest adversarial image of each image, and leave ``RUN/results/distances.json``.

    The norm is that of ``config.threat``. ``attacks`` are names of attacks for the smallest perturbation, such as ``fmn`` and
    ``deepfool``; ``eval.steps`` replaces their own numbers of steps. The rest is as of ``evaluate_run``.
    """
    run = _open(path, config, model, data)
    settings = {
        "attacks": list(attacks),
        "steps": run.config.eval.steps,
        "batch_size": run.config.eval.batch_size or 256,
    }

    def work(state: State) -> Result:
        norm = run.config.threat.norm
        return evaluate_minimum_norm(
            run.model, run.images, norm, **run.common, **settings, classes=run.k, state=state, show=show
        )

    return run.measure("distances", work, settings, threat=run.config.threat, fresh=fresh)


def unrestricted_run(
    path: str | Path,
    attack: Unrestricted,
    *,
    config: RunConfig | None = None,
    model: nn.Module | None = None,
    data: Splits | None = None,
    fresh: bool = False,
    show: bool = True,
) -> Measurement:
    """Attack a run by rotations and shifts or by patches, and leave ``RUN/results/attack-NAME.json``.

    ``attack`` is such as ``clead.attacks.spatial.Spatial()``; the rest is as of ``evaluate_run``.
    """
    name, values = described(attack)
    run = _open(path, config, model, data)
    batch_size = run.config.eval.batch_size or 256
    settings = {"attack": {"name": name, **values}, "batch_size": batch_size}

    def work(state: State) -> Result:
        return evaluate_unrestricted(
            run.model, run.images, attack, **run.common, batch_size=batch_size, classes=run.k, state=state, show=show
        )

    return run.measure(f"attack-{name}", work, settings, fresh=fresh)


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A run with its model on the device, and the images that it is evaluated on."""

    run: RunDir
    config: RunConfig
    model: SplitModel
    images: ImageSet
    splits: Splits
    subject: Subject
    device: torch.device

    @property
    def k(self) -> int:
        return len(self.splits.classes)

    @property
    def common(self) -> dict[str, Any]:
        return {"seed": self.config.eval.seed, "device": self.device}

    def measure(
        self,
        kind: str,
        work: Callable[[State], Result],
        settings: dict[str, Any],
        *,
        threat: Threat | None = None,
        fresh: bool,
    ) -> Measurement:
        return measure(
            kind,
            work,
            model=self.model,
            images=self.images,
            subject=self.subject,
            settings=settings,
            seed=self.config.eval.seed,
            device=self.device,
            threat=threat,
            path=self.run.path / "results" / f"{kind}.json",
            fresh=fresh,
        )


def _open(
    path: str | Path,
    config: RunConfig | None,
    model: nn.Module | None,
    data: Splits | None,
    *,
    images: int | None = None,
    same_classes: bool = True,
) -> _Opened:
    """Load a run, its model and its images; ``images`` counts where ``config.eval`` names no number."""
    run = RunDir.open(Path(path))
    trained = run.config()
    config = config or trained
    if images is not None and config.eval.images is None:
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, images=images))
    loaded = _load(run, config, config.eval.weights, model)
    chosen, splits = _evaluated_images(run, config, trained, data, same_classes=same_classes)
    tree = config.to_dict()
    subject = Subject(
        name=run.name,
        model=tree["model"].get("factory") or tree["model"]["name"],
        weights=config.eval.weights,
        data=tree["data"]["name"],
        split=config.eval.split,
        data_fingerprint=splits.fingerprint,
        classes=splits.classes,
        training=_training(run, trained),
    )
    device = device_of(config.train.device)
    return _Opened(run, config, loaded.to(device), chosen, splits, subject, device)


def evaluate_foreign(
    model: str | nn.Module,
    config: RunConfig,
    *,
    weights: str | Path | None = None,
    out: str | Path,
    attacks: Sequence[NamedAttack] | None = None,
    transfer_from: Sequence[str | Path] = (),
    result: str = "evaluation",
    fresh: bool = False,
    shard: str | None = None,
    merge: bool = False,
    save_adversarial: str | Path | None = None,
    show: bool = True,
) -> Evaluation:
    """Evaluate a model that this program did not train, and leave the record in ``out``.

    Args:
        model: ``module:factory``, a path ending in ``.onnx``, or the module itself; pixels in [0, 1] -> logits.
        config: data, threat and eval settings; ``clead.config.bare_config`` makes one.
        weights: a safetensors file for what the factory makes; None: as it is made.
        out: directory of the record and the state.
        attacks: as of ``evaluate_run``, as all that follow.
        transfer_from: runs.
        result: file name.
        fresh: forget what was stopped.
        shard: ``"i/n"``.
        merge: of shards.
        save_adversarial: Parquet file.
        show: progress.
    """
    part = Shard.parse(shard) if shard else None
    splits = config.data.load(config.train.seed)
    name = model if isinstance(model, str) else type(model).__name__
    made = _foreign(model, weights, splits)
    images = mixed(splits.test if config.eval.split == "test" else splits.val)
    if config.eval.images is not None:
        images = images.subset(torch.arange(min(config.eval.images, len(images))))
    device = device_of(config.train.device)
    sources = _sources(transfer_from, images, len(splits.classes), device)
    subject = Subject(
        name=Path(name).stem if name.endswith(".onnx") else name.rpartition(":")[2],
        model=Path(name).name,
        weights=Path(weights).name if weights else "given",
        data=config.to_dict()["data"]["name"],
        split=config.eval.split,
        data_fingerprint=splits.fingerprint,
        classes=splits.classes,
    )
    return _evaluate_into(
        Path(out),
        result,
        made.to(device),
        images,
        config,
        subject,
        part,
        fresh=fresh,
        save_adversarial=None if save_adversarial is None else Path(save_adversarial),
        attacks=attacks,
        more=[transfer(name, other) for name, other in sources],
        source=sources[0][1] if sources else None,
        merge=merge,
        device=device,
        show=show,
    )


def verify(path: str | Path, file: str | Path, *, config: RunConfig | None = None) -> dict[str, Any]:
    """Score the adversarial images of a file, made for this run or for another, and measure them anew.

    Args:
        path: a run directory.
        file: what ``save_adversarial`` wrote.
        config: the run's configuration with changes (the data's path); the run's own if None.

    Returns:
        ``n``; ``broken``, so many the file states; ``wrong``, so many of them this run classifies wrong; ``accuracy`` on all
        images, and ``accuracy_8_bits`` on the same rounded to 8 bits, as a picture file or a camera would hold them; ``largest``
        perturbation, ``eps`` and how many are ``outside``. Raises UserError if the images are not those that the run is
        evaluated on.
    """
    run = RunDir.open(Path(path))
    trained = run.config()
    config = config or trained
    model = _load(run, config, config.eval.weights, None)
    x_adv, as_bytes, about = adversarial.load(Path(file))
    changed = dataclasses.replace(config, eval=dataclasses.replace(config.eval, images=len(x_adv)))
    images, _ = _evaluated_images(run, changed, trained, None)
    if digest(images) != about["images"]:
        raise UserError(
            f"{file} holds other images than the first {len(x_adv)} of {path}; give the same data (--data.path, --eval.split)"
        )
    threat = validated(THREATS.get(about["threat"]["norm"]), {"eps": about["threat"]["eps_text"]})
    x, labels = pixels(images.images), images.labels
    size = threat.size(x_adv - x)
    in_box = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)  # False for NaN
    with exact_float32():
        right = torch.cat([right_images(model, a, y) for a, y in zip(x_adv.split(256), labels.split(256), strict=True)])
        as_file = torch.cat(
            [right_images(model, pixels(a), y) for a, y in zip(as_bytes.split(256), labels.split(256), strict=True)]
        )
    return {
        "run": run.name,
        "n": len(labels),
        "broken": int((~about["robust"]).sum()),
        "wrong": int((~right & ~about["robust"]).sum()),
        "accuracy": right.double().mean().item(),
        "accuracy_8_bits": as_file.double().mean().item(),
        "largest": size.max().item(),
        "eps": threat.eps,
        "outside": int((~((size <= threat.eps * (1 + 1e-5) + 1e-6) & in_box)).sum()),
    }


def _sources(
    paths: Sequence[str | Path], images: ImageSet, num_classes: int, device: torch.device
) -> list[tuple[str, nn.Module]]:
    """Return names and models of the runs whose images are tried; raises UserError unless they take these images."""
    found = []
    for path in paths:
        other = load(path).to(device)
        if other.num_classes != num_classes:
            raise UserError(
                f"--transfer-from {path} has {other.num_classes} classes, the data has {num_classes}; "
                "give a run on the same classes"
            )
        logits_of(other, pixels(images.images[:1].to(device)))
        found.append((Path(path).resolve().name, other))
    return found


def _foreign(model: str | nn.Module, weights: str | Path | None, splits: Splits) -> nn.Module:
    if isinstance(model, str) and model.endswith(".onnx"):
        if weights is not None:
            raise UserError(f"--weights: an ONNX file holds its own, got {weights}; leave it out")
        return OnnxModel(model)
    made = make_module(model, len(splits.classes)) if isinstance(model, str) else model
    if weights is not None:
        content, _ = load_weights(Path(weights))
        check_weights(made.state_dict(), content, str(weights))
        made.load_state_dict(content)
    try:  # attacks on the embedding need to know where it is
        return adapt(made, sample_shape=_shape(splits)).eval()
    except UserError:
        return made.eval()


class ShardDone(Exception):
    """A shard is computed; the record is made when all are."""


def _evaluate_into(
    folder: Path,
    result: str,
    model: nn.Module,
    images: ImageSet,
    config: RunConfig,
    subject: Subject,
    shard: Shard | None,
    *,
    fresh: bool,
    save_adversarial: Path | None,
    tried: TransferredPart | None = None,
    **options: Any,
) -> Evaluation:
    """Evaluate, write the record, the pictures' tensors and the adversarial images, and only then drop the state."""
    state = folder / f"{result}.state"
    if fresh:
        discard(shard.folder(state) if shard else folders(state)[rank()])
    if save_adversarial is not None:
        adversarial.ready(save_adversarial)
    evaluation = evaluate_model(
        model,
        images,
        config.threat,
        config.eval,
        subject,
        state=state,
        shard=shard,
        keep_adversarial=save_adversarial is not None,
        **options,
    )
    if evaluation is None:
        assert shard is not None
        raise ShardDone(f"shard {shard.index}/{shard.count} is done: {shard.folder(state)}; when all are, use --merge")
    if tried is not None:
        evaluation = dataclasses.replace(evaluation, record=evaluation.record.model_copy(update={"transferred": tried}))
    if rank() > 0:
        return evaluation
    write_atomically(folder / f"{result}.json", evaluation.record.model_dump_json(indent=1).encode())
    if evaluation.artifacts:
        content = {key: value.contiguous() for key, value in evaluation.artifacts.items()}
        write_atomically(folder / f"{result}.safetensors", to_safetensors(content))
    if save_adversarial is not None:
        assert evaluation.adversarial is not None
        adversarial.save(save_adversarial, evaluation.adversarial, images.labels, evaluation.record)
    for done in [*(shards(state) if options.get("merge") else ()), state, *folders(state)]:
        discard(done)
    return evaluation


def _evaluated_images(
    run: RunDir, config: RunConfig, trained: RunConfig, data: Splits | None, *, same_classes: bool = True
) -> tuple[ImageSet, Splits]:
    """Return the images that ``config.eval`` chooses; raises UserError unless they suit the trained model."""
    # The run's own seed: another one would move training images into the validation split.
    splits = data if data is not None else config.data.load(trained.train.seed)
    _, metadata = load_weights(run.path / f"{config.eval.weights}.safetensors")
    if same_classes and tuple(metadata["classes"]) != splits.classes:
        raise UserError(
            f"{run.path} was trained on classes {', '.join(metadata['classes'])}, the data has {', '.join(splits.classes)}; "
            "give data of the same classes"
        )
    if tuple(metadata["shape"]) != _shape(splits):
        raise UserError(
            f"{run.path} was trained on images of shape {tuple(metadata['shape'])}, the data has {_shape(splits)}; "
            "set data.image_size and data.channels"
        )
    images = mixed(splits.test if config.eval.split == "test" else splits.val)
    if config.eval.images is not None:
        images = images.subset(torch.arange(min(config.eval.images, len(images))))
    return images, splits


def read_record(source: str | Path) -> Record:
    """Return the record of a run directory or of a JSON file; raises UserError if there is none or it is not one."""
    path = Path(source)
    if path.is_dir():
        RunDir.open(path)
        path = path / "results" / "evaluation.json"
        if not path.exists():
            raise UserError(f"{source} has not been evaluated; run: clead evaluate {source}")
    if not path.is_file():
        raise UserError(f"no run directory or record at {source}")
    try:
        return Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is not a record of clead evaluate: {where or 'file'}: {first['msg']}") from None


def compare(sources: Sequence[str | Path | Record]) -> dict[str, Any]:
    """Return ``{"rows": …, "pairs": …}`` of several runs or records, as plain data.

    ``rows``: method, run, n, threat, clean_accuracy, robust_accuracy with its interval, each attack's accuracy, that on images
    that the training stored, and training cost. ``pairs``: McNemar's exact test for every two records of the same images under the
    same threat and attacks.
    """
    records = _records(sources)
    rows = [
        {
            "run": record.run,
            "method": record.training.method if record.training else record.run,
            "n": record.data.n,
            "threat": f"{record.threat.norm} {record.threat.eps_text}",
            "suite": record.suite,
            "clean_accuracy": record.clean_accuracy,
            "robust_accuracy": record.robust_accuracy,
            "robust_low": record.worst.low,
            "robust_high": record.worst.high,
            "attacks": {part.name: part.robust.accuracy for part in record.attacks},
            "transferred": record.transferred.robust.accuracy if record.transferred else None,
            "forward_equivalents": record.training.forward_equivalents if record.training else None,
        }
        for record in records
    ]
    pairs = []
    for a, b in combinations(records, 2):
        # Not by how eps was written: 8/255 and 0.03137… are one threat.
        same = [
            (r.data.images, r.threat.norm, r.threat.eps, r.suite, [(part.name, part.settings) for part in r.attacks])
            for r in (a, b)
        ]
        if same[0] == same[1]:
            result = mcnemar(a.robust_flags, b.robust_flags)
            pairs.append({"a": a.run, "b": b.run, **result._asdict()})
    return {"rows": rows, "pairs": pairs}


def write_report(sources: Sequence[str | Path], path: str | Path, *, title: str = "Robustness report") -> Path:
    """Write one self-contained HTML page about runs or record files and return its path.

    A record file alone gives tables and curves; a run directory also has training curves, images and embeddings.
    """
    records = _records(sources)
    results = []
    for source, record in zip(map(Path, sources), records, strict=True):
        if source.is_dir():
            run = RunDir.open(source)
            images = source / "results" / "evaluation.safetensors"
            artifacts = {k: v.numpy() for k, v in load_weights(images)[0].items()} if images.exists() else {}
            results.append(html.RunResult(record.run, record, artifacts, run.history(), run.config().to_dict()))
        else:
            results.append(html.RunResult(record.run, record))
    return html.write_report(results, Path(path), title=title, pairs=compare(records)["pairs"])


def _records(sources: Sequence[str | Path | Record]) -> list[Record]:
    """Return the records; runs of one name are told apart by their paths."""
    records = [source if isinstance(source, Record) else read_record(source) for source in sources]
    names = [record.run for record in records]
    return [
        record
        if names.count(record.run) == 1 or isinstance(source, Record)
        else record.model_copy(update={"run": str(source)})
        for source, record in zip(sources, records, strict=True)
    ]


def _check_starts(config: RunConfig) -> None:
    """Raise UserError for every training of ``config`` that could not begin."""
    problems = []
    for training, stage in zip(config.trainings(), config.stages or (None,), strict=True):
        try:
            _check_start(training)
        except UserError as error:
            problems += [said if stage is None else f"stages.{stage.name}.{said}" for said in error.problems]
    if problems:
        raise UserError(*problems)


def _check_start(config: RunConfig) -> None:
    """Raise UserError if the inner attack has no objective, or starts where it is flat and would climb rounding errors."""
    if config.method.uses_attack and isinstance(config.attack, Search):
        usable = ", ".join(name for name, kind in ATTACKS.items() if not issubclass(kind, Search))
        raise UserError(
            f"attack.name: training needs an attack that maximises the method's objective ({usable}), got "
            f"{config.to_dict()['attack']['name']}, which searches by itself; use it with clead attack"
        )
    inner = getattr(config.method, "inner", "")
    if (
        config.method.uses_attack
        and inner in ("kl", "embedding")
        and not config.method.inner_contrastive_weight
        and getattr(config.attack, "random_start", True) is False
    ):
        raise UserError(
            f"attack.random_start: method.inner {inner} is smallest, so without slope, at the image itself, got false; "
            "set attack.random_start true, or method.inner cross_entropy"
        )


def _as_seen(
    config: RunConfig, splits: Splits, path: Path | None, *, show: bool
) -> tuple[Splits, tuple[dict[str, Tensor], dict[str, Any]] | None]:
    """Return the images with the labels that training sees, and pseudo-labels to be kept in the run, if there are any new ones.

    Those that the run in ``path`` keeps already are taken up, so that it goes on as it began whatever became of their source.
    """
    train, source = splits.train, config.data.pseudo_labels_from
    new = None
    if source is not None:
        kept = None if path is None else path / PSEUDO_LABELS
        if kept is not None and kept.exists():
            tensors, about = load_weights(kept)
        else:
            tensors, about = new = _pseudo_labels(config, splits, source)
        if tensors["labels"].shape != train.labels.shape or about["data"] != splits.fingerprint:
            raise UserError(
                f"{kept} is of other images; --resume continues on the same data: restore it, or train anew"
            )
        train = dataclasses.replace(train, pseudo_labels=tensors["labels"])
        if show:
            said = f"{about['agreement']:.1%} of {about['unlabelled']} pseudo-labels by {source} are right"
            print(f"{said} (by the hidden labels, which training does not see)", file=sys.stderr)
    return dataclasses.replace(splits, train=train), new


def _pseudo_labels(config: RunConfig, splits: Splits, source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what the model of the run ``source`` takes the training images for, and what to know of it."""
    train = splits.train
    if train.labelled is None:
        raise UserError(f"data.pseudo_labels_from: every image has a label already, got {source}; leave it out")
    try:
        run = RunDir.open(Path(source))
        trained = run.config()
        model = _load(run, trained, trained.eval.weights, None)
        _evaluated_images(run, trained, trained, splits)
    except UserError as error:
        raise UserError(*(f"data.pseudo_labels_from: {problem}" for problem in error.problems)) from None
    device = device_of(config.train.device)
    with exact_float32(), attack_mode(model.to(device)), torch.no_grad():
        parts = train.images.split(512)
        labels = torch.cat([model(pixels(part.to(device))).argmax(1).cpu() for part in parts])
    unlabelled = ~train.labelled
    about = {
        "from": run.name,
        "data": splits.fingerprint,
        "unlabelled": int(unlabelled.sum()),
        "agreement": (labels == train.labels)[unlabelled].double().mean().item(),
    }
    return {"labels": labels}, about


def _build(config: RunConfig, splits: Splits) -> SplitModel:
    mean, std = mean_std(splits)
    shape = _shape(splits)
    return build_model(
        config.model, shape[0], len(splits.classes), mean, std, seed=config.train.seed, sample_shape=shape
    )


def _dry_run(model: SplitModel, shape: tuple[int, int, int], name: str) -> None:
    """Raise UserError, before anything is written, if the model cannot take images of this shape."""
    try:
        parameter = next(model.parameters(), torch.zeros(()))
        with attack_mode(model), seeded(0), torch.no_grad():
            model(torch.zeros(2, *shape, device=parameter.device))
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"model {name} fails on images of shape {shape}: {type(error).__name__}: {reason}") from error


def _load(run: RunDir, config: RunConfig, which: str, model: nn.Module | None) -> SplitModel:
    path = run.path / f"{which}.safetensors"
    content, metadata = load_weights(path)
    if lacking := [key for key in ("shape", "classes", "mean_std") if key not in metadata]:
        raise UserError(
            f"{path} lacks {', '.join(lacking)}, which clead train writes into it; give a run's own weights"
        )
    shape, k = tuple(metadata["shape"]), len(metadata["classes"])
    if model is not None:
        built = adapt(model, sample_shape=shape, num_classes=k)
    else:
        mean, std = metadata["mean_std"]
        built = build_model(config.model, shape[0], k, mean, std, seed=0, sample_shape=shape)
    check_weights(weights(built), content, str(path))
    built.load_state_dict(content)
    return built.eval()


def _shape(splits: Splits) -> tuple[int, int, int]:
    c, h, w = splits.train.images.shape[1:]
    return c, h, w


def _same_config(given: RunConfig, stored: RunConfig) -> None:
    differences = [
        f"{key}: the run has {old!r}, got {new!r}"
        for key, old, new in _differences(stored.to_dict(), given.to_dict(), "")
        if key != "train.device"
    ]
    if differences:
        raise UserError(*(f"--resume continues the same configuration; {difference}" for difference in differences))


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: str) -> list[tuple[str, Any, Any]]:
    found = []
    for key in {**a, **b}:
        old, new = a.get(key), b.get(key)
        if key == "stages" and isinstance(old, list) and isinstance(new, list):
            old, new = ({stage["name"]: stage for stage in stages} for stages in (old, new))
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((prefix + key, old, new))
    return found


def _training(run: RunDir, config: RunConfig) -> TrainingPart | None:
    path = run.path / "outcome.json"
    if not path.exists():
        return None
    try:
        outcome = json.loads(path.read_text())
        keys = ("epochs", "steps", "seconds", "forward_equivalents")
        costs = {key: outcome[key] for key in keys}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; remove it, or repeat clead train with --resume") from None
    return TrainingPart(method=config.to_dict()["method"]["name"], seed=config.train.seed, **costs)
