"""C-LEAD as published: the encoder learns from the contrast of clean, augmented and once-made adversarial images alone."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from pydantic import field_validator

from clead.attacks import ATTACKS
from clead.attacks.capabilities import capabilities
from clead.errors import UserError
from clead.interfaces import Attack, Batch, Search, StepOutput
from clead.losses.contrastive import published
from clead.methods import METHODS
from clead.methods.base import Method, StepContext, Views
from clead.methods.view_forward import forward
from clead.models.split import SplitModel
from clead.settings import Ratio, setting, settings, validated


@METHODS.register("clead_published")
@settings
class CLeadPublished(Method):
    """min_θ mean_i ½ [l_i(z → z_aug) + l_i(z → z_adv)], the clean view the only anchor; x_adv is made once, before the first step.

    Source: C-LEAD (Ghosh, Kumar, Sur 2025, arXiv:2510.27249), with τ = 0.1 and d = 128. The model that training starts from, a
    trained classifier, is attacked once over the whole training set; its images are kept, and image i always meets its own. No
    label is looked at and the classifier does not learn: a stage before trains the one that is attacked, a stage after fits
    another (recipe ``digits-clead-published``). After every epoch the 20 nearest neighbours in cosine vote, and ``best`` is theirs.

    An attack for the smallest perturbation, such as the paper's C&W, keeps what it finds beyond eps too, in its own norm, as the
    paper does; any other stays in the run's threat set. What departs: images are stored in half precision, and where the attack
    found nothing the clean image stands. The paper does not say how views meet batch-norm; here they share a forward.
    """

    stored_attack: dict[str, Any] = setting(
        {"name": "cw"},
        "the attack whose images are stored: name and its own settings, such as stored_attack.steps; cw as in the authors' code",
    )
    stored_clip: bool = setting(
        False,
        "project stored images of an attack for the smallest perturbation onto the threat set, instead of as far as they are",
    )
    temperature: float = setting(0.1, "τ of the contrastive loss", gt=0)
    embedding_dim: int = setting(128, "size of the projected embedding", ge=2)

    @field_validator("stored_attack")
    @classmethod
    def _complete(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Return name and every setting of the attack."""
        try:
            attack = attack_of(value)
        except UserError as error:
            raise ValueError("; ".join(error.problems)) from None
        settings: dict[str, Any] = dataclasses.asdict(cast(Any, attack))
        return {"name": str(value["name"]), **{key: _plain(setting) for key, setting in settings.items()}}

    def __post_init__(self) -> None:
        """Refuse a clip that would change nothing."""
        if self.stored_clip and not capabilities(attack_of(self.stored_attack)).minimum_norm:
            raise ValueError(
                f"stored_clip is for attacks for the smallest perturbation: {self.stored_attack['name']} stays in the threat set, "
                "got stored_clip=True; leave it out"
            )

    uses_embedding = uses_second_view = uses_unlabelled = uses_stored = True
    uses_attack = uses_classifier = False

    def views(self, model: SplitModel, batch: Batch, step: StepContext) -> Views:
        """Return the clean, the augmented and the stored adversarial images."""
        assert batch.second_view is not None and batch.stored is not None, "the loader was built without these views"
        return Views({"clean": batch.images, "augmented": batch.second_view, "adversarial": batch.stored}, batch)

    def loss(self, model: SplitModel, views: Views, step: StepContext) -> StepOutput:
        """Return the three-view loss."""
        z = [model.embedding(outputs.features) for outputs in forward(model, views.images).values()]
        loss = published(z, self.temperature).mean()
        return StepOutput(loss, {"contrastive": loss.detach()})


def attack_of(values: dict[str, Any]) -> Attack | Search:
    """Return the registered attack that a mapping of its name and settings means; raises UserError, one line per problem."""
    values = dict(values)
    if "name" not in values:
        raise UserError(f"name: is required; known: {', '.join(ATTACKS.names())}")
    return validated(ATTACKS.get(str(values.pop("name"))), values)


def _plain(value: Any) -> Any:
    return value.text if isinstance(value, Ratio) else value
