"""Decoded media on disk: whole files at one spec's rates, read one window at a time."""

import dataclasses
import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import numpy as np

from .clips import ClipSpec
from .media import MediaReader, frames_within, samples_within
from .media_bytes import identity, place_of
from .source import Place


class ClipCache:
    """Whole files decoded at one spec's rates, one entry a file: a header, the frames, the samples.

    An entry's name holds everything that it depends on, and it appears in one step, complete. So
    any number of processes may share the folder, and a changed file gets a new entry. Entries hold
    the middle of each picture; other parts are cropped from what ``read_into`` gives.
    """

    HEADER_BYTES = 256

    def __init__(self, folder: Path, spec: ClipSpec):
        self.folder = folder
        self.spec = spec
        sizes = [spec.height, spec.width, spec.frames_per_second, spec.sample_rate_hz]
        self._key = json.dumps(["vatt_fast clip 3", *sizes])
        folder.mkdir(parents=True, exist_ok=True)

    def read_into(
        self,
        path: Path | Place,
        start_frame: Callable[[float], int],
        video: np.ndarray,
        audio: np.ndarray,
        until: float = math.inf,
    ) -> tuple[int, bool, bool]:
        """Fill zeroed ``video`` and ``audio`` with a window.

        ``start_frame`` chooses it, given the duration; from ``until`` seconds on it holds nothing.
        Returns its first frame and whether there is video and audio in it. Raises MediaError for a
        corrupt file, OSError for one that cannot be opened.
        """
        place = place_of(path)
        name = f"{self._key} {identity(place)}"
        entry = self.folder / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.clip"
        found = self._read(entry, start_frame, video, audio, until)
        if found is None:
            self._write(entry, place)
            found = self._read(entry, start_frame, video, audio, until)
            if found is None:
                raise OSError(
                    f"the cache entry {entry} of {place.name} cannot be read back; "
                    "is the disk full or failing?"
                )
        return found

    def _read(
        self,
        entry: Path,
        start_frame: Callable[[float], int],
        video: np.ndarray,
        audio: np.ndarray,
        until: float,
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
            start = first / spec.frames_per_second
            from_sample = round(start * spec.sample_rate_hz)
            if until < math.inf and not is_image:
                video = video[: frames_within(until - start, spec.frames_per_second)]
                audio = audio[: samples_within(until - start, spec.sample_rate_hz)]
            if is_image:
                self._fill(file, self.HEADER_BYTES, 0, video[:1], frames)
                video[1:] = video[0]
            elif frames is not None:
                self._fill(file, self.HEADER_BYTES, first, video, frames)
            if samples is not None:
                self._fill(file, audio_at, from_sample, audio, samples)
        shows = is_image or _overlap(header["shown"], first, len(video))
        return first, shows, _overlap(header["heard"], from_sample, len(audio))

    @staticmethod
    def _fill(file: FileIO, table_at: int, first: int, rows: np.ndarray, available: int) -> None:
        """Read rows ``first`` and on of a table of ``available`` rows, as many as there are."""
        wanted = rows[: max(0, min(len(rows), available - first))]
        if len(wanted):
            file.seek(table_at + first * rows[0].nbytes)
            if file.readinto(wanted.data.cast("B")) != wanted.nbytes:
                raise OSError(f"{file.name} ended early though its size is right")

    def _write(self, entry: Path, place: Place) -> None:
        spec = self.spec
        with MediaReader(place) as reader:
            info = reader.info
            seconds = info.duration_seconds
            frames = (
                1 if info.is_image else max(1, math.ceil(seconds * spec.frames_per_second - 1e-6))
            )
            samples = max(1, math.ceil(seconds * spec.sample_rate_hz - 1e-6))
            whole = dataclasses.replace(spec, frames=frames, samples=samples)
            clip = reader.clip(start=0.0, **whole.reader_arguments())
        header = {
            "duration_seconds": seconds,
            "is_image": info.is_image,
            "frames": None if clip.video is None else frames,
            "samples": None if clip.audio is None else samples,
            "shown": clip.shown,
            "heard": clip.heard,
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


def _overlap(held: tuple[int, int], first: int, count: int) -> bool:
    """Whether a window of ``count`` from ``first`` on holds any of what a file holds."""
    return max(held[0], first) < min(held[1], first + count)
