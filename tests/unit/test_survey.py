"""What a training is planned by: whether mirroring is safe, sizes, balance, repeats."""

import io

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

import clead
from clead.cli import app
from clead.data.datasets.auto import Auto
from clead.data.datasets.digit_scenes import DigitScenes
from clead.data.flips import Flips, look_at_flips
from clead.data.survey import sides_of, survey
from clead.errors import UserError

FLIPS = Flips(True, "", 0, 0.5, 0.5)


def drawn(draw, seed, side=32):
    """A grey picture that ``draw`` paints at a random place, on noise."""
    random = np.random.default_rng(seed)
    image = Image.new("L", (side, side), 90)
    draw(ImageDraw.Draw(image), int(random.integers(-4, 5)), int(random.integers(-4, 5)))
    noise = random.normal(0, 8, (side, side))
    return (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)


def arrow(right):
    def draw(canvas, x, y):
        tip, tail = (24 + x, 8 + x) if right else (8 + x, 24 + x)
        canvas.line([(tail, 16 + y), (tip, 16 + y)], fill=230, width=3)
        canvas.polygon([(tip, 16 + y), ((tip + 16 + x) // 2, 10 + y), ((tip + 16 + x) // 2, 22 + y)], fill=230)

    return draw


def letter(text):
    font = ImageFont.load_default(20)
    return lambda canvas, x, y: canvas.text((10 + x, 4 + y), text, fill=230, font=font)


def blobs(seed, kind):
    """A colour picture of random bright spots, round ones or bars, wherever they lie: it knows no left and right."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (40, 40), tuple(random.integers(60, 120, 3).tolist()))
    canvas = ImageDraw.Draw(image)
    for x, y in random.integers(4, 37, (4, 2)).tolist():
        box = [x - 6, y - 6, x + 6, y + 6] if kind else [x - 9, y - 1, x + 9, y + 1]
        canvas.ellipse(box, fill=tuple(random.integers(150, 255, 3).tolist()))
    return np.asarray(image)


def verdict(draws, names, count=60):
    images = [drawn(draw, 1000 * k + i) for k, draw in enumerate(draws) for i in range(count)]
    return look_at_flips(images, torch.arange(len(draws)).repeat_interleave(count), names)


def test_arrows_of_two_sides_are_seen_whatever_they_are_called():
    flips = verdict([arrow(right=False), arrow(right=True)], ["back", "forth"])
    assert not flips.safe and flips.recognised > 0.9 and flips.mirrored < 0.1
    assert "of the mirrored images of 'back' are most like 'forth'" in flips.reason


def test_one_pair_among_many_classes_is_seen():
    shapes = [lambda c, x, y, s=s: c.regular_polygon((16 + x, 16 + y, 9), s, fill=220) for s in (3, 4, 6)]
    rings = [lambda c, x, y, w=w: c.ellipse([6 + x, 6 + y, 26 + x, 26 + y], outline=220, width=w) for w in (1, 3, 6)]
    bars = [lambda c, x, y, v=v: c.rectangle([16 + x - v, 4, 16 + x + v, 28], fill=220) for v in (1, 4)]
    symmetric = [*shapes, *rings, *bars]
    assert verdict(symmetric, [f"s{k}" for k in range(8)], 40).safe
    both = [*symmetric, arrow(right=False), arrow(right=True)]
    flips = verdict(both, [f"s{k}" for k in range(10)], 40)
    assert not flips.safe and ("'s8' are most like 's9'" in flips.reason or "'s9' are most like 's8'" in flips.reason)


def test_letters_by_their_look():
    assert not verdict([letter("b"), letter("d")], ["class one", "class two"]).safe
    flips = verdict([letter("R"), letter("F"), letter("G")], ["class one", "class two", "class three"])
    assert not flips.safe and flips.mirrored < flips.recognised - 0.25  # no partner, but another look
    assert verdict([letter("A"), letter("O"), letter("H")], ["class one", "class two", "class three"]).safe


def test_digits_are_not_mirrored():
    digits = load_digits()
    images, labels = list((digits.images[:600] * 15.9).astype(np.uint8)), torch.tensor(digits.target[:600])
    assert not look_at_flips(images, labels, [f"class {k}" for k in range(10)]).safe


def test_pictures_without_sides_may_be_mirrored_whether_classes_are_told_or_not():
    images = [blobs(i, kind=i % 2) for i in range(200)]
    flips = look_at_flips(images, torch.arange(200) % 2, ["spots", "bars"])
    assert flips.safe and flips.recognised > 0.8 and abs(flips.mirrored - flips.recognised) < 0.1
    labels = torch.tensor(np.random.default_rng(0).integers(0, 2, 200))
    flips = look_at_flips(images, labels, ["heads", "tails"])
    assert flips.safe and "half: no sides" in flips.reason
    numbered = look_at_flips(images, labels, ["0", "1"])
    assert not numbered.safe and "called by numbers" in numbered.reason


def test_copies_and_groups_are_no_neighbours():
    # 20 scenes of 6 frames: without their own scene, nothing tells the classes, which are drawn at random.
    labels = torch.tensor(np.random.default_rng(1).integers(0, 2, 20)).repeat_interleave(6)
    frames = []
    for scene in range(20):
        for frame in range(6):
            moved = np.roll(blobs(scene, kind=0), frame, axis=1).astype(int)
            frames.append(
                (moved + np.random.default_rng(frame).normal(0, 3, moved.shape)).clip(0, 255).astype(np.uint8)
            )
    alone = look_at_flips(frames, labels, ["heads", "tails"])
    assert alone.recognised > 0.95 and not alone.safe
    grouped = look_at_flips(frames, labels, ["heads", "tails"], [f"s{k // 6}" for k in range(120)])
    assert grouped.recognised < 0.75 and grouped.safe
    copies = look_at_flips(frames[::6] * 6, labels[::6].repeat(6), ["heads", "tails"])
    assert copies.recognised < 0.75


@pytest.mark.parametrize(
    ("names", "fragment"),
    [
        (("turn left", "stop"), "1 classes are named by a side, such as 'turn left'"),
        (("armLeft", "armRight"), "2 classes are named by a side"),
        (("b", "d", "other"), "2 of 3 classes are named by a single letter"),
    ],
)
def test_names_of_classes_count(names, fragment):
    images = [blobs(i, kind=i % 2) for i in range(60)]
    flips = look_at_flips(images, torch.arange(60) % 2, names)
    assert not flips.safe and fragment in flips.reason
    assert look_at_flips(images, torch.arange(60) % 2, ("copyright", "bright")).safe


def test_few_images_are_no_evidence():
    flips = look_at_flips([blobs(i, kind=0) for i in range(10)], torch.arange(10) % 2, ["cat", "dog"])
    assert not flips.safe and "10 images are too few" in flips.reason


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ([28] * 5, (16, 24, 28)),
        ([32] * 5, (16, 24, 32)),
        ([12, 12, 12, 40], (12,)),
        ([9, 50, 60, 70, 80], (16, 24, 32, 48)),
    ],
)
def test_image_sizes_enlarge_few_images(sides, expected):
    assert sides_of(sides)[1] == expected


@pytest.fixture
def photos(tmp_path):
    """40 spots, 20 bars and 10 of both, of 30 to 60 pixels; 6 test images, of which one is a training image; one broken file."""
    root = tmp_path / "photos"
    for name, count, kind in (("spots", 40, 1), ("bars", 20, 0), ("mixed", 10, 1)):
        (root / "train" / name).mkdir(parents=True)
        for i in range(count):
            side = 30 + (7 * i) % 31
            Image.fromarray(blobs(1000 * count + i, kind)).resize((side, side + 5)).save(
                root / "train" / name / f"{i:02d}.png"
            )
        (root / "test" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(blobs(77 * count + i, kind)).save(root / "test" / name / f"{i}.png")
    (root / "test/bars/2.png").write_bytes((root / "train/bars/03.png").read_bytes())
    (root / "train/bars/04.png").write_bytes((root / "train/bars/03.png").read_bytes())
    (root / "train/bars/broken.png").write_bytes(b"no image")
    return root


def test_what_a_folder_of_photographs_holds(photos, capsys):
    seen = survey(Auto(path=photos))
    assert dict(seen.images) == {"train": 71, "test": 7} and seen.origin == "test"
    assert dict(seen.counts) == {"bars": 21, "mixed": 10, "spots": 40} and seen.balance == 4
    assert seen.sides[0] == 30 and seen.sides[2] == 60 and seen.image_sizes == (16, 24, 32) and not seen.one_size
    assert seen.channels == 3 and seen.groups is None
    assert dict(seen.repeats) == {"training": 1, "test in training": 1}
    assert len(seen.unreadable) == 1 and "broken.png" in seen.unreadable[0]
    assert seen.flips.safe and seen.flips.images == 70
    assert "balance: 10 (mixed) to 40 (spots) training images per class, 4.0 times as many" in seen.sentences()
    report = clead.inspect_data(photos)
    same = report.survey
    assert same.counts["spots"] == report.classes["spots"]["train"] and same.flips.safe
    assert report.options[:2] == ["--data.image_size", "32"] and report.to_dict()["survey"]["image_sizes"] == (
        16,
        24,
        32,
    )


def test_large_photographs_are_sampled_and_seen_small(tmp_path, monkeypatch):
    for k, kind in enumerate(("spots", "bars")):
        (tmp_path / "large/train" / kind).mkdir(parents=True)
        for i in range(50):
            picture = Image.fromarray(blobs(100 * k + i, kind=1 - k)).resize((600, 480), Image.Resampling.BICUBIC)
            picture.save(tmp_path / "large/train" / kind / f"{i:02d}.jpg")
    shapes = []
    monkeypatch.setattr(
        "clead.data.survey.look_at_flips", lambda images, *rest: shapes.extend(each.shape for each in images) or FLIPS
    )
    monkeypatch.setattr("clead.data.survey._FEWEST", 20)
    monkeypatch.setattr("clead.data.survey._PIXELS", 30 * 600 * 480)
    seen = survey(Auto(path=tmp_path / "large"))
    assert seen.sides == (480, 480, 480) and seen.image_sizes[-1] == 256 and seen.images["train"] == 80
    assert len(shapes) == 30 and set(shapes) == {(120, 150, 3)}  # a quarter of each side


def test_sizes_are_those_of_upright_images(tmp_path):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    for label in ("cat", "dog"):
        folder = tmp_path / "photos" / label
        folder.mkdir(parents=True)
        for number in range(6):
            exif = turned if number % 2 else Image.Exif()
            for ending in ("jpg", "png"):
                Image.new("RGB", (60, 40), (40 * number, 9, 90)).save(folder / f"{number}.{ending}", exif=exif)
    seen = survey(Auto(path=tmp_path / "photos"))
    assert seen.sides == (40, 40, 40) and not seen.one_size, "half of them are 40 wide"


def test_groups_order_of_classes_and_other_layouts(photos, tmp_path):
    seen = survey(Auto(path=photos, group_by="^([0-9])", classes="spots,mixed,bars"))
    assert seen.groups == 5 and list(seen.counts) == ["spots", "mixed", "bars"]
    assert seen.counts["spots"] == 40 and "groups: 5 of training images" in seen.sentences()[-1]
    grey = np.stack([drawn(arrow(right=bool(i % 2)), i) for i in range(80)])
    np.savez(tmp_path / "a.npz", x_train=grey, y_train=np.arange(80) % 2, x_test=grey[:4], y_test=np.arange(4) % 2)
    seen = survey(Auto(path=tmp_path / "a.npz"))
    assert (
        seen.channels == 1 and seen.one_size and dict(seen.repeats) == {"test in training": 4} and not seen.flips.safe
    )


def test_the_line_to_type_leaves_flips_out_where_they_look_unsafe(tmp_path, photos, monkeypatch, capsys):
    for k, text in enumerate("bd"):
        (tmp_path / "letters/train" / f"class {k}").mkdir(parents=True)
        for i in range(40):
            Image.fromarray(drawn(letter(text), 100 * k + i)).save(tmp_path / f"letters/train/class {k}/{i:02d}.png")
    for path, expected in ((tmp_path / "letters", True), (photos, False)):
        monkeypatch.setattr("sys.argv", ["clead", "data", str(path)])
        with pytest.raises(SystemExit):
            app.main()
        out = capsys.readouterr().out
        assert ("--data.augment.flip false" in out.splitlines()[-1]) == expected
        assert f"mirroring looks {'unsafe' if expected else 'safe (data.augment.flip)'}: " in out


def test_masks_are_not_planned_for():
    with pytest.raises(
        UserError, match="one class per image, got data for the task segmentation; give clead train a recipe"
    ):
        survey(DigitScenes())


def test_what_cannot_be_planned_is_refused(tmp_path):
    (tmp_path / "x/train/cat").mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    for i in range(3):
        (tmp_path / f"x/train/cat/{i}.png").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="at least 2 classes"):
        survey(Auto(path=tmp_path / "x"))
    (tmp_path / "x/train/dog").mkdir()
    for name in ("cat", "dog"):
        for i in range(4):
            (tmp_path / f"x/train/{name}/{i}.png").write_bytes(b"x")
    with pytest.raises(UserError, match="not a readable image"):
        survey(Auto(path=tmp_path / "x"))
