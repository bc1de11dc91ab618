"""Output that cannot be written, and memory that is too small: the work is done, the exit code tells, never a traceback."""

import errno
import io
import logging
import os
import pty
import shlex
import subprocess
import sys
import threading

import pytest
import torch

import clead
from clead import api, atomic_io, cli
from clead.config import load_recipe
from clead.errors import NotEnoughMemory, memory_of, out_of_memory
from clead.output import Quiet, Sink, exit_code, tell
from clead.progress import progress

TINY = shlex.split("""--model.width 4 --model.features 8 --data.limit_train 60 --data.batch_size 27 --train.epochs 1
--train.validate_steps 1 --train.device cpu""")
SHORT = shlex.split("--eval.suite pgd --eval.images 12 --eval.steps 2 --eval.curve_points 0 --eval.check_images 0")
EVALUATE = ["--suite", "pgd", *SHORT[2:]]
PROGRAM = [sys.executable, "-c", "import sys; from clead.cli import main; sys.argv[0] = 'clead'; main()"]


def shell(text, *arguments, **environment):
    """Run the program in a shell line in which "$@" stands for it and its arguments."""
    variables = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "TERM")}
    variables |= {"OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {text}", "bash", *PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=240,
        env=variables,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    clead.train(load_recipe("digits-standard", TINY), out=folder, show=False)
    return folder


# Where standard error can be read, a traceback would be seen; what happens to it alone happens in "both" and "all", too.
PLACES = {
    "stdout full": ('"$@" > /dev/full', 0),
    "both full": ('"$@" > /dev/full 2>&1', 0),
    "stdout closed": ('"$@" >&-', 0),
    "all closed": ('"$@" <&- >&- 2>&-', 0),
    "a reader that leaves": ('"$@" | true', 141),
    "a reader of both that leaves": ('"$@" 2>&1 | head -c 1', 141),
}


def some(cases, *short):
    """Return the cases as parameters, those that are not named marked as long."""
    return [
        pytest.param(*case, id=name, marks=() if name in short else pytest.mark.long) for name, case in cases.items()
    ]


@pytest.mark.parametrize("line, code", some(PLACES, "all closed", "a reader of both that leaves"))
def test_an_evaluation_writes_its_record_whatever_becomes_of_the_output(line, code, run):
    for file in (run / "results").glob("*"):
        file.unlink()
    done = shell(line, "evaluate", run, *EVALUATE, "--fresh")
    assert (run / "results" / "evaluation.json").exists() and (run / "report.html").exists()
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.returncode in (0, code)


TRAINING = {
    "both full": ['"$@" > /dev/full 2> /dev/full'],
    "both closed": ['"$@" >&- 2>&-'],
    "no reader": ['"$@" 2>&1 | true'],
}


@pytest.mark.parametrize("line", some(TRAINING, "both full"))
def test_a_training_goes_on_to_its_end(line, tmp_path):
    done = shell(line, "train", "digits-standard", *TINY, "--out", tmp_path / "run")
    assert done.returncode in (0, 141) and "Traceback" not in done.stderr
    assert (tmp_path / "run" / "outcome.json").exists() and (tmp_path / "run" / "best.safetensors").exists()


def test_where_the_text_is_all_there_is_a_full_disk_is_an_error():
    done = shell('"$@" > /dev/full', "list")
    assert done.returncode == 1 and "standard output was not written: No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1
    done = shell('"$@" | head -1', "list")
    assert done.returncode in (0, 141) and done.stdout.count("\n") == 1 and done.stderr == ""


def test_an_error_keeps_its_code_where_nobody_can_read_it():
    for line in ('"$@" 2> /dev/full', '"$@" >&- 2>&-'):
        assert shell(line, "evaluate", "nothing").returncode == 2


ENVIRONMENTS = {
    "ascii in one column": {"PYTHONIOENCODING": "ascii", "COLUMNS": "1"},
    "latin-1 without a home": {"PYTHONIOENCODING": "latin-1", "HOME": "", "XDG_CACHE_HOME": "", "CLEAD_CACHE": ""},
    "cp1252 on a dumb terminal": {"PYTHONIOENCODING": "cp1252", "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "20"},
    "C with warnings": {
        **{"LC_ALL": "C", "LANG": "", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        "PYTHONWARNINGS": "always",
    },
}


@pytest.mark.parametrize("environment", some({name: [each] for name, each in ENVIRONMENTS.items()}, "C with warnings"))
def test_an_environment_changes_no_result(environment, run):
    done = shell('"$@"', "evaluate", run, *EVALUATE, "--fresh", **environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert "withstand linf 0.15" in " ".join(done.stdout.split())


def test_signs_that_an_encoding_lacks_are_spelt():
    text = "12.0 % – 34.0 % × ε ≤ 8/255 … Grün 日"
    assert text.encode("ascii", "clead.plain") == rb"12.0 % - 34.0 % x eps <= 8/255 ... Gr\xfcn \u65e5"
    assert text.encode("latin-1", "clead.plain").decode("latin-1") == "12.0 % - 34.0 % × eps <= 8/255 ... Grün \\u65e5"


# ------------------------------------------------------------------------------------------------ streams


def test_a_sink_drops_what_the_system_refuses_and_remembers_why():
    descriptor = os.open("/dev/full", os.O_WRONLY)
    sink = Sink(descriptor)
    stream = io.TextIOWrapper(io.BufferedWriter(sink), line_buffering=True)
    for _ in range(3):
        print("x" * 10_000, file=stream)
    assert sink.error is not None and sink.error.errno == errno.ENOSPC
    os.close(descriptor)


def test_a_sink_waits_for_a_slow_reader_of_a_pipe_that_does_not_block():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    read, pipe = [], os.fdopen(reading, "rb")
    thread = threading.Thread(target=lambda: read.append(pipe.read()))
    stream = io.BufferedWriter(Sink(writing))
    threading.Timer(0.3, thread.start).start()
    stream.write(b"x" * 300_000)
    stream.flush()
    os.close(writing)
    thread.join(10)
    pipe.close()
    assert read == [b"x" * 300_000] and stream.raw.error is None


class Broken(io.StringIO):
    """A stream of a notebook or a test that is gone."""

    def __init__(self, error):
        super().__init__()
        self.raised = error

    def write(self, text):
        raise self.raised

    flush = write


GONE = [OSError(errno.EIO, "hung up"), BrokenPipeError(), ValueError("I/O operation on closed file")]
GONE += [UnicodeEncodeError("ascii", "–", 0, 1, "no")]


@pytest.mark.parametrize("error", GONE, ids=lambda error: type(error).__name__)
def test_python_callers_lose_nothing_either(error, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Broken(error))
    monkeypatch.setattr(sys, "stdout", Broken(error))
    tell("a note")
    Quiet(sys.stderr).write("x")
    with progress("work", 3) as tick:
        for _ in range(3):
            tick(1, loss=0.5)
    trained = clead.train(load_recipe("digits-standard", TINY), out=tmp_path / "run")
    assert trained.outcome.steps > 0 and (tmp_path / "run" / "outcome.json").exists()


def test_no_streams_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    tell("a note")
    with progress("work", 2) as tick:
        tick(2)


def test_a_terminal_that_hangs_up_stops_no_evaluation(run):
    """The bar is drawn on a terminal whose other end is closed: every write fails with an input/output error."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "evaluate", str(run), *EVALUATE, "--fresh"],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
    )
    os.close(theirs)
    os.read(ours, 1)
    os.close(ours)
    assert process.wait(200) == 0


def test_the_exit_code(capsys):
    full, pipe, fine = Sink(1), Sink(1), Sink(1)
    full.error, pipe.error = OSError(errno.ENOSPC, "No space"), BrokenPipeError(errno.EPIPE, "")
    assert [exit_code(0, [sink], False) for sink in (full, pipe, fine)] == [1, 141, 0]
    assert [exit_code(0, [sink], True) for sink in (full, pipe, fine)] == [0, 141, 0]
    assert [exit_code(2, [sink], True) for sink in (full, pipe, fine)] == [2, 2, 2]
    assert exit_code(0, [], True) == 0


# ------------------------------------------------------------------------------------------------ memory

SMALL = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", SMALL, ids=lambda error: type(error).__name__)
def test_too_little_memory_names_the_key(error):
    assert out_of_memory(error)
    expected = "not enough memory for the evaluation; lower eval.batch_size"
    with pytest.raises(NotEnoughMemory, match=expected), memory_of("the evaluation", "eval.batch_size"):
        raise error
    with pytest.raises(NotEnoughMemory, match="lower inner"), memory_of("all", "outer"), memory_of("part", "inner"):
        raise error
    with pytest.raises(RuntimeError, match="^another$"), memory_of("all", "outer"):
        raise RuntimeError("another")


@pytest.mark.parametrize("error", SMALL, ids=lambda error: type(error).__name__)
def test_where_it_happens_decides_which_key(error, run, tmp_path, monkeypatch):
    def short(*arguments, **options):
        raise error

    config = load_recipe("digits-standard", TINY)
    with monkeypatch.context() as patch:
        patch.setattr("clead.data.base._decode", short)
        with pytest.raises(NotEnoughMemory, match=r"reading the images; lower data\.image_size"):
            clead.train(config, out=tmp_path / "a", show=False)
    with monkeypatch.context() as patch:
        patch.setattr("clead.api.training.fit", short)
        with pytest.raises(NotEnoughMemory, match=r"the training; lower data\.batch_size"):
            clead.train(config, out=tmp_path / "b", show=False)
    with monkeypatch.context() as patch:
        patch.setattr("clead.evaluation.evaluator.make_evaluation", short)
        with pytest.raises(NotEnoughMemory, match=r"the evaluation; lower eval\.batch_size"):
            clead.evaluate_run(run, config=load_recipe(str(run / "config.yaml"), SHORT), show=False, fresh=True)


def test_the_command_line_says_it_in_one_line(tmp_path, monkeypatch, capsys):
    def short(*arguments, **options):
        raise MemoryError

    for where, key in (
        ("clead.api.training.fit", "data.batch_size"),
        ("clead.api.training._check_model", "data.batch_size"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, short)
            patch.setattr(sys, "argv", ["clead", "train", "digits-standard", *TINY, "--out", str(tmp_path / where)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clead:")]
        assert ended.value.code == 1 and len(lines) == 1 and key in lines[0], (where, ended.value.code, lines)


def test_what_was_written_is_counted(tmp_path):
    before = atomic_io.written
    atomic_io.write_atomically(tmp_path / "file", b"x")
    assert atomic_io.written == before + 1


def test_a_logging_handler_that_fails_stops_nothing(run, monkeypatch):
    handler = logging.StreamHandler(Broken(OSError(errno.ENOSPC, "full")))
    logging.getLogger("clead").addHandler(handler)
    monkeypatch.setattr(sys, "stderr", Broken(OSError(errno.ENOSPC, "full")))
    try:
        logging.getLogger("clead").warning("a note")
        short = load_recipe(str(run / "config.yaml"), SHORT)
        assert api.evaluate_run(run, config=short, show=True, fresh=True).record is not None
    finally:
        logging.getLogger("clead").removeHandler(handler)
