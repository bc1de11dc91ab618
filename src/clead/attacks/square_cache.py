"""Answers to images that change in one small window: computed anew is only what the window reaches.

Random search asks a model thousands of times about images of which a few pixels changed since the last question. A convolution
answers the same everywhere else, so the activations are remembered, and each layer is computed in the window that the change can
have reached: a window of k pixels reaches k + 2 after a 3×3 convolution.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import flop_counter
from torch.utils._pytree import tree_map_only

from clead.interfaces import Model

_LIMIT = 2**30
"""Bytes of remembered activations at most; larger models compute everything anew."""
_WORTH = 1.3
"""How many times fewer multiplications make up for the copying."""
_PART = 0.6
"""A layer of which the change reaches more than this part is computed whole, and so are all after it."""
_TOLERANCE = 1e-3
_CHECKED = {1, 2, 3, 10, 50, 250}
"""Questions about one side whose answers are compared with the model's: what goes wrong may do so when a window is kept."""


class Prepared:
    """A function of images that stands for a frozen module on this machine: asking it more often costs nothing but time."""

    def __init__(self, answer: Model) -> None:
        self.answer = answer

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits, (n, K), of images (n, C, H, W)."""
        return self.answer(x)


class WindowedModel:
    """A frozen model, asked again and again about the same images, each with the same square window changed.

    Its answers are those of ``model`` up to rounding. Whatever it cannot follow (an operation that mixes all pixels, noise, too
    many activations, windows too large to be worth it) is computed by ``model`` as usual, so that any model may be given.

    Args:
        model: maps (n, C, H, W) float32 to logits (n, K), each image by itself; in eval mode, parameters frozen and left alone.
            It is asked a few times more than the images are: for what to remember, and whether the answers are the same.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(2 * 32 * 32, 3))
    >>> x = torch.zeros(1, 1, 32, 32)
    >>> windowed = WindowedModel(model)
    >>> with torch.no_grad():
    ...     windowed.remember(x, side=2)
    ...     x[:, :, 5:7, 5:7] = 1
    ...     torch.allclose(windowed(x, 5, 5), model(x), atol=1e-6)
    True
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.side = 0
        self._memory: _Memory | None = None
        self._asked = 0  # since the side changed
        self._work = 0.0

    def remember(self, images: Tensor, side: int) -> None:
        """Go by ``images``, (n, C, H, W), and windows of ``side`` pixels from here on; nothing happens if it does already."""
        if side == self.side:
            return
        self.side, self._asked, self._memory = side, 0, None
        if not self._work:
            _spare_compiler()
            with flop_counter.FlopCounterMode(display=False) as counter:
                self.model(images[:1])
            self._work = counter.get_total_flops() / 2
        memory = _Memory()
        try:
            with _uncompiled():
                self.model(_Changed(memory, images[:, :, :side, :side], 0, 0, memory.slot(images.shape, images)))
        except Exception:  # whatever a model does to such a tensor, images themselves can be given to it
            return
        if memory.worthwhile(self._work):
            memory.finish()
            self._memory = memory

    def __call__(self, images: Tensor, row: int, column: int) -> Tensor:
        """Return the logits, (n, K), of the remembered images with a new window, as ``images`` has them already.

        row, column: the upper left pixel of the window, the same in all images. Call ``settle`` before the next one.
        """
        memory = self._memory
        if memory is None:
            return self.model(images)
        memory.count = memory.constant = 0
        values = images[:, :, row : row + self.side, column : column + self.side].clone()
        try:
            with _uncompiled():
                logits = self.model(_Changed(memory, values, row, column, memory.slot()))
        except Exception:  # as above, or _OtherWay
            self._memory = None
            return self.model(images)
        self._asked += 1
        if self._asked in _CHECKED:
            plain = self.model(images)
            if not torch.allclose(logits, plain, rtol=_TOLERANCE, atol=_TOLERANCE * float(plain.abs().max())):
                self._memory = None
                return plain
        return logits

    def settle(self, better: Tensor) -> None:
        """Keep the new window of the images where ``better``, (n,) bool, and forget the others."""
        if self._memory is not None:
            chosen = better.nonzero()[:, 0]  # synchronises the device
            try:
                for slot in self._memory.slots:
                    slot.settle(better, chosen)
            except RuntimeError:  # a model may make tensors that nobody else may write into
                self._memory = None

    def keep(self, stands: Tensor) -> None:
        """Go on with the images ``stands``, (n,) bool."""
        if self._memory is not None:
            for slot in self._memory.slots:
                slot.keep(stands)


def _uncompiled() -> AbstractContextManager[Any]:
    """Let compiled parts of a model run as they were written, if there can be any: tracing such a tensor would fail, at length."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _spare_compiler() -> None:
    """Let the counter of operations run without loading PyTorch's compiler, which takes two seconds of a start.

    Its function is decorated by ``torch._disable_dynamo``. A PyTorch that does this in another way loads it.
    """
    counter = getattr(flop_counter, "_FlopCounterMode", None)
    plain = getattr(getattr(counter, "__torch_dispatch__", None), "__wrapped__", None)
    if plain is not None and "torch._dynamo" not in sys.modules:
        setattr(plain, "__dynamo_disable", plain)  # noqa: B010 - where the decorator looks for what it is to call


class _OtherWay(Exception):
    """A model did not compute what it had computed before."""


class _Window(NamedTuple):
    """The activations in a window, (n, C, *sides), as they were when they were read: an operation in place makes others of them."""

    values: Tensor
    row: int
    column: int
    sides: tuple[int, int]


class _Slot:
    """The activations after one operation, (n, height, width, C) within a border of zeros, if a later one reads around a window."""

    def __init__(self, shape: torch.Size, whole: Tensor | None) -> None:
        self.shape, self.whole, self.border = shape, whole, 0
        self.cache: Tensor | None = None
        self.pending: _Window | None = None  # what is asked about
        self.old: Tensor | None = None  # what was in their place, if they are in the cache

    def need(self, border: int) -> None:
        """Remember these activations, with at least this border; called while they are first computed."""
        assert self.whole is not None
        if self.cache is None or border > self.border:
            self.border = max(border, self.border)
            whole = self.whole.permute(0, 2, 3, 1)
            self.cache = functional.pad(whole, (0, 0) + (self.border,) * 4).contiguous().clone()

    def at(self, row: int, column: int, sides: tuple[int, int]) -> Tensor:
        """Return a part of the cache, (n, *sides, C), given in pixels without the border."""
        if self.cache is None:
            raise _OtherWay
        row, column = row + self.border, column + self.border
        return self.cache[:, row : row + sides[0], column : column + sides[1]]

    def read(self, x: _Changed, row: int, column: int, sides: tuple[int, int]) -> Tensor:
        """Return a patch with the window of ``x`` in it, (n, C, *sides); it may begin in the border."""
        self.pending = x.now()
        patch = self.at(row, column, sides).clone()
        top, left = max(x.row, row), max(x.column, column)
        bottom = min(x.row + x.sides[0], row + sides[0])
        right = min(x.column + x.sides[1], column + sides[1])
        if top < bottom and left < right:
            inside = x.window[:, :, top - x.row : bottom - x.row, left - x.column : right - x.column]
            patch[:, top - row : bottom - row, left - column : right - column] = inside.permute(0, 2, 3, 1)
        return patch.permute(0, 3, 1, 2)

    def all(self, x: _Changed) -> Tensor:
        """Return the activations with the window of ``x`` in them, (n, C, H, W): the cache itself, until it is settled."""
        self.pending = x.now()
        if self.old is None:
            window = self.at(x.row, x.column, x.sides)
            self.old = window.clone()
            window.copy_(x.window.permute(0, 2, 3, 1))
        return self.at(0, 0, (self.shape[2], self.shape[3])).permute(0, 3, 1, 2)

    def settle(self, better: Tensor, chosen: Tensor) -> None:
        """Keep the window in the images ``better``, (n,) bool, which are the images ``chosen``."""
        x = self.pending
        if x is not None and self.old is not None:
            window = self.at(x.row, x.column, x.sides)
            window.copy_(torch.where(better[:, None, None, None], window, self.old))
        elif x is not None and len(chosen):
            self.at(x.row, x.column, x.sides)[chosen] = x.values[chosen].permute(0, 2, 3, 1)
        self.pending = self.old = None

    def keep(self, stands: Tensor) -> None:
        """Go on with the images ``stands``, (n,) bool."""
        if self.cache is not None:
            self.cache = self.cache[stands]


class _Memory:
    """The slots of all operations in the order in which a forward pass meets them; made in a first pass, found again after it."""

    def __init__(self) -> None:
        self.slots: list[_Slot] = []
        self.count = 0
        self.recording = True
        self.constants: list[Tensor] = []
        self.constant = 0
        self.saved = 0.0  # multiplications per image that convolutions are spared

    def slot(self, shape: torch.Size | None = None, whole: Tensor | None = None) -> _Slot:
        """Return the next slot."""
        if self.recording:
            assert shape is not None
            self.slots.append(_Slot(shape, whole))
        self.count += 1
        if self.count > len(self.slots):
            raise _OtherWay
        return self.slots[self.count - 1]

    def same(self, value: Tensor) -> None:
        """Raise _OtherWay unless ``value`` is what it was in the first pass: it may be made of the images."""
        if self.recording:
            self.constants.append(value.clone())
        elif not torch.equal(value, self.constants[self.constant]):
            raise _OtherWay
        self.constant += 1

    def worthwhile(self, work: float) -> bool:
        """Say whether windows save enough of ``work`` multiplications, and fit into memory."""
        size = sum(slot.cache.numel() * slot.cache.element_size() for slot in self.slots if slot.cache is not None)
        return work > _WORTH * (work - self.saved) and size <= _LIMIT

    def finish(self) -> None:
        """Let go of what only the first pass needs, and of what it wrote: the images as they were."""
        self.recording = False
        for slot in self.slots:
            slot.whole = slot.pending = slot.old = None


class _Changed(Tensor):
    """The activations of images with a changed window; looks like the whole tensor, holds the window.

    window: (n, C, *sides), what is in it; row, column: where it begins.
    """

    memory: _Memory
    window: Tensor
    row: int
    column: int
    slot: _Slot

    @staticmethod
    def __new__(cls: Any, memory: _Memory, values: Tensor, row: int, column: int, slot: _Slot) -> _Changed:
        shape = (len(values), *slot.shape[1:])
        return Tensor._make_wrapper_subclass(cls, shape, dtype=values.dtype, device=values.device)

    def __init__(self, memory: _Memory, values: Tensor, row: int, column: int, slot: _Slot) -> None:
        self.memory, self.window, self.row, self.column, self.slot = memory, values, row, column, slot
        self.sides: tuple[int, int] = (values.shape[2], values.shape[3])

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute the window where it is known how, and the whole tensor otherwise."""
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        rule = _RULES.get(func)
        if rule is not None:
            result = rule(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        copy = func not in _PURE
        args, kwargs = tree_map_only(_Changed, lambda x: x.entire(copy), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # ty: ignore[incompatible-method-override]
        """Compute the whole tensor: what comes past ``__torch_function__``."""
        args, kwargs = tree_map_only(_Changed, lambda x: x.entire(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def entire(self, copy: bool = True) -> Tensor:
        """Return the whole activations, (n, C, H, W)."""
        if self.memory.recording:
            self.slot.need(0)
            assert self.slot.whole is not None
            return self.slot.whole.clone() if copy else self.slot.whole
        whole = self.slot.all(self)
        return whole.clone(memory_format=torch.channels_last) if copy else whole

    def now(self) -> _Window:
        """Return the window as it is at present."""
        return _Window(self.window, self.row, self.column, self.sides)

    def around(self, row: int, column: int, sides: tuple[int, int], border: int) -> Tensor:
        """Return a patch, (n, C, *sides), that may reach ``border`` pixels out of the image, where there are zeros."""
        if self.memory.recording:
            self.slot.need(border)
        return self.slot.read(self, row, column, sides)

    def then(self, func: Callable[[Tensor], Tensor], window: Tensor, row: int, column: int) -> _Changed:
        """Return what follows: ``window`` at (row, column) of ``func`` of the whole."""
        if self.memory.recording:
            assert self.slot.whole is not None
            whole = func(self.slot.whole)
            slot = self.memory.slot(whole.shape, whole)
        else:
            slot = self.memory.slot()
        return _Changed(self.memory, window, row, column, slot)


def _pointwise(func: Callable[..., Tensor], x: Any, *args: Any, **kwargs: Any) -> Any:
    """Apply a function of each pixel by itself."""
    operands = (*args, *kwargs.values())
    if not isinstance(x, _Changed) or any(isinstance(value, Tensor) and value.dim() > 1 for value in operands):
        return NotImplemented
    return x.then(lambda whole: func(whole, *args, **kwargs), func(x.window, *args, **kwargs), x.row, x.column)


def _relu(func: Callable[..., Tensor], x: Any, inplace: bool = False) -> Any:
    result = _pointwise(torch.relu, x)
    return _become(x, result) if inplace else result


def _become(x: Any, result: Any) -> Any:
    """Make ``x`` what an operation in place makes of it."""
    if result is not NotImplemented:
        x.window, x.row, x.column = result.window, result.row, result.column
        x.sides, x.slot = result.sides, result.slot
        return x
    return result


def _batch_norm(func: Callable[..., Tensor], x: Any, *args: Any, **kwargs: Any) -> Any:
    training = kwargs.get("training", args[4] if len(args) > 4 else False)
    return NotImplemented if training else _pointwise(func, x, *args, **kwargs)


def _copy(func: Callable[..., Tensor], x: Any, **kwargs: Any) -> Any:
    return _Changed(x.memory, x.window, x.row, x.column, x.slot)  # what changes one in place gives it another window


def _binary(func: Callable[..., Tensor], x: Any, other: Any, **kwargs: Any) -> Any:
    """Add, subtract, multiply or divide: two windows, or a window and what is the same at all pixels."""
    if isinstance(x, _Changed) and isinstance(other, _Changed):
        return _both(func, x, other, **kwargs)
    if isinstance(x, _Changed):
        if isinstance(other, Tensor):
            if not _uniform(other):
                return NotImplemented
            x.memory.same(other)
        return x.then(lambda value: func(value, other, **kwargs), func(x.window, other, **kwargs), x.row, x.column)
    if isinstance(x, Tensor):
        if not _uniform(x):
            return NotImplemented
        other.memory.same(x)
    return other.then(lambda value: func(x, value, **kwargs), func(x, other.window, **kwargs), other.row, other.column)


def _both(func: Callable[..., Tensor], x: _Changed, other: _Changed, **kwargs: Any) -> Any:
    outer, inner = (x, other) if x.sides >= other.sides else (other, x)
    if x.shape != other.shape or not _contains(outer, inner):
        return NotImplemented
    around = inner.window if inner.sides == outer.sides else inner.around(outer.row, outer.column, outer.sides, 0)
    window = func(outer.window, around, **kwargs) if outer is x else func(around, outer.window, **kwargs)
    second = other.slot.whole

    def whole(value: Tensor) -> Tensor:
        assert second is not None
        return func(value, second, **kwargs)

    return x.then(whole, window, outer.row, outer.column)


def _uniform(value: Tensor) -> bool:
    """Say whether it is the same at all pixels of all images: a number, or (…, C, 1, 1)."""
    spread = value.dim() in (3, 4) and value.shape[-2:] == (1, 1) and value.numel() == value.shape[-3]
    return value.numel() == 1 or spread


def _contains(outer: _Changed, inner: _Changed) -> bool:
    return (
        outer.row <= inner.row
        and outer.column <= inner.column
        and inner.row + inner.sides[0] <= outer.row + outer.sides[0]
        and inner.column + inner.sides[1] <= outer.column + outer.sides[1]
    )


def _conv2d(
    func: Callable[..., Tensor],
    x: Any,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if not isinstance(x, _Changed) or isinstance(padding, str) or _pair(dilation) != (1, 1):
        return NotImplemented
    kernel, stride, padding = (weight.shape[2], weight.shape[3]), _pair(stride), _pair(padding)
    reached = _reached(x, kernel, stride, padding)
    if reached is None:
        return NotImplemented
    values = func(reached.patch(), weight, bias, stride, 0, 1, groups)
    result = x.then(lambda whole: func(whole, weight, bias, stride, padding, 1, groups), values, *reached.begin)
    if x.memory.recording:
        x.memory.saved += weight.numel() * (result.shape[2] * result.shape[3] - result.sides[0] * result.sides[1])
    return result


def _pool2d(
    func: Callable[..., Tensor],
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Average or maximum pooling without padding."""
    kernel = _pair(kernel_size)
    stride = _pair(stride) if stride else kernel
    options = (
        *args[:1],
        *args[2:],
        *(kwargs.get(name) for name in ("ceil_mode", "return_indices", "divisor_override")),
    )
    if (
        not isinstance(x, _Changed)
        or any(options)
        or _pair(padding) != (0, 0)
        or _pair(kwargs.get("dilation", 1)) != (1, 1)
    ):
        return NotImplemented
    reached = _reached(x, kernel, stride, (0, 0))
    if reached is None:
        return NotImplemented
    return x.then(lambda whole: func(whole, kernel, stride), func(reached.patch(), kernel, stride), *reached.begin)


def _pad(func: Callable[..., Tensor], x: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    """Add channels, and nothing else."""
    pad = list(pad)
    if not isinstance(x, _Changed) or len(pad) not in (6, 8) or any(pad[:4]) or any(pad[6:]) or mode != "constant":
        return NotImplemented
    return _pointwise(func, x, tuple(pad), mode=mode, value=value)


class _Reached(NamedTuple):
    """What a kernel carries a change to: a window of its output, ``begin`` and ``sides``, made of a patch of its input."""

    x: _Changed
    begin: tuple[int, int]
    first: tuple[int, int]
    seen: tuple[int, int]
    border: int

    def patch(self) -> Tensor:
        """Return what the kernel sees, (n, C, *seen)."""
        return self.x.around(*self.first, self.seen, self.border)


def _reached(
    x: _Changed, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> _Reached | None:
    """Return what is reached of the output, or None if that is too much of it to be worth it.

    Output o sees the pixels o·s − p … o·s − p + k − 1. A window that would end outside is moved into the image, which keeps it a
    superset, so that its sides do not depend on where it is.
    """
    begin, first, seen, share = [], [], [], 1.0
    for start, side, size, k, s, p in zip(
        (x.row, x.column), x.sides, x.shape[2:], kernel, stride, padding, strict=True
    ):
        cells = (size + 2 * p - k) // s + 1
        reached = min((side + k - 2) // s + 1, cells)
        begin.append(min(max(-((k - 1 - p - start) // s), 0), cells - reached))  # ⌈(start + p − k + 1) / s⌉
        first.append(begin[-1] * s - p)
        seen.append((reached - 1) * s + k)
        share *= max(reached / cells, seen[-1] / (size + 2 * p))
    if share > _PART:
        return None
    return _Reached(x, (begin[0], begin[1]), (first[0], first[1]), (seen[0], seen[1]), max(padding))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (tuple(value) * 2)[:2]


_FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad", "is_cuda")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point),
}
"""What the whole tensor says of itself without being computed."""
_PURE = {
    torch.conv2d,
    torch.relu,
    functional.relu,
    functional.avg_pool2d,
    torch.add,
    Tensor.add,
    Tensor.__add__,
    Tensor.__radd__,
}
"""Functions that may be given a cache itself: they change nothing in place, and return no view of it."""
_RULES: dict[Any, Callable[..., Any]] = {
    torch.conv2d: _conv2d,
    functional.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    torch.relu_: lambda func, x: _relu(func, x, inplace=True),
    Tensor.relu_: lambda func, x: _relu(func, x, inplace=True),
    functional.batch_norm: _batch_norm,
    functional.dropout: lambda func, x, p=0.5, training=True, inplace=False: NotImplemented if training else x,
    functional.avg_pool2d: _pool2d,
    torch.max_pool2d: _pool2d,
    functional.max_pool2d: _pool2d,
    functional.pad: _pad,
    Tensor.contiguous: lambda func, x, **kwargs: x,
    Tensor.clone: _copy,
    torch.clone: _copy,
    **dict.fromkeys((torch.sigmoid, torch.tanh, functional.gelu, Tensor.sigmoid, Tensor.tanh), _pointwise),
    **dict.fromkeys(
        (
            *(torch.add, torch.sub, torch.mul, torch.div),
            *(Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.__rsub__, Tensor.__rdiv__),
            *(Tensor.__add__, Tensor.__sub__, Tensor.__mul__, Tensor.__truediv__, Tensor.__radd__, Tensor.__rmul__),
        ),
        _binary,
    ),
    **dict.fromkeys(
        (Tensor.add_, Tensor.sub_, Tensor.mul_, Tensor.div_, Tensor.__iadd__, Tensor.__isub__, Tensor.__imul__),
        lambda func, x, other, **kwargs: _become(x, _binary(_OUT_OF_PLACE[func], x, other, **kwargs)),
    ),
}
_OUT_OF_PLACE = {
    Tensor.add_: torch.add,
    Tensor.sub_: torch.sub,
    Tensor.mul_: torch.mul,
    Tensor.div_: torch.div,
    Tensor.__iadd__: torch.add,
    Tensor.__isub__: torch.sub,
    Tensor.__imul__: torch.mul,
}
