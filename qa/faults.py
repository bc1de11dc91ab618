"""Faults that are put in the way of the program: each is refused in one line or passed over, and harms nothing.

    python qa/faults.py --out qa/faults.json                                            (ten minutes on 2 cores)
    python qa/faults.py --out qa/faults.json --group text --again

Every fault has a folder of its own with a trained and evaluated run, pictures, and a folder ``outside`` that nothing may touch. It
is put there, and the command line is run on it in a process of its own, under limits of time and of memory. A fault is held if
there was no traceback; the exit code was one of those that are right; an error was one line; ``outside`` is the same to the byte;
and no half-written file was left. The record is written after every fault, and what it has is not done again without ``--again``.

The processes are forked from one that has imported everything, so a fault costs a fraction of a second. A group is a list of
functions with ``@fault(group, cases)``; add one to make faults of a new kind.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults_serving import FAULTS as CLIENTS
from PIL import Image

import clead
from clead import cli
from clead.atomic_io import write_atomically
from clead.weights.files import load_weights, save_weights

SECONDS = 120.0
MEMORY = 6 * 2**30  # bytes of address space beyond what importing takes
TINY = (
    *("--model.width", "4", "--model.features", "8", "--data.limit_train", "60", "--data.batch_size", "27"),
    *("--train.epochs", "1", "--train.validate_steps", "1", "--train.device", "cpu"),
)
QUICK = (
    *("--suite", "pgd", "--eval.images", "20", "--eval.steps", "2", "--eval.curve_points", "0"),
    *("--eval.check_images", "0", "--eval.gallery", "4", "--train.device", "cpu"),
)
PICTURES = (
    *("--data.name", "auto", "--model.width", "4", "--data.batch_size", "8", "--train.epochs", "1"),
    *("--train.validate_steps", "1", "--train.device", "cpu", "--data.val_fraction", "0.3"),
)

Fault = tuple[str, str, Callable[["Place", Any], None], Any]
FAULTS: list[Fault] = []


def fault(group: str, cases: Iterable[Any] | dict[str, Any]) -> Callable:
    """Register a function of (place, case) as one fault of ``group`` for every case."""

    def register(function: Callable) -> Callable:
        named = cases.items() if isinstance(cases, dict) else ((str(case), case) for case in cases)
        for name, case in named:
            FAULTS.append((group, f"{function.__name__}: {name}"[:150], function, case))
        return function

    return register


class Harm(Exception):
    """What went wrong."""


class Place:
    """A fault's folder: ``run``, ``photos``, ``outside``."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base, self.commands = folder, base, 0
        shutil.copytree(base, folder)
        self.run, self.photos, self.outside = folder / "run", folder / "photos", folder / "outside"
        self.before = hashes(self.outside)

    def clead(
        self,
        *arguments: Any,
        codes: tuple[int, ...] = (2,),
        streams: dict[int, str | None] | None = None,
        environment: dict[str, str] | None = None,
    ) -> tuple[int, str, str]:
        """Run the command line and check what must hold of every fault; return exit code, standard output and error."""
        self.commands += 1
        files = [self.folder / f"{name}-{self.commands}.txt" for name in ("stdout", "stderr")]
        child = os.fork()
        if child == 0:
            _become(self.folder, [str(each) for each in arguments], files, streams or {}, environment or {})
        code = _wait(child)
        out, err = (file.read_text(errors="replace") if file.exists() else "" for file in files)
        if code is None:
            raise Harm(f"took over {SECONDS:.0f} s")
        if "Traceback" in err or "Exception ignored" in err:
            raise Harm(f"traceback: {err.strip().splitlines()[-1][:200]}")
        if code not in codes:
            raise Harm(f"exit code {code}, expected {' or '.join(map(str, codes))}: {(err or out).strip()[-300:]}")
        errors = [line for line in err.splitlines() if line.startswith("clead: error:")]
        if code == 2 and not streams and (not errors or max(map(len, errors)) > 1500):
            raise Harm(f"no error of one line: {err[-300:]!r}")
        self.check()
        return code, out, err

    def check(self) -> None:
        """Raise Harm if something outside was touched or half a file was left."""
        if (after := hashes(self.outside)) != self.before:
            raise Harm(f"outside changed: {sorted(set(after.items()) ^ set(self.before.items()))[:4]}")
        left = [path for path in self.run.rglob(".*.????????") if not path.is_symlink()]
        if left:
            raise Harm(f"half a file was left: {left[0]}")

    def expect(self, holds: Any, what: str) -> None:
        """Raise Harm unless ``holds``."""
        if not holds:
            raise Harm(what)


def _become(folder: Path, arguments: list[str], files: list[Path], streams: dict, environment: dict) -> None:
    """Be the program, in a forked process; never returns."""
    code = 99
    try:
        os.chdir(folder)
        os.environ.update(environment)
        for number, path in zip((1, 2), files, strict=True):
            target = streams.get(number, str(path))
            if target is None:
                os.close(number)
                continue
            handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, number)
            os.close(handle)
        encoding = environment.get("PYTHONIOENCODING", "utf-8")
        for name, number in (("stdout", 1), ("stderr", 2)):
            stream = None
            if streams.get(number, "") is not None:
                stream = io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding=encoding, write_through=True)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        sys.argv = ["clead", *arguments]
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        import traceback

        with contextlib.suppress(Exception):
            files[1].open("a").write(traceback.format_exc())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _wait(child: int) -> int | None:
    late = time.monotonic() + SECONDS
    while time.monotonic() < late:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def hashes(folder: Path) -> dict[str, str]:
    """Return a digest of every file and the kind of everything else below ``folder``."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file() and not path.is_symlink()
        else oct(path.lstat().st_mode)
        for path in sorted(folder.rglob("*"))
    }


def _bind(path: Path) -> None:
    """Make a socket; its address is its name alone, since it may have 107 bytes."""
    before = os.getcwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)
    os.chdir(before)


def make_base(base: Path) -> None:
    """Make what every fault starts from."""
    clead.train(clead.load_recipe("digits-standard", TINY), out=base / "run", show=False)
    config = clead.load_recipe("digits-standard", [*TINY, *QUICK[2:], "--eval.suite", "pgd"])
    clead.evaluate_run(base / "run", config=config, show=False)
    random = np.random.RandomState(0)
    for number in range(36):
        part = base / "photos" / ("test" if number % 3 == 0 else "train") / f"kind{number % 2}"
        part.mkdir(parents=True, exist_ok=True)
        pixels = random.randint(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(part / f"{number}.png")
    (base / "outside" / "inner").mkdir(parents=True)
    for name in ("best.safetensors", "notes.txt", "inner/0-0.safetensors", "inner/1.png"):
        (base / "outside" / name).write_bytes(random.bytes(200))


# ------------------------------------------------------------------------------------------------ file system

IN_RUN = (
    *("config.yaml", "metrics.jsonl", "outcome.json", "environment.json", "best.safetensors", "last.safetensors"),
    *("resume.state", "results", "results/evaluation.json", "results/evaluation.safetensors", "tensorboard"),
    *("results/evaluation.state", "report.html", "report-figures", "stored", "photo.png"),
)
VERBS: dict[str, tuple[str, ...]] = {
    "evaluate": ("evaluate", "run", *QUICK, "--fresh"),
    "report": ("report", "run"),
    "resume": ("train", "digits-standard", *TINY, "--out", "run", "--resume"),
}


@fault("file system", {f"{name}, {verb}": (name, verb) for name in IN_RUN for verb in VERBS})
def a_link_out_of_the_run(place: Place, case: tuple[str, str]) -> None:
    name, verb = case
    path = place.run / name
    folder = path.is_dir() or path.suffix in (".state", "") or name.endswith("figures")
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(place.outside / ("inner" if folder and name != "resume.state" else "notes.txt"))
    place.clead(*VERBS[verb])
    place.expect(path.is_symlink(), "the link was replaced")


@fault("file system", {f"{name}, {verb}": (name, verb) for name in IN_RUN[1:8:2] for verb in VERBS})
def a_fifo_in_the_run(place: Place, case: tuple[str, str]) -> None:
    name, verb = case
    path = place.run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    os.mkfifo(path)
    place.clead(*VERBS[verb])


@fault("file system", ["metrics.jsonl", "outcome.json", "results/evaluation.json", "x.png"])
def a_socket_in_the_run(place: Place, name: str) -> None:
    path = place.run / name
    path.unlink(missing_ok=True)
    _bind(path)
    place.clead(*VERBS["evaluate"])


@fault("file system", ["/dev/zero", "/dev/urandom", "/dev/null", "..", "/", "/proc/self/mem", "nothing", "loop"])
def a_link_to_something_odd(place: Place, target: str) -> None:
    path = place.run / "loop"
    path.symlink_to(target)
    place.clead(*VERBS["report"], codes=(0,) if target == "nothing" else (2,))


@fault("file system", ["metrics.jsonl", "best.safetensors", "results/evaluation.json", "config.yaml"])
def a_hard_link_to_outside(place: Place, name: str) -> None:
    kept = place.outside / "kept"
    os.link(place.run / name, kept)
    place.before = hashes(place.outside)
    place.clead(*VERBS["evaluate"], codes=(0,))
    place.clead(*VERBS["resume"], codes=(0,))


OUTPUTS = ("/dev/null", "/dev/stdout", "/dev/stderr", "/dev/fd/1", "link", "dangling")


@fault("file system", OUTPUTS)
def json_through_what_is_no_file(place: Place, target: str) -> None:
    (place.folder / "target").write_text("old")
    (place.folder / "link").symlink_to("target")
    (place.folder / "dangling").symlink_to("made")
    before = {name: os.lstat(place.folder / name).st_mode for name in (target,)}
    place.clead("compare", "run", "--json", target, codes=(0,))
    place.expect(before == {name: os.lstat(place.folder / name).st_mode for name in (target,)}, "it was replaced")


@fault("file system", ["folder", "socket", "fifo without a reader", "file/inside", "n" * 300, "/proc/version", "\0"])
def json_where_it_cannot_be(place: Place, target: str) -> None:
    (place.folder / "folder").mkdir()
    (place.folder / "file").write_text("")
    os.mkfifo(place.folder / "fifo without a reader")
    _bind(place.folder / "socket")
    place.clead("compare", "run", "--json", target)


@fault("file system", ["run", "photos", "outside", "/dev/null", "outside/notes.txt", "link to outside"])
def a_run_where_something_is(place: Place, target: str) -> None:
    (place.folder / "link to outside").symlink_to("outside")
    place.clead("train", "digits-standard", *TINY, "--out", target)


@fault("file system", [0o022, 0o077, 0o027])
def the_umask_is_honoured(place: Place, mask: int) -> None:
    before = os.umask(mask)
    try:
        place.clead("compare", "run", "--json", "made/result.json", codes=(0,))
    finally:
        os.umask(before)
    made = place.folder / "made" / "result.json"
    place.expect(made.stat().st_mode & 0o777 == 0o666 & ~mask, f"mode {oct(made.stat().st_mode)}")
    place.expect(made.parent.stat().st_mode & 0o777 == 0o777 & ~mask, f"mode {oct(made.parent.stat().st_mode)}")


@fault(
    "file system",
    ["a\nb", "a\x1b[2Jb", "[bold]x[red]", "-run", "ü 日本", "x" * 200, "$x$ $y", "<b>&", "a|b", "%s {0}"],
)
def a_run_of_an_odd_name(place: Place, name: str) -> None:
    place.run.rename(place.folder / name)
    where = f"./{name}"
    _, out, err = place.clead("evaluate", where, *QUICK, "--fresh", codes=(0,))
    place.expect("\x1b" not in out + err, "an escape code was printed")
    place.clead("report", where, codes=(0,))
    place.clead("export", where, "--out", "exported", codes=(0,))
    place.clead("compare", where, codes=(0,))


# ------------------------------------------------------------------------------------------------ bounded memory

DEEP = "[" * 200_000
HUGE = '{"a": ' + "9" * 2_000_000 + "}"
JSONS = ("outcome.json", "metrics.jsonl", "results/evaluation.json")


@fault(
    "bounded memory",
    {f"{n}, {k}": (n, t) for n in JSONS for k, t in (("deep", DEEP), ("digits", HUGE), ("null", "null"))},
)
def json_made_to_harm(place: Place, case: tuple[str, str]) -> None:
    name, text = case
    (place.run / name).write_text(f"{text}\n{text}\n" if name.endswith("l") else text)
    place.clead("report", "run", codes=(0, 2) if name == "outcome.json" else (2,))


@fault(
    "bounded memory", ["config.yaml", "metrics.jsonl", "results/evaluation.json", "last.safetensors", "resume.state"]
)
def a_sparse_file_of_a_terabyte(place: Place, name: str) -> None:
    (place.run / name).unlink(missing_ok=True)
    with (place.run / name).open("wb") as file:
        file.truncate(2**40)
    verb = "resume" if name == "resume.state" else "evaluate" if name == "last.safetensors" else "report"
    place.clead(*VERBS[verb], codes=(2,))


YAML = {
    "aliases": "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(40)),
    "deep": "[" * 50_000,
    "deep mappings": "a: {" * 5000,
    "large": "#" * 2_000_000,
    "digits": "train: {seed: " + "9" * 100_000 + "}",
    "merge": "<<: {a: 1}\ntrain: {epochs: 1}",
    "tag": "!!python/object/apply:os.system [touch outside/hacked]",
    "binary": "\0\1\2",
    "words": "hello",
    "list": "- a",
    "twice": "train: {epochs: 1}\ntrain: {epochs: 2}",
}


@fault("bounded memory", YAML)
def a_recipe_made_to_harm(place: Place, text: str) -> None:
    (place.folder / "recipe.yaml").write_text(text)
    place.clead("train", "recipe.yaml", "--out", "made")
    place.expect(not (place.folder / "made").exists(), "a run was made")


@fault("bounded memory", YAML)
def a_configuration_made_to_harm(place: Place, text: str) -> None:
    (place.run / "config.yaml").write_text(text)
    place.clead(*VERBS["evaluate"])


HEADERS = {
    "length": (2**62).to_bytes(8, "little") + b"{}",
    "large": (10**8).to_bytes(8, "little") + b" " * 100,
    "no json": (4).to_bytes(8, "little") + b"oops",
    "shape": b"",
    "empty": b"",
    "pickle": b"\x80\x04cos\nsystem\n",
}


@fault("bounded memory", HEADERS)
def weights_with_a_broken_header(place: Place, content: bytes) -> None:
    for name in ("best", "last"):
        (place.run / f"{name}.safetensors").write_bytes(content)
    place.clead(*VERBS["evaluate"])


def png_of(width: int, height: int) -> bytes:
    """Return a PNG whose header says so, with next to no data."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = zlib.compress(b"\0" * min((width + 1) * height, 2**24))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


@fault(
    "bounded memory",
    {"100000 x 100000": (100_000, 100_000), "2^31": (2**31 - 1, 2**31 - 1), "0": (0, 5), "1 x 10^6": (1, 10**6)},
)
def a_picture_that_claims_much(place: Place, size: tuple[int, int]) -> None:
    (place.photos / "train" / "kind0" / "bomb.png").write_bytes(png_of(*size))
    options = ("--data.path", "photos", "--data.image_size", "8", "--data.resize", "crop")
    place.clead("train", "cifar10-small-standard", *PICTURES, *options, "--out", "made", codes=(0, 1, 2))


@fault("bounded memory", {"2e9": 2 * 10**9, "-1": -1, "2^62": 2**62, "10^6": 10**6})
def a_label_out_of_all_range(place: Place, label: int) -> None:
    y = np.array([0, 1] * 10 + [label], dtype=np.int64)
    x = np.random.RandomState(0).randint(0, 256, (21, 8, 8), dtype=np.uint8)
    np.savez(place.folder / "data.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    options = ("--data.path", "data.npz", "--out", "made")
    place.clead("train", "cifar10-small-standard", *PICTURES, *options, codes=(0, 2))


# ------------------------------------------------------------------------------------------------ output

SINKS: dict[str, dict[int, str | None]] = {
    "stdout full": {1: "/dev/full"},
    "stderr full": {2: "/dev/full"},
    "both full": {1: "/dev/full", 2: "/dev/full"},
    "stdout closed": {1: None},
    "stderr closed": {2: None},
    "both closed": {1: None, 2: None},
}
WORK: dict[str, tuple[tuple[str, ...], str]] = {
    "evaluate": (VERBS["evaluate"], "run/results/evaluation.json"),
    "train": (("train", "digits-standard", *TINY, "--out", "made"), "made/outcome.json"),
    "report": (("report", "run", "--out", "page.html"), "page.html"),
    "export": (("export", "run", "--out", "made"), "made/README.md"),
    "compare": (("compare", "run", "--json", "made.json"), "made.json"),
}


@fault("output", {f"{work}, {sink}": (work, sink) for work in WORK for sink in SINKS})
def output_that_cannot_be_written(place: Place, case: tuple[str, str]) -> None:
    arguments, made = WORK[case[0]]
    place.clead(*arguments, codes=(0,), streams=SINKS[case[1]])
    place.expect((place.folder / made).exists(), f"{made} is missing")


@fault(
    "output",
    {
        f"{work}, {e}": (work, e)
        for work in ("evaluate", "train", "report")
        for e in ("ascii", "latin-1", "cp1252", "utf-16")
    },
)
def an_encoding_that_lacks_signs(place: Place, case: tuple[str, str]) -> None:
    arguments, made = WORK[case[0]]
    place.clead(*arguments, codes=(0,), environment={"PYTHONIOENCODING": case[1]})
    place.expect((place.folder / made).exists(), f"{made} is missing")


@fault(
    "output",
    {
        "one column": {"COLUMNS": "1"},
        "no columns": {"COLUMNS": "0"},
        "words": {"COLUMNS": "many"},
        "dumb": {"TERM": "dumb"},
    },
)
def a_narrow_terminal(place: Place, environment: dict[str, str]) -> None:
    place.clead(*VERBS["evaluate"], codes=(0,), environment=environment)


# ------------------------------------------------------------------------------------------------ text

LOOKS = [
    "010",
    "2024",
    "no",
    "on",
    "1e3",
    ".5",
    "true",
    "0x1F",
    "1:30",
    "1_000",
    "a #2",
    "[x]",
    "a: b",
    "2020-01-01",
    "=",
    "*x",
    "-x",
]


@fault("text", LOOKS)
def a_path_that_looks_like_something_else(place: Place, name: str) -> None:
    place.photos.rename(place.folder / name)
    options = (f"--data.path={name}", "--out", "made")
    place.clead("train", "cifar10-small-standard", *PICTURES, *options, codes=(0,))
    config = clead.config.parse_yaml((place.folder / "made" / "config.yaml").read_text(), "config")
    place.expect(str(clead.config.RunConfig.from_dict(config).data.path) == name, f"the path became {config['data']}")


@fault(
    "text",
    [
        "=cmd|'/c calc'!A1",
        "+1",
        "-x",
        "@sum",
        "\tx",
        "<script>alert(1)</script>",
        "[red]x[/y]",
        "a\x1b[31mb",
        "$x^",
        "on",
        'a,b"c',
        "ü",
    ],
)
def a_class_of_an_odd_name(place: Place, name: str) -> None:
    for part in ("train", "test"):
        (place.photos / part / "kind0").rename(place.photos / part / name.replace("/", "∕"))
    place.clead("train", "cifar10-small-standard", *PICTURES, "--data.path", "photos", "--out", "made", codes=(0,))
    _, out, err = place.clead("evaluate", "made", *QUICK, "--eval.images", "12", codes=(0,))
    place.expect("\x1b" not in out + err, "an escape code was printed")
    page = (place.folder / "made" / "report.html").read_text()
    place.expect("<script>alert(1)" not in page, "markup in the report")
    place.clead("report", "made", codes=(0,))
    for table in (place.folder / "made").rglob("*.csv"):
        cells = [cell for line in table.read_text().splitlines() for cell in line.split(",")]
        odd = [cell for cell in cells if cell[:1] in tuple("=+@\t") or (cell[:1] == "-" and not cell[1:2].isdigit())]
        place.expect(not odd, f"a formula in {table.name}: {odd[:1]}")


@fault("text", ["", "{", "12", "null", '{"step": 1', "\xff", '{"kind": "train"}', '["a"]', DEEP])
def a_damaged_line_of_the_log(place: Place, line: str) -> None:
    path = place.run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n", encoding="latin-1")
    fine = line in ('{"kind": "train"}',)
    _, _, err = place.clead("report", "run", codes=(0, 2) if fine else (2,))
    place.expect(fine or "metrics.jsonl line 2 is damaged" in err, f"line 2 is not named: {err[-200:]}")


@fault(
    "text",
    {
        f"{k} {v}": (k, v)
        for k in ("eval.images", "threat.eps", "train.seed", "optim.lr")
        for v in ("0b1", "1:30", "2020-01-01", "nan", ".inf", "1e999", "", "x")
    },
)
def a_number_that_is_none(place: Place, case: tuple[str, str]) -> None:
    place.clead("train", "digits-standard", *TINY, f"--{case[0]}={case[1]}", "--out", "made")
    place.expect(not (place.folder / "made").exists(), "a run was made")


# ------------------------------------------------------------------------------------------------ archives


def npz(place: Place, change: Callable[[bytes], bytes]) -> None:
    """Write data.npz, changed."""
    x = np.random.RandomState(0).randint(0, 256, (30, 8, 8), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, x_train=x[:20], y_train=np.arange(20) % 2, x_test=x[20:], y_test=np.arange(10) % 2)
    (place.folder / "data.npz").write_bytes(change(buffer.getvalue()))


def zipped(entries: dict[str, bytes]) -> bytes:
    """Return a zip of entries, compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def header_of(shape: tuple[int, ...]) -> bytes:
    """Return an .npy header that claims a shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


ARCHIVES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda b: b"",
    "half": lambda b: b[: len(b) // 2],
    "no end": lambda b: b[:-10],
    "head only": lambda b: b[:4],
    "bytes": lambda b: bytes(range(256)) * 10,
    "flipped": lambda b: bytes(x ^ 1 if 300 < i < 330 else x for i, x in enumerate(b)),
    "claims a terabyte": lambda b: zipped({"x_train.npy": header_of((2**40,)), "y_train.npy": header_of((2**40,))}),
    "bomb": lambda b: zipped(
        {"x_train.npy": header_of((2**29,)) + bytes(2**29), "y_train.npy": header_of((1,)) + b"\0"}
    ),
    "pickle": lambda b: zipped(
        {
            "x_train.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
            + b" " * 61
            + b"\n\x80\x04."
        }
    ),
    "other names": lambda b: zipped({"../../outside/hacked": b"x", "/etc/x": b"y"}),
    "ten thousand entries": lambda b: zipped({f"{i}.npy": b"" for i in range(10_000)}),
    "negative shape": lambda b: zipped({"x_train.npy": header_of((-5, 8, 8))}),
}


@fault("archives", ARCHIVES)
def an_npz_made_to_harm(place: Place, change: Callable[[bytes], bytes]) -> None:
    npz(place, change)
    place.clead("train", "cifar10-small-standard", *PICTURES, "--data.path", "data.npz", "--out", "made")
    place.expect(not (place.folder / "made").exists(), "a run was made")


@fault("archives", {name: change for name, change in ARCHIVES.items() if name != "bomb"})
def a_zip_made_to_harm(place: Place, change: Callable[[bytes], bytes]) -> None:
    files = {str(f.relative_to(place.photos)): f.read_bytes() for f in place.photos.rglob("*.png")}
    (place.folder / "data.zip").write_bytes(change(zipped(files)))
    place.clead("train", "cifar10-small-standard", *PICTURES, "--data.path", "data.zip", "--out", "made", codes=(0, 2))


# ------------------------------------------------------------------------------------------------ states

STATES: dict[str, bytes | None] = {
    "empty": b"",
    "text": b"hello",
    "magic only": b"clead-state-1\n",
    "pickle": b"\x80\x04cos\nsystem\n(S'touch outside/hacked'\ntR.",
    "zeros": bytes(10_000),
    "half": None,
}


@fault("states", STATES)
def a_checkpoint_made_to_harm(place: Place, content: bytes | None) -> None:
    path = place.run / "resume.state"
    whole = path.read_bytes() if path.exists() else b"clead-state-1\n" + bytes(1000)
    for name in ("resume.state", "resume.previous.state"):
        (place.run / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    (place.run / "outcome.json").unlink()
    place.clead(*VERBS["resume"])


def compressed_state() -> bytes:
    """Return a checkpoint of a few kilobytes that unpacks to a gigabyte, with its checksum right."""
    buffer = io.BytesIO()
    torch.save({"model": torch.zeros(16)}, buffer)
    out = io.BytesIO()
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, bytes(2**28) if name.endswith("/data/0") else source.read(name))
    payload = out.getvalue()
    return b"clead-state-1\n" + hashlib.sha256(payload).digest() + payload


@fault("states", ["compressed", "of nothing", "of words", "of lists"])
def a_checkpoint_whose_checksum_is_right(place: Place, kind: str) -> None:
    if kind == "compressed":
        content = compressed_state()
    else:
        buffer = io.BytesIO()
        torch.save({"of nothing": {}, "of words": {"position": "x", "model": "y"}, "of lists": [1, 2]}[kind], buffer)
        content = b"clead-state-1\n" + hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()
    for path in place.run.glob("resume*.state"):
        path.unlink()
    (place.run / "resume.state").write_bytes(content)
    (place.run / "outcome.json").unlink()
    place.clead(*VERBS["resume"])


@fault("states", ["not json", "{}", "[]", "null", DEEP, '{"version": 999}'])
def the_header_of_an_evaluation(place: Place, text: str) -> None:
    folder = place.run / "results" / "evaluation.state"
    folder.mkdir()
    (folder / "state.json").write_text(text)
    place.clead("evaluate", "run", *QUICK)
    place.clead("evaluate", "run", *QUICK, "--fresh", codes=(0,))


@fault("states", ["garbage", "empty", "link", "folder", "fifo"])
def a_part_of_an_evaluation(place: Place, kind: str) -> None:
    folder = place.run / "results" / "evaluation.state"
    folder.mkdir()
    path = folder / "0-0.safetensors"
    if kind == "link":
        path.symlink_to(place.outside / "best.safetensors")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(b"x" * 100 if kind == "garbage" else b"")
    place.clead("evaluate", "run", *QUICK, codes=(0, 2))


@fault("states", ["study.journal", "trials.json", "locks", "trial"])
def a_study_with_a_link(place: Place, name: str) -> None:
    study = place.folder / "study"
    (study / "locks").mkdir(parents=True)
    (study / "study.journal").write_text("")
    path = study / name
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.symlink_to(place.outside / ("inner" if name in ("locks", "trial") else "notes.txt"))
    space = ("--tune.trials", "1", "--tune.space.optim.lr", "[0.1, 0.2]")
    place.clead("tune", "digits-pgd-at", *TINY, *space, "--out", "study")


LINES = ["", "{", "12", "null", "\xff", '["a"]', DEEP, '{"op_code": 99, "worker_id": "a"}', '{"op_code": 4}']


@fault("states", LINES)
def a_damaged_line_of_a_study(place: Place, line: str) -> None:
    study = place.folder / "study"
    study.mkdir()
    (study / "study.journal").write_text(f"{line}\n", encoding="latin-1")
    space = ("--tune.trials", "1", "--tune.space.optim.lr", "[0.1, 0.2]")
    _, _, err = place.clead("tune", "digits-pgd-at", *TINY, *space, "--out", "study")
    place.expect("study.journal line 1 is damaged" in err, f"line 1 is not named: {err[-200:]}")
    place.expect((study / "study.journal").read_text(encoding="latin-1") == f"{line}\n", "the journal was changed")


# ------------------------------------------------------------------------------------------------ data layouts

ODD = ("fifo", "socket", "device", "dangling", "loop", "empty", "text", "half", "folder")


@fault("data layouts", ODD)
def a_picture_that_is_none(place: Place, kind: str) -> None:
    path = place.photos / "train" / "kind0" / "odd.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        _bind(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("device", "dangling", "loop"):
        path.symlink_to({"device": "/dev/zero", "dangling": "nothing", "loop": "odd.png"}[kind])
    else:
        whole = next((place.photos / "train" / "kind1").iterdir()).read_bytes()
        path.write_bytes({"empty": b"", "text": b"hello", "half": whole[:60]}[kind])
    place.clead("train", "cifar10-small-standard", *PICTURES, "--data.path", "photos", "--out", "made", codes=(0, 2))


@fault(
    "data layouts",
    ["nothing", "photos/train/kind0/0.png", "/dev/null", "/dev/zero", "outside", "run", "fifo", "empty", "n" * 300],
)
def a_place_without_a_data_set(place: Place, path: str) -> None:
    os.mkfifo(place.folder / "fifo")
    (place.folder / "empty").mkdir()
    place.clead("train", "cifar10-small-standard", *PICTURES, "--data.path", path, "--out", "made")
    place.expect(not (place.folder / "made").exists(), "a run was made")


# ------------------------------------------------------------------------------------------------ models

MODELS = {
    "exits": "import sys\ndef make(k): sys.exit(0)",
    "raises": "def make(k): raise RuntimeError('no')",
    "none": "def make(k): return None",
    "syntax": "def make(k",
    "no factory": "x = 1",
    "nan": "import torch\nclass N(torch.nn.Module):\n  def forward(self, x): return x.flatten(1)[:, :10] * float('nan')\ndef make(k): return N()",
    "wrong shape": "import torch\nclass N(torch.nn.Module):\n  def forward(self, x): return x\ndef make(k): return N()",
    "exits later": "import sys, torch\nclass N(torch.nn.Module):\n  def forward(self, x): sys.exit(0)\ndef make(k): return N()",
}


@fault("models", MODELS)
def code_that_makes_no_model(place: Place, text: str) -> None:
    (place.folder / "net.py").write_text(text)
    place.clead("evaluate", "--model", "net.py:make", "--data.name", "digits", *QUICK, "--out", "made", codes=(1, 2))
    place.expect(not (place.folder / "made" / "evaluation.json").exists(), "a record was made")


TYPES = {
    "float16": (torch.float16, (0,)),
    "bfloat16": (torch.bfloat16, (0,)),
    "float64": (torch.float64, (0,)),
    "int8": (torch.int8, (2,)),
    "bool": (torch.bool, (2,)),
    "complex": (torch.complex64, (2,)),
    "float8": (torch.float8_e4m3fn, (0, 2)),
}


@fault("models", TYPES)
def weights_of_another_type(place: Place, case: tuple[torch.dtype, tuple[int, ...]]) -> None:
    dtype, codes = case
    for name in ("best", "last"):
        path = place.run / f"{name}.safetensors"
        content, metadata = load_weights(path)
        save_weights(path, {k: v.to(dtype) if v.is_floating_point() else v for k, v in content.items()}, metadata)
    _, out, err = place.clead(*VERBS["evaluate"], codes=codes)
    place.expect(str(dtype).removeprefix("torch.") in out + err, f"the type is not said: {out[-200:]}")


# ------------------------------------------------------------------------------------------------ serving

SERVER: list[tuple[subprocess.Popen[str], str]] = []
"""The one server of all hostile clients, and its address, once a fault has asked for it."""


def server(run: Path) -> tuple[subprocess.Popen[str], str]:
    """Return the server and its address; serve ``run`` if there is none."""
    if not SERVER:
        command = [
            sys.executable,
            "-m",
            "clead",
            "serve",
            str(run),
            "--port",
            "0",
            "--threads",
            "1",
            "--read-seconds",
            "0.4",
        ]
        log = (run / "serve.log").open("w")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        if "http://" not in line:
            raise Harm(f"no server: {line!r}, {(run / 'serve.log').read_text()[-300:]}")
        SERVER.append((process, "http://" + line.split("http://")[1].split(";")[0]))
    return SERVER[0]


@fault("serving", dict(CLIENTS))
def a_hostile_client(place: Place, client: Callable[[str], None]) -> None:
    _, address = server(place.base / "run")
    try:
        client(address)
    except (AssertionError, OSError) as error:
        raise Harm(f"{type(error).__name__}: {error}"[:300]) from None


@fault("serving", ["memory", "log", "end"])
def the_server_after_all_of_them(place: Place, what: str) -> None:
    process, _ = server(place.base / "run")
    if what == "memory":
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in status if "VmHWM" in line)
        place.expect(peak < 2 * 2**20, f"{peak} KiB")
    elif what == "log":
        log = (place.base / "run" / "serve.log").read_text()
        place.expect("Traceback" not in log and "\x1b" not in log, f"in its log: {log[-300:]!r}")
    else:
        process.terminate()
        SERVER.clear()
        place.expect(process.wait(60) == 0, f"exit code {process.returncode}")


# ------------------------------------------------------------------------------------------------ the program


def save(record: dict[str, Any], path: Path) -> None:
    record["command"] = "python qa/faults.py --out qa/faults.json"
    record["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    record["counts"] = {
        group: {"faults": len(titles), "held": sum(said == "held" for said in titles.values())}
        for group, titles in record["faults"].items()
    }
    write_atomically(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    groups = list(dict.fromkeys(group for group, *_ in FAULTS))
    parser.add_argument("--group", nargs="+", choices=groups, default=groups)
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--again", action="store_true", help="also those that the record has")
    given = parser.parse_args()
    record: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {"faults": {}}
    results: dict[str, dict[str, str]] = record["faults"]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="clead-faults-") as name, contextlib.ExitStack() as ends:
        ends.callback(lambda: [process.kill() for process, _ in SERVER])
        base = Path(name) / "base"
        base.mkdir()
        make_base(base)
        control = Place(Path(name) / "control", base)  # without a fault all of this works
        control.clead(*VERBS["evaluate"], codes=(0,))
        control.clead(
            "train", "cifar10-small-standard", *PICTURES, "--data.path", "photos", "--out", "made", codes=(0,)
        )
        npz(control, lambda content: content)
        control.clead(
            "train", "cifar10-small-standard", *PICTURES, "--data.path", "data.npz", "--out", "more", codes=(0,)
        )
        for group in given.group:
            began, done = time.monotonic(), results.setdefault(group, {})
            for number, (_, title, function, case) in enumerate(each for each in FAULTS if each[0] == group):
                if given.only not in title or (done.get(title) == "held" and not given.again):
                    continue
                place = Place(Path(name) / f"{group}-{number}".replace(" ", "-"), base)
                try:
                    function(place, case)
                    place.check()
                    done[title] = "held"
                except Harm as harm:
                    done[title] = str(harm)
                save(record, given.out)
                if done[title] != "held":
                    print(f"{group}: {title!r}: {done[title]}", flush=True)
                shutil.rmtree(place.folder, ignore_errors=True)
            save(record, given.out)
            print(f"{group}: {record['counts'][group]} in {time.monotonic() - began:.0f} s", flush=True)
    broken = sum(said != "held" for group in given.group for said in results[group].values())
    print(f"{sum(len(results[group]) for group in given.group)} faults, {broken} not held")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
