"""Arrays in pickles: read as unpickling would read them, without ever unpickling."""

import builtins
import codecs
import contextlib
import os
import pickle
import pickletools
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clead.data.array_pickle import read_values
from clead.errors import UserError

VALUES = {
    "data": np.random.default_rng(0).integers(0, 256, (5, 3072), dtype=np.uint8),
    b"labels": [0, 1, 255, 256, 70_000, -1, 2**40],
    "column major": np.asfortranarray(np.arange(6, dtype="<i4").reshape(2, 3)),
    "big endian": np.arange(5, dtype=">i8"),
    "none": None,
    "scalars": [np.int64(7), np.uint8(200)],
    "texts": ["a", "é", "漢"],
    "bytes": [b"", b"\xff\x00"],
    "nested": ({"a": [True, False]}, (1, 2), ()),
    "same": [[1]] * 3,
}


def read(content):
    return read_values(content, "file", "convert it")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_gives_what_unpickling_gives(protocol):
    found = read(pickle.dumps(VALUES, protocol))
    for key, value in VALUES.items():
        result = found[key.decode() if isinstance(key, bytes) else key]
        if isinstance(value, np.ndarray):
            assert result.dtype.newbyteorder("=") == value.dtype.newbyteorder("=")
            assert np.array_equal(result, value)
        else:
            assert result == value


def python2(data, labels):
    """What Python 2's cPickle wrote: arrays by NumPy 1, their bytes and all texts as its str."""
    raw = data.tobytes()
    return b"".join(
        [
            b"\x80\x02}q\x01(U\x04data",
            b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b\x87Rq\x04",
            b"(K\x01M" + struct.pack("<H", len(data)) + b"M" + struct.pack("<H", data.shape[1]) + b"\x86",
            b"cnumpy\ndtype\nq\x05U\x02u1K\x00K\x01\x87Rq\x06(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89",
            b"T" + struct.pack("<i", len(raw)) + raw + b"tb",
            b"U\x06labels](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e",
            b"U\x05names](U\x03catU\x03dogeu.",
        ]
    )


def test_a_pickle_of_python_2_is_read():
    content = python2(VALUES["data"], [3, 1, 2, 0, 9])
    found = read(content)
    assert np.array_equal(found["data"], VALUES["data"])
    assert found["labels"] == [3, 1, 2, 0, 9] and found["names"] == ["cat", "dog"]
    oracle = pickle.loads(content, encoding="latin1")  # the test's own bytes
    assert np.array_equal(oracle["data"], found["data"]) and oracle["labels"] == found["labels"]


class Calls:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("value", "fragment"),
    [
        (Calls(os.system, "touch ran"), "system'"),
        (Calls(eval, "open('ran', 'w')"), "eval'"),
        (Calls(exec, "open('ran', 'w')"), "exec'"),
        (Calls(getattr, "a", "b"), "getattr'"),
        (Calls(codecs.encode, "a", "rot13"), "_codecs encode"),
        (Calls(bytes, 10**12), "bytes with other values"),
        (Calls(np.dtype, "O"), "numpy dtype"),
        (np.array([1.5]), "numpy dtype"),
        (np.array([{}]), "numpy dtype"),
        (np.array(["a"]), "numpy dtype"),
        ({1, 2}, "got the"),
        (1.5, "FLOAT"),
        (object(), "got the name"),
    ],
)
def test_anything_else_than_data_is_named_and_not_run(value, fragment, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        read(pickle.dumps({"a": value}, protocol))
    assert fragment in str(caught.value) and "convert it" in str(caught.value) and len(caught.value.problems) == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_imported(monkeypatch):
    def refuse(name, *_):
        raise AssertionError(f"import of {name}")

    contents = [pickle.dumps(VALUES), pickle.dumps({"a": Calls(os.system, "true")}), b"cthis_is_no_module\nname\n."]
    assert len(read(contents[0])["data"]) == 5
    monkeypatch.setattr(builtins, "__import__", refuse)
    try:
        for content in contents:
            with contextlib.suppress(UserError):
                read(content)
    finally:
        monkeypatch.undo()


BOMBS = {
    "lists": b"]" * 100_000 + b".",
    "the same list": b"]q\x00" + b"(h\x00h\x00e" * 20_000 + b".",
    "bytes again and again": b"X\x00\x00\x01\x00"
    + b"a" * 65536
    + b"q\x000"
    + b"c_codecs\nencode\nq\x01h\x00X\x06\x00\x00\x00latin1\x86R" * 600
    + b".",
    "a long length": b"\x8e" + struct.pack("<Q", 2**40) + b"a.",
    "a long text": b"X" + struct.pack("<I", 2**31) + b"a.",
    "a frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}",
    "memo": b"]" + b"\x94" * 100_000 + b".",
    "a number": b"I" + b"9" * 100_000 + b"\n.",
    "nesting": b"]" + b"\x85" * 100_000 + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_memory_is_bounded_by_the_size_of_the_file(name):
    content = BOMBS[name]
    tracemalloc.start()
    with pytest.raises(UserError):
        read(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_500_000 + 10 * len(content)


OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(OPCODES) | st.binary(max_size=6), max_size=60))
def test_any_bytes_are_read_or_refused(pieces):
    try:
        assert isinstance(read(b"".join(pieces)), dict)
    except UserError as error:
        assert len(error.problems) == 1


@settings(max_examples=200, deadline=None)
@given(st.integers(0, pickle.HIGHEST_PROTOCOL), st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_a_flipped_byte_is_read_or_refused(protocol, place, value, cut):
    content = bytearray(pickle.dumps({**VALUES, "data": VALUES["data"][:, :20]}, protocol))
    content[place % len(content)] = value
    try:
        read(bytes(content[: place % len(content)] if cut else content))
    except UserError as error:
        assert len(error.problems) == 1
