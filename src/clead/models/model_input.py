"""What a model from elsewhere wants to be given: layout, type, range, mean and std, size, order of colours."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn import functional

from clead.errors import UserError, did_you_mean
from clead.settings import Ratio, setting, settings, validated

DTYPES: dict[str, torch.dtype] = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int32": torch.int32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_LARGEST_SIDE = 4096


def _numbers(value: Any) -> Any:
    """Read ``0.485,0.456,0.406`` or ``[0.485, …]`` or one number."""
    if isinstance(value, str):
        value = [number for number in re.split(r"[\s,;]+", value.strip("[]() ")) if number]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


def _range(value: Any) -> Any:
    """Read ``0..255``, ``-1..1`` or ``[0, 255]``."""
    if isinstance(value, str) and ".." in value:
        return value.strip("[]() ").split("..")
    return _numbers(value)


def _size(value: Any) -> Any:
    """Read ``224`` or ``224x256`` (height × width)."""
    sides = re.split(r"[x×*,\s]+", value.strip("[]() ")) if isinstance(value, str) else _numbers(value)
    return sides * 2 if isinstance(sides, list) and len(sides) == 1 else sides


_Numbers = Annotated[tuple[Ratio, ...], BeforeValidator(_numbers), Field(min_length=1, max_length=4)]
_Side = Annotated[int, Field(ge=1, le=_LARGEST_SIDE)]


@settings
class ModelInput:
    """How pixels in [0, 1], (B, C, H, W) float32, RGB, are turned into what a model takes; all is part of the model.

    >>> ModelInput.parse("layout=nhwc mean=0.5,0.5,0.5 std=0.25")
    ModelInput(layout='nhwc', dtype=None, range=None, mean=(0.5, 0.5, 0.5), std=(0.25,), size=None, channels='rgb')
    """

    layout: Literal["nchw", "nhwc", "flat"] | None = setting(
        None, "order of axes: channels first, last, or one vector per image; none: as an ONNX file says, else nchw"
    )
    dtype: Literal["uint8", "int8", "int32", "float16", "bfloat16", "float32", "float64"] | None = setting(
        None, "type of the numbers; none: as an ONNX file says, else float32"
    )
    range: Annotated[tuple[Ratio, Ratio], BeforeValidator(_range)] | None = setting(
        None, "what black and white are, such as 0..255 or -1..1; none: 0..255 for uint8, else 0..1"
    )
    mean: _Numbers | None = setting(
        None,
        "subtracted, a number per channel or one; in units of [0, 1], or of [0, 255] if any of mean or std is above 1",
    )
    std: _Numbers | None = setting(None, "divided by after that, in the same units")
    size: Annotated[tuple[_Side, _Side], BeforeValidator(_size)] | None = setting(
        None,
        "height and width, or both at once, to which images are resized inside the model (bilinear)",
        unit="pixels",
    )
    channels: Literal["rgb", "bgr"] = setting("rgb", "order of the colours")

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        whole = self.dtype in ("uint8", "int8", "int32")
        if self.normalizes and whole:
            raise ValueError(
                f"mean and std need a floating-point dtype, got dtype={self.dtype}; leave out dtype, or mean and std"
            )
        if self.dtype == "int8" and self.range is None:
            raise ValueError("int8 needs a range, got none; give range=-128..127 or range=0..127")
        if self.range is not None and self.range[0] >= self.range[1]:
            raise ValueError(f"range must rise, got {self.range[0]}..{self.range[1]}; give range=0..255, for example")
        if self.normalizes and self.range not in (None, (0, 1), (0, 255)):
            raise ValueError(
                f"with mean and std the range is 0..1 or 0..255, the units they are in, got {self.range[0]}..{self.range[1]}; "
                "leave out range"
            )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {min(self.std)}; give std=0.5, for example")

    @property
    def normalizes(self) -> bool:
        """Whether a mean is subtracted or a std divided by."""
        return self.mean is not None or self.std is not None

    @property
    def in_bytes(self) -> bool:
        """Whether mean and std are in units of [0, 255]."""
        if self.range is not None:
            return self.range == (0, 255)
        return any(value > 1 for value in (*(self.mean or ()), *(self.std or ())))

    @staticmethod
    def parse(value: Any) -> ModelInput:
        """Read text such as ``layout=nhwc dtype=uint8 size=224``, or a mapping of the keys; raises UserError on any other."""
        if isinstance(value, ModelInput):
            return value
        try:
            return validated(ModelInput, pairs(value), "model.input")
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"model.input: {error}") from None


def pairs(value: Any) -> Any:
    """Return the keys and values of ``key=value`` text between spaces or commas; anything else as it is; raises ValueError."""
    if not isinstance(value, str):
        return value
    given: dict[str, Any] = {}
    key = None
    for token in re.split(r"[\s,;]+", value.strip()):
        name, equals, text = token.partition("=")
        if equals:
            key = name
            if key in given:
                raise ValueError(f"{key} is given twice, got {value!r}; give it once")
            given[key] = text
        elif key is not None and token:
            given[key] = f"{given[key]},{token}" if given[key] else token
        else:
            known = did_you_mean(name, [field.name for field in dataclasses.fields(ModelInput)])
            raise ValueError(
                f'must be pairs key=value, got {value!r}; write it such as "layout=nhwc size=224"; {known}'
            )
    return given


class InputLayer(nn.Module):
    """The layer that ``ModelInput`` describes: x, (B, C, H, W) float32 in [0, 1] -> what the model takes.

    It has no weights. Resizing, normalisation and the order of colours keep the gradient; types of whole numbers do not.
    """

    def __init__(self, settings: ModelInput) -> None:
        super().__init__()
        self.settings = settings
        scale, shift = 1.0, 0.0
        if settings.normalizes:
            scale = 255.0 if settings.in_bytes else 1.0
        elif settings.range is not None:
            scale, shift = settings.range[1] - settings.range[0], float(settings.range[0])
        elif settings.dtype in ("uint8", "int32"):
            scale = 255.0
        self.scale, self.shift = scale, shift
        for name, default in (("mean", 0.0), ("std", 1.0)):
            values = getattr(settings, name) or (default,)
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def extra_repr(self) -> str:
        """Return the settings: they decide what the model is, and weights do not tell them."""
        return repr(self.settings)

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's input; raises UserError if mean or std have not one number, or one per channel."""
        given = self.settings
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, x.shape[1]):
                raise UserError(
                    f"model.input: {name} has {len(values)} numbers, images have {x.shape[1]} channels; give one per channel, or "
                    "one for all"
                )
        if given.size is not None and given.size != tuple(x.shape[2:]):
            x = functional.interpolate(x, size=given.size, mode="bilinear", antialias=True, align_corners=False)
            x = x.clamp(0, 1)
        if given.channels == "bgr":
            x = x.flip(1)
        if (self.scale, self.shift) != (1.0, 0.0):
            x = x * self.scale + self.shift
        if given.normalizes:
            x = (x - self.mean) / self.std
        if given.layout == "nhwc":
            x = x.permute(0, 2, 3, 1)
        elif given.layout == "flat":
            x = x.flatten(1)
        if given.dtype in ("uint8", "int8", "int32"):
            x = x.round()
        return x if given.dtype is None else x.to(DTYPES[given.dtype])

    def notes(self) -> list[str]:
        """Return what has to be known of it, one sentence each."""
        given, notes = self.settings, []
        if given.normalizes and given.in_bytes:
            notes.append("mean and std are taken in units of [0, 255], because one of them is above 1 or range says so")
        if given.size is not None:
            high, wide = given.size
            notes.append(f"images are resized to {high} × {wide} inside the model; eps is measured before that")
        return notes
