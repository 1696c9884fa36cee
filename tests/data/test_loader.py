"""Workers share a batch's rows: the same clips however many there are, and dead ones are told."""

import contextlib
import dataclasses
import faulthandler
import gc
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from vatt_fast.config import PRESETS
from vatt_fast.data import dataset as dataset_module
from vatt_fast.data import workers as workers_module
from vatt_fast.data.clips import Batch, ClipSpec, DropToken
from vatt_fast.data.dataset import ClipDataset, ClipFolder
from vatt_fast.data.loader import evaluation_clips, loader
from vatt_fast.data.media import MediaError, MediaReader
from vatt_fast.data.media_writer import write_clip
from vatt_fast.data.source import MixedSource
from vatt_fast.data.sources import open_source
from vatt_fast.data.text import Vocabulary

CONFIG = dataclasses.replace(
    PRESETS["tiny"], frames=4, height=16, width=16, samples=1280, sample_rate_hz=8000, words=6
)
SPEC = ClipSpec.from_config(CONFIG)
VOCABULARY = Vocabulary(["<pad>", "<unk>", "clip", *map(str, range(20))])
TENSORS = [field.name for field in dataclasses.fields(Batch) if field.name not in ("skipped",)]
PATIENCE = 60  # seconds; machines may be busy


def make_folder(folder, count=11):
    folder.mkdir()
    captions = {}
    for number in range(count):
        grey = (10 + 20 * number + 2 * np.arange(12)).astype(np.uint8)
        sound = 0.05 * (number + 1) * np.sin(np.arange(9600) / 3).astype(np.float32)
        video = np.broadcast_to(grey[:, None, None, None], (12, 16, 16, 3))
        write_clip(folder / f"{number:02}.mp4", video, sound, sample_rate_hz=8000)
        captions[f"{number:02}.mp4"] = [{"start": 0, "end": 1, "text": f"clip {number}"}]
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def make_shards(folder, media):
    """11 clips in shards of 4, 4 and 3, as webdataset names them; the fourth is corrupt."""
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for number in range(4 * shard, min(4 * shard + 4, 11)):
                if number == 3:
                    (folder / "bad").write_bytes(b"no video" * 1000)
                    tar.add(folder / "bad", f"{number:09}.mp4")
                else:
                    tar.add(media / f"{number:02}.mp4", f"{number:09}.mp4")
                text = folder / "text"
                text.write_text(f"clip {number}")
                tar.add(text, f"{number:09}.txt")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("media") / "clips")


@pytest.fixture(scope="module")
def sources(folder, tmp_path_factory):
    """The same files as a folder, a manifest of segments, shards, and folder and shards mixed."""
    root = tmp_path_factory.mktemp("sources")
    rows = [
        f"{folder}/{n:02}.mp4,{0.1 * (n % 5)},{0.1 * (n % 5) + 0.6},clip {n}" for n in range(11)
    ]
    manifest = root / "clips.csv"
    manifest.write_text("path,start,end,text\n" + "\n".join(rows) + "\n")
    shards = open_source(str(make_shards(root / "shards", folder)))
    return {
        "folder": open_source(folder),
        "manifest": open_source(manifest),
        "shards": shards,
        "mixed": MixedSource([(open_source(folder), 0.3), (shards, 0.7)]),
    }


def dataset(source, batch_size=4, **options):
    drop = DropToken(CONFIG, 0.5, shards=options.pop("shards", 2))
    return ClipDataset(
        source,
        SPEC,
        **{"vocabulary": VOCABULARY, "batch_size": batch_size, "drop_token": drop, **options},
    )


def each_clip(batch):
    """Every array of a batch clip by clip; a keep that clips share, as every clip's."""
    for name in TENSORS:
        values = getattr(batch, name)
        if name.endswith("keep"):
            values = torch.atleast_2d(values)
            values = values.repeat_interleave(len(batch) // len(values), 0)
        yield name, list(values)


def same(one, parts):
    """Whether the parts of ranks are, in order, a whole batch."""
    found = [dict(each_clip(part)) for part in parts]
    for name, whole in each_clip(one):
        joined = [value for part in found for value in part[name]]
        if name == "files":
            assert whole == joined
        else:
            assert all(torch.equal(a, b) for a, b in zip(whole, joined, strict=True)), name


def read(source, steps, workers, world=1, **options):
    """Batches of all ranks, step by step."""
    ranks = [
        [
            batch.clone()
            for batch in loader(
                dataset(source, 4 // world, rank=rank, world=world, **options), *steps, workers
            )
        ]
        for rank in range(world)
    ]
    return list(zip(*ranks, strict=True))


# -- the same clips --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "manifest", "shards", "mixed"])
def test_any_number_of_workers_and_ranks_gives_the_same_clips(sources, kind):
    source = sources[kind]
    whole = [dataset(source)[step] for step in range(1, 5)]  # past an epoch's end, of 2 steps
    assert len({batch.files for batch in whole}) == 4
    assert all(len(set(batch.files)) == 4 for batch in whole)
    for workers, world in ((1, 1), (4, 1), (0, 2), (2, 4)):
        for one, parts in zip(whole, read(source, (1, 5), workers, world), strict=True):
            same(one, parts)
    if kind == "shards":
        assert [name[-13:] for name in dataset(source).skipped] == ["000000003.mp4"]


def test_windows_lie_within_their_segments(sources):
    source = sources["manifest"]
    begins = {source.name(i): source.segment(i)[0] for i in range(len(source))}
    for step in range(8):
        batch = dataset(source)[step]
        for name, start in zip(batch.files, batch.start_seconds.tolist(), strict=True):
            # 0.6 s hold windows of 0.4 s at 0, 0.1 and 0.2
            assert begins[name] - 1e-6 <= start <= begins[name] + 0.2 + 1e-6


def test_a_run_goes_on_anywhere_in_an_epoch_on_another_number_of_both(sources):
    source = sources["mixed"]
    whole = [batch.clone() for batch in loader(dataset(source), 0, 7)]
    batches = loader(dataset(source), 0, 7, workers=2)
    running = iter(batches)
    for _ in range(3):
        next(running)
    state = json.loads(json.dumps(batches.state_dict()))
    batches.close()
    assert state["step"] == 3
    ranks = [loader(dataset(source, 2, rank=rank, world=2), 0, 7, rank) for rank in range(2)]
    for one in ranks:
        one.load_state_dict(state)
    parts = [[batch.clone() for batch in one] for one in ranks]
    assert len(parts[0]) == len(parts[1]) == 4
    for one, *both in zip(whole[3:], *parts, strict=True):
        same(one, both)
    assert [batch.files for batch in ranks[0]] != []  # and from the start again
    assert ranks[0].state_dict()["step"] == 7


def test_a_state_of_something_else_is_refused(sources):
    state = loader(dataset(sources["folder"]), 0, 4).state_dict()
    for options, told in (
        (dict(seed=1), "has seed 0, and this one 1"),
        (dict(batch_size=2), "has batch 4, and this one 2"),
        (dict(windows_per_decode=2), "has windows_per_decode 1"),
    ):
        with pytest.raises(ValueError, match=told):
            loader(dataset(sources["folder"], **options), 0, 4).load_state_dict(state)
    with pytest.raises(ValueError, match="state is at step 9; this one has 0 up to 4"):
        loader(dataset(sources["folder"]), 0, 4).load_state_dict(state | {"step": 9})


def test_a_state_of_other_data_is_refused_and_of_the_same_elsewhere_is_not(
    sources, folder, tmp_path
):
    clips = loader(dataset(sources["folder"]), 0, 4)
    state = json.loads(json.dumps(clips.state_dict() | {"step": 2}))
    renamed, packed = tmp_path / "renamed", tmp_path / "packed"
    renamed.mkdir()
    packed.mkdir()
    for number, path in enumerate(sorted(folder.glob("*.mp4"))):
        shutil.copy(path, renamed / f"1{path.name}")
        with tarfile.open(packed / f"{number // 4}.tar", "a") as tar:
            tar.add(path, path.name)
    with pytest.raises(ValueError, match=r"has data '\w+', and this one '\w+'; the same step"):
        loader(dataset(open_source(renamed)), 0, 4).load_state_dict(state)
    tars = open_source(packed)
    for source in (open_source(f"{folder}/**"), tars, pickle.loads(pickle.dumps(tars))):
        batches = loader(dataset(source, vocabulary=None), 0, 4)
        batches.load_state_dict(state)
        assert len([*batches]) == 2
    older = {name: value for name, value in state.items() if name not in ("data", "weights")}
    clips.load_state_dict(older)


def test_a_state_of_other_weights_is_refused(sources):
    def mixed(*weights):
        parts = zip((sources["folder"], sources["shards"]), weights, strict=True)
        return loader(dataset(MixedSource([*parts])), 0, 4)

    state = json.loads(json.dumps(mixed(0.3, 0.7).state_dict()))
    mixed(3, 7).load_state_dict(state)
    with pytest.raises(ValueError, match=r"has weights '0\.3 0\.7', and this one '0\.5 0\.5'"):
        mixed(1, 1).load_state_dict(state)


def test_sources_without_sound_or_words_stand_beside_others(folder, tmp_path, monkeypatch):
    """What a source lacks is not looked for; one that is corrupt is replaced by one of its own."""
    silent = tmp_path / "silent"
    silent.mkdir()
    for number in range(5):
        grey = np.full((12, 16, 16, 3), 100 + number, np.uint8)
        write_clip(silent / f"{number}.mp4", grey, None)
    (silent / "2.mp4").write_bytes(b"no")
    asked = []
    original = MediaReader.clips

    def clips(self, starts, only=None, **options):
        asked.append((os.path.basename(self.name), only))
        return original(self, starts, only=only, **options)

    monkeypatch.setattr(MediaReader, "clips", clips)
    mixed = MixedSource([(open_source(folder), 0.5), (open_source(silent), 0.5)])
    silent_has = mixed.sources[1].has
    for step in range(4):
        batch = dataset(mixed)[step]
        own = [name.split("/")[-2] == "silent" for name in batch.files]
        assert sum(own) == 2 and not any("/2.mp4" in name for name in batch.files)
        assert batch.audio_valid.tolist() == [not one for one in own]
        assert batch.text_valid.any(1).tolist() == [not one for one in own]
    expected = None if silent_has.audio else "video"
    assert all(only == (expected if len(name) == 5 else None) for name, only in asked)


def test_several_windows_of_one_decode_come_in_steps_of_their_own(folder, monkeypatch):
    opened = []

    def reader(path):
        opened.append(path)
        return MediaReader(path)

    monkeypatch.setattr(dataset_module, "reader_class", lambda decoder: reader)
    source = open_source(folder)
    batches = [batch.clone() for batch in loader(dataset(source, windows_per_decode=3), 0, 12)]
    assert len(opened) == 12 // 3 * 4
    starts = {}
    for first in range(0, 12, 3):
        one, *others = batches[first : first + 3]
        assert len(set(one.files)) == 4
        for other in others:
            assert other.files == one.files and not torch.equal(other.video, one.video)
            assert not torch.equal(other.video_keep, one.video_keep)
        for batch in (one, *others):
            for name, start in zip(batch.files, batch.start_seconds.tolist(), strict=True):
                starts.setdefault(name, set()).add(start)
    assert max(map(len, starts.values())) > 2
    assert not set(batches[0].files) & set(batches[3].files)
    for one, parts in zip(
        batches[4:], read(source, (4, 12), 2, 2, windows_per_decode=3), strict=True
    ):
        same(one, parts)


def test_a_process_started_anew_reads_the_same(sources):
    batches = loader(dataset(sources["mixed"]), 0, 2, workers=1, start_method="spawn")
    for step, batch in enumerate(batches):
        same(dataset(sources["mixed"])[step], [batch])


def test_evaluation_gives_memory_of_its_own(folder):
    alone = list(evaluation_clips(folder, SPEC, vocabulary=VOCABULARY, batch_size=3, windows=2))
    shared = list(
        evaluation_clips(folder, SPEC, vocabulary=VOCABULARY, batch_size=3, windows=2, workers=2)
    )
    assert [len(batch) for batch in shared] == [6, 6, 6, 4]
    for one, other in zip(alone, shared, strict=True):
        assert one.files == other.files and torch.equal(one.video, other.video)
        assert torch.equal(one.audio, other.audio) and torch.equal(one.text, other.text)


# -- fetching ahead --------------------------------------------------------------------------------


class Noted:
    """Fills that note which rows are fetched ahead."""

    def __init__(self, *rows):
        self.of_fill, self.ahead = rows, []

    def rows(self, fill):
        return self.of_fill[fill]

    def read_ahead(self, fill, row):
        self.ahead.append((fill, row))


@pytest.mark.parametrize("rows", [(5, 5, 5), (40, 40), (7, 7, 3), (1, 1, 1, 1), (64,)])
@pytest.mark.parametrize("workers", [0, 1, 3, 40])
def test_each_row_is_fetched_ahead_once_and_in_order(rows, workers):
    fills = Noted(*rows)
    order = [(fill, row) for fill, count in enumerate(rows) for row in range(count)]
    for fill, row in order:
        workers_module.read_ahead(fills, fill, row, len(rows), workers)
    assert fills.ahead == order[min(4 * max(workers, 1), rows[0]) :]


@pytest.mark.parametrize("kind", ["folder", "shards", "mixed"])
@pytest.mark.parametrize("evaluated", [False, True])
def test_files_are_fetched_before_they_are_read(sources, monkeypatch, kind, evaluated):
    source, events = sources[kind], []
    windows = ClipFolder._windows

    def read(self, index, *rest):
        events.append(("read", source.place(index)))
        return windows(self, index, *rest)

    monkeypatch.setattr(dataset_module, "read_ahead", lambda place: events.append(("ahead", place)))
    monkeypatch.setattr(ClipFolder, "_windows", read)
    if evaluated:
        list(evaluation_clips(source, SPEC, vocabulary=None, batch_size=4))
        planned = range(len(source))
    else:
        clips = dataset(source)
        list(loader(clips, 0, 2))
        planned = np.concatenate([clips.order(0), clips.order(1)]).tolist()
    ahead = [place for what, place in events if what == "ahead"]
    assert ahead == [source.place(index) for index in planned[4:]]
    for place in ahead:
        assert events.index(("ahead", place)) < events.index(("read", place))


def test_a_cache_needs_no_file_ahead(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "read_ahead", None)
    assert len(list(loader(dataset(open_source(folder), cache_dir=tmp_path), 0, 2))) == 2


# -- memory ----------------------------------------------------------------------------------------


def test_a_batch_is_valid_until_the_next_one_and_its_memory_comes_again(folder):
    places = []
    for step, batch in enumerate(loader(dataset(folder), 0, 6, workers=2)):
        kept = batch.clone()
        time.sleep(0.05)  # workers fill the other half meanwhile
        same(kept, [batch])
        same(dataset(folder)[step], [batch])
        places.append(batch.video.data_ptr())
    assert len(set(places)) == 2 and places[::2] == places[:1] * 3


def test_the_collector_leaves_alone_what_forked_workers_share(folder):
    """It writes into what it looks at: each process would get a copy of its own."""
    assert gc.get_freeze_count() == 0
    batches = iter(loader(dataset(folder), 0, 2, workers=1, start_method="fork"))
    next(batches)
    assert gc.get_freeze_count() > 10_000
    batches.close()
    assert gc.get_freeze_count() == 0


def kilobytes(pid, name):
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_any_number_of_workers_lives_in_the_memory_of_two_batches(folder, monkeypatch):
    config = dataclasses.replace(CONFIG, frames=16, height=64, width=64)
    spec, rng = ClipSpec.from_config(config), np.random.default_rng(0)
    made = rng.integers(0, 255, (16, 64, 64, 3)).astype(np.uint8)
    window = dataset_module._Window(0, made, np.zeros(1280, np.float32), True, True)
    monkeypatch.setattr(
        ClipFolder, "_windows", lambda self, index, choose, *more: ([window], choose(1)[0])
    )
    drop = DropToken(config, 0.5)
    clips = ClipDataset(folder, spec, vocabulary=None, batch_size=256, drop_token=drop)
    batches = loader(clips, 0, 8, workers=4)
    running = iter(batches)
    before = {p.pid: kilobytes(p.pid, "RssAnon") for p in batches._workers._processes}
    for _ in range(7):
        batch = next(running)
    assert (batch.video != 0).any()
    assert clips.batch_bytes > 25e6
    assert 2 * clips.batch_bytes <= batches._memory.shared.size < 2 * clips.batch_bytes + 20_000
    for pid, was in before.items():
        # of a clip at a time, and of what a process has anyway
        assert 1000 * (kilobytes(pid, "RssAnon") - was) < 0.5 * clips.batch_bytes
        assert 1000 * kilobytes(pid, "RssShmem") < 2.1 * clips.batch_bytes
    batches.close()


@pytest.mark.parametrize("error", [0, 2])
def test_all_memory_is_page_locked_once(folder, monkeypatch, error):
    """By CUDA's calls, of which these take note; one that fails is said, and the run goes on."""
    calls = []

    class Runtime:
        def cudaHostRegister(self, address, size, flags):
            calls.append((address, size, flags))
            return error

        def cudaHostUnregister(self, address):
            calls.append(address)
            return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("done"))
    batches = loader(dataset(folder), 0, 5, workers=1, pin_memory=True)
    warned = pytest.warns(UserWarning, match="cannot be page-locked") if error else no_warning()
    with warned:
        places = [batch.video.data_ptr() for batch in batches]
    address, size, flags = calls[0]
    assert flags == 1 and size >= 2 * batches.clips.batch_bytes
    assert all(address <= place < address + size for place in places)
    assert calls[1:] == ([] if error else ["done", address])


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*page-locked")
        yield


def test_waiting_is_counted(folder, monkeypatch):
    original = ClipFolder.read_into

    def slow(self, *arguments, **options):
        time.sleep(0.05)
        original(self, *arguments, **options)

    monkeypatch.setattr(ClipFolder, "read_into", slow)
    batches = loader(dataset(folder), 0, 2)
    list(batches)
    assert batches.waited_seconds >= 8 * 0.05


# -- workers that die ------------------------------------------------------------------------------


def end_at(name, how):
    """In a worker, the clip with this name is its end."""
    original = ClipFolder.read_into

    def read_into(self, batch, rows, index, *arguments, **options):
        if self.source.name(index) == name and multiprocessing.parent_process() is not None:
            how()
        original(self, batch, rows, index, *arguments, **options)

    return read_into


@contextlib.contextmanager
def no_process_is_left():
    before = set(multiprocessing.active_children())
    yield
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(signal.SIGKILL, "fewer workers"), (signal.SIGSEGV, "remove or replace that file")],
)
def test_a_killed_worker_is_one_line_that_names_its_clip(folder, monkeypatch, number, remedy):
    def end():
        faulthandler.disable()
        os.kill(os.getpid(), number)

    monkeypatch.setattr(ClipFolder, "read_into", end_at("05.mp4", end))
    told = rf"worker \d of 2 was killed by {number.name} at 05\.mp4; .*{remedy}"
    with no_process_is_left(), pytest.raises(ChildProcessError, match=told):
        list(loader(dataset(folder), 0, 4, workers=2))


def test_workers_killed_while_they_wait_are_told_too(folder):
    batches = loader(dataset(folder), 0, 50, workers=2)
    running = iter(batches)
    next(running)
    batches._wait(1)  # the batch that they read ahead
    for process in batches._workers._processes:
        process.kill()
        process.join()
    told = r"worker \d of 2 was killed by SIGKILL while it began or waited"
    with no_process_is_left(), pytest.raises(ChildProcessError, match=told):
        list(running)


def test_a_worker_that_hangs_is_ended_and_its_clip_named(folder, monkeypatch):
    for name in ("HANG_SECONDS", "_LOOK_SECONDS", "_END_SECONDS"):
        monkeypatch.setattr(workers_module, name, 0.3)
    monkeypatch.setattr(ClipFolder, "read_into", end_at("05.mp4", lambda: time.sleep(600)))
    with (
        no_process_is_left(),
        pytest.raises(ChildProcessError, match=r"more than 0.3 s at 05\.mp4"),
    ):
        list(loader(dataset(folder), 0, 4, workers=2))


def test_errors_come_where_they_belong_and_are_told(folder, monkeypatch):
    def fail():
        raise KeyError("a mistake")

    monkeypatch.setattr(ClipFolder, "read_into", end_at("05.mp4", fail))
    at = next(step for step in range(4) if "05.mp4" in dataset(folder)[step].files)
    seen = []
    with no_process_is_left(), pytest.raises(RuntimeError, match="KeyError: 'a mistake'") as error:
        seen.extend(map(len, loader(dataset(folder), 0, 4, workers=2)))
    assert len(seen) == at and "read_into" in str(error.value)


def test_a_loader_that_is_left_ends_its_workers(folder):
    with no_process_is_left():
        for _ in loader(dataset(folder), 0, 100, workers=2):
            break
        del _


LEFT = """
import os, sys
from vatt_fast.data.loader import loader
from test_loader import dataset
batches = loader(dataset(sys.argv[1]), 0, 10**6, workers=2)
running = iter(batches)
next(running)
print(*(process.pid for process in batches._workers._processes), flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_a_process_that_is_killed(folder):
    """And their memory, which has no name, with them."""
    files = set(os.listdir("/dev/shm"))
    done = subprocess.run(
        [sys.executable, "-c", LEFT, folder],
        env=os.environ | {"PYTHONPATH": os.path.dirname(__file__)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    deadline = time.monotonic() + PATIENCE
    for pid in map(int, done.stdout.split()):
        while os.path.exists(f"/proc/{pid}/fd/0"):  # none of one that only waits to be counted
            assert time.monotonic() < deadline, pid
            time.sleep(0.05)
    assert not {name for name in set(os.listdir("/dev/shm")) - files if "vatt" in name}


# -- files that fail -------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
def test_what_stands_in_is_the_same_for_any_number_of_ranks(tmp_path, monkeypatch, world):
    """Many corrupt ones, so that rows run out of stand-ins of their own."""
    (tmp_path / "clips").mkdir()
    for number in range(19):
        (tmp_path / "clips" / f"{number:02}.mp4").write_bytes(b"x")

    def read_into(self, batch, rows, index, choose, write=None):
        if index % 3 == 0:
            raise MediaError(f"{index} is corrupt")

    monkeypatch.setattr(ClipFolder, "read_into", read_into)
    whole = dataset(tmp_path / "clips", 8, shards=1)
    ranks = [
        dataset(tmp_path / "clips", 8 // world, shards=1, rank=rank, world=world)
        for rank in range(world)
    ]
    for step in range(25):
        files = whole[step].files
        assert len(set(files)) == 8 and all(int(name[:2]) % 3 for name in files)
        assert files == tuple(name for rank in ranks for name in rank[step].files)


def test_a_hundred_in_a_row_that_cannot_be_read_are_an_error(tmp_path, monkeypatch):
    for number in range(300):
        (tmp_path / f"{number}.mp4").write_bytes(b"x")

    def read_into(self, batch, rows, index, choose, write=None):
        raise MediaError("no disk")

    monkeypatch.setattr(ClipFolder, "read_into", read_into)
    with pytest.raises(MediaError, match=r"100 files of .* in a row cannot be .* one: no disk"):
        dataset(tmp_path, 2)[0]
