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

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from torch.utils.data import Dataset

from .cache import ClipCache
from .clips import Batch, ClipSpec, DropToken, Skipped, copy_kept_rows, to_batch
from .media import MEDIA_SUFFIXES, MediaError, MediaReader
from .text import Caption, Vocabulary, load_captions, nearest_sentences

CAPTIONS = "captions.json"

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
    ) -> None:
        """Write a window of file ``index`` into ``row`` of a batch.

        Args:
            choose: gets the number of places where a window fits and names one.
            write: ``write(target, clip, modality)`` copies a clip into its place; None copies all.

        Raises:
            MediaError: a corrupt file; nothing is written.
        """
        rates = self.spec.frames_per_second

        def start_frame(duration_seconds: float) -> int:
            # the small term: 3.2 - 1.6 must count as 16 frames of 0.1 s
            spare = (duration_seconds - self.spec.seconds) * rates + 1e-6
            return choose(max(0, math.floor(spare)) + 1)

        path = self.folder / self.files[index]
        targets = {name: batch[name][row] for name in ("video", "audio")}
        clips: dict[str, np.ndarray | None]
        if self._cache is None:
            with MediaReader(path) as reader:
                first = start_frame(reader.info.duration_seconds)
                clip = reader.clip(start=first / rates, **self.spec.reader_arguments())
            clips = {"video": clip.video, "audio": clip.audio}
        else:
            # whole clips are read to where they belong, without another copy
            whole = targets if write is None else self._empty_clip()
            first, *found = self._cache.read_into(path, start_frame, **whole)
            clips = {
                name: value if has else None
                for (name, value), has in zip(whole.items(), found, strict=True)
            }
        for name, values in clips.items():
            batch[f"{name}_valid"][row] = values is not None
            if values is not None and values is not targets[name]:
                if write is None:
                    targets[name][:] = values
                else:
                    write(targets[name], values, name)
        start = first / rates
        batch["start_seconds"][row] = start
        captions_of = int(self.captions_from[index])
        self._write_text(batch, row, captions_of, (start, start + self.spec.seconds))

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


class ClipDataset(Dataset):
    """``dataset[step]`` is the batch of that step.

    Every file comes once an epoch, in a new order, each at a random window. A batch holds no file
    twice unless the folder is smaller than the batch; the files that do not fill an epoch's last
    batch sit that epoch out. A corrupt file is replaced by another one and listed, on the batch and
    in ``skipped``.

    Args:
        batch_size: this rank's clips: rank r of ``world`` gets rows ``r * batch_size`` and on of a
            batch of ``world * batch_size``.
        shuffle_captions: every clip gets the captions of another one, always the same: a check that
            an evaluation can fail.
        drop_token: batches hold the patch rows that a step keeps; None: whole clips.

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
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; a batch has at least 1 clip")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be 0 or more")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of world {world}; ranks count from 0 to world - 1")
        self.clips = ClipFolder(folder, spec, vocabulary=vocabulary, cache_dir=cache_dir)
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.drop_token = drop_token
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
        for row, (planned, place) in enumerate(zip(everyone[mine], places, strict=True)):
            for index in self._candidates(int(planned), everyone, step, row):
                if self._read(batch, row, index, place, keeps):
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

    def _candidates(self, planned: int, everyone: np.ndarray, step: int, row: int) -> Iterator[int]:
        """The planned file, then its replacements, in a fixed random order.

        Files that this batch does not hold yet come first.
        """
        yield planned
        others = _permutation(
            len(self.files), self.seed, _REPLACEMENT, step, self.rank * self.batch_size + row
        )
        present = np.isin(others, everyone)
        yield from (
            int(index) for index in (*others[~present], *others[present]) if index != planned
        )

    def _read(
        self,
        batch: dict[str, np.ndarray],
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

        try:
            self.clips.read_into(
                batch, row, index, lambda count: int(place * count), write if drop else None
            )
        except MediaError as error:
            self._bad[index] = str(error)
            return False
        return True


def folder_captions(folder: str | os.PathLike) -> dict[str, tuple[Caption, ...]]:
    """The captions of each media file of a folder, by its name.

    A file that captions.json leaves out has none. Media lie in the folder itself; those named with
    a path ("talks/one.mp4") may lie deeper. Raises ValueError as ``ClipFolder``.
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
                f"{folder / CAPTIONS} names {name!r}; "
                "media lie inside the folder: name them relative to it"
            )
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder / CAPTIONS} has captions of {name!r}, which is not in {folder}; "
                "add the file or remove its captions"
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
            f"{folder} has no media files ({' '.join(MEDIA_SUFFIXES)})"
            f"{hint or '; put some there or name another folder'}"
        )
    return {name: captions.get(name, ()) for name in {*present, *captions}}


def _random_bits(count: int, *key: int) -> np.ndarray:
    """(count,) uint64, the same for the same key on every platform and with every NumPy.

    NumPy guarantees the streams of both parts; those of Generator may change.
    """
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def _uniform(count: int, *key: int) -> np.ndarray:
    return (_random_bits(count, *key) >> np.uint64(11)) * 2.0**-53


def _permutation(count: int, *key: int) -> np.ndarray:
    return np.argsort(_random_bits(count, *key), kind="stable")
