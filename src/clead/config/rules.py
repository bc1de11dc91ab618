"""What must hold between several groups of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def joint_problems(parts: Mapping[str, Any]) -> list[str]:
    """Return the problems that concern several groups at once; groups that are not valid themselves may be lacking."""
    method, data = parts.get("method"), parts.get("data")
    if method is None or data is None:
        return []
    inner = (
        getattr(method, "inner", "") in ("contrastive", "supcon") or getattr(method, "inner_contrastive_weight", 0) > 0
    )
    contrasts = getattr(method, "contrastive_weight", 0) > 0 or (inner and getattr(method, "uses_attack", False))
    contrasts = contrasts or getattr(method, "uses_embedding", False)
    if contrasts and data.batch_size < 2:
        return [
            "data.batch_size: a contrastive loss needs at least 2 images, because the others are the negatives, "
            f"got {data.batch_size}; raise it, or set the contrastive weights to 0"
        ]
    if problems := _label_problems(method, data):
        return problems
    trained = parts.get("train")
    frozen = getattr(method, "uses_embedding", False) or (
        getattr(method, "contrastive_weight", 0) > 0 and getattr(method, "contrastive_level", "logits") != "logits"
    )
    if getattr(trained, "trainable", "all") == "classifier" and frozen:
        return [
            "train.trainable: a contrastive loss trains encoder and projection head, which are frozen then, got classifier; "
            "set it to all, or take a method without that term (method.name standard)"
        ]
    if data.cutmix and getattr(method, "uses_stored", False):
        return [
            f"data.cutmix: a mixed image is not the one whose adversarial image is stored, got {data.cutmix:g}; set it to 0"
        ]
    if data.augment.gaussian and getattr(method, "uses_attack", False):
        return [
            "data.augment.gaussian: unclipped noise leaves [0, 1], in which an attack's images must lie, got "
            f"{data.augment.gaussian:g}; set it to 0, or take a method without an attack (method.name standard)"
        ]
    return []


def _label_problems(method: Any, data: Any) -> list[str]:
    """Return what is wrong with the settings on labels together."""
    few = data.labelled < 1
    problems = [
        f"data.{key}: changes nothing while every image has a label, got {value}; set data.labelled below 1"
        for key in ("labelled_share", "pseudo_labels_from")
        if (value := getattr(data, key)) is not None and not few
    ]
    if few and data.labelled_share is not None and data.batch_size < 2:
        problems.append(
            f"data.batch_size: labelled_share needs one labelled and one unlabelled image at least, got {data.batch_size}; raise it"
        )
    if few and data.cutmix and getattr(method, "uses_unlabelled", False) and data.pseudo_labels_from is None:
        problems.append(
            f"data.cutmix: mixes labels, which images without one have not, got {data.cutmix:g}; set it to 0, or data.labelled 1"
        )
    return problems
