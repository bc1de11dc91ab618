"""Arrays, lists and texts out of a pickle without unpickling it: nothing that it names is imported or called.

A pickle is a program. This is an interpreter of the few of its instructions that data needs; any other ends the reading. Two limits
bound memory by the size of the file: instructions, and bytes that instructions copy.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from clead.errors import UserError, first_line

_LITERALS = frozenset(
    [
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    ]
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_SHORT_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GET = frozenset({"GET", "BINGET", "LONG_BINGET"})
_FREE, _BYTES_EACH = 2000, 50  # instructions: so many, and one more for each so many bytes of the file
_COPIES = 4  # times the size of the file


class _Refused(Exception):
    """The pickle holds something else than data; the message says what."""


class _Name(str):
    """A function or class that the pickle names, such as ``"numpy dtype"``; it is only ever compared."""


class _Dtype:
    """An integer type, whose byte order may still be set."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype


class _Array:
    """An array, empty until its content is set."""

    def __init__(self) -> None:
        self.array = np.empty(0, np.uint8)


_MARK = object()


def read_values(content: bytes, name: str, remedy: str) -> dict[str, Any]:
    """Return the dict in a pickle of strings, bytes, integers, lists, tuples, dicts and integer arrays; keys as text.

    Args:
        content: the file's bytes; protocols 0 to 5, of Python 2 or 3 and NumPy 1 or 2.
        name: what to call it in an error.
        remedy: how to come by its content otherwise, for an error.

    Raises:
        UserError: it is no pickle, no dict, or has an instruction or name that data does not need.
    """
    try:
        values = _Interpreter(len(content)).run(content)
        if not isinstance(values, dict):
            raise _Refused(f"a {type(values).__name__.strip('_').lower()} where a dict belongs")
        return {_text(key): _plain(value) for key, value in values.items()}
    except _Refused as error:
        reason = str(error)
    except Exception as error:  # pickletools raises whatever a broken file makes it raise
        reason = f"a damaged file ({first_line(error)[:200]})"
    raise UserError(
        f"{name}: a pickle can run code, so it is not unpickled: only dicts, lists, texts, integers and arrays of them are read "
        f"from it, got {reason}; {remedy}"
    )


def _plain(value: Any) -> Any:
    return value.array if isinstance(value, _Array) else value


def _text(key: Any) -> str:
    return key.decode("latin-1") if isinstance(key, bytes) else str(key)


class _Interpreter:
    """The stack machine of pickles, with data only."""

    def __init__(self, size: int) -> None:
        self.instructions = _FREE + size // _BYTES_EACH
        self.copies = _COPIES * size
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.steps: dict[str, Callable[[], None]] = {
            "PROTO": lambda: None,
            "FRAME": lambda: None,
            "MARK": lambda: self.stack.append(_MARK),
            "EMPTY_DICT": lambda: self.stack.append({}),
            "EMPTY_LIST": lambda: self.stack.append([]),
            "DICT": lambda: self.stack.append(_pairs(self.to_mark())),
            "LIST": lambda: self.stack.append(self.to_mark()),
            "TUPLE": lambda: self.stack.append(tuple(self.to_mark())),
            "APPEND": lambda: self.extend([self.pop()]),
            "APPENDS": lambda: self.extend(self.to_mark()),
            "SETITEM": lambda: self.update(self.pop_many(2)),
            "SETITEMS": lambda: self.update(self.to_mark()),
            "MEMOIZE": lambda: self.memo.__setitem__(len(self.memo), self.top()),
            "STACK_GLOBAL": lambda: self.stack.append(_known(" ".join(map(str, self.pop_many(2))))),
            "REDUCE": lambda: self.stack.append(self.call(*self.pop_many(2))),
            "BUILD": self.build,
            "READONLY_BUFFER": lambda: None,
        }

    def run(self, content: bytes) -> Any:
        """Return the value that the pickle leaves."""
        for count, (instruction, argument, _) in enumerate(pickletools.genops(io.BytesIO(content))):
            name = instruction.name
            if count > self.instructions:
                raise _Refused(f"more than {self.instructions} instructions in {len(content)} bytes")
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _SHORT_TUPLES:
                self.stack.append(tuple(self.pop_many(_SHORT_TUPLES[name])))
            elif name in _PUT:
                self.memo[int(argument or 0)] = self.top()
            elif name in _GET:
                self.stack.append(self.memo[int(argument or 0)])
            elif name == "GLOBAL":
                self.stack.append(_known(str(argument)))
            elif name == "STOP":
                return self.pop()
            elif name in self.steps:
                self.steps[name]()
            else:
                raise _Refused(f"the instruction {name}")
        raise _Refused("a file without an end")

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise _Refused("a damaged file (an empty stack)")
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        del self.stack[-1]
        return value

    def pop_many(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def to_mark(self) -> list[Any]:
        values = []
        while self.stack and self.stack[-1] is not _MARK:
            values.append(self.stack.pop())
        if not self.stack:
            raise _Refused("a damaged file (no mark)")
        del self.stack[-1]
        return values[::-1]

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.top(), list):
            raise _Refused("values added to what is no list")
        self.top().extend(values)

    def update(self, values: list[Any]) -> None:
        if not isinstance(self.top(), dict):
            raise _Refused("keys set in what is no dict")
        self.top().update(_pairs(values))

    def call(self, function: Any, arguments: Any) -> Any:
        """Return what the few known functions would."""
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise _Refused("a call of what is no known function")
        name = function.rpartition(" ")[2]
        if name == "_reconstruct":
            return _Array()
        if name == "bytes" and not arguments:
            return b""
        if name == "encode" and len(arguments) == 2 and arguments[1] == "latin1":
            return self.as_bytes(arguments[0])
        if name == "dtype" and arguments and re.fullmatch(r"[biu][1248]", str(arguments[0])):
            return _Dtype(np.dtype(str(arguments[0])))
        if name == "scalar" and len(arguments) == 2:
            return self.array(arguments[0], (), False, arguments[1]).item()
        if name == "_frombuffer" and len(arguments) == 4:
            made = _Array()
            made.array = self.array(arguments[1], arguments[2], arguments[3] == "F", arguments[0])
            return made
        raise _Refused(f"a call of {function} with other values than arrays of integers have")

    def build(self) -> None:
        """Give an array its content, or a type its byte order."""
        state, target = self.pop(), self.top()
        if isinstance(target, _Array) and isinstance(state, tuple) and len(state) == 5:
            target.array = self.array(state[2], state[1], state[3] is True or state[3] == 1, state[4])
        elif isinstance(target, _Dtype) and isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|"):
            target.dtype = target.dtype.newbyteorder(state[1])
        else:
            raise _Refused("the state of an object that is no array")

    def array(self, dtype: Any, shape: Any, column_major: bool, content: Any) -> np.ndarray:
        """Return an array over ``content``; refused unless it has as many bytes as the shape says."""
        if (
            not isinstance(dtype, _Dtype)
            or not isinstance(shape, tuple)
            or not all(type(side) is int for side in shape)
        ):
            raise _Refused("an array of something else than integers")
        flat = np.frombuffer(self.as_bytes(content), dtype=np.uint8)
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.dtype.itemsize != len(flat):
            raise _Refused(f"an array whose shape {str(shape)[:60]} and {len(flat)} bytes disagree")
        return flat.view(dtype.dtype).reshape(shape, order="F" if column_major else "C")

    def as_bytes(self, value: Any) -> bytes | bytearray:
        """Return bytes; text is what Python 2 called so."""
        if isinstance(value, (bytes, bytearray)):
            return value
        if not isinstance(value, str):
            raise _Refused("an array of something else than bytes")
        self.copies -= len(value)
        if self.copies < 0:
            raise _Refused("the same bytes many times")
        return value.encode("latin-1")


_KNOWN = frozenset(
    [
        *(f"numpy.{core}.multiarray {name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        *(f"numpy.{core}.numeric _frombuffer" for core in ("core", "_core")),
        *("numpy ndarray", "numpy dtype", "_codecs encode", "__builtin__ bytes", "builtins bytes"),
    ]
)


def _known(name: str) -> _Name:
    if name not in _KNOWN:
        raise _Refused(f"the name {'.'.join(name.split())[:200]!r}")
    return _Name(name)


def _pairs(values: list[Any]) -> dict[Any, Any]:
    keys = values[::2]
    if len(values) % 2 or not all(isinstance(key, (str, bytes, int)) for key in keys):
        raise _Refused("a dict with other keys than texts and integers")
    return dict(zip(keys, values[1::2], strict=True))
