"""The activations of an encoder before they are averaged over the image."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor


def by_resolution(layers: Iterable[Callable[[Tensor], Tensor]], x: Tensor) -> list[Tensor]:
    """Apply the layers one after another; return the last activation of each resolution, in order."""
    maps = []
    for layer in layers:
        after = layer(x)
        if after.shape[2:] != x.shape[2:]:
            maps.append(x)
        x = after
    return [*maps, x]
