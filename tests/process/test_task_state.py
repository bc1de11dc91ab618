"""What tasks measure beside a suite is kept, too: an evaluation that is killed goes on without computing anything again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clead.config import Eval
from clead.evaluation.plan import EvaluationOptions
from clead.evaluation.state import ResumableResults
from clead.evaluation.tasks import evaluate_task
from clead.interfaces import ImageSet
from clead.models.split import adapt
from clead.results.target import EvaluationTarget
from clead.tasks import TASKS
from clead.threats import THREATS
from support import Killed, generator

N = 12
CLASSES = ("cat", "dog", "owl")
LABELS = {
    "binary": torch.arange(N) % 2,
    "multilabel": torch.randint(2, (N, 2), generator=generator(3)),
    "retrieval": torch.arange(N) % 3,
}
SETTINGS = Eval(suite="pgd", steps=2, batch_size=4, curve_points=0, check_images=0, gallery=0)


def evaluated(task: str, state: Path | None) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 1 if task == "binary" else 2))
    images = torch.rand(N, 1, 4, 4, generator=generator(1))
    kind = TASKS.get(task)(**({"items": 1} if task == "retrieval" else {}))
    classes = CLASSES if task == "retrieval" else CLASSES[:2]
    target = EvaluationTarget("net", "linear", "given", "given", "test", "given", classes, task=kind)
    model = adapt(net.eval(), sample_shape=(1, 4, 4))
    evaluation = evaluate_task(
        *(model, ImageSet(images, LABELS[task]), THREATS.get("linf")(eps=0.05), SETTINGS, target),
        options=EvaluationOptions(state=state, show=False),
    )
    assert evaluation is not None
    return evaluation.record


@pytest.mark.parametrize("task", LABELS)
def test_no_part_is_computed_twice(task, tmp_path, monkeypatch):
    """Killed after each fifth part; every part is saved once, and the record is that of an evaluation that nobody killed."""
    save, saved, limit = ResumableResults.save, [], 0

    def counted(store: ResumableResults, key: str, tensors: Any, data: Any) -> None:
        save(store, key, tensors, data)
        saved.append((store.path, key))
        if len(saved) == limit:
            raise Killed

    monkeypatch.setattr(ResumableResults, "save", counted)
    whole = evaluated(task, None)
    number, state = len(saved), tmp_path / "evaluation.state"
    saved.clear()
    for limit in range(5, number, 5):
        with pytest.raises(Killed):
            evaluated(task, state)
        assert len(saved) == limit
    record = evaluated(task, state)
    assert len(saved) == len(set(saved)) == number >= 8
    assert record.robust_flags == whole.robust_flags and record.metrics == whole.metrics
    assert [each.flags for each in record.attacks] == [each.flags for each in whole.attacks]
    assert [each.settings for each in record.attacks] == [each.settings for each in whole.attacks]
    assert set(record.notes) - set(whole.notes) <= {note for note in record.notes if note.startswith("continued from")}
