"""``clead data``: what would be read at a path."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import clead
from clead.cli import app


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line; return its exit code, output and errors."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["clead", "data", *map(str, arguments)])
        try:
            app.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return call


def write(path, seed, side=12, colour=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3) if colour else (4, 4)).astype(np.uint8)
    Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def photos(tmp_path):
    """Two classes of ten and five training and test images."""
    root = tmp_path / "photos"
    for k, name in enumerate(("cat", "dog")):
        for i in range(10):
            write(root / "train" / name / f"{i}.png", 100 * k + i)
        for i in range(5):
            write(root / "test" / name / f"{i}.png", 1000 + 100 * k + i)
    return root


def test_what_is_read_is_said(run, photos):
    code, out, _ = run(photos)
    assert code == 0
    assert out.startswith("30 images of 2 classes, read as ")
    assert "  training: 18" in out and "  validation: 2" in out and "  test: 10 (the data's own test split)" in out
    assert "sizes: all 12x12 (width x height); 30 colour" in out
    assert "  0  cat  9  1  5\n  1  dog  9  1  5\n" in out
    assert f"next: clead train cifar10-small-pgd-at --data.name auto --data.path {photos}" in out
    assert "refuse" not in out and "equal images within a split: none" in out


def test_the_json_file_and_the_contact_sheet(run, photos, tmp_path):
    code, out, _ = run(
        photos, "--json", tmp_path / "r.json", "--show", tmp_path / "sheet.png", "--data.classes", "dog,owl,cat"
    )
    assert code == 0 and "2 of the 3 classes" in out
    report = json.loads((tmp_path / "r.json").read_text())
    assert list(report["classes"].items())[:2] == [
        ("dog", {"train": 9, "val": 1, "test": 5}),
        ("owl", {"train": 0, "val": 0, "test": 0}),
    ]
    assert report["splits"] == {"train": 18, "val": 2, "test": 10} and report["sizes"] == {"12x12": 30}
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.format == "PNG" and sheet.height == 2 * 68 and len(sheet.getcolors(10**6)) > 100


def test_data_that_training_would_refuse_is_shown_with_the_reason(run, photos):
    write(photos / "train/cat/large.png", 7, side=40)
    (photos / "train/dog/broken.png").write_bytes(b"no image")
    code, out, _ = run(photos)
    assert code == 0
    assert "width 12 to 40 (median 12)" in out and "1 of 40x40" in out
    assert "images that cannot be read: 1" in out and "broken.png" in out
    assert "training would refuse it: images have 2 sizes; add --data.image_size 12" in out
    assert "--data.skip_unreadable true" in out.splitlines()[-1]


def test_one_class_and_test_images_alone(run, tmp_path):
    for i in range(4):
        write(tmp_path / "one/train/cat" / f"{i}.png", i)
        write(tmp_path / "two/test" / ("a", "b")[i % 2] / f"{i}.png", i, colour=False)
    code, out, _ = run(tmp_path / "one")
    assert code == 0 and "training would refuse it: " in out and "at least 2 classes" in out
    code, out, _ = run(tmp_path / "two")
    assert code == 0 and "4 grey" in out and "next: clead evaluate --model net.py:Net --data.path" in out


@pytest.mark.parametrize("content", [None, "empty", "broken"])
def test_what_cannot_be_read_ends_with_two(run, tmp_path, content):
    path = tmp_path / "x"
    if content:
        (path / "train" / "cat").mkdir(parents=True)
    if content == "broken":
        for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
            (path / "train" / name).parent.mkdir(exist_ok=True)
            (path / "train" / name).write_bytes(b"x")
    code, out, errors = run(path)
    assert code == 2 and not out and errors.startswith("clead: error: ")


def test_images_that_are_there_twice_are_counted(run, photos):
    (photos / "test/cat/again.png").write_bytes((photos / "train/cat/0.png").read_bytes())
    (photos / "train/dog/cat.png").write_bytes((photos / "train/cat/1.png").read_bytes())
    code, out, _ = run(photos)
    assert code == 0
    assert "note: 1 test images are training images too" in out
    assert "2 images equal an image that has another label" in out


def test_frames_get_the_line_to_type(run, tmp_path):
    for scene in range(12):
        for frame in range(6):
            path = tmp_path / "film/train" / ("a", "b")[scene % 2] / f"scene{scene:02d}_{frame}.png"
            write(path, scene, side=32)
            pixels = np.asarray(Image.open(path)).astype(int) + np.random.default_rng(frame).integers(
                -4, 5, (32, 32, 3)
            )
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    code, out, _ = run(tmp_path / "film")
    assert code == 0 and "nearly equal training images" in out
    option = out.split("--data.group_by '")[1].split("' keeps")[0]
    code, out, _ = run(tmp_path / "film", "--data.group_by", option)
    assert code == 0 and "nearly equal" not in out


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["a", "--threat.eps", "1"], ["a", "--data.clases", "b"]])
def test_wrong_calls_are_refused(run, arguments):
    code, out, errors = run(*arguments)
    assert code == 2 and not out and "clead: error:" in errors


def test_the_function_takes_settings(photos):
    report = clead.inspect_data(photos, image_size=8, val_fraction=0.3)
    assert report.splits == {"train": 14, "val": 6, "test": 10} and not report.problems
    with pytest.raises(clead.UserError):
        clead.inspect_data(photos, name="parquet_stream")


def test_help_needs_no_torch():
    code = (
        "import sys; sys.argv = ['clead', 'data', '--help']\nfrom clead.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--show" in done.stdout
