"""What a user calls from Python: train, load, evaluate, compare. The command line is a thin layer over these."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from clead.attacks import ATTACKS
from clead.attacks.run import check_inputs, logits_of
from clead.checkpoint import RunDir, check_weights, load_weights, write_atomically
from clead.config import Eval, RunConfig
from clead.data.base import mixed
from clead.errors import UserError
from clead.evaluation.robust import Evaluation, NamedAttack, Subject, evaluate_model
from clead.evaluation.statistics import mcnemar
from clead.interfaces import ImageSet, Search, Splits
from clead.models.build import build_model
from clead.models.modes import attack_mode
from clead.models.seeding import seeded
from clead.models.split import SplitModel, adapt, weights
from clead.report import html
from clead.report.record import Record, TrainingPart
from clead.settings import validated
from clead.threats import THREATS
from clead.training.loop import Outcome, device_of, fit, mean_std


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
    _check_start(config)
    splits = data if data is not None else config.data.load(config.train.seed)
    own = None if model is None else adapt(model, sample_shape=_shape(splits), num_classes=len(splits.classes))
    split_model = own if own is not None else _build(config, splits)
    _dry_run(split_model, _shape(splits), config.to_dict()["model"]["name"])
    run = RunDir(path) if continuing else RunDir.create(path, config)
    with seeded(config.train.seed):  # leaves the caller's global random state as it was
        outcome = fit(config, splits, split_model, run, resume=continuing, show=show)
    write_atomically(path / "outcome.json", json.dumps(dataclasses.asdict(outcome), indent=2).encode())
    split_model.drop_projection()
    best, _ = load_weights(path / "best.safetensors")
    split_model.load_state_dict(best)
    return TrainedRun(path, split_model.eval(), outcome)


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
    images: Tensor,
    labels: Tensor,
    *,
    norm: str = "linf",
    eps: float | str = "8/255",
    classes: Sequence[str] | None = None,
    name: str = "model",
    show: bool = False,
    **settings: Any,
) -> Record:
    """Attack any classifier on the images and return the record: clean, FGSM, PGD under cross-entropy and margin, worst case.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        images: (N, C, H, W) float in [0, 1], or uint8.
        labels: (N,) int64 in [0, K).
        norm: linf, l2 or l1.
        eps: radius in pixel units of [0, 1]; text such as ``"8/255"`` is kept in the record.
        classes: K names.
        name: the model's name in the record.
        show: show progress on stderr.
        **settings: keys of the ``eval`` group, such as ``steps=50``, ``batch_size=256``, ``seed=0``.

    Raises UserError on pixels outside [0, 1], NaN, wrong labels, or an eps of the wrong scale.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> record = evaluate(net, torch.rand(8, 1, 2, 2), torch.zeros(8, dtype=torch.long), eps=0.1, steps=2)
    >>> record.robust_accuracy <= record.clean_accuracy
    True
    """
    threat = validated(THREATS.get(norm), {"eps": eps})
    options = validated(Eval, settings)
    as_bytes = isinstance(images, Tensor) and images.dtype == torch.uint8
    first = images[:1] / 255 if as_bytes else images
    check_inputs(first, labels[:1] if as_bytes else labels)
    if len(images) != len(labels):
        raise UserError(f"there must be one label per image, got {len(images)} images and {len(labels)} labels")
    if classes is None:
        first = first[:1].to(next(model.parameters(), first).device)
        classes = [str(k) for k in range(logits_of(model, first).shape[1])]
    images, labels = images.cpu(), labels.cpu()
    subject = Subject(name, type(model).__name__, "given", "given", "test", "given", tuple(classes))
    return evaluate_model(model, ImageSet(images, labels), threat, options, subject, show=show).record


def evaluate_run(
    path: str | Path,
    *,
    config: RunConfig | None = None,
    model: nn.Module | None = None,
    data: Splits | None = None,
    attacks: Sequence[NamedAttack] | None = None,
    result: str = "evaluation",
    show: bool = True,
) -> Evaluation:
    """Evaluate a run as its ``eval`` and ``threat`` settings say, and leave the record in ``RUN/results``.

    Args:
        path: a run directory.
        config: the run's configuration with changes (another eps, other data); the run's own if None.
        model: your own module with the architecture that was trained; needed if it was given as an object in Python.
        data: loaded images instead of ``config.data``.
        attacks: instead of the suite that ``config.eval`` describes.
        result: file name of the record, without ``.json``.
        show: show progress on stderr.
    """
    run = RunDir.open(Path(path))
    trained = run.config()
    config = config or trained
    loaded = _load(run, config, config.eval.weights, model)
    # The run's own seed: another one would move training images into the validation split.
    splits = data if data is not None else config.data.load(trained.train.seed)
    _, metadata = load_weights(run.path / f"{config.eval.weights}.safetensors")
    if tuple(metadata["classes"]) != splits.classes:
        raise UserError(
            f"{path} was trained on classes {', '.join(metadata['classes'])}, the data has {', '.join(splits.classes)}; "
            "give data of the same classes"
        )
    if tuple(metadata["shape"]) != _shape(splits):
        raise UserError(
            f"{path} was trained on images of shape {tuple(metadata['shape'])}, the data has {_shape(splits)}; "
            "set data.image_size and data.channels"
        )
    images = mixed(splits.test if config.eval.split == "test" else splits.val)
    if config.eval.images is not None:
        images = images.subset(torch.arange(min(config.eval.images, len(images))))
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
    evaluation = evaluate_model(
        loaded.to(device),
        images,
        config.threat,
        config.eval,
        subject,
        attacks=attacks,
        device=device,
        show=show,
    )
    folder = run.path / "results"
    write_atomically(folder / f"{result}.json", evaluation.record.model_dump_json(indent=1).encode())
    if evaluation.artifacts:
        content = {key: value.contiguous() for key, value in evaluation.artifacts.items()}
        write_atomically(folder / f"{result}.safetensors", to_safetensors(content))
    return evaluation


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

    ``rows``: method, run, n, threat, clean_accuracy, robust_accuracy with its interval, each attack's accuracy, and training
    cost. ``pairs``: McNemar's exact test for every two records of the same images under the same threat.
    """
    records = _records(sources)
    rows = [
        {
            "run": record.run,
            "method": record.training.method if record.training else record.run,
            "n": record.data.n,
            "threat": f"{record.threat.norm} {record.threat.eps_text}",
            "clean_accuracy": record.clean_accuracy,
            "robust_accuracy": record.robust_accuracy,
            "robust_low": record.worst.low,
            "robust_high": record.worst.high,
            "attacks": {part.name: part.robust.accuracy for part in record.attacks},
            "forward_equivalents": record.training.forward_equivalents if record.training else None,
        }
        for record in records
    ]
    pairs = []
    for a, b in combinations(records, 2):
        # Not by how eps was written: 8/255 and 0.03137… are one threat.
        if (a.data.images, a.threat.norm, a.threat.eps) == (b.data.images, b.threat.norm, b.threat.eps):
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
