"""ONNX classifiers as other tools write them: every file is read rightly, or refused with what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clead import api
from clead.config import evaluation_config
from clead.errors import UserError
from clead.models.model_input import InputLayer, ModelInput
from clead.models.onnx import OnnxModel
from onnx_kinds import ONNX_KINDS, OnnxKind, W, prepared_pixels, write

SHAPE = (3, 8, 8)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def images(n: int = 5) -> torch.Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(0))


def channels(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(3, 1, 1)


def expected(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3)) @ torch.from_numpy(W)


def opened(path: str, text: str = "", **options: Any) -> OnnxModel:
    given = ModelInput.parse(text) if text else None
    return OnnxModel(path, input=given, sample_shape=SHAPE, num_classes=2, **options)


def refused(path: str, *texts: str, text: str = "", **options: Any) -> None:
    with pytest.raises(UserError) as error:
        opened(path, text, **options)
    assert "\n" not in str(error.value)
    for each in texts:
        assert each in str(error.value), str(error.value)


@pytest.mark.parametrize("sample", ONNX_KINDS, ids=[sample.name for sample in ONNX_KINDS])
def test_each_kind_of_file_is_read_right_or_refused_in_one_line(sample: OnnxKind):
    write("m.onnx", **sample.file)
    if sample.refused:
        return refused("m.onnx", sample.says, text=sample.text, output=sample.output)
    model = opened("m.onnx", sample.text, output=sample.output)
    x = (images() * 255).round() / 255
    torch.testing.assert_close(model(x), sample.logits(expected(prepared_pixels(sample, x))), rtol=2e-3, atol=2e-3)
    assert not sample.says or any(sample.says in note for note in model.notes), model.notes


LAYOUTS = {
    "nchw": {},
    "nhwc": {"shape": ("n", 8, 8, 3), "axes": (1, 2)},
    "nhwc of any size": {"shape": ("n", "h", "w", 3), "axes": (1, 2)},
    "fixed batch": {"shape": (2, 3, 8, 8), "outputs": (("logits", "FLOAT", [2, 2]),)},
    "fixed batch of one, nhwc": {"shape": (1, 8, 8, 3), "axes": (1, 2), "outputs": (("logits", "FLOAT", [1, 2]),)},
    "nothing known": {"shape": (None, None, None, None), "outputs": (("logits", "FLOAT", [None, None]),)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_batches(layout):
    model = opened(write("m.onnx", **LAYOUTS[layout]))
    for n in (1, 2, 5):
        torch.testing.assert_close(model(images(n)), expected(images(n)))
    assert any("channels last" in note for note in model.notes) == ("nhwc" in layout)


TYPES = {
    "FLOAT16": (1e-3, "takes float16: pixels are given so"),
    "DOUBLE": (1e-6, "takes float64: pixels are given so"),
    "UINT8": (255, "takes uint8: pixels are given as 0 … 255, rounded"),
    "INT32": (255, "takes int32: pixels are given as 0 … 255, rounded"),
}


@pytest.mark.parametrize("dtype", TYPES)
def test_types(dtype):
    model = opened(write("m.onnx", dtype=dtype))
    assert any(TYPES[dtype][1] in note for note in model.notes)
    x = (images() * 255).round() / 255
    want = expected(x * 255) if TYPES[dtype][0] == 255 else expected(x)
    torch.testing.assert_close(model(x), want, rtol=1e-3, atol=2e-3)
    refused("m.onnx", "got dtype=int8; leave it out", text="dtype=int8 range=0..127")


def test_int8_is_not_guessed_at():
    write("m.onnx", dtype="INT8")
    refused("m.onnx", "does not say what black and white are", 'range=-128..127"')
    x = (images() * 255).round() / 255
    torch.testing.assert_close(opened("m.onnx", "range=-128..127")(x), expected(x * 255), rtol=1e-3, atol=1e-3)


def test_half_precision_outputs_are_float32():
    cast = [("ReduceMean", ["x"], ["p"], {"axes": [2, 3], "keepdims": 0}), ("MatMul", ["p", "W"], ["logits"], {})]
    write(
        "m.onnx", dtype="FLOAT16", nodes=cast, weights=W.astype(np.float16), outputs=(("logits", "FLOAT16", ["n", 2]),)
    )
    logits = opened("m.onnx")(images())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected(images()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "text, want",
    [
        ("mean=0.485,0.456,0.4 std=0.229,0.2,0.2", lambda x: (x - channels(0.485, 0.456, 0.4)) / channels(0.229, 0.2, 0.2)),
        ("mean=0.5 std=0.25", lambda x: (x - 0.5) / 0.25),
        ("std=0.25", lambda x: x / 0.25),
        ("mean=123.6 116.3 103 std=58.4 57.1 57.4", lambda x: (255 * x - channels(123.6, 116.3, 103)) / channels(58.4, 57.1, 57.4)),
        ("mean=104,117,123 channels=bgr", lambda x: 255 * x.flip(1) - channels(104.0, 117, 123)),
        ("range=0..255 mean=1/2 std=1", lambda x: 255 * x - 0.5),
        ("range=0..255", lambda x: 255 * x),
        ("range=-1..1", lambda x: 2 * x - 1),
        ("channels=bgr", lambda x: x.flip(1)),
        ("layout=nchw, dtype=float32, range=0..1", lambda x: x),
    ],
)  # fmt: skip
def test_preparation_outside_of_the_graph(text, want):
    model = opened(write("m.onnx"), text)
    torch.testing.assert_close(model(images()), expected(want(images())), rtol=1e-4, atol=1e-4)
    assert any("units of [0, 255]" in note for note in model.notes) == ("mean=1" in text)


def test_what_the_file_does_not_say_is_said():
    assert any("does not say how its pixels are prepared" in note for note in opened(write("m.onnx")).notes)


METADATA = {
    "mean and std": {"mean": "[0.5, 0.5, 0.5]", "std": "[0.25, 0.25, 0.25]"},
    "normalization": {"normalization": json.dumps({"mean": 0.5, "std": 0.25})},
    "range": {"range": "[-1, 3]"},
    "text": {"mean": "0.5,0.5,0.5", "std": "0.25"},
}


@pytest.mark.parametrize("metadata", METADATA)
def test_preparation_in_the_metadata_is_applied_and_said(metadata):
    model = opened(write("m.onnx", metadata=METADATA[metadata]))
    want = 4 * images() - 1 if metadata == "range" else (images() - 0.5) / 0.25
    torch.testing.assert_close(model(images()), expected(want))
    assert any("its metadata say" in note for note in model.notes)
    torch.testing.assert_close(opened("m.onnx", "range=0..1")(images()), expected(images()))


@pytest.mark.parametrize(
    "metadata, classes",
    [
        ({"classes": '["red", "blue"]'}, ("red", "blue")),
        ({"names": "{0: 'red', 1: 'blue'}"}, ("red", "blue")),
        ({"id2label": '{"1": "blue", "0": "red"}'}, ("red", "blue")),
        ({"labels": "red\nblue"}, ("red", "blue")),
        ({"class_names": "red,blue"}, ("red", "blue")),
        ({"class_to_idx": '{"blue": 1, "red": 0}'}, ("red", "blue")),
        ({"names": "__import__('os').mkdir('x')"}, None),
        ({"id2label": '{"0": "LABEL_0", "1": "LABEL_1"}'}, None),
        ({}, None),
    ],
)
def test_names_of_classes_in_the_metadata(metadata, classes):
    assert opened(write("m.onnx", metadata=metadata)).classes == classes
    assert not Path("x").exists()


MEAN = ("ReduceMean", ["x"], ["p"], {"axes": [2, 3], "keepdims": 0})
LOGITS = ("MatMul", ["p", "W"], ["l"], {})


def test_labels_first_and_probabilities_second():
    nodes = [
        MEAN,
        LOGITS,
        ("Softmax", ["l"], ["probabilities"], {"axis": 1}),
        ("ArgMax", ["l"], ["label"], {"axis": 1, "keepdims": 0}),
    ]
    write("m.onnx", nodes=nodes, outputs=(("label", "INT64", ["n"]), ("probabilities", "FLOAT", ["n", 2])))
    model = opened("m.onnx")
    torch.testing.assert_close(model(images()), expected(images()).softmax(1))
    assert any("'probabilities' is taken for the logits" in note for note in model.notes)
    for chosen in ("probabilities", 1, "1"):
        torch.testing.assert_close(opened("m.onnx", output=chosen)(images()), expected(images()).softmax(1))
    refused("m.onnx", "no output that can be logits", "label tensor(int64)", output=0)
    refused("m.onnx", "has no output 'probs'", "did you mean 'probabilities'", output="probs")


def test_features_beside_logits_are_told_by_their_size_or_name():
    nodes = [MEAN, ("MatMul", ["p", "W"], ["scores_a"], {})]
    write("m.onnx", nodes=nodes, outputs=(("p", "FLOAT", ["n", 3]), ("scores_a", "FLOAT", ["n", 2])))
    torch.testing.assert_close(opened("m.onnx")(images()), expected(images()))
    both = [MEAN, ("MatMul", ["p", "W"], ["a"], {}), ("Neg", ["a"], ["b"], {})]
    write("two.onnx", nodes=both, outputs=(("a", "FLOAT", ["n", 2]), ("b", "FLOAT", ["n", 2])))
    refused("two.onnx", "several outputs that can be the logits", "--model.output a (one of a, b)")
    torch.testing.assert_close(opened("two.onnx", output="b")(images()), -expected(images()))
    named = [MEAN, ("MatMul", ["p", "W"], ["logits"], {}), ("Neg", ["logits"], ["aux"], {})]
    write("named.onnx", nodes=named, outputs=(("aux", "FLOAT", ["n", 2]), ("logits", "FLOAT", ["n", 2])))
    torch.testing.assert_close(opened("named.onnx")(images()), expected(images()))


def test_maps_of_scikit_learn_are_refused_with_the_option():
    import onnx
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("ReduceMean", ["x"], ["p"], axes=[2, 3], keepdims=0),
        helper.make_node("ZipMap", ["p"], ["probability"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]),
    ]
    kind = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    output = helper.make_value_info("probability", helper.make_sequence_type_proto(kind))
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])], [output]
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), "m.onnx")
    refused("m.onnx", "'probability' is seq(map(int64,tensor(float)))", "options={'zipmap': False}")


def test_pooled_and_single_outputs():
    pooled = [("ReduceMean", ["x"], ["p"], {"axes": [2, 3], "keepdims": 1}), ("Conv", ["p", "W"], ["logits"], {})]
    kernel = np.ascontiguousarray(W.T)[:, :, None, None]
    write("m.onnx", nodes=pooled, weights=kernel, outputs=(("logits", "FLOAT", ["n", 2, 1, 1]),))
    torch.testing.assert_close(opened("m.onnx")(images()), expected(images()))


def test_several_inputs():
    sums = [
        ("Add", ["x", "z"], ["f"], {}),
        ("ReduceMean", ["f"], ["p"], {"axes": [2, 3], "keepdims": 0}),
        ("MatMul", ["p", "W"], ["logits"], {}),
    ]
    write("m.onnx", nodes=sums, inputs=(("z", "FLOAT", [1]),))
    refused("m.onnx", "must take one input", "x tensor(float)", "z tensor(float) [1]", "constants of the graph")
    # An old file lists what has a default among its inputs.
    write("old.onnx", inputs=(("W", "FLOAT", [3, 2]),))
    torch.testing.assert_close(opened("old.onnx")(images()), expected(images()))
    write(
        "text.onnx",
        dtype="STRING",
        nodes=[("Identity", ["x"], ["logits"], {})],
        outputs=(("logits", "STRING", ["n", 3, 8, 8]),),
    )
    refused("text.onnx", "takes tensor(string)")


def test_other_sizes_and_channels():
    write("m.onnx", shape=(1, 3, 32, 32), outputs=(("logits", "FLOAT", [1, 2]),))
    refused("m.onnx", "images of 32 × 32 pixels", "the data has 8 × 8", "--data.image_size 32", '"size=32"')
    write("wide.onnx", shape=("n", 16, 24, 3), axes=(1, 2))
    refused("wide.onnx", "images of 16 × 24 pixels", '"size=16x24"')
    write("grey.onnx", shape=("n", 1, 8, 8), weights=W[:1])
    refused("grey.onnx", "images of 1 channels", "the data has 3")
    model = opened("m.onnx", "size=32")
    resized = torch.nn.functional.interpolate(images(), size=(32, 32), mode="bilinear", antialias=True).clamp(0, 1)
    torch.testing.assert_close(model(images()), expected(resized), rtol=1e-4, atol=1e-5)
    assert any("resized to 32 × 32 inside the model; eps is measured before" in note for note in model.notes)
    write(
        "rank.onnx",
        shape=("n", 3, 64),
        nodes=[("ReduceMean", ["x"], ["p"], {"axes": [2], "keepdims": 0}), ("MatMul", ["p", "W"], ["logits"], {})],
    )
    refused("rank.onnx", "not images (B, C, H, W)", "layout=flat")


def test_vectors_of_grey_pixels():
    write(
        "m.onnx", shape=("n", 64), nodes=[("MatMul", ["x", "W"], ["logits"], {})], weights=np.ones((64, 2), np.float32)
    )
    x = torch.rand(3, 1, 8, 8)
    model = OnnxModel("m.onnx", sample_shape=(1, 8, 8), num_classes=2)
    torch.testing.assert_close(model(x), x.flatten(1).sum(1, keepdim=True).expand(3, 2))
    refused("m.onnx", "layout=flat")
    refused("m.onnx", "takes vectors of 64 numbers", text="layout=flat")


def test_a_graph_that_takes_one_image_whatever_it_says():
    nodes = [
        ("Reshape", ["x", "shape"], ["f"], {}),
        ("ReduceMean", ["f"], ["p"], {"axes": [2, 3], "keepdims": 0}),
        ("MatMul", ["p", "W"], ["logits"], {}),
    ]
    constant = ("Constant", [], ["shape"], {"value_ints": [1, 3, 8, 8]})
    model = opened(write("m.onnx", nodes=[constant, *nodes]))
    torch.testing.assert_close(model(images()), expected(images()))
    assert any("given one by one" in note for note in model.notes)


# ------------------------------------------------------------------------------------------------ files


def test_weights_beside_the_file():
    write("m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=1)
    model = opened("m.onnx")
    torch.testing.assert_close(model(images()), expected(images()))
    Path("m.onnx.data").write_bytes(np.zeros_like(W).tobytes())
    assert opened("m.onnx").state_dict()["digest"].tolist() != model.state_dict()["digest"].tolist(), (
        "same file, other weights"
    )
    Path("m.onnx.data").unlink()
    refused("m.onnx", "has its weights in 'm.onnx.data'", "copy that file there too")
    Path("inside").mkdir()
    content = Path("m.onnx").read_bytes()
    Path("inside/m.onnx").write_bytes(content.replace(b"m.onnx.data", b"../out.data"))
    Path("out.data").write_bytes(W.tobytes())
    refused("inside/m.onnx", "escapes model directory")


def test_files_that_are_no_onnx_are_named():
    for name, content, text in (
        ("page.onnx", b"<!DOCTYPE html><html></html>", "a web page"),
        ("lfs.onnx", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("empty.onnx", b"", "an empty file"),
        ("keras.onnx", b"\x89HDF\r\n\x1a\n0000", "an HDF5 file"),
        ("noise.onnx", b"\x00\x01\x02no", "Protobuf parsing failed"),
    ):
        Path(name).write_bytes(content)
        refused(name, name, text)
    write("m.onnx", weights=np.random.default_rng(0).random((3, 2)).astype(np.float32))
    content = Path("m.onnx").read_bytes()
    for cut in range(1, len(content) - 1, 17):
        Path("cut.onnx").write_bytes(content[:cut])
        refused("cut.onnx", "cut.onnx")
    refused("gone.onnx", "no ONNX file at gone.onnx")
    with Path("large.onnx").open("wb") as file:
        file.truncate(2**31 + 5)
    refused("large.onnx", "has 2.0 GiB", "save_as_external_data=True")


def test_onnxruntime_says_why_whole():
    write("opset.onnx", opset=99)
    refused("opset.onnx", "Opset 99 is under development", "Current official support for domain ai.onnx is till opset")
    write("ir.onnx", ir=99)
    refused("ir.onnx", "Unsupported model IR version: 99, max supported IR version")
    write("op.onnx", nodes=[("Nonsense", ["x"], ["logits"], {})])
    refused("op.onnx", "Nonsense")


def test_onnxruntimes_own_format():
    import onnxruntime

    write("m.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = "m.ort"
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession("m.onnx", options, providers=["CPUExecutionProvider"])
    torch.testing.assert_close(opened("m.ort")(images()), expected(images()))
    shutil.copy("m.ort", "n.onnx")
    Path("n.onnx").write_bytes(Path("m.ort").read_bytes()[: len(Path("m.ort").read_bytes()) // 2])
    refused("n.onnx", "n.onnx")


def test_what_decides_the_answers_is_in_the_fingerprint():
    from clead.models.split import weights
    from clead.weights.files import fingerprint

    write("a.onnx")
    write("b.onnx", weights=2 * W)
    assert fingerprint(weights(opened("a.onnx"))) != fingerprint(weights(opened("b.onnx")))
    assert repr(opened("a.onnx")) != repr(opened("a.onnx", "range=0..255")), (
        "a state of one must not count for the other"
    )


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "text, says",
    [
        ("layuot=nhwc", "model.input.layuot: unknown key; did you mean 'layout'?"),
        ("layout=nwhc", "model.input.layout: input should be 'nchw', 'nhwc' or 'flat', got 'nwhc'"),
        ("nhwc", "must be pairs key=value, got 'nhwc'; write it"),
        ("mean=a", "must be a number"),
        ("mean=0.5 mean=0.4", "mean is given twice"),
        ("std=0", "std must be above 0, got 0"),
        ("range=255..0", "range must rise, got 255..0"),
        ("mean=0.5 dtype=uint8", "mean and std need a floating-point dtype, got dtype=uint8"),
        ("mean=0.5 range=-1..1", "the range is 0..1 or 0..255, the units they are in, got -1..1"),
        ("dtype=int8", "int8 needs a range"),
        ("size=0", "model.input.size.0"),
        ("size=1000000", "model.input.size.0"),
        ("size=a", "model.input.size"),
        ("mean=1,2,3,4,5", "model.input.mean"),
        ("channels=gbr", "model.input.channels"),
    ],
)
def test_mistakes_in_the_text(text, says):
    with pytest.raises(UserError) as error:
        ModelInput.parse(text)
    assert says in str(error.value), str(error.value)


def test_the_layer_keeps_the_gradient_and_has_no_weights():
    layer = InputLayer(ModelInput.parse("layout=nhwc channels=bgr mean=0.5 std=0.5 size=4x6 dtype=float64"))
    x = images().requires_grad_()
    out = layer(x)
    assert out.shape == (5, 4, 6, 3) and out.dtype == torch.float64 and not layer.state_dict()
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert (gradient != 0).all()
    with pytest.raises(UserError, match="mean has 2 numbers, images have 3 channels"):
        InputLayer(ModelInput.parse("mean=0.5,0.5"))(images())


@pytest.mark.slow
def test_an_export_of_ours_goes_round(run_of_three):
    run, data = run_of_three
    api.export_run(run, out="out", show=False)
    model = OnnxModel("out/model.onnx", sample_shape=(1, 8, 8), num_classes=3)
    assert model.classes == ("0", "1", "2") and not model.notes
    record = api.evaluate_external(
        "out/model.onnx",
        evaluation_config("evaluation", ["--data.path", data, "--eval.suite", "black_box", "--eval.steps", "2"]),
        out="e",
        show=False,
    ).record
    assert not any("does not say" in note for note in record.notes)


@pytest.fixture
def run_of_three(folder):
    from clead.config import load_recipe

    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    pixels = np.clip(labels[:, None, None] * 90 + rng.integers(0, 75, (60, 8, 8)), 0, 255).astype(np.uint8)
    np.savez("data.npz", x_train=pixels, y_train=labels, x_test=pixels[:30], y_test=labels[:30])
    overrides = ["--data.name", "auto", "--data.path", "data.npz", "--train.budget", "3", "--train.device", "cpu"]
    api.train(load_recipe("digits-standard", overrides), out="run", show=False)
    return "run", "data.npz"


# ------------------------------------------------------------------------------------------------ the command line


def command(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    import sys

    from clead import cli

    sys.argv = ["clead", *arguments]
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0), *capsys.readouterr()


@pytest.fixture
def colours(folder) -> None:
    """Class 0 is reddish, class 1 bluish."""
    rng = np.random.default_rng(0)
    labels = np.arange(20) % 2
    x = rng.integers(0, 60, (20, 8, 8, 3)).astype(np.uint8)
    x[labels == 0, :, :, 0] += 150
    x[labels == 1, :, :, 2] += 150
    np.savez("d.npz", x_test=x, y_test=labels)


EVALUATE = (
    "--data.path",
    "d.npz",
    "--eval.steps",
    "2",
    "--eval.check_images",
    "0",
    "--threat.eps",
    "1/255",
    "--out",
    "out",
)
QUERIES = (*EVALUATE, "--suite", "black_box")


@pytest.mark.slow
def test_input_and_output_on_the_command_line(colours, capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "argv", ["clead"])
    # Right on (x - 0.5) / 0.1 alone: on raw pixels its bias decides.
    threshold = [MEAN, ("MatMul", ["p", "W"], ["l"], {}), ("Neg", ["l"], ["minus"], {})]
    outputs = (("l", "FLOAT", ["n", 2]), ("minus", "FLOAT", ["n", 2]))
    write("m.onnx", nodes=threshold, outputs=outputs)
    code, _, err = command(capsys, "evaluate", "--model", "m.onnx", *QUERIES)
    assert code == 2 and "say which: --model.output l" in err
    for given in (("--model.output", "l"), ("--model.output", "0"), ("--model.output=l",)):
        code, _, err = command(capsys, "evaluate", "--model", "m.onnx", *given, *QUERIES, "--json", "r.json")
        assert code == 0 and json.loads(Path("r.json").read_text())["clean"]["accuracy"] == 1, err
    for given, accuracy in (
        (("--model.input", "mean=0.5,0.5,0.5, std=0.25"), 1),
        (("--model.input.mean", "0.5", "--model.input.std", "0.25"), 1),
        (("--model.input", "channels=bgr"), 0),
        (("--model.input.channels", "bgr"), 0),
    ):
        arguments = ("--model", "m.onnx", "--model.output", "1", *given, *QUERIES, "--json", "r.json")
        code, _, err = command(capsys, "evaluate", *arguments)
        record = json.loads(Path("r.json").read_text())
        assert code == 0 and record["clean"]["accuracy"] == 1 - accuracy, err
    for given, says in (
        (("--model.outptu", "1"), "--model.outptu: says nothing about m.onnx; did you mean 'output'?"),
        (("--model.input", "layuot=nhwc"), "model.input.layuot: unknown key; did you mean 'layout'?"),
        (("--model.input.mena", "0.5"), "model.input.mena: unknown key; did you mean 'mean'?"),
        (("--model.classifier", "fc"), "the layers of m.onnx cannot be looked at"),
    ):
        code, _, err = command(capsys, "evaluate", "--model", "m.onnx", *given, *QUERIES)
        assert code == 2 and says in err and err.count("\n") == 1, err


def test_a_state_of_other_preparation_is_not_gone_on_with(colours, capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "argv", ["clead"])
    write("m.onnx")
    arguments = ("evaluate", "--model", "m.onnx", *QUERIES)
    assert command(capsys, *arguments, "--shard", "1/1")[0] == 0  # leaves its state
    code, _, err = command(capsys, *arguments, "--merge", "--model.input", "channels=bgr")
    assert code == 2, err


@pytest.mark.slow
def test_a_factory_with_other_pixels(colours, capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "argv", ["clead"])
    Path("nets.py").write_text(
        "import torch\nfrom torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.fc = nn.Linear(3, 2)\n        self.fc.weight.data = torch.tensor([[1.0, 0, -1], [-1, 0, 1]])\n"
        "        self.fc.bias.data.zero_()\n"
        "    def forward(self, x):\n        assert x.shape[3] == 3 and x.max() > 1\n        return self.fc(x.mean((1, 2)))\n"
    )
    arguments = ("evaluate", "--model", "nets.py:Net", "--model.input", "layout=nhwc range=0..255")
    code, _, err = command(capsys, *arguments, *EVALUATE, "--suite", "pgd", "--json", "r.json")
    assert code == 0, err
    record = json.loads(Path("r.json").read_text())
    assert record["clean"]["accuracy"] == 1 and record["worst"]["accuracy"] == 1  # eps is 1/255 of the pixels in [0, 1]
    code, _, err = command(capsys, *arguments, *EVALUATE, "--suite", "pgd", "--threat.eps=0.5", "--json", "r.json")
    assert code == 0 and json.loads(Path("r.json").read_text())["worst"]["accuracy"] == 0, err
