"""What is maximised: name -> ``(model, x, y) -> (x_adv -> one value per image)``.

Anything computed from the clean images (a prediction, an embedding) is computed once, here, and held fixed: the inner problem
moves x only. Call them under ``attack_mode(model)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clead.attacks import OBJECTIVES
from clead.errors import UserError
from clead.interfaces import Objective
from clead.losses import margin as margins
from clead.losses.contrastive import nt_xent
from clead.losses.divergence import cosine_distance, kl_divergence
from clead.models.split import SplitModel


@OBJECTIVES.register("cross_entropy")
def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """−log p(y | x_adv) (Madry et al. 2018, arXiv:1706.06083)."""
    return lambda x_adv: margins.cross_entropy(model(x_adv), y)


@OBJECTIVES.register("margin")
def margin(model: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """max_{k≠y} z_k − z_y (Carlini & Wagner 2017, arXiv:1608.04644)."""
    return lambda x_adv: margins.margin(model(x_adv), y)


@OBJECTIVES.register("dlr")
def dlr(model: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """The difference-of-logits ratio (Croce & Hein 2020, arXiv:2003.01690, eq. 6)."""
    return lambda x_adv: margins.dlr(model(x_adv), y)


@OBJECTIVES.register("kl")
def kl(model: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """KL(p(x) ‖ p(x_adv)) to the clean prediction (Zhang et al. 2019, arXiv:1901.08573)."""
    with torch.no_grad():
        target = model(x)
    return lambda x_adv: kl_divergence(target, model(x_adv))


@OBJECTIVES.register("embedding")
def embedding(model: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """1 − cos(h(x_adv), h(x)): away from the clean image in the encoder's features, where the classifier reads."""
    split = _split(model, "embedding")
    with torch.no_grad():
        clean = split.features(x)
    return lambda x_adv: cosine_distance(split.features(x_adv), clean)


@OBJECTIVES.register("contrastive")
def contrastive(model: nn.Module, x: Tensor, y: Tensor, temperature: float = 0.1) -> Objective:
    """NT-Xent of (x, x_adv) in the projected embedding (in the features if the model has no projection head).

    Source: the instance-wise attack of Kim et al. 2020, arXiv:2006.07589, eq. 2. A single image has no negatives: what is left
    is the cosine distance.
    """
    split = _split(model, "contrastive")

    def embed(images: Tensor) -> Tensor:
        features = split.features(images)
        if split.projection is not None:
            return split.embedding(features)
        return nn.functional.normalize(features.float(), dim=1)

    with torch.no_grad():
        clean = embed(x)
    if len(x) == 1:
        return lambda x_adv: cosine_distance(embed(x_adv), clean)
    return lambda x_adv: nt_xent([clean, embed(x_adv)], temperature)


def _split(model: nn.Module, objective: str) -> SplitModel:
    if not isinstance(model, SplitModel):
        raise UserError(
            f"objective {objective!r} needs an encoder/classifier split, got a {type(model).__name__}; "
            "wrap it with clead.adapt(model, sample_shape=(C, H, W))"
        )
    return model
