"""A small sample of each kind of ONNX file that is evaluated or refused; docs/reference/kinds.md lists them.

The logits of all are the mean colour of the image, as the file gets it, times ``W``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

W = np.array([[1, -1], [0, 0], [-1, 1]], np.float32)  # red against blue


@dataclass(frozen=True)
class OnnxKind:
    """One kind of file.

    Args:
        name: what a user would call it.
        about: what the program does, for the docs.
        says: a part of what is noted in the record, or of the error.
        file: keywords of ``write``.
        text: what is given as ``--model.input``.
        output: what is given as ``--model.output``.
        pixels: what the file must be given, as a function of pixels in [0, 1]; None: these.
        logits: what must come out, as a function of the logits of those pixels.
        refused: whether it is not evaluated.
    """

    name: str
    about: str
    says: str
    file: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    output: str | None = None
    pixels: Callable[[Tensor], Tensor] | None = None
    logits: Callable[[Tensor], Tensor] = lambda logits: logits
    refused: bool = False


def prepared_pixels(sample: OnnxKind, x: Tensor) -> Tensor:
    return x if sample.pixels is None else sample.pixels(x)


def write(
    path: str,
    *,
    shape: Any = ("n", 3, 8, 8),
    dtype: str = "FLOAT",
    nodes: Any = None,
    outputs: Any = (("logits", "FLOAT", ["n", 2]),),
    metadata: dict[str, str] | None = None,
    weights: np.ndarray = W,
    inputs: Any = (),
    opset: int = 17,
    ir: int = 8,
    axes: Any = (2, 3),
    **save: Any,
) -> str:
    """Write a file whose logits are the mean colour (over ``axes``) times ``weights``."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def kind(name: str) -> int:
        return getattr(TensorProto, name)

    if nodes is None:
        cast = (
            [("Cast", ["x"], ["f"], {"to": TensorProto.FLOAT})]
            if dtype != "FLOAT"
            else [("Identity", ["x"], ["f"], {})]
        )
        nodes = [
            *cast,
            ("ReduceMean", ["f"], ["p"], {"axes": list(axes), "keepdims": 0}),
            ("MatMul", ["p", "W"], ["logits"], {}),
        ]
    graph = helper.make_graph(
        [helper.make_node(op, given, made, **extra) for op, given, made, extra in nodes],
        "g",
        [helper.make_tensor_value_info(name, kind(t), s) for name, t, s in (("x", dtype, shape), *inputs)],
        [helper.make_tensor_value_info(name, kind(t), s) for name, t, s in outputs],
        [numpy_helper.from_array(weights, "W")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    if metadata:
        helper.set_model_props(model, metadata)
    onnx.save(model, path, **save)
    return path


_MEAN = ("ReduceMean", ["x"], ["p"], {"axes": [2, 3], "keepdims": 0})
_TWO = [_MEAN, ("MatMul", ["p", "W"], ["a"], {}), ("Neg", ["a"], ["b"], {})]
_CLASSIFIER = [
    _MEAN,
    ("MatMul", ["p", "W"], ["l"], {}),
    ("Softmax", ["l"], ["probabilities"], {"axis": 1}),
    ("ArgMax", ["l"], ["label"], {"axis": 1, "keepdims": 0}),
]
_SUM = [
    ("Add", ["x", "z"], ["f"], {}),
    ("ReduceMean", ["f"], ["p"], {"axes": [2, 3], "keepdims": 0}),
    ("MatMul", ["p", "W"], ["logits"], {}),
]

ONNX_KINDS = [
    OnnxKind(
        "channels first, float32",
        "read as pixels in [0, 1], and it is said that the file does not say so",
        "does not say how its pixels are prepared",
    ),
    OnnxKind(
        "channels last (NHWC)",
        "recognised by the size of its input",
        "channels last",
        {"shape": ("n", 8, 8, 3), "axes": (1, 2)},
    ),
    OnnxKind(
        "a fixed batch size",
        "images go in so many at a time, the last ones filled up",
        "does not say how its pixels are prepared",
        {"shape": (2, 3, 8, 8), "outputs": (("logits", "FLOAT", [2, 2]),)},
    ),
    OnnxKind("float16", "pixels are cast", "takes float16", {"dtype": "FLOAT16"}),
    OnnxKind(
        "uint8", "pixels are given as 0 … 255, rounded", "takes uint8", {"dtype": "UINT8"}, pixels=lambda x: 255 * x
    ),
    OnnxKind(
        "int8",
        "refused: `--model.input` says what black and white are",
        'range=-128..127"',
        {"dtype": "INT8"},
        refused=True,
    ),
    OnnxKind(
        "normalisation outside of the graph, named by the user",
        "applied inside the model, so that eps is in pixel units",
        "",
        text="mean=0.5 std=0.25",
        pixels=lambda x: (x - 0.5) / 0.25,
    ),
    OnnxKind(
        "normalisation in the metadata",
        "applied, and it is said",
        "its metadata say",
        {"metadata": {"mean": "[0.5, 0.5, 0.5]", "std": "[0.25, 0.25, 0.25]"}},
        pixels=lambda x: (x - 0.5) / 0.25,
    ),
    OnnxKind(
        "a fixed size that is not the data's",
        "refused: `--data.image_size N`, or `--model.input size=N` to resize inside the model",
        "--data.image_size 32",
        {"shape": (1, 3, 32, 32), "outputs": (("logits", "FLOAT", [1, 2]),)},
        refused=True,
    ),
    OnnxKind(
        "labels and probabilities",
        "the probabilities are taken, and it is said",
        "'probabilities' is taken for the logits",
        {"nodes": _CLASSIFIER, "outputs": (("label", "INT64", ["n"]), ("probabilities", "FLOAT", ["n", 2]))},
        logits=lambda logits: logits.softmax(1),
    ),
    OnnxKind(
        "several outputs that can be the logits",
        "refused: `--model.output NAME`",
        "--model.output a",
        {"nodes": _TWO, "outputs": (("a", "FLOAT", ["n", 2]), ("b", "FLOAT", ["n", 2]))},
        refused=True,
    ),
    OnnxKind(
        "several outputs, one of them named by the user",
        "that one is taken",
        "does not say how its pixels are prepared",
        {"nodes": _TWO, "outputs": (("a", "FLOAT", ["n", 2]), ("b", "FLOAT", ["n", 2]))},
        output="b",
        logits=lambda logits: -logits,
    ),
    OnnxKind(
        "several inputs",
        "refused: the others become constants of the graph",
        "must take one input",
        {"nodes": _SUM, "inputs": (("z", "FLOAT", [1]),)},
        refused=True,
    ),
]
