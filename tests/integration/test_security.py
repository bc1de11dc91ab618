"""What comes from somebody else – a model, images, a record, a recipe – is data: nothing of it runs or explodes."""

import ast
import copy
import io
import os
import pickle
import shlex
import shutil
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save as to_safetensors

import clead
from clead import api, cli
from clead.config import load_recipe, parse_yaml
from clead.data import decoding
from clead.data.datasets.auto import read_any
from clead.data.decoding import ResizeSpec, decode
from clead.errors import UserError
from clead.evaluation import adversarial_dataset
from clead.evaluation.state import ResumableResults
from clead.models import user_model
from clead.models.onnx import OnnxModel
from clead.runs.directory import RunDir
from clead.weights import read_weights
from clead.weights.files import load_weights
from support import TINY

SOURCE = Path(clead.__file__).parent

# ------------------------------------------------------------------------------------------------ pickles


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return (os.mkdir, (str(self.ran),))


def pickles(ran):
    """The same malice in every wrapping that a loader might take it in: name -> bytes."""
    zipped, legacy, npy, npz = (io.BytesIO() for _ in range(4))
    torch.save({"a": Bomb(ran)}, zipped)
    torch.save(Bomb(ran), legacy, _use_new_zipfile_serialization=False)
    objects = np.array([Bomb(ran)], dtype=object)
    np.save(npy, objects, allow_pickle=True)
    np.savez(npz, x_train=objects, y_train=objects, x_test=objects, y_test=objects, classes=objects)
    with zipfile.ZipFile(hidden := io.BytesIO(), "w") as archive:
        for key in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(key, pickle.dumps(Bomb(ran)))  # without .npy: NumPy returns what it holds
    raw = {f"protocol {n}": pickle.dumps(Bomb(ran), protocol=n) for n in range(pickle.HIGHEST_PROTOCOL + 1)}
    wrapped = {"zip": zipped, "legacy": legacy, "npy": npy, "npz": npz, "hidden": hidden}
    state = b"clead-state-1\n" + __import__("hashlib").sha256(zipped.getvalue()).digest() + zipped.getvalue()
    return {**raw, **{name: buffer.getvalue() for name, buffer in wrapped.items()}, "forged state": state}


def _parquet_of(path):
    """Pickles as the bytes of images, in a Parquet file that is whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = path.read_bytes()
    folder = path.parent / f"{path.name}-folder"
    folder.mkdir()
    for part in ("train", "test"):
        rows = [{"image": {"bytes": content, "path": None}, "label": n % 2} for n in range(4)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{part}-0.parquet")
    return load_recipe("digits-standard", ["--data.name", "auto", "--data.path", str(folder)]).data.load(0)


def _cifar_python(path):
    """Pickles as the files of the Python version of CIFAR-10, as torchvision keeps them."""
    folder = path.parent / f"{path.name}-folder/cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"):
        shutil.copy(path, folder / name)
    return read_any(folder.parent)


def _named(*names, read=None):
    """Pickles as files of these names in a folder; ``read`` is the one that is given as path."""

    def load(path, run):
        folder = path.parent / f"{path.name}-folder"
        folder.mkdir()
        for name in names:
            shutil.copy(path, folder / name)
        return read_any(folder / (read or ""))

    return load


def _shard(path):
    folder = path.parent / f"{path.name}-folder"
    folder.mkdir()
    for part in ("train", "test"):
        shutil.copy(path, folder / f"{part}-0.parquet")
    return read_any(folder)


def _placed(name, call):
    """A run in which the malicious file stands in the place of ``name``."""

    def load(path, run):
        (run / name).parent.mkdir(exist_ok=True)
        shutil.copy(path, run / name)
        if name == "resume.state":
            (run / "resume.previous.state").unlink(missing_ok=True)
        return call(run)

    return load


def _resume(run):
    api.train(load_recipe("digits-standard", TINY), out=run, resume=True, show=False)


def _state(run):
    with ResumableResults(run / "state", {"a": 1}).opened():
        pass
    (run / "part").rename(run / "state" / "part.safetensors")
    with ResumableResults(run / "state", {"a": 1}).opened() as state:
        assert not state.parts


def _cache(run):
    blobs = [b"x"] * 3
    place = decoding._cache_file(blobs, ResizeSpec())
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "part", place)
    assert decoding.read_cache(place, 3) is None


def _start(path, run):
    api.train(load_recipe("digits-standard", [*TINY, "--train.start_from", str(path)]), out=run / "new", show=False)


LOADERS = {
    "weights": lambda path, run: load_weights(path),
    "weights from elsewhere": lambda path, run: read_weights(path),
    "weights of a run": _placed("best.safetensors", clead.load),
    "weights of an evaluation": _placed("best.safetensors", lambda run: api.evaluate_run(run, show=False)),
    "train.start_from": _start,
    "resume state": _placed("resume.state", _resume),
    "resume state, next": _placed("resume.next.state", _resume),
    "evaluation state": _placed("part", _state),
    "cache of decoded images": _placed("part", _cache),
    "configuration": _placed("config.yaml", clead.load),
    "outcome": _placed("outcome.json", lambda run: api.evaluate_run(run, show=False)),
    "metrics": _placed("metrics.jsonl", lambda run: RunDir(run).history()),
    "record": _placed("results/evaluation.json", lambda run: api.compare([run])),
    "pictures of a record": _placed(
        "results/evaluation.safetensors", lambda run: api.write_report([run], run / "report.html")
    ),
    "recipe": lambda path, run: load_recipe(str(path)),
    "npz": lambda path, run: read_any(path.rename(path.with_suffix(".npz"))),
    "Parquet": lambda path, run: _shard(path),
    "images in Parquet": lambda path, run: _parquet_of(path),
    "images": lambda path, run: decode([path.read_bytes()], ["image"], ResizeSpec()),
    "adversarial images": lambda path, run: adversarial_dataset.load(path),
    "ONNX": lambda path, run: OnnxModel(path),
    "CIFAR of torchvision": lambda path, run: _cifar_python(path),
    "zip": _named("a.zip", read="a.zip"),
    "tar": _named("a.tar.gz", read="a.tar.gz"),
    "npy": _named("x_train.npy", "y_train.npy", "x_test.npy", "y_test.npy"),
    "corrupted images": _named("fog.npy", "labels.npy"),
    "IDX": _named("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "CSV": _named("labels.csv", read="labels.csv"),
    "JSON lines": _named("metadata.jsonl", read="metadata.jsonl"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's on TorchScript archives, which these are not
@pytest.mark.parametrize("loader", LOADERS)
def test_no_loader_runs_a_pickle(loader, run, tmp_path):
    ran = tmp_path / "ran"
    kinds = pickles(ran)
    for number, content in enumerate(kinds.values()):
        here = tmp_path / str(number)
        here.mkdir()
        (here / "file").write_bytes(content)
        copy = shutil.copytree(run, here / "run")
        try:
            LOADERS[loader](here / "file", copy)
        except UserError as error:
            assert all("\n" not in problem for problem in error.problems)
        assert not ran.exists(), f"{loader} ran what was in {list(kinds)[number]}"
    assert len(kinds) == 12
    pickle.loads(kinds["protocol 4"])  # and it would have been seen
    assert ran.exists()


@pytest.mark.slow
def test_the_source_has_no_way_to_run_data():
    """Every call that could, in any file: torch.load without weights_only, numpy with pickles, unsafe YAML, eval and exec."""
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(SOURCE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [f"{where} {n}" for n in names if n.split(".")[0] in ("pickle", "marshal", "shelve", "dill")]
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keys = {each.arg: ast.unparse(each.value) for each in node.keywords}
            arguments = [ast.unparse(each) for each in node.args]
            bad = called in ("eval", "exec", "joblib.load", "yaml.unsafe_load", "yaml.full_load", "os.system")
            bad |= called == "torch.load" and keys.get("weights_only") != "True"
            bad |= called in ("np.load", "numpy.load") and keys.get("allow_pickle") != "False"
            bad |= called == "yaml.load" and arguments[1:] != ["_Loader"]
            bad |= called.endswith((".extractall", ".extract"))
            found += [f"{where} {called}"] if bad else []
    assert not found
    assert issubclass(clead.config.yaml_io._Loader, yaml.SafeLoader)


# ------------------------------------------------------------------------------------------------ bombs


def test_the_header_of_safetensors_is_limited(tmp_path):
    path = tmp_path / "w.safetensors"
    whole = to_safetensors({"a": torch.ones(2)})
    for size in (16_000_001, 2**40, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", size) + whole[8:])
        with pytest.raises(UserError, match="truncated or not a safetensors file"):  # the file is not that long
            load_weights(path)
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", 16_000_001))
        file.truncate(16_000_100)
    with pytest.raises(UserError, match="may have 16000000 bytes at most, this one says 16000001"):
        load_weights(path)
    path.write_bytes(to_safetensors({"a": torch.ones(2)}, {"config": "[" * 100_000}))
    with pytest.raises(UserError, match="not a safetensors file"):
        load_weights(path)


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)


@pytest.mark.parametrize(
    "text, said",
    [
        (LAUGHS, "aliases are not supported"),
        ("data: !!python/object/apply:os.system ['false']", "tags are not supported"),
        ("data: !!python/name:os.system", "tags are not supported"),
        ("data: !!python/module:os", "tags are not supported"),
        ("[" * 50_000, "not valid YAML"),
        ("{a: " * 50_000, "not valid YAML"),
        ("a: " + "9" * 90_000, "not valid YAML"),
        ("a: 1\n" * 300_000, "must be under"),
    ],
)
def test_yaml_that_was_made_to_harm(text, said, tmp_path, run):
    for path, call in ((tmp_path / "recipe.yaml", load_recipe), (run / "config.yaml", lambda path: clead.load(run))):
        path.write_text(text)
        with pytest.raises(UserError, match=said) as caught:
            call(str(path))
        assert len(str(caught.value)) < 500 and len(caught.value.problems) == 1


def test_a_recipe_without_end_is_not_read(tmp_path):
    """Such as a device or a pipe, whose size on disk is 0."""
    with pytest.raises(UserError, match="must be a file, it is a device"):
        clead.config.yaml_text(Path("/dev/zero"))


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = zlib.compress(bytes(100_000))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_images_that_unpack_to_gigabytes_are_refused_unread():
    for width, height in ((60_000, 60_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1)):
        with pytest.raises(UserError, match="a decompression bomb|not a readable image") as caught:
            decode([png_header(width, height)], ["bomb.png"], ResizeSpec(8))
        assert "bomb.png" in str(caught.value)
    text = io.BytesIO()  # a comment that unpacks to 64 MiB
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Comment", "x" * 2**26, zip=True)
    Image.new("L", (8, 8)).save(text, "PNG", pnginfo=info)
    with pytest.raises(UserError, match=r"comment\.png: not a readable image"):
        decode([text.getvalue()], ["comment.png"], ResizeSpec())
    with pytest.raises(ValueError, match="9000x9000 pixels, should be 8x8"):
        adversarial_dataset._pixels(png_header(9_000, 9_000), (1, 8, 8))


def npy_header(shape, dtype="|u1"):
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (63 - (10 + len(text)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def test_archives_that_unpack_to_gigabytes_are_refused_unread(tmp_path, monkeypatch):
    bomb, lying = tmp_path / "bomb.npz", tmp_path / "lying.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x_train.npy", "w") as member:
        member.write(npy_header((300, 2**10, 2**10)))
        for _ in range(300):
            member.write(bytes(2**20))
    assert bomb.stat().st_size < 2**19
    with monkeypatch.context() as patch:
        patch.setattr(np, "load", None)
        with pytest.raises(UserError, match="a zip bomb"):
            read_any(bomb)
    for shape in ((2**50, 2, 2), (2**62, 8, 8), (-1, 8, 8), (10**30,)):  # an array that is not there
        with zipfile.ZipFile(lying, "w") as archive:
            archive.writestr("x_train.npy", npy_header(shape) + bytes(100))
        with pytest.raises(UserError, match=r"lying\.npz"):
            read_any(lying)


# ------------------------------------------------------------------------------------------------ paths


EVIL = ("../../../evil", "/tmp/evil", "<script>alert(1)</script>")


def evil_parquet(root):
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir()
    features = {"features": {"label": {"names": list(EVIL), "_type": "ClassLabel"}}}
    for part in ("train", "test"):
        rows = []
        for n in range(30):
            buffer = io.BytesIO()
            Image.fromarray(np.random.RandomState(n).randint(0, 256, (8, 8), dtype=np.uint8)).save(buffer, "PNG")
            rows.append({"image": {"bytes": buffer.getvalue(), "path": f"../../evil{n}.png"}, "label": n % 3})
        table = pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps({"info": features})})
        pq.write_table(table, root / f"{part}-00000-of-00001.parquet")
    return root


def test_names_in_a_data_set_are_never_paths_or_html(tmp_path, monkeypatch):
    """Trained, evaluated, reported and exported: every file lies in the two folders that were named."""
    place = tmp_path / "a" / "b" / "c"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    given = ["--data.name", "auto", "--data.path", str(evil_parquet(place / "data")), "--data.limit_train", "null"]
    path = api.train(load_recipe("digits-standard", [*TINY, *given]), out="run", show=False).path
    record = api.evaluate_run(path, save_adversarial="run/adversarial.parquet", show=False).record
    assert tuple(record.data.classes) == EVIL
    page = api.write_report([path], "run/report.html").read_text()
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page
    api.export_run(path, out="given", format="safetensors")
    allowed = [place / name for name in ("data", "run", "given")]
    stray = [file for file in tmp_path.rglob("*") if file.is_file() and not any(a in file.parents for a in allowed)]
    assert [file for file in stray if "clead-cache" not in file.parts] == []
    assert not Path("/tmp/evil").exists()


# ------------------------------------------------------------------------------------------------ code


NET = """
from pathlib import Path
from torch import nn

Path(__file__).with_name("ran").touch()

def make(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""


@pytest.fixture
def given(tmp_path, monkeypatch):
    """What somebody gives away: a run whose configuration names code, which lies beside it, and a recipe that does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(user_model, "_ALLOWED", set())
    (tmp_path / "net.py").write_text(NET)
    config = load_recipe("digits-standard", [*TINY[4:], "--model.name", "net.py:make"])
    api.train(config, out="run", show=False)
    monkeypatch.setattr(user_model, "_ALLOWED", set())
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    (tmp_path / "ran").unlink()
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    return tmp_path


def clead_(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["clead", *shlex.split(arguments)])
    monkeypatch.setattr(user_model, "_ALLOWED", set())
    sys.modules.pop("net", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


COMMANDS = (
    "evaluate run",
    "attack run --attack.steps 1",
    "corruptions run",
    "export run --out given --format safetensors",
    "train recipe.yaml --out new",
    "train recipe.yaml --out run --resume",
    f"train digits-standard {shlex.join(TINY)} --data.labelled 0.5 --data.pseudo_labels_from run --out new",
    "evaluate other --transfer-from run",
    "serve run",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_code_that_a_file_names_does_not_run(command, given, trained, monkeypatch, capsys):
    shutil.copytree(trained, given / "other")
    before = sorted(given.rglob("*"))
    assert clead_(command, monkeypatch) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "that the code net.py:make is to be run" in line and "add --allow-code net.py:make" in line
    assert not (given / "ran").exists()
    # Nothing is left, but for a server's or an evaluation's empty folder.
    assert [path for path in sorted(given.rglob("*")) if path.is_file() and path not in before] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "evaluate run --allow-code net.py:make",
        "--allow-code net.py:make evaluate run",
        "evaluate --allow-code=net.py:make run",
        "evaluate --allow-code ./net.py:make run",
        "train recipe.yaml --out new --model.name net.py:make",
        "train recipe.yaml --out new --model.name=net.py:make",
        "train recipe.yaml --out run --resume --allow-code net.py:make",
    ],
)
def test_code_that_the_user_names_runs(command, given, monkeypatch):
    assert clead_(command, monkeypatch) == 0
    assert (given / "ran").exists()


def test_other_code_than_the_user_named_does_not_run(given, monkeypatch, capsys):
    for said in ("--allow-code other.py:make", "--allow-code net.py:other", "--allow-code ''"):
        assert clead_(f"evaluate run {said}", monkeypatch) == 2
        assert "net.py:make" in capsys.readouterr().err
    assert not (given / "ran").exists()
    assert clead_("evaluate run --allow-code", monkeypatch) == 2


def test_a_search_that_a_recipe_describes_names_no_code_for_the_user(given, monkeypatch, capsys):
    recipe = (given / "recipe.yaml").read_text().replace("factory: net.py:make", "factory: other.py:make")
    search = "{trials: 1, space: {optim.lr: {low: 0.001, high: 0.01}}, during: {model.factory: net.py:make}}"
    (given / "recipe.yaml").write_text(f"{recipe}tune: {search}\n")
    assert clead_("tune recipe.yaml --out search", monkeypatch) == 2
    assert "is to be run" in capsys.readouterr().err and not (given / "ran").exists()


def test_what_comes_next_is_said_with_leave_to_run_the_code(given, monkeypatch, capsys):
    assert clead_("train recipe.yaml --out new --model.name net.py:make", monkeypatch) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
    assert line == "next: clead evaluate new --allow-code net.py:make"
    assert clead_(f"{line.removeprefix('next: clead ')} --suite quick --eval.images 4", monkeypatch) == 0


def test_own_code_that_ends_the_process_is_a_mistake_of_the_user(given, monkeypatch, capsys):
    (given / "script.py").write_text("import sys\nsys.exit(7)\n")
    assert clead_("train digits-standard --model.name script.py:make --out new", monkeypatch) == 2
    assert "importing script.py raised SystemExit: 7" in capsys.readouterr().err


def test_files_of_one_name_are_two_modules(tmp_path):
    made = []
    for folder, width in (("a", 3), ("b", 5)):
        (tmp_path / folder).mkdir()
        code = f"from torch import nn\nclass Net(nn.Linear):\n    def __init__(self):\n        super().__init__(2, {width})\n"
        (tmp_path / folder / "net.py").write_text(code)
        made.append(user_model.make_module(f"{tmp_path / folder / 'net.py'}:Net", 2))
    assert [net.out_features for net in copy.deepcopy(made)] == [3, 5]
    modules = {sys.modules[type(net).__module__] for net in made}
    assert len(modules) == 2 and {Path(m.__file__).parent.name for m in modules} == {"a", "b"}


def test_in_python_what_an_override_names_is_named_by_the_user(given):
    with pytest.raises(UserError, match="is to be run"):
        api.train(load_recipe("recipe.yaml"), out="new", show=False)
    api.train(load_recipe("digits-standard", [*TINY[4:], "--model.name", "net.py:make"]), out="new", show=False)
    assert clead.load("new") and (given / "ran").exists()


def test_in_python(given):
    with pytest.raises(UserError, match=r"clead\.allow_code\('net\.py:make'\)"):
        clead.load("run")
    assert not (given / "ran").exists()
    own = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    assert clead.load("run", model=own)  # the object itself: no code is named
    clead.allow_code("net.py:make")
    assert clead.load("run") and (given / "ran").exists()


def test_only_strings_that_name_code_are_taken_for_it():
    from clead.cli.app import _with_code

    line = ["train", "x", "--model.name", "resnet8", "--model.factory=a:b", "--out", "y"]
    assert _with_code(line) == ["--allow-code", "a:b", *line]
    assert _with_code(["a", "--model.name"]) == ["a", "--model.name"]
    assert parse_yaml("allow_code: 1", "x") == {"allow_code": 1}
    with pytest.raises(UserError, match="unknown group"):
        clead.RunConfig.from_dict({"data": {"name": "digits"}, "train": {"epochs": 1}, "allow_code": ["net.py:make"]})
