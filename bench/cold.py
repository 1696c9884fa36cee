"""How fast clips come from tars that the page cache does not hold, with read-ahead and without.

Each round reads every clip of the tars once by each way, in turn; before it their pages are
dropped. What counts is time: a worker that waits for a disk takes no processor.
"""

import os
import statistics
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

from vatt_fast.config import preset
from vatt_fast.data import dataset as dataset_module
from vatt_fast.data.clips import ClipSpec
from vatt_fast.data.dataset import ClipDataset
from vatt_fast.data.loader import loader
from vatt_fast.data.source import Source
from vatt_fast.data.sources import open_source

from . import lines
from .data import CASES, make_file

TARS, CLIPS = 8, 48  # clips of a tar
BATCH = 32
_SPEC = ClipSpec.from_config(preset("medium_base_small"))


def _make_tars(case: str, folder: Path) -> list[Path]:
    """One clip under many names: its bytes lie elsewhere each time."""
    make_file(folder / "clip.mp4", *CASES[case])
    shards = folder / "shards"
    shards.mkdir()
    for number in range(TARS):
        with (shards / f"{number:05d}.tar").open("wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for clip in range(CLIPS):
                    tar.add(folder / "clip.mp4", f"{clip:09d}.mp4")
            file.flush()
            os.fsync(file.fileno())  # pages that are not on disk cannot be dropped
    return sorted(shards.glob("*.tar"))


def _drop(tars: list[Path]) -> None:
    for path in tars:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _seconds(source: Source, workers: int) -> float:
    dataset = ClipDataset(source, _SPEC, vocabulary=None, batch_size=BATCH)
    began = time.perf_counter()
    for _ in loader(dataset, 0, TARS * CLIPS // BATCH, workers):
        pass
    return time.perf_counter() - began


def run(cases: Sequence[str], rounds: int, workers: int, folder: Path) -> int:
    """Print clips a second of each way, and the median over the rounds of its time over the first.

    Args:
        folder: on the disk that is asked about.
    """
    for number, case in enumerate(cases):
        (inside := folder / str(number)).mkdir()
        tars = _make_tars(case, inside)
        size = sum(path.stat().st_size for path in tars)
        print(f"{case}, {TARS * CLIPS} clips in {size / 1e6:.0f} MB, {workers} workers:\n")
        print(_table(tars, rounds, workers), flush=True)
    return 0


def _table(tars: list[Path], rounds: int, workers: int) -> str:
    source = open_source(tars[0].parent, say=lambda line: None)

    def held() -> float:
        return _seconds(source, workers)

    def ahead() -> float:
        _drop(tars)
        return _seconds(source, workers)

    def without() -> float:
        with mock.patch.object(dataset_module, "read_ahead"):
            return ahead()

    ways: dict[str, Callable[[], float]] = {
        "held in memory": held, "on disk, read ahead": ahead, "on disk, without": without,
    }  # fmt: skip
    held()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds):
        for name in list(ways)[:: 1 if round_number % 2 else -1]:
            taken[name].append(ways[name]())
    first = taken["held in memory"]
    cells = [
        (
            name,
            lines.number(TARS * CLIPS / statistics.median(each)),
            lines.times(statistics.median(a / b for a, b in zip(each, first, strict=True))),
        )
        for name, each in taken.items()
    ]
    return lines.markdown_table(("tars", "clips/s", "time"), cells)
