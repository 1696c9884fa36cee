"""Media and captions as batches of fixed shape.

Each batch is a pure function of (seed, step, rank, world), and the rows of all ranks together are
one of (seed, step, batch of all ranks); ``order.py`` has the rules.

    folder/clip_00001.mp4, folder/talk.wav, ...
    folder/captions.json    or absent:
        {"clip_00001.mp4": [{"start": 0.2, "end": 1.1, "text": "..."}, ...], ...}

Nothing random is kept between steps, so a run resumes by asking for a later step, and any number
of loader workers gives the same batches. Windows begin on the grid of frames, where a decoded cache
and the file itself give the same clip.

Shapes: B clips, K kept patches, k values a patch.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from .augment import Box, ClipAugment, Key, augment_clip
from .cache import ClipCache
from .clips import (
    Batch,
    ClipSpec,
    DropToken,
    Shapes,
    Skipped,
    arrays_in,
    bytes_of,
    copy_kept_rows,
    many,
    row_shapes,
    spread,
    to_batch,
)
from .media import MediaError, MediaReader
from .media_bytes import read_ahead
from .order import OTHER_CAPTIONS, VERSION, WINDOWS, Order, Shuffle, uniform
from .source import Source, content_of, shares_of
from .sources import open_source
from .text import Vocabulary, nearest_times
from .torchcodec_reader import Decoder, reader_class

# So many files in a row that cannot be read are no accident of single files.
_GIVE_UP = 100

Arrays = dict[str, np.ndarray]


class Read(NamedTuple):
    """What came of one row: the example that it holds, and those that could not be read."""

    example: int  # -1: none
    skipped: tuple[Skipped, ...] = ()


class ClipFolder:
    """The media of a source and their captions, read one window at a time.

    Args:
        data: a folder, or a ``Source``.
        vocabulary: None leaves text out (``text_valid`` is False).
        cache_dir: each file is decoded once, whole, at the spec's rates, and windows are then read
            from disk: ``frames_per_second * height * width * 3 + 4 * sample_rate_hz`` bytes a
            second of media, so for folders of short clips.
        decoder: of pictures: pyav, or torchcodec where it loads.

    Raises:
        ValueError: the folder is missing or without media, captions are bad or of media that are
            not there.
    """

    def __init__(
        self,
        data: str | os.PathLike | Source,
        spec: ClipSpec,
        *,
        vocabulary: Vocabulary | None,
        cache_dir: str | os.PathLike | None = None,
        decoder: Decoder = "pyav",
    ):
        if cache_dir is not None and decoder != "pyav":
            raise ValueError(f"PyAV fills a cache; leave out cache_dir, or decoder {decoder!r}")
        self._reader = reader_class(decoder)
        self.source = open_source(data) if isinstance(data, str | os.PathLike) else data
        self.spec = spec
        self._words = None if vocabulary is None else self.source.encode(vocabulary, spec.words)
        # whose captions an example is given
        self.captions_from: Callable[[int], int] = _own
        self._cache = None if cache_dir is None else ClipCache(Path(cache_dir), spec)
        self.parts = tuple(getattr(self.source, "sources", (self.source,)))

    def __len__(self) -> int:
        return len(self.source)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all examples."""
        return tuple(map(self.source.name, range(len(self.source))))

    def empty_batch(self, size: int) -> Arrays:
        """Batch's arrays for ``size`` whole clips, nothing valid yet."""
        return zeros(many(size, row_shapes(self.spec)))

    def read_ahead(self, index: int) -> None:
        """Let the system fetch an example's file; not where a cache has it decoded."""
        if self._cache is None:
            read_ahead(self.source.place(index))

    def read_into(
        self,
        batch: Arrays,
        rows: Sequence[int],
        index: int,
        choose: Callable[[int], Sequence[int]],
        write: Callable[[int, np.ndarray, str], None] | None = None,
        middle: bool = False,
        changes: "Sequence[_Change] | None" = None,
    ) -> None:
        """Write a window of an example into each of ``rows`` of a batch, or none of them.

        Args:
            choose: gets the number of places where a window fits and names one for each row. In a
                segment that is shorter than a window there is one place, its start; what lies past
                its end is blank and silent, as past the end of a file.
            write: ``write(row, clip, modality)`` copies a clip into its row; None copies all.
            middle: the captions are those nearest to the middle window, not to the row's own.
            changes: how each row's clip is augmented.

        Raises:
            MediaError: a file that is corrupt, vanished or may not be read; nothing is written.
        """
        # a cache reads one whole clip to where it belongs, without another copy
        target = None
        if write is None and changes is None and len(rows) == 1:
            target = {name: batch[name][rows[0]] for name in ("video", "audio")}
        windows, centre = self._windows(index, choose, target, changes)
        for row, window in zip(rows, windows, strict=True):
            self._write(batch, row, window, write)
            self._write_text(batch, row, index, self._seconds(centre if middle else window.first))

    def _windows(
        self,
        index: int,
        choose: Callable[[int], Sequence[int]],
        target: Arrays | None,
        changes: "Sequence[_Change] | None",
    ) -> tuple[list["_Window"], int]:
        """Windows, and the first frame of the middle one. All are read before one is written.

        A cache writes into ``target``, where that is given.
        """
        spec, place = self.spec, self.source.place(index)
        begins, ends = self.source.segment(index)
        first = math.ceil(begins * spec.frames_per_second - 1e-6)
        places = 1

        def starts(duration_seconds: float) -> list[int]:
            nonlocal places
            upto = min(ends, duration_seconds)
            places = spec.places(upto - first / spec.frames_per_second)
            return [first + chosen for chosen in choose(places)]

        path: Any = place if place.is_part or place.is_remote else Path(place.path)
        try:
            if self._cache is not None:
                windows = self._cached(path, starts, target, ends)
                if changes is not None:
                    windows = [
                        window.changed(change.whole)
                        for window, change in zip(windows, changes, strict=True)
                    ]
            else:
                with self._reader(path) as reader:
                    windows = self._decoded(
                        reader, starts(reader.info.duration_seconds), index, changes, ends
                    )
        except OSError as error:
            # what fsspec raises names no file; the cache's disk, say, is another one
            named = place.path if place.is_remote and not error.filename else error.filename
            if named is None or os.fspath(named) != place.path:
                raise
            raise MediaError(
                f"{place.path} cannot be opened ({error.strerror or error})"
            ) from error
        return windows, first + spread(places, 1)[0]

    def _decoded(
        self,
        reader: MediaReader,
        starts: Sequence[int],
        index: int,
        changes: "Sequence[_Change] | None",
        until: float,
    ) -> list["_Window"]:
        options: dict[str, Any] = dict(
            only=self._only(index), until=until, **self.spec.reader_arguments()
        )
        seconds = [start / self.spec.frames_per_second for start in starts]
        if changes is not None:  # each has a part of the picture of its own
            options["box"] = [change.box for change in changes]
        clips = reader.clips(seconds, **options)
        windows = [
            _Window(start, clip.video, clip.audio, clip.video_valid, clip.audio_valid)
            for start, clip in zip(starts, clips, strict=True)
        ]
        if changes is not None:
            windows = [
                window.changed(change.values)
                for window, change in zip(windows, changes, strict=True)
            ]
        return windows

    def _cached(
        self, path: Any, starts: Callable[[float], list[int]], target: Arrays | None, until: float
    ) -> list["_Window"]:
        assert self._cache is not None
        windows: list[_Window] = []
        chosen: list[int] = []

        def start(duration_seconds: float) -> int:
            chosen[:] = starts(duration_seconds)
            return chosen[len(windows)]

        while not chosen or len(windows) < len(chosen):
            whole = target
            if whole is None:
                shapes = row_shapes(self.spec)
                whole = zeros({name: shapes[name] for name in ("video", "audio")})
            else:
                for values in whole.values():
                    values[:] = 0
            first, *valid = self._cache.read_into(path, start, **whole, until=until)
            windows.append(_Window(first, whole["video"], whole["audio"], *valid))
        return windows

    def _only(self, index: int) -> str | None:
        """The one kind of stream that the example's source has; what it lacks is not looked for."""
        has = self._part_of(index).has
        return None if has.video == has.audio else "video" if has.video else "audio"

    def _part_of(self, index: int) -> Source:
        locate = getattr(self.source, "locate", None)
        return self.source if locate is None else self.parts[locate(index)[0]]

    def _write(
        self,
        batch: Arrays,
        row: int,
        window: "_Window",
        write: Callable[[int, np.ndarray, str], None] | None,
    ) -> None:
        for name, values, valid in (
            ("video", window.video, window.video_valid),
            ("audio", window.audio, window.audio_valid),
        ):
            target = batch[name][row]
            batch[f"{name}_valid"][row] = valid
            if not valid or values is None:
                target[...] = 0
            # a cache may have written into the target itself
            elif not np.may_share_memory(values, target):
                if write is None:
                    target[:] = values
                else:
                    write(row, values, name)
        batch["start_seconds"][row] = self._seconds(window.first)[0]

    def _seconds(self, first: int) -> tuple[float, float]:
        """When a window that begins at a frame begins and ends."""
        start = first / self.spec.frames_per_second
        return start, start + self.spec.seconds

    def _write_text(self, batch: Arrays, row: int, index: int, window: tuple[float, float]) -> None:
        text, valid = batch["text"][row], batch["text_valid"][row]
        text[:], valid[:] = 0, False
        if self._words is None:
            return
        index = self.captions_from(index)
        times = self.source.captions(index).times
        nearest = nearest_times(times, window, self.spec.texts_per_clip)
        if len(nearest):
            text[: len(nearest)] = self._words(index)[nearest]
            # a sentence without words is no text
            valid[: len(nearest)] = text[: len(nearest)].any(axis=1)


@dataclass(frozen=True)
class _Window:
    """A window of a file: its first frame, its clips, and whether they hold anything."""

    first: int
    video: np.ndarray | None
    audio: np.ndarray | None
    video_valid: bool
    audio_valid: bool

    def changed(self, change: Callable[..., tuple[Any, Any]]) -> "_Window":
        """With what ``change`` makes of its video and audio, None where it has none."""
        video, audio = change(
            self.video if self.video_valid else None, self.audio if self.audio_valid else None
        )
        return dataclasses.replace(self, video=video, audio=audio)


@dataclass(frozen=True)
class _Change:
    """How one clip is augmented."""

    augment: ClipAugment
    key: Key

    def box(self, height: int, width: int) -> Box | None:
        """The part of a picture that is decoded to the clip's size; None: its centre."""
        return self.augment.crop(self.key, height, width)

    def values(
        self, video: np.ndarray | None, audio: np.ndarray | None
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Of a clip that was cropped by the reader."""
        return (
            None if video is None else self.augment.frames(self.key, video),
            None if audio is None else self.augment.sound(self.key, audio),
        )

    def whole(
        self, video: np.ndarray | None, audio: np.ndarray | None
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Of the middle of the picture at the clip's size, from a cache."""
        return augment_clip(self.augment, self.key, video, audio)


class ClipDataset(Dataset):
    """``dataset[step]`` is the batch of that step.

    Every file comes once an epoch, in a new order, each at a random window. A batch holds no file
    twice unless the folder is smaller than the batch; the files that do not fill an epoch's last
    batch sit that epoch out. A file that is corrupt, or vanished, is replaced by another one of the
    same source and listed, on the batch and in ``skipped``. Of several sources (``MixedSource``)
    each gives every batch its share.

    Args:
        data: a folder, or a ``Source``.
        batch_size: this rank's clips: rank r of ``world`` gets rows ``r * batch_size`` and on of a
            batch of ``world * batch_size``.
        shuffle_captions: every clip gets the captions of another one, always the same: a check that
            an evaluation can fail.
        drop_token: batches hold the patch rows that a step keeps; None: whole clips.
        augment: what changes clips at random, by (seed, step, row of the global batch).
        windows_per_decode: a file is opened for so many consecutive steps, each with a window of
            its own, so that none of them is another one's negative ("data echoing", Choi et al.,
            2019). A loader holds so many times two batches.
        decoder: as ``ClipFolder``.

    Raises:
        ValueError: an argument out of range, and as ``ClipFolder``.
    """

    def __init__(
        self,
        data: str | os.PathLike | Source,
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
        windows_per_decode: int = 1,
        decoder: Decoder = "pyav",
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; a batch has at least 1 clip")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be 0 or more")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of world {world}; ranks count from 0 to world - 1")
        if windows_per_decode < 1:
            raise ValueError(f"windows_per_decode is {windows_per_decode}; it must be at least 1")
        self.clips = ClipFolder(
            data, spec, vocabulary=vocabulary, cache_dir=cache_dir, decoder=decoder
        )
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.drop_token, self.augment = drop_token, augment
        self.steps_together = windows_per_decode
        self._last_settled: tuple[tuple[int, int], dict[int, Read]] | None = None
        # file -> reason; the loader brings in what its workers found
        self.skipped: dict[str, str] = dict(self.source.problems)
        parts = self.clips.parts
        self.order = Order(
            [part.blocks for part in parts],
            getattr(self.clips.source, "weights", [1.0]),
            batch_size * world,
            seed,
        )
        kept: dict[str, tuple[int, ...]] | None = None
        keeps: dict[str, np.ndarray] = {}
        if drop_token is not None:
            keeps = self._draw(0)
            kept = {
                name: (keeps[f"{name}_keep"].shape[-1], values)
                for name, values in drop_token.patch_values.items()
            }
        self._row_shapes = row_shapes(spec, kept)
        draws: Shapes = {name: (keep.shape, np.int32) for name, keep in keeps.items()}
        clips = many(windows_per_decode * batch_size, self._row_shapes)
        self._shapes = clips | many(windows_per_decode, draws)
        if shuffle_captions:
            for part in parts:
                if len(part) < 2:
                    raise ValueError(
                        f"{part.label} has 1 file; "
                        "shuffle_captions needs captions of another one: add media"
                    )
            self.clips.captions_from = _AnotherOne(self.order.starts, seed)

    @property
    def source(self) -> Source:
        return self.clips.source

    @property
    def files(self) -> tuple[str, ...]:
        return self.clips.files

    @property
    def steps_per_epoch(self) -> int:
        """Of the longest source, where there are several."""
        return self.order.steps_per_epoch * self.steps_together

    @property
    def batch_bytes(self) -> int:
        """Of a batch's arrays."""
        return bytes_of(self._shapes) // self.steps_together

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        fill = step // self.steps_together
        arrays = zeros(self.shapes(fill))
        self.begin(fill, arrays)
        reads = [self.read_row(fill, row, arrays) for row in range(self.batch_size)]
        return self.batch(step, arrays, reads)

    # What a loader asks for. Its memory is filled for ``steps_together`` steps at once, row by row:
    # fill f holds steps f * steps_together and on, one behind the other.

    def name(self, example: int) -> str:
        return self.source.name(example)

    def rows(self, fill: int) -> int:
        return self.batch_size

    def shapes(self, fill: int) -> Shapes:
        return self._shapes

    def begin(self, fill: int, arrays: Arrays) -> None:
        """Write what is known before any file is read: the kept indices."""
        if self.drop_token is not None:
            for window in range(self.steps_together):
                for name, keep in self._draw(fill * self.steps_together + window).items():
                    arrays[name][window] = keep

    def read_ahead(self, fill: int, row: int) -> None:
        """Let the system fetch what a row's planned example will be read from."""
        self.clips.read_ahead(int(self.order(fill)[self.rank * self.batch_size + row]))

    def read_row(
        self,
        fill: int,
        row: int,
        arrays: Arrays,
        reading: Callable[[int], None] = lambda example: None,
    ) -> Read:
        """Read a row's example, or one that stands in for it, into each of the fill's steps.

        Args:
            reading: is told each example before it is opened.

        Raises:
            MediaError: nothing that could stand in can be read.
        """
        whole_row = self.rank * self.batch_size + row  # of all ranks' batch
        drop = self.drop_token

        def write(place: int, clip: np.ndarray, modality: str) -> None:
            assert drop is not None
            if modality not in drop.patches:
                arrays[modality][place] = clip
                return
            window, within = divmod(place, self.batch_size)
            draws = np.atleast_2d(arrays[f"{modality}_keep"][window])
            keep = draws[within * len(draws) // self.batch_size]
            copy_kept_rows(clip, drop.patches[modality], keep, arrays[modality][place])

        rows = range(row, row + self.steps_together * self.batch_size, self.batch_size)

        def read(example: int) -> str | None:
            reading(example)
            return self._read(arrays, rows, fill, whole_row, example, write if drop else None)

        found = self._first_readable(self._candidates(fill, whole_row), read)
        if found.example < 0:
            # all its own stand-ins are corrupt too
            settled = self._settled(fill, self.order.source_of(fill, whole_row))[whole_row]
            found = Read(settled.example, found.skipped + settled.skipped)
            if reason := read(found.example):
                raise MediaError(reason)
        return found

    def batch(self, step: int, arrays: Mapping[str, np.ndarray], reads: Sequence[Read]) -> Batch:
        """One of a fill's steps, without a copy."""
        window = step % self.steps_together
        part = slice(window * self.batch_size, (window + 1) * self.batch_size)
        mine = {name: arrays[name][part] for name in self._row_shapes}
        if self.drop_token is not None:
            mine |= {name: arrays[name][window] for name in ("video_keep", "audio_keep")}
        skipped = [one for read in reads for one in read.skipped]
        self.skipped.update((one.file, one.reason) for one in skipped)
        return to_batch(mine, [self.source.name(read.example) for read in reads], skipped)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a position in the data to mean the same clips."""
        return {
            "order": VERSION,
            "examples": len(self.source),
            "data": content_of(self.source)[:16],
            "weights": shares_of(self.source),
            "batch": self.batch_size * self.world,
            "seed": self.seed,
            "windows_per_decode": self.steps_together,
        }

    def _draw(self, step: int) -> dict[str, np.ndarray]:
        """This step's kept indices."""
        assert self.drop_token is not None
        return self.drop_token.draw(
            self.batch_size, seed=self.seed, step=step, rank=self.rank, world=self.world
        )

    def _candidates(self, fill: int, row: int) -> Iterator[int]:
        """The planned example of a row of all ranks' batch, then those that may stand in for it."""
        yield int(self.order(fill)[row])
        yield from self.order.stand_ins(fill, row)

    def _first_readable(self, candidates: Iterable[int], read: Callable[[int], str | None]) -> Read:
        skipped: list[Skipped] = []
        for example in candidates:
            reason = read(example)
            if reason is None:
                return Read(example, tuple(skipped))
            skipped.append(Skipped(self.source.name(example), reason))
            if len(skipped) == _GIVE_UP:
                raise MediaError(
                    f"{_GIVE_UP} files of {self.source.label} in a row cannot be decoded; "
                    f"the first one: {skipped[0].reason}"
                )
        return Read(-1, tuple(skipped))

    def _settled(self, fill: int, source: int) -> dict[int, Read]:
        """What stands in for rows whose own stand-ins are corrupt: what no other row needs.

        So few of a source are left for a row only where a batch takes much of it. To know what
        other rows need, of any rank, their files are read too.
        """
        if self._last_settled is not None and self._last_settled[0] == (fill, source):
            return self._last_settled[1]
        scratch = self.clips.empty_batch(self.steps_together)

        def reader(row: int) -> Callable[[int], str | None]:
            rows = range(self.steps_together)
            return lambda example: self._read(scratch, rows, fill, row, example, None)

        rows = [int(row) for row in self.order.rows_of(fill, source)]
        found: dict[int, Read] = {}
        if self.order.epoch_steps[source]:
            for row in rows:
                found[row] = self._first_readable(self._candidates(fill, row), reader(row))
        else:  # each row's stand-ins were all there are
            found = dict.fromkeys(rows, Read(-1))
        taken = {read.example for read in found.values()}
        free = (one for one in self.order.others(fill, source) if one not in taken)
        settled = {}
        for row in (row for row in rows if found[row].example < 0):
            spare = self._first_readable(free, reader(row))
            if spare.example < 0:  # then any, and a file is twice in the batch
                again = self._first_readable(self.order.all(fill, source), reader(row))
                if again.example < 0:
                    raise MediaError(
                        f"none of the {self.order.counts[source]} files in "
                        f"{self.clips.parts[source].label} can be decoded; the first one: "
                        f"{again.skipped[0].reason}"
                    )
                spare = Read(again.example, spare.skipped + again.skipped)
            settled[row] = spare
        self._last_settled = (fill, source), settled
        return settled

    def _read(
        self,
        arrays: Arrays,
        rows: Sequence[int],
        fill: int,
        row: int,
        example: int,
        write: Callable[[int, np.ndarray, str], None] | None,
    ) -> str | None:
        """Read an example at a row's windows into ``rows``. Returns why it cannot be read."""
        total, first = self.batch_size * self.world, fill * self.steps_together
        steps = range(first, first + self.steps_together)
        places = [uniform(total, self.seed, WINDOWS, step)[row] for step in steps]
        options: dict[str, Any] = {} if write is None else {"write": write}
        if self.augment is not None:
            keys = (Key(self.seed, step, row) for step in steps)
            options["changes"] = [_Change(self.augment, key) for key in keys]
        try:
            self.clips.read_into(
                arrays, rows, example, lambda count: [int(at * count) for at in places], **options
            )
        except MediaError as error:
            return str(error)
        return None


class _AnotherOne:
    """Whose captions an example is given: one cycle through each source, so nobody keeps the own.

    Args:
        starts: the first example of each source, and last the number of examples.
    """

    def __init__(self, starts: np.ndarray, seed: int):
        self.starts = starts
        self.shuffles = [
            Shuffle(int(count), seed, OTHER_CAPTIONS, source)
            for source, count in enumerate(np.diff(starts))
        ]

    def __call__(self, index: int) -> int:
        source = int(np.searchsorted(self.starts, index, side="right")) - 1
        start, shuffle = int(self.starts[source]), self.shuffles[source]
        place = (shuffle.inverse(np.array([index - start])) + 1) % shuffle.count
        return start + int(shuffle(place)[0])


def _own(index: int) -> int:
    return index


def zeros(shapes: Shapes) -> Arrays:
    return arrays_in(np.zeros(bytes_of(shapes), np.uint8), shapes)
