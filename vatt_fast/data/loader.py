"""Batches in the order of their steps, from worker processes; each clip once for evaluation."""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .clips import Batch, ClipSpec, Shapes, Skipped, bytes_of, many, row_shapes, spread, to_batch
from .dataset import ClipDataset, ClipFolder, Read
from .media import MediaError
from .source import Source
from .text import Vocabulary
from .workers import Memory, Workers, read_ahead

_YOUNG = ("data", "weights")  # what states of earlier versions do not say
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device


class ClipLoader:
    """The batches of steps in order, the same for any number of workers; see ``loader``.

    A batch lies in memory that is filled anew: it is valid until the next one is asked for.

    Attributes:
        waited_seconds: how long batches were waited for, all together.
    """

    def __init__(
        self,
        clips: "ClipDataset | _EvaluationBatches",
        steps: range,
        workers: int = 0,
        pin_memory: bool = False,
        start_method: str | None = None,
        worker_init: Callable[[int], None] | None = None,
    ) -> None:
        self.clips, self.steps = clips, steps
        self.workers, self.pin_memory = workers, pin_memory
        self.start_method, self.worker_init = start_method, worker_init
        self.waited_seconds = 0.0
        self._begin = self._next = steps.start
        self._memory: Memory | None = None
        self._workers: Workers | None = None
        self._pinned = 0  # address of memory that is page-locked

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        """Begin anew: with the first step, or once with the one of ``load_state_dict``."""
        self._start()  # workers begin before the first batch is asked for
        return self._run(self._memory)

    def _start(self) -> None:
        self.close()
        self._next, self._begin = self._begin, self.steps.start
        together, clips = self.clips.steps_together, self.clips
        self._fills = range(self._next // together, -(-self.steps.stop // together))
        self._asked = self._fills.start  # the next fill that workers are to read
        self._held: int | None = None  # the fill of the batch that was handed out last
        self._reads: dict[int, list[Read]] = {}
        self._missing: dict[int, int] = {}
        self._errors: dict[int, Exception] = {}
        if not self._fills:
            return
        size = bytes_of(clips.shapes(self._fills.start))
        places = min(2, len(self._fills)) if self.workers else 1
        _check_memory(size, places, self.workers)
        self._memory = Memory(size, places, self.workers)
        if self.workers:
            largest = clips.rows(self._fills.start)
            self._workers = Workers(
                clips, self._memory, self.workers, largest, self._fills.stop,
                self.start_method, self.worker_init,
            )  # fmt: skip
            for _ in range(places):
                self._ask()
        if self.pin_memory and torch.cuda.is_available():
            self._pin()

    def _run(self, memory: Memory | None) -> Iterator[Batch]:
        try:
            while self._memory is memory and self._next < self.steps.stop:
                yield self._following()
        finally:
            if self._memory is memory:  # nobody has begun anew
                self.close()

    def _following(self) -> Batch:
        assert self._memory is not None
        began, fill = time.perf_counter(), self._next // self.clips.steps_together
        arrays = self._memory.arrays(fill, self.clips.shapes(fill))
        if fill != self._held:
            if self._held is not None:
                del self._reads[self._held]
                if self._workers is not None and self._asked < self._fills.stop:
                    self._ask()
            self._held = None
            if self._workers is None:
                self.clips.begin(fill, arrays)
                self._reads[fill] = reads = []
                for row in range(self.clips.rows(fill)):
                    read_ahead(self.clips, fill, row, self._fills.stop, workers=0)
                    reads.append(self.clips.read_row(fill, row, arrays))
            else:
                self._wait(fill)
            self._held = fill
        batch = self.clips.batch(self._next, arrays, self._reads[fill])
        self.waited_seconds += time.perf_counter() - began
        self._next += 1
        return batch

    def _ask(self) -> None:
        assert self._memory is not None and self._workers is not None
        fill = self._asked
        self.clips.begin(fill, self._memory.arrays(fill, self.clips.shapes(fill)))
        self._reads[fill] = [Read(-1)] * self.clips.rows(fill)
        self._missing[fill] = self.clips.rows(fill)
        self._workers.ask(fill)
        self._asked += 1

    def _wait(self, fill: int) -> None:
        assert self._workers is not None
        while self._missing[fill]:
            for of_fill, row, what in self._workers.results():
                if isinstance(what, Exception):  # the first row's, whoever was faster
                    self._errors[of_fill] = what
                else:
                    self._reads[of_fill][row] = what
                self._missing[of_fill] -= 1
        if fill in self._errors:
            raise self._errors[fill]

    def _pin(self) -> None:
        assert self._memory is not None
        whole = np.frombuffer(self._memory.shared.map, np.uint8)
        cudart: Any = torch.cuda.cudart()
        error = int(cudart.cudaHostRegister(whole.ctypes.data, whole.nbytes, _PORTABLE))
        if error:
            warnings.warn(
                f"{whole.nbytes / 1e6:.0f} MB of batches cannot be page-locked (CUDA error "
                f"{error}): each copy to the device waits for the step before",
                stacklevel=2,
            )
        else:
            self._pinned = whole.ctypes.data

    def close(self) -> None:
        """End the workers. The last batch stays valid."""
        if self._workers is not None:
            self._workers.close()
        if self._pinned:
            torch.cuda.synchronize()  # nothing is copied from there any more
            cudart: Any = torch.cuda.cudart()
            error = int(cudart.cudaHostUnregister(self._pinned))
            assert not error, error
        self._workers, self._memory, self._pinned = None, None, 0

    def __del__(self) -> None:
        if hasattr(self, "_pinned"):  # else its making failed
            self.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch lies, whatever the number of workers and ranks."""
        return {"step": self._next, **self.clips.identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin there when iterated next.

        Raises:
            ValueError: the state is of other data or weights, another seed or batch, or a step
                beyond these.
        """
        for name, now in self.clips.identity.items():
            if state.get(name, now if name in _YOUNG else None) != now:
                raise ValueError(
                    f"the loader's state has {name} {state.get(name)!r}, and this one {now!r}; "
                    "the same step would hold other clips: make the loader as it was"
                )
        step = state["step"]
        if not self.steps.start <= step <= self.steps.stop:
            raise ValueError(
                f"the loader's state is at step {step}; this one has {self.steps.start} up to "
                f"{self.steps.stop}: make it longer"
            )
        self.close()
        self._begin = self._next = step


def loader(
    dataset: ClipDataset,
    start_step: int,
    stop_step: int,
    workers: int = 0,
    pin_memory: bool = False,
    start_method: str | None = None,
    worker_init: Callable[[int], None] | None = None,
) -> ClipLoader:
    """Batches ``start_step`` .. ``stop_step - 1`` in order, the same for any number of workers.

    Workers share the rows of a batch, in memory of two batches that is filled again and again: a
    batch is valid until the next one is asked for (``Batch.clone``). So a copy to a device must be
    done by then; in pinned memory that is what a non-blocking one is not.

    Args:
        workers: processes; 0: this one reads, in the memory of one batch.
        pin_memory: the memory is page-locked, where there is CUDA.
        start_method: multiprocessing's: "spawn" where this process has threads that do not survive
            a fork.
        worker_init: ``worker_init(number)`` runs first in each worker.

    Raises:
        ValueError: steps out of order, or, once iterated, too little memory.
        ChildProcessError: once iterated, a worker died or hangs; it names the clip.
    """
    if not 0 <= start_step <= stop_step:
        raise ValueError(f"steps {start_step} to {stop_step}; they must be in order and 0 or later")
    if workers < 0:
        raise ValueError(f"workers is {workers}; it must not be negative")
    steps = range(start_step, stop_step)
    return ClipLoader(dataset, steps, workers, pin_memory, start_method, worker_init)


def available_memory() -> int | None:
    """Bytes that can still be had, of the machine and of the container; None where none says so."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        if "MemAvailable" in lines:
            found.append(1024 * int(lines["MemAvailable"].split()[0]))
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        found.append(max(0, limit - used))
    except (OSError, ValueError, KeyError):  # "max", or no such group
        pass
    return min(found, default=None)


def _check_memory(size: int, places: int, workers: int) -> None:
    """Where memory runs out, processes are killed."""
    available = available_memory()
    if available is not None and places * size > available:
        less = ", or --workers 0, which takes half" if places > 1 else ""
        raise ValueError(
            f"{workers} workers need {places * size / 1e6:.0f} MB of shared memory for {places} "
            f"batches of {size / 1e6:.1f} MB, and {available / 1e6:.0f} MB are free; take smaller "
            f"batches{less}"
        )


def evaluation_clips(
    data: str | os.PathLike | Source,
    spec: ClipSpec,
    *,
    vocabulary: Vocabulary | None,
    batch_size: int = 32,
    place: float = 0.5,
    start: float | None = None,
    windows: int | None = None,
    first: int = 0,
    stop: int | None = None,
    with_empty: bool = False,
    cache_dir: str | os.PathLike | None = None,
    workers: int = 0,
) -> Iterator[Batch]:
    """Every example of a source once, in order, at one window or several, as whole clips.

    The last batch may be smaller. A file that cannot be read is left out, and listed on the batch
    that it would have been in.

    Args:
        data: what ``open_source`` takes, or a ``Source``.
        batch_size: examples in a batch.
        place: where the window lies between the example's first (0) and last (1) possible one; 0.5
            is its middle.
        start: a time in seconds instead, of the file or segment, rounded to the frames' grid.
        windows: so many instead, spread evenly over each example, in rows one after the other; 1 is
            the middle. Their captions are those nearest to its middle.
        first: batches that are left out, to go on with a work begun.
        stop: the batch to end before, where others read the rest; None: to the end.
        with_empty: batches of which no file can be read come too, with their ``skipped``.

    Raises:
        MediaError: no file can be decoded. ValueError: as ``ClipFolder``.
    """
    if not 0 <= place <= 1:
        raise ValueError(f"place is {place}; it lies between 0, the first window, and 1, the last")
    if start is not None and not (math.isfinite(start) and start >= 0):
        raise ValueError(f"start is {start} s; it must be a finite time, 0 or later")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; a batch has at least 1 clip")
    if windows is not None and windows < 1:
        raise ValueError(f"windows is {windows}; it must be at least 1")
    clips = ClipFolder(data, spec, vocabulary=vocabulary, cache_dir=cache_dir)

    def choose(count: int) -> list[int]:
        if windows is not None:
            return spread(count, windows)
        if start is not None:
            return [round(start * spec.frames_per_second)]
        return [round(place * (count - 1))]

    return _EvaluationBatches(clips, batch_size, choose, windows or 1).run(
        workers, first, stop, with_empty
    )


class _EvaluationBatches:
    """``choose`` gets the number of places where a window fits and names ``windows`` of them."""

    steps_together = 1

    def __init__(
        self,
        clips: ClipFolder,
        batch_size: int,
        choose: Callable[[int], list[int]],
        windows: int,
    ):
        self.clips, self.batch_size = clips, batch_size
        self.choose, self.windows = choose, windows
        self.skipped: dict[str, str] = {}

    @property
    def identity(self) -> dict[str, Any]:
        return {"examples": len(self.clips), "batch": self.batch_size, "windows": self.windows}

    def __len__(self) -> int:
        return math.ceil(len(self.clips) / self.batch_size)

    def rows(self, fill: int) -> int:
        return min(self.batch_size, len(self.clips) - fill * self.batch_size)

    def shapes(self, fill: int) -> Shapes:
        return many(self.batch_size * self.windows, row_shapes(self.clips.spec))

    def begin(self, fill: int, arrays: dict[str, np.ndarray]) -> None:
        """Nothing is known before a file is read."""

    def name(self, example: int) -> str:
        return self.clips.source.name(example)

    def read_ahead(self, fill: int, row: int) -> None:
        self.clips.read_ahead(fill * self.batch_size + row)

    def read_row(
        self,
        fill: int,
        row: int,
        arrays: dict[str, np.ndarray],
        reading: Callable[[int], None] = lambda example: None,
    ) -> Read:
        example = fill * self.batch_size + row
        reading(example)
        rows = range(row * self.windows, (row + 1) * self.windows)
        try:
            self.clips.read_into(arrays, rows, example, self.choose, middle=self.windows > 1)
        except MediaError as error:
            return Read(-1, (Skipped(self.name(example), str(error)),))
        return Read(example)

    def batch(self, step: int, arrays: Mapping[str, np.ndarray], reads: Sequence[Read]) -> Batch:
        """The files that could be read, in memory of their own."""
        found = [row for row, read in enumerate(reads) if read.example >= 0]
        rows = [row * self.windows + one for row in found for one in range(self.windows)]
        files = [self.name(reads[row].example) for row in found for _ in range(self.windows)]
        skipped = [one for read in reads for one in read.skipped]
        if not step:  # what the source itself left out
            skipped += [Skipped(*problem) for problem in self.clips.source.problems.items()]
        self.skipped.update((one.file, one.reason) for one in skipped)
        return to_batch({name: values[rows] for name, values in arrays.items()}, files, skipped)

    def run(self, workers: int, first: int, stop: int | None, with_empty: bool) -> Iterator[Batch]:
        found = 0
        for batch in ClipLoader(self, range(first, len(self) if stop is None else stop), workers):
            found += len(batch)
            if len(batch) or with_empty:
                yield batch
            if not len(batch):
                warnings.warn(
                    "skipped a whole batch of corrupt files: "
                    + ", ".join(one.file for one in batch.skipped),
                    stacklevel=2,
                )
        if not found and not first and stop is None:
            reason = next(iter(self.skipped.values()))
            raise MediaError(
                f"none of the {len(self.clips)} files in {self.clips.source.label} can be decoded; "
                f"the first one: {reason}"
            )
