"""What stored images show: the gallery, and the map of the embedding."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from clead.errors import needs_extra
from clead.report.run import RunResult
from clead.report.sections.classes import MOST
from clead.results.figure import INK, PALETTE, Drawing, draw, head, new_axes
from clead.tasks.classification import CLASSIFICATION

GALLERY_BYTES = 2_500_000
"""Encoded size that the images of all galleries may take together; what does not fit is left out, and said."""

_THUMBNAIL = 112


def galleries(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return the images of each run that stored them, within the byte budget of the file."""
    keys = ("x", "x_adv", "labels", "probabilities", "probabilities_adv")
    stored = [(i, run, arrays) for i, run in enumerate(runs) if (arrays := run.arrays(*keys))]
    shown = []
    for i, run, (x, x_adv, labels, before, after) in stored:
        budget = GALLERY_BYTES // len(stored)
        classes = run.record.data.classes
        delta = x_adv.astype(np.float64) - x
        # One factor per run, so that perturbations can be compared; a few outliers may saturate (L2, L1).
        reach = float(np.quantile(np.abs(delta), 0.999)) or float(np.abs(delta).max())
        factor = max(1, round(0.5 / reach)) if reach > 0 else 1
        items = []
        answers = [CLASSIFICATION.predict(torch.from_numpy(scores)).tolist() for scores in (before, after)]
        for k in range(len(x)):
            pictures = [_png(x[k]), _png(0.5 + factor * delta[k], sharp=True), _png(x_adv[k])]
            budget -= sum(map(len, pictures))
            if budget < 0:
                break
            first, second, truth = answers[0][k], answers[1][k], int(labels[k])
            outcome = "wrong anyway" if first != truth else "held" if second == truth else "broken"
            items.append(
                {
                    "number": k + 1,
                    "pictures": pictures,
                    "truth": run.class_name(truth),
                    "before": run.class_name(first),
                    "after": run.class_name(second),
                    "p_before": float(before[k, first]),
                    "p_after": float(after[k, second]),
                    "outcome": outcome,
                }
            )
        if items:
            outcomes = {
                name: sum(item["outcome"] == name for item in items) for name in ("held", "broken", "wrong anyway")
            }
            truths = {run.class_name(int(k)) for k in np.unique(labels[: len(items)])}
            names = [name for name in classes if name in truths] + sorted(truths - set(classes))
            shown.append(
                {"index": i, "name": run.name, "items": items, "factor": factor, "stored": len(x), "outcomes": outcomes,
                 "classes": names, "size": f"{x.shape[-1]} × {x.shape[-2]}", "small": max(x.shape[-2:]) <= 64}
            )  # fmt: skip
    return shown


def _png(image: np.ndarray, *, sharp: bool = False) -> str:
    """Return (C, H, W) in [0, 1] as a PNG data URI, at most 112 pixels a side; ``sharp`` shrinks by picking pixels."""
    pixels = (np.clip(np.nan_to_num(image), 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels.mean(2).round().astype(np.uint8))
    if max(picture.size) > _THUMBNAIL:
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def maps(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return the planar map of each run that stored embeddings."""
    drawings = []
    limit = 400 if len(runs) <= 4 else 150
    for i, run in enumerate(runs):
        arrays = run.arrays("embedding_clean", "embedding_adv", "embedding_labels")
        if arrays is None:
            continue
        clean, adv, labels = (array[:limit] for array in arrays)
        finite = np.isfinite(clean).all(1) & np.isfinite(adv).all(1)
        clean, adv, labels = clean[finite], adv[finite], labels[finite]
        if len(clean) < 3:
            continue
        lengths = np.linalg.norm(clean, axis=1) * np.linalg.norm(adv, axis=1)
        cosine = float(np.median((clean * adv).sum(1) / np.maximum(lengths, 1e-12)))
        a, b, how = project(clean, adv)
        caption = (
            f"{run.name}: {len(clean)} images in {clean.shape[1]} dimensions, drawn by {how}; the median cosine similarity "
            f"of an image with its adversarial version is {cosine:.2f}."
        )
        drawing = _map(a, b, labels, run, how, name=f"embedding-{i + 1}", label=f"Embedding map. {caption}")
        drawings.append({"drawing": drawing, "caption": caption, "how": how})
    return drawings


def project(clean: np.ndarray, adv: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, str]:
    """Return clean and adversarial embeddings (m, D) in one plane, (m, 2) each, and how: t-SNE, or PCA for few points.

    t-SNE (van der Maaten & Hinton 2008) needs more than 15 distinct points in more than two dimensions; both sets are
    fitted together with a fixed seed.
    """
    both = np.concatenate([clean, adv]).astype(np.float64)
    if both.shape[1] > 2 and len(np.unique(both, axis=0)) > 15 and len(clean) > 15:
        with needs_extra("report", "the embedding map of the report"):
            from sklearn.manifold import TSNE
            from threadpoolctl import threadpool_limits  # a dependency of scikit-learn
        perplexity = min(30.0, len(both) / 6)
        with threadpool_limits(1):  # so few points gain nothing from threads, and lose tenfold on busy cores
            plane = TSNE(random_state=seed, init="pca", perplexity=perplexity).fit_transform(both)
        how = "t-SNE"
    else:
        centred = both - both.mean(0)
        plane, how = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T, "PCA"
        plane = np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
    return plane[: len(clean)], plane[len(clean) :], how


def _map(
    clean: np.ndarray, adv: np.ndarray, labels: np.ndarray, run: RunResult, how: str, *, name: str, label: str
) -> Drawing:
    """Draw planar points (m, 2): clean as discs, adversarial as crosses, a thin line between the two of one image.

    ``labels`` (m,) in [0, K) are the true classes: a colour each, and the name at the median of its clean points.
    """
    figure, axes = new_axes(390, 350)
    from matplotlib.collections import LineCollection

    colors = [PALETTE[int(k) % len(PALETTE)] for k in labels]
    axes.add_collection(LineCollection(np.stack([clean, adv], 1).tolist(), colors=colors, linewidths=0.5, alpha=0.35))
    for k in np.unique(labels):
        color, of = PALETTE[int(k) % len(PALETTE)], labels == k
        axes.plot(*clean[of].T, "o", color=color, markersize=3.6, markeredgewidth=0, alpha=0.85)
        axes.plot(*adv[of].T, "x", color=color, markersize=3.8, markeredgewidth=0.9, alpha=0.85)
    present = np.unique(labels)
    if len(present) <= MOST:
        for k in present:
            axes.annotate(
                run.class_name(int(k))[:18], np.median(clean[labels == k], axis=0).tolist(), ha="center", va="center",
                fontsize=10.5, fontweight="bold", color=INK,
            )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)
    axes.grid(visible=False)
    head(axes, run.name)
    columns = ("image", "true class", f"clean x ({how}, no unit)", "clean y", "adversarial x", "adversarial y")
    rows = [
        (k + 1, run.class_name(int(labels[k])), *map(float, clean[k]), *map(float, adv[k])) for k in range(len(labels))
    ]
    return draw(figure, name, label, columns, rows)
