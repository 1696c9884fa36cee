"""Packed shards hold the same clips, smaller: at the same times, with their captions."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")

from media_files import encode, noise, numbered, read_numbers  # noqa: E402
from PIL import Image  # noqa: E402

from vatt_fast.data.clips import ClipSpec  # noqa: E402
from vatt_fast.data.loader import evaluation_clips  # noqa: E402
from vatt_fast.data.media import probe, read_clip  # noqa: E402
from vatt_fast.data.media_writer import write_clip  # noqa: E402
from vatt_fast.data.pack import Packing, clips_per_second, pack, sample  # noqa: E402
from vatt_fast.data.sources import open_source  # noqa: E402
from vatt_fast.files import InUseError, only_writer  # noqa: E402

WINDOW = dict(
    num_frames=10, frames_per_second=10, height=64, width=128, num_samples=16000,
    sample_rate_hz=16000,
)  # fmt: skip
SMALL = Packing(short_side=64, key_frames=5, crf=10, examples_per_shard=2, sample_rate_hz=16000)


@pytest.fixture
def folder(tmp_path):
    """Five files: wide with captions, sound, without sound, a picture, damaged."""
    media = tmp_path / "media"
    media.mkdir()
    wide = np.repeat(numbered(230, 128), 2, axis=2)
    encode(
        media / "a.mkv", video="libx264", audio="aac", frames=wide, seconds=23, rate=48000,
        video_options={"bf": "2"},
    )  # fmt: skip
    write_clip(media / "b.m4a", None, noise(3.0, 16000))
    write_clip(media / "c.mp4", numbered(20), None)
    Image.fromarray(numbered(8)[5]).save(media / "d.png")
    (media / "e.mp4").write_bytes((media / "c.mp4").read_bytes()[:700])
    captions = {
        "a.mkv": [
            {"start": 1, "end": 2, "text": "one"},
            {"start": 12, "end": 14.5, "text": "héllo"},
        ]
    }
    (media / "captions.json").write_text(json.dumps(captions))
    return media


def test_clips_and_captions_are_kept(folder, tmp_path):
    source = open_source(folder)
    done = pack(source, tmp_path / "out", SMALL)
    assert (done.shards, done.clips) == (3, 4)
    assert list(done.problems) == ["e.mp4"] and "e.mp4" in done.problems["e.mp4"]
    assert done.bytes == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.tar"))
    assert done.source_bytes == sum(
        (folder / n).stat().st_size for n in ("a.mkv", "b.m4a", "c.mp4", "d.png")
    )
    packed = open_source(tmp_path / "out")
    assert [packed.name(i) for i in range(len(packed))] == [
        "00000.tar/000000000.mp4", "00000.tar/000000001.m4a", "00001.tar/000000002.mp4",
        "00001.tar/000000003.png",
    ]  # fmt: skip
    with av.open(str(folder / "a.mkv")) as container:
        assert container.streams.video[0].width == 256
    said = packed.captions(0)
    np.testing.assert_allclose(said.times, [[1, 2], [12, 14.5]])
    assert list(said.texts) == ["one", "héllo"]
    for index in range(4):
        original, place = source.place(index), packed.place(index)
        before, after = probe(original), probe(place)
        assert (before.has_video, before.has_audio) == (after.has_video, after.has_audio)
        assert after.duration_seconds == pytest.approx(before.duration_seconds, abs=0.11)
        for start in (0.0, 1.3, 9.6, 21.0):  # across the pieces in which files are decoded
            one, other = (read_clip(each, start=start, **WINDOW) for each in (original, place))
            assert one.heard == pytest.approx(other.heard, abs=60)
            if one.video is not None:
                assert read_numbers(one.video) == read_numbers(other.video)
                assert one.shown == other.shown
            if one.audio is not None:
                assert np.sqrt(np.mean((one.audio - other.audio) ** 2)) < 0.06
    with _member(packed.place(0)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (128, 64)
        keys = [p.is_keyframe for p in container.demux(stream) if p.size]
        assert keys == [number % 5 == 0 for number in range(230)]
        assert container.streams.audio[0].rate == 16000


def _member(place):
    return av.open(
        f"subfile,,start,{place.offset},end,{place.offset + place.size},,:file:{place.path}"
    )


def test_segments_shorter_than_a_window_are_as_short_in_a_manifest_as_packed(tmp_path):
    """Past their end is neither picture nor sound; also where a cache or an index lies between."""
    encode(
        tmp_path / "a.mkv", video="libx264", audio="aac", frames=numbered(60), seconds=6, rate=48000
    )
    Image.fromarray(numbered(8)[5]).save(tmp_path / "d.png")
    segments = ((0.0, 0.3), (2.5, 3.1), (3.0, 3.75), (5.2, 5.9), (1.0, 4.0))
    lines = [f"a.mkv,{start},{end}" for start, end in segments]
    table = tmp_path / "list.csv"
    table.write_text("\n".join(["path,start,end", *lines, "d.png,0,0.2"]))
    source = open_source(table)
    pack(source, tmp_path / "out", SMALL)
    packed = open_source(tmp_path / "out", say=lambda line: None)
    spec = ClipSpec(10, 64, 64, 10.0, 16000, 16000, 4, 2)

    def clips_of(each, **options):
        (batch,) = evaluation_clips(each, spec, vocabulary=None, place=0, **options)
        return batch

    found = [clips_of(source), clips_of(source, cache_dir=tmp_path / "cache"), clips_of(packed)]
    for row, name in enumerate(found[0].files):
        if name == "d.png":
            assert all(batch.video_valid[row] and batch.video[row].any() for batch in found)
            continue
        start, end = next(each for each in segments if name.endswith(f"@{each[0]:g}-{each[1]:g}"))
        frames = min(math.ceil((end - start) * 10 - 1e-6), 10)
        samples = min(round((end - start) * 16000), 16000)
        for batch in found:
            assert bool(batch.video_valid[row]) and bool(batch.audio_valid[row])
            numbers = read_numbers(batch.video[row, :frames].numpy())
            assert numbers == list(range(round(start * 10), round(start * 10) + frames))
            assert not batch.video[row, frames:].any()
            assert not batch.audio[row, samples + 60 :].any()
            assert batch.audio[row, samples - 400 : samples - 60].any()
    assert torch.equal(found[0].video, found[1].video)
    # shorter than a frame, between two places where windows begin: nothing is read of it
    table.write_text("path,start,end\na.mkv,0.31,0.35\n")
    for cache_dir in (None, tmp_path / "cache"):
        tiny = clips_of(open_source(table), cache_dir=cache_dir)
        assert not (tiny.video_valid.any() or tiny.audio_valid.any())
        assert not (tiny.video.any() or tiny.audio.any())


def test_segments_become_files(folder, tmp_path):
    table = tmp_path / "list.csv"
    table.write_text(
        f"path,start,end,text\n{folder}/a.mkv,2.5,6.5,early\n{folder}/a.mkv,12,15,late\n"
        f"{folder}/c.mp4,40,50,past the end\n"
    )
    done = pack(open_source(table), tmp_path / "out", SMALL)
    assert done.clips == 2 and done.source_bytes == (folder / "a.mkv").stat().st_size
    (reason,) = done.problems.values()
    assert "before its segment from 40.00 s on" in reason
    packed = open_source(tmp_path / "out")
    for index, (first, seconds, text) in enumerate(((25, 4.0, "early"), (120, 3.0, "late"))):
        assert probe(packed.place(index)).duration_seconds == pytest.approx(seconds, abs=0.08)
        clip = read_clip(packed.place(index), start=1.0, **WINDOW)
        assert read_numbers(clip.video) == list(range(first + 10, first + 20))
        assert list(packed.captions(index).texts) == [text]


def test_packing_goes_on_and_gives_the_same(folder, tmp_path):
    source = open_source(folder)
    pack(source, tmp_path / "one", SMALL)
    shown = []
    pack(source, tmp_path / "two", SMALL, workers=2, progress=lambda *done: shown.append(done))
    assert shown[0] == (0, 3) and shown[-1] == (3, 3)

    def contents(name):
        return {f.name: f.read_bytes() for f in (tmp_path / name).iterdir() if f.suffix != ".lock"}

    whole = contents("one")
    assert {"00000.tar", "00000_stats.json", "pack.json"} <= set(whole)
    tars = {name: data for name, data in whole.items() if name.endswith((".tar", ".json"))}
    assert tars == {n: d for n, d in contents("two").items() if n.endswith((".tar", ".json"))}
    (tmp_path / "two" / "00001.tar").unlink()
    times = (tmp_path / "two" / "00000.tar").stat().st_mtime_ns
    pack(source, tmp_path / "two", SMALL)
    assert (tmp_path / "two" / "00000.tar").stat().st_mtime_ns == times
    assert (tmp_path / "two" / "00001.tar").read_bytes() == whole["00001.tar"]
    with pytest.raises(ValueError, match="packed with another short_side; pack into another"):
        pack(source, tmp_path / "two", dataclasses.replace(SMALL, short_side=32))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_leaves_whole_shards(folder, tmp_path, workers):
    code = (
        "import sys; from vatt_fast.data.pack import pack, Packing\n"
        "from vatt_fast.data.sources import open_source\n"
        "pack(open_source(sys.argv[1]), sys.argv[2], Packing(short_side=64, key_frames=5, crf=10,"
        " examples_per_shard=1, sample_rate_hz=16000), workers=int(sys.argv[3]))"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), str(out), str(workers)])
    until = time.monotonic() + 60
    while not list(out.glob(".*.part")) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 60
    while True:  # its workers end with it, and leave the folder to others
        try:
            with only_writer(out):
                break
        except InUseError:
            assert time.monotonic() < until
            time.sleep(0.02)
    for tar in out.glob("*.tar"):
        with tarfile.open(tar) as members:
            assert len(members.getnames()) in (0, 2)
    one = dataclasses.replace(SMALL, examples_per_shard=1)
    assert pack(open_source(folder), out, one).clips == 4
    assert len(list(out.glob("*.tar"))) == 5 and not list(out.glob(".*.part"))


def test_what_it_saves_is_measured_on_the_same_windows(folder, tmp_path, monkeypatch):
    source = open_source(folder)
    pack(source, tmp_path / "out", SMALL)
    pairs = sample(source, tmp_path / "out")
    assert [os.path.basename(one.path) for one, _, _ in pairs] == ["a.mkv", "c.mp4"]
    before, after = clips_per_second(pairs, WINDOW, rounds=1)
    assert before > 0 and after > 0


@pytest.mark.parametrize("options", [dict(short_side=0), dict(short_side=63), dict(crf=-1)])
def test_settings_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Packing(**options)
