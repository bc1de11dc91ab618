"""Settings are frozen pydantic dataclasses: one definition gives the type, default, unit, range and documentation of a key.

The objects that a run is made of (a threat, an attack, a method, a model's settings …) *are* their settings; ``config``
only joins them into a tree.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import core_schema
from typing_extensions import dataclass_transform  # in typing from Python 3.11 on

from clead.errors import UserError, did_you_mean

T = TypeVar("T")


def setting(default: Any = ..., doc: str = "", *, unit: str = "", **rules: Any) -> Any:
    """Declare one documented key.

    Args:
        default: the default value; ``...`` for a required key. A callable ``default_factory`` may be given in ``rules``.
        doc: one sentence on what the key does.
        unit: the unit, such as ``"pixels in [0, 1]"`` or ``"epochs"``.
        **rules: pydantic constraints: ``ge``, ``gt``, ``le``, ``lt``, ``min_length`` …
    """
    extra: dict[str, Any] | None = {"unit": unit} if unit else None
    if "default_factory" in rules:
        return Field(description=doc, json_schema_extra=extra, **rules)
    return Field(default, description=doc, json_schema_extra=extra, **rules)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(setting, Field))
def settings(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, keyword-only, validated dataclass that refuses unknown keys."""
    config = ConfigDict(
        extra="forbid",
        validate_default=True,
        arbitrary_types_allowed=True,
        use_attribute_docstrings=False,
        allow_inf_nan=False,
    )
    make: Any = pydantic_dataclass(frozen=True, kw_only=True, config=config)
    return make(cls)


class Ratio(float):
    """A float that remembers how it was written: ``Ratio("8/255").text == "8/255"``; records keep the text.

    >>> Ratio("8/255") == 8 / 255, Ratio("8/255").text, Ratio(0.15).text
    (True, '8/255', '0.15')
    """

    text: str

    def __new__(cls, value: str | float) -> Ratio:
        """Parse ``"8/255"``, ``"0.15"`` or a number; raises ValueError otherwise."""
        if isinstance(value, Ratio):
            return value
        if isinstance(value, str):
            text = value.replace(" ", "")
            try:
                over, *under = map(float, text.split("/"))  # not fractions.Fraction: it refuses 2.5/255
                number = over / under[0] if under else over
                finite = len(under) < 2 and all(map(math.isfinite, (over, *under, number)))
            except (ValueError, ZeroDivisionError):
                finite = False
        elif isinstance(value, Real) and not isinstance(value, bool):  # NumPy's scalars too
            number, text = float(value), repr(int(value) if isinstance(value, Integral) else float(value))
            finite = math.isfinite(number)
        else:
            finite = False
        if not finite:
            raise ValueError(f"must be a number or a fraction such as '8/255', got {value!r}")
        made = super().__new__(cls, number)
        made.text = text
        return made

    def __repr__(self) -> str:
        return self.text

    __str__ = __repr__

    def __reduce__(self) -> tuple[type[Ratio], tuple[str]]:
        return (Ratio, (self.text,))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Validate through the constructor, so that text such as ``8/255`` is a number everywhere in the configuration."""
        return core_schema.no_info_plain_validator_function(
            cls, serialization=core_schema.plain_serializer_function_ser_schema(lambda ratio: ratio.text)
        )


class WrittenInt(int):
    """An integer of a configuration file that remembers how it was written, such as ``010``."""

    text: str

    def __new__(cls, value: int, text: str) -> WrittenInt:
        """Join a value with its text."""
        made = super().__new__(cls, value)
        made.text = text
        return made


class WrittenFloat(float):
    """A float of a configuration file that remembers how it was written, such as ``1e3``."""

    text: str

    def __new__(cls, value: float, text: str) -> WrittenFloat:
        """Join a value with its text."""
        made = super().__new__(cls, value)
        made.text = text
        return made


def _typed(annotation: Any, value: Any) -> Any:
    """Return a value from a file as its setting takes it: numbers as text where text is asked for, else without their text."""
    if isinstance(value, dict):
        fields = getattr(annotation, "__pydantic_fields__", {})
        return {key: _typed(fields[key].annotation if key in fields else Any, each) for key, each in value.items()}
    if isinstance(value, list):
        inner = [each for each in _alternatives(annotation) if each is not Ellipsis]
        elements = Union[tuple(inner)] if inner else Any  # noqa: UP007  (of a tuple that is made here)
        return [_typed(elements, each) for each in value]
    kinds = _alternatives(annotation)
    if isinstance(value, (WrittenInt, WrittenFloat)):
        takes_text = (str in kinds or Path in kinds) and not {int, float} & set(kinds)
        if takes_text or Ratio in kinds:
            return value.text
        return int(value) if isinstance(value, WrittenInt) else float(value)
    return value


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the types that a union, an annotated type, or the elements of a tuple or list allow."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    inner = get_args(annotation)
    if not inner or get_origin(annotation) is Literal:
        return (annotation,)
    return tuple(kind for each in inner for kind in _alternatives(each))


def takes_text(annotation: Any) -> bool:
    """Say whether a setting is free text, such as a path: then a value is its text, whatever it looks like."""
    kinds = set(_alternatives(annotation)) - {type(None)}
    return get_origin(annotation) not in (tuple, list) and bool(kinds) and kinds <= {str, Path}


Probability = Annotated[float, Field(ge=0, le=1)]


def validated(cls: type[T], values: dict[str, Any], path: str = "") -> T:
    """Build settings from untrusted values; raises UserError with one line per problem (key, value given, rule, remedy).

    >>> from clead.threats.linf import Linf
    >>> validated(Linf, {"eps": 8}, "threat")
    Traceback (most recent call last):
        ...
    clead.errors.UserError: threat.eps: linf eps must be in [0, 1] because pixels are, got 8; did you mean 8/255?
    """
    fields = getattr(cls, "__pydantic_fields__", {})
    values = {key: _typed(fields[key].annotation if key in fields else Any, each) for key, each in values.items()}
    try:
        return cls(**values)
    except ValidationError as error:
        raise UserError(*(_one_line(problem, cls, path) for problem in error.errors())) from None


def _one_line(problem: Any, cls: type, path: str) -> str:
    names = [str(step) for step in problem["loc"] if not str(step).startswith(("function-", "constrained-"))]
    key = ".".join([*([path] if path else []), *names])
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        owner: Any = cls
        for name in names[:-1]:
            owner = owner.__pydantic_fields__[name].annotation
            owner = next((each for each in get_args(owner) if hasattr(each, "__pydantic_fields__")), owner)  # X | None
        known = getattr(owner, "__pydantic_fields__", {})
        return f"{key}: unknown key; {did_you_mean(names[-1], known)}"
    if problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{key}: is required"
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if "got " in message:
        return f"{key}: {message}"
    given = repr(problem["input"])
    return f"{key}: {message}, got {given if len(given) <= 80 else f'{given[:77]}...'}"
