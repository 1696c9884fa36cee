"""Folders, manifests and tar shards as sources: the same clips, whatever holds them."""

import contextlib
import csv
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tarfile
import time
import tracemalloc
import unicodedata
import warnings

import numpy as np
import pytest

pytest.importorskip("av")

from media_files import noise, numbered

from vatt_fast.cli import main
from vatt_fast.data import index as index_module
from vatt_fast.data import index_file
from vatt_fast.data import sources as sources_module
from vatt_fast.data.captions import key_of
from vatt_fast.data.clips import ClipSpec
from vatt_fast.data.columns import AUDIO, IMAGE, MEASURED, VIDEO, PartBuilder, Strings, in_memory
from vatt_fast.data.dataset import ClipDataset
from vatt_fast.data.index import build_index, open_index
from vatt_fast.data.listing import Wanted, list_source, parse
from vatt_fast.data.loader import evaluation_clips, loader
from vatt_fast.data.media import MediaReader
from vatt_fast.data.media_writer import write_clip
from vatt_fast.data.shards import expand_braces, list_members
from vatt_fast.data.source import CONTENT, MixedSource, Place, Source
from vatt_fast.data.sources import open_source, vocabulary_from
from vatt_fast.data.text import Caption, Vocabulary
from vatt_fast.files import InUseError, only_writer

SECONDS = 1.0
SAID = {
    "0.mp4": [(0.0, 0.5, "a dog barks"), (0.5, 1.0, "the dog sleeps")],
    "1.mp4": [(0.25, 0.75, "über den Fluß")],
    "2.mp4": [],
    "sound.wav": [(0.0, 1.0, "a bell")],
}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Bytes by name: three clips, the last without sound, and a sound."""
    folder = tmp_path_factory.mktemp("media")
    for number in range(3):
        sound = None if number == 2 else noise(SECONDS, 16000, seed=number)
        write_clip(folder / f"{number}.mp4", numbered(10), sound)
    write_clip(folder / "sound.wav", None, noise(SECONDS, 16000, seed=9))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def entries(said):
    return [{"start": a, "end": b, "text": text} for a, b, text in said]


def as_folder(media, folder, said=SAID):
    folder.mkdir(parents=True)
    for name, data in media.items():
        (folder / name).write_bytes(data)
    entered = {name: entries(each) for name, each in said.items() if name in media}
    (folder / "captions.json").write_text(json.dumps(entered))
    return folder


def as_manifest(media, folder, suffix):
    as_folder(media, folder / "media")
    rows = [
        (f"media/{name}", *one)
        for name, said in SAID.items()
        for one in said or [(None, None, None)]
    ]
    path = folder / f"list{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = dict(zip(("path", "start", "end", "text"), zip(*rows, strict=True), strict=True))
        parquet.write_table(pyarrow.table(columns), path)
        return path
    separator = "\t" if suffix == ".tsv" else ","
    lines = [["path", "start", "end", "text"], *rows]
    text = "\n".join(separator.join("" if v is None else str(v) for v in line) for line in lines)
    path.write_text(text, encoding="utf-8-sig")
    return path


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def as_tars(media, folder, a_shard=2, said=SAID):
    folder.mkdir(parents=True)
    names = list(media)
    for number in range(0, len(names), a_shard):
        members = []
        for name in names[number : number + a_shard]:
            stem = os.path.splitext(name)[0]
            members.append((name, media[name]))
            members.append((f"{stem}.json", json.dumps({"captions": entries(said[name])}).encode()))
        write_tar(folder / f"{number // a_shard:05d}.tar", members)
    return folder


def content(source):
    """What a source says of each media file, by the last part of its name."""
    found = {}
    for i in range(len(source)):
        times, texts = source.captions(i)
        with MediaReader(source.place(i)) as reader:
            seconds = reader.info.duration_seconds
        name = source.name(i).rpartition("/")[2]
        found[name] = ([tuple(time) for time in times.tolist()], list(texts), seconds)
    return found


def texts_of(source):
    return [list(source.captions(i).texts) for i in range(len(source))]


def expected():
    return {
        name: ([(a, b) for a, b, _ in said], [text for *_, text in said], SECONDS)
        for name, said in SAID.items()
    }


def quiet(_):
    pass


# -- the same of every kind ------------------------------------------------------------------------


@pytest.mark.parametrize("indexed", [False, True])
def test_a_folder(media, tmp_path, indexed):
    folder = as_folder(media, tmp_path / "clips")
    if indexed:
        build_index(list_source(Wanted(str(folder))), folder / "vatt_index")
    source = open_source(folder)
    assert isinstance(source, Source)
    assert content(source) == expected()
    assert [source.name(i) for i in range(4)] == sorted(SAID)
    assert source.blocks.tolist() == [0, 1, 2, 3, 4] and source.segment(0) == (0.0, math.inf)
    assert source.has == (True, True, True) and not source.problems
    assert source.duration(3) == SECONDS if indexed else math.isnan(source.duration(3))
    assert source.identity.files == 4
    assert source.identity.bytes == sum(map(len, media.values()))


def test_an_index_says_what_the_folder_says(media, tmp_path):
    folder = as_folder(media, tmp_path / "clips")
    held = open_source(folder)
    indexed = build_index(list_source(Wanted(str(folder))), tmp_path / "index")
    assert held.identity == indexed.identity and held.identity.captions.startswith(CONTENT)
    vocabulary = vocabulary_from(held, 100)
    assert vocabulary == vocabulary_from(indexed, 100)
    assert vocabulary == Vocabulary.build([t for said in SAID.values() for *_, t in said], 100)
    rows = [held.encode(vocabulary, 2), indexed.encode(vocabulary, 2)]
    rows.append(pickle.loads(pickle.dumps(rows[1])))
    for i, name in enumerate(sorted(SAID)):
        wanted = vocabulary.encode([text for *_, text in SAID[name]], 2)
        for row in rows:
            assert row(i).dtype == np.int32
            np.testing.assert_array_equal(row(i), wanted)
    few = vocabulary_from(held, 4)
    np.testing.assert_array_equal(
        indexed.encode(few, 3)(0), few.encode(["a dog barks", "the dog sleeps"], 3)
    )


def test_an_index_measures(media, tmp_path):
    folder = as_folder(media, tmp_path / "clips")
    (folder / "p.png").write_bytes(picture())
    source = build_index(list_source(Wanted(str(folder))), folder / "vatt_index")
    clip, mute, still, sound = (source.measured(i) for i in (0, 2, 3, 4))
    assert (clip.duration, clip.width, clip.height, clip.frames_per_second) == (1.0, 64, 64, 10.0)
    assert (clip.sample_rate, clip.key_frames, clip.key_seconds) == (16000, 1, 1.0)
    assert clip.streams == VIDEO | AUDIO | MEASURED and mute.streams == VIDEO | MEASURED
    assert still.streams == IMAGE | MEASURED and still.duration == 0
    assert sound.streams == AUDIO | MEASURED and sound.key_frames == 0


def picture():
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(numbered(1)[0]).save(data, "png")
    return data.getvalue()


def test_key_frames_are_counted(tmp_path):
    from media_files import encode

    encode(tmp_path / "a.mp4", video="mpeg4", seconds=4.0, video_options={"g": "10"})
    source = build_index(list_source(Wanted(str(tmp_path))), tmp_path / "vatt_index")
    assert source.measured(0).key_frames == 4
    assert source.measured(0).key_seconds == pytest.approx(1.0)


def test_tars(media, tmp_path):
    folder = as_tars(media, tmp_path / "shards")
    said = []
    source = open_source(folder, say=said.append)
    assert content(source) == expected()
    assert said == [f"{folder} is indexed into {folder}/vatt_index, once"]
    assert [source.name(i) for i in (0, 3)] == ["00000.tar/0.mp4", "00001.tar/sound.wav"]
    assert source.blocks.tolist() == [0, 2, 4]
    place = source.place(1)
    with open(place.path, "rb") as file:
        file.seek(place.offset)
        assert file.read(place.size) == media["1.mp4"]
    again = []
    assert open_source(f"{folder}/{{00000..00001}}.tar", say=again.append).identity == (
        open_source(f"{folder}/0000?.tar", say=again.append).identity
    )
    assert len(again) == 2 and len({*again}) == 2  # each its own index


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_manifest_of_captions_and_segments(media, tmp_path, suffix):
    path = as_manifest(media, tmp_path / "data", suffix)
    for source in (open_source(path), build_index(list_source(Wanted(str(path))), tmp_path / "i")):
        names = [source.name(i) for i in range(len(source))]
        assert names == [
            "media/0.mp4@0-0.5",
            "media/0.mp4@0.5-1",
            "media/1.mp4",
            "media/2.mp4",
            "media/sound.wav",
        ]
        assert [source.segment(i) for i in (1, 2, 3)] == [(0.5, 1.0), (0.25, 0.75), (0.0, math.inf)]
        assert list(source.captions(1).texts) == ["the dog sleeps"]
        assert source.captions(1).times.tolist() == [[0.5, 1.0]]
        assert source.blocks.tolist() == [0, 2, 3, 4, 5]  # segments of a file are a block


def test_folders_below(media, tmp_path):
    root = tmp_path / "all"
    as_folder({"0.mp4": media["0.mp4"]}, root / "a" / "b")
    (root / "a" / "talk.en.vtt").write_text("WEBVTT\n\n00:00.000 --> 00:01.000\nhello\n")
    (root / "a" / "talk.mp4").write_bytes(media["1.mp4"])
    (root / "a" / ".hidden.mp4").write_bytes(media["1.mp4"])
    (root / "loop").symlink_to(root)
    source = open_source(f"{root}/**")
    assert [source.name(i) for i in range(len(source))] == ["a/b/0.mp4", "a/talk.mp4"]
    assert list(source.captions(1).texts) == ["hello"]
    with pytest.raises(ValueError, match=rf"name one of them, or {root}/\*\*"):
        open_source(root)


def test_captions_beside_media_and_of_howto100m(media, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("abc", "d", "e"):
        (folder / f"{name}.mp4").write_bytes(media["0.mp4"])
    lists = {"start": [0.0, 0.5], "end": [0.5, 1.0], "text": ["one", "two"]}
    (folder / "caption.json").write_text(json.dumps({"abc": lists, "not here": lists}))
    (folder / "d.csv").write_text(",start,end,text\n0,0,1,three\n")
    source = open_source(folder)
    assert [list(source.captions(i).texts) for i in range(3)] == [["one", "two"], ["three"], []]
    indexed = build_index(
        list_source(Wanted(str(folder), captions=str(folder / "caption.json"))), tmp_path / "index"
    )
    assert indexed.identity == source.identity
    with pytest.warns(UserWarning, match=r"1 of the names in .*caption\.json .* \('not here'\)"):
        list_source(Wanted(str(folder)))
    (folder / "d.csv").write_text("start,end,text\n0,x,three\n")
    with pytest.raises(ValueError, match=r"d\.csv line 2: 'x' is no time"):
        open_source(folder)


@pytest.mark.parametrize("indexed", [False, True])
def test_captions_of_no_file_and_of_several_are_said(media, tmp_path, indexed):
    root = tmp_path / "all"
    for name in ("a/1.mp4", "b/1.mp4", "b/2.mp4", "c.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(media["0.mp4"])
    one = entries([(0, 1, "a dog")])
    (root / "captions.json").write_text(
        json.dumps({"1.mp4": one, "typo.mp4": one, "b/2": one, "other": one})
    )
    (root / "list.csv").write_text("path,start,end\nb/2.mp4,0,0.5\nb/2.mp4,0.5,1\nc.mp4,,\n")
    (root / "c.json").write_text(json.dumps({"2.mp4": one, "c": one, "gone": one}))
    (root / "mix.toml").write_text('[[source]]\npath = "list.csv"\ncaptions = "c.json"\n')
    none = r"{} of the {} names in .*{} are of no file in .*{} \({}\): their captions are not used"
    for text, said, told in (
        (f"{root}/**", [["a dog"], ["a dog"], ["a dog"], []], [
            none.format(2, 4, r"captions\.json", r"all/\*\*", "'typo.mp4', 'other'"),
            r"1 of the 4 names in .*json are of several files in .*all/\*\* \('1\.mp4' of a/1\.mp4 "
            r"and b/1\.mp4\), which all get their captions; name files by their paths",
        ]),
        (str(root / "mix.toml"), [["a dog"]] * 3, [
            none.format(1, 3, r"c\.json", r"list\.csv", "'gone'"),
        ]),
    ):  # fmt: skip
        if indexed:
            (wanted,) = parse(text)
            listing = list_source(wanted)
            build_index(listing, listing.home)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert texts_of(open_source(text, say=quiet)) == said
        assert len(caught) == len(told)
        for warning, pattern in zip(caught, told, strict=True):
            assert re.search(pattern, str(warning.message)), warning.message


@pytest.mark.parametrize("kind", ["folder", "below", "large", "named", "indexed"])
def test_a_folders_captions_come_before_those_beside_media(media, tmp_path, monkeypatch, kind):
    folder = as_folder(media, tmp_path / "clips", {"0.mp4": [(0, 1, "said")], "1.mp4": []})
    for name in ("0", "1", "2"):
        (folder / f"{name}.txt").write_text(f"beside {name}")
    text = str(folder)
    if kind == "large":
        monkeypatch.setattr("vatt_fast.data.listing.LARGE_CAPTIONS_BYTES", 10)
        monkeypatch.setattr(sources_module, "LARGE_CAPTIONS_BYTES", 10)
    elif kind == "below":
        text = f"{folder}/**"
    elif kind == "named":
        (folder / "captions.json").rename(tmp_path / "said.json")
        text = str(tmp_path / "mix.toml")
        (tmp_path / "mix.toml").write_text('[[source]]\npath = "clips"\ncaptions = "said.json"\n')
    elif kind == "indexed":
        build_index(list_source(Wanted(text)), folder / "vatt_index")
    assert texts_of(open_source(text, say=quiet)) == [["said"], [], ["beside 2"], []]


def test_large_captions_are_read_apart(media, tmp_path, monkeypatch):
    folder = as_folder(media, tmp_path / "clips")
    held = open_source(folder)
    monkeypatch.setattr("vatt_fast.data.listing.LARGE_CAPTIONS_BYTES", 10)
    monkeypatch.setattr(sources_module, "LARGE_CAPTIONS_BYTES", 10)
    monkeypatch.setattr(index_module, "_NAMES_A_PART", 2)
    said = []
    source = open_source(folder, say=said.append)
    assert len(said) == 1 and source.folder == folder / "vatt_index"
    assert content(source) == expected() and source.identity == held.identity


SPEC = ClipSpec(4, 32, 32, 10.0, 6400, 16000, 4, 2)


def as_kind(kind, media, folder, said=SAID):
    """Only names of whole files, so that every kind has the same examples."""
    if kind == "shards":
        return as_tars(media, folder, said=said)
    as_folder(media, folder, said)
    if kind == "manifest":
        (folder / "list.csv").write_text("\n".join(["path", *media]))
        places = {"path": folder / "list.csv", "captions": folder / "captions.json"}
        lines = [f'{key} = "{value}"' for key, value in places.items()]
        (folder / "one.toml").write_text("\n".join(["[[source]]", *lines]))
        return folder / "one.toml"
    return folder


def test_clips_are_the_same_whatever_holds_them(media, tmp_path):
    found = []
    for kind in ("folder", "manifest", "shards"):
        source = open_source(as_kind(kind, media, tmp_path / kind), say=quiet)
        vocabulary = vocabulary_from(source, 50)
        clips = {}
        for batch in evaluation_clips(source, SPEC, vocabulary=vocabulary, batch_size=3):
            arrays = (batch.video, batch.audio, batch.text, batch.video_valid, batch.text_valid)
            for row, name in enumerate(batch.files):
                clips[os.path.basename(name)] = [np.asarray(array[row]) for array in arrays]
        found.append((vocabulary.words, clips))
    assert set(found[0][1]) == set(media)
    for words, clips in found[1:]:
        assert words == found[0][0] and set(clips) == set(media)
        for name, arrays in clips.items():
            for array, expected in zip(arrays, found[0][1][name], strict=True):
                np.testing.assert_array_equal(array, expected)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """11 clips of many lengths and what is said in them; some are silent, one is sound alone."""
    folder = tmp_path_factory.mktemp("uneven")
    said = {}
    for number in range(11):
        count = 3 + 2 * number % 11  # frames, of which a window has 4
        sound = None if number % 4 == 1 else noise(count / 10, 16000, seed=number)
        path = folder / f"{number:02}.{'wav' if number == 6 else 'mp4'}"
        write_clip(path, None if number == 6 else numbered(count), sound)
        said[path.name] = [(0.1 * k, 0.1 * k + 0.2, f"word{number} {k}") for k in range(number % 4)]
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}, said


@pytest.fixture(scope="module")
def in_order(uneven, tmp_path_factory):
    """Batches of a folder read by one process, and its vocabulary: what everything must equal."""
    media, said = uneven
    folder = tmp_path_factory.mktemp("order") / "clips"
    source = open_source(as_kind("folder", media, folder, said))
    vocabulary = vocabulary_from(source, 50)
    found = batches_of(source, vocabulary, folder.parent / "cache", 0, 1)
    assert all(len({*names}) == 4 for names, *_ in found)
    # two batches an epoch, in which three clips sit out
    assert len({*found[0][0], *found[1][0]}) == 8 and found[0][0] != found[2][0]
    assert len({name for names, *_ in found for name in names}) > 8
    return found, vocabulary, folder.parent / "cache"


def batches_of(source, vocabulary, cache, workers, world):
    """Names, frames, sound and words of five steps of four rows, of all ranks together."""
    ranks = []
    for rank in range(world):
        dataset = ClipDataset(
            source, SPEC, vocabulary=vocabulary, batch_size=4 // world, rank=rank, world=world,
            cache_dir=cache,
        )  # fmt: skip
        ranks.append([
            ([os.path.basename(name) for name in batch.files],
             *(values.numpy().copy() for values in (batch.video, batch.audio, batch.text)))
            for batch in loader(dataset, 0, 5, workers)
        ])  # fmt: skip
    joined = []
    for step in zip(*ranks, strict=True):
        names, *arrays = zip(*step, strict=True)
        joined.append(([name for each in names for name in each], *map(np.concatenate, arrays)))
    return joined


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kind", ["folder", "manifest", "shards"])
def test_order_and_content_are_the_same_for_all(uneven, tmp_path, in_order, kind, world):
    """0, 1, 2 and 4 workers x 1, 2 and 4 ranks x folder, manifest and tar of the same files."""
    expected, vocabulary, cache = in_order
    media, said = uneven
    source = open_source(as_kind(kind, media, tmp_path / kind, said), say=quiet)
    for workers in (0, 1, 2, 4):
        found = batches_of(source, vocabulary, cache, workers, world)
        for (files, *arrays), (names, *others) in zip(found, expected, strict=True):
            assert files == names
            for array, other in zip(arrays, others, strict=True):
                np.testing.assert_array_equal(array, other)


# -- shards as others write them -------------------------------------------------------------------


def test_shards_of_webdataset(media, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "s-%06d.tar"), maxcount=2, verbose=0) as writer:
        for number, name in enumerate(SAID):
            sample = {"__key__": f"{number:09d}", "json": {"n": number}, "txt": f"caption {number}"}
            suffix = name.rpartition(".")[2]
            writer.write({**sample, suffix: media[name]})
    source = open_source(f"{tmp_path}/s-{{000000..000001}}.tar", say=quiet)
    assert [source.name(i) for i in range(4)] == [
        "s-000000.tar/000000000.mp4",
        "s-000000.tar/000000001.mp4",
        "s-000001.tar/000000002.mp4",
        "s-000001.tar/000000003.wav",
    ]
    assert [list(source.captions(i).texts) for i in range(4)] == [
        [f"caption {i}"] for i in range(4)
    ]
    read = webdataset.WebDataset(
        [str(tmp_path / f"s-{i:06d}.tar") for i in range(2)], shardshuffle=False
    )
    for number, sample in enumerate(read):
        place = source.place(number)
        with open(place.path, "rb") as file:
            file.seek(place.offset)
            assert file.read(place.size) == sample.get("mp4", sample.get("wav"))


def test_an_unpacked_shard_has_the_captions_of_the_shard(media, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    srt = b"1\n00:00:00,000 --> 00:00:01,000\ntimed\n"
    clip, other = media["0.mp4"], media["1.mp4"]
    samples = {
        "a": ({"mp4": clip, "json": {"n": 1}, "txt": "a dog"}, ["a dog"]),
        "b": ({"mp4": clip, "json": {"caption": "of json"}, "txt": "of txt"}, ["of txt"]),
        "c": ({"mp4": clip, "json": {"captions": entries([(0, 1, "timed")])}, "txt": "not"},
              ["timed"]),
        "d": ({"mp4": clip, "srt": srt, "txt": "not"}, ["timed"]),
        "e": ({"mp4": clip, "en.srt": srt, "txt": "not"}, ["timed"]),
        "f": ({"mp4": clip, "json": {"caption": "of json"}, "txt": " "}, ["of json"]),
        "g": ({"left.mp4": clip, "right.mp4": other, "right.srt": srt, "txt": "both"},
              ["both", "timed"]),
        "h": ({"mp4": clip}, []),
    }  # fmt: skip
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for key, (fields, _) in samples.items():
            writer.write({"__key__": key, **fields})
    folder = tmp_path / "clips"
    with tarfile.open(tmp_path / "0.tar") as tar:
        tar.extractall(folder, filter="data")
    expected = [[text] for _, said in samples.values() for text in said or [None]]
    expected[-1] = []
    below = list_source(Wanted(f"{folder}/**"))
    for source in (
        open_source(tmp_path / "0.tar", say=quiet),
        open_source(folder),
        open_source(f"{folder}/**"),
        build_index(below, tmp_path / "index"),
    ):
        assert texts_of(source) == expected


def test_a_folder_of_video2dataset(media, tmp_path):
    """Fields and files as its WebDatasetSampleWriter, ClippingSubsampler and worker write them."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    webdataset = pytest.importorskip("webdataset")
    subtitles = [
        {"start": "00:00:10.250", "end": "00:00:10.750", "lines": {"en": ["now the dog"]}},
    ]
    metas = [
        {"url": "u0", "caption": "a title", "key": "000000000", "status": "success"},
        {
            "url": "u1",
            "caption": "another",
            "key": "000000001_00000",
            "clips": [[10.0, 11.0]],
            "clip_subtitles": subtitles,
            "yt_meta_dict": {},
            "status": "success",
        },
        {
            "url": "u2",
            "caption": "lost",
            "key": "000000002",
            "status": "failed_to_download",
            "error_message": "ERROR: [youtube]: Video unavailable\n",
        },
    ]
    folder = tmp_path / "dataset"
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "00000.tar")) as writer:
        for number, meta in enumerate(metas):
            sample = {"__key__": meta["key"], "txt": meta["caption"]}
            sample["json"] = json.dumps(meta, indent=4)
            if meta["status"] == "success":
                sample |= {"mp4": media[f"{number}.mp4"], "m4a": media["sound.wav"]}
            writer.write(sample)
    table = pyarrow.table({"key": [meta["key"] for meta in metas]})
    parquet.write_table(table, folder / "00000.parquet")
    (folder / "00000_stats.json").write_text(json.dumps({"count": 3, "successes": 2}))
    source = open_source(folder, say=quiet)
    assert [source.name(i) for i in range(len(source))] == [
        "00000.tar/000000000.mp4",
        "00000.tar/000000001_00000.mp4",
    ]
    assert list(source.captions(0).texts) == ["a title"]
    assert source.captions(0).times.tolist() == [[0.0, math.inf]]
    assert list(source.captions(1).texts) == ["now the dog"]
    assert source.captions(1).times.tolist() == [[0.25, 0.75]]
    assert source.problems == {
        "00000.tar/000000002": "has no media (failed_to_download: ERROR: [youtube]: Video "
        "unavailable)"
    }


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names(media, tmp_path, kind):
    long = f"{'deep/' * (18 if kind == tarfile.USTAR_FORMAT else 60)}talk.v2.mp4"
    name = "ü" * 20 + ".mp4"
    members = [(long, media["0.mp4"]), (name, media["1.mp4"]), ("sub/talk.mp4", media["2.mp4"])]
    write_tar(tmp_path / "a.tar", members, format=kind)
    source = open_source(tmp_path / "a.tar", say=quiet)
    assert [source.name(i) for i in range(3)] == [f"a.tar/{name}" for name, _ in members]
    assert source.identity.bytes == sum(len(data) for _, data in members)


def test_members_of_a_key(media, tmp_path):
    members = [
        ("x/a.jpg", picture()),
        ("x/a.mp4", media["0.mp4"]),
        ("x/a.srt", b"1\n00:00:00,000 --> 00:00:01,000\nof a\n"),
        ("x/b.left.mp4", media["0.mp4"]),
        ("x/b.right.mp4", media["1.mp4"]),
        ("x/b.right.txt", b"right"),
        ("x/b.txt", b"both"),
        ("x/._b.mp4", b"of macOS"),
        ("x/c.png", picture()),
        ("x/d.cls", b"7"),
        ("x/e.wav", media["sound.wav"]),
        ("x/e.png", picture()),
    ]
    write_tar(tmp_path / "a.tar", members)
    source = open_source(tmp_path / "a.tar", say=quiet)
    said = {source.name(i)[8:]: list(source.captions(i).texts) for i in range(len(source))}
    assert said == {
        "a.mp4": ["of a"],
        "b.left.mp4": ["both"],
        "b.right.mp4": ["right"],
        "c.png": [],
        "e.wav": [],
    }
    assert source.problems == {"a.tar/x/d": "has no media, only x/d.cls"}
    assert key_of("x.y/b.left.mp4") == "x.y/b"


# -- what goes wrong -------------------------------------------------------------------------------


def test_a_truncated_tar(media, tmp_path):
    whole = write_tar(tmp_path / "whole.tar", list(media.items()))
    with tarfile.open(whole) as tar:
        cut = {member.name: member.offset_data for member in tar}
    data = whole.read_bytes()
    for place, names in (
        (cut["2.mp4"] + 100, ["0.mp4", "1.mp4"]),  # within a member
        (cut["2.mp4"] - 100, ["0.mp4", "1.mp4"]),  # within a header
        (cut["2.mp4"] - 512, ["0.mp4", "1.mp4"]),  # between members
    ):
        path = tmp_path / f"cut{place}.tar"
        path.write_bytes(data[:place])
        source = open_source(path, say=quiet)
        assert [source.name(i).partition("/")[2] for i in range(len(source))] == names
        (reason,) = source.problems.values()
        assert "cut short" in reason and path.name in reason


def test_a_corrupt_member_and_a_corrupt_header(media, tmp_path):
    broken = {"0.mp4": media["0.mp4"], "bad.mp4": b"no media" * 200, "empty.mp4": b"", **media}
    members = [*list(broken.items())[:3], ("bad.json", b"{"), *list(broken.items())[3:]]
    path = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(path) as tar:
        header = next(member.offset for member in tar if member.name == "2.mp4")
    with open(path, "r+b") as file:
        file.seek(header)
        file.write(b"\xff" * 200)
    source = open_source(path, say=quiet)
    assert [source.name(i) for i in range(len(source))] == [
        "a.tar/0.mp4",
        "a.tar/1.mp4",
        "a.tar/sound.wav",
    ]
    told = source.problems
    assert "cannot be decoded" in told["a.tar/bad.mp4"]
    assert told["a.tar/empty.mp4"] == "a.tar/empty.mp4 is empty"
    assert "no header of a member where one is due" in told[f"a.tar/byte {header}"]
    assert "cannot be read as JSON" in told["a.tar/bad"]


def test_flipped_bits_and_cuts_anywhere(media, tmp_path):
    """A tar gives members that lie within it, and a reason for what is missing, or a ValueError."""
    small = {f"{number}.txt": bytes([number]) * (300 * number) for number in range(8)}
    data = write_tar(tmp_path / "a.tar", [*small.items()], format=tarfile.PAX_FORMAT).read_bytes()
    random = np.random.default_rng(0)
    whole = [*small.values()]
    refused = []
    for trial in range(400):
        broken = bytearray(data)
        if trial % 2:
            place = int(random.integers(len(broken)))
            broken[place] ^= 1 << int(random.integers(8))
            header = place // 512 * 512
            if trial % 4 == 1 and header < 9 * 1024:  # its sum is made right again
                block = broken[header : header + 512]
                block[148:156] = b" " * 8
                broken[header + 148 : header + 156] = b"%06o\0 " % sum(block)
        else:
            del broken[int(random.integers(len(broken))) :]
        try:
            shard = list_members(io.BytesIO(broken), len(broken), "a.tar")
        except ValueError as error:
            refused.append(str(error))
            continue
        for member in shard.members:
            assert member.offset >= 0 and member.offset + member.size <= len(broken)
        if not shard.problems and not trial % 2:
            assert [bytes(broken[m.offset : m.offset + m.size]) for m in shard.members] == whole
    assert 0 < len(refused) < 60
    assert all("a.tar" in reason and "\n" not in reason for reason in refused)


def test_a_changed_tar_is_read_again_by_name(media, tmp_path, monkeypatch):
    folder = as_tars(media, tmp_path / "shards")
    open_source(folder, say=quiet)
    read = []
    original = index_module.read_shard
    monkeypatch.setattr(index_module, "read_shard", lambda *a: (read.append(a[1]), original(*a))[1])
    said = []
    assert open_source(folder, say=said.append).folder and not said and not read
    write_tar(folder / "00001.tar", [("new.mp4", media["2.mp4"])])
    source = open_source(folder, say=said.append)
    assert read == ["00001.tar"]
    assert said[0].startswith(f"the index {folder}/vatt_index is brought up to date: 00001.tar had")
    assert [source.name(i) for i in range(len(source))] == [
        "00000.tar/0.mp4",
        "00000.tar/1.mp4",
        "00001.tar/new.mp4",
    ]
    assert list(source.captions(0).texts) == ["a dog barks", "the dog sleeps"]
    write_tar(folder / "00002.tar", [("more.mp4", media["2.mp4"])])
    assert len(open_source(folder, say=said.append)) == 4 and "00002.tar is new" in said[-1]
    (folder / "00000.tar").unlink()
    with pytest.raises(ValueError, match=r"out of date: 00000\.tar is gone; run vatt-fast index"):
        open_source(folder / "vatt_index")
    assert len(open_source(folder, say=said.append)) == 2


def test_tars_beside_media_and_in_folders_below(media, tmp_path):
    """Neither is passed over in silence, and what to name is told."""
    both = tmp_path / "both"
    as_tars(media, both / "a" / "b")
    with pytest.raises(ValueError, match=r"no media files.*; tars .*: name '(.*/both/\*\*/.*tar)'"):
        open_source(both, say=quiet)
    with pytest.raises(
        ValueError, match=r"name '(.*/both/\*\*/\*\.tar)' for the tars there"
    ) as told:
        open_source(f"{both}/**", say=quiet)
    named = re.search("'(.*)'", str(told.value))[1]
    assert content(open_source(named, say=quiet)) == expected()
    (both / "x.mp4").write_bytes(media["0.mp4"])
    write_tar(both / "0.tar", [("y.mp4", media["1.mp4"])])
    with pytest.raises(
        ValueError, match=r"has tars \(0\.tar\) beside media files \(x\.mp4\)"
    ) as told:
        open_source(both, say=quiet)
    tars, files = re.findall("'(.*?)'", str(told.value))
    assert list(content(open_source(tars, say=quiet))) == ["y.mp4"]
    with pytest.warns(UserWarning, match=r"both/\*\* leaves out 3 tars beside its media"):
        assert list(content(open_source(files))) == ["x.mp4"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_a_tar_that_is_written_anew_during_a_run_ends_it(media, tmp_path, workers, cached):
    """Two members of one size that change places would change captions without a word."""
    folder, size = tmp_path / "shards", max(map(len, media.values()))
    folder.mkdir()
    padded = {name: media[name].ljust(size, b"\0") for name in ("0.mp4", "1.mp4")}
    members = [
        (name, data)
        for media_name, values in padded.items()
        for name, data in ((media_name, values), (f"{media_name[0]}.txt", media_name.encode()))
    ]
    write_tar(folder / "0.tar", members)
    source = open_source(folder, say=quiet)
    cache = tmp_path / "cache" if cached else None
    dataset = ClipDataset(source, SPEC, vocabulary=None, batch_size=2, cache_dir=cache)
    assert len(next(iter(loader(dataset, 0, 1, workers)))) == 2
    write_tar(folder / "0.tar", members[2:] + members[:2])
    os.utime(folder / "0.tar", (1, 1))
    told = rf"{folder}/0\.tar was written anew since it was indexed, so 0\.tar/[01]\.mp4 may be"
    with pytest.raises(ValueError, match=told):
        next(iter(loader(dataset, 0, 1, workers)))
    with pytest.raises(ValueError, match=told):
        list(evaluation_clips(source, SPEC, vocabulary=None, cache_dir=cache, workers=workers))
    said = []
    assert texts_of(open_source(folder, say=said.append)) == [["1.mp4"], ["0.mp4"]] and said


def test_a_changed_file_is_measured_again_alone(media, tmp_path, monkeypatch):
    folder = as_folder(media, tmp_path / "clips")
    build_index(list_source(Wanted(str(folder))), folder / "vatt_index")
    read = []
    original = index_module.measure
    monkeypatch.setattr(
        index_module, "measure", lambda place: (read.append(place.name), original(place))[1]
    )
    (folder / "notes.odt").write_text("no media")  # the folder's time is another one now
    said = []
    assert len(open_source(folder, say=said.append)) == 4 and not said and not read
    (folder / "1.mp4").write_bytes(media["2.mp4"])
    (folder / "3.mp4").write_bytes(media["0.mp4"])
    source = open_source(folder, say=said.append)
    assert read == ["1.mp4", "3.mp4"] and len(source) == 5
    assert source.measured(1).streams == VIDEO | MEASURED


@pytest.mark.parametrize("below", ["", "/**"])
@pytest.mark.parametrize("name", ["captions.json", "caption.json", "0.txt"])
def test_captions_that_come_after_the_index(media, tmp_path, below, name):
    """Also where they are edited along with the folder, and taken away again."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for each in ("0.mp4", "1.mp4"):
        (folder / each).write_bytes(media[each])
    text = f"{folder}{below}"
    listing = list_source(Wanted(text))
    build_index(listing, listing.home)
    says = {
        "captions.json": lambda said: json.dumps({"0.mp4": entries([(0, 1, said)])}),
        "caption.json": lambda said: json.dumps({"0": entries([(0, 1, said)])}),
        "0.txt": lambda said: said,
    }[name]
    told = []
    for said in ("a dog", "two dogs"):
        (folder / name).write_text(says(said))
        os.utime(folder, (1, len(told)))  # as another file in it does
        assert texts_of(open_source(text, say=told.append)) == [[said], []]
        assert texts_of(open_source(text, say=told.append)) == [[said], []]
    (folder / name).unlink()
    assert texts_of(open_source(text, say=told.append)) == [[], []]
    assert len(told) == 3 and all("is brought up to date" in line for line in told)


@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_a_folder_of_captions_changes(media, tmp_path, kind):
    data = tmp_path / "data"
    if kind == "shards":
        data.mkdir()
        write_tar(data / "0.tar", [(name, media[name]) for name in ("0.mp4", "1.mp4")])
        write_tar(data / "1.tar", [("2.mp4", media["2.mp4"]), ("2.txt", b"of the shard")])
    else:
        as_folder({name: media[name] for name in ("0.mp4", "1.mp4", "2.mp4")}, data)
        (data / "captions.json").write_text(
            json.dumps({"2.mp4": entries([(0, 1, "of the shard")])})
        )
    plain = build_index(list_source(Wanted(str(data))), data / "vatt_index")
    assert texts_of(plain) == [[], [], ["of the shard"]]
    said, told = tmp_path / "said", []
    said.mkdir()
    (said / "0.txt").write_text("a dog")
    mix = tmp_path / "mix.toml"
    mix.write_text('[[source]]\npath = "data"\ncaptions = "said"\n')

    def found():
        first = texts_of(open_source(mix, say=told.append))
        assert first == texts_of(open_source(mix, say=told.append))
        return first

    assert found() == [["a dog"], [], ["of the shard"]]
    assert told[-1].endswith(f"captions are to be taken from {said}")
    (said / "1.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\na cat\n")
    assert found() == [["a dog"], ["a cat"], ["of the shard"]]
    (said / "0.txt").write_text("a log")
    assert found() == [["a log"], ["a cat"], ["of the shard"]]
    (said / "1.srt").unlink()
    assert found() == [["a log"], [], ["of the shard"]]
    assert len(told) == 4 and all(line.endswith(f"{said} has other captions") for line in told[1:])


def test_a_folder_may_be_that_of_its_captions_too(media, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "0.mp4").write_bytes(media["0.mp4"])
    (folder / "0.vtt").write_text("WEBVTT\n\n00:00.000 --> 00:01.000\nhello\n")
    wanted = Wanted(f"{folder}/**", captions=str(folder))
    build_index(list_source(wanted), list_source(wanted).home)
    (folder / "1.mp4").write_bytes(media["1.mp4"])
    (folder / "1.txt").write_text("there")
    assert texts_of(open_source(f"{folder}/**", say=quiet)) == [["hello"], ["there"]]
    (folder / "2.mp4").write_bytes(media["2.mp4"])
    assert texts_of(open_source(f"{folder}/**", say=quiet)) == [["hello"], ["there"], []]


def test_an_index_by_its_own_name_is_compared_with_what_is_there(media, tmp_path):
    shards, clips = as_tars(media, tmp_path / "shards"), as_folder(media, tmp_path / "clips")
    for folder in (shards, clips):
        build_index(list_source(Wanted(str(folder))), folder / "vatt_index")
        (folder / "notes.odt").write_text("no media")
        assert content(open_source(folder / "vatt_index")) == expected()
    pattern = list_source(Wanted(f"{shards}/0000{{0,1}}.tar"))
    build_index(pattern, tmp_path / "both")
    write_tar(shards / "00002.tar", [("new.mp4", media["2.mp4"])])
    (clips / "new.mp4").write_bytes(media["2.mp4"])
    moved = shards.rename(tmp_path / "there")
    for folder, told in ((moved, "00002.tar is new"), (clips, "clips has other files")):
        with pytest.raises(ValueError, match=rf"out of date: .*{told}; run vatt-fast index"):
            open_source(folder / "vatt_index")
    moved.rename(shards)
    assert len(open_source(tmp_path / "both")) == 4  # it was made of two shards by their names


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_goes_on(media, tmp_path, monkeypatch, workers):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(4):
        write_tar(folder / f"{number}.tar", [(f"{number}.mp4", media["0.mp4"])])
    original = index_module.read_shard

    def killed(path, label, *rest):
        if label == "2.tar":
            raise OSError("the disk is full")
        return original(path, label, *rest)

    monkeypatch.setattr(index_module, "read_shard", killed)
    with pytest.raises(OSError, match="the disk is full"):
        build_index(list_source(Wanted(str(folder))), folder / "vatt_index", workers=workers)
    kept = {path.name for path in (folder / "vatt_index" / "parts").glob("shard-*.npz")}
    assert {"shard-000000.npz", "shard-000001.npz"} <= kept and "shard-000002.npz" not in kept
    # half of a part, as after a power cut without the rename's promise
    torn = folder / "vatt_index" / "parts" / "shard-000001.npz"
    torn.write_bytes(torn.read_bytes()[:-50])
    read = []
    monkeypatch.setattr(index_module, "read_shard", lambda *a: (read.append(a[1]), original(*a))[1])
    source = build_index(list_source(Wanted(str(folder))), folder / "vatt_index")
    assert "0.tar" not in read and {"1.tar", "2.tar"} <= {*read} and len(source) == 4
    assert not (folder / "vatt_index" / "parts").exists()


def ends_soon(lock):
    for _ in range(500):
        try:
            with lock():
                return True
        except InUseError:
            time.sleep(0.02)
    return False


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_killed_at_any_time_goes_on(media, tmp_path, monkeypatch, workers):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(6):
        write_tar(folder / f"{number}.tar", [(f"{number}.mp4", media["0.mp4"])])
    listing = list_source(Wanted(str(folder)))
    whole = build_index(listing, tmp_path / "whole")
    original = index_module.read_shard

    def slowly(*given):
        time.sleep(0.05)
        original(*given)

    monkeypatch.setattr(index_module, "read_shard", slowly)
    fork = multiprocessing.get_context("fork")
    for parts in (1, 3):
        child = fork.Process(
            target=build_index, args=(listing, tmp_path / "index"), kwargs={"workers": workers}
        )
        child.start()
        while len([*(tmp_path / "index" / "parts").glob("*.npz")]) < parts and child.is_alive():
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert ends_soon(lambda: only_writer(tmp_path / "index"))  # its workers end with it
    source = build_index(listing, tmp_path / "index", workers=workers)
    assert source.identity == whole.identity
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == sorted(
        [".lock", "index.json", next((tmp_path / "index").glob("columns-*")).name]
    )


def test_another_process_that_builds_is_waited_for(media, tmp_path):
    folder = as_tars(media, tmp_path / "shards")
    place = folder / "vatt_index"
    place.mkdir()
    said = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_writer(place))

        def say(line):
            said.append(line)
            if len(said) == 2:
                stack.close()

        assert len(open_source(folder, say=say)) == 4
    assert said[1].endswith("name another folder: waiting") and len(said) == 2


def test_an_index_may_move_with_its_data(media, tmp_path):
    folder = as_tars(media, tmp_path / "here")
    build_index(list_source(Wanted(str(folder))), folder / "vatt_index")
    moved = folder.rename(tmp_path / "there")
    assert content(open_source(moved / "vatt_index")) == expected()


def test_damaged_indexes(media, tmp_path):
    folder = as_folder(media, tmp_path / "clips")
    index = tmp_path / "index"
    build_index(list_source(Wanted(str(folder))), index)
    about = json.loads((index / "index.json").read_text())
    text = index / about["columns"] / "text_data.npy"
    text.write_bytes(text.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"text_data\.npy is missing or damaged"):
        open_index(index)
    for content, message in (
        ("{", "is no index"),
        (json.dumps(about | {"version": 99}), "it is of version 99, this program reads 1"),
        (json.dumps({"format": "x"}), "it is of something else"),
        ("[]", "is no index"),
    ):
        (index / "index.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            open_source(index)
    with pytest.raises(ValueError, match="is no index; make one with vatt-fast index"):
        open_index(tmp_path)


def test_a_shard_that_is_none_is_listed(media, tmp_path):
    folder = as_tars(media, tmp_path / "shards")
    (folder / "00002.tar").write_bytes(b"")
    (folder / "00003.tar").write_bytes(b"<html>404</html>" * 100)
    source = open_source(folder, say=quiet)
    assert len(source) == 4 and sorted(source.problems) == ["00002.tar", "00003.tar"]
    assert "is empty" in source.problems["00002.tar"]
    assert "is no tar" in source.problems["00003.tar"]


def test_names_of_any_bytes(media, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    odd = os.fsdecode(b"\xff\xe9.mp4")
    (folder / odd).write_bytes(media["0.mp4"])
    (folder / f"bad{odd}").write_bytes(b"no media")
    source = build_index(list_source(Wanted(str(folder))), folder / "vatt_index")
    assert source.name(0) == odd and list(source.problems) == [f"bad{odd}"]
    with MediaReader(source.place(0)) as reader:
        assert reader.info.duration_seconds == SECONDS
    write_tar(tmp_path / "a.tar", [(odd, media["0.mp4"])], format=tarfile.GNU_FORMAT)
    assert open_source(tmp_path / "a.tar", say=quiet).name(0) == f"a.tar/{odd}"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.tar.gz", b"", r"compressed.*at random: unpack (it|them) to \.tar"),
        ("a.tar", b"\x1f\x8b" + bytes(600), r"a\.tar is compressed \(gzip\).*gunzip it"),
        ("a.tar", b"\x28\xb5\x2f\xfd" + bytes(600), r"a\.tar is compressed \(zstd\).*unzstd it"),
        ("a.tar", b"", r"a\.tar is empty"),
        ("a.tar", b"no tar" * 200, r"a\.tar is no tar"),
    ],
)
def test_what_is_no_plain_tar(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=message):
            open_source(source, say=quiet)


def bad_manifests():
    yield "", "lists no media; write a header"
    yield "start,end\n1,2\n", "has the columns start, end; one must be called path"
    yield "path,start,end\na.mp4,2,1\n", "line 2 has a segment from 2 to 1 s"
    yield "path,start\na.mp4,x\n", "line 2 has the start 'x'"
    yield "path,start\na.mp4,-1\n", "line 2 has a segment from -1 to inf s"
    yield "path,text\na.mp4\n", "line 2 has 1 values under 2 columns"
    yield 'path\n"a.mp4\n', "is no row of a table"
    yield "path,start\n\n,1\n", "line 3 has no path"
    yield "path,path\na,b\n", "two columns 'path'"


@pytest.mark.parametrize(("text", "message"), [*bad_manifests()])
def test_bad_manifests(tmp_path, text, message):
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_manifests_of_other_data_sets(media, tmp_path):
    (tmp_path / "-0RWZT-miFs.mp4").write_bytes(media["0.mp4"])
    (tmp_path / "b.wav").write_bytes(media["sound.wav"])
    audioset = (
        "# Segments csv created Sun Mar  5 10:54:25 2017\n"
        "# num_ytids=2, num_segs=2, num_unique_labels=527, num_positive_labels=52882\n"
        "# YTID, start_seconds, end_seconds, positive_labels\n"
        '-0RWZT-miFs, 0.000, 0.500, "/m/03v3yw,/m/0k4j"\n'
        'b, 0.250, 10.000, "/m/04rlf"\n'
        'gone, 0.000, 10.000, "/m/04rlf"\n'
    )
    (tmp_path / "balanced.csv").write_text(audioset)
    source = open_source(tmp_path / "balanced.csv")
    assert [source.name(i) for i in range(2)] == ["-0RWZT-miFs.mp4", "b.wav"]
    assert [source.segment(i) for i in range(2)] == [(0.0, 0.5), (0.25, 10.0)]
    assert not source.has.text and list(source.problems) == ["gone"]
    kinetics = "label,youtube_id,time_start,time_end,split\ndancing,b,0,1,train\nx,b,5,9,train\n"
    (tmp_path / "kinetics.csv").write_text(kinetics)
    indexed = build_index(list_source(Wanted(str(tmp_path / "kinetics.csv"))), tmp_path / "i")
    assert [indexed.name(i) for i in range(len(indexed))] == ["b.wav@0-1"]
    assert "begins at 5 s and the file ends at 1 s" in indexed.problems["b.wav@5-9"]


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("in_list", ["NFC", "NFD"])
@pytest.mark.parametrize("suffix", ["", ".mp4"])
def test_a_manifest_finds_files_however_accents_are_composed(
    media, tmp_path, on_disk, in_list, suffix
):
    names = ["é", "Ünï/été", "plain", "Ünï/ascii"]
    for name in names:
        path = tmp_path / unicodedata.normalize(on_disk, f"{name}.mp4")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(media["0.mp4"])
    lines = [unicodedata.normalize(in_list, f"{name}{suffix}") for name in [*names, "naïf"]]
    (tmp_path / "list.csv").write_text("\n".join(["path", *lines]), encoding="utf-8")
    source = open_source(tmp_path / "list.csv")
    found = [source.name(i) for i in range(len(source))]
    assert sorted(found) == sorted(unicodedata.normalize(on_disk, f"{n}.mp4") for n in names)
    assert list(source.problems) == lines[-1:]
    assert all(os.path.isfile(source.place(i).path) for i in range(len(source)))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_manifest_of_webvid(media, tmp_path, suffix):
    """Its "name" is the caption; videos lie where its downloader writes them."""
    header = ("videoid", "contentUrl", "duration", "page_dir", "name")
    rows = [
        (1234, "https://x/1234.mp4", "PT00H00M10S", "000001_000050", "A red car, driving by"),
        (99, "https://x/99.mp4", "PT00H00M09S", "000051_000100", "Rain"),
        (7, "https://x/7.mp4", "PT00H00M09S", "000051_000100", "Gone"),
    ]
    for number, folder in ((1234, "000001_000050"), (99, "000051_000100")):
        (tmp_path / "videos" / folder).mkdir(parents=True)
        (tmp_path / "videos" / folder / f"{number}.mp4").write_bytes(media["0.mp4"])
    path = tmp_path / f"results_2M_val{suffix}"
    if suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = dict(zip(header, zip(*rows, strict=True), strict=True))
        parquet.write_table(pyarrow.table(columns), path)
    (tmp_path / "mix.toml").write_text(f'[[source]]\npath = "{path.name}"\nmedia = "videos"\n')
    source = open_source(tmp_path / "mix.toml")
    names = [source.name(i) for i in range(len(source))]
    assert names == ["000001_000050/1234.mp4", "000051_000100/99.mp4"]
    assert texts_of(source) == [["A red car, driving by"], ["Rain"]]
    assert source.segment(0) == (0.0, math.inf)
    assert list(source.problems) == ["000051_000100/7.mp4"]


def test_a_manifest_in_another_encoding(tmp_path):
    (tmp_path / "list.csv").write_bytes("path,text\na.mp4,café\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"list\.csv line 2 is not UTF-8 \(byte 0xe9\)"):
        open_source(tmp_path / "list.csv")


def test_parquet_that_is_none(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "list.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"list\.parquet cannot be read as Parquet"):
        open_source(tmp_path / "list.parquet")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no source is named"),
        ("nowhere", "nowhere is no folder, and there is no such file"),
        ("a,,b", "an empty name between commas"),
        (
            "nowhere/{1..3}.tar",
            r"nowhere/1\.tar, nowhere/2\.tar, nowhere/3\.tar of .* are not there",
        ),
        ("{3..1}.tar", "counts down from 3 to 1"),
        ("{x}.tar", "braces around 'x'"),
        ("list.csv", r"list\.csv is no file"),
        ("nowhere/**", "nowhere is no folder"),
        ("mix.toml", "is no file"),
    ],
)
def test_words_that_name_nothing(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_source(text)


def test_braces():
    assert expand_braces("a{08..10}{x,y}.tar") == [
        f"a{n}{c}.tar" for n in ("08", "09", "10") for c in "xy"
    ]
    assert expand_braces("{8..10}") == ["8", "9", "10"]


def test_scripts_without_spaces_are_said(media, tmp_path):
    folder = as_folder({"0.mp4": media["0.mp4"]}, tmp_path / "clips")
    (folder / "captions.json").write_text(
        json.dumps({"0.mp4": entries([(0, 1, "我爱北京"), (0, 1, "a dog")])})
    )
    with pytest.warns(UserWarning, match="1 of the 2 captions .* no spaces between words"):
        open_source(folder)


# -- several ---------------------------------------------------------------------------------------


def test_words_with_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("a,b:0.3") == [Wanted("a"), Wanted("b", 0.3)]
    assert parse("x/{0,1}.tar:2") == [Wanted("x/{0,1}.tar", 2.0)]
    assert parse("memory://a/{0..1}.tar:2,b:1e-1")[0] == Wanted("memory://a/{0..1}.tar", 2.0)
    (tmp_path / "odd,name:0.5").mkdir()
    assert parse("odd,name:0.5") == [Wanted("odd,name:0.5")]
    with pytest.raises(ValueError, match=r"has the weight '1\.2\.3'"):
        parse("a:1.2.3")


def test_a_mix(media, tmp_path):
    clips = as_folder({name: media[name] for name in ("0.mp4", "1.mp4")}, tmp_path / "clips")
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    (sounds / "sound.wav").write_bytes(media["sound.wav"])
    words = tmp_path / "vids.json"
    words.write_text(json.dumps({"sound": {"start": [0], "end": [1], "text": ["ding"]}}))
    (tmp_path / "mix.toml").write_text(
        '[[source]]\npath = "clips"\nweight = 3\n'
        '[[source]]\npath = "sounds"\nweight = 1\ncaptions = "vids.json"\n'
    )
    mixed = open_source(tmp_path / "mix.toml")
    assert isinstance(mixed, MixedSource) and isinstance(mixed, Source)
    assert mixed.weights.tolist() == [0.75, 0.25] and mixed.starts.tolist() == [0, 2, 3]
    assert [mixed.name(i) for i in range(3)] == [
        f"{clips}/0.mp4",
        f"{clips}/1.mp4",
        f"{sounds}/sound.wav",
    ]
    assert mixed.place(2) == Place(str(sounds / "sound.wav"), "sound.wav")
    assert list(mixed.captions(2).texts) == ["ding"] and mixed.blocks.tolist() == [0, 1, 2, 3]
    vocabulary = vocabulary_from(mixed, 50)
    assert "ding" in vocabulary and "dog" in vocabulary
    encoded = pickle.loads(pickle.dumps(mixed.encode(vocabulary, 3)))
    np.testing.assert_array_equal(encoded(2), vocabulary.encode(["ding"], 3))
    assert mixed.identity.files == 3 and mixed.has == (True, True, True)
    with pytest.raises(IndexError):
        mixed.name(3)
    plain = open_source(f"{clips},{clips}")
    assert plain.weights.tolist() == [0.5, 0.5] and plain.name(2) == f"{clips}#2/0.mp4"


def bad_mixes():
    yield "x = [", "cannot be read as TOML"
    yield "x = 1", r"has no \[\[source\]\]"
    yield "[[source]]\nweight = 1", "source 1 has no path"
    yield '[[source]]\npath = "c"\nfoo = 1', "source 1 has 'foo'; it may have path"
    yield '[[source]]\npath = "c"\nweight = "1"', "source 1 has weight '1'; it is a number"
    yield '[[source]]\npath = "c"\ncaptions = "no.json"', r"no\.json is not there"
    yield '[[source]]\npath = "c"\nweight = 0\n[[source]]\npath = "c"\nweight = 1', "above 0"
    yield '[[source]]\npath = "c"\n[[source]]\npath = "c"\nweight = 1', "has no weight and others"


@pytest.mark.parametrize(("text", "message"), [*bad_mixes()])
def test_bad_mixes(media, tmp_path, text, message):
    as_folder({"0.mp4": media["0.mp4"]}, tmp_path / "c")
    (tmp_path / "mix.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "mix.toml")


# -- remote ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["{00000..00001}.tar", "*.tar"])
def test_remote_shards(media, tmp_path, pattern):
    fsspec = pytest.importorskip("fsspec")
    local = as_tars(media, tmp_path / "shards")
    memory = fsspec.filesystem("memory")
    for path in local.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    text = f"memory://bucket/{pattern}"
    try:
        with pytest.raises(ValueError, match="needs an index, and there is no place for it"):
            open_source(text, say=quiet)
        source = open_source(text, index_folder=tmp_path / "run", say=quiet)
        assert content(source) == expected()
        assert source.place(0).path == "memory://bucket/00000.tar"
        assert open_source(text, index_folder=tmp_path / "run").folder == tmp_path / "run" / "0"
    finally:
        memory.rm("/bucket", recursive=True)


def test_another_clip_stands_in_for_a_remote_one_that_cannot_be_read(media, tmp_path):
    """Whatever the library behind a URL raises, and however it goes."""
    fsspec = pytest.importorskip("fsspec")
    local = as_tars(media, tmp_path / "shards")
    memory = fsspec.filesystem("memory")
    for path in local.iterdir():
        memory.pipe(f"/vanishing/{path.name}", path.read_bytes())
    try:
        text = "memory://vanishing/{00000..00001}.tar"
        source = open_source(text, index_folder=tmp_path / "run", say=quiet)
        memory.rm("/vanishing/00001.tar")
        dataset = ClipDataset(source, SPEC, vocabulary=None, batch_size=2)
        batch = dataset[0]
        assert sorted(batch.files) == ["00000.tar/0.mp4", "00000.tar/1.mp4"]
        assert all("memory://vanishing/00001.tar cannot be opened" in one.reason
                   for one in batch.skipped)  # fmt: skip
        assert {*dataset[0].skipped, *dataset[1].skipped}
        memory.pipe("/vanishing/00000.tar", (local / "00000.tar").read_bytes() + bytes(512))
        with pytest.raises(ValueError, match=r"vanishing/00000\.tar was written anew"):
            dataset[0]
    finally:
        memory.rm("/vanishing", recursive=True)


def test_remote_without_fsspec(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ValueError, match="needs fsspec: pip install fsspec"):
        open_source("s3://bucket/*.tar")


# -- size ------------------------------------------------------------------------------------------


def test_an_open_index_holds_no_captions(tmp_path):
    """Opening, encoding and reading an index take memory that does not grow with it."""
    taken = []
    for count in (500, 5000):
        builder = PartBuilder()
        for number in range(count):
            builder.add(
                f"{number}.mp4",
                "a.tar",
                file_bytes=1,
                file_time=0,
                offset=number + 1,
                size=1,
                captions=[Caption(i, i + 1, "so now we stir the soup") for i in range(20)],
            )
        folder = tmp_path / str(count)
        columns = folder / "columns"
        columns.mkdir(parents=True)
        index_module.join([builder.finish()], index_module.to_files(columns))
        written = index_module.map_files(columns)
        del builder
        about = {
            "format": index_file.FORMAT,
            "version": 1,
            "label": "x",
            "root": "/",
            "columns": "columns",
            "left_out": 0,
            "without_spaces": 0,
            "identity": {"files": count, "bytes": 1, "digest": "", "captions": ""},
            "stamps": [],
        }
        (folder / "index.json").write_text(json.dumps(about))
        del written
        tracemalloc.start()
        source = open_index(folder)
        rows = source.encode(vocabulary_from(source, 100), 8)
        for number in range(0, count, count // 50):
            assert rows(number).shape == (20, 8) and source.name(number) == f"{number}.mp4"
        taken.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(pickle.dumps(rows)) < 1000
    assert taken[1] < taken[0] + 20_000 < 400_000


def test_strings():
    builder = PartBuilder()
    names = ["a", "é\udcff", "", "雪"]
    for name in names:
        builder.add(name, "f", file_bytes=1, file_time=0)
    strings = Strings.of(in_memory([builder.finish(), builder.finish()]), "name")
    assert list(strings) == names * 2 and strings[-1] == "雪" and list(strings[3:5]) == ["雪", "a"]
    with pytest.raises(IndexError):
        strings[8]


# -- the command -----------------------------------------------------------------------------------


def test_the_command(media, tmp_path, capsys):
    folder = as_tars({**media}, tmp_path / "shards")
    write_tar(folder / "bad.tar", [("bad.mp4", b"x" * 600)])
    main(["index", str(folder), "--workers", "2"])
    told = capsys.readouterr().out
    assert told.startswith(f"{folder}/vatt_index: 4 clips in 2 files")
    assert "3 with video, 3 with sound, 3 with captions (4 of 9 words); 1 left out" in told
    assert "bad.tar/bad.mp4: bad.tar/bad.mp4 cannot be decoded" in told
    main(["index", str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)[f"{folder}/vatt_index"]["captions"] == 4
    for arguments, message in (
        ([], "name a source"),
        ([str(folder), str(folder), "--out", "x"], "has room for one index"),
        (["memory://b/0.tar"], "FileNotFoundError|name a folder for its index|not there"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["index", *arguments])
        assert caught.value.code == 2
        assert re.search(message, capsys.readouterr().err)
