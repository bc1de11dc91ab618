"""What is maximised: name -> ``(model, x, y) -> (x_adv -> one value per image)``.

Anything computed from the clean images (a prediction, an embedding) is computed once, here, and held fixed: the inner problem
moves x only. Call them under ``attack_mode(model)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clead.attacks import OBJECTIVES
from clead.errors import UserError
from clead.interfaces import Objective
from clead.losses import contrastive as contrast
from clead.losses import margin as margins
from clead.losses.divergence import cosine_distance
from clead.losses.precision import at_least_float32
from clead.models.split import AdaptedModel, SplitModel
from clead.tasks import Task
from clead.tasks.classification import CLASSIFICATION


@OBJECTIVES.register("cross_entropy")
def cross_entropy(model: nn.Module, x: Tensor, y: Tensor, task: Task = CLASSIFICATION) -> Objective:
    """−log p(y | x_adv) (Madry et al. 2018, arXiv:1706.06083); of a targeted attack log p(target | x_adv)."""
    return lambda x_adv: task.loss(model(x_adv), y)


@OBJECTIVES.register("margin")
def margin(model: nn.Module, x: Tensor, y: Tensor, task: Task = CLASSIFICATION) -> Objective:
    """max_{k≠y} z_k − z_y (Carlini & Wagner 2017, arXiv:1608.04644); of a targeted attack z_target − max_{k≠target} z_k."""
    return lambda x_adv: task.margin(model(x_adv), y)


@OBJECTIVES.register("dlr")
def dlr(model: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """The difference-of-logits ratio (Croce & Hein 2020, arXiv:2003.01690, eq. 6)."""
    return lambda x_adv: margins.dlr(model(x_adv), y)


@OBJECTIVES.register("kl")
def kl(model: nn.Module, x: Tensor, y: Tensor, task: Task = CLASSIFICATION) -> Objective:
    """KL(p(x) ‖ p(x_adv)) to the clean prediction (Zhang et al. 2019, arXiv:1901.08573), or the task's divergence in its place."""
    with torch.no_grad():
        target = model(x)
    return lambda x_adv: task.divergence(target, model(x_adv))


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
    return _between_views("contrastive", model, x, lambda z: contrast.nt_xent(z, temperature))


@OBJECTIVES.register("supcon")
def supcon(model: nn.Module, x: Tensor, y: Tensor, temperature: float = 0.1) -> Objective:
    """SupCon of (x, x_adv), labels y, in the projected embedding (in the features if the model has no projection head).

    Away from the whole class, clean and adversarial, and towards the others: what adversarial supervised contrastive learning
    attacks (Li et al. 2023, doi:10.1007/s10994-022-06269-7), with the loss of Khosla et al. 2020, arXiv:2004.11362, eq. 2. A
    single image has no negatives: what is left is the cosine distance.
    """
    return _between_views("supcon", model, x, lambda z: contrast.supcon(z, y, temperature))


@OBJECTIVES.register("neighbours")
def neighbours(model: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """max_{j: y_j≠y} cos(h(x_adv), h(x_j)) − max_{j: y_j=y} cos(h(x_adv), h(x_j)): the margin of retrieval among the clean images.

    They stand for a gallery, in which the image itself is only where no other has its label. Features are compared, because a
    gallery is made of them. Without an image of another class the second term alone is left.
    """
    split = _split(model, "neighbours")

    def embed(images: Tensor) -> Tensor:
        return nn.functional.normalize(at_least_float32(split.features(images)), dim=1)

    with torch.no_grad():
        keys = embed(x)
    right, _ = contrast.answering(y)
    other = y[:, None] != y

    def value(x_adv: Tensor) -> Tensor:
        similarity = embed(x_adv) @ keys.T
        return similarity.masked_fill(~other, -1).amax(1) - similarity.masked_fill(~right, -1).amax(1)

    return value


def _between_views(name: str, model: nn.Module, x: Tensor, loss: Callable[[list[Tensor]], Tensor]) -> Objective:
    """Return ``loss`` of the embeddings of x, held fixed, and x_adv."""
    split = _split(model, name)

    def embed(images: Tensor) -> Tensor:
        features = split.features(images)
        if split.projection is not None:
            return split.embedding(features)
        return nn.functional.normalize(features.float(), dim=1)

    with torch.no_grad():
        clean = embed(x)
    if len(clean) == 1:
        return lambda x_adv: cosine_distance(embed(x_adv), clean)
    return lambda x_adv: loss([clean, embed(x_adv)])


@OBJECTIVES.register("embedding_logits")
def embedding_logits(model: nn.Module, x: Tensor, y: Tensor, weight: float = 1.0) -> Objective:
    """−log p(y | x_adv) + weight · (1 − cos(h(x_adv), h(x))): wrong at the logits and away from the clean features at once.

    An adaptive attack is aimed at what the defence was trained on (Tramèr et al. 2020, arXiv:2002.08347), here the agreement
    of features beside the classification. With ``weight`` 1 the logits lead near the image, where the cosine is flat; at
    most 2, it leads where the cross-entropy of a confident model has no gradient left.
    """
    split = _split(model, "embedding_logits")
    with torch.no_grad():
        clean = split.features(x)

    def value(x_adv: Tensor) -> Tensor:
        features, logits = split.features_and_logits(x_adv)
        return CLASSIFICATION.loss(logits, y) + weight * cosine_distance(features, clean)

    return value


@OBJECTIVES.register("prototype")
def prototype(model: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """cos(h(x_adv), p_k) − cos(h(x_adv), p_y): in the features towards the nearest other class k of the clean image, and off y.

    Source: the targeted attack on features of Sabour et al. 2016, arXiv:1511.05122, eq. 1. It departs in the target: an
    objective is given no guide image, so a class's prototype p_k stands for one. That is its row of the linear classifier
    less the mean row, to which the class means of the features align in training (Papyan et al. 2020, arXiv:2008.08186);
    the mean row moves all logits alike and so no decision. Cosines make it blind to the lengths of features and rows and
    to the biases, unlike the margin.
    """
    split = _split(model, "prototype")
    prototypes = _prototypes(split, x)

    def cosines(images: Tensor) -> Tensor:
        return nn.functional.normalize(at_least_float32(split.features(images)), dim=1) @ prototypes.T

    with torch.no_grad():
        nearest = CLASSIFICATION.rival(cosines(x), y)

    def value(x_adv: Tensor) -> Tensor:
        near = cosines(x_adv)
        return (near.gather(1, nearest[:, None]) - near.gather(1, y[:, None]))[:, 0]

    return value


def _prototypes(split: SplitModel, x: Tensor) -> Tensor:
    """Return the unit rows of the classifier less their mean, (K, D): found as ∂logit_k/∂features, wherever the layer is."""
    with torch.enable_grad():
        # Not compiled: there features and logits leave one opaque function, and no gradient leads from one to the other.
        features, logits = split._split(x[:1].detach().requires_grad_())
        rows = [torch.autograd.grad(logit, features, retain_graph=True)[0][0] for logit in logits[0]]
    weight = at_least_float32(torch.stack(rows))
    return nn.functional.normalize(weight - weight.mean(0), dim=1)


OF_THE_TASK = ("cross_entropy", "margin", "kl")
"""Objectives that take ``task``; the others look at features, or are defined for classes only."""


def task_option(objective: str, task: Task) -> dict[str, Task]:
    """Return the task as the keyword of an objective, nothing for one that takes none."""
    return {"task": task} if objective in OF_THE_TASK else {}


NEED_FEATURES = ("embedding", "contrastive", "supcon", "neighbours", "embedding_logits", "prototype")
"""Objectives that look at the features; models that have none are attacked without them."""


def _split(model: nn.Module, objective: str) -> SplitModel:
    if isinstance(model, AdaptedModel) and not model.has_features:
        raise UserError(
            f"objective {objective!r} needs features, and the logits of {type(model.module).__name__} come from no final "
            "nn.Linear; name the layer that makes them of features (B, D): --model.classifier NAME"
        )
    if not isinstance(model, SplitModel):
        raise UserError(
            f"objective {objective!r} needs an encoder/classifier split, got a {type(getattr(model, 'module', model)).__name__}; "
            "wrap it with clead.adapt(model, sample_shape=(C, H, W))"
        )
    return model
