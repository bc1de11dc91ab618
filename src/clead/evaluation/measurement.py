"""What is measured besides robustness in a norm ball: one JSON file each, whole or not there, continued after a kill."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from clead.checkpoint import command, environment, fingerprint, write_atomically
from clead.errors import memory_of
from clead.evaluation.attack_accuracy import AttackedResult
from clead.evaluation.corruptions import CorruptionResult
from clead.evaluation.detection import Detection
from clead.evaluation.evaluator import EvaluationTarget
from clead.evaluation.minimum_norm import MinimumNormResult
from clead.evaluation.smoothing import Certificates
from clead.evaluation.state import ResumableResults, discard
from clead.interfaces import ImageSet, Threat
from clead.models.split import weights
from clead.results.record import DataPart, ModelPart, ThreatPart
from clead.settings import Ratio

SCHEMA_VERSION = 1
Result = Certificates | Detection | CorruptionResult | MinimumNormResult | AttackedResult


class Measurement(BaseModel):
    """A result with what it must carry to be believed and obtained again.

    ``settings`` are those of the command, ``threat`` is None where none is involved; ``seconds`` counts the work that was done
    before an interruption too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: str
    run: str
    created: str
    command: str
    seed: int
    settings: dict[str, Any]
    model: ModelPart
    data: DataPart
    threat: ThreatPart | None
    result: Result
    notes: list[str] = Field(default_factory=list)
    versions: dict[str, str]
    seconds: float


@memory_of("the measurement", "eval.batch_size", "eval.images")
def measure(
    kind: str,
    work: Callable[[ResumableResults], Result],
    *,
    model: nn.Module,
    images: ImageSet,
    target: EvaluationTarget,
    settings: dict[str, Any],
    seed: int,
    device: torch.device,
    threat: Threat | None,
    path: Path,
    fresh: bool,
    trust_state: bool = False,
    notes: Sequence[str] = (),
) -> Measurement:
    """Do ``work``, write what it returns to ``path``, and only then drop its state, ``path`` with ``.state``.

    Args:
        kind: the command's name.
        work: keeps its finished pieces in the state that it is given, and finds those of a call that was stopped.
        model: what is measured.
        images: on which.
        target: names and fingerprints.
        settings: with ``seed`` and ``threat``, all else that decides the result; plain data. A state of other settings, another
            model or other images is refused.
        seed: of all randomness.
        device: its kind decides the random numbers.
        threat: norm and radius, or None.
        path: the JSON file.
        fresh: forget what a stopped call has left.
        trust_state: continue a state that another user or another machine made.
        notes: what a reader must know of the images.
    """
    around = None
    if threat is not None:
        eps = Ratio(threat.eps)
        around = ThreatPart(norm=threat.norm, eps=float(eps), eps_text=eps.text)
    model_part = ModelPart(
        name=target.model,
        parameters=sum(p.numel() for key, p in model.named_parameters() if not key.startswith("projection.")),
        weights=target.weights,
        fingerprint=fingerprint(weights(model)),
    )
    data = target.data_part(images)
    header = {
        "kind": kind,
        "model": model_part.fingerprint,
        "structure": hashlib.sha256(repr(model).encode()).hexdigest()[:8],  # which the weights do not tell
        "images": data.images,
        "data": data.fingerprint,
        "threat": None if around is None else f"{around.norm} {around.eps_text}",
        "seed": seed,
        "device": device.type,
        **settings,
    }
    state = ResumableResults(path.with_suffix(".state"), header, trust=trust_state)
    if fresh:
        discard(path.with_suffix(".state"))
    result = work(state)
    measurement = Measurement(
        kind=kind,
        run=target.name,
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        command=command(),
        seed=seed,
        settings=settings,
        model=model_part,
        data=data,
        threat=around,
        result=result,
        notes=[*notes, *state.notes],
        versions=environment(),
        seconds=sum(part["seconds"] for _, part in state.parts.values()),
    )
    write_atomically(path, measurement.model_dump_json(indent=1).encode())
    discard(path.with_suffix(".state"))
    return measurement
