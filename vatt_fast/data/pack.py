"""Shards of small pictures with many key frames, made of any source, so that training decodes less.

    out/00000.tar          000000000.mp4, 000000000.json, ... as webdataset lays them out
    out/00000_stats.json   what is in it, and what could not be read
    out/pack.json          what was asked for

An example becomes a file of its own: its segment alone, its captions in the file's own time. Frames
are at a clip's rate, so that none is decoded to be left out. Sound is mono, AAC.

Shapes: T frames, H rows, W columns, S samples.
"""

import dataclasses
import io
import json
import math
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..files import check_folder, only_writer, remove_litter, replacing, write_text
from .media import MediaError, MediaReader, frames_within, samples_within
from .media_bytes import read_bytes
from .media_scan import import_av
from .media_writer import h264_options
from .source import Place, Source
from .tasks import do_all

# what of a file is decoded at a time
CHUNK_SECONDS = 10.0
# clips by which the gain is measured
SAMPLED = 16
_AAC_SAMPLES = 1024
_WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Packing:
    """How examples are written.

    Args:
        short_side: pixels of the shorter side; smaller pictures stay as they are.
        frames_per_second: of the model's clips, or a multiple of it.
        key_frames: frames from one key frame to the next: a window is decoded from the key frame
            before it.
        crf: quality of H.264; lower is better, and larger.
        sample_rate_hz: of the sound.
        audio_bit_rate: of the sound, in bits a second.
        examples_per_shard: the number that lie in one tar.
    """

    short_side: int = 256
    frames_per_second: float = 10.0
    key_frames: int = 10
    crf: int = 23
    sample_rate_hz: int = 48000
    audio_bit_rate: int = 96000
    examples_per_shard: int = 256

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.short_side % 2:
            raise ValueError(f"short_side is {self.short_side}; 4:2:0 video needs even sizes")


@dataclass(frozen=True)
class Packed:
    """What was written.

    Args:
        bytes: of the shards. source_bytes: of the files that were read.
        problems: examples that could not be read, by name, each with the reason.
    """

    shards: int
    clips: int
    bytes: int
    source_bytes: int
    problems: dict[str, str]


def pack(
    source: Source,
    out: str | os.PathLike,
    packing: Packing = Packing(),
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Packed:
    """Write a source into shards; shards that are there already stay.

    The same source and packing give the same shards, whenever the work was interrupted.

    Args:
        out: a folder, which is made.
        workers: processes, each at a shard of its own.
        progress: told how many shards are done, and of how many.

    Raises:
        ValueError: no such folder can be made, or it holds shards of something else.
        OSError: something could not be written. Finished shards stay.
    """
    folder = Path(out)
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder):
        remove_litter(folder)
        asked = {
            "source": source.identity.digest,
            "captions": source.identity.captions,
            **dataclasses.asdict(packing),
        }
        _agree(folder / "pack.json", asked)
        size = packing.examples_per_shard
        tasks = [
            _Shard(source, packing, str(folder / f"{number:05d}.tar"), first)
            for number, first in enumerate(range(0, len(source), size))
        ]
        do_all(
            _write_shard,
            tasks,
            workers,
            is_done=lambda task: task.is_done,
            name=lambda task: task.source.name(task.first),
            progress=progress,
        )
        told = [json.loads(task.stats.read_text(encoding="utf-8")) for task in tasks]
    problems = dict(source.problems)
    for each in told:
        problems |= each["problems"]
    return Packed(
        len(tasks),
        sum(each["clips"] for each in told),
        sum(os.path.getsize(task.target) for task in tasks),
        sum(each["source_bytes"] for each in told),
        problems,
    )


def _agree(path: Path, asked: dict[str, Any]) -> None:
    if not path.exists():
        write_text(path, json.dumps(asked, indent=1))
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); pack into another folder") from error
    other = [name for name, value in asked.items() if found.get(name) != value]
    if other:
        raise ValueError(
            f"{path.parent} was packed with another {', '.join(other)}; pack into another folder, "
            "or ask for the same"
        )


@dataclass(frozen=True)
class _Shard:
    """The examples from ``first`` on, to be written to ``target``."""

    source: Source
    packing: Packing
    target: str
    first: int

    @property
    def stats(self) -> Path:
        return Path(self.target.removesuffix(".tar") + "_stats.json")

    @property
    def is_done(self) -> bool:
        # the tar comes last
        return Path(self.target).exists() and self.stats.exists()


def _write_shard(task: _Shard) -> None:
    problems: dict[str, str] = {}
    read: dict[tuple[str, int], int] = {}
    clips = 0
    with replacing(task.target) as part:
        with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
            last = min(task.first + task.packing.examples_per_shard, len(task.source))
            for index in range(task.first, last):
                place = task.source.place(index)
                try:
                    suffix, data, about = _example(task.source, index, task.packing)
                except (MediaError, OSError) as error:
                    problems[task.source.name(index)] = str(error)
                    continue
                text = json.dumps(about, ensure_ascii=False).encode(errors="backslashreplace")
                for name, values in ((suffix, data), (".json", text)):
                    member = tarfile.TarInfo(f"{index:09d}{name}")
                    member.size = len(values)
                    tar.addfile(member, io.BytesIO(values))
                read[place.path, place.offset] = _size(place)
                clips += 1
        told = {"clips": clips, "source_bytes": sum(read.values()), "problems": problems}
        write_text(task.stats, json.dumps(told, ensure_ascii=True, indent=1))


def _size(place: Place) -> int:
    if place.size is not None:
        return place.size
    return 0 if place.is_remote else os.path.getsize(place.path) - place.offset


def _example(source: Source, index: int, packing: Packing) -> tuple[str, bytes, dict[str, Any]]:
    """The suffix and bytes of an example's media, and what its JSON says."""
    place = source.place(index)
    start, end = source.segment(index)
    with MediaReader(place) as reader:
        info = reader.info
        seconds = max(min(end, info.duration_seconds) - start, 0.0)
        if info.is_image:
            suffix, data = os.path.splitext(place.name)[1].lower(), read_bytes(place)
        elif seconds <= 0:
            raise MediaError(
                f"{place.name} ends at {info.duration_seconds:.2f} s, before its segment from "
                f"{start:.2f} s on; correct the segment"
            )
        else:
            suffix, data = _encoded(reader, start, seconds, packing)
    times, texts = source.captions(index)
    about: dict[str, Any] = {"name": source.name(index), "start_in_source": start}
    if not info.is_image:
        about["duration"] = seconds
    said = [
        (float(first) - start, float(last) - start, text)
        for (first, last), text in zip(times, texts, strict=True)
        if last > start and (first < start + seconds or info.is_image)
    ]
    if all(first <= 0 and last == math.inf for first, last, _ in said):
        about["caption"] = [text for *_, text in said]
    else:
        about["captions"] = [
            {"start": max(first, 0.0), "end": min(last, seconds), "text": text}
            for first, last, text in said
        ]
    return suffix, data, about


def _encoded(
    reader: MediaReader, start: float, seconds: float, packing: Packing
) -> tuple[str, bytes]:
    """A stretch of a file, small: the suffix and the bytes."""
    info = reader.info
    height, width = _small(*reader.displayed_size, packing.short_side) if info.has_video else (2, 2)
    buffer = io.BytesIO()
    wrote = False
    with import_av().open(buffer, "w", format="mp4") as container:
        video = _Video(container, height, width, packing) if info.has_video else None
        audio = _Audio(container, packing) if info.has_audio else None
        for first, count in _chunks(seconds):
            clip = reader.clip(
                start=start + first,
                num_frames=max(frames_within(count, packing.frames_per_second), 1),
                frames_per_second=packing.frames_per_second,
                height=height,
                width=width,
                box=_WHOLE,
                num_samples=max(samples_within(count, packing.sample_rate_hz), 1),
                sample_rate_hz=packing.sample_rate_hz,
            )
            wrote |= clip.video_valid or clip.audio_valid
            if video and clip.video is not None:
                video.write(clip.video, round(first * packing.frames_per_second), clip.shown)
            if audio and clip.audio is not None:
                audio.write(clip.audio, round(first * packing.sample_rate_hz), clip.heard)
        for stream in (video, audio):
            if stream:
                stream.finish()
    if not wrote:
        raise MediaError(f"{reader.name} holds nothing from {start:.2f} s on; leave it out")
    return (".mp4" if info.has_video else ".m4a"), buffer.getvalue()


def _chunks(seconds: float) -> Iterator[tuple[float, float]]:
    """(start, length) of stretches that are decoded at a time."""
    for number in range(max(math.ceil(seconds / CHUNK_SECONDS - 1e-9), 1)):
        first = number * CHUNK_SECONDS
        yield first, min(CHUNK_SECONDS, seconds - first)


def _small(height: int, width: int, short_side: int) -> tuple[int, int]:
    scale = min(1.0, short_side / min(height, width))
    return max(2 * round(height * scale / 2), 2), max(2 * round(width * scale / 2), 2)


class _Video:
    def __init__(self, container: Any, height: int, width: int, packing: Packing) -> None:
        av = import_av()
        self.container = container
        self.rate = Fraction(packing.frames_per_second).limit_denominator(10000)
        codec, options = h264_options(packing.crf, packing.key_frames)
        self.stream = container.add_stream(codec, rate=self.rate)
        self.stream.height, self.stream.width = height, width
        self.stream.pix_fmt, self.stream.options = "yuv420p", options
        self.stream.codec_context.thread_count = 1
        self.frame_of = av.VideoFrame.from_ndarray

    def write(self, frames: np.ndarray, first: int, held: tuple[int, int]) -> None:
        """Frames (T, H, W, 3), of which the file holds some; the first one's number."""
        for place in range(*held):
            frame = self.frame_of(frames[place], format="rgb24")
            frame.pts, frame.time_base = first + place, 1 / self.rate
            self.container.mux(self.stream.encode(frame))

    def finish(self) -> None:
        self.container.mux(self.stream.encode(None))


class _Audio:
    def __init__(self, container: Any, packing: Packing) -> None:
        self.container, self.rate = container, packing.sample_rate_hz
        self.stream = container.add_stream("aac", rate=self.rate, layout="mono")
        self.stream.bit_rate = packing.audio_bit_rate
        # no noise that decoders make up: every window is its slice of the whole
        self.stream.options = {"aac_coder": "fast", "aac_pns": "0"}
        self.waiting = np.zeros(0, np.float32)
        self.place = 0  # of the first sample that waits

    def write(self, samples: np.ndarray, first: int, held: tuple[int, int]) -> None:
        """Samples (S,), of which the file holds some; the first one's number."""
        begin, end = held
        if end <= begin:
            return
        if not len(self.waiting) and not self.place:
            self.place = first + begin
        # silence where pieces do not meet
        gap = max(first + begin - self.place - len(self.waiting), 0)
        self.waiting = np.concatenate([self.waiting, np.zeros(gap, np.float32), samples[begin:end]])
        whole = len(self.waiting) // _AAC_SAMPLES * _AAC_SAMPLES
        self._encode(whole)

    def _encode(self, count: int) -> None:
        av = import_av()
        for at in range(0, count, _AAC_SAMPLES):
            piece = self.waiting[at : min(at + _AAC_SAMPLES, count)]
            frame = av.AudioFrame.from_ndarray(piece[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = self.rate, self.place + at
            frame.time_base = Fraction(1, self.rate)
            self.container.mux(self.stream.encode(frame))
        self.waiting, self.place = self.waiting[count:], self.place + count

    def finish(self) -> None:
        self._encode(len(self.waiting))
        self.container.mux(self.stream.encode(None))


def clips_per_second(
    pairs: list[tuple[Place, float, Place]], window: dict[str, Any], rounds: int = 3
) -> tuple[float, float]:
    """How many clips a core decodes in a second: of originals, and of what they became.

    Args:
        pairs: a file, where its example begins in seconds, and the packed file. The same windows
            are read of both, in turn.
        window: the sizes, under the names of ``MediaReader.clip``.
    """
    seconds = [0.0, 0.0]
    length = window["num_frames"] / window["frames_per_second"]
    clips = 0
    for number in range(rounds):
        for original, begins, packed in pairs:
            with MediaReader(packed) as reader:
                spare = max(reader.info.duration_seconds - length, 0.0)
            at = spare * (number + 0.5) / rounds
            for which, (place, start) in enumerate(((original, begins + at), (packed, at))):
                began = time.process_time()
                with MediaReader(place) as reader:
                    reader.clip(start=start, **window)
                seconds[which] += time.process_time() - began
            clips += 1
    return clips / seconds[0], clips / seconds[1]


def sample(source: Source, out: str | os.PathLike) -> list[tuple[Place, float, Place]]:
    """Some packed examples and what they were, as ``clips_per_second`` takes them."""
    found = []
    for tar in sorted(Path(out).glob("*.tar")):
        with tarfile.open(tar) as members:
            for member in members:
                stem, suffix = os.path.splitext(member.name)
                if suffix == ".mp4":
                    place = Place(
                        str(tar), f"{tar.name}/{member.name}", member.offset_data, member.size
                    )
                    found.append((int(stem), place))
        if len(found) >= 64 * SAMPLED:
            break
    chosen = found[:: max(len(found) // SAMPLED, 1)][:SAMPLED]
    return [(source.place(index), source.segment(index)[0], place) for index, place in chosen]
