"""Media files to arrays: frames at any rate, mono sound at any rate, in sync.

Video and sound are decoded by PyAV, pictures by Pillow. Time 0 is the start of the file's
presentation. Frame i of a clip is the one on screen at
``start + i / frames_per_second``: the latest at or before that time, by its time stamp. Sample j is
the sound at ``start + j / sample_rate_hz``. Where a file shows nothing, before its start or past
its end, a clip holds black frames and silence: zeros, as patches are padded with.
``media_writer.py`` goes the other way.

Shapes: T frames, H rows, W columns, S samples, C channels.
"""

import bisect
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .media_file import (
    MAX_PIXELS,
    STAMP_TOLERANCE_SECONDS,
    MediaError,
    MediaFile,
    MediaInfo,
    frame_seconds,
    held_seconds,
)
from .media_scaling import Scaler
from .media_scan import import_av
from .pictures import (
    Box,
    checked_box,
    is_picture,
    orientation_of_matrix,
    oriented,
    part_of,
    picture_size,
    read_picture,
    stored_part,
)
from .source import Place

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MEDIA_SUFFIXES = VIDEO_SUFFIXES + AUDIO_SUFFIXES + IMAGE_SUFFIXES

# Sound is decoded from a little earlier than asked: lossy decoders need the packets before it, and
# the resampler needs the length of its filter.
PREROLL_SECONDS = 0.2
MARGIN_SECONDS = 0.02
# Rounded stamps must not tear contiguous sound apart; a larger jump is a real gap.
JITTER_SECONDS = 5e-3
# The longest frame of the usual codecs (HE-AAC): the last one may reach this far past the end of
# the sound.
CODEC_FRAME_SAMPLES = 2048
# The lengths of Vorbis' frames are multiples of it, at the block sizes of its encoders.
VORBIS_UNIT = 64
# Louder than full scale by this factor is not sound but numbers in another unit.
LOUDEST = 64.0
SLOWEST_HZ, FASTEST_HZ = 1_000, 1_000_000
# Windows that begin this long after the end of another, or earlier, are read in one go.
NEAR_SECONDS = 2.0
# Parts of pictures for which scaling is set up at a time.
MOST_SCALERS = 8
_SQUAREST, _FLATTEST = 1 / 16, 16  # pixels of other shapes are a damaged header's


@dataclass(frozen=True)
class Clip:
    """One raw example: video (T, H, W, 3) uint8 and audio (S,) float32 in [-1, 1].

    None stands for a stream that the file does not have. ``shown`` and ``heard`` are the first and
    past the last index of the frames and samples that the file holds; the others are zeros.
    """

    video: np.ndarray | None
    audio: np.ndarray | None
    shown: tuple[int, int] = (0, 0)
    heard: tuple[int, int] = (0, 0)

    @property
    def video_valid(self) -> bool:
        """Whether the window holds a picture."""
        return self.shown[1] > self.shown[0]

    @property
    def audio_valid(self) -> bool:
        """Whether the window holds sound, silence included."""
        return self.heard[1] > self.heard[0]


def frames_within(seconds: float, frames_per_second: float) -> int:
    """How many frames begin before so many seconds have passed."""
    return max(math.ceil(seconds * frames_per_second - 1e-6), 0)


def samples_within(seconds: float, sample_rate_hz: int) -> int:
    return max(round(seconds * sample_rate_hz), 0)


def _blank(values: np.ndarray | None, held: tuple[int, int], count: int) -> tuple[int, int]:
    """Zero what lies from ``count`` on. Returns what of the values is held then."""
    if values is not None:
        values[count:] = 0
    begin, end = held[0], min(held[1], count)
    return (begin, end) if end > begin else (0, 0)


def probe(path: str | os.PathLike | Place) -> MediaInfo:
    """Duration and streams of a file.

    Where the container only guesses its duration, it is measured, by reading the file through.

    Raises:
        MediaError: a corrupt file.
        FileNotFoundError: no such file.
    """
    with MediaReader(path) as reader:
        return reader.info


def read_video(
    path: str | os.PathLike | Place,
    *,
    start: float,
    num_frames: int,
    frames_per_second: float,
    height: int,
    width: int,
    box: Box = None,
) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 RGB from ``start`` seconds on.

    The picture is scaled to cover height x width and cropped around its centre. Rotations, mirror
    marks and non-square pixels are applied; what is transparent is white. An image file is a video
    of one repeated frame.

    Args:
        path: a file, a URL, or the place of a file's bytes in another one, as in a tar.
        box: the part (top, left, height, width) of the picture as it is shown, in fractions of it,
            that is scaled to height x width instead, whatever its shape; or a function of the
            picture's height and width in pixels that gives the part.

    Raises:
        MediaError: a corrupt file, or one without video.
        ValueError: arguments out of range.
    """
    with MediaReader(path) as reader:
        return reader.video(
            start=start,
            num_frames=num_frames,
            frames_per_second=frames_per_second,
            height=height,
            width=width,
            box=box,
        )


def read_audio(
    path: str | os.PathLike | Place, *, start: float, num_samples: int, sample_rate_hz: int
) -> np.ndarray:
    """Sound (S,) float32 in [-1, 1] from ``start`` seconds on: the mean of all channels.

    Raises:
        MediaError: a corrupt file, or one without audio.
        ValueError: arguments out of range.
    """
    with MediaReader(path) as reader:
        return reader.audio(start=start, num_samples=num_samples, sample_rate_hz=sample_rate_hz)


def read_clip(
    path: str | os.PathLike | Place,
    *,
    start: float,
    num_frames: int,
    frames_per_second: float,
    height: int,
    width: int,
    num_samples: int,
    sample_rate_hz: int,
    box: Box = None,
) -> Clip:
    """Video and audio of one window, in sync; None for a stream that the file does not have.

    It raises what ``read_video`` raises.
    """
    with MediaReader(path) as reader:
        return reader.clip(
            start=start,
            num_frames=num_frames,
            frames_per_second=frames_per_second,
            height=height,
            width=width,
            num_samples=num_samples,
            sample_rate_hz=sample_rate_hz,
            box=box,
        )


class MediaReader(MediaFile):
    """An open media file that can be read many times; a context manager.

    ``video``, ``audio`` and ``clip`` return what the functions ``read_...`` above return.
    """

    def _open(self) -> None:
        if not hasattr(self, "_scalers"):
            self._scalers: dict[tuple[float, ...], Scaler] = {}
        if hasattr(self, "info"):
            super()._open()
        elif self.name.lower().endswith(IMAGE_SUFFIXES) and is_picture(self.place):
            # by its name and content, before FFmpeg decodes it to see what it is
            self.info = MediaInfo(0.0, True, False, True)
        else:
            super()._open()
            if self.info.is_image and not is_picture(self.place):
                raise MediaError(f"{self.name} holds a picture of an unknown kind; convert it")

    @property
    def displayed_size(self) -> tuple[int, int]:
        """The height and width in pixels of the first picture as it is shown; it is decoded.

        A function given as ``box`` gets the same, without that.
        """
        if not self.info.has_video:
            raise MediaError(self.missing("video"))
        with self._naming_the_file():
            if self.info.is_image:
                return picture_size(self.place)
            for frame, _ in self._decode_from("video", 0.0):
                return _shown_size(frame, self._aspect(), orientation(frame)[1])
        raise MediaError(f"{self.name} holds no picture; remove the file")

    def clip(
        self,
        *,
        start: float,
        num_frames: int,
        frames_per_second: float,
        height: int,
        width: int,
        num_samples: int,
        sample_rate_hz: int,
        box: Box = None,
        only: str | None = None,
    ) -> Clip:
        """``only`` "video" or "audio": the other one is None, undecoded."""
        return self.clips(
            [start],
            num_frames=num_frames,
            frames_per_second=frames_per_second,
            height=height,
            width=width,
            num_samples=num_samples,
            sample_rate_hz=sample_rate_hz,
            box=box,
            only=only,
        )[0]

    def clips(
        self,
        starts: Sequence[float],
        *,
        num_frames: int,
        frames_per_second: float,
        height: int,
        width: int,
        num_samples: int,
        sample_rate_hz: int,
        box: Box | Sequence[Box] = None,
        only: str | None = None,
        until: float = math.inf,
    ) -> list[Clip]:
        """One clip a start. The pictures of windows near to one another are decoded once.

        ``box`` may be a list of boxes, one a start. From ``until`` seconds on clips hold zeros, as
        past the end of a file; still images do not end.
        """
        count = len(starts)
        pictures: list[Any] = [(None, (0, 0))] * count
        sounds: list[Any] = [(None, (0, 0))] * count
        if self.info.has_video and only != "audio":
            boxes: list[Any] = box if isinstance(box, list) else [box] * count
            if len(boxes) != count:
                raise ValueError(f"{len(boxes)} boxes for {count} windows; give one a window")
            pictures = self._videos(starts, num_frames, frames_per_second, height, width, boxes)
        if self.info.has_audio and only != "video":
            sounds = [self._audio(start, num_samples, sample_rate_hz) for start in starts]
        found = [
            Clip(video, audio, shown, heard)
            for (video, shown), (audio, heard) in zip(pictures, sounds, strict=True)
        ]
        if until == math.inf or self.info.is_image:
            return found
        return [
            Clip(
                clip.video,
                clip.audio,
                _blank(clip.video, clip.shown, frames_within(until - start, frames_per_second)),
                _blank(clip.audio, clip.heard, samples_within(until - start, sample_rate_hz)),
            )
            for clip, start in zip(found, starts, strict=True)
        ]

    def video(
        self,
        *,
        start: float,
        num_frames: int,
        frames_per_second: float,
        height: int,
        width: int,
        box: Box = None,
    ) -> np.ndarray:
        return self._videos([start], num_frames, frames_per_second, height, width, [box])[0][0]

    def _videos(
        self,
        starts: Sequence[float],
        num_frames: int,
        frames_per_second: float,
        height: int,
        width: int,
        boxes: Sequence[Box],
    ) -> list[tuple[np.ndarray, tuple[int, int]]]:
        """Each window's frames, and which of them the file holds."""
        for start in starts:
            _check_window(
                start,
                num_frames=num_frames,
                frames_per_second=frames_per_second,
                height=height,
                width=width,
            )
        if not self.info.has_video:
            raise MediaError(self.missing("video"))
        interval = 1 / frames_per_second
        found: dict[int, tuple[np.ndarray, tuple[int, int]]] = {}
        with self._naming_the_file():
            if self.info.is_image:
                pictures = [read_picture(self.place, height, width, box) for box in boxes]
                return [
                    (np.repeat(picture[None], num_frames, 0), (0, num_frames))
                    for picture in pictures
                ]
            for group in _near(starts, num_frames * interval + NEAR_SECONDS):
                offsets = np.arange(num_frames) / frames_per_second
                times = np.concatenate([starts[window] + offsets for window in group])
                order = np.argsort(times, kind="stable")
                frames = np.zeros((len(times), height, width, 3), np.uint8)
                first, end = self._fill_frames(
                    frames,
                    order,
                    times[order],
                    interval if num_frames > 1 else 0.0,
                    [boxes[window] for window in group for _ in range(num_frames)],
                )
                held = np.zeros(len(times), bool)
                held[order[first:end]] = True
                for window, lit, each in zip(
                    group,
                    held.reshape(len(group), num_frames),
                    frames.reshape(len(group), num_frames, height, width, 3),
                    strict=True,
                ):
                    places = np.flatnonzero(lit)
                    span = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
                    found[window] = (each, span)
        return [found[window] for window in range(len(starts))]

    def _fill_frames(
        self,
        frames: np.ndarray,
        rows: np.ndarray,
        times: np.ndarray,
        interval: float,
        boxes: Sequence[Box],
    ) -> tuple[int, int]:
        """Write the picture shown at ``times[i]`` into ``frames[rows[i]]``; the times rise.

        Pictures between two times are never converted. Returns the first of the times for which
        there is a picture, and past the last.

        Args:
            boxes: of each of the frames.
        """
        count = len(times)
        _, height, width, _ = frames.shape
        filled = first = 0  # times before ``filled`` are done
        shown = None  # the latest decoded picture, on screen from shown_seconds
        shown_seconds = 0.0

        def fill(picture: Any, upto: int) -> None:
            nonlocal filled
            done: int | None = None  # a row of this picture
            for row in rows[filled:upto]:
                if done is None or boxes[row] is not boxes[done]:
                    frames[row] = self._picture(picture, height, width, boxes[row])
                    done = row
                else:
                    frames[row] = frames[done]
            filled = max(filled, upto)

        ordered = times.tolist()
        for frame, seconds in self._decode_from("video", ordered[0], times):
            if shown is None:
                # A video that begins within one interval begins with its first picture, not black.
                early = max(interval, STAMP_TOLERANCE_SECONDS)
                filled = first = bisect.bisect_left(ordered, seconds - early)
            upto = bisect.bisect_left(ordered, seconds - STAMP_TOLERANCE_SECONDS)
            fill(frame if shown is None else shown, upto)
            if filled == count:
                return first, filled
            shown, shown_seconds = frame, seconds
        if shown is None:
            self._require_end("video", 0.0, times[-1])
            return 0, 0
        stream = self._stream("video")
        self._require_end("video", shown_seconds + frame_seconds(shown, stream), times[-1])
        end = shown_seconds + held_seconds(shown, stream)
        fill(shown, bisect.bisect_left(ordered, end - STAMP_TOLERANCE_SECONDS))
        return first, filled

    def _picture(self, frame: Any, height: int, width: int, box: Box) -> np.ndarray:
        """One decoded picture, upright, a part of it scaled to (height, width)."""
        if frame.is_corrupt:
            raise MediaError(
                f"{self.name} has a damaged picture at {frame.time} s; replace or remove the file"
            )
        if frame.width * frame.height > MAX_PIXELS:
            raise MediaError(
                f"{self.name} has pictures of {frame.width} x {frame.height}; scale them down"
            )
        flip, turns = orientation(frame)
        rows, columns = (width, height) if turns % 2 else (height, width)
        aspect = self._aspect()
        part = None
        if box is not None:
            part = stored_part(checked_box(box, *_shown_size(frame, aspect, turns)), flip, turns)
        pixels = part_of(part, frame.height, frame.width, rows, columns, aspect)
        if pixels not in self._scalers:  # each keeps its tables
            self._scalers = dict(list(self._scalers.items())[-MOST_SCALERS:])
            self._scalers[pixels] = Scaler()
        return oriented(self._scalers[pixels].scaled(frame, pixels, rows, columns), flip, turns)

    def _aspect(self) -> float:
        """The width of one of the picture's pixels over its height."""
        aspect = float(self._stream("video").sample_aspect_ratio or 1)
        return aspect if _SQUAREST <= aspect <= _FLATTEST else 1.0

    def audio(self, *, start: float, num_samples: int, sample_rate_hz: int) -> np.ndarray:
        return self._audio(start, num_samples, sample_rate_hz)[0]

    def _audio(
        self, start: float, num_samples: int, sample_rate_hz: int
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """The samples, and which of them the file holds."""
        _check_window(start, num_samples=num_samples, sample_rate_hz=sample_rate_hz)
        if not self.info.has_audio:
            raise MediaError(self.missing("audio"))
        with self._naming_the_file():
            samples, heard = self._samples(start, num_samples, sample_rate_hz)
        return np.clip(samples, -1.0, 1.0), heard

    def _samples(
        self, start: float, num_samples: int, sample_rate_hz: int
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """Lay the decoded sound on a line of zeros at its own rate, then resample that line.

        Time stamps say where each piece belongs.
        """
        line: np.ndarray | None = None
        end_of_line = rate = first = margin = position = 0
        pieces: list[tuple[int, int]] = []  # of the line, that are sound
        if not hasattr(self, "_grid"):
            self._grid = self._frame_grid()
        for frame, seconds in self._decode_from("audio", start - PREROLL_SECONDS):
            if frame.is_corrupt:
                raise MediaError(
                    f"{self.name} has damaged sound at {seconds:.2f} s; replace or remove the file"
                )
            if line is None:
                rate = frame.sample_rate
                if not SLOWEST_HZ <= rate <= FASTEST_HZ:
                    raise MediaError(f"{self.name} has sound at {rate} Hz; convert the file")
                margin = _margin_samples(rate, sample_rate_hz)
                first = round((start - margin / sample_rate_hz) * rate)  # half a sample off at most
                line = np.zeros(
                    math.ceil((num_samples + 2 * margin) * rate / sample_rate_hz), np.float32
                )
                end_of_line = first + len(line)
                # a first frame may be cut at its beginning, never at its end
                ends = seconds + frame.samples / rate
                position = self._on_the_grid(ends, rate) - frame.samples
            elif frame.sample_rate != rate:
                raise MediaError(
                    f"{self.name} changes its sample rate from {rate} to {frame.sample_rate} Hz; "
                    "convert it to one rate"
                )
            stamped = round(seconds * rate)
            if abs(stamped - position) > JITTER_SECONDS * rate:
                position = stamped
            begin, end = max(position, first), min(position + frame.samples, end_of_line)
            if end > begin:
                piece = line[begin - first : end - first]
                _mix(frame, slice(begin - position, end - position), piece)
                if pieces and pieces[-1][1] == begin - first:
                    pieces[-1] = (pieces[-1][0], end - first)
                else:
                    pieces.append((begin - first, end - first))
            position += frame.samples
            if position >= end_of_line:
                break
        else:
            self._require_end(
                "audio", position / rate if rate else 0.0, start + num_samples / sample_rate_hz
            )
        if line is None:
            return np.zeros(num_samples, np.float32), (0, 0)
        self._require_sound(line, first / rate, rate)
        sounds_until = len(line)
        declared = self._declared_end("audio")
        if declared is not None and 0 < position - declared * rate < CODEC_FRAME_SAMPLES:
            # what fills the codec's last frame is no sound
            sounds_until = max(round(declared * rate) - first, 0)
            line[sounds_until:] = 0
        resampled = _resample(line, rate, sample_rate_hz)[margin : margin + num_samples]

        def index(of_line: int) -> int:
            return min(max(round(of_line * sample_rate_hz / rate) - margin, 0), num_samples)

        spans = [(index(b), index(min(e, sounds_until))) for b, e in pieces]
        inside = [span for span in spans if span[1] > span[0]]
        heard = (inside[0][0], max(end for _, end in inside)) if inside else (0, 0)
        if len(resampled) < num_samples:
            resampled = np.pad(resampled, (0, num_samples - len(resampled)))
        return resampled, heard

    def _on_the_grid(self, seconds: float, rate: int) -> int:
        """The sample of a time at which codec frames meet.

        Where stamps are coarser than samples, as Matroska's milliseconds, it is found by counting
        whole codec frames, so that every window of a file lies on the same samples.
        """
        nearest = round(seconds * rate)
        if self._grid is None:
            return nearest
        second, length = self._grid
        on_grid = second + round((nearest - second) / length) * length
        return on_grid if abs(on_grid - nearest) <= STAMP_TOLERANCE_SECONDS * rate else nearest

    def _frame_grid(self) -> tuple[int, int] | None:
        """Where the sound's second codec frame begins, and how many samples one has.

        None where the container's stamps are as fine as samples, or frames of many lengths.
        """
        if "matroska" not in self._container.format.name:
            return None
        frames = list(itertools.islice(self._decode_from("audio", 0.0), 4))
        if len(frames) < 4:
            return None
        (first, begins), *others = frames
        second = round(begins * first.sample_rate) + first.samples  # the first may be cut
        if self._stream("audio").codec_context.name == "vorbis":
            return second, VORBIS_UNIT
        lengths = {frame.samples for frame, _ in others}
        return (second, lengths.pop()) if len(lengths) == 1 else None

    def _require_sound(self, line: np.ndarray, start: float, rate: int) -> None:
        """Raise where samples (S,) from ``start`` seconds on are numbers that are no sound."""
        # false for nan too
        if not (line.max() <= LOUDEST and line.min() >= -LOUDEST):
            place = int(np.argmin(np.abs(line) <= LOUDEST))
            raise MediaError(
                f"{self.name} has samples at {start + place / rate:.2f} s that are not finite or "
                "far beyond [-1, 1]; replace or remove the file"
            )


def orientation(frame: Any) -> tuple[bool, int]:
    """Whether a picture is mirrored, then by how many quarters it is turned counterclockwise."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, 0
    return orientation_of_matrix(np.frombuffer(bytes(matrix), np.int32, 9))


def _shown_size(frame: Any, aspect: float, turns: int) -> tuple[int, int]:
    rows, columns = frame.height, max(round(frame.width * aspect), 1)
    return (columns, rows) if turns % 2 else (rows, columns)


def _near(starts: Sequence[float], seconds: float) -> list[list[int]]:
    """The windows in groups; in a group each begins at most ``seconds`` after another."""
    groups: list[list[int]] = []
    for window in sorted(range(len(starts)), key=lambda each: starts[each]):
        if groups and starts[window] - starts[groups[-1][-1]] <= seconds:
            groups[-1].append(window)
        else:
            groups.append([window])
    return groups


def _check_window(start: float, **sizes: float) -> None:
    if not math.isfinite(start) or start < 0:
        raise ValueError(f"start is {start} s; it must be a finite time, 0 or later")
    for name, value in sizes.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}; it must be positive")


def _mix(frame: Any, which: slice, out: np.ndarray) -> None:
    """Write the mean of a decoded frame's channels at samples ``which`` to ``out`` (S,) float32."""
    channels = frame.layout.nb_channels
    if frame.format.name == "fltp":
        # most codecs; without the copy that to_ndarray makes of all channels
        planes: list[Any] = [np.frombuffer(plane, np.float32)[which] for plane in frame.planes]
    else:
        values = frame.to_ndarray()
        if values.shape[0] == 1 and channels > 1:  # packed: samples of the channels alternate
            values = values.reshape(-1, channels).T
        planes = list(values[:, which])
    if planes[0].dtype == np.uint8:
        planes = [plane.astype(np.float32) / 128 - 1 for plane in planes]
    elif planes[0].dtype.kind == "i":
        largest = -float(np.iinfo(planes[0].dtype).min)
        planes = [plane.astype(np.float32) / largest for plane in planes]
    if channels == 1:
        out[:] = planes[0]
        return
    np.add(planes[0], planes[1], out=out, casting="same_kind")
    for plane in planes[2:]:
        out += plane
    out /= channels


def _margin_samples(rate: int, sample_rate_hz: int) -> int:
    """A short time in samples at ``sample_rate_hz``.

    It is a whole number of samples at ``rate`` too, unless that would make it long.
    """
    common = math.gcd(rate, sample_rate_hz)
    unit = sample_rate_hz // common
    shortest = math.ceil(MARGIN_SECONDS * sample_rate_hz)
    return shortest if unit > 5 * shortest else math.ceil(shortest / unit) * unit


def _resample(samples: np.ndarray, rate: int, sample_rate_hz: int) -> np.ndarray:
    """(S,) at ``rate`` to (about S * sample_rate_hz / rate,), band-limited.

    Sample 0 stays at time 0.
    """
    if rate == sample_rate_hz:
        return samples
    av = import_av()
    frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=sample_rate_hz)
    parts = [
        part.to_ndarray()[0] for part in (*resampler.resample(frame), *resampler.resample(None))
    ]
    return np.concatenate(parts)
