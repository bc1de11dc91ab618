"""Access to files: nothing outside a run is read, written or removed; what the user named is written through."""

import hashlib
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import clead
from clead import atomic_io, cli
from clead.atomic_io import (
    append_line,
    check_inside,
    check_output,
    read_json,
    read_json_lines,
    read_regular,
    remove_tree_inside,
    truncate,
    write_atomically,
    write_output,
)
from clead.config import load_recipe
from clead.data.decoding import read_cache, write_cache
from clead.errors import UserError
from clead.evaluation.state import ResumableResults, discard
from clead.runs.directory import RunDir
from support import TINY, refused


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def outside(tmp_path):
    """Another run's folder, that nothing may touch."""
    folder = tmp_path / "outside"
    (folder / "inner").mkdir(parents=True)
    for name in ("best.safetensors", "notes.txt", "inner/0-0.safetensors"):
        (folder / name).write_bytes(os.urandom(50))
    before = hashes(folder)
    yield folder
    assert hashes(folder) == before


# ------------------------------------------------------------------------------------------------ what is inside a run

LINKED = {
    "metrics": ("metrics.jsonl", "notes.txt"),
    "configuration": ("environment.json", "notes.txt"),
    "results": ("results", "inner"),
    "state folder": ("results/evaluation.state", "inner"),
    "record": ("results/evaluation.json", "notes.txt"),
    "weights": ("last.safetensors", "best.safetensors"),
    "state": ("resume.state", "notes.txt"),
    "something else": ("photo.png", "notes.txt"),
    "tensorboard": ("tensorboard", "inner"),
    "stored images": ("stored", "inner"),
}


@pytest.mark.parametrize("name, target", LINKED.values(), ids=LINKED)
def test_a_link_that_leads_out_of_a_run_is_refused(name, target, run, outside):
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(outside / target)
    config = load_recipe("digits-standard", TINY)
    calls = (
        lambda: clead.evaluate_run(run, fresh=True, show=False),
        lambda: clead.load(run),
        lambda: clead.train(config, out=run, resume=True, show=False),
        lambda: clead.write_report([run], run / "report.html"),
        lambda: clead.export_run(run, out=run.parent / "exported"),
    )
    for call in calls:
        refused(call, "is a link to", "outside the run", "remove it")
    assert path.is_symlink() and not (run.parent / "exported").exists()


@pytest.mark.parametrize("kind", ["relative", "dangling", "circle", "device", "parent"])
def test_links_of_every_kind(kind, run, outside):
    path = run / "results" / "evaluation.safetensors"
    path.unlink(missing_ok=True)
    target = {
        "relative": "../../outside/notes.txt",
        "dangling": "../../outside/nothing",
        "circle": "evaluation.safetensors",
        "device": "/dev/zero",
        "parent": "../..",
    }[kind]
    path.symlink_to(target)
    refused(lambda: RunDir.open(run), path, "link")


def test_links_inside_a_run_are_fine_and_the_run_itself_may_be_one(run, tmp_path):
    (run / "best.safetensors").unlink()
    (run / "best.safetensors").symlink_to("last.safetensors")
    (tmp_path / "shortcut").symlink_to(run)
    loaded, whole = (clead.load(path).state_dict() for path in (tmp_path / "shortcut", run))
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)
    clead.evaluate_run(tmp_path / "shortcut", fresh=True, show=False)
    assert (tmp_path / "shortcut").is_symlink() and (run / "best.safetensors").is_symlink()


@pytest.mark.parametrize("name", ["metrics.jsonl", "outcome.json", "resume.state", "results/evaluation.json", "x.png"])
@pytest.mark.parametrize("kind", ["FIFO", "socket"])
def test_what_is_no_file_in_a_run_is_refused_and_nothing_hangs(kind, name, run, monkeypatch):
    path = run / name
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        monkeypatch.chdir(path.parent)  # the name of a socket may have 107 bytes
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    refused(lambda: RunDir.open(run), path, f"is a {kind}", "remove it")


def test_a_hard_link_keeps_its_other_name_as_it_is(run, tmp_path):
    before = (run / "metrics.jsonl").read_bytes()
    os.link(run / "metrics.jsonl", tmp_path / "backup.jsonl")
    RunDir(run).log({"step": 1})
    assert (tmp_path / "backup.jsonl").read_bytes() == before != (run / "metrics.jsonl").read_bytes()
    os.link(run / "metrics.jsonl", tmp_path / "second.jsonl")
    RunDir(run).truncate_log(10)
    assert (run / "metrics.jsonl").stat().st_size == 10 < (tmp_path / "second.jsonl").stat().st_size


def test_the_state_of_an_evaluation_is_never_another_folder(tmp_path, outside):
    """Its parts are removed when it has no header: through a link these were another folder's weights."""
    before = hashes(outside)
    (tmp_path / "evaluation.state").symlink_to(outside)

    def opened():
        with ResumableResults(tmp_path / "evaluation.state", {}).opened():
            pass

    refused(opened, "is a link", "--fresh")
    discard(tmp_path / "evaluation.state")
    assert not (tmp_path / "evaluation.state").is_symlink() and hashes(outside) == before
    with ResumableResults(tmp_path / "evaluation.state", {}).opened() as state:
        state.save("0-0", {}, {})
    (tmp_path / "evaluation.state" / "0-1.safetensors").symlink_to(outside / "inner" / "0-0.safetensors")
    refused(opened, "is a link to", "outside the state")


def test_a_tree_is_removed_without_following_links(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    tree = tmp_path / "tree" / "deep"
    tree.mkdir(parents=True)
    (tree / "link").symlink_to(tmp_path / "kept")
    os.mkfifo(tree / "fifo")
    remove_tree_inside(tmp_path / "tree")
    assert not (tmp_path / "tree").exists() and (tmp_path / "kept" / "file").exists()


def test_a_record_from_elsewhere_names_no_path(run, tmp_path):
    """The record before is set aside under a name that is made of what it says."""
    path = run / "results" / "evaluation.json"
    text = path.read_text().replace('"suite": "pgd"', '"suite": "../../../../stolen"')
    assert text != path.read_text()
    path.write_text(text)
    before = {each for each in tmp_path.parent.iterdir()}
    clead.evaluate_run(run, show=False, config=load_recipe("digits-standard", [*TINY, "--eval.steps", "1"]))
    assert {each for each in tmp_path.parent.iterdir()} == before
    (kept,) = (run / "results" / "earlier").glob("*.json")
    assert kept.name.startswith(".._.._.._.._stolen-linf") or "stolen" in kept.name


# ------------------------------------------------------------------------------------------------ reading


def test_only_files_of_bounded_size_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 10)
    assert read_regular(tmp_path / "file", 10) == b"x" * 10
    refused(lambda: read_regular(tmp_path / "file", 9), "has 10 bytes", "at most 9")
    os.mkfifo(tmp_path / "fifo")
    refused(lambda: read_regular(tmp_path / "fifo", 10), "must be a file, it is a FIFO")
    refused(lambda: read_regular(Path("/dev/zero"), 10), "must be a file, it is a device")
    refused(lambda: read_regular(tmp_path, 10), "must be a file, it is a folder")
    (tmp_path / "link").symlink_to("/dev/zero")
    refused(lambda: read_regular(tmp_path / "link", 10), "device")
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "nothing", 10)
    refused(lambda: read_regular(tmp_path / ("n" * 300), 10), "File name too long")


def test_a_sparse_file_larger_than_memory_is_refused_at_once(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**42)
    refused(lambda: read_regular(tmp_path / "sparse", 2**60), f"has {2**42} bytes")


DAMAGED = {
    "deep": b"[" * 100_000,
    "number": b'{"a": ' + b"9" * 1_000_000 + b"}",
    "cut": b'{"a": 1',
    "bytes": b'{"a": "\xff"}',
    "empty": b"",
    "text": b"hello",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_json_is_one_line(content, tmp_path):
    (tmp_path / "file.json").write_bytes(content)
    refused(lambda: read_json(tmp_path / "file.json"), "file.json is damaged")


@pytest.mark.parametrize(
    "line", [*(each for name, each in DAMAGED.items()), b"[1, 2]", b"12"], ids=[*DAMAGED, "list", "int"]
)
def test_a_damaged_line_is_named(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    refused(lambda: read_json_lines(path), "metrics.jsonl line 2 is damaged", "remove that line")
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    refused(lambda: read_json_lines(path), "metrics.jsonl line 2 is damaged")  # whole, and yet no object
    path.write_bytes(b'{"step": 1}\n' + line)
    assert read_json_lines(path) == [{"step": 1}]  # as a kill or a full disk leaves it


# ------------------------------------------------------------------------------------------------ writing


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o027])
def test_new_files_have_what_the_umask_allows(mask, umask, tmp_path):
    umask(mask)
    write_atomically(tmp_path / "folder" / "file", b"x")
    append_line(tmp_path / "folder" / "log", "x")
    for name in ("file", "log"):
        assert stat.S_IMODE((tmp_path / "folder" / name).stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_a_file_that_is_replaced_keeps_its_permissions(mode, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    write_output(path, b"new")
    assert path.read_bytes() == b"new" and stat.S_IMODE(path.stat().st_mode) == mode


def test_inside_a_run_a_link_is_replaced_and_never_followed(tmp_path, outside):
    (tmp_path / "record.json").symlink_to(outside / "notes.txt")
    write_atomically(tmp_path / "record.json", b"new")
    assert not (tmp_path / "record.json").is_symlink() and (tmp_path / "record.json").read_bytes() == b"new"
    (tmp_path / "log").symlink_to(outside / "notes.txt")
    refused(lambda: append_line(tmp_path / "log", "x"), "is a link")
    refused(lambda: truncate(tmp_path / "log", 0), "is a link")
    os.mkfifo(tmp_path / "fifo")
    refused(lambda: append_line(tmp_path / "fifo", "x"), "is a FIFO")
    refused(lambda: write_atomically(tmp_path / "fifo", b"x"), "is a FIFO")


def test_what_the_user_named_is_written_through(tmp_path, capfd):
    for device in ("/dev/null", "/dev/stdout", "/dev/fd/2"):
        check_output(Path(device))
        write_output(Path(device), b"text\n")
        assert os.path.lexists(device)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("text\n", "text\n")
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    write_output(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"new"
    (tmp_path / "dangling").symlink_to("made")
    write_output(tmp_path / "dangling", b"new")
    assert (tmp_path / "dangling").is_symlink() and (tmp_path / "made").read_bytes() == b"new"


def test_a_fifo_is_written_to_its_reader(tmp_path, monkeypatch):
    path, read = tmp_path / "fifo", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    write_output(path, b"x" * 200_000)  # more than a pipe holds
    reader.join(10)
    assert read == [b"x" * 200_000] and stat.S_ISFIFO(path.stat().st_mode)
    monkeypatch.setattr(atomic_io, "_PATIENCE", 0.1)
    refused(lambda: write_output(path, b"x"), "nobody reads this FIFO")


def test_what_can_be_no_output_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    for path, word in ((tmp_path, "a folder"), (Path("socket"), "a socket")):
        refused(lambda path=path: check_output(path), word, "give the name of a file")
        refused(lambda path=path: write_output(path, b"x"), word)
    (tmp_path / "file").write_text("")
    refused(lambda: check_output(tmp_path / "file" / "inside"), "cannot write")
    refused(
        lambda: write_output(tmp_path / "n" * 2 / ("n" * 300), b"x") if False else write_output(Path("n" * 300), b""),
        "too long",
    )
    name = "ü" * 126  # 252 of 255 bytes, so that no name beside it may be longer
    write_output(tmp_path / name, b"x")
    write_output(tmp_path / "a\nb", b"x")
    assert (tmp_path / name).read_bytes() == (tmp_path / "a\nb").read_bytes() == b"x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folders_and_files_are_refused(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o444)
    refused(lambda: write_output(tmp_path / "file", b"new"), "read-only")
    (tmp_path / "folder").mkdir(mode=0o555)
    refused(lambda: check_output(tmp_path / "folder" / "new"), "read-only")


@pytest.mark.slow
def test_json_of_the_command_line_goes_through_null_and_links(run, tmp_path):
    (tmp_path / "link.json").symlink_to("target.json")
    for target in ("/dev/null", "/dev/stdout", tmp_path / "link.json"):
        done = command("compare", run, "--json", target)
        assert done.returncode == 0, done.stderr
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "target.json").read_text().startswith("{")


def command(*arguments, **options):
    text = "import sys; from clead.cli import main; sys.argv[0] = 'clead'; main()"
    return subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


# ------------------------------------------------------------------------------------------------ the cache


def test_a_cache_that_others_can_write_is_not_trusted(tmp_path, caplog):
    import torch

    images = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    path = tmp_path / "cache" / "a.safetensors"
    write_cache(path, images)
    assert torch.equal(read_cache(path, 3), images)
    path.parent.chmod(0o777)
    assert read_cache(path, 3) is None and "another user can write there" in caplog.text
    path.parent.chmod(0o700)
    path.chmod(0o666)
    assert read_cache(path, 3) is None
    path.chmod(0o600)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert read_cache(path, 3) is None
    path.unlink()
    path.parent.chmod(0o777)
    write_cache(path, images)
    assert not path.exists()


def test_check_inside_passes_over_what_is_gone(tmp_path):
    check_inside(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    refused(lambda: check_inside(tmp_path / "file"), "is a file, a run is a folder")


def test_python_never_ends_in_a_traceback_for_a_fifo_in_the_place_of_a_recipe(tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "recipe.yaml")
    monkeypatch.setattr(sys, "argv", ["clead", "train", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_very_long_message_keeps_its_remedy():
    error = UserError(f"data.npz has {', '.join(map(str, range(10_000)))}; rename its keys")
    assert len(error.problems[0]) == 1200 and error.problems[0].endswith("; rename its keys")
    assert UserError("short").problems == ("short",)
