"""Weights that fit a network in part: what has the same name and shape is taken, and a list says what is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional

from clead.errors import UserError, first_of

LEAST = 0.5
"""The share of a network's weights, but for its head, that must fit; with less it is another network."""
_MOST_PREFIXES = 9  # class and register tokens before the grid of a position embedding


def load_matching(module: nn.Module, given: Mapping[str, Tensor], source: str, num_classes: int) -> list[str]:
    """Load what fits of ``given`` into ``module``, in place, and return what must be said of it.

    A tensor fits if its name and shape do. Position embeddings of another grid are resized (bicubic). A layer that differs in
    nothing but the number of its outputs, and has ``num_classes`` here, is a head: it stays as it was drawn. So do the parts that
    the module's ``new_parts`` names, if ``given`` has none of them.

    Args:
        module: the network, whose other weights stay as they are.
        given: tensors by the names of ``module``'s state.
        source: where they are from, for messages.
        num_classes: K of the data.

    Raises UserError if less than half of the network's weights fit, its head left out.
    """
    expected = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    content, notes = _matched(expected, given)
    other = [name for name in expected if name in given and name not in content]
    heads = sorted(
        {name.rpartition(".")[0] for name in other if _is_head(expected[name], given[name], num_classes)},
    )
    pixels = [name for name in ("normalize.mean", "normalize.std") if name in expected and name not in given]
    constant = ("num_batches_tracked", *pixels)
    parts = getattr(module, "new_parts", ())
    new = tuple(f"{piece}." for piece in parts if not any(name.startswith(f"{piece}.") for name in given))
    lacking = [
        name for name in expected if name not in given and not name.endswith(constant) and not name.startswith(new)
    ]
    unused = [name for name in given if name not in expected]
    kind = type(getattr(module, "module", module)).__name__
    body = {
        name
        for name, _ in module.named_parameters()
        if name.rpartition(".")[0] not in heads and not name.startswith(new)
    }
    total = sum(expected[name].numel() for name in body)
    share = sum(expected[name].numel() for name in body & content.keys()) / max(1, total)
    other = [name for name in other if name.rpartition(".")[0] not in heads]
    details = _details(expected, given, other, lacking, unused, source)
    if not content or share < LEAST:
        raise UserError(
            f"{source} is of another architecture: {len(content)} of the {len(expected)} tensors of {kind} fit, {share:.0%} of its "
            f"weights ({'; '.join(details) or 'no name is the same'}); make the network that was trained: --model.name NAME"
        )
    count = f"{len(content)} of the {len(expected)} tensors of {kind}"
    loaded = f"{count} are from {source}, {share:.0%} of the weights before the head"
    for head in heads:
        name = next(name for name in expected if name.rpartition(".")[0] == head and name in given)
        notes.append(f"the head {head} is new, drawn from the seed: {given[name].shape[0]} → {num_classes} classes")
    notes += [f"the {piece.removesuffix('.')} is new, drawn from the seed" for piece in new]
    if pixels:
        notes.append(
            f"{source} lacks {first_of(pixels)}: pixels are normalised as this model does it, perhaps not as there"
        )
    module.load_state_dict(content, strict=False)
    return [loaded, *notes, *details]


def _matched(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors that fit, position embeddings resized, and a note for each of these."""
    content, notes = {}, []
    for name in expected.keys() & given.keys():
        have, want = given[name], expected[name]
        if have.shape == want.shape:
            content[name] = have
        elif "pos" in name.lower() and (grids := _grids(have.shape, want.shape)) is not None:
            old, new = grids
            content[name] = _resized(have, old, new)
            notes.append(f"the position embeddings {name} were resized from {old} × {old} to {new} × {new} (bicubic)")
    return content, notes


def _grids(have: Sequence[int], want: Sequence[int]) -> tuple[int, int] | None:
    """Return the sides of both square grids of tokens if (1, P + old², D) and (1, P + new², D) differ in these alone."""
    if len(have) != 3 or len(want) != 3 or (have[0], have[2]) != (want[0], want[2]):
        return None
    for prefixes in range(_MOST_PREFIXES):
        old, new = (isqrt(max(0, shape[1] - prefixes)) for shape in (have, want))
        if old and new and (old**2 + prefixes, new**2 + prefixes) == (have[1], want[1]):
            return old, new
    return None


def _resized(embeddings: Tensor, old: int, new: int) -> Tensor:
    """Return position embeddings (1, P + old², D) as (1, P + new², D); the P tokens before the grid stay."""
    prefixes = embeddings.shape[1] - old**2
    grid = embeddings[:, prefixes:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(1, new**2, -1).to(embeddings.dtype)
    return torch.cat([embeddings[:, :prefixes], grid], 1)


def _is_head(want: Tensor, have: Tensor, num_classes: int) -> bool:
    same_inside = want.dim() == have.dim() and want.shape[1:] == have.shape[1:]
    outputs = (1, 2) if num_classes == 2 else (num_classes,)  # two classes may be told by one logit
    return bool(want.dim()) and same_inside and want.shape[0] in outputs


def _details(
    expected: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    other: Sequence[str],
    lacking: Sequence[str],
    unused: Sequence[str],
    source: str,
) -> list[str]:
    details = []
    if other:
        shapes = [f"{name} {tuple(given[name].shape)}, not {tuple(expected[name].shape)}" for name in other]
        details.append(f"{len(other)} are not taken, of another shape there: {first_of(shapes)}")
    if lacking:
        details.append(f"{len(lacking)} are not in {source}: {first_of(lacking)}")
    if unused:
        details.append(f"{len(unused)} of {source} have no place in it: {first_of(unused)}")
    return details
