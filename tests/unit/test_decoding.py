"""Picture files of every kind become the picture that they show, or are refused by name; in bounded memory."""

import io
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clead.data import decoding
from clead.data.decoding import ResizeSpec, decode, decode_one
from clead.errors import UserError
from support import encoded


def noise(*shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def refusal(blob, fit=None):
    with pytest.raises(UserError) as caught:
        decode_one(blob, "photos/x.png", fit or ResizeSpec())
    message = str(caught.value)
    assert message.startswith("photos/x.png: ") and "\n" not in message
    return message


# --------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "JPEG2000", "BMP", "PPM", "WEBP", "AVIF", "MPO", "DIB"])
def test_every_format_shows_what_pillow_shows(kind):
    picture = Image.fromarray(noise(17, 13, 3))
    options = {"lossless": True} if kind == "WEBP" else {}
    blob = encoded(picture.quantize(16) if kind == "GIF" else picture, kind, **options)
    if kind == "DIB":  # a bitmap without the head of a file
        assert "unknown format" in refusal(blob)
        return
    oracle = np.asarray(Image.open(io.BytesIO(blob)).convert("RGB"))
    assert np.array_equal(decode_one(blob, "x", ResizeSpec()), oracle)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate", "packbits", "jpeg"])
def test_tiff_of_every_compression(compression):
    blob = encoded(noise(16, 16, 3), "TIFF", compression=compression)
    assert np.array_equal(decode_one(blob, "x", ResizeSpec()), np.asarray(Image.open(io.BytesIO(blob))))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP", "MPO", "AVIF"])
def test_the_first_of_several_frames_is_taken_and_counted(kind):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (200, 40, 90)]
    options = {"lossless": True} if kind == "WEBP" else {}
    several = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    single = encoded(frames[0], "PNG")
    remarks = Counter()
    images = decode([several, single, several], list("abc"), ResizeSpec(), remarks=remarks)
    assert (images.int() - 200).abs().max() <= 2 and remarks["frames"] == 2


def test_turned_pictures_are_turned_back():
    for kind in ("TIFF", "PNG", "JPEG", "WEBP"):
        exif = Image.Exif()
        exif[0x0112] = 6
        picture = np.zeros((16, 32, 3), np.uint8)
        picture[:8, :8] = 255
        shown = decode_one(encoded(picture, kind, exif=exif), "x", ResizeSpec())
        assert shown.shape == (32, 16, 3) and shown[:8, 8:].mean() > 240 > 20 > shown[8:].mean(), kind


# ----------------------------------------------------------------------------------------- more than 8 bits


def test_16_bits_become_their_high_bytes():
    values = np.random.RandomState(0).randint(0, 65536, (6, 6)).astype(np.uint16)
    for kind in ("PNG", "TIFF", "PPM", "JPEG2000"):
        remarks = Counter()
        assert (
            np.array_equal(decode_one(encoded(values, kind), "x", ResizeSpec(), remarks), values >> 8) and not +remarks
        )
    remarks = Counter()
    decode_one(encoded(values >> 4), "x", ResizeSpec(), remarks)
    assert remarks["dark"] == 1  # 12 bits in 16


@pytest.mark.parametrize(
    ("values", "kind", "fragments"),
    [
        (np.linspace(0, 1, 36, dtype=np.float32).reshape(6, 6), "TIFF", ["floating point from 0 to 1", ".save("]),
        (np.linspace(0, 255, 36, dtype=np.float32).reshape(6, 6), "TIFF", ["floating point from 0 to 255"]),
        (np.arange(36, dtype=np.int32).reshape(6, 6) * 100000, "TIFF", ["got 0 to 3500000", "8 bits"]),
        (np.arange(36, dtype=np.int32).reshape(6, 6) - 5, "TIFF", ["got -5 to 30"]),
        (np.arange(36, dtype=np.int32).reshape(6, 6), "TIFF", ["got 0 to 35"]),  # would all be black
        (np.arange(36, dtype=np.uint16).reshape(6, 6) * 7, "PNG", ["got 0 to 245"]),
    ],
)
def test_values_that_8_bits_would_not_show_are_refused(values, kind, fragments):
    message = refusal(encoded(values, kind))
    assert all(fragment in message for fragment in fragments)


def test_a_portable_float_map_is_refused_by_name():
    blob = b"Pf\n4 4\n-1.0\n" + np.linspace(0, 1, 16, dtype="<f4").tobytes()
    assert "floating point from 0 to 1" in refusal(blob)


# --------------------------------------------------------------------------------------------- transparency


def with_alpha(mode, alpha):
    if mode == "palette":
        image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4, "P")
        image.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0, 90, 90, 90])
        image.info["transparency"] = bytes([alpha] * 4)
        return image
    image = Image.fromarray(noise(8, 8, 3)).convert("L" if mode == "LA" else "RGB")
    image.putalpha(alpha)
    return image


@pytest.mark.parametrize(
    ("mode", "kind"), [(m, k) for k in ("PNG", "TIFF", "WEBP") for m in ("RGBA", "LA")] + [("palette", "PNG")]
)
@pytest.mark.parametrize(("background", "level"), [("white", 255), ("black", 0)])
@pytest.mark.parametrize("alpha", [0, 100, 255])
def test_transparent_pixels_are_composed_on_the_background(mode, kind, background, level, alpha):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    blob = encoded(with_alpha(mode, alpha), kind, **options)
    rgba = np.asarray(Image.open(io.BytesIO(blob)).convert("RGBA")).astype(float)
    oracle = rgba[..., :3] * (rgba[..., 3:] / 255) + level * (1 - rgba[..., 3:] / 255)
    remarks = Counter()
    shown = decode_one(blob, "x", ResizeSpec(background=background), remarks)
    shown = shown if shown.ndim == 3 else np.repeat(shown[..., None], 3, 2)
    assert abs(shown - oracle).max() <= (1 if alpha == 100 else 0) and remarks["alpha"] == (alpha < 255)


def test_a_transparent_colour_is_composed_too():
    for image, key, at in (
        (Image.fromarray(np.array([[0, 9], [50, 9]], np.uint8)), 9, (slice(None), 1)),
        (Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8)), (9, 9, 9), (0, 1)),
    ):
        shown = decode_one(encoded(image, transparency=key), "x", ResizeSpec(background="white"))
        assert (shown[at] == 255).all() and (shown != 255).any()


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "CMYK"])
def test_pictures_without_transparency_are_the_same_on_every_background(mode):
    picture = Image.fromarray(noise(9, 9, 3))
    image = picture.quantize(8) if mode == "P" else picture.convert(mode)
    blob = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    shown = [decode_one(blob, "x", ResizeSpec(background=each)) for each in (None, "white", "black")]
    assert all(np.array_equal(each, shown[0]) for each in shown)


def test_remarks_are_remembered_with_the_images(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEAD_CACHE", str(tmp_path))
    monkeypatch.setattr(decoding, "CACHE_ABOVE", 0)
    blobs, counts = [encoded(with_alpha("RGBA", 9)), encoded(noise(8, 8, 3))], [Counter(), Counter()]
    for remarks in counts:
        decode(blobs, ["a", "b"], ResizeSpec(background="white"), remarks=remarks)
    assert len(list(tmp_path.iterdir())) == 1 and counts[0]["alpha"] == counts[1]["alpha"] == 1


# --------------------------------------------------------------------------------------------------- memory

LIMITED = """
import io, resource
import numpy as np
from PIL import Image
from clead.data.decoding import ResizeSpec, decode_one
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for width, height in [(3, 900_000), (900_000, 2), (65000, 40), (1, 4_000_000), (4_200_000, 1)]:
    buffer = io.BytesIO()
    Image.new("L", (width, height), 77).save(buffer, "PNG")
    for how in ("crop", "squash"):
        before = most()
        shown = decode_one(buffer.getvalue(), "x", ResizeSpec(224, how))
        assert shown.shape == (224, 224) and (shown == 77).all(), (width, height, how)
        assert most() - before < 200, (width, height, how, most() - before)
"""


@pytest.mark.slow
def test_long_thin_pictures_take_little_memory():
    """Resized as ordinary ones are, these would take up to 200 GB; each file has some kilobytes."""
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 24), st.sampled_from(["crop", "squash"]))
def test_ordinary_pictures_are_resized_as_ever(height, width, size, how):
    picture = Image.fromarray(noise(height, width, 3))
    if (width, height) == (size, size):
        oracle = picture
    elif how == "squash":
        oracle = picture.resize((size, size), Image.Resampling.BILINEAR)
    else:
        scale = size / min(width, height)
        wide, high = max(size, round(width * scale)), max(size, round(height * scale))
        left, top = (wide - size) // 2, (high - size) // 2
        oracle = picture.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    assert np.array_equal(decode_one(encoded(picture), "x", ResizeSpec(size, how)), np.asarray(oracle))


@pytest.mark.parametrize("how", ["crop", "squash"])
@pytest.mark.parametrize(("width", "height"), [(40, 300), (300, 40), (90, 91)])
def test_the_way_that_takes_little_memory_gives_nearly_the_same_picture(how, width, height, monkeypatch):
    smooth = Image.fromarray(noise(5, 5, 3)).resize((width, height), Image.Resampling.BICUBIC)
    usual = decode_one(encoded(smooth), "x", ResizeSpec(20, how))
    monkeypatch.setattr(decoding, "_LONGEST_SIDE", 1)
    assert abs(decode_one(encoded(smooth), "x", ResizeSpec(20, how)).astype(int) - usual).mean() < 2


def test_threads_together_decode_a_bounded_number_of_pixels(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    budget, lock, now, most = decoding._PixelBudget(), threading.Lock(), [0], [0]

    def work(pixels):
        with budget.of(pixels):
            with lock:
                now[0] += pixels
                most[0] = max(most[0], now[0])
            time.sleep(0.002)
            with lock:
                now[0] -= pixels

    threads = [threading.Thread(target=work, args=(size,)) for size in (400, 500, 600, 1000, 1, 999) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert now == [0] and 600 < most[0] <= 1000


def test_more_images_than_memory_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}[name])
    blob = encoded(Image.new("RGB", (90, 90)))
    with pytest.raises(UserError, match=r"--data.image_size, for instance 45"):
        decode([blob] * 300, ["x"] * 300, ResizeSpec())
    assert decode([blob] * 100, ["x"] * 100, ResizeSpec()).shape == (100, 3, 90, 90)


def test_a_picture_is_large_only_by_what_it_needs():
    assert decode_one(encoded(Image.new("L", (3000, 3000), 3)), "x", ResizeSpec(8)).tolist() == [[3] * 8] * 8
