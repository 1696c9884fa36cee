"""How long a run on a large data set takes to start and to go on, and what memory it takes.

    python -m bench large-index --examples 1000000 --captions 110 --shards 1000
    python -m bench large-index --examples 1000000 --captions 110 --shards 0

It writes an index as of HowTo100M's size, of tar shards or, without them, of single files below a
folder: times, offsets, names and words for real, texts and word numbers as files with holes. The
media are one small clip under many names (hard links), so that each can be decoded. Then it opens
the index in a fresh process, as ``pretrain`` does, reads examples all over it, starts a loader,
and one that goes on. Memory is told beyond what the imports take.
"""

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .machine import ROOT

LETTERS, WORDS = 48, 9  # of a caption
LEXICON = 300_000
READ = 20_000
BATCH, WORKERS = 64, 2
MOST_LINKS = 30_000  # of a file; some file systems allow no more
_CHUNK = 1 << 20


def one_clip(folder: Path) -> Path:
    """16 frames of 16 x 16 with sound, a few kB."""
    from vatt_fast.data.media_writer import write_clip

    frames = (
        np.zeros((16, 16, 16, 3), np.uint8) + np.arange(16, dtype=np.uint8)[:, None, None, None]
    )
    write_clip(folder / "clip.mp4", frames, np.zeros(12800, np.float32), sample_rate_hz=8000)
    return folder / "clip.mp4"


def known() -> Any:
    from vatt_fast.data.columns import AUDIO, MEASURED, VIDEO, Measured

    return Measured(1.6, VIDEO | AUDIO | MEASURED, 16, 16, 10.0, 8000, 1, 1.6)


def write_shards(folder: Path, examples: int, shards: int, builder: Any) -> tuple[str, Any]:
    """Tars that are one, and their examples."""
    from vatt_fast.data.listing import Listing

    clip, each = one_clip(folder), -(-examples // shards)
    names = [f"{number:05d}.tar" for number in range(shards)]
    with tarfile.open(folder / names[0], "w") as tar:
        for place in range(each):
            tar.add(clip, f"{place:09d}.mp4")
    with tarfile.open(folder / names[0]) as tar:
        members = [(each.name, each.offset_data, each.size) for each in tar]
    clip.unlink()
    status = (folder / names[0]).stat()
    for shard, name in enumerate(names):
        if shard:
            (folder / name).hardlink_to(folder / names[0])
        for member, offset, size in members[: examples - shard * each]:
            builder.add(
                f"{name}/{member}",
                name,
                file_bytes=status.st_size,
                file_time=status.st_mtime_ns,
                offset=offset,
                size=size,
                measured=known(),
            )
        builder.end_block()
    return str(folder), Listing(str(folder), str(folder), None, shards=names)


def write_files(folder: Path, examples: int, builder: Any) -> tuple[str, Any]:
    """Files that are one, a thousand in a folder, and their examples."""
    from vatt_fast.data.listing import Listing

    clip = one_clip(folder)
    for number in range(examples):
        name = f"{number // 1000:05d}/{number % 1000:03d}.mp4"
        if number % 1000 == 0:
            (folder / name).parent.mkdir()
        if number % MOST_LINKS == 0:
            one = folder / name
            shutil.copy(clip, one)
            status = one.stat()
        else:
            os.link(one, folder / name)
        builder.add(
            name,
            name,
            file_bytes=status.st_size,
            file_time=status.st_mtime_ns,
            measured=known(),
        )
        builder.end_block()
    clip.unlink()
    stamped = [str(folder), *sorted(str(each) for each in folder.iterdir() if each.name.isdigit())]
    return f"{folder}/**", Listing(f"{folder}/**", str(folder), None, stamped=stamped)


def write(folder: Path, examples: int, captions: int, shards: int) -> str:
    """The media and their index. Returns what to name as data."""
    from vatt_fast.data import index_file
    from vatt_fast.data.columns import PartBuilder, to_files
    from vatt_fast.data.listing import index_home, parse

    builder = PartBuilder()
    (folder / "data").mkdir()
    named, listing = (
        write_shards(folder / "data", examples, shards, builder)
        if shards
        else write_files(folder / "data", examples, builder)
    )
    home = index_home(parse(named)[0])
    assert home is not None
    columns = home / "columns"
    columns.mkdir(parents=True)
    part = builder.finish()
    part["caption_first"] = np.arange(examples, dtype=np.int64) * captions
    part["caption_count"] = np.full(examples, captions, np.int32)
    save = to_files(columns)
    total = examples * captions
    for column, values in part.items():
        if not column.startswith(("caption_times", "text", "token", "word")):
            save(column, iter([values]), len(values), values.dtype, values.shape[1:])

    def ramp(rows: int, step: float, kind: type) -> Iterator[np.ndarray]:
        for first in range(0, rows, _CHUNK):
            yield (np.arange(first, min(first + _CHUNK, rows)) * step).astype(kind)

    spans = (np.stack([each, each + 3], 1) for each in ramp(total, 3.5, np.float64))
    save("caption_times", spans, total, np.float64, (2,))
    for column, length in (("text", LETTERS), ("token", WORDS)):
        save(f"{column}_offsets", ramp(total + 1, length, np.int64), total + 1, np.int64, ())
    for column, kind, length in (("text", np.uint8, LETTERS), ("token", np.int32, WORDS)):
        with open(columns / f"{column}_data.npy", "wb") as file:
            header = {
                "descr": np.dtype(kind).str,
                "fortran_order": False,
                "shape": (total * length,),
            }
            np.lib.format.write_array_header_2_0(file, header)
            file.truncate(file.tell() + total * length * np.dtype(kind).itemsize)
    words = [f"word{number}" for number in range(LEXICON)]
    data = np.frombuffer("".join(words).encode(), np.uint8)
    save("word_data", iter([data]), len(data), np.uint8, ())
    ends = np.cumsum([0, *map(len, words)])
    save("word_offsets", iter([ends]), len(ends), np.int64, ())
    counts = np.arange(LEXICON, 0, -1)
    save("word_counts", iter([counts]), len(counts), np.int64, ())
    about = {
        "format": index_file.FORMAT,
        "version": index_file.VERSION,
        "label": listing.label,
        "root": "..",
        "columns": columns.name,
        "left_out": 0,
        "without_spaces": 0,
        "identity": {"files": examples, "bytes": int(part["size"].sum()), "digest": "",
                     "captions": ""},
        "content": "sparse",
        "asked": {},
        "listing": index_file.digest_of_listing(listing),
        "stamps": index_file.stamps_of(listing),
    }  # fmt: skip
    (home / index_file.INDEX_FILE).write_text(json.dumps(about))
    return named


def memory(process: int | str = "self") -> dict[str, float]:
    """A process' MB: resident, and its own, which no other process can share."""
    values = {}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
        name, amount = line.split(":")
        values[name] = int(amount.split()[0]) / 1024
    return {
        "resident": values["Rss"],
        "own": values["Private_Dirty"] + values["Private_Clean"],
        "anonymous": values["Anonymous"],
    }


def measure(data: str) -> dict[str, float]:
    """Open the index, choose a vocabulary, encode, read examples all over it, and batches."""
    from vatt_fast.data import dataset, loader  # noqa: F401 (imports are not counted)
    from vatt_fast.data.sources import open_source, vocabulary_from

    before, found = memory(), dict[str, float]()
    began = time.perf_counter()
    source = open_source(data)
    found["open, files checked: s"] = time.perf_counter() - began
    vocabulary = vocabulary_from(source, 65_536)
    encode = source.encode(vocabulary, 16)
    found["vocabulary and word table: s"] = time.perf_counter() - began - sum(found.values())
    found["to a worker: bytes"] = len(pickle.dumps(source))
    opened = memory()
    found |= {f"after opening, {kind}: MB": opened[kind] - before[kind] for kind in before}
    chosen = np.random.default_rng(0).integers(0, len(source), READ)
    began = time.perf_counter()
    for number in chosen.tolist():
        source.name(number), source.place(number), source.segment(number)
        source.captions(number).times.sum()
        encode(number)
    found["an example at random: us"] = (time.perf_counter() - began) / READ * 1e6
    after = memory()
    found |= {f"after {READ} examples, {kind}: MB": after[kind] - before[kind] for kind in before}
    return found | batches(source, vocabulary)


def batches(source: Any, vocabulary: Any) -> dict[str, float]:
    """A loader's first batch and the one after, then a loader that goes on far behind."""
    from vatt_fast.data.clips import ClipSpec
    from vatt_fast.data.dataset import ClipDataset
    from vatt_fast.data.loader import loader

    spec = ClipSpec(8, 16, 16, 10.0, 6400, 8000, 5, 16)
    found, before = dict[str, float](), memory()
    began = time.perf_counter()
    clips = ClipDataset(source, spec, vocabulary=vocabulary, batch_size=BATCH)
    found["dataset: s"] = time.perf_counter() - began
    steps = clips.steps_per_epoch
    began = time.perf_counter()
    first = loader(clips, 0, 4 * steps, WORKERS)
    running = iter(first)
    files = [next(running).files]
    found[f"first batch, {BATCH} clips, {WORKERS} workers: s"] = time.perf_counter() - began
    began = time.perf_counter()
    files += [next(running).files for _ in range(9)]
    found["each of nine more: s"] = (time.perf_counter() - began) / 9
    pids = [each.pid for each in multiprocessing.active_children() if each.pid]
    workers = [memory(pid)["anonymous"] for pid in pids]
    found["anonymous memory of a worker: MB"] = max(workers)
    state = first.state_dict()
    first.close()
    began = time.perf_counter()
    state["step"] = 2 * steps + steps // 2
    again = loader(clips, 0, 4 * steps, WORKERS)
    again.load_state_dict(state)
    later = next(iter(again)).files
    found["first batch amid the third epoch: s"] = time.perf_counter() - began
    again.close()
    assert all(len({*names}) == BATCH for names in (*files, later)), "a clip is twice in a batch"
    assert not clips.skipped, clips.skipped
    found["beyond the open index, resident: MB"] = memory()["resident"] - before["resident"]
    return found


_ALONE = """
import json, sys
from bench.large_index import measure
print(json.dumps(measure(sys.argv[1])))
"""


def run(examples: int, captions: int, shards: int, place: Path | None) -> int:
    """Write an index, measure it in a fresh process, twice, and print what was found.

    Args:
        shards: 0: single files.
        place: where a folder is made, which is removed again; None: the system's own.
    """
    with tempfile.TemporaryDirectory(dir=place) as folder:
        began = time.perf_counter()
        data = write(Path(folder), examples, captions, shards)
        held = f"in {shards} shards" if shards else "in single files"
        took = f"written in {time.perf_counter() - began:.0f} s"
        print(f"{examples} examples of {captions} captions {held}, {took}", flush=True)
        for _ in range(2):  # the second time what was read is in the system's cache
            command = [sys.executable, "-c", _ALONE, data]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT)
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                print(f"  {name:44} {value:10.3f}")
    return 0
