"""The patch attack: a square of the image may take any values, and the search also chooses where it is."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from clead.attacks import UNRESTRICTED
from clead.errors import UserError
from clead.interfaces import Model
from clead.settings import Ratio, setting, settings
from clead.tasks.classification import CLASSIFICATION
from clead.threats.geometry import per_image, sign


@UNRESTRICTED.register("patch")
@settings
class Patch:
    """Maximise the margin over the content and the place of one square patch per image.

    Source: the location-optimised patches of Rao et al. 2020, arXiv:2005.02313, section 3: random start, sign-gradient ascent on
    the pixels of the patch, and after each step a move of the patch, content included, by ``stride`` pixels in one random
    direction of four if it raises the objective. (Brown et al. 2017, arXiv:1712.09665, learn one patch for all images; this is one
    per image, the worst case.) Departures: the margin instead of the cross-entropy, whose gradient vanishes on a confident
    model; an image whose patch has just moved keeps its content for one step, as the gradient belongs to the place it has left;
    an image leaves the search when it falls.
    """

    size: Ratio = setting(
        Ratio("1/16"),
        "how large the square is: 8×8 of 32×32 by default",
        unit="fraction of the image's area if below 1, else pixels of its side",
        gt=0,
    )
    steps: int = setting(100, "gradient steps per restart", unit="steps", ge=1)
    step_size: Ratio = setting(Ratio("0.05"), "length of a step", unit="pixels in [0, 1]", gt=0)
    stride: int = setting(2, "how far the patch moves at once; 0: it stays where it started", unit="pixels", ge=0)
    restarts: int = setting(5, "independent random places and contents", unit="starts", ge=1)
    place: Literal["anywhere", "corner"] = setting(
        "anywhere", "where it may be: anywhere, or in one of the four corners, where it stays"
    )
    object: str | None = setting(
        None,
        "a class of masks, by name: the patch lies off its pixels, and these alone count; else all outside the patch",
    )

    def side(self, height: int, width: int) -> int:
        """Return the patch's side in pixels, at least 1; raises UserError if it does not fit into the image."""
        side = round(self.size) if self.size >= 1 else max(1, round(math.sqrt(self.size * height * width)))
        if side > min(height, width):
            raise UserError(
                f"the patch must fit into the image of {height}×{width} pixels, got size {self.size} = a side of {side}; "
                f"give size {min(height, width)} (pixels) at most, or a fraction of the area such as 0.05"
            )
        return side

    def worst(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return each image with a patch that it falls to, else with that of the largest margin; of masks see ``worst_patch``."""
        if self.object is not None:
            raise UserError(
                f"attack.object: {self.object!r} is a class of pixels, and here one is of an image; leave it out"
            )
        side = self.side(*x.shape[2:])
        result, largest = x.clone(), torch.full((len(x),), -torch.inf, device=x.device, dtype=x.dtype)
        rows = torch.arange(len(x), device=x.device)
        rows = rows[CLASSIFICATION.correct(model(x), y)]
        for _ in range(self.restarts):
            if len(rows):  # synchronises the device
                rows = self._restart(model, x, y, side, rows, result, largest, generator)
        return result

    def _restart(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        side: int,
        rows: Tensor,
        result: Tensor,
        largest: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Optimise one random patch per image of ``here``, note the best in ``result``, and return which images hold."""
        content = torch.rand((len(rows), x.shape[1], side, side), generator=generator, device=x.device, dtype=x.dtype)
        room = torch.tensor([x.shape[2] - side, x.shape[3] - side], device=x.device)
        place = (torch.rand((len(rows), 2), generator=generator, device=x.device) * (room + 1)).long().clamp_max(room)
        if self.place == "corner":
            place = torch.where(2 * place > room, room, 0)
        for step in range(self.steps + 1):
            x_adv = paste(x[rows], content, place)
            with torch.enable_grad():
                x_adv.requires_grad_()
                logits = model(x_adv)
                value = CLASSIFICATION.margin(logits, y[rows])
                (gradient,) = torch.autograd.grad(value.sum(), x_adv)
            x_adv, value = x_adv.detach(), value.detach().to(x.dtype)
            fell = ~CLASSIFICATION.correct(logits.detach(), y[rows])
            better = fell | (value > largest[rows])
            result[rows[better]], largest[rows[better]] = x_adv[better], value[better]
            content, place, value, rows = content[~fell], place[~fell], value[~fell], rows[~fell]
            if step == self.steps or not len(rows):  # synchronises the device
                break
            slope = cut(gradient[~fell], place, side)
            moved = torch.zeros(len(rows), dtype=torch.bool, device=x.device)
            if self.stride and self.place == "anywhere":
                heading = torch.randint(4, (len(rows),), generator=generator, device=x.device)
                ways = self.stride * torch.tensor([[0, 1], [1, 0], [0, -1], [-1, 0]], device=x.device)
                there = torch.minimum((place + ways[heading]).clamp_min(0), room)
                gain = CLASSIFICATION.margin(model(paste(x[rows], content, there)), y[rows]) - value
                moved = gain > 0
                place = torch.where(moved[:, None], there, place)
            stepped = (content + self.step_size * sign(slope)).clamp_(0, 1)
            content = torch.where(per_image(moved, content), content, stepped)
        return rows

    def allows(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return which images differ from ``x`` inside one square of the patch's side only, (B,); exactly, without rounding."""
        side = self.side(*x.shape[2:])
        changed = (x_adv != x).any(1)
        extent = []
        for axis in (2, 1):
            lines = changed.any(axis)  # which rows, then which columns have a changed pixel
            number = torch.arange(lines.shape[1], device=x.device)
            last = torch.where(lines, number, -1).amax(1)
            first = torch.where(lines, number, lines.shape[1]).amin(1)
            extent.append(last - first + 1)  # negative if nothing has changed
        within = (extent[0] <= side) & (extent[1] <= side)
        if self.place == "anywhere":
            return within
        height, width = x.shape[2:]
        in_corner = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for rows in (slice(0, side), slice(height - side, height)):
            for columns in (slice(0, side), slice(width - side, width)):
                outside = changed.clone()
                outside[:, rows, columns] = False
                in_corner |= ~outside.flatten(1).any(1)
        return in_corner


def _window(place: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the index (image, row, column) of every pixel of the patches, each broadcastable to (B, side, side)."""
    along = torch.arange(side, device=place.device)
    rows, columns = place[:, :1] + along, place[:, 1:] + along
    return torch.arange(len(place), device=place.device)[:, None, None], rows[:, :, None], columns[:, None, :]


def paste(x: Tensor, content: Tensor, place: Tensor) -> Tensor:
    """Return a copy of ``x``, (B, C, H, W), with ``content``, (B, C, s, s), at ``place``, (B, 2) int64: top, left."""
    image, rows, columns = _window(place, content.shape[-1])
    pasted = x.clone()
    pasted[image, :, rows, columns] = content.permute(0, 2, 3, 1)
    return pasted


def cut(x: Tensor, place: Tensor, side: int) -> Tensor:
    """Return the squares (B, C, side, side) of ``x`` at ``place``, (B, 2) int64: top, left."""
    image, rows, columns = _window(place, side)
    return x[image, :, rows, columns].permute(0, 3, 1, 2)
