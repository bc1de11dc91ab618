"""What a record says of retrieval besides recall@1, which is its accuracy."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from clead.results.record import Estimate, RecordModel


class Verification(RecordModel):
    """How well a threshold on the similarity parts pairs of one class from pairs of two.

    ``area`` is that under the ROC, ``equal_error`` where as large a part of either kind is on the wrong side, ``accepted`` the part
    of the pairs of one class above a threshold that at most 1 % of the others pass. ``points`` are (false, true) accepted parts.
    """

    area: float = Field(ge=0, le=1)
    equal_error: float = Field(ge=0, le=1)
    accepted: float = Field(ge=0, le=1)
    points: list[tuple[float, float]]


class RetrievalResult(RecordModel):
    """How a gallery answers, clean and under attack.

    Attributes:
        items: of the gallery.
        gallery: what it is.
        seen: classes of the gallery that the training saw, by name; figures on unseen classes have none.
        attack: how single items are attacked, as tables name it; ``settings`` are its own.
        precision: mean average precision of the clean queries.
        robust_precision: of the adversarial queries that the record's attacks made against recall@1.
        verification: of a pair of either kind per query, its items drawn at random.
        robust_verification: of the same pairs, the query attacked: away from an item of its class, towards one of another.
        towards_item: part of the queries that cannot be led to an item of another class, drawn at random, as their nearest.
        gallery_item: part of the queries that are right when clean and after the nearest wrong item has been attacked.
    """

    items: int
    gallery: str
    seen: list[str]
    attack: str
    settings: dict[str, Any]
    precision: float
    robust_precision: float
    verification: Verification
    robust_verification: Verification
    towards_item: Estimate
    gallery_item: Estimate
    seconds: float
