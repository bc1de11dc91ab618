"""Weights as people keep them: prefixes, checkpoints, old files, shards, folders; what does not fit, and what would harm."""

from __future__ import annotations

import argparse
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from clead.api.evaluation import evaluate_external
from clead.config import evaluation_config
from clead.errors import UserError
from clead.models.class_names import class_names
from clead.weights import load_into, read_weights
from clead.weights.files import load_weights, save_weights


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


class Normalised(nn.Module):
    """As people write it around a network: mean and std as buffers, the network as ``net``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.register_buffer("std", torch.full((3, 1, 1), 0.25))
        self.net = Net()

    def forward(self, x):
        return self.net((x - self.mean) / self.std)


@pytest.fixture
def trained() -> Net:
    torch.manual_seed(0)
    net = Net()
    net(torch.rand(8, 3, 6, 6))  # batch-norm counts to one
    return net.eval()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(path: str, trained: nn.Module, into: nn.Module | None = None) -> list[str]:
    """Load ``path`` into a new network, hold its logits to the trained one's, and return what was said."""
    torch.manual_seed(1)
    net = into or Net()
    notes = load_into(net, read_weights(path))
    x = torch.rand(4, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), trained(x), rtol=0, atol=0)
    return notes


def refused(path: str, *texts: str, into: nn.Module | None = None) -> str:
    net = into or Net()
    before = state(net)
    with pytest.raises(UserError) as error:
        load_into(net, read_weights(path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items()), "half loaded"
    for text in texts:
        assert text in str(error.value), str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


PREFIXES = {
    "module.": "'module.' was taken off 9 names",
    "_orig_mod.": "'_orig_mod.' was taken off 9 names",
    "module._orig_mod.": "'_orig_mod.' and 'module.' was taken off 9 names",
    "_fsdp_wrapped_module.": "'_fsdp_wrapped_module.' was taken off",
    "model.": "the prefix 'model.' was taken off 9 names",
    "net.": "the prefix 'net.'",
    "backbone.": "the prefix 'backbone.'",
    "encoder.": "the prefix 'encoder.'",
    "model.module.net.": "the prefix 'model.net.'",
    "lightning_module.student.": "the prefix 'lightning_module.student.'",
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_prefixes_are_taken_off_and_said(prefix, suffix, trained):
    content = {prefix + name: tensor for name, tensor in state(trained).items()}
    save_file(content, "w.safetensors") if suffix == ".safetensors" else torch.save(content, "w.pth")
    notes = same(f"w{suffix}", trained)
    assert any(PREFIXES[prefix] in note for note in notes) and any("all 9 tensors of Net" in note for note in notes)


def test_wrappers_inside_a_network_are_taken_off(trained):
    content = {name.replace("conv.", "conv._orig_mod.module."): tensor for name, tensor in state(trained).items()}
    save_file(content, "w.safetensors")
    assert any(
        "was taken off 2 names, such as conv._orig_mod.module." in note for note in same("w.safetensors", trained)
    )


def test_weights_of_the_network_alone_go_into_a_wrapper_around_it(trained):
    save_file(state(trained), "w.safetensors")
    wrapped = Normalised()
    notes = load_into(wrapped, read_weights("w.safetensors"))
    assert torch.equal(wrapped.net.fc.weight, trained.fc.weight) and wrapped.mean[0, 0, 0] == 0.5
    assert any("the prefix 'net.' was put before 9 names" in note for note in notes)
    assert any("lacks mean, std: they are as the model makes them (starting with 0.25, 0.5)" in note for note in notes)
    assert any("9 of the 11 tensors of Normalised" in note for note in notes)


def test_weights_of_a_compiled_and_of_a_parallel_network_go_into_each_other(trained):
    torch.save({f"module.{name}": tensor for name, tensor in state(trained).items()}, "w.pth")
    net = nn.ModuleDict({"_orig_mod": Net()})  # what torch.compile makes has these names
    load_into(net, read_weights("w.pth"))
    assert torch.equal(net.state_dict()["_orig_mod.fc.weight"], trained.fc.weight)


def test_a_header_as_long_as_a_pickle_begins_is_no_pickle():
    for length in (0x280, 0x380, 0x480, 0x580, 0x4B50):
        save_file({"a": torch.ones(2)}, "w.safetensors", {"k": ""})
        more = length - int.from_bytes(Path("w.safetensors").read_bytes()[:8], "little")
        save_file({"a": torch.ones(2)}, "w.safetensors", {"k": "x" * more})
        assert int.from_bytes(Path("w.safetensors").read_bytes()[:8], "little") == length
        assert torch.equal(read_weights("w.safetensors").tensors["a"], torch.ones(2))
        save_weights(Path("own.safetensors"), {"a": torch.ones(2)}, {"k": ""})
        more = length - int.from_bytes(Path("own.safetensors").read_bytes()[:8], "little")
        save_weights(Path("own.safetensors"), {"a": torch.ones(2)}, {"k": "x" * more})
        assert load_weights(Path("own.safetensors"))[1]["k"] == "x" * more


@settings(max_examples=30, deadline=None)
@given(prefix=st.lists(st.sampled_from(["module", "model", "net", "x", "_orig_mod"]), max_size=4))
def test_any_one_prefix_leaves_the_same_network(tmp_path_factory, prefix):
    torch.manual_seed(0)
    net = Net().eval()
    path = tmp_path_factory.mktemp("w") / "w.safetensors"
    save_file({".".join([*prefix, name]): tensor for name, tensor in state(net).items()}, path)
    same(str(path), net)


NESTED = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"m": torch.ones(2)}}}, "args": {"lr": 0.1}},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"a": torch.ones(2)}, "loss": 0.3},
    "net": lambda s: {"net": s, "acc": 91.2, "rng_state": torch.ones(3, dtype=torch.uint8)},
    "params": lambda s: {"params": OrderedDict(s)},
    "weights.net": lambda s: {"weights": {"net": s}, "scheduler": {"a": torch.ones(1)}},
    "anything": lambda s: {"anything": s, "history": [1, 2, 3]},
    "model_ema": lambda s: {"model_ema": s},
}


@pytest.mark.parametrize("key", NESTED)
def test_weights_inside_a_checkpoint(key, trained):
    torch.save(NESTED[key](state(trained)), "ckpt.pth")
    notes = same("ckpt.pth", trained)
    assert f"of ckpt.pth, '{key}' was read" in notes[0]


def test_of_a_model_and_its_average_the_model_is_read_and_the_other_can_be(trained):
    other = Net().eval()
    torch.save({"ema_state_dict": state(other), "model": state(trained)}, "ckpt.pth")
    notes = same("ckpt.pth", trained)
    assert "'model' was read; it also holds ema_state_dict, which --weights ckpt.pth:ema_state_dict takes" in notes[0]
    same("ckpt.pth:ema_state_dict", other)
    refused("ckpt.pth:emma", "nothing under 'emma'; known: ema_state_dict, model")


def test_several_networks_without_a_usual_name_are_not_guessed_at(trained):
    torch.save({"student_a": state(trained), "student_b": state(Net())}, "ckpt.pth")
    refused("ckpt.pth", "several networks: student_a, student_b", "--weights ckpt.pth:student_a")
    same("ckpt.pth:student_a", trained)
    moco = {f"{part}.{k}": v for part in ("encoder_q", "encoder_k") for k, v in state(trained).items()}
    torch.save(moco, "moco.pth")
    refused("moco.pth", "several networks that fit", "moco.pth:encoder_q")
    same("moco.pth:encoder_q", trained)


def test_old_files_without_counters_and_with_thops(trained):
    content = {name: tensor for name, tensor in state(trained).items() if "num_batches" not in name}
    content |= {
        "total_ops": torch.zeros(1),
        "conv.total_params": torch.zeros(1),
        "projection.0.weight": torch.ones(2, 2),
    }
    torch.save(content, "old.pth", _use_new_zipfile_serialization=False)
    notes = same("old.pth", trained)
    assert any("lacks bn.num_batches_tracked: they are as the model makes them (starting with 0)" in n for n in notes)
    assert any("3 tensors that the model has no use for were left out: " in n and "total_ops" in n for n in notes)


def test_nothing_else_is_left_out_in_silence(trained):
    whole = state(trained)
    torch.save({k: v for k, v in whole.items() if not k.startswith("fc")}, "headless.pth")
    refused("headless.pth", "lacks 2 that Net has (fc.weight, fc.bias)", "7 names fit")
    torch.save(whole | {"aux.weight": torch.ones(3, 3)}, "aux.pth")
    refused("aux.pth", "has 1 that Net lacks (aux.weight)", "9 names fit")
    torch.save({f"features.{n}.w": torch.ones(1) for n in range(5)}, "other.pth")
    refused("other.pth", "none of its 5 names", "features.0.w", "conv.weight")
    refused("other.pth", "none of its 5 names", into=Normalised())
    torch.save({k: v for k, v in whole.items() if k != "bn.running_mean"}, "bn.pth")  # a buffer, but learnt
    refused("bn.pth", "lacks 1 that Net has (bn.running_mean)")


def test_another_number_of_classes_names_both(trained):
    torch.save({"state_dict": {f"module.{k}": v for k, v in state(Net(1000)).items()}}, "w.pth")
    refused("w.pth", "a model with 1000 classes, Net was made for 3", "fc.weight should be (3, 4), found (1000, 4)")
    wide = state(trained) | {"conv.weight": torch.ones(8, 3, 3, 3), "bn.weight": torch.ones(8)}
    torch.save(wide, "wide.pth")
    refused("wide.pth", "another architecture: conv.weight should be (4, 3, 3, 3), found (8, 3, 3, 3), and 1 more")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_said(dtype, trained):
    save_file({k: v.to(dtype) if v.is_floating_point() else v for k, v in state(trained).items()}, "w.safetensors")
    net = Net()
    notes = load_into(net, read_weights("w.safetensors"))
    name = str(dtype).removeprefix("torch.")
    assert any(f"8 tensors are {name}, the model computes with them as float32" in note for note in notes)
    assert torch.equal(net.fc.weight, trained.fc.weight.to(dtype).float())


def test_whole_numbers_for_real_ones_are_refused(trained):
    save_file(state(trained) | {"fc.weight": torch.ones(3, 4, dtype=torch.int8)}, "w.safetensors")
    refused("w.safetensors", "fc.weight holds int8, the model's is float32", "not quantised")


def test_a_normalisation_among_the_weights_is_not_dropped_in_silence(trained):
    whole = state(Normalised())
    torch.save(whole, "w.pth")
    line = '--model.input "mean=0.5,0.5,0.5 std=0.25,0.25,0.25"'
    refused("w.pth", "a normalisation layer (mean, std) that Net lacks", line)
    torch.save({f"0.{k}" if k in ("mean", "std") else k.replace("net.", "1."): v for k, v in whole.items()}, "seq.pth")
    refused("seq.pth", "a normalisation layer (0.mean, 0.std)", line)
    notes = load_into(Net(), read_weights("w.pth"), normalized=True)
    assert any("its own normalisation (mean, std) is left out" in note for note in notes)


def test_lazy_layers_take_their_shapes_from_the_file(trained):
    torch.save({"0.weight": torch.ones(2, 5), "0.bias": torch.zeros(2)}, "w.pth")
    net = nn.Sequential(nn.LazyLinear(2))
    load_into(net, read_weights("w.pth"))
    assert net(torch.ones(1, 5)).tolist() == [[5, 5]]


# ------------------------------------------------------------------------------------------------ folders


def sharded(trained: Net, suffix: str) -> None:
    whole = list(state(trained).items())
    save = (lambda c, p: save_file(c, p)) if suffix == "safetensors" else torch.save
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    places = {}
    for number, part in enumerate((whole[:3], whole[3:])):
        file = f"{stem}-0000{number}-of-00002.{suffix}"
        save(dict(part), f"hub/{file}")
        places |= {name: file for name, _ in part}
    Path(f"hub/{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_folder_with_shards_and_a_configuration(suffix, trained):
    Path("hub").mkdir()
    sharded(trained, suffix)
    Path("hub/config.json").write_text(json.dumps({"id2label": {"1": "dog", "0": "cat", "2": "owl"}}))
    prepared = {"do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    Path("hub/preprocessor_config.json").write_text(json.dumps(prepared))
    weights = read_weights("hub")
    assert weights.classes == ("cat", "dog", "owl")
    assert any('--model.input "mean=0.5,0.5,0.5 std=0.25,0.25,0.25"' in note for note in weights.notes)
    same("hub", trained)
    index = next(Path("hub").glob("*.index.json"))
    content = json.loads(index.read_text())
    content["weight_map"]["fc.bias"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    refused("hub", "'../elsewhere.safetensors', which is outside of hub")
    content["weight_map"]["fc.bias"] = "gone.safetensors"
    index.write_text(json.dumps(content))
    refused("hub", "hub lacks gone.safetensors")


def test_other_folders(trained):
    Path("hub").mkdir()
    refused("hub", "no file of weights", "hub/net.pth")
    torch.save(state(trained), "hub/only.ckpt")
    same("hub", trained)
    torch.save(state(trained), "hub/second.pt")
    refused("hub", "2 files of weights (only.ckpt, second.pt)")
    save_file(state(trained), "hub/model.safetensors")
    same("hub", trained)
    Path("hub/config.yaml").write_text("name: run")
    refused("hub", "hub is a run: give it to clead evaluate hub")


def test_names_of_classes_that_files_state(trained):
    save_file(state(trained), "w.safetensors", {"format": "pt", "classes": "cat,dog,owl", "note": "not JSON"})
    assert read_weights("w.safetensors").classes == ("cat", "dog", "owl")
    for number, (key, value) in enumerate(
        {
            "classes": ["cat", "dog", "owl"],
            "class_to_idx": {"owl": 2, "cat": 0, "dog": 1},
            "meta": {"CLASSES": ("cat", "dog", "owl")},
            "id2label": {0: "cat", 1: "dog", 2: "owl"},
        }.items()
    ):
        torch.save({"state_dict": state(trained), key: value}, f"{number}.pth")
        assert read_weights(f"{number}.pth").classes == ("cat", "dog", "owl"), key
    save_file(state(trained), "w.safetensors", {"id2label": json.dumps({k: f"LABEL_{k}" for k in range(3)})})
    assert read_weights("w.safetensors").classes is None


@pytest.mark.parametrize(
    "value, names",
    [
        ('["a", "b"]', ("a", "b")),
        ("{0: 'a', 1: 'b'}", ("a", "b")),
        (
            '{"10": "k", "0": "a", "1": "b", "2": "c", "3": "d", "4": "e", "5": "f", "6": "g", "7": "h", "8": "i", "9": "j"}',
            tuple("abcdefghijk"),
        ),
        ("a\nb\nc", ("a", "b", "c")),
        ("a, b", ("a", "b")),
        ({"a": 0, "b": 1}, ("a", "b")),
        ([0, 90, 180], ("0", "90", "180")),
        ({0: "a", 2: "b"}, None),
        (["a", "a"], None),
        (["a"], None),
        ("a", None),
        (None, None),
        ([["a"], ["b"]], None),
        ("__import__('os').system('false')", None),
        ("{" * 100_000, None),
        ("[" + "'a'," * 2_000_000 + "]", None),
    ],
)
def test_class_names_in_any_form(value, names):
    assert class_names(value) == names


# ------------------------------------------------------------------------------------------------ what is no weights


class Own:
    pass


def test_a_whole_model_and_other_objects_are_refused_with_the_line_to_type(trained):
    for legacy in (False, True):
        torch.save(trained, "whole.pth", _use_new_zipfile_serialization=not legacy)
        refused(
            "whole.pth",
            "a whole pickled model (",
            "Net), which can run code",
            "torch.save(torch.load('whole.pth', weights_only=False).state_dict(), 'weights.pth')",
        )
    torch.save({"state_dict": state(trained), "args": argparse.Namespace(lr=0.1)}, "args.pth")
    refused(
        "args.pth", "holds argparse.Namespace beside its tensors", "torch.save(torch.load('args.pth'", "['state_dict']"
    )
    torch.save({"state_dict": state(trained), "best": np.float64(0.5)}, "best.pth")
    refused("best.pth", "numpy", "scalar beside its tensors")
    torch.save({"epoch": 3}, "none.pth")
    refused("none.pth", "holds no weights (with epoch)", "model.state_dict()")
    torch.save([1, 2], "list.pth")
    refused("list.pth", "holds no weights (a list)")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_files_that_are_no_weights_are_named(trained):
    Path("lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    refused("lfs.safetensors", "a Git LFS pointer", "git lfs pull")
    Path("page.pth").write_text("\n<!DOCTYPE html><html></html>")
    refused("page.pth", "a web page", "by its raw link")
    Path("net.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50))
    refused("net.h5", "an HDF5 file (Keras)")
    Path("empty.pth").write_bytes(b"")
    refused("empty.pth", "an empty file")
    Path("net.npz").write_bytes(b"")
    np.savez("net.npz", a=np.ones(2))
    refused("net.npz", "a zip archive, but not of torch.save (in it: a.npy)")
    Path("model.safetensors.index.json").write_text("{}")
    refused("model.safetensors.index.json", "a JSON text")
    refused("gone.pth", "no weights at gone.pth")
    torch.jit.script(trained).save("script.pt")
    refused("script.pt", "a TorchScript program", "torch.jit.load('script.pt')")
    Path("list.pkl").write_bytes(pickle.dumps([1, 2]))
    refused("list.pkl", "is a pickle, which can run code")


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_files_are_named_wherever_they_are_cut(legacy, trained):
    torch.save({"state_dict": state(trained)}, "whole.pth", _use_new_zipfile_serialization=not legacy)
    content = Path("whole.pth").read_bytes()
    for cut in [*range(1, 64), *range(64, len(content) - 1, max(1, len(content) // 40))]:
        Path("cut.pth").write_bytes(content[:cut])
        refused("cut.pth", "cut.pth")


# ------------------------------------------------------------------------------------------------ what would harm


def rewritten(change: object, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile("plain.pth") as source, zipfile.ZipFile("bad.pth", "w", compression) as target:
        for member in source.infolist():
            content = source.read(member)
            name, content = change(member.filename, content) if callable(change) else (member.filename, content)
            target.writestr(zipfile.ZipInfo(name), content, compression)


def test_archives_that_would_fill_the_memory_are_refused(trained):
    torch.save({"a": torch.zeros(2**20)}, "plain.pth")
    rewritten(None, zipfile.ZIP_DEFLATED)
    assert Path("bad.pth").stat().st_size < 50_000
    refused("bad.pth", "compressed, which torch.save never does")
    grown = pickle.dumps({"a": b"0" * 33_000_000}, protocol=2)
    rewritten(lambda name, c: (name, grown if name.endswith("data.pkl") else c))
    refused("bad.pth", "its description has 33", "at most 32000000")
    torch.save({"a": torch.ones(1).expand(10**11)}, "wide.pth")
    refused("wide.pth", "a (100000000000,) repeats its values")
    # Allowed by weights_only, and takes as much memory as a number says.
    memory = b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R."
    rewritten(lambda name, c: (name, memory if name.endswith("data.pkl") else c))
    refused("bad.pth", "bytearray")
    Path("legacy.pth").write_bytes(memory)
    refused("legacy.pth", "bytearray")


def test_a_storage_larger_than_its_file_is_refused():
    torch.save({"a": torch.arange(4.0)}, "old.pth", _use_new_zipfile_serialization=False)
    content = Path("old.pth").read_bytes()
    four = content.rindex(b"K\x04")  # its count of numbers
    where = content.index(b"cpu") if b"cpu" in content else four
    for place in range(where, min(where + 40, len(content))):
        if content[place : place + 2] == b"K\x04":
            Path("bad.pth").write_bytes(content[:place] + b"J" + struct.pack("<i", 2**31 - 1) + content[place + 2 :])
            refused("bad.pth", "damaged")
            return
    raise AssertionError("the file is laid out otherwise than this test thinks")


# ------------------------------------------------------------------------------------------------ in use


def test_an_evaluation_says_what_was_loaded(trained, capsys):
    rng = np.random.default_rng(0)
    np.savez("d.npz", x_test=rng.integers(0, 255, (12, 6, 6, 3)).astype(np.uint8), y_test=np.arange(12) % 3)
    Path("nets.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self, num_classes):\n        super().__init__()\n"
        "        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, num_classes)\n"
        "    def forward(self, x): return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))\n"
    )
    torch.save({"state_dict": {f"module.{k}": v for k, v in state(trained).items()}, "classes": list("abc")}, "w.pth")
    overrides = ["--data.path", "d.npz", "--eval.suite", "pgd", "--eval.steps", "1", "--eval.curve_points", "0"]
    config = evaluation_config("evaluation", [*overrides, "--eval.check_images", "0"])
    record = evaluate_external("nets.py:Net", config, weights="w.pth", out="out", show=False).record
    loaded = [note for note in record.notes if "tensors of Net are from w.pth:state_dict" in note]
    assert loaded and any("'module.' was taken off 9 names" in note for note in record.notes)
    assert loaded[0] in capsys.readouterr().err
    assert record.model.weights == "w.pth"
