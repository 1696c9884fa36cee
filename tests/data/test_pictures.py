"""Pictures come as a viewer shows them, in memory bounded by what is wanted."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("av")

from PIL import Image, ImageOps
from tried import tried

from vatt_fast.data.media import MediaError, probe, read_clip, read_video

SIDE = 64
VIEW = dict(num_frames=1, frames_per_second=1, height=SIDE, width=SIDE)
SEEN = "pictures as a viewer shows them"


def corners():
    """A picture whose four corners differ."""
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    picture[:32, :32], picture[:32, 32:], picture[32:, :32] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    return picture


def view(path):
    return read_video(path, start=0, **VIEW)[0]


def assert_close(found, expected, at_most=40):
    """At the middles of the four quarters."""
    for row in (16, 48):
        for column in (16, 48):
            difference = np.abs(found[row, column].astype(int) - expected[row, column].astype(int))
            assert difference.max() <= at_most, (row, column, found[row, column])


@tried(SEEN, "the eight EXIF orientations in PNG, JPEG, WebP", "upright, not mirrored")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, suffix, orientation):
    path = tmp_path / f"picture{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(corners()).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert_close(view(path), expected)


@tried(SEEN, "transparency: RGBA, grey with alpha, palette, one colour; PNG and WebP", "white")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "colour", "webp"])
def test_transparency(tmp_path, mode):
    """The left half is transparent and hides red or black; the right one is opaque."""
    values = np.zeros((SIDE, SIDE, 4), np.uint8)
    values[:, :32, 0] = 200
    values[:, 32:, 3] = 255
    image, path = Image.fromarray(values), tmp_path / "picture.png"
    if mode == "webp":
        path = tmp_path / "picture.webp"
        image.save(path, lossless=True, exact=True)
    elif mode == "colour":
        image.convert("RGB").save(path, transparency=(200, 0, 0))
    elif mode == "P":
        palette = Image.fromarray((values[..., 3] > 0).astype(np.uint8), "P")
        palette.putpalette([200, 0, 0, 0, 0, 0])
        palette.save(path, transparency=0)
    else:
        image.convert(mode).save(path)
    found = view(path)
    assert found[32, 8].tolist() == [255, 255, 255] and found[32, 56].tolist() == [0, 0, 0]


@tried(SEEN, "half transparent", "mixed with white")
def test_half_transparent(tmp_path):
    Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 128)).save(tmp_path / "half.png")
    assert np.abs(view(tmp_path / "half.png").astype(int) - 127).max() <= 1


@tried(SEEN, "grey of 16 bits, 1 bit, palette, CMYK, BMP", "their colours in 8 bits")
@pytest.mark.parametrize("mode", ["I;16", "1", "L", "P", "CMYK", "bmp"])
def test_kinds_of_colour(tmp_path, mode):
    picture = corners()
    path = tmp_path / {"CMYK": "p.jpg", "bmp": "p.bmp"}.get(mode, "p.png")
    if mode == "I;16":
        grey = picture.max(-1).astype(np.uint16) * 257
        Image.fromarray(grey).save(path)
        expected = np.repeat(picture.max(-1)[..., None], 3, -1)
    else:
        image = Image.fromarray(picture)
        image = image if mode == "bmp" else image.convert(mode)
        image.save(path)
        expected = np.asarray(image.convert("RGB"))
    assert_close(view(path), expected)


@tried(SEEN, "one pixel by 20000, and 20000 by one", "the middle is shown")
@pytest.mark.parametrize("size", [(1, 20000), (20000, 1)])
def test_extreme_shapes(tmp_path, size):
    values = np.zeros((size[1], size[0], 3), np.uint8)
    values.reshape(-1, 3)[9990:10010] = 255
    Image.fromarray(values).save(tmp_path / "line.png")
    found = view(tmp_path / "line.png")
    assert found.min() > 200  # the middle 1 x 1


def test_cover_and_crop_of_a_picture(tmp_path):
    """A wide picture keeps its middle, as a video does."""
    values = np.zeros((64, 128, 3), np.uint8)
    values[:, 32:96] = (200, 40, 40)
    Image.fromarray(values).save(tmp_path / "wide.png")
    assert view(tmp_path / "wide.png")[:, [2, -3], 0].min() > 150


@tried("memory and size of pictures", "12000 x 12000 JPEG", "read with less than 60 MB")
def test_a_huge_jpeg_takes_little_memory(tmp_path):
    path = tmp_path / "huge.jpg"
    Image.new("RGB", (12000, 12000), (200, 30, 30)).save(path, quality=30)
    code = (
        "import sys, resource, numpy as np; from vatt_fast.data.media import read_video\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "x = read_video(sys.argv[1], start=0, num_frames=1, frames_per_second=1, height=64, "
        "width=64)\n"
        "assert np.abs(x[0, 32, 32].astype(int) - [200, 30, 30]).max() < 12, x[0, 32, 32]\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True
    )
    assert int(found.stdout) < 60_000  # kilobytes; decoded whole it takes 432 MB


@tried("memory and size of pictures", "20000 x 20000 PNG of one colour", "MediaError, undecoded")
def test_a_picture_that_is_too_large(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (20000, 20000)).save(path)
    with pytest.raises(MediaError, match=r"bomb\.png"):
        probe(path)


@tried("names", "f_%03d.png beside f_001.png", "the file named is read")
@pytest.mark.parametrize("name", ["f_%03d.png", "f_%d.jpg", "100%.png", "%%.bmp", "a*?[b].webp"])
def test_patterns_in_names(tmp_path, name):
    stem = name.rpartition(".")[2]
    Image.new("RGB", (SIDE, SIDE), (200, 200, 200)).save(tmp_path / f"f_001.{stem}")
    Image.new("RGB", (SIDE, SIDE), (200, 200, 200)).save(tmp_path / f"f_1.{stem}")
    Image.new("RGB", (SIDE, SIDE), (50, 50, 50)).save(tmp_path / name)
    assert np.abs(view(tmp_path / name).astype(int) - 50).max() <= 3


@tried("memory and size of pictures", "cut short, empty, a text named .png", "MediaError")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_damaged_pictures(tmp_path, suffix):
    noisy = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3)).astype(np.uint8)
    path = tmp_path / f"cut{suffix}"
    Image.fromarray(noisy).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match=f"cut{suffix}"):
        view(path)
    for content in (b"", b"this is no picture\n" * 30):
        path.write_bytes(content)
        with pytest.raises(MediaError, match=f"cut{suffix}"):
            view(path)


@tried(SEEN, "a JPEG named .png, a PNG named .mp4", "read by its content")
@pytest.mark.parametrize(("name", "kind"), [("a.png", "JPEG"), ("a.mp4", "PNG"), ("b.jpg", "PNG")])
def test_pictures_by_content(tmp_path, name, kind):
    Image.fromarray(corners()).save(tmp_path / name, kind)
    assert probe(tmp_path / name).is_image
    assert_close(view(tmp_path / name), corners())
    clip = read_clip(
        tmp_path / name,
        start=3.0,
        num_samples=10,
        sample_rate_hz=16000,
        **{**VIEW, "num_frames": 4},
    )
    assert clip.video_valid and clip.shown == (0, 4) and clip.audio is None


@tried(SEEN, "an animated PNG and WebP", "the first picture")
@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_animations(tmp_path, suffix):
    first, second = Image.fromarray(corners()), Image.new("RGB", (SIDE, SIDE), (9, 9, 9))
    first.save(tmp_path / f"a{suffix}", save_all=True, append_images=[second], duration=100)
    assert_close(view(tmp_path / f"a{suffix}"), corners())


@tried(SEEN, "damaged EXIF", "the picture is read")
def test_damaged_exif(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(corners()).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\xff\xff")
    assert_close(view(path), corners())
