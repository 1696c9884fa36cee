"""Parts of pictures, several windows at once, pictures left undecoded: all as read one by one."""

from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av")

from media_files import encode, noise, numbered, read_numbers  # noqa: E402
from PIL import Image  # noqa: E402

from vatt_fast.data import media_bytes, media_file  # noqa: E402
from vatt_fast.data.media import MediaError, MediaReader, read_clip, read_video  # noqa: E402
from vatt_fast.data.media_writer import write_clip  # noqa: E402

ONE = dict(start=0, num_frames=1, frames_per_second=10)
SOUND = dict(num_samples=16000, sample_rate_hz=16000)


def scene(height, width, count=2):
    """Smooth colours that no two places share."""
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    planes = [x * 255, y * 255, 128 + 100 * np.sin(3 * x + 5 * y)]
    return np.repeat(np.stack(planes, -1)[None].round().astype(np.uint8), count, 0)


def crop(path, target, rows, columns):
    """Write what FFmpeg crops, without loss: pairs of the first and the number."""
    (top, tall), (left, wide) = rows, columns
    with av.open(str(path)) as source, av.open(str(target), "w") as out:
        graph = av.filter.Graph()
        parts = [
            graph.add_buffer(template=source.streams.video[0]),
            graph.add("crop", f"{wide}:{tall}:{left}:{top}:exact=1"),
            graph.add("buffersink"),
        ]
        graph.link_nodes(*parts).configure()
        stream = out.add_stream("ffv1", rate=10)
        stream.width, stream.height = wide, tall
        stream.pix_fmt = source.streams.video[0].pix_fmt
        for frame in source.decode(video=0):
            graph.push(frame)
            out.mux(stream.encode(graph.pull()))
        out.mux(stream.encode(None))


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p", "yuv420p10le", "gray", "bgr0"])
def test_a_box_is_the_cropped_picture_scaled(tmp_path, pixels):
    frames = scene(96, 128)
    rows, columns = (24, 48), (40, 64)
    whole, cut = tmp_path / "whole.mkv", tmp_path / "cut.mkv"
    encode(whole, video="ffv1", frames=frames, pixels=pixels)
    crop(whole, cut, rows, columns)
    box = (24 / 96, 40 / 128, 48 / 96, 64 / 128)
    for size in (dict(height=48, width=64), dict(height=36, width=48), dict(height=60, width=80)):
        found = read_video(whole, **ONE, **size, box=box)
        np.testing.assert_array_equal(found, read_video(cut, **ONE, **size))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 24), (150, 150)])
@pytest.mark.parametrize("pixels", ["yuv420p", "yuvj420p", "yuv444p"])
def test_boxes_of_any_place_and_shape(tmp_path, pixels, height, width):
    """Beside Pillow's crop and scaling of the same picture."""
    frames = scene(90, 122)
    encode(
        tmp_path / "scene.mov", video="mjpeg", frames=frames, pixels=pixels.replace("yuv4", "yuvj4")
    )
    with av.open(str(tmp_path / "scene.mov")) as container:
        image = next(container.decode(video=0)).to_image()
    for top, left, tall, wide in ((0, 0, 1, 1), (0.13, 0.31, 0.5, 0.37), (0.7, 0.52, 0.3, 0.48)):
        found = read_video(
            tmp_path / "scene.mov", **ONE, height=height, width=width, box=(top, left, tall, wide)
        )[0]
        box = (left * 122, top * 90, (left + wide) * 122, (top + tall) * 90)
        expected = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box))
        difference = np.abs(found.astype(int) - expected)[1:-1, 1:-1]
        assert difference.max() < 14 and difference.mean() < 4  # half a pixel


def test_a_box_is_of_the_picture_as_it_is_shown(tmp_path):
    """Turned by a quarter, stored pixels twice as wide as high."""
    path = tmp_path / "turned.mp4"
    write_clip(path, scene(64, 48), None, crf=1)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    matrix = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
    content[place : place + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in matrix)
    path.write_bytes(content)
    seen = []

    def box(height, width):
        seen.append((height, width))
        return 0.25, 0.5, 0.5, 0.25

    with MediaReader(path) as reader:
        assert reader.displayed_size == (48, 64)
        whole = reader.video(**ONE, height=48, width=64)[0]
        part = reader.video(**ONE, height=24, width=16, box=box)[0]
    assert set(seen) == {(48, 64)}
    assert np.abs(part.astype(int) - whole[12:36, 32:48]).max() < 8


def test_a_box_of_a_picture_file(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter clockwise
    picture = scene(64, 96)[0]
    Image.fromarray(picture).save(tmp_path / "p.png", exif=exif)
    shown = np.rot90(picture, -1)
    found = read_video(tmp_path / "p.png", **ONE, height=24, width=32, box=(0.5, 0.25, 0.25, 0.5))[
        0
    ]
    np.testing.assert_array_equal(found, shown[48:72, 16:48])


@pytest.mark.parametrize("box", [(0, 0, 1.1, 1), (-0.1, 0, 1, 1), (0, 0, 0, 1), (0, 0, np.nan, 1)])
def test_boxes_that_are_no_part(tmp_path, box):
    Image.fromarray(scene(32, 32)[0]).save(tmp_path / "p.png")
    write_clip(tmp_path / "p.mp4", scene(32, 32), None)
    for name in ("p.png", "p.mp4"):
        with pytest.raises(ValueError, match=r"box is .* within the picture"):
            read_video(tmp_path / name, **ONE, height=8, width=8, box=box)


def edit_out(path, spans):
    """Write an edit list into an MP4 of 25 frames a second: first frames, and how many of each."""
    content = bytearray(path.read_bytes())
    assert content.index(b"mdat") < content.index(b"moov")  # so that no offset moves
    at = content.index(b"elst")
    began = int.from_bytes(content[at + 16 : at + 20], "big")
    table = len(spans).to_bytes(4, "big")
    for first, count in spans:  # milliseconds; 512 ticks of the media are a frame
        for value in (40 * count, began + 512 * first, 1 << 16):
            table += value.to_bytes(4, "big")
    for box in (b"moov", b"trak", b"edts", b"elst"):
        size = content.index(box) - 4
        grown = int.from_bytes(content[size : size + 4], "big") + 12 * (len(spans) - 1)
        content[size : size + 4] = grown.to_bytes(4, "big")
    content[at + 8 : at + 24] = table
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "video", "options"),
    [
        ("a.mp4", "libx264", {"bf": "3", "g": "30"}),
        ("a.mkv", "libx264", {"bf": "3", "g": "30", "x264-params": "open-gop=1"}),
        ("a.mp4", "libx265", {"x265-params": "bframes=4:keyint=30:log-level=none"}),
        ("cut.mp4", "libx264", {"bf": "3", "g": "50"}),
        ("a.avi", "libx264", {"bf": "2", "g": "30"}),
        ("a.mp4", "mpeg4", {"bf": "2", "g": "30"}),
        ("a.mkv", "mpeg4", {"bf": "2", "g": "30"}),
        ("cut.mp4", "mpeg4", {"bf": "2", "g": "50"}),
        ("a.mp4", "mpeg2video", {"bf": "2", "g": "18"}),
        ("a.mkv", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "30"}),
    ],
)
def test_leaving_pictures_out_changes_none(tmp_path, monkeypatch, name, video, options):
    cut = name.startswith("cut")  # by an edit list, to begin amid a group of pictures
    if video not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {video}")
    path = tmp_path / name
    frames = numbered(200)
    frames[:, 10:30, 10:30] += np.random.default_rng(0).integers(0, 90, (200, 20, 20, 1), np.uint8)
    encode(path, video=video, fps=25, frames=frames, video_options=options)
    if cut:
        edit_out(path, [(33, 75), (150, 45)])
        first = read_video(path, start=0, num_frames=1, frames_per_second=25, height=64, width=64)
        assert read_numbers(first) == [33]
    decoded = 0
    original = MediaReader._timed_frames

    def counting(self, *arguments, **names):
        nonlocal decoded
        for each in original(self, *arguments, **names):
            decoded += 1
            yield each

    monkeypatch.setattr(MediaReader, "_timed_frames", counting)

    def read_all():
        nonlocal decoded
        decoded = 0
        with MediaReader(path) as reader:
            return [
                reader.video(
                    start=start, num_frames=count, frames_per_second=fps, height=64, width=64
                )
                for start in (0.0, 0.333, 2.41, 2.7, *(() if cut else (4.0, 7.1)))
                for fps, count in ((10, 12), (3, 4), (25, 6))
            ]

    sparing, few = read_all(), decoded
    monkeypatch.setattr(media_file, "_marks_what_is_unreferenced", lambda stream: False)
    everything, all_of_them = read_all(), decoded
    for one, other in zip(sparing, everything, strict=True):
        np.testing.assert_array_equal(one, other)
    spares = video != "libvpx-vp9" and not name.endswith("avi")
    assert few < 0.9 * all_of_them if spares else few == all_of_them


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts", "a.png"])
def test_several_windows_are_those_of_one_at_a_time(tmp_path, name):
    path = tmp_path / name
    if name == "a.png":
        Image.fromarray(numbered(4)[3]).save(path)
    else:
        encode(path, video="libx264", audio="aac", seconds=12, video_options={"bf": "2", "g": "12"})
    window = dict(num_frames=8, frames_per_second=10, height=64, width=64, **SOUND)
    for starts in ([1.0, 0.7, 1.0], [9.0, 0.0, 3.0, 6.0], [11.8, 30.0, 11.9], []):
        with MediaReader(path) as reader:
            found = reader.clips(starts, **window)
        assert len(found) == len(starts)
        for start, clip in zip(starts, found, strict=True):
            alone = read_clip(path, start=start, **window)
            np.testing.assert_array_equal(clip.video, alone.video)
            assert clip.shown == alone.shown and clip.heard == alone.heard
            if alone.audio is not None:
                np.testing.assert_array_equal(clip.audio, alone.audio)


def test_each_window_may_have_its_own_box(tmp_path):
    path = tmp_path / "a.mp4"
    write_clip(path, numbered(60), noise(6.0, 16000))
    window = dict(num_frames=8, frames_per_second=10, height=32, width=32, **SOUND)
    starts, boxes = [0.4, 0.4, 1.0], [(0.5, 0, 0.5, 0.5), None, lambda *size: (0, 0.25, 1, 0.5)]
    with MediaReader(path) as reader:
        found = reader.clips(starts, box=boxes, **window)
        for start, box, clip in zip(starts, boxes, found, strict=True):
            alone = reader.clip(start=start, box=box, **window)
            np.testing.assert_array_equal(clip.video, alone.video)
        with pytest.raises(ValueError, match="2 boxes for 3 windows"):
            reader.clips(starts, box=boxes[:2], **window)


def test_windows_near_one_another_are_decoded_once(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write_clip(path, numbered(100), noise(10.0, 16000))
    seeks = []
    original = MediaReader._seek
    monkeypatch.setattr(
        MediaReader, "_seek", lambda self, kind, at: seeks.append(kind) or original(self, kind, at)
    )
    window = dict(num_frames=16, frames_per_second=10, height=64, width=64, **SOUND)
    with MediaReader(path) as reader:
        found = reader.clips([0.0, 1.6, 3.2, 4.8], **window)
    assert [read_numbers(clip.video)[0] for clip in found] == [0, 16, 32, 48]
    assert seeks.count("video") == 1


def long_file(path, seconds):
    """A film of two pictures a second with a key frame each 5 s."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.options = "yuv420p", {"g": "10"}
        pictures = [av.VideoFrame.from_ndarray(each, format="rgb24") for each in numbered(10)]
        packets = []
        for picture in pictures:
            packets += stream.encode(picture)
        packets += stream.encode(None)
        contents = [(bytes(packet), packet.is_keyframe) for packet in packets]
        for number in range(2 * seconds):
            content, key = contents[number % 10]
            packet = av.Packet(content)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 2), key
            packet.pts = packet.dts = number
            packet.duration = 1
            out.mux(packet)


@pytest.fixture
def bytes_read(monkeypatch):
    """A list that takes what is read of files, which are read in our own way."""
    read = []

    class Counting(media_bytes._Part):
        def readinto(self, buffer):
            count = super().readinto(buffer)
            read.append(count)
            return count

    monkeypatch.setattr(media_bytes, "_Part", Counting)
    monkeypatch.setattr(media_bytes, "_reads_parts", lambda: False)
    return read


def test_sound_is_read_without_the_picture(tmp_path, bytes_read):
    if not hasattr(av.stream, "Discard"):
        pytest.skip("this PyAV cannot leave a stream's bytes unread")
    path = tmp_path / "a.mp4"
    write_clip(
        path,
        np.random.default_rng(0).integers(0, 255, (40, 320, 320, 3), np.uint8),
        noise(4.0, 16000),
    )
    size = path.stat().st_size
    with MediaReader(media_bytes.Place(str(path), path.name, 0, size)) as reader:
        bytes_read.clear()
        reader.audio(start=0.5, num_samples=32000, sample_rate_hz=16000)
        assert sum(bytes_read) < 0.7 * size * 2 / 4
        bytes_read.clear()
        reader.video(start=0.5, num_frames=20, frames_per_second=10, height=320, width=320)
        assert sum(bytes_read) > 0.9 * size * 2 / 4


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_the_middle_of_a_long_file_costs_what_that_of_a_short_one_does(
    tmp_path, bytes_read, suffix
):
    """Two hours beside one minute: the bytes read once the file is open, and those to open it."""
    read = bytes_read
    costs = []
    for seconds in (60, 7200):
        path = tmp_path / f"{seconds}{suffix}"
        long_file(path, seconds)
        size = path.stat().st_size
        read.clear()
        with MediaReader(media_bytes.Place(str(path), path.name, 0, size)) as reader:
            assert reader.info.duration_seconds == pytest.approx(seconds, abs=0.6)
            opening = sum(read)
            read.clear()
            start = seconds / 2 + 0.5
            frames = reader.video(
                start=start, num_frames=4, frames_per_second=2, height=64, width=64
            )
            assert read_numbers(frames) == [1, 2, 3, 4]
            costs.append(sum(read))
        # of a long file the index of its packets is read, not the pictures
        assert opening < 0.2 * size or seconds == 60
    assert costs[1] <= costs[0] + 2**17, costs


def test_no_picture_at_all(tmp_path):
    write_clip(tmp_path / "a.m4a", None, noise(1.0, 16000))
    with MediaReader(tmp_path / "a.m4a") as reader, pytest.raises(MediaError, match="no video"):
        _ = reader.displayed_size
