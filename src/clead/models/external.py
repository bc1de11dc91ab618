"""Models that are not ours: each forward gets a tensor of its own, and the logits are picked out of whatever comes back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from clead.errors import UserError, out_of_memory

_log = logging.getLogger("clead")
_NAMES = ("logits", "out", "output")
"""Names under which libraries return the logits; the first that a model uses counts."""
_DEPTH = 3
_LOW = (torch.float16, torch.bfloat16)


class ModelError(UserError, RuntimeError):
    """The forward of a user's model failed; the message names the model, its own error, and a remedy where one is known."""


class ModelIO:
    """How a module that is not ours is called: what goes in, and which of what comes out are the logits.

    The module gets a fresh tensor that is no leaf, so it may write into it. Where its weights are of another type and it refuses
    the images as they are, they are cast to the type of its weights; logits below float32 become float32, float64 stays.

    Args:
        output: name or index of the logits in what the module returns, such as ``"logits"``, ``0`` or ``"head.1"``; None: they are
            recognised where one tensor alone can be the logits.

    Attributes:
        notes: what was decided for the user, one sentence each; said once by the logger ``clead``, and part of records.
        per_pixel: whether (B, K, h, w) can be logits, too, one row for each pixel of a mask.
    """

    def __init__(self, output: str | int | None = None) -> None:
        self.output = None if output is None else str(output)
        self.notes: list[str] = []
        self.per_pixel = False
        self._casts: set[tuple[torch.dtype, torch.dtype]] = set()

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the logits, (B, K), of images (B, C, H, W); raises ModelError if the module fails or returns none."""
        return self.logits(module, self.run(module, x))

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the tensor of the logits as the module gives it: (B, K), or (B,) or (B, 1) of one logit for two classes."""
        return self.pick(module, self.forward(module, x), x.shape[0])

    def forward(self, module: nn.Module, x: Tensor) -> Any:
        """Return what the module makes of a copy of ``x``; raises ModelError if it fails."""
        try:
            return self.answer(module, x)
        except (KeyboardInterrupt, MemoryError, UserError):
            raise
        except BaseException as error:  # also SystemExit: a run that ends without a result must not end with 0
            if out_of_memory(error):
                raise
            raise failure(module, x, error) from error

    def answer(self, module: nn.Module, x: Tensor) -> Any:
        """Return what the module makes of a copy of ``x``, whatever it raises; what a compiler can follow."""
        weight = next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype)
        if weight == x.dtype:
            return module(x.clone())
        if (x.dtype, weight) not in self._casts:
            try:
                return module(x.clone())  # it may cast by itself, or have weights of several types
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                first = error
            try:
                output = module(x.to(weight))
            except RuntimeError:
                raise first from None
            self._casts.add((x.dtype, weight))
            self.note(f"{_kind(module)} has weights in {_type(weight)}: images are cast to that before each forward")
            return output
        return module(x.to(weight))

    def __deepcopy__(self, memo: Any) -> ModelIO:
        return self  # a copy of the model is called as the model is, and what is said of it is said

    def note(self, text: str) -> None:
        """Keep ``text`` for the record, and log it the first time."""
        if text not in self.notes:
            self.notes.append(text)
            _log.warning("note: %s", text)

    def pick(self, module: nn.Module, output: Any, images: int) -> Tensor:
        """Return the one tensor of ``output`` that holds the logits of so many images; raises ModelError if there is none."""
        if isinstance(output, Tensor) and self.output is None:
            return self._fitting(module, output, images)
        kind, tensors = _kind(module), _tensors(output)
        if not tensors:
            raise ModelError(
                f"{kind} must return logits, a tensor (B, K), got a {type(output).__name__} without any tensor; "
                "let its forward return the logits"
            )
        if self.output is not None:
            if self.output not in tensors:
                raise ModelError(
                    f"model.output: {kind} returns no {self.output!r}, but {_listed(tensors)}; give one of these names"
                )
            return self._fitting(module, tensors[self.output], images)
        plausible = [name for name, value in tensors.items() if _plausible(value, images)]
        fitting = [name for name, value in tensors.items() if self._shaped(value, images) is not None]
        named = [name for name in _NAMES if name in fitting]
        plausible = plausible or fitting  # one logit (B,), or (B, K, 1, 1) of a convolution
        if named:
            name = named[0]
        elif len(plausible) == 1:
            name = plausible[0]
        elif module.training and _alike([tensors[name] for name in plausible]):
            name = plausible[0]  # auxiliary outputs follow the main one
        else:
            per_pixel = not self.per_pixel and any(each.dim() == 4 for each in tensors.values())
            masks = "; for a class per pixel give --task segmentation" * per_pixel
            raise ModelError(
                f"{kind} returns {_listed(tensors)}, and {'several' if plausible else 'none'} of them can be the logits "
                f"(B, K) of {_count(images)}; name the one: --model.output {next(iter(plausible or tensors))} "
                f"(in Python: clead.adapt(model, sample_shape=(C, H, W), output=...)){masks}"
            )
        mode = " in train mode" if module.training else ""
        self.note(
            f"{kind} returns {', '.join(tensors)}{mode}: {name!r} is taken for the logits; another one: --model.output NAME"
        )
        return self._fitting(module, tensors[name], images)

    def logits(self, module: nn.Module, picked: Tensor) -> Tensor:
        """Return ``picked`` as logits (B, K ≥ 2): one logit z per image becomes [0, z]."""
        if picked.dtype in _LOW and not torch.is_autocast_enabled(picked.device.type):
            self.note(f"{_kind(module)} gives logits in {_type(picked.dtype)}: everything after them is in float32")
            picked = picked.float()
        if picked.dim() == 4 or (picked.dim() == 2 and picked.shape[1] > 1):
            return picked
        self.note(
            f"{_kind(module)} gives one logit z per image: it is taken as the two logits [0, z], so that z > 0 means class 1"
        )
        z = picked.reshape(-1, 1)
        return torch.cat([torch.zeros_like(z), z], 1)

    def _fitting(self, module: nn.Module, value: Tensor, images: int) -> Tensor:
        """Return ``value`` as (B, K), (B, 1) or (B,); raises ModelError for any other shape or type."""
        if value.is_quantized:
            value = value.dequantize()
        if value.layout != torch.strided:
            value = value.to_dense()
        fitting = self._shaped(value, images)
        if fitting is not None:
            return fitting
        shape = f"{_type(value.dtype)} {tuple(value.shape)}"
        raise ModelError(
            f"{_kind(module)} must return logits (B, K) for {_count(images)}, floating point, got {shape}{_remedy(value, images)}"
        )

    def _shaped(self, value: Tensor, images: int) -> Tensor | None:
        """Return ``value`` as (B, K), (B, 1) or (B,) if it can be the logits of so many images, else None."""
        if not (value.is_floating_point() or value.is_quantized):
            return None
        if len(value.shape) == 2 and value.shape[0] == images and value.shape[1]:
            return value
        if value.dim() > 2 and value.shape[0] == images and value.shape[2:] == (1,) * (value.dim() - 2):
            return value.flatten(1)  # (B, K, 1, 1), of a convolution
        if self.per_pixel and value.dim() == 4 and value.shape[0] == images and value.shape[1] > 1:
            return value
        if value.dim() == 1 and value.shape[0] == images:
            return value
        if images == 1 and value.dim() < 2:
            return value.reshape(1, -1)  # squeezed
        return None


class ExternalModel(nn.Module):
    """Any user's module as a model of (B, C, H, W) images in [0, 1] -> logits (B, K); see ``ModelIO`` for what it takes care of.

    State, names of the parameters and what it prints are those of the module, so that a record's fingerprint stays the module's.

    >>> class Writes(nn.Module):
    ...     def forward(self, x):
    ...         return {"logits": x.sub_(0.5).flatten(1)}
    >>> x = torch.ones(2, 1, 1, 3)
    >>> ExternalModel(Writes())(x).tolist(), x.min().item()
    ([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]], 1.0)
    """

    def __init__(self, module: nn.Module, output: str | int | None = None) -> None:
        super().__init__()
        self.module = unwrapped(module)
        self.io = io_of(self.module, output)
        self.training = False  # it has no mode of its own

    @property
    def notes(self) -> list[str]:
        """What was decided for the user about inputs and outputs."""
        return self.io.notes

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (B, K)."""
        return self.io(self.module, x)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's own state."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the module's own state."""
        return self.module.load_state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Yield the module's parameters by the names that it gives them."""
        return self.module.named_parameters(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(self.module)


_IO: WeakKeyDictionary[nn.Module, ModelIO] = WeakKeyDictionary()


def io_of(module: nn.Module, output: str | int | None = None) -> ModelIO:
    """Return how ``module`` is called, the same object each time for one ``output``, so that notes about it are said once."""
    io = _IO.get(module)
    if io is None or io.output != (None if output is None else str(output)):
        io = _IO[module] = ModelIO(output)
    return io


def unwrapped(module: Any) -> nn.Module:
    """Return the module itself: without ``torch.compile`` and data parallelism around it, which change how it runs, not what it is.

    Raises UserError for what is no module, with the line that makes one.
    """
    if isinstance(module, torch.export.ExportedProgram):
        raise UserError("model must be a torch.nn.Module, got an ExportedProgram; give program.module()")
    if not isinstance(module, nn.Module):
        raise UserError(f"model must be a torch.nn.Module, got a {type(module).__name__}; wrap it in one")
    inner = getattr(module, "_orig_mod", None) if type(module).__name__ == "OptimizedModule" else None
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = module.module
    if inner is not None:
        return unwrapped(inner)
    if any(not is_lazy(value) and value.is_inference() for value in [*module.parameters(), *module.buffers()]):
        with torch.inference_mode(False):  # no gradient goes through such weights: those of the copy are usual ones
            return copy.deepcopy(module)
    return module


def materialise(module: nn.Module, x: Tensor) -> None:
    """Give lazy layers their shapes by a forward of images ``x``; nothing happens where there are none."""
    if any(map(is_lazy, [*module.parameters(), *module.buffers()])):
        training = [(submodule, submodule.training) for submodule in module.modules()]
        try:
            for submodule, _ in training:
                submodule.training = False
            with torch.no_grad():
                module(x.clone())
        except Exception as error:
            raise failure(module, x, error) from error
        finally:
            for submodule, flag in training:
                submodule.training = flag


def prepare(model: nn.Module, x: Tensor) -> None:
    """Give the lazy layers of ``model`` their shapes, if it is an ExternalModel that has any, by images ``x``, (B, C, H, W)."""
    if isinstance(model, ExternalModel):
        materialise(model.module, x)


def failure(module: nn.Module, x: Tensor, error: BaseException) -> ModelError:
    """Return the one-line error for a forward that raised ``error`` on images ``x``."""
    lines = str(error).strip().splitlines() or [""]
    # TorchScript gives its own trace first, and the error last.
    reason = lines[-1] if "TorchScript" in lines[0] else lines[0]
    remedy = ""
    device = next((p.device for p in module.parameters()), x.device)
    if device != x.device:
        remedy = f"; its weights are on {device} and the images on {x.device}: move it with model.to({x.device.type!r})"
    elif "more than 1 value per channel" in reason:
        remedy = "; batch-norm in train mode needs two images or more at once: set --data.batch_size to 2 or more"
    shape = f"{tuple(x.shape[1:])}{' in train mode' if module.training else ''}"
    return ModelError(f"{_kind(module)} fails on images of shape {shape}: {type(error).__name__}: {reason}{remedy}")


@contextmanager
def backward_of(model: nn.Module) -> Generator[None, None, None]:
    """Let the block take a gradient through ``model``; raises ModelError, with a remedy where one is known, if that fails."""
    try:
        yield
    except (MemoryError, UserError):
        raise
    except (Exception, SystemExit) as error:
        if out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        remedy = ""
        if "inplace operation" in reason:
            reason = "a tensor that the gradient needs is changed in place"
            remedy = "; write h = h.relu() instead of h.relu_(), and h = h + x instead of h += x"
        elif "require" in reason and "grad" in reason:
            remedy = "; take detach() and no_grad out of its forward"
        kind = _kind(getattr(model, "module", model))
        raise ModelError(f"the gradient of {kind} fails: {type(error).__name__}: {reason}{remedy}") from error


def _tensors(output: Any, prefix: str = "", depth: int = _DEPTH) -> dict[str, Tensor]:
    """Return the tensors in a nested output by their path: names of fields, keys, indices."""
    if isinstance(output, Tensor):
        return {prefix.removesuffix(".") or "0": output}
    if not depth:
        return {}
    if isinstance(output, Mapping):
        items = [(str(key), value) for key, value in output.items()]
    elif isinstance(output, tuple | list):
        items = list(zip(getattr(output, "_fields", map(str, range(len(output)))), output, strict=False))
    elif isinstance(output, nn.Module):
        return {}
    else:
        slots = [name for kind in type(output).__mro__ for name in _slots(kind)]
        names = [*getattr(output, "__dict__", {}), *slots, *_NAMES]
        names = [name for name in names if hasattr(output, name)]
        items = [(name, getattr(output, name)) for name in dict.fromkeys(names)]
    tensors: dict[str, Tensor] = {}
    for name, value in items:
        tensors |= _tensors(value, f"{prefix}{name}.", depth - 1)
    return tensors


def _slots(kind: type) -> Iterable[str]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else slots


def _plausible(value: Tensor, images: int) -> bool:
    return (value.is_floating_point() or value.is_quantized) and value.dim() == 2 and value.shape[0] == images


def _alike(values: list[Tensor]) -> bool:
    return len({value.shape for value in values}) == 1


def _count(images: int) -> str:
    return f"{images} images" if images != 1 else "1 image"


def _remedy(value: Tensor, images: int) -> str:
    if not value.is_floating_point():
        return "; return the values before argmax or rounding"
    if value.dim() == 4 and value.shape[:2] == (images, 1):
        return (
            "; average over the pixels, z.mean((2, 3)), or, where each pixel has a class, return two logits for it: "
            "torch.cat([torch.zeros_like(z), z], 1)"
        )
    if value.dim() == 4 and value.shape[0] == images:
        return "; average over the pixels, z.mean((2, 3)), or, where each pixel has a class, give --task segmentation"
    if value.dim() == 3 and value.shape[0] == images:
        return "; choose the token that classifies (z[:, 0]) or average: z.mean(1)"
    return "; return one row of K logits per image"


def _listed(tensors: dict[str, Tensor]) -> str:
    shown = [f"{name} {tuple(value.shape)}" for name, value in tensors.items()]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
