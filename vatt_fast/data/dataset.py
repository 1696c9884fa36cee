"""A folder of media and captions as batches of fixed shape.

Each batch is a pure function of (seed, step, rank, world).

    folder/clip_00001.mp4, folder/talk.wav, ...
    folder/captions.json    or absent:
        {"clip_00001.mp4": [{"start": 0.2, "end": 1.1, "text": "..."}, ...], ...}

Nothing random is kept between steps, so a run resumes by asking for a later step, and any number
of loader workers gives the same batches. Windows begin on the grid of frames, where a decoded cache
and the file itself give the same clip.

Shapes: B clips, K kept patches, k values a patch.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from .augment import ClipAugment, Key, augment_clip
from .cache import ClipCache
from .clips import Batch, ClipSpec, DropToken, Skipped, copy_kept_rows, spread, to_batch
from .folder import folder_captions, warn_of_other_media
from .media import MediaError, MediaReader
from .text import Vocabulary, nearest_sentences

# One stream of random numbers for each decision: a new decision must not change the old ones.
_ORDER, _WINDOW, _REPLACEMENT, _OTHER_CAPTIONS = range(4)


class ClipFolder:
    """The media of one folder and their captions, read one window at a time.

    Args:
        vocabulary: None leaves text out (``text_valid`` is False).
        cache_dir: each file is decoded once, whole, at the spec's rates, and windows are then read
            from disk: ``frames_per_second * height * width * 3 + 4 * sample_rate_hz`` bytes a
            second of media, so for folders of short clips.

    Raises:
        ValueError: the folder is missing or without media, captions are bad or of media that are
            not there.
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
        warn_of_other_media(self.folder, self.captions)
        self.files = tuple(sorted(self.captions))
        self.captions_from = np.arange(len(self.files))  # whose captions a file is given
        self._cache = None if cache_dir is None else ClipCache(Path(cache_dir), spec)
        self._encoded: dict[int, np.ndarray] = {}

    def empty_batch(self, size: int, row_shapes: dict | None = None) -> dict[str, np.ndarray]:
        """Batch's arrays for ``size`` clips, nothing valid yet.

        They are NumPy's: assigning one element of a tensor takes microseconds. ``row_shapes`` are
        the shapes (K, k) of patch rows, by modality, instead of whole clips.
        """
        spec = self.spec
        shapes = row_shapes or self._clip_shapes
        return {
            "video": np.zeros((size, *shapes["video"]), np.uint8),
            "audio": np.zeros((size, *shapes["audio"]), np.float32),
            "text": np.zeros((size, spec.texts_per_clip, spec.words), np.int32),
            "video_valid": np.zeros(size, bool),
            "audio_valid": np.zeros(size, bool),
            "text_valid": np.zeros((size, spec.texts_per_clip), bool),
            "start_seconds": np.zeros(size),
        }

    @property
    def _clip_shapes(self) -> dict[str, tuple[int, ...]]:
        spec = self.spec
        return {"video": (spec.frames, spec.height, spec.width, 3), "audio": (spec.samples,)}

    def read_into(
        self,
        batch: dict[str, np.ndarray],
        row: int,
        index: int,
        choose: Callable[[int], int],
        write: Callable[[np.ndarray, np.ndarray, str], None] | None = None,
        augment: Callable[[np.ndarray | None, np.ndarray | None], tuple] | None = None,
    ) -> None:
        """Write a window of file ``index`` into ``row`` of a batch.

        Args:
            choose: gets the number of places where a window fits and names one.
            write: ``write(target, clip, modality)`` copies a clip into its place; None copies all.
            augment: what a window's video and audio, None where it has none, become.

        Raises:
            MediaError: a file that is corrupt, vanished or may not be read; nothing is written.
        """
        targets = {name: batch[name][row] for name in ("video", "audio")}
        # a cache reads whole clips to where they belong, without another copy
        whole = targets if write is None and augment is None else None
        window = self._window(index, choose, whole)
        if augment is not None:
            found = {"video": window.video_valid, "audio": window.audio_valid}
            given = (getattr(window, name) if valid else None for name, valid in found.items())
            video, audio = augment(*given)
            window = replace(window, video=video, audio=audio)
        self._write(batch, row, window, write)
        self._write_text(batch, row, index, self._seconds(window.first))

    def read_windows_into(
        self,
        batch: dict[str, np.ndarray],
        row: int,
        index: int,
        choose: Callable[[int], list[int]],
        windows: int,
    ) -> None:
        """Write several windows of file ``index`` into rows from ``row`` on, or none of them.

        Each row's captions are those nearest to the only window, or to the file's middle.

        Args:
            choose: gets the number of places where a window fits and names as many as ``windows``.

        Raises:
            MediaError: as ``read_into``.
        """
        count = 1

        def numbered(number: int) -> Callable[[int], int]:
            def start(places: int) -> int:
                nonlocal count
                count = places
                return choose(places)[number]

            return start

        # all are read before the first is written
        found = [self._window(index, numbered(number), None) for number in range(windows)]
        middle = found[0].first if windows == 1 else spread(count, 1)[0]
        for place, window in enumerate(found, row):
            self._write(batch, place, window, None)
            self._write_text(batch, place, index, self._seconds(middle))

    def _window(
        self, index: int, choose: Callable[[int], int], whole: dict[str, np.ndarray] | None
    ) -> "_Window":
        """One window; a cache writes it into zeroed ``whole``, where that is given."""
        path = self.folder / self.files[index]

        def start_frame(duration_seconds: float) -> int:
            return choose(self.spec.places(duration_seconds))

        try:
            if self._cache is not None:
                whole = whole or self._empty_clip()
                first, *valid = self._cache.read_into(path, start_frame, **whole)
                return _Window(first, whole["video"], whole["audio"], *valid)
            with MediaReader(path) as reader:
                first = start_frame(reader.info.duration_seconds)
                clip = reader.clip(
                    start=first / self.spec.frames_per_second, **self.spec.reader_arguments()
                )
            return _Window(first, clip.video, clip.audio, clip.video_valid, clip.audio_valid)
        except OSError as error:
            if error.filename is None or os.fspath(error.filename) != os.fspath(path):
                raise  # not of this file: the cache's disk, say
            raise MediaError(f"{path} cannot be opened ({error.strerror})") from error

    def _write(
        self,
        batch: dict[str, np.ndarray],
        row: int,
        window: "_Window",
        write: Callable[[np.ndarray, np.ndarray, str], None] | None,
    ) -> None:
        for name, values, valid in (
            ("video", window.video, window.video_valid),
            ("audio", window.audio, window.audio_valid),
        ):
            target = batch[name][row]
            batch[f"{name}_valid"][row] = valid
            # a cache may have written into the target itself
            if valid and values is not None and not np.may_share_memory(values, target):
                if write is None:
                    target[:] = values
                else:
                    write(target, values, name)
        batch["start_seconds"][row] = self._seconds(window.first)[0]

    def _seconds(self, first: int) -> tuple[float, float]:
        """When a window that begins at a frame begins and ends."""
        start = first / self.spec.frames_per_second
        return start, start + self.spec.seconds

    def _empty_clip(self) -> dict[str, np.ndarray]:
        shapes = self._clip_shapes
        return {
            "video": np.zeros(shapes["video"], np.uint8),
            "audio": np.zeros(shapes["audio"], np.float32),
        }

    def _write_text(
        self, batch: dict[str, np.ndarray], row: int, index: int, window: tuple[float, float]
    ) -> None:
        if self.vocabulary is None:
            return
        index = int(self.captions_from[index])
        captions = self.captions[self.files[index]]
        if index not in self._encoded:
            self._encoded[index] = self.vocabulary.encode(
                [caption.text for caption in captions], self.spec.words
            )
        nearest = nearest_sentences(captions, window, self.spec.texts_per_clip)
        if nearest:
            numbers = self._encoded[index][nearest]
            batch["text"][row, : len(nearest)] = numbers
            # a sentence without words is no text
            batch["text_valid"][row, : len(nearest)] = numbers.any(axis=1)


@dataclass(frozen=True)
class _Window:
    """A window of a file: its first frame, its clips, and whether they hold anything."""

    first: int
    video: np.ndarray | None
    audio: np.ndarray | None
    video_valid: bool
    audio_valid: bool


class ClipDataset(Dataset):
    """``dataset[step]`` is the batch of that step.

    Every file comes once an epoch, in a new order, each at a random window. A batch holds no file
    twice unless the folder is smaller than the batch; the files that do not fill an epoch's last
    batch sit that epoch out. A file that is corrupt, or vanished, is replaced by another one and
    listed, on the batch and in ``skipped``.

    Args:
        batch_size: this rank's clips: rank r of ``world`` gets rows ``r * batch_size`` and on of a
            batch of ``world * batch_size``.
        shuffle_captions: every clip gets the captions of another one, always the same: a check that
            an evaluation can fail.
        drop_token: batches hold the patch rows that a step keeps; None: whole clips.
        augment: what changes clips at random, by (seed, step, row of the global batch).

    Raises:
        ValueError: an argument out of range, and as ``ClipFolder``.
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
        drop_token: DropToken | None = None,
        augment: ClipAugment | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; a batch has at least 1 clip")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be 0 or more")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of world {world}; ranks count from 0 to world - 1")
        self.clips = ClipFolder(folder, spec, vocabulary=vocabulary, cache_dir=cache_dir)
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.drop_token, self.augment = drop_token, augment
        # file -> reason; the loader brings in what its workers found
        self.skipped: dict[str, str] = {}
        self._bad: dict[int, str] = {}
        self._epoch_order: tuple[int, np.ndarray] | None = None
        if shuffle_captions:
            if len(self.files) < 2:
                raise ValueError(
                    f"{folder} has 1 file; "
                    "shuffle_captions needs captions of another one: add media"
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

    @property
    def batch_bytes(self) -> int:
        """Of a batch's arrays."""
        one = self.clips.empty_batch(1, self._draw(0)[1])
        return self.batch_size * sum(array.nbytes for array in one.values())

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        size = self.batch_size
        everyone = self._files_of(step)  # all ranks' rows
        mine = slice(self.rank * size, (self.rank + 1) * size)
        places = _uniform(size * self.world, self.seed, _WINDOW, step)[mine]
        keeps, rows = self._draw(step)
        batch = self.clips.empty_batch(size, rows)
        files, skipped = [], []
        stand_ins = self._stand_ins(everyone, step)
        for row, (planned, place) in enumerate(zip(everyone[mine], places, strict=True)):
            for index in itertools.chain([int(planned)], stand_ins):
                if self._read(batch, step, row, index, place, keeps):
                    files.append(self.files[index])
                    break
                skipped.append(Skipped(self.files[index], self._bad[index]))
            else:
                reason = next(iter(self._bad.values()))
                raise MediaError(
                    f"none of the {len(self.files)} files in {self.clips.folder} can be decoded; "
                    f"the first one: {reason}"
                )
        self.skipped.update((one.file, one.reason) for one in skipped)
        return to_batch(batch, files, dict.fromkeys(skipped), keeps)

    def _draw(self, step: int) -> tuple[dict[str, np.ndarray] | None, dict | None]:
        """This step's kept indices, and the shapes of the rows they leave."""
        drop = self.drop_token
        if drop is None:
            return None, None
        keeps = drop.draw(self.batch_size, seed=self.seed, step=step, rank=self.rank)
        values = {"video": drop.config.video_patch_values, "audio": drop.config.audio_patch}
        return keeps, {name: (keeps[f"{name}_keep"].shape[-1], k) for name, k in values.items()}

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

    def _stand_ins(self, everyone: np.ndarray, step: int) -> Iterator[int]:
        """Replacements for one rank's corrupt files of a step, each for one row, in a fixed order.

        Those that no rank's batch holds come first, dealt out to the ranks, so that no clip is
        twice in a batch while there are others. Then any file stands in, again and again.
        """
        others = _permutation(len(self.files), self.seed, _REPLACEMENT, step)
        present = np.isin(others, everyone)
        yield from map(int, others[~present][self.rank :: self.world])
        while any(int(index) not in self._bad for index in others):
            yield from map(int, others)

    def _read(
        self,
        batch: dict[str, np.ndarray],
        step: int,
        row: int,
        index: int,
        place: float,
        keeps: dict[str, np.ndarray] | None,
    ) -> bool:
        if index in self._bad:
            return False
        drop = self.drop_token

        def write(target: np.ndarray, clip: np.ndarray, modality: str) -> None:
            assert drop is not None and keeps is not None
            draws = np.atleast_2d(keeps[f"{modality}_keep"])
            keep = draws[row * len(draws) // self.batch_size]
            copy_kept_rows(clip, drop.patches[modality], keep, target)

        change: Callable[..., tuple] | None = None
        if self.augment is not None:
            key = Key(self.seed, step, self.rank * self.batch_size + row)
            change = partial(augment_clip, self.augment, key)
        try:
            self.clips.read_into(
                batch, row, index, lambda count: int(place * count), write if drop else None, change
            )
        except MediaError as error:
            self._bad[index] = str(error)
            return False
        return True


def _random_bits(count: int, *key: int) -> np.ndarray:
    """(count,) uint64, the same for the same key on every platform and with every NumPy.

    NumPy guarantees the streams of both parts; those of Generator may change.
    """
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def _uniform(count: int, *key: int) -> np.ndarray:
    return (_random_bits(count, *key) >> np.uint64(11)) * 2.0**-53


def _permutation(count: int, *key: int) -> np.ndarray:
    return np.argsort(_random_bits(count, *key), kind="stable")
