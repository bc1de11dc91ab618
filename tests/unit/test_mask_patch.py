"""Patches on masks: places by loops, models of which the best patch is known, what counts and what does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clead.attacks import patch
from clead.attacks.mask_patch import allowed_places, worst_patch
from clead.attacks.patch import Patch
from clead.attacks.spatial import Spatial
from clead.errors import UserError
from clead.evaluation.state import ResumableResults
from clead.interfaces import ImageSet, Splits
from clead.losses.pixels import VOID
from clead.measurements.base import MeasurementTarget
from clead.measurements.unrestricted import UnrestrictedAttack
from clead.models.split import adapt
from clead.results.target import EvaluationTarget
from clead.tasks.segmentation import SEGMENTATION
from clead.threats import THREATS
from support import generator

CLASSES = ("road", "car")


class Pixels(nn.Module):
    """Logits of each pixel by itself (``weight`` 0), or moved by the mean of the image."""

    def __init__(self, weight: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: Tensor) -> Tensor:
        z = x[:, :1] - 0.5 + self.weight * (x.mean((1, 2, 3), keepdim=True) - 0.35)
        return torch.cat([-z, z], 1)


def scenes(n: int = 4) -> ImageSet:
    """Bright cars of 2×2 pixels on a dark road, one image without, a corner of void."""
    masks = torch.zeros(n, 8, 8, dtype=torch.int64)
    for k in range(n - 1):
        masks[k, 2 : 4 + k % 2, 3:5] = 1
    images = 0.3 + 0.4 * masks[:, None].float() + 0.05 * torch.rand(n, 1, 8, 8, generator=generator(0))
    masks[:, 7, 7] = VOID
    return ImageSet(images, masks.to(torch.uint8))


def measured(attack: Any, model: nn.Module | None = None, state: ResumableResults | None = None) -> Any:
    images = scenes()
    about = EvaluationTarget("net", "conv", "given", "given", "test", "given", CLASSES, task=SEGMENTATION)
    splits = Splits(images, images, images, CLASSES, "given")
    adapted = adapt(model or Pixels(), sample_shape=(1, 8, 8))
    threat, device = THREATS.get("linf")(eps=0.1), torch.device("cpu")
    target = MeasurementTarget(adapted, images, splits, threat, 0, device, 3, None, about, show=False)
    return UnrestrictedAttack(attack=attack).run(target, state or ResumableResults(None, {}))


@pytest.mark.parametrize("place", ["anywhere", "corner"])
def test_places_are_those_off_the_object_by_a_loop(place):
    avoided = torch.rand(5, 6, 7, generator=generator(2)) < 0.15
    allowed = allowed_places(Patch(size=2, place=place), avoided)
    assert allowed.shape == (5, 5, 6)
    for image, top, left in allowed.cpu().nonzero().tolist():
        assert not avoided[image, top : top + 2, left : left + 2].any()
    free = [
        (i, top, left)
        for i in range(5)
        for top in range(5)
        for left in range(6)
        if not avoided[i, top : top + 2, left : left + 2].any()
        and (place == "anywhere" or (top in (0, 4) and left in (0, 5)))
    ]
    assert [tuple(each) for each in allowed.nonzero().tolist()] == free


def test_no_patch_hurts_a_model_that_looks_at_each_pixel_alone():
    """All that it turns lies under it, which counts nowhere."""
    result = measured(Patch(size=3, steps=4, restarts=2))
    assert result.clean.accuracy == result.robust.accuracy == 1 and result.metrics[0].robust == 1
    assert result.n == 4 and not result.clean_flags and result.attack == "patch (pixels outside it)"


def test_a_model_that_looks_at_the_whole_image_loses_all_pixels_outside():
    """Its answer turns where the mean does: a white patch makes all road a car, and a black one no car."""
    state = ResumableResults(None, {})
    result = measured(Patch(size=4, steps=20, restarts=2, step_size=0.2), Pixels(8.0), state)
    assert result.robust.accuracy < 0.2 and result.metrics[0].robust < result.metrics[0].clean
    counted = torch.cat([tensors["clean"][:, 2].sum(1) for tensors, _ in state.parts.values()])
    assert ((counted == 64 - 16) | (counted == 63 - 16)).all(), "the void pixel may lie under the patch"


def test_the_worst_case_is_never_above_clean():
    """This model says car everywhere, and rightly road where a patch is bright: it may show the image as it is, too."""

    class Dark(Pixels):
        def forward(self, x: Tensor) -> Tensor:
            z = (0.8 - x.amax((1, 2, 3), keepdim=True)) + 0 * x
            return torch.cat([-z, z], 1)

    result = measured(Patch(size=4, steps=1, restarts=1), Dark())
    assert result.robust.accuracy <= result.clean.accuracy < 0.2 and result.metrics[0].robust <= result.metrics[0].clean


def test_of_a_named_object_the_pixels_beside_the_patch_count():
    attack, state = Patch(size=2, steps=20, restarts=3, step_size=0.2, object="car"), ResumableResults(None, {})
    result = measured(attack, Pixels(40.0), state)
    assert result.n == 3 and "pixels of car, in 3 images" in result.attack and not result.metrics
    counts = torch.cat([tensors["clean"] for tensors, _ in state.parts.values()])
    assert counts[:, 2].tolist() == [[0, 4], [0, 6], [0, 4]]
    assert result.robust.accuracy < result.clean.accuracy
    images = scenes()
    y = images.labels.long()[:3]
    x_adv, masks = worst_patch(
        attack,
        Pixels(8.0),
        images.images[:3],
        y.where(y == 1, VOID),
        allowed_places(attack, y == 1),
        generator=generator(0),
    )
    assert torch.equal(x_adv[:, 0][y == 1], images.images[:3, 0][y == 1]) and ((masks == 1) == (y == 1)).all()
    assert attack.allows(x_adv, images.images[:3]).all()


def test_what_cannot_be_is_one_line():
    with pytest.raises(UserError, match="the masks have no class 'cart'; did you mean 'car'"):
        measured(Patch(object="cart"))
    with pytest.raises(UserError, match="no.* of the 4 images has pixels of car with place.*--attack.size"):
        measured(Patch(object="car", size=7))
    with pytest.raises(UserError, match="spatial moves the image and not its mask; give --attack.name patch"):
        measured(Spatial())
    with pytest.raises(UserError, match="attack.object: 'car' is a class of pixels"):
        patch(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 2)),
            scenes().images,
            torch.zeros(4, dtype=torch.int64),
            object="car",
        )
