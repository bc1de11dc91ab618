"""An encoder with a gallery as a classifier: the logit of a class is the similarity to its nearest item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.errors import UserError
from clead.losses.precision import at_least_float32
from clead.models.split import SplitModel
from clead.tasks.retrieval import check_gallery, class_similarity

TEMPERATURE = 0.05
"""Similarities are divided by it, so that the cross-entropy of an attack looks at the nearest classes; no verdict depends on it."""


class NearestItem(SplitModel):
    """Features are the encoder's of unit length, (B, d); logits are s_c / 0.05, (B, K), of the classes of a gallery.

    A class without an item can never be the answer. The gallery is part of the state dict, and so of the fingerprint.

    Args:
        encoder: whose features are compared; kept as it is.
        gallery: (G, d) embeddings of unit length, on the encoder's device.
        labels: (G,) int64 in [0, K).
        classes: K names.
        items: the images of the gallery, (G, C, H, W), for attacks on them.

    Raises UserError if the gallery is empty, of one class, or of another embedding size.
    """

    def __init__(
        self, encoder: SplitModel, gallery: Tensor, labels: Tensor, classes: Sequence[str], items: Any
    ) -> None:
        super().__init__(len(classes), encoder.feature_dim)
        check_gallery(gallery, labels, encoder.feature_dim, classes)
        self.encoder = encoder
        self.items = items
        self.gallery: Tensor
        self.labels: Tensor
        self.register_buffer("gallery", gallery)
        self.register_buffer("labels", labels.to(gallery.device))
        self.eval()

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        embedding = unit_features(self.encoder, x)
        return embedding, class_similarity(embedding, self.gallery, self.labels, self.num_classes) / TEMPERATURE


class OutputEncoder(SplitModel):
    """An encoder without a classifier: what ``model`` returns, (B, d), are the features."""

    def __init__(self, model: SplitModel) -> None:
        super().__init__(model.num_classes, model.num_classes)
        self.model = model

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.model(x)
        return embedding, embedding


def unit_features(model: SplitModel, x: Tensor) -> Tensor:
    """Return h / ‖h‖₂ of the features of images (B, C, H, W), (B, d) in float32 at least; 0 stays 0.

    Raises UserError for features of pixels, (B, d, h, w).
    """
    with torch.autocast(x.device.type, enabled=False):
        features = model.features(x)
        if features.dim() != 2:
            raise UserError(
                f"retrieval compares one embedding (B, d) per image, got {tuple(features.shape)}; return the mean "
                "over the pixels: z.mean((2, 3))"
            )
        return F.normalize(at_least_float32(features), dim=1)
