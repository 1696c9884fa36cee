"""How long an index of a large data set takes to start from, and what memory it takes.

    python -m bench.large_index --examples 1000000 --captions 110 --shards 1000 --folder /tmp/large

It writes an index as of HowTo100M's size in tar shards (times, offsets, names and words for real;
texts, word numbers and shards as files with holes), then opens it in a fresh process: as
``pretrain`` does, and as a loader's worker does. Memory is told beyond what the imports take.
"""

import argparse
import json
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

LETTERS, WORDS = 48, 9  # of a caption
LEXICON = 300_000
READ = 20_000
_CHUNK = 1 << 20


def write(folder: Path, examples: int, captions: int, shards: int) -> None:
    """An index of ``shards`` tars of empty clips, and the tars, as large as they say."""
    from vatt_fast.data import index
    from vatt_fast.data.columns import PartBuilder, to_files
    from vatt_fast.data.listing import Listing

    columns = folder / "vatt_index" / "columns"
    columns.mkdir(parents=True)
    size, clip = 10 * -(-examples // shards) * 1024, 10 * 1024
    names = [f"{number:05d}.tar" for number in range(shards)]
    for name in names:
        with open(folder / name, "wb") as file:
            file.truncate(size)
    each = -(-examples // shards)
    builder = PartBuilder()
    for shard, name in enumerate(names):
        status = (folder / name).stat()
        for place in range(min(each, examples - shard * each)):
            builder.add(
                f"{name}/{place:09d}.mp4",
                name,
                file_bytes=size,
                file_time=status.st_mtime_ns,
                offset=place * clip,
                size=clip,
            )
        builder.end_block()
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
    listing = Listing(str(folder), str(folder), None, shards=names)
    about = {
        "format": index.FORMAT,
        "version": index.VERSION,
        "label": str(folder),
        "root": "..",
        "columns": columns.name,
        "left_out": 0,
        "without_spaces": 0,
        "identity": {"files": examples, "bytes": examples * clip, "digest": "", "captions": ""},
        "asked": {},
        "listing": index._digest(listing),
        "stamps": index._stamps(listing),
    }
    (folder / "vatt_index" / index.INDEX_FILE).write_text(json.dumps(about))


def memory() -> dict[str, float]:
    """This process' MB: resident, and its own, which no other process can share."""
    values = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, amount = line.split(":")
        values[name] = int(amount.split()[0]) / 1024
    return {
        "resident": values["Rss"],
        "own": values["Private_Dirty"] + values["Private_Clean"],
        "anonymous": values["Anonymous"],
    }


def measure(folder: Path) -> dict[str, float]:
    """Open the index, choose a vocabulary, encode, and read examples all over it."""
    from vatt_fast.data.sources import open_source, vocabulary_from

    before, found = memory(), dict[str, float]()
    began = time.perf_counter()
    source = open_source(folder)
    found["open, tars checked: s"] = time.perf_counter() - began
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
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--captions", type=int, default=110)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/vatt_large_index"))
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.folder)))
        return
    given.folder.mkdir()
    try:
        began = time.perf_counter()
        write(given.folder, given.examples, given.captions, given.shards)
        told = (given.examples, given.captions, given.shards, time.perf_counter() - began)
        print("{} examples of {} captions in {} shards, written in {:.0f} s".format(*told))
        command = [sys.executable, "-m", "bench.large_index", "--measure"]
        for _ in range(2):  # the second time what was read is in the system's cache
            done = subprocess.run(
                [*command, "--folder", str(given.folder)], check=True, capture_output=True
            )
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                print(f"  {name:44} {value:10.3f}")
    finally:
        shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
