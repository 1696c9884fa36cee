"""Batches in the order of their steps, from worker processes; a folder's clips for evaluation."""

import math
import os
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from .clips import Batch, ClipSpec, Skipped, spread, to_batch
from .dataset import ClipDataset, ClipFolder
from .media import MediaError
from .text import Vocabulary

_SHARED_MEMORY = "/dev/shm"
_PREFETCHED = 2  # batches each worker has ready


class ClipLoader(DataLoader):
    """A DataLoader whose workers' findings arrive in this process.

    What they skipped is added to the dataset's ``skipped``; their errors are the ones they raised.
    """

    def __init__(self, clips: "ClipDataset | _EvaluationBatches", **options: Any) -> None:
        super().__init__(_ErrorsAsValues(clips), **options)
        self.clips = clips

    def __iter__(self):
        return self._noting_skipped(super().__iter__())  # which starts the workers now

    def _noting_skipped(self, batches: Iterator[Batch]) -> Generator[Batch, None, None]:
        for batch in batches:
            if isinstance(batch, Exception):
                raise batch
            self.clips.skipped.update((one.file, one.reason) for one in batch.skipped)
            yield batch


class _ErrorsAsValues(Dataset):
    """Returns errors: a DataLoader would raise them anew with the worker's traceback as message."""

    def __init__(self, batches: "ClipDataset | _EvaluationBatches") -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> Batch | Exception:
        try:
            return self.batches[step]
        except (ValueError, OSError) as error:
            return error


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

    ``start_method`` is multiprocessing's: "spawn" where this process has threads that do not
    survive a fork. ``worker_init(number)`` runs first in each worker. Raises ValueError for steps
    out of order, and where shared memory has no room for the workers' batches.
    """
    if not 0 <= start_step <= stop_step:
        raise ValueError(f"steps {start_step} to {stop_step}; they must be in order and 0 or later")
    _check_shared_memory(dataset.batch_bytes, workers)
    return _loader(
        dataset, range(start_step, stop_step), workers, pin_memory, start_method, worker_init
    )


def _check_shared_memory(batch_bytes: int, workers: int) -> None:
    """Workers pass batches through /dev/shm; where it is full they die, or wait for ever."""
    if not workers or not os.path.isdir(_SHARED_MEMORY):
        return
    needed = (_PREFETCHED * workers + 1) * batch_bytes
    disk = os.statvfs(_SHARED_MEMORY)
    if needed > (free := disk.f_bavail * disk.f_frsize):
        raise ValueError(
            f"{workers} workers need {needed / 1e6:.0f} MB of shared memory for "
            f"{_PREFETCHED * workers + 1} batches of {batch_bytes / 1e6:.1f} MB, and "
            f"{_SHARED_MEMORY} has {free / 1e6:.0f} MB free; enlarge it, take smaller batches, "
            "or --workers 0"
        )


def _loader(
    dataset: "ClipDataset | _EvaluationBatches",
    steps: range,
    workers: int,
    pin_memory: bool = False,
    start_method: str | None = None,
    worker_init: Callable[[int], None] | None = None,
) -> ClipLoader:
    options: dict[str, Any] = (
        dict(
            persistent_workers=True,
            multiprocessing_context=start_method,
            prefetch_factor=_PREFETCHED,
            worker_init_fn=worker_init,
        )
        if workers
        else {}
    )
    return ClipLoader(
        dataset,
        sampler=steps,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        in_order=True,
        **options,
    )


def evaluation_clips(
    folder: str | os.PathLike,
    spec: ClipSpec,
    *,
    vocabulary: Vocabulary | None,
    batch_size: int = 32,
    place: float = 0.5,
    start: float | None = None,
    windows: int | None = None,
    first: int = 0,
    with_empty: bool = False,
    cache_dir: str | os.PathLike | None = None,
    workers: int = 0,
) -> Iterator[Batch]:
    """Every file once, in sorted order, at one window or several, as whole clips.

    The last batch may be smaller. A file that cannot be read is left out, and listed on the batch
    that it would have been in.

    Args:
        batch_size: files in a batch.
        place: where the window lies between the file's first (0) and last (1) possible one; 0.5
            is its middle.
        start: a time in seconds instead, rounded to the frames' grid.
        windows: so many instead, spread evenly over each file, in rows one after the other; 1 is
            the middle. Their captions are those nearest to the file's middle.
        first: batches that are left out, to go on with a work begun.
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
    clips = ClipFolder(folder, spec, vocabulary=vocabulary, cache_dir=cache_dir)

    def choose(count: int) -> list[int]:
        if windows is not None:
            return spread(count, windows)
        if start is not None:
            return [round(start * spec.frames_per_second)]
        return [round(place * (count - 1))]

    return _EvaluationBatches(clips, batch_size, choose, windows or 1).run(
        workers, first, with_empty
    )


class _EvaluationBatches(Dataset):
    """``choose`` gets the number of places where a window fits and names ``windows`` of them."""

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

    def __len__(self) -> int:
        return math.ceil(len(self.clips.files) / self.batch_size)

    def __getitem__(self, step: int) -> Batch:
        planned = range(
            step * self.batch_size, min((step + 1) * self.batch_size, len(self.clips.files))
        )
        batch = self.clips.empty_batch(len(planned) * self.windows)
        files: list[str] = []
        skipped = []
        for index in planned:
            try:
                self.clips.read_windows_into(batch, len(files), index, self.choose, self.windows)
            except MediaError as error:
                skipped.append(Skipped(self.clips.files[index], str(error)))
            else:
                files += [self.clips.files[index]] * self.windows
        return to_batch(batch, files, skipped)

    def run(self, workers: int, first: int, with_empty: bool) -> Iterator[Batch]:
        found = 0
        for batch in _loader(self, range(first, len(self)), workers):
            found += len(batch)
            if len(batch) or with_empty:
                yield batch
            if not len(batch):
                warnings.warn(
                    "skipped a whole batch of corrupt files: "
                    + ", ".join(one.file for one in batch.skipped),
                    stacklevel=2,
                )
        if not found and not first:
            reason = next(iter(self.skipped.values()))
            raise MediaError(
                f"none of the {len(self.clips.files)} files in {self.clips.folder} can be decoded; "
                f"the first one: {reason}"
            )
