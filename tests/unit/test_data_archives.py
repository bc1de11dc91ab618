"""Archives of data: unpacked within limits, named as if they were folders, and nothing left behind."""

import contextlib
import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from clead.data import archives
from clead.data.datasets import DATASETS
from clead.data.datasets.auto import read_any
from clead.errors import UserError
from layouts import LAYOUTS, cifar10_python, encoded, folder, noise, npz, write


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path_factory, monkeypatch):
    """Whatever happens, the temporary folder is empty in the end."""
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield temporary
    assert list(temporary.iterdir()) == []


def refused(path, *fragments):
    with pytest.raises(UserError) as caught:
        read_any(path)
    message = str(caught.value)
    assert len(caught.value.problems) == 1 and str(path) in message and "/clead-" not in message
    for fragment in fragments:
        assert fragment in message
    return message


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar", "bztar", "xztar"])
@pytest.mark.parametrize("top", [None, "photos", "."])
def test_every_kind_with_or_without_a_top_folder(kind, top, tmp_path):
    folder(tmp_path / "x/photos")
    base = (tmp_path / "x", top) if top else (tmp_path / "x/photos", None)
    path = shutil.make_archive(str(tmp_path / "a"), kind, *filter(None, base))
    plain, found = read_any(tmp_path / "x/photos"), read_any(type(tmp_path)(path))
    for part, other in ((found.train, plain.train), (found.test, plain.test)):
        assert part.images == other.images and part.labels.tolist() == other.labels.tolist()
        assert all(name.startswith(f"{path}/") for name in part.names)
    assert found.classes == plain.classes
    assert DATASETS.get("auto")(path=path, val_fraction=0.4).load(0).classes == ("cat", "dog")


@pytest.mark.parametrize(
    "layout", [each for each in LAYOUTS if not each.refused], ids=lambda layout: layout.build.__name__
)
def test_every_layout_can_be_zipped(layout, tmp_path):
    (tmp_path / "x").mkdir()
    given = layout.build(tmp_path / "x")
    plain = read_any(given)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((tmp_path / "x").rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(tmp_path / "x"))
    if archives.is_archive(given):
        refused(path, "an archive in an archive")
        return
    found = read_any(path)
    assert found.classes == plain.classes
    for part, other in zip((found.train, found.val, found.test), (plain.train, plain.val, plain.test), strict=True):
        assert (part is None) == (other is None)
        assert part is None or part.labels.tolist() == other.labels.tolist()
    assert not any("/clead-" in line for line in (*found.notes, *found.skipped))


def test_cifar_by_name_as_downloaded(tmp_path):
    cifar10_python(tmp_path)
    path = shutil.make_archive(str(tmp_path / "cifar-10-python"), "gztar", tmp_path, "cifar-10-batches-py")
    assert len(DATASETS.get("cifar10")(path=path).load(0).test) == 20
    with pytest.raises(UserError, match="must hold mnist, got .*cifar-10-python.tar.gz.*which holds cifar10"):
        DATASETS.get("mnist")(path=path).load(0)


def tar(path, *members, mode="w"):
    """Write members (name or TarInfo, content)."""
    with tarfile.open(path, mode) as archive:
        for info, content in members:
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


PICTURE = encoded(noise(8, 8, 3))
GOOD = [(f"train/{name}/{k}.png", PICTURE) for name in ("cat", "dog") for k in range(3)]


@pytest.mark.parametrize(
    ("name", "kind", "target", "fragment"),
    [
        ("train/cat/9.png", tarfile.SYMTYPE, "/etc/passwd", "is a link, a device"),
        ("train/cat/9.png", tarfile.SYMTYPE, "0.png", "is a link, a device"),
        ("train/cat/9.png", tarfile.LNKTYPE, "train/cat/0.png", "is a link, a device"),
        ("train/cat/9.png", tarfile.FIFOTYPE, "", "is a link, a device"),
        ("train/cat/9.png", tarfile.CHRTYPE, "", "is a link, a device"),
        ("train/cat/9.png", tarfile.BLKTYPE, "", "is a link, a device"),
        ("/train/cat/9.png", tarfile.REGTYPE, "", "leads out of the folder"),
        ("../9.png", tarfile.REGTYPE, "", "leads out of the folder"),
        ("train/../../9.png", tarfile.REGTYPE, "", "leads out of the folder"),
        ("..\\9.png", tarfile.REGTYPE, "", "leads out of the folder"),
        ("C:\\9.png", tarfile.REGTYPE, "", "leads out of the folder"),
        ("train/cat/0.png", tarfile.REGTYPE, "", "is there twice"),
        ("train/cat/0.png/1.png", tarfile.REGTYPE, "", "cannot be unpacked"),
        ("train/" + "x" * 300 + ".png", tarfile.REGTYPE, "", "cannot be unpacked"),
    ],
)
def test_hostile_members_of_tar(name, kind, target, fragment, tmp_path):
    refused(tar(tmp_path / "a.tar", *GOOD, (special(name, kind, target), b"")), fragment)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a.tar"]


@pytest.mark.parametrize(
    ("name", "mode", "fragment"),
    [
        ("train/cat/9.png", stat.S_IFLNK, "is a link or a device"),
        ("train/cat/9.png", stat.S_IFIFO, "is a link or a device"),
        ("train/cat/9.png", stat.S_IFCHR, "is a link or a device"),
        ("/9.png", stat.S_IFREG, "leads out of the folder"),
        ("../../9.png", stat.S_IFREG, "leads out of the folder"),
        ("a\\..\\..\\9.png", stat.S_IFREG, "leads out of the folder"),
        ("train/cat/0.png", stat.S_IFREG, "is there twice"),
    ],
)
def test_hostile_members_of_zip(name, mode, fragment, tmp_path, recwarn):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for good, content in GOOD:
            archive.writestr(good, content)
        info = zipfile.ZipInfo(name)
        info.external_attr = (mode | 0o644) << 16
        with pytest.warns(UserWarning) if "0.png" in name else io.BytesIO():
            archive.writestr(info, b"/etc/passwd")
    refused(tmp_path / "a.zip", fragment)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a.zip"]


def test_clutter_of_other_systems_is_no_data(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for good, content in GOOD:
            archive.writestr(f"photos\\{good}".replace("/", "\\"), content)  # as some programs of Windows write
        for name in ("__MACOSX/photos/._0.png", "photos/.DS_Store", "photos/train/._cat", "photos/Thumbs.db"):
            archive.writestr(name, b"x")
    found = read_any(tmp_path / "a.zip")
    assert found.classes == ("cat", "dog") and len(found.train.labels) == 6 and not found.skipped


def test_bombs_are_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("clead.data.bounded.UNPACKED_ABOVE", 2**20)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/cat/0.png", bytes(2**24))
    refused(tmp_path / "a.zip", "that unpack to 16777216 are no images")
    refused(tar(tmp_path / "a.tar.gz", ("train/cat/0.png", bytes(2**24)), mode="w:gz"), "are no images")
    monkeypatch.setattr(archives, "_MEMBERS", 3)
    monkeypatch.setattr(archives, "_BYTES_EACH", 10**6)
    refused(tar(tmp_path / "a.tar", *GOOD), "more than 3 files in")


def test_a_long_header_costs_no_memory(tmp_path):
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
        info = special("x", kind)
        info.size = 2**26
        with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
            archive.addfile(info, io.BytesIO(bytes(2**26)))
        tracemalloc.start()
        refused(tmp_path / "a.tar.gz", "a damaged archive (headers that are no headers)")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**24


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip"])
def test_damage_is_never_fewer_images(name, tmp_path):
    """A flipped byte in the middle of a tar file would be its end to the standard library."""
    folder(tmp_path / "photos")
    kind = {"a.tar": "tar", "a.tar.gz": "gztar", "a.zip": "zip"}[name]
    path = tmp_path / os.path.basename(shutil.make_archive(str(tmp_path / "a"), kind, tmp_path, "photos"))
    whole = path.read_bytes()
    for place in range(0, len(whole), 97 if kind == "tar" else 13):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        try:
            found = read_any(path)
            assert len(found.train.labels) + len(found.test.labels) == 10
        except UserError as error:
            assert len(error.problems) == 1
    for length in range(0, len(whole) - 1500, 701):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            assert len(read_any(path).test.labels) == 4
            raise UserError("whole")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive", b"\x1f\x8b" + bytes(50), bytes(2000)])
@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_what_is_no_archive_is_refused(name, content, tmp_path):
    refused(write(tmp_path / name, content), name)


def test_other_kinds_and_encrypted_ones_are_refused(tmp_path):
    for name in ("a.7z", "a.rar", "a.tar.zst"):
        refused(write(tmp_path / name, b"x"), "only .zip, .tar", "unpack it yourself and give the folder")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("train/cat/0.png", PICTURE)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    refused(write(tmp_path / "a.zip", bytes(content)), "is encrypted")


def test_no_room_is_said(tmp_path, monkeypatch):
    npz(tmp_path)
    shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path, "images.npz")
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    refused(tmp_path / "a.zip", "has room for 0; set TMPDIR")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_interrupted_leaves_nothing(stop, tmp_path, monkeypatch):
    def interrupted(*_):
        raise stop

    for name in ("a.zip", "a.tar"):
        folder(tmp_path / "photos")
        shutil.make_archive(str(tmp_path / "a"), name[2:], tmp_path, "photos")
        with monkeypatch.context() as patched, pytest.raises(stop):
            patched.setattr(archives.shutil, "copyfileobj", interrupted)
            read_any(tmp_path / name)


# ------------------------------------------------------------------------------------------------ processes that end

UNPACKS = """
import sys, time
from pathlib import Path
from clead.data.archives import unpacked
with unpacked(Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def unpacking(path, temporary, *, ignoring=()):
    """A process that has unpacked ``path`` and goes on; gives it and its folder."""
    before = [signal.signal(number, signal.SIG_IGN) for number in ignoring]  # inherited
    process = subprocess.Popen(
        [sys.executable, "-c", UNPACKS, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    for number, handler in zip(ignoring, before, strict=True):
        signal.signal(number, handler)
    try:
        yield process, type(path)(process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def zipped(tmp_path):
    folder(tmp_path / "photos")
    return type(tmp_path)(shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path, "photos"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(number, zipped, nothing_stays):
    with unpacking(zipped, nothing_stays) as (process, folder):
        assert folder.parent == nothing_stays and folder.is_dir() and folder.stat().st_mode & 0o777 == 0o700
        process.send_signal(number)
        assert process.wait(60) == (-2 if number == signal.SIGINT else 128 + number)
        assert not folder.exists()


def test_a_signal_that_is_ignored_stays_ignored(zipped, nothing_stays):
    """As with nohup."""
    with unpacking(zipped, nothing_stays, ignoring=[signal.SIGHUP]) as (process, folder):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert process.poll() is None and folder.is_dir()
        process.terminate()
        process.wait(60)


def test_handlers_are_put_back_and_other_threads_set_none(zipped):
    before = signal.getsignal(signal.SIGTERM)
    with archives.unpacked(zipped):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(read_any, zipped).result().classes == ("cat", "dog")


def test_what_the_killed_have_left_is_removed_and_what_the_living_have_is_not(zipped, nothing_stays, monkeypatch):
    with unpacking(zipped, nothing_stays) as (lives, used), unpacking(zipped, nothing_stays) as (dies, left):
        dies.kill()
        dies.wait(60)
        read_any(zipped)
        assert left.is_dir()  # it is young, and might be about to be locked
        monkeypatch.setattr(archives, "_YOUNG", -1.0)
        others = [nothing_stays / name for name in ("clead-unpacked-file", "clead-playground-x", "clead-unpacked-link")]
        others[0].write_text("a file of that name")
        others[1].mkdir()
        others[2].symlink_to(others[1])
        read_any(zipped)
        assert not left.exists() and list(used.rglob("*.png")) and [each.exists() for each in others] == [True] * 3
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        lives.kill()
        lives.wait(60)
        read_any(zipped)
        assert used.is_dir()  # another user's
        monkeypatch.undo()
        monkeypatch.setattr(tempfile, "tempdir", str(nothing_stays))
        monkeypatch.setattr(archives, "_YOUNG", -1.0)
        for each in others:
            each.rmdir() if each.is_dir() and not each.is_symlink() else each.unlink()
        read_any(zipped)
