"""The patch attack on masks: what is under the square counts for nothing, what counts are the pixels outside it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clead.attacks.patch import Patch, cut, paste
from clead.interfaces import Model
from clead.losses.pixels import VOID, masked_cross_entropy
from clead.tasks.segmentation import SEGMENTATION, upsampled
from clead.threats.geometry import per_image, sign


def allowed_places(patch: Patch, avoided: Tensor) -> Tensor:
    """Return where the patch may lie, (B, H−s+1, W−s+1) bool by its top left pixel: off the pixels ``avoided``, (B, H, W) bool."""
    side = patch.side(*avoided.shape[1:])
    allowed = F.max_pool2d(avoided[:, None].float(), side, stride=1)[:, 0] == 0
    if patch.place == "corner":
        corner = torch.zeros_like(allowed)
        corner[:, :: max(1, allowed.shape[1] - 1), :: max(1, allowed.shape[2] - 1)] = True
        allowed &= corner
    return allowed


def worst_patch(
    patch: Patch, model: Model, x: Tensor, y: Tensor, allowed: Tensor, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return each image with the patch that turned the largest share of the pixels outside it, and the masks, void under it.

    The search is that of ``Patch``, whose gradient step climbs the cross-entropy of the pixels that are right still (Nesti et al.
    2022, arXiv:2108.06179, leave out wrong ones too): no image is ever broken as a whole, so it ends with its steps.

    Args:
        patch: its settings.
        model: logits (B, K, h, w).
        x: (B, C, H, W).
        y: (B, H, W) int64; pixels that do not count are void.
        allowed: places, see ``allowed_places``; at least one of each image.
        generator: of the starts and moves.
    """
    side = patch.side(*x.shape[2:])
    room = torch.tensor(allowed.shape[1:], device=x.device) - 1
    ways = patch.stride * torch.tensor([[0, 1], [1, 0], [0, -1], [-1, 0]], device=x.device)
    right = SEGMENTATION.correct(model(x), y)
    result, masks, most = x.clone(), y.clone(), torch.full((len(x),), -1.0, device=x.device)

    def value(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = upsampled(model(images), target.shape[1:])
        return masked_cross_entropy(logits, target), logits

    for _ in range(patch.restarts):
        content = torch.rand((len(x), x.shape[1], side, side), generator=generator, device=x.device, dtype=x.dtype)
        chosen = torch.multinomial(allowed.flatten(1).float(), 1, generator=generator)[:, 0]
        place = torch.stack([chosen // allowed.shape[2], chosen % allowed.shape[2]], 1)
        for step in range(patch.steps + 1):
            x_adv, target = paste(x, content, place), outside(y, place, side)
            with torch.enable_grad():
                x_adv.requires_grad_()
                loss, logits = value(x_adv, target)
                (gradient,) = torch.autograd.grad(loss.sum(), x_adv)
            turned = right & (target != VOID) & ~SEGMENTATION.correct(logits.detach(), target)
            share = turned.sum((1, 2)) / (target != VOID).sum((1, 2)).clamp_min(1)
            better = share > most
            result[better], masks[better], most[better] = x_adv.detach()[better], target[better], share[better]
            if step == patch.steps:
                break
            moved = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            slope = cut(gradient, place, side)
            if patch.stride and patch.place == "anywhere":
                heading = torch.randint(4, (len(x),), generator=generator, device=x.device)
                there = torch.minimum((place + ways[heading]).clamp_min(0), room)
                gain = value(paste(x, content, there), outside(y, there, side))[0] - loss.detach()
                moved = (gain > 0) & allowed[torch.arange(len(x), device=x.device), there[:, 0], there[:, 1]]
                place = torch.where(moved[:, None], there, place)
            stepped = (content + patch.step_size * sign(slope)).clamp_(0, 1)
            content = torch.where(per_image(moved, content), content, stepped)
    return result, masks


def outside(y: Tensor, place: Tensor, side: int) -> Tensor:
    """Return masks (B, H, W) that are void in the squares at ``place``, (B, 2) int64: top, left."""
    void = y.new_full((len(y), 1, side, side), VOID)
    return paste(y[:, None], void, place)[:, 0]
