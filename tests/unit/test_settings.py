"""Settings are strict and frozen; a ratio keeps its text; a mistake is one line with value, rule and remedy."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from fractions import Fraction
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clead.errors import UserError
from clead.settings import Probability, Ratio, setting, settings, validated


@settings
class Inner:
    """An inner group."""

    size: int = setting(3, "a size", ge=1, unit="pixels")


@settings
class Outer:
    """Settings made for the test."""

    rate: float = setting(..., "a rate", gt=0, le=1)
    kind: Literal["a", "b"] = setting("a", "a kind")
    chance: Probability = setting(0.5, "a chance")
    eps: Ratio = setting(Ratio("8/255"), "a radius")
    inner: Inner = setting(doc="a group", default_factory=Inner)


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_a_ratio_of_whole_numbers_is_the_nearest_float(a, b):
    ratio = Ratio(f"{a}/{b}")
    assert ratio == float(Fraction(a, b)) == a / b and ratio.text == f"{a}/{b}"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_and_its_text_are_the_same_ratio(x):
    assert Ratio(x) == x and Ratio(Ratio(x).text) == x and Ratio(str(x)) == x


@pytest.mark.parametrize(
    ("value", "number", "text"),
    [
        (8, 8.0, "8"),
        ("8 / 255", 8 / 255, "8/255"),
        ("2.667/255", 2.667 / 255, "2.667/255"),
        ("1e-3", 1e-3, "1e-3"),
        (0.15, 0.15, "0.15"),
        (np.float64(0.1), 0.1, "0.1"),
        (np.float32(0.25), 0.25, "0.25"),
        (np.int64(4), 4.0, "4"),
        (Fraction(1, 4), 0.25, "0.25"),
        (Ratio("8/255"), 8 / 255, "8/255"),
        ("-1/4", -0.25, "-1/4"),
    ],
)
def test_ratio(value, number, text):
    ratio = Ratio(value)
    assert ratio == number and ratio.text == str(ratio) == repr(ratio) == text
    for copied in (pickle.loads(pickle.dumps(ratio)), copy.copy(ratio), copy.deepcopy(ratio)):
        assert type(copied) is Ratio and copied == ratio and copied.text == text
    assert type(2 * ratio) is float


@pytest.mark.parametrize(
    "bad",
    ["eight", "8/", "/8", "8/0", "1/2/3", "", "nan", "inf", "1/inf", "1e400", "1e999999999", "9" * 400, True, None, [1]]
    + [math.nan, math.inf, 1j],
)
def test_not_a_ratio(bad):
    with pytest.raises(ValueError, match="must be a number or a fraction such as '8/255', got "):
        Ratio(bad)


def test_defaults_are_validated_and_frozen():
    made = Outer(rate=0.1)
    assert made.inner == Inner(size=3) and made.eps.text == "8/255"
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.rate = 0.2
    assert dataclasses.replace(made, rate=0.2).rate == 0.2
    assert made == Outer(rate=0.1) and hash(made) == hash(Outer(rate=0.1))

    @settings
    class Wrong:
        size: int = setting(0, "below its own rule", ge=1)

    with pytest.raises(UserError, match="size: input should be greater than or equal to 1, got 0"):
        validated(Wrong, {})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "x.rate: is required"),
        ({"rate": 0}, "x.rate: input should be greater than 0, got 0"),
        ({"rate": "fast"}, "x.rate: input should be a valid number, unable to parse string as a number, got 'fast'"),
        ({"rate": math.nan}, "got nan"),
        ({"rate": 1, "kind": "c"}, "x.kind: input should be 'a' or 'b', got 'c'"),
        ({"rate": 1, "chance": 2}, "x.chance: input should be less than or equal to 1, got 2"),
        ({"rate": 1, "eps": "8:255"}, "x.eps: must be a number or a fraction such as '8/255', got '8:255'"),
        ({"rate": 1, "knd": "a"}, "x.knd: unknown key; did you mean 'kind'?"),
        ({"rate": 1, "inner": {"size": 0}}, "x.inner.size: input should be greater than or equal to 1, got 0"),
        ({"rate": 1, "inner": {"siz": 2}}, "x.inner.siz: unknown key; did you mean 'size'?"),
    ],
)
def test_a_mistake_is_one_line(values, says):
    with pytest.raises(UserError) as caught:
        validated(Outer, values, "x")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_all_mistakes_are_listed_at_once():
    with pytest.raises(UserError) as caught:
        validated(Outer, {"rate": 0, "kind": "c", "more": 1})
    assert len(caught.value.problems) == 3


def test_text_of_the_command_line_is_converted():
    made = validated(Outer, {"rate": "0.5", "eps": "4/255", "inner": {"size": "7"}})
    assert made == Outer(rate=0.5, eps=Ratio("4/255"), inner=Inner(size=7))


def test_documentation_travels_with_the_key():
    field = Outer.__pydantic_fields__["rate"]
    assert field.description == "a rate"
    assert Inner.__pydantic_fields__["size"].json_schema_extra == {"unit": "pixels"}
