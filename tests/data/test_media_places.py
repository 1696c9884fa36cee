"""Media in a part of another file, as in a tar, and at a URL: the same as a file of their own."""

import dataclasses
import os
import tarfile

import numpy as np
import pytest

av = pytest.importorskip("av")

from media_files import SIDE, encode, numbered  # noqa: E402
from PIL import Image  # noqa: E402
from test_media_matrix import AUDIO_OPTIONS, MATRIX, PIXELS, VIDEO_OPTIONS  # noqa: E402

from vatt_fast.data import media_bytes, media_file  # noqa: E402
from vatt_fast.data.cache import ClipCache  # noqa: E402
from vatt_fast.data.clips import ClipSpec  # noqa: E402
from vatt_fast.data.media import (  # noqa: E402
    IMAGE_SUFFIXES,
    MediaError,
    MediaReader,
    probe,
    read_clip,
    read_video,
)
from vatt_fast.data.source import Place  # noqa: E402

PICTURE = dict(num_frames=10, frames_per_second=10, height=48, width=48)
WINDOW = dict(**PICTURE, num_samples=16000, sample_rate_hz=16000)
FIRST_OF_A_SUFFIX = {suffix: (suffix, *codecs) for suffix, *codecs in reversed(MATRIX)}


def member(path, folder):
    """The place of a file in a tar, between two other members."""
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for name, file in (("a.json", __file__), (f"b{path.suffix}", path), ("c.txt", __file__)):
            tar.add(file, name)
    with tarfile.open(folder / "shard.tar") as tar:
        found = tar.getmember(f"b{path.suffix}")
    where = folder / "shard.tar"
    return Place(str(where), f"shard.tar/{found.name}", found.offset_data, found.size)


def by_our_own_file(monkeypatch):
    monkeypatch.setattr(media_bytes, "_reads_parts", lambda: False)
    media_file._scanned = {}


def assert_same(one, other):
    for name in ("video", "audio"):
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None) == (second is None)
        if first is not None:
            np.testing.assert_array_equal(first, second)
    assert (one.shown, one.heard) == (other.shown, other.heard)


@pytest.mark.parametrize(("suffix", "video", "audio"), sorted(FIRST_OF_A_SUFFIX.values()))
def test_a_member_of_a_tar_is_the_file(tmp_path, monkeypatch, suffix, video, audio):
    if missing := {video, audio} - {None} - av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {missing}")
    path = tmp_path / f"clip{suffix}"
    encode(
        path, video=video, audio=audio, seconds=4.0, fps=25 if "mp" in suffix else 10,
        rate=48000, pixels=PIXELS.get(video, "yuv420p"), video_options=VIDEO_OPTIONS.get(video),
        audio_options=AUDIO_OPTIONS.get(audio), layout="stereo" if audio == "vorbis" else "mono",
        muxer="vob" if suffix == ".mpeg" else None,
    )  # fmt: skip
    place = member(path, tmp_path)
    for _ in ("FFmpeg's own", "ours"):
        assert probe(place) == probe(path)
        for start in (0.0, 2.3):
            assert_same(
                read_clip(place, start=start, **WINDOW), read_clip(path, start=start, **WINDOW)
            )
        by_our_own_file(monkeypatch)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_a_picture_in_a_tar_is_the_file(tmp_path, suffix):
    path = tmp_path / f"picture{suffix}"
    Image.fromarray(numbered(8)[5]).save(path)
    place = member(path, tmp_path)
    assert probe(place) == probe(path) and probe(place).is_image
    assert_same(read_clip(place, start=0, **WINDOW), read_clip(path, start=0, **WINDOW))
    with MediaReader(place) as reader:
        assert reader.displayed_size == (SIDE, SIDE)


@pytest.fixture
def clip(tmp_path):
    encode(tmp_path / "clip.mp4", video="mpeg4", audio="aac", seconds=3.0)
    return tmp_path / "clip.mp4"


@pytest.mark.parametrize("part", [False, True])
def test_a_url(clip, tmp_path, part):
    fsspec = pytest.importorskip("fsspec")
    place = member(clip, tmp_path) if part else Place(str(clip), "clip.mp4")
    url = f"memory://{tmp_path.name}{part}"
    with open(place.path, "rb") as file:
        fsspec.filesystem("memory").pipe_file(url.removeprefix("memory:/"), file.read())
    remote = dataclasses.replace(place, path=url)
    assert_same(read_clip(remote, start=0.7, **WINDOW), read_clip(clip, start=0.7, **WINDOW))
    if not part:
        assert probe(url) == probe(clip)
    with pytest.raises(FileNotFoundError):
        probe("memory://nowhere.mp4")


def test_a_small_part_of_a_remote_file_is_one_request(clip, tmp_path, monkeypatch):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    place = member(clip, tmp_path)
    with open(place.path, "rb") as file:
        memory.pipe_file(f"/{tmp_path.name}", file.read())
    remote = dataclasses.replace(place, path=f"memory://{tmp_path.name}")
    asked = []

    def cat_file(path, start=None, end=None, **options):
        asked.append((start, end))
        return type(memory).cat_file(memory, path, start, end, **options)

    monkeypatch.setattr(memory, "cat_file", cat_file)
    monkeypatch.setattr(memory, "open", None)
    assert_same(read_clip(remote, start=0.7, **WINDOW), read_clip(clip, start=0.7, **WINDOW))
    assert asked == [(place.offset, place.offset + place.size)]


def test_what_the_system_is_to_fetch(clip, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        media_bytes.os,
        "posix_fadvise",
        lambda file, *rest: told.append((os.fstat(file).st_ino, *rest)),
    )
    part, fetch = member(clip, tmp_path), os.POSIX_FADV_WILLNEED
    media_bytes.read_ahead(part)
    assert told.pop() == (os.stat(part.path).st_ino, part.offset, part.size, fetch)
    whole, size = Place(str(clip), "clip.mp4"), clip.stat().st_size
    media_bytes.read_ahead(whole)
    assert told.pop() == (clip.stat().st_ino, 0, size, fetch)
    os.mkfifo(tmp_path / "pipe")
    for nothing in (tmp_path / "gone.mp4", tmp_path / "pipe", "memory://b/0.tar"):
        media_bytes.read_ahead(Place(str(nothing), "clip.mp4"))
    monkeypatch.setattr(media_bytes, "MOST_AHEAD_BYTES", size - 1)
    media_bytes.read_ahead(whole)
    assert not told


@pytest.mark.parametrize("own", [False, True])
def test_damage_is_told_by_the_name(clip, tmp_path, monkeypatch, own):
    place = member(clip, tmp_path)
    if own:
        by_our_own_file(monkeypatch)
    other = dataclasses.replace(place, size=place.size // 2)  # its index lies at the end
    with pytest.raises(MediaError, match=r"shard\.tar/b\.mp4 cannot be decoded.*replace or remove"):
        probe(other)
    with open(place.path, "r+b") as file:
        file.truncate(place.offset + place.size // 2)
    with pytest.raises(MediaError, match=r"shard\.tar/b\.mp4 lies past the end of .*shard\.tar"):
        read_video(place, start=0, num_frames=1, frames_per_second=10, height=48, width=48)
    with pytest.raises(FileNotFoundError):
        probe(dataclasses.replace(place, path=str(tmp_path / "gone.tar")))


def test_a_cache_of_members(clip, tmp_path):
    spec = ClipSpec(10, 48, 48, 10.0, 16000, 16000, 16, 5)
    cache = ClipCache(tmp_path / "cache", spec)
    place = member(clip, tmp_path)
    other = dataclasses.replace(place, offset=0, size=None, path=str(clip))
    found = []
    for each in (place, place, other):
        video, audio = np.zeros((10, 48, 48, 3), np.uint8), np.zeros(16000, np.float32)
        assert cache.read_into(each, lambda seconds: 5, video, audio) == (5, True, True)
        found.append(video)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    assert len(list((tmp_path / "cache").iterdir())) == 2  # by place, not by name
