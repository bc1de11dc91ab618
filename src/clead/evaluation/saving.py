"""Evaluate into a folder: the record, the pictures' tensors and the adversarial images; nothing that took hours is lost."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save as to_safetensors

from clead.atomic_io import JSON_LIMIT, check_inside, read_regular, remove_leftovers, write_atomically
from clead.evaluation import adversarial_dataset
from clead.evaluation.plan import EvaluationOptions
from clead.evaluation.processes import Shard, folders, rank, shards
from clead.evaluation.recording import Evaluation
from clead.evaluation.state import discard
from clead.evaluation.suites import NamedAttack
from clead.evaluation.tasks import evaluate_task
from clead.output import tell
from clead.results.record import Record, TransferResult
from clead.runs.loading import OpenedModel


class ShardDone(Exception):
    """A shard is computed; the record is made when all are."""


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """Where the record of an evaluation goes, and what of the work is done and kept; see ``clead.evaluate_run``."""

    folder: Path
    result: str
    fresh: bool
    shard: Shard | None
    merge: bool
    trust_state: bool
    save_adversarial: str | Path | None
    show: bool


def evaluate_into_folder(
    opened: OpenedModel,
    output: OutputOptions,
    *,
    attacks: Sequence[NamedAttack] | None,
    more: Sequence[NamedAttack],
    transferred: TransferResult | None = None,
) -> Evaluation:
    """Evaluate, write the record, the pictures' tensors and the adversarial images, and only then drop the state."""
    folder, result, shard = output.folder, output.result, output.shard
    if folder.is_dir():
        check_inside(folder, "folder of results", only=result)
    state = folder / f"{result}.state"
    if output.fresh:
        discard(shard.folder(state) if shard else folders(state)[rank()])
    dataset = None if output.save_adversarial is None else Path(output.save_adversarial)
    if dataset is not None:
        adversarial_dataset.check_writable(dataset)
    if rank() == 0:
        remove_leftovers(folder, (f"{result}.json", f"{result}.safetensors"))
    options = EvaluationOptions(
        device=opened.device,
        state=state,
        shard=shard,
        merge=output.merge,
        trust_state=output.trust_state,
        keep_adversarial=dataset is not None,
        show=output.show,
    )
    config, images = opened.config, opened.images
    evaluation = evaluate_task(
        *(opened.model, images, config.threat, config.eval, opened.target), attacks=attacks, more=more, options=options
    )
    if evaluation is None:
        assert shard is not None
        raise ShardDone(f"shard {shard.index}/{shard.count} is done: {shard.folder(state)}; when all are, use --merge")
    changes = {"transferred": transferred, "notes": [*evaluation.record.notes, *opened.notes]}
    record = evaluation.record.model_copy(update=changes)
    evaluation = dataclasses.replace(evaluation, record=record)
    if rank() > 0:
        return evaluation
    _archive_record(folder, result, record)
    write_atomically(folder / f"{result}.json", record.model_dump_json(indent=1).encode())
    if evaluation.artifacts:
        content = {key: value.contiguous() for key, value in evaluation.artifacts.items()}
        write_atomically(folder / f"{result}.safetensors", to_safetensors(content))
    if dataset is not None:
        assert evaluation.adversarial is not None
        adversarial_dataset.save(dataset, evaluation.adversarial, images.labels, record)
    for done in [*(shards(state) if output.merge else ()), state, *folders(state)]:
        discard(done)
    return evaluation


def _archive_record(folder: Path, result: str, record: Record) -> None:
    """Move a record that ``record`` does not repeat to ``folder/earlier``, with its pictures: it may have taken hours."""
    path = folder / f"{result}.json"
    try:
        old = Record.model_validate_json(read_regular(path, JSON_LIMIT))
    except (OSError, ValueError):  # there is none, or it cannot be read
        return

    def what(record: Record) -> list[str]:
        threat = f"{record.threat.norm}-{record.threat.eps_text.replace('/', '_')}"
        parts = [record.suite, threat, str(record.data.n), record.data.images[:8], record.model.fingerprint[:8]]
        return [re.sub(r"[^\w.+-]+", "_", name)[:60] for name in parts]  # a record from elsewhere may hold paths

    if what(old) == what(record):
        return
    for suffix in (".safetensors", ".json"):
        archived = folder / "earlier" / f"{'-'.join(what(old))}{suffix}"
        if path.with_suffix(suffix).exists():
            archived.parent.mkdir(exist_ok=True)
            path.with_suffix(suffix).replace(archived)
    tell(f"note: the record before, of another evaluation, is kept as {archived}")
