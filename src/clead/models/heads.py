"""Projection heads: used by the contrastive losses in training, never deployed."""

from __future__ import annotations

from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """p(h) = W2 · relu(W1 · h), the head of SimCLR (Chen et al. 2020, arXiv:2002.05709, sec. 2.1).

    Args:
        feature_dim: D, the width of the features.
        dim: d, the width of the projection; 128 in SimCLR and C-LEAD.
        hidden: width of the hidden layer; None: D.

    features: (B, D) -> (B, d), not yet of unit length. Raises ValueError if a width is < 1.
    """

    def __init__(self, feature_dim: int, dim: int = 128, hidden: int | None = None) -> None:
        super().__init__()
        hidden = feature_dim if hidden is None else hidden
        if min(feature_dim, dim, hidden) < 1:
            raise ValueError(f"widths of a head must be >= 1, got {feature_dim} -> {hidden} -> {dim}")
        self.hidden = nn.Linear(feature_dim, hidden)
        self.activation = nn.ReLU()
        self.output = nn.Linear(hidden, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Return p(h), (B, d)."""
        return self.output(self.activation(self.hidden(features)))
