"""A folder of media and captions as batches of fixed shape, each a pure function of (seed, step, rank, world).

    folder/clip_00001.mp4, folder/talk.wav, ...
    folder/captions.json    {"clip_00001.mp4": [{"start": 0.2, "end": 1.1, "text": "..."}, ...], ...}, or absent

Shapes: B clips, T frames, H rows, W columns, S samples, P texts a clip. Nothing random is kept between steps, so a run resumes by
asking for a later step, and any number of loader workers gives the same batches. Windows begin on the grid of frames, where a decoded
cache and the file itself give the same clip.
"""

import dataclasses
import hashlib
import json
import math
import os
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .media import MEDIA_SUFFIXES, MediaError, MediaReader
from .text import Caption, Vocabulary, load_captions, nearest_sentences

if TYPE_CHECKING:
    from ..config import VATTConfig

CAPTIONS = "captions.json"

# One stream of random numbers for each decision: a new decision must not change the old ones.
_ORDER, _WINDOW, _REPLACEMENT, _OTHER_CAPTIONS = range(4)


@dataclass(frozen=True)
class ClipSpec:
    """The sizes of one clip, under ``VATTConfig``'s names."""

    frames: int
    height: int
    width: int
    frames_per_second: float
    samples: int
    sample_rate_hz: int
    words: int
    texts_per_clip: int

    @classmethod
    def from_config(cls, config: "VATTConfig") -> "ClipSpec":
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    @property
    def seconds(self) -> float:
        """How long a window is: the longer of its video and its audio."""
        return max(self.frames / self.frames_per_second, self.samples / self.sample_rate_hz)


@dataclass(frozen=True)
class Skipped:
    """A file that could not be decoded, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """B clips. What a file lacks is zeros with its ``valid`` False; ``skipped`` lists the corrupt files that others stand in for."""

    video: Tensor  # (B, T, H, W, 3) uint8
    audio: Tensor  # (B, S) float32 in [-1, 1]
    text: Tensor  # (B, P, words) int32, 0 = padding
    video_valid: Tensor  # (B,) bool
    audio_valid: Tensor  # (B,) bool
    text_valid: Tensor  # (B, P) bool
    start_seconds: Tensor  # (B,) float64, where each window begins in its file
    files: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; DataLoader calls it for ``pin_memory=True``."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = change(value)
        return Batch(**values)


class ClipFolder:
    """The media of one folder and their captions, read one window at a time.

    ``vocabulary`` None leaves text out (``text_valid`` is False). With ``cache_dir`` each file is decoded once, whole, at the spec's
    rates, and windows are then read from disk: ``frames_per_second * height * width * 3 + 4 * sample_rate_hz`` bytes a second of
    media, so for folders of short clips. Raises ValueError for a folder that is missing or without media, for captions of media that
    are not there and for bad captions.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        spec: ClipSpec,
        *,
        vocabulary: Vocabulary | None,
        cache_dir: str | os.PathLike | None = None,
    ):
        self.folder = Path(folder)
        self.spec = spec
        self.vocabulary = vocabulary
        self.captions = folder_captions(folder)
        self.files = tuple(sorted(self.captions))
        self.captions_from = np.arange(len(self.files))  # whose captions a file is given
        self._cache = None if cache_dir is None else _Cache(Path(cache_dir), spec)
        self._encoded: dict[int, np.ndarray] = {}

    def empty_batch(self, size: int) -> dict[str, np.ndarray]:
        """Batch's arrays for ``size`` clips, nothing valid yet. NumPy's: assigning one element of a tensor takes microseconds."""
        spec = self.spec
        return {
            "video": np.zeros((size, spec.frames, spec.height, spec.width, 3), np.uint8),
            "audio": np.zeros((size, spec.samples), np.float32),
            "text": np.zeros((size, spec.texts_per_clip, spec.words), np.int32),
            "video_valid": np.zeros(size, bool),
            "audio_valid": np.zeros(size, bool),
            "text_valid": np.zeros((size, spec.texts_per_clip), bool),
            "start_seconds": np.zeros(size),
        }

    def read_into(
        self, batch: dict[str, np.ndarray], row: int, index: int, choose: Callable[[int], int]
    ) -> None:
        """Write a window of file ``index`` into ``row``. ``choose`` gets the number of places where a window fits and names one.

        Raises MediaError for a corrupt file, before anything is written.
        """
        rates = self.spec.frames_per_second

        def start_frame(duration_seconds: float) -> int:
            # the small term: 3.2 - 1.6 must count as 16 frames of 0.1 s
            return choose(
                max(0, math.floor((duration_seconds - self.spec.seconds) * rates + 1e-6)) + 1
            )

        path = self.folder / self.files[index]
        video, audio = batch["video"][row], batch["audio"][row]
        if self._cache is None:
            with MediaReader(path) as reader:
                first = start_frame(reader.info.duration_seconds)
                clip = reader.clip(start=first / rates, **_clip_sizes(self.spec))
            has_video, has_audio = clip.video is not None, clip.audio is not None
            if clip.video is not None:
                video[:] = clip.video
            if clip.audio is not None:
                audio[:] = clip.audio
        else:
            first, has_video, has_audio = self._cache.read_into(path, start_frame, video, audio)
        batch["video_valid"][row], batch["audio_valid"][row] = has_video, has_audio
        start = first / rates
        batch["start_seconds"][row] = start
        self._write_text(
            batch, row, int(self.captions_from[index]), (start, start + self.spec.seconds)
        )

    def _write_text(
        self, batch: dict[str, np.ndarray], row: int, index: int, window: tuple[float, float]
    ) -> None:
        if self.vocabulary is None:
            return
        captions = self.captions[self.files[index]]
        if index not in self._encoded:
            self._encoded[index] = self.vocabulary.encode(
                [caption.text for caption in captions], self.spec.words
            )
        nearest = nearest_sentences(captions, window, self.spec.texts_per_clip)
        if nearest:
            numbers = self._encoded[index][nearest]
            batch["text"][row, : len(nearest)] = numbers
            batch["text_valid"][row, : len(nearest)] = numbers.any(
                axis=1
            )  # a sentence without words is no text


def _to_batch(arrays: dict[str, np.ndarray], files: list[str], skipped: Iterable[Skipped]) -> Batch:
    """The first ``len(files)`` rows as a Batch."""
    tensors = {name: torch.from_numpy(values[: len(files)]) for name, values in arrays.items()}
    return Batch(**tensors, files=tuple(files), skipped=tuple(skipped))


class ClipDataset(Dataset):
    """``dataset[step]`` is the batch of that step: every file once an epoch in a new order, each at a random window.

    ``batch_size`` counts this rank's clips: rank r of ``world`` gets rows ``r * batch_size`` and on of a batch of
    ``world * batch_size``. A batch holds no file twice unless the folder is smaller than the batch; the files that do not fill an
    epoch's last batch sit that epoch out. A corrupt file is replaced by another one and listed, on the batch and in ``skipped``.
    ``shuffle_captions`` gives every clip the captions of another one, always the same: a check that an evaluation can fail.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        spec: ClipSpec,
        *,
        vocabulary: Vocabulary | None,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle_captions: bool = False,
        cache_dir: str | os.PathLike | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; a batch has at least 1 clip")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be 0 or more")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of world {world}; ranks count from 0 to world - 1")
        self.clips = ClipFolder(folder, spec, vocabulary=vocabulary, cache_dir=cache_dir)
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.skipped: dict[
            str, str
        ] = {}  # file -> reason; `loader` brings in what its workers found
        self._bad: dict[int, str] = {}
        self._epoch_order: tuple[int, np.ndarray] | None = None
        if shuffle_captions:
            if len(self.files) < 2:
                raise ValueError(
                    f"{folder} has 1 file; shuffle_captions needs captions of another one: add media"
                )
            # one cycle through all files: nobody keeps the own captions
            cycle = _permutation(len(self.files), seed, _OTHER_CAPTIONS)
            self.clips.captions_from[cycle] = np.roll(cycle, 1)

    @property
    def files(self) -> tuple[str, ...]:
        return self.clips.files

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.files) // (self.batch_size * self.world))

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        size = self.batch_size
        everyone = self._files_of(step)  # all ranks' rows
        mine = slice(self.rank * size, (self.rank + 1) * size)
        places = _uniform(size * self.world, self.seed, _WINDOW, step)[mine]
        batch = self.clips.empty_batch(size)
        files, skipped = [], []
        for row, (planned, place) in enumerate(zip(everyone[mine], places, strict=True)):
            for index in self._candidates(int(planned), everyone, step, row):
                if self._read(batch, row, index, place):
                    files.append(self.files[index])
                    break
                skipped.append(Skipped(self.files[index], self._bad[index]))
            else:
                reason = next(iter(self._bad.values()))
                raise MediaError(
                    f"none of the {len(self.files)} files in {self.clips.folder} can be decoded; the first one: {reason}"
                )
        self.skipped.update((one.file, one.reason) for one in skipped)
        return _to_batch(batch, files, dict.fromkeys(skipped))

    def _files_of(self, step: int) -> np.ndarray:
        total, count = self.batch_size * self.world, len(self.files)
        if count >= total:
            epoch, within = divmod(step, self.steps_per_epoch)
            return self._order(epoch)[within * total : (within + 1) * total]
        rows = np.arange(step * total, (step + 1) * total)
        return np.array([self._order(int(row // count))[row % count] for row in rows])

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, _permutation(len(self.files), self.seed, _ORDER, epoch))
        return self._epoch_order[1]

    def _candidates(self, planned: int, everyone: np.ndarray, step: int, row: int) -> Iterator[int]:
        """The planned file, then who stands in for it: first files that this batch does not hold yet, each in a fixed random order."""
        yield planned
        others = _permutation(
            len(self.files), self.seed, _REPLACEMENT, step, self.rank * self.batch_size + row
        )
        present = np.isin(others, everyone)
        yield from (
            int(index) for index in (*others[~present], *others[present]) if index != planned
        )

    def _read(self, batch: dict[str, np.ndarray], row: int, index: int, place: float) -> bool:
        if index in self._bad:
            return False
        try:
            self.clips.read_into(batch, row, index, lambda count: int(place * count))
        except MediaError as error:
            self._bad[index] = str(error)
            return False
        return True


class ClipLoader(DataLoader):
    """A DataLoader that brings the corrupt files its workers met into ``dataset.skipped`` of this process."""

    dataset: "ClipDataset | _EvaluationBatches"

    def __iter__(self):
        for batch in super().__iter__():
            self.dataset.skipped.update((one.file, one.reason) for one in batch.skipped)
            yield batch


def loader(
    dataset: ClipDataset,
    start_step: int,
    stop_step: int,
    workers: int = 0,
    pin_memory: bool = False,
    start_method: str | None = None,
) -> ClipLoader:
    """Batches ``start_step`` .. ``stop_step - 1`` in order; the same ones for any number of worker processes.

    ``start_method`` is multiprocessing's: "spawn" where this process has threads that do not survive a fork.
    """
    if not 0 <= start_step <= stop_step:
        raise ValueError(f"steps {start_step} to {stop_step}; they must be in order and 0 or later")
    return _loader(dataset, range(start_step, stop_step), workers, pin_memory, start_method)


def _loader(
    dataset: "ClipDataset | _EvaluationBatches",
    steps: range,
    workers: int,
    pin_memory: bool = False,
    start_method: str | None = None,
) -> ClipLoader:
    options: dict[str, Any] = (
        dict(persistent_workers=True, multiprocessing_context=start_method) if workers else {}
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
    cache_dir: str | os.PathLike | None = None,
    workers: int = 0,
) -> Iterator[Batch]:
    """Every file once, in sorted order, at one window; the last batch may be smaller.

    ``place`` says where the window lies between the file's first (0) and last (1) possible one; 0.5 is its middle. ``start`` asks for
    a time in seconds instead, rounded to the frames' grid. A corrupt file is left out and listed on the batch it would have been in.
    Raises MediaError where no file can be decoded, ValueError as ClipFolder.
    """
    if not 0 <= place <= 1:
        raise ValueError(f"place is {place}; it lies between 0, the first window, and 1, the last")
    if start is not None and not (math.isfinite(start) and start >= 0):
        raise ValueError(f"start is {start} s; it must be a finite time, 0 or later")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; a batch has at least 1 clip")
    batches = _EvaluationBatches(
        ClipFolder(folder, spec, vocabulary=vocabulary, cache_dir=cache_dir),
        batch_size,
        place,
        start,
    )
    return batches.run(workers)


class _EvaluationBatches(Dataset):
    def __init__(self, clips: ClipFolder, batch_size: int, place: float, start: float | None):
        self.clips, self.batch_size, self.place, self.start = clips, batch_size, place, start
        self.skipped: dict[str, str] = {}

    def _choose(self, count: int) -> int:
        if self.start is not None:
            return round(self.start * self.clips.spec.frames_per_second)
        return round(self.place * (count - 1))

    def __getitem__(self, step: int) -> Batch:
        planned = range(
            step * self.batch_size, min((step + 1) * self.batch_size, len(self.clips.files))
        )
        batch = self.clips.empty_batch(len(planned))
        files: list[str] = []
        skipped = []
        for index in planned:
            try:
                self.clips.read_into(batch, len(files), index, self._choose)
            except MediaError as error:
                skipped.append(Skipped(self.clips.files[index], str(error)))
            else:
                files.append(self.clips.files[index])
        return _to_batch(batch, files, skipped)

    def run(self, workers: int) -> Iterator[Batch]:
        found = 0
        for batch in _loader(
            self, range(math.ceil(len(self.clips.files) / self.batch_size)), workers
        ):
            found += len(batch)
            if len(batch):
                yield batch
            else:
                warnings.warn(
                    f"skipped a whole batch of corrupt files: {', '.join(one.file for one in batch.skipped)}",
                    stacklevel=2,
                )
        if not found:
            reason = next(iter(self.skipped.values()))
            raise MediaError(
                f"none of the {len(self.clips.files)} files in {self.clips.folder} can be decoded; the first one: {reason}"
            )


def folder_captions(folder: str | os.PathLike) -> dict[str, tuple[Caption, ...]]:
    """The captions of each media file of a folder, by its name; none for a file that captions.json leaves out.

    Media lie in the folder itself; those named with a path ("talks/one.mp4") may lie deeper. Raises ValueError as ClipFolder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder; name one with media files and, for text, a {CAPTIONS}"
        )
    captions = load_captions(folder / CAPTIONS) if (folder / CAPTIONS).exists() else {}
    for name in captions:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\\" in name:
            raise ValueError(
                f"{folder / CAPTIONS} names {name!r}; media lie inside the folder: name them relative to it"
            )
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder / CAPTIONS} has captions of {name!r}, which is not in {folder}; add the file or remove its captions"
            )
    with os.scandir(folder) as entries:
        present = [
            e.name
            for e in entries
            if e.is_file()
            and not e.name.startswith(".")
            and e.name.lower().endswith(MEDIA_SUFFIXES)
        ]
    if not (present or captions):
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
        hint = f"; it has the folders {', '.join(inside[:5])}: name one of them" if inside else ""
        raise ValueError(
            f"{folder} has no media files ({' '.join(MEDIA_SUFFIXES)}){hint or '; put some there or name another folder'}"
        )
    return {name: captions.get(name, ()) for name in {*present, *captions}}


class _Cache:
    """Whole files decoded at one spec's rates, one entry a file: a header, the frames, the samples.

    An entry's name holds everything that it depends on, and it appears in one step, complete: any number of processes may share the
    folder, and a changed file gets a new entry.
    """

    HEADER_BYTES = 256

    def __init__(self, folder: Path, spec: ClipSpec):
        self.folder = folder
        self.spec = spec
        sizes = [spec.height, spec.width, spec.frames_per_second, spec.sample_rate_hz]
        self._key = json.dumps(["vatt_fast clip 1", *sizes])
        folder.mkdir(parents=True, exist_ok=True)

    def read_into(
        self, path: Path, start_frame: Callable[[float], int], video: np.ndarray, audio: np.ndarray
    ) -> tuple[int, bool, bool]:
        """Fill zeroed ``video`` and ``audio`` with the window that ``start_frame``, given the duration, chooses.

        Returns its first frame and whether the file has video and audio. Raises MediaError for a corrupt file.
        """
        status = path.stat()
        name = f"{self._key} {path.absolute()} {status.st_size} {status.st_mtime_ns}"
        entry = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.clip"
        found = self._read(entry, start_frame, video, audio)
        if found is None:
            self._write(entry, path)
            found = self._read(entry, start_frame, video, audio)
            if found is None:
                raise OSError(
                    f"the cache entry {entry} of {path} cannot be read back; is the disk full or failing?"
                )
        return found

    def _read(
        self, entry: Path, start_frame: Callable[[float], int], video: np.ndarray, audio: np.ndarray
    ) -> tuple[int, bool, bool] | None:
        """None where there is no such entry, or only part of one."""
        try:
            file = open(entry, "rb", buffering=0)  # noqa: SIM115 (closed below)
        except FileNotFoundError:
            return None
        spec = self.spec
        with file:
            try:
                header = json.loads(file.read(self.HEADER_BYTES))
            except ValueError:
                return None
            frames, samples, is_image = header["frames"], header["samples"], header["is_image"]
            audio_at = self.HEADER_BYTES + (frames or 0) * video[0].nbytes
            if os.fstat(file.fileno()).st_size != audio_at + 4 * (samples or 0):
                return None
            first = start_frame(header["duration_seconds"])
            if frames is not None:
                from_frame = 0 if is_image else first
                self._fill(
                    file, self.HEADER_BYTES, from_frame, video[:1] if is_image else video, frames
                )
                if is_image:
                    video[1:] = video[0]
            if samples is not None:
                self._fill(
                    file,
                    audio_at,
                    round(first / spec.frames_per_second * spec.sample_rate_hz),
                    audio,
                    samples,
                )
        return first, frames is not None, samples is not None

    @staticmethod
    def _fill(file, table_at: int, first: int, rows: np.ndarray, available: int) -> None:
        """Read rows ``first`` and on of a table of ``available`` rows into ``rows``, as many as there are."""
        wanted = rows[: max(0, min(len(rows), available - first))]
        if len(wanted):
            file.seek(table_at + first * rows[0].nbytes)
            if file.readinto(wanted.data.cast("B")) != wanted.nbytes:
                raise OSError(f"{file.name} ended early though its size is right")

    def _write(self, entry: Path, path: Path) -> None:
        spec = self.spec
        with MediaReader(path) as reader:
            info = reader.info
            seconds = info.duration_seconds
            frames = (
                1 if info.is_image else max(1, math.ceil(seconds * spec.frames_per_second - 1e-6))
            )
            samples = max(1, math.ceil(seconds * spec.sample_rate_hz - 1e-6))
            whole = dataclasses.replace(spec, frames=frames, samples=samples)
            clip = reader.clip(start=0.0, **_clip_sizes(whole))
        header = {
            "duration_seconds": seconds,
            "is_image": info.is_image,
            "frames": None if clip.video is None else frames,
            "samples": None if clip.audio is None else samples,
        }
        part = entry.with_name(f".{uuid.uuid4().hex}.part")
        try:
            with open(part, "wb") as file:
                file.write(json.dumps(header).encode().ljust(self.HEADER_BYTES))
                for values in (clip.video, clip.audio):
                    if values is not None:
                        file.write(np.ascontiguousarray(values).data)
            part.replace(entry)
        finally:
            part.unlink(missing_ok=True)


def _clip_sizes(spec: ClipSpec) -> dict:
    return dict(
        num_frames=spec.frames,
        frames_per_second=spec.frames_per_second,
        height=spec.height,
        width=spec.width,
        num_samples=spec.samples,
        sample_rate_hz=spec.sample_rate_hz,
    )


def _random_bits(count: int, *key: int) -> np.ndarray:
    """(count,) uint64, the same for the same key on every platform and NumPy: both parts' streams are guaranteed, Generator's are not."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def _uniform(count: int, *key: int) -> np.ndarray:
    return (_random_bits(count, *key) >> np.uint64(11)) * 2.0**-53


def _permutation(count: int, *key: int) -> np.ndarray:
    return np.argsort(_random_bits(count, *key), kind="stable")
