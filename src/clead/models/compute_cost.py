"""What a computation costs, in forward passes of one image."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from clead.models.split import SplitModel


class CostMeter:
    """Count the images that go forward and backward through ``model`` inside a ``with`` block.

    A forward costs 1 per image, a backward to the inputs only 1, a backward to inputs and weights 2: the
    usual count, each of the two products of a layer's backward costing as much as its forward. A backward
    counts as full if any parameter required a gradient when the forward ran, and not at all if of a SplitModel only the
    last layer did (one layer's product; the encoder has none). One that is itself to be differentiated
    (``create_graph``) counts as one to the inputs, and the double backward through it 4: to its own two factors, and
    through the forward that they came from. A SplitModel is counted by
    whichever of its methods runs it, compiled or not; any other module by its calls. Meters nest.

    Attributes:
        forwards: images forwarded.
        input_backwards: images in backwards that went to the inputs only.
        full_backwards: images in backwards that also went to weights.
        calls: forwards and backwards, however many images each had.

    >>> import torch
    >>> net = nn.Linear(2, 2)
    >>> with CostMeter(net) as meter:
    ...     net(torch.ones(3, 2)).sum().backward()
    >>> meter.forwards, meter.backwards, meter.forward_equivalents
    (3, 3, 9)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forwards = 0
        self.input_backwards = 0
        self.full_backwards = 0
        self.calls = 0

    @property
    def backwards(self) -> int:
        """Images that went backward, of either kind."""
        return self.input_backwards + self.full_backwards

    @property
    def forward_equivalents(self) -> int:
        """Cost in forward passes of one image."""
        return self.forwards + self.input_backwards + 2 * self.full_backwards

    def __enter__(self) -> CostMeter:
        if isinstance(self.model, SplitModel):
            self.model._observers.append(self._observe)
        else:
            self._handle = self.model.register_forward_hook(self._hook, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self.model, SplitModel):
            self.model._observers.remove(self._observe)
        else:
            self._handle.remove()

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        outputs = output if isinstance(output, tuple) else (output,)
        self._observe(x, tuple(value for value in outputs if isinstance(value, Tensor)))

    def _observe(self, x: Tensor, outputs: tuple[Tensor, ...]) -> None:
        images = len(x)
        self.forwards += images
        self.calls += 1
        tracked = [value for value in outputs if value.requires_grad]
        # Of features and logits the logits alone: the encoder is frozen, and the backward ends in the last layer.
        if not tracked or (isinstance(self.model, SplitModel) and not outputs[0].requires_grad):
            return
        full = any(parameter.requires_grad for parameter in self.model.parameters())

        def count(gradient: Tensor) -> None:
            self.calls += 1
            # With create_graph; the double backward's way through the forward is seen when it comes.
            if torch.is_grad_enabled():
                self.input_backwards += images
                self.full_backwards += images
            elif full:
                self.full_backwards += images
            else:
                self.input_backwards += images

        # Once per backward, whichever of the outputs the loss used.
        register_multi_grad_hook(tracked, count, mode="any")
