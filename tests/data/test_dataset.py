"""Batches are a pure function of seed, step, rank and world.

What a file lacks or hides is said, never guessed.
"""

import dataclasses
import functools
import json
import os

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from vatt_fast.config import PRESETS
from vatt_fast.data import cache as cache_module
from vatt_fast.data import dataset as dataset_module
from vatt_fast.data.clips import Batch, ClipSpec, DropToken
from vatt_fast.data.dataset import ClipDataset, ClipFolder
from vatt_fast.data.folder import folder_captions
from vatt_fast.data.loader import evaluation_clips, loader
from vatt_fast.data.media import MediaError
from vatt_fast.data.media_writer import write_clip
from vatt_fast.data.text import Vocabulary
from vatt_fast.kernels import patchify, sample_keep

SPEC = ClipSpec(
    frames=4,
    height=16,
    width=16,
    frames_per_second=10.0,
    samples=3200,
    sample_rate_hz=8000,
    words=6,
    texts_per_clip=3,
)
COUNT = 10
OTHERS = ("files", "skipped", "video_keep", "audio_keep")
TENSORS = [field.name for field in dataclasses.fields(Batch) if field.name not in OTHERS]


def make_folder(folder, count=COUNT, frames=12):
    """Clip i: grey level 20 * i + 2 * frame, a tone of amplitude 0.05 * (i + 1).

    Captions name i at every tenth of a second.
    """
    folder.mkdir(exist_ok=True)
    captions = {}
    for i in range(count):
        grey = (20 * i + 2 * np.arange(frames)).astype(np.uint8)
        video = np.broadcast_to(grey[:, None, None, None], (frames, 16, 16, 3))
        audio = (
            0.05
            * (i + 1)
            * np.sin(2 * np.pi * 500 * np.arange(frames * 800) / 8000).astype(np.float32)
        )
        write_clip(folder / f"clip_{i}.mp4", video, audio, sample_rate_hz=8000)
        captions[f"clip_{i}.mp4"] = [
            {"start": t / 10, "end": t / 10 + 0.05, "text": f"clip number{i} at{t}"}
            for t in range(12)
        ]
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("clips") / "media")


@pytest.fixture(scope="module")
def vocabulary(folder):
    return Vocabulary.build(
        caption.text for captions in folder_captions(folder).values() for caption in captions
    )


@pytest.fixture
def make(folder, vocabulary):
    return lambda **options: ClipDataset(
        folder, SPEC, **{"vocabulary": vocabulary, "batch_size": 4, **options}
    )


def same(one, other, tensors=TENSORS):
    return one.files == other.files and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in tensors
    )


def test_spec_reads_the_config():
    spec = ClipSpec.from_config(PRESETS["tiny"])
    assert (spec.frames, spec.samples, spec.words, spec.texts_per_clip) == (16, 25600, 16, 5)
    assert spec.seconds == pytest.approx(1.6)


def test_shapes_types_and_contents(make, vocabulary):
    batch = make()[0]
    assert len(batch) == 4 and batch.skipped == ()
    assert batch.video.shape == (4, 4, 16, 16, 3) and batch.video.dtype == torch.uint8
    assert batch.audio.shape == (4, 3200) and batch.audio.dtype == torch.float32
    assert batch.text.shape == (4, 3, 6) and batch.text.dtype == torch.int32
    for mask, shape in (
        (batch.video_valid, (4,)),
        (batch.audio_valid, (4,)),
        (batch.text_valid, (4, 3)),
    ):
        assert mask.shape == shape and mask.dtype == torch.bool and mask.all()
    for row, name in enumerate(batch.files):
        number = int(name[5])
        first = round(batch.start_seconds[row].item() * 10)
        expected = 20 * number + 2 * (first + np.arange(4))
        assert np.abs(batch.video[row].float().mean((1, 2, 3)).numpy() - expected).max() < 3
        assert batch.audio[row].abs().max() == pytest.approx(0.05 * (number + 1), rel=0.3)
        # the window's middle lies between two sentences' places; the nearest are the ones around
        times = {int(vocabulary.decode(text.tolist()).split("at")[1]) for text in batch.text[row]}
        assert times <= {first, first + 1, first + 2, first + 3}
        assert all(
            f"number{number} " in vocabulary.decode(text.tolist()) for text in batch.text[row]
        )


def test_to_moves_tensors_and_keeps_the_rest(make):
    batch = make()[0]
    moved = batch.to("meta")
    assert (
        moved.video.device.type == "meta"
        and moved.text_valid.device.type == "meta"
        and moved.files == batch.files
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.files = ()


def test_an_epoch_visits_every_file_once_in_a_new_order(make):
    dataset = make(batch_size=5)
    assert dataset.steps_per_epoch == 2
    epochs = [
        [name for step in (2 * epoch, 2 * epoch + 1) for name in dataset[step].files]
        for epoch in range(3)
    ]
    assert all(sorted(names) == sorted(dataset.files) for names in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    # 10 files, batches of 4: two steps an epoch, two files sit out
    assert not set(make()[0].files) & set(make()[1].files)


def test_windows_begin_everywhere_on_the_grid(make):
    dataset = make()
    starts = np.concatenate([dataset[step].start_seconds.numpy() for step in range(40)])
    # 12 frames, windows of 4
    assert sorted({round(start * 10, 6) for start in starts}) == list(range(9))


def test_same_arguments_same_batch(make):
    assert same(make()[7], make()[7])
    assert not same(make()[7], make(seed=1)[7])
    dataset = make()
    later = [dataset[step] for step in (9, 3, 7)]
    assert same(later[2], make()[7])


def test_stream_of_random_numbers_is_pinned(make):
    """A run must resume with another NumPy or on another machine: the keyed generators' numbers."""
    batch = make()[0]
    assert batch.files == ("clip_2.mp4", "clip_7.mp4", "clip_9.mp4", "clip_1.mp4")
    assert [round(start * 10) for start in batch.start_seconds.tolist()] == [5, 4, 3, 2]


def test_a_smaller_folder_than_the_batch_repeats(make):
    batch = make(batch_size=24)[1]
    counts = [batch.files.count(name) for name in make().files]
    assert min(counts) >= 2 and sum(counts) == 24


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_one_batch(make, world):
    for step in (0, 5):
        whole = make(batch_size=8)[step]
        parts = [make(batch_size=8 // world, rank=rank, world=world)[step] for rank in range(world)]
        assert tuple(name for part in parts for name in part.files) == whole.files
        for name in TENSORS:
            assert torch.equal(
                torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)
            )


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(make, workers):
    expected = [make()[step] for step in range(3, 10)]
    batches = [batch.clone() for batch in loader(make(), 3, 10, workers)]
    assert len(batches) == 7 and all(
        same(one, other) for one, other in zip(batches, expected, strict=True)
    )


def test_cache_gives_the_same_clips_and_decodes_once(make, tmp_path, monkeypatch):
    plain, cached = make(), make(cache_dir=tmp_path / "cache")
    for step in range(6):
        one, other = cached[step], plain[step]
        assert same(one, other, [name for name in TENSORS if name != "audio"])
        torch.testing.assert_close(one.audio, other.audio, rtol=0, atol=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == COUNT
    monkeypatch.setattr(dataset_module, "reader_class", lambda decoder: None)
    monkeypatch.setattr(cache_module, "MediaReader", None)
    assert same(make(cache_dir=tmp_path / "cache")[5], cached[5])


def test_cache_is_shared_renewed_and_repaired(tmp_path, vocabulary):
    media, cache = make_folder(tmp_path / "media", count=3), tmp_path / "cache"
    options = dict(vocabulary=vocabulary, batch_size=3, cache_dir=cache)
    make = functools.partial(ClipDataset, media, SPEC, **options)
    # two processes fill it at once
    batches = [batch.clone() for batch in loader(make(), 0, 6, workers=2)]
    assert len(list(cache.glob("*.clip"))) == 3 and not list(cache.glob(".*"))
    # an entry cut short is made anew
    for entry in cache.glob("*.clip"):
        entry.write_bytes(entry.read_bytes()[:-1000])
    assert same(make()[0], batches[0])
    # a file that changes is decoded anew
    write_clip(media / "clip_0.mp4", np.full((12, 16, 16, 3), 250, np.uint8), None)
    os.utime(media / "clip_0.mp4", ns=(1, 1))
    batch = make()[0]
    row = batch.files.index("clip_0.mp4")
    assert batch.video[row].float().mean() > 240 and not batch.audio_valid[row]
    # other sizes are other entries
    small = dataclasses.replace(SPEC, height=8, width=8)
    assert ClipDataset(media, small, vocabulary=vocabulary, batch_size=3, cache_dir=cache)[
        0
    ].video.shape == (3, 4, 8, 8, 3)


@pytest.fixture
def mixed(tmp_path):
    """A silent clip, a sound, a picture, a short clip.

    One has no captions, one captions that are not words.
    """
    av = pytest.importorskip("av")
    folder = make_folder(tmp_path / "mixed", count=2)
    grey = np.full((12, 16, 16, 3), 100, np.uint8)
    tone = (0.5 * np.sin(np.arange(9600))).astype(np.float32)
    write_clip(folder / "silent.mp4", grey, None)
    write_clip(folder / "sound.wav", None, tone, sample_rate_hz=8000)
    write_clip(folder / "short.mp4", grey[:2], tone[:1600], sample_rate_hz=8000)
    av.VideoFrame.from_ndarray(grey[0], format="rgb24").to_image().save(folder / "picture.png")
    captions = json.loads((folder / "captions.json").read_text())
    captions["silent.mp4"] = [
        {"start": 0, "end": 1, "text": "..."},
        {"start": 0, "end": 2, "text": "clip"},
    ]
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


@pytest.mark.parametrize("cached", [False, True])
def test_missing_modalities_are_masks(mixed, vocabulary, tmp_path, cached):
    dataset = ClipDataset(
        mixed,
        SPEC,
        vocabulary=vocabulary,
        batch_size=6,
        cache_dir=tmp_path / "cache" if cached else None,
    )
    batch = dataset[0]
    rows = {name: row for row, name in enumerate(batch.files)}
    valid = {
        name: (
            bool(batch.video_valid[row]),
            bool(batch.audio_valid[row]),
            batch.text_valid[row].tolist(),
        )
        for name, row in rows.items()
    }
    none = [False] * 3
    assert valid["clip_0.mp4"] == (True, True, [True] * 3)
    assert valid["silent.mp4"] == (True, False, [False, True, False])
    assert valid["sound.wav"] == (False, True, none)
    assert valid["short.mp4"] == (True, True, none)
    assert valid["picture.png"] == (True, False, none)
    assert not batch.video[rows["sound.wav"]].any() and not batch.audio[rows["silent.mp4"]].any()
    short, picture = (
        batch.video[rows["short.mp4"]].float(),
        batch.video[rows["picture.png"]].float(),
    )
    assert short[:2].mean() == pytest.approx(100, abs=3) and not short[2:].any()
    assert picture.mean() == pytest.approx(100, abs=3) and torch.equal(picture[0], picture[3])
    assert (
        not batch.audio[rows["short.mp4"], 1600:].any()
        and batch.audio[rows["short.mp4"], :1600].any()
    )


def test_without_vocabulary_there_is_no_text(folder):
    batch = ClipDataset(folder, SPEC, vocabulary=None, batch_size=2)[0]
    assert not batch.text.any() and not batch.text_valid.any() and batch.video_valid.all()


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_files_are_replaced_and_listed(tmp_path, vocabulary, workers):
    folder = make_folder(tmp_path / "media", count=8)
    for name in ("clip_3.mp4", "clip_5.mp4"):
        (folder / name).write_bytes(b"nothing that decodes")
    dataset = ClipDataset(folder, SPEC, vocabulary=vocabulary, batch_size=4)
    batches = [batch.clone() for batch in loader(dataset, 0, 4, workers)]
    again = ClipDataset(folder, SPEC, vocabulary=vocabulary, batch_size=4)
    assert sorted(dataset.skipped) == ["clip_3.mp4", "clip_5.mp4"]
    assert "clip_3.mp4 cannot be decoded" in dataset.skipped["clip_3.mp4"]
    for step, batch in enumerate(batches):
        assert len(batch) == 4 and batch.video_valid.all()
        assert not {"clip_3.mp4", "clip_5.mp4"} & set(batch.files)
        assert same(batch, again[step]) and batch.skipped == again[step].skipped
    for epoch in (0, 2):  # each epoch's two batches meet both
        listed = {one.file for batch in batches[epoch : epoch + 2] for one in batch.skipped}
        assert listed == {"clip_3.mp4", "clip_5.mp4"}
    assert len(set(batches[0].files)) == 4


def test_nothing_but_corrupt_files(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no")
    (tmp_path / "b.mp4").write_bytes(b"")
    with pytest.raises(MediaError, match=r"none of the 2 files.*can be decoded"):
        ClipDataset(tmp_path, SPEC, vocabulary=None, batch_size=2)[0]
    with (
        pytest.raises(MediaError, match="none of the 2 files"),
        pytest.warns(UserWarning, match=r"a\.mp4, b\.mp4"),
    ):
        list(evaluation_clips(tmp_path, SPEC, vocabulary=None))


def test_shuffled_captions_are_another_clips_for_good(make, vocabulary):
    giver = {}
    dataset = make(shuffle_captions=True)
    for step in range(12):
        batch, plain = dataset[step], make()[step]
        assert same(batch, plain, ["video", "audio", "start_seconds"])
        for name, texts in zip(batch.files, batch.text, strict=True):
            (said,) = {vocabulary.decode(text.tolist()).split()[1] for text in texts}
            assert giver.setdefault(name, said) == said
    assert len(giver) == COUNT and sorted(giver.values()) == [f"number{i}" for i in range(COUNT)]
    assert all(said != f"number{name[5]}" for name, said in giver.items())
    other = make(shuffle_captions=True, seed=1)
    givers = [[one.clips.captions_from(i) for i in range(COUNT)] for one in (dataset, other)]
    assert givers[0] != givers[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_visits_every_file_once_in_order(folder, vocabulary, workers):
    batches = list(
        evaluation_clips(folder, SPEC, vocabulary=vocabulary, batch_size=4, workers=workers)
    )
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert [name for batch in batches for name in batch.files] == [
        f"clip_{i}.mp4" for i in range(COUNT)
    ]
    assert batches[2].video.shape == (2, 4, 16, 16, 3) and batches[2].text_valid.all()
    # 12 frames: 0.4 to 0.8 is the middle
    assert {start for batch in batches for start in batch.start_seconds.tolist()} == {0.4}


def test_evaluation_windows_and_skips(tmp_path, vocabulary):
    folder = make_folder(tmp_path / "media", count=5)
    (folder / "clip_1.mp4").write_bytes(b"no")
    first = list(
        evaluation_clips(
            folder,
            SPEC,
            vocabulary=vocabulary,
            batch_size=3,
            place=0.0,
            cache_dir=tmp_path / "cache",
        )
    )
    assert [batch.files for batch in first] == [
        ("clip_0.mp4", "clip_2.mp4"),
        ("clip_3.mp4", "clip_4.mp4"),
    ]
    assert [one.file for one in first[0].skipped] == ["clip_1.mp4"] and first[0].video.shape[0] == 2
    starts = [
        next(evaluation_clips(folder, SPEC, vocabulary=None, **where)).start_seconds[0].item()
        for where in ({"place": 1.0}, {"start": 0.3})
    ]
    assert starts == pytest.approx([0.8, 0.3])


def test_media_in_deeper_folders_are_found_by_their_captions(tmp_path):
    make_folder(tmp_path / "talks", count=1)
    (tmp_path / "captions.json").write_text('{"talks/clip_0.mp4": []}')
    assert ClipFolder(tmp_path, SPEC, vocabulary=None).files == ("talks/clip_0.mp4",)


def test_bad_folders(tmp_path, folder):
    with pytest.raises(ValueError, match="is no folder, and there is no such file"):
        ClipFolder(tmp_path / "nowhere", SPEC, vocabulary=None)
    with pytest.raises(ValueError, match=r"has no media files.*put some there"):
        ClipFolder(tmp_path, SPEC, vocabulary=None)
    with pytest.raises(ValueError, match="has the folders media: name one of them"):
        ClipFolder(folder.parent, SPEC, vocabulary=None)
    write_clip(tmp_path / "a.wav", None, np.zeros(100, np.float32))
    for name, message in (
        ("gone.mp4", "captions of 'gone.mp4', which is not in"),
        ("../a.wav", "media lie inside"),
        ("/a.wav", "media lie inside"),
    ):
        (tmp_path / "captions.json").write_text(json.dumps({name: []}))
        with pytest.raises(ValueError, match=message):
            ClipFolder(tmp_path, SPEC, vocabulary=None)
    (tmp_path / "captions.json").write_text('{"a.wav": [{"start": 2, "end": 1, "text": "x"}]}')
    with pytest.raises(ValueError, match="end 1 before start 2"):
        ClipDataset(tmp_path, SPEC, vocabulary=None, batch_size=1)


def test_bad_arguments(make, folder, tmp_path):
    for options, message in (
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"rank": 2, "world": 2}, "rank is 2 of world 2"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    with pytest.raises(ValueError, match="step is -1"):
        make()[-1]
    with pytest.raises(ValueError, match="must be in order"):
        loader(make(), 5, 3)
    with pytest.raises(ValueError, match="place is 2"):
        evaluation_clips(folder, SPEC, vocabulary=None, place=2)
    write_clip(tmp_path / "a.wav", None, np.zeros(100, np.float32))
    with pytest.raises(ValueError, match="shuffle_captions needs"):
        ClipDataset(tmp_path, SPEC, vocabulary=None, batch_size=1, shuffle_captions=True)


# -- batches of kept patch rows --------------------------------------------------------------------


def drop_config(**sizes):
    """SPEC's sizes; in 3 x 7 x 16 patches neither frames nor lines divide, nor do 96 samples."""
    odd = dict(video_patch=(3, 7, 16), audio_patch=96)
    names = [field.name for field in dataclasses.fields(ClipSpec)]
    return dataclasses.replace(
        PRESETS["tiny"], **{name: getattr(SPEC, name) for name in names}, **odd | sizes
    )


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("per", "devices", "rate"),
    [("batch", 1, 0.5), ("clip", 1, 0.5), ("batch", 3, 0.3), ("clip", 2, 0.7), ("batch", 1, 0.0)],
)
def test_rows_are_the_kept_patches_of_the_same_clips(
    mixed, vocabulary, tmp_path, cached, per, devices, rate
):
    """Whatever is missing, odd or cached; each device and clip has the draw that it had."""
    config, rank = drop_config(), 1
    options = dict(
        vocabulary=vocabulary,
        batch_size=6,
        seed=5,
        rank=rank,
        world=2,
        cache_dir=tmp_path / "cache" if cached else None,
    )
    whole = ClipDataset(mixed, SPEC, **options)
    rows = ClipDataset(
        mixed, SPEC, **options, drop_token=DropToken(config, rate, per=per, devices=devices)
    )
    for step in (0, 3):
        one, other = rows[step], whole[step]
        assert same(one, other, [name for name in TENSORS if name not in ("video", "audio")])
        for name, patch in (("video", (3, 7, 16)), ("audio", (96,))):
            patches = patchify(getattr(other, name), patch)
            draws = [
                sample_keep(
                    patches.shape[1],
                    rate,
                    seed=5,
                    step=step,
                    stream=f"{name}/{rank * devices + device}",
                    per=per,
                    batch=6 // devices,
                )
                for device in range(devices)
            ]
            keep = np.concatenate([np.atleast_2d(draw) for draw in draws])
            drawn = getattr(one, f"{name}_keep")
            assert np.array_equal(np.atleast_2d(drawn.numpy()), keep)
            assert drawn.ndim == (1 if per == "batch" and devices == 1 else 2)
            each = np.repeat(keep, 6 // len(keep), 0)
            expected = np.take_along_axis(patches.numpy(), each[..., None], 1)
            assert np.array_equal(getattr(one, name).numpy(), expected), name


def test_rows_and_keeps_travel_through_workers(folder, vocabulary):
    config = drop_config(video_patch=(2, 8, 8), audio_patch=64)
    dataset = ClipDataset(
        folder, SPEC, vocabulary=vocabulary, batch_size=4, drop_token=DropToken(config, 0.5)
    )
    batches = [batch.clone() for batch in loader(dataset, 0, 3, workers=1)]
    for step, batch in enumerate(batches):
        assert batch.video.shape == (4, 4, 384) and batch.audio.shape == (4, 25, 64)
        assert same(batch, dataset[step], [*TENSORS, "video_keep", "audio_keep"])
    moved = batches[0].to("meta")
    assert moved.video_keep.device.type == "meta"
