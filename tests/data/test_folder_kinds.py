"""Folders as people have them: odd names, files that vanish or hide something, bad batches."""

import json
import os
import struct
import unicodedata

import numpy as np
import pytest

pytest.importorskip("av")

from media_files import noise, numbered
from tried import tried

from vatt_fast.data import cache as cache_module
from vatt_fast.data.clips import ClipSpec
from vatt_fast.data.dataset import ClipDataset, ClipFolder
from vatt_fast.data.folder import folder_captions
from vatt_fast.data.loader import evaluation_clips, loader
from vatt_fast.data.media import MediaError
from vatt_fast.data.media_writer import write_clip
from vatt_fast.data.text import Vocabulary

SPEC = ClipSpec(8, 64, 64, 10.0, 12800, 16000, 6, 2)
NAMES = "names"
GONE = "files that vanish or may not be read"
BATCHES = "what a batch holds"
VOCABULARY = Vocabulary(["<pad>", "<unk>", "dog"])


def make(folder, count, seconds=2.0):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        write_clip(
            folder / f"{number}.mp4",
            numbered(round(seconds * 10)),
            noise(seconds, 16000, seed=number),
        )
    return folder


def clips(folder, **options):
    return ClipDataset(folder, SPEC, **{"vocabulary": None, "batch_size": 3, **options})


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return make(tmp_path_factory.mktemp("three") / "clips", 3)


def copied(folder, tmp_path):
    target = tmp_path / "clips"
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@tried(NAMES, "accents composed in two ways in captions.json and on disk", "they match")
@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_forms_of_names(three, tmp_path, on_disk):
    folder = copied(three, tmp_path)
    (folder / "talks é").mkdir()
    names = ["café.mp4", "talks é/Ünï.mp4"]
    for name in names:
        path = folder / unicodedata.normalize(on_disk, name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((three / "0.mp4").read_bytes())
    other = {"NFC": "NFD", "NFD": "NFC"}[on_disk]
    entry = [{"start": 0, "end": 1, "text": "dog"}]
    said = {unicodedata.normalize(other, name): entry for name in names}
    (folder / "captions.json").write_text(json.dumps(said))
    batch = clips(folder, vocabulary=VOCABULARY, batch_size=5)[0]
    assert not batch.skipped
    with_text = {f for f, valid in zip(batch.files, batch.text_valid, strict=True) if valid.any()}
    assert {unicodedata.normalize("NFC", name) for name in with_text} == set(names)


@tried(NAMES, "one file named twice in captions.json, in two forms", "ValueError")
def test_one_file_in_two_forms(three, tmp_path):
    folder = copied(three, tmp_path)
    (folder / "caf\u00e9.mp4").write_bytes((three / "0.mp4").read_bytes())
    (folder / "captions.json").write_text(json.dumps({"caf\u00e9.mp4": [], "cafe\u0301.mp4": []}))
    with pytest.raises(ValueError, match=r"twice, its letters composed in two ways"):
        folder_captions(folder)


@tried(NAMES, "bytes that are not UTF-8, on disk and in captions.json; with a cache", "read")
@pytest.mark.parametrize("cached", [False, True])
def test_names_that_are_not_utf8(three, tmp_path, cached):
    folder = copied(three, tmp_path)
    os.replace(folder / "1.mp4", os.fsencode(folder) + b"/caf\xe9.mp4")
    name = os.fsdecode(b"caf\xe9.mp4")
    (folder / "captions.json").write_text(
        json.dumps({name: [{"start": 0, "end": 1, "text": "dog"}]})
    )
    cache = tmp_path / "cache" if cached else None
    batch = clips(folder, vocabulary=VOCABULARY, cache_dir=cache)[0]
    assert set(batch.files) == {"0.mp4", "2.mp4", name} and not batch.skipped
    assert batch.text_valid[batch.files.index(name)].any()


@tried(NAMES, "a name with a zero byte, or of 5000 letters, in captions.json", "ValueError")
@pytest.mark.parametrize("name", ["a\0.mp4", "a" * 5000 + ".mp4", "../0.mp4", "/0.mp4"])
def test_impossible_names(three, tmp_path, name):
    folder = copied(three, tmp_path)
    (folder / "captions.json").write_text(json.dumps({name: []}))
    with pytest.raises(ValueError, match=r"captions\.json"):
        folder_captions(folder)


@tried(GONE, "a file removed after the start; a folder, a broken link named .mp4", "listed")
@pytest.mark.parametrize("how", ["removed", "folder", "link"])
@pytest.mark.parametrize("cached", [False, True])
def test_vanished_files(three, tmp_path, how, cached):
    folder = copied(three, tmp_path)
    if how == "folder":
        (folder / "1.mp4").unlink()
        (folder / "1.mp4").mkdir()
    elif how == "link":
        (folder / "1.mp4").unlink()
        (folder / "1.mp4").symlink_to(tmp_path / "nowhere.mp4")
    dataset = clips(folder, cache_dir=tmp_path / "cache" if cached else None)
    if how == "removed":
        (folder / "1.mp4").unlink()
    batch = dataset[0]
    # what is no file is left out from the start
    assert len(batch) == 3
    assert [one.file for one in batch.skipped] == (["1.mp4"] if how == "removed" else [])
    assert list(dataset.skipped) == ["1.mp4"] and "1.mp4" in dataset.skipped["1.mp4"]
    (read,) = evaluation_clips(three, SPEC, vocabulary=None)
    assert read.files == ("0.mp4", "1.mp4", "2.mp4")


@tried(GONE, "a file without the right to read it", "listed")
def test_a_file_that_may_not_be_read(three, tmp_path, monkeypatch):
    folder = copied(three, tmp_path)
    original = open

    def refusing(path, *arguments, **options):
        if str(path).endswith("1.mp4"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refusing)  # root may read everything
    batch = clips(folder)[0]
    assert [one.file for one in batch.skipped] == ["1.mp4"]
    assert "Permission denied" in batch.skipped[0].reason


@tried(GONE, "the cache's disk is full", "OSError: no file is blamed")
def test_a_full_disk_is_no_bad_file(three, tmp_path, monkeypatch):
    dataset = clips(three, cache_dir=tmp_path / "cache")

    def full(self, entry, path):
        raise OSError(28, "No space left on device", os.fspath(entry))

    monkeypatch.setattr(cache_module.ClipCache, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        dataset[0]


def nan_wav(path):
    data = np.full(32000, np.nan, "<f4").tobytes()
    form = struct.pack("<IHHIIHH", 16, 3, 1, 16000, 64000, 4, 32)
    head = b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + form
    path.write_bytes(head + b"data" + struct.pack("<I", len(data)) + data)


@tried(BATCHES, "a WAV of nan among three clips", "listed; every value of the batch is finite")
@pytest.mark.parametrize("cached", [False, True])
def test_nothing_in_a_batch_is_not_finite(three, tmp_path, cached):
    folder = copied(three, tmp_path)
    nan_wav(folder / "bad.wav")
    dataset = clips(folder, batch_size=4, cache_dir=tmp_path / "cache" if cached else None)
    batch = dataset[0]
    assert [one.file for one in batch.skipped] == ["bad.wav"]
    assert batch.audio.isfinite().all() and len(batch) == 4


@tried(BATCHES, "3 s of picture with 10 s of sound", "valid where a picture is, nowhere else")
@pytest.mark.parametrize("cached", [False, True])
def test_valid_says_what_was_decoded(tmp_path, cached):
    folder = tmp_path / "clips"
    folder.mkdir()
    write_clip(folder / "a.mp4", np.full((30, 64, 64, 3), 200, np.uint8), noise(10.0, 16000))
    cache = tmp_path / "cache" if cached else None
    batch = clips(folder, batch_size=30, cache_dir=cache)[0]
    lit = batch.video.flatten(1).amax(1) > 20
    assert batch.video_valid.tolist() == lit.tolist() and 0 < lit.sum() < 30
    assert batch.audio_valid.all()
    (late,) = evaluation_clips(folder, SPEC, vocabulary=None, start=99.0, cache_dir=cache)
    assert not late.video_valid.any() and not late.audio_valid.any()


@tried(BATCHES, "3 of 12 files corrupt, batches of 6 or of 4 on two ranks", "no clip twice")
@pytest.mark.parametrize(("world", "size"), [(1, 6), (2, 4)])
def test_stand_ins_are_not_in_the_batch(tmp_path, monkeypatch, world, size):
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.mp4").write_bytes(b"")

    def read_into(self, batch, rows, index, choose, write=None):
        if index in (2, 5, 7):
            raise MediaError("corrupt")

    monkeypatch.setattr(ClipFolder, "read_into", read_into)
    ranks = [clips(folder, batch_size=size // world, rank=r, world=world) for r in range(world)]
    for step in range(60):
        files = [name for rank in ranks for name in rank[step].files]
        assert len(set(files)) == size, (step, files)


@tried("suffixes", ".wmv, .flv, .GIF beside .mp4", "a warning that counts what is left out")
def test_media_of_other_suffixes(three, tmp_path):
    folder = copied(three, tmp_path)
    for name in ("a.wmv", "b.wmv", "c.GIF", "notes.txt"):
        (folder / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"not read \(1 \.gif, 2 \.wmv\); convert them"):
        clips(folder)


@tried("workers", "an error in a worker", "the one line it is, of its own type")
def test_a_workers_error_is_one_line(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"no")
    with pytest.raises(MediaError, match="none of the 2 files") as error:
        list(loader(clips(tmp_path, batch_size=2), 0, 2, workers=1))
    assert "\n" not in str(error.value) and "Caught" not in str(error.value)


@tried("workers", "a cache that fails in a worker", "the OSError it is")
def test_a_workers_os_error(three, tmp_path, monkeypatch):
    def full(self, entry, path):
        raise OSError(28, "No space left on device", os.fspath(entry))

    monkeypatch.setattr(cache_module.ClipCache, "_write", full)
    with pytest.raises(OSError, match="No space left") as error:
        list(loader(clips(three, cache_dir=tmp_path / "cache"), 0, 2, workers=1))
    assert error.value.errno == 28
