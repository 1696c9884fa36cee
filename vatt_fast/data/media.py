"""Media files to arrays: frames at any rate, mono sound at any rate, in sync.

Video and sound are decoded by PyAV, pictures by Pillow. Time 0 is the start of the file's
presentation. Frame i of a clip is the one on screen at
``start + i / frames_per_second``: the latest at or before that time, by its time stamp. Sample j is
the sound at ``start + j / sample_rate_hz``. Where a file shows nothing, before its start or past
its end, a clip holds black frames and silence: zeros, as patches are padded with.
``media_writer.py`` goes the other way.

Shapes: T frames, H rows, W columns, S samples, C channels.
"""

import functools
import itertools
import math
import os
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
from .media_scan import import_av
from .pictures import (
    covering_box,
    is_picture,
    orientation_of_matrix,
    oriented,
    over_page,
    read_picture,
)

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
# A whole picture is scaled, then cropped, unless that makes this many times the pixels of the crop.
SCALED_OVER_CROPPED = 16
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


def probe(path: str | os.PathLike) -> MediaInfo:
    """Duration and streams of a file.

    Where the container only guesses its duration, it is measured, by reading the file through.

    Raises:
        MediaError: a corrupt file.
        FileNotFoundError: no such file.
    """
    with MediaReader(path) as reader:
        return reader.info


def read_video(
    path: str | os.PathLike,
    *,
    start: float,
    num_frames: int,
    frames_per_second: float,
    height: int,
    width: int,
) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 RGB from ``start`` seconds on.

    The picture is scaled to cover height x width and cropped around its centre. Rotations, mirror
    marks and non-square pixels are applied; what is transparent is white. An image file is a video
    of one repeated frame.

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
        )


def read_audio(
    path: str | os.PathLike, *, start: float, num_samples: int, sample_rate_hz: int
) -> np.ndarray:
    """Sound (S,) float32 in [-1, 1] from ``start`` seconds on: the mean of all channels.

    Raises:
        MediaError: a corrupt file, or one without audio.
        ValueError: arguments out of range.
    """
    with MediaReader(path) as reader:
        return reader.audio(start=start, num_samples=num_samples, sample_rate_hz=sample_rate_hz)


def read_clip(
    path: str | os.PathLike,
    *,
    start: float,
    num_frames: int,
    frames_per_second: float,
    height: int,
    width: int,
    num_samples: int,
    sample_rate_hz: int,
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
        )


class MediaReader(MediaFile):
    """An open media file that can be read many times; a context manager.

    ``video``, ``audio`` and ``clip`` return what the functions ``read_...`` above return.
    """

    def _open(self) -> None:
        if hasattr(self, "info"):
            super()._open()
        elif self.path.suffix.lower() in IMAGE_SUFFIXES and is_picture(self.path):
            # by its name and content, before FFmpeg decodes it to see what it is
            self.info = MediaInfo(0.0, True, False, True)
        else:
            super()._open()
            if self.info.is_image and not is_picture(self.path):
                raise MediaError(f"{self.path} holds a picture of an unknown kind; convert it")

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
        only: str | None = None,
    ) -> Clip:
        """``only`` "video" or "audio": the other one is None, undecoded."""
        video = audio = None
        shown = heard = (0, 0)
        if self.info.has_video and only != "audio":
            video, shown = self._video(start, num_frames, frames_per_second, height, width)
        if self.info.has_audio and only != "video":
            audio, heard = self._audio(start, num_samples, sample_rate_hz)
        return Clip(video, audio, shown, heard)

    def video(
        self, *, start: float, num_frames: int, frames_per_second: float, height: int, width: int
    ) -> np.ndarray:
        return self._video(start, num_frames, frames_per_second, height, width)[0]

    def _video(
        self, start: float, num_frames: int, frames_per_second: float, height: int, width: int
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """The frames, and which of them the file holds."""
        _check_window(
            start,
            num_frames=num_frames,
            frames_per_second=frames_per_second,
            height=height,
            width=width,
        )
        if not self.info.has_video:
            raise MediaError(self.missing("video"))
        frames = np.zeros((num_frames, height, width, 3), np.uint8)
        times = start + np.arange(num_frames) / frames_per_second
        with self._naming_the_file():
            if self.info.is_image:
                frames[:] = read_picture(self.path, height, width)
                return frames, (0, num_frames)
            return frames, self._fill_frames(frames, times)

    def _fill_frames(self, frames: np.ndarray, times: np.ndarray) -> tuple[int, int]:
        """Write the picture shown at each time. Pictures between two times are never converted.

        Returns the first frame written and past the last.
        """
        num_frames, height, width, _ = frames.shape
        interval = times[1] - times[0] if num_frames > 1 else 0.0
        filled = first = 0  # frames before ``filled`` are done
        shown = None  # the latest decoded picture, on screen from shown_seconds
        shown_seconds = 0.0
        for frame, seconds in self._decode_from("video", times[0]):
            if shown is None:
                # A video that begins within one interval begins with its first picture, not black.
                early = max(interval, STAMP_TOLERANCE_SECONDS)
                filled = first = int(np.searchsorted(times, seconds - early))
            upto = int(np.searchsorted(times, seconds - STAMP_TOLERANCE_SECONDS))
            if upto > filled:
                frames[filled:upto] = self._picture(
                    frame if shown is None else shown, height, width
                )
                filled = upto
            if filled == num_frames:
                return first, filled
            shown, shown_seconds = frame, seconds
        if shown is None:
            self._require_end("video", 0.0, times[-1])
            return 0, 0
        stream = self._stream("video")
        self._require_end("video", shown_seconds + frame_seconds(shown, stream), times[-1])
        end = shown_seconds + held_seconds(shown, stream)
        upto = int(np.searchsorted(times, end - STAMP_TOLERANCE_SECONDS))
        if upto > filled:
            frames[filled:upto] = self._picture(shown, height, width)
            filled = upto
        return first, filled

    def _picture(self, frame: Any, height: int, width: int) -> np.ndarray:
        """One decoded picture, upright, scaled to cover (height, width), cropped to its centre."""
        if frame.is_corrupt:
            raise MediaError(
                f"{self.path} has a damaged picture at {frame.time} s; replace or remove the file"
            )
        if frame.width * frame.height > MAX_PIXELS:
            raise MediaError(
                f"{self.path} has pictures of {frame.width} x {frame.height}; scale them down"
            )
        flip, turns = _orientation(frame)
        rows, columns = (width, height) if turns % 2 else (height, width)
        aspect = float(self._stream("video").sample_aspect_ratio or 1)
        if not _SQUAREST <= aspect <= _FLATTEST:
            aspect = 1.0
        transparent = _may_be_transparent(frame.format.name)
        picture_format = "rgba" if transparent else "rgb24"
        scale = max(rows / frame.height, columns / (frame.width * aspect))
        scaled_rows = max(rows, round(frame.height * scale))
        scaled_columns = max(columns, round(frame.width * aspect * scale))
        if scaled_rows * scaled_columns > SCALED_OVER_CROPPED * rows * columns:
            box = covering_box(frame.height, frame.width, rows, columns, aspect)
            frame = _cropped(self._reformat(frame, picture_format), box, picture_format)
            scaled_rows, scaled_columns = rows, columns
        scaled = self._reformat(frame, picture_format, scaled_columns, scaled_rows)
        top, left = (scaled_rows - rows) // 2, (scaled_columns - columns) // 2
        picture = scaled.to_ndarray()[top : top + rows, left : left + columns]
        if transparent:
            # a picture that hides everything is one whose fourth channel means nothing
            picture = over_page(picture) if picture[..., 3].any() else picture[..., :3]
        return oriented(picture, flip, turns)

    def _reformat(
        self, frame: Any, picture_format: str, columns: int | None = None, rows: int | None = None
    ) -> Any:
        return self._reformatter.reformat(
            frame, columns, rows, picture_format, interpolation="BILINEAR", **_one_thread()
        )

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
        rate = first = margin = position = 0
        pieces: list[tuple[int, int]] = []  # of the line, that are sound
        if not hasattr(self, "_grid"):
            self._grid = self._frame_grid()
        for frame, seconds in self._decode_from("audio", start - PREROLL_SECONDS):
            if frame.is_corrupt:
                raise MediaError(
                    f"{self.path} has damaged sound at {seconds:.2f} s; replace or remove the file"
                )
            if line is None:
                rate = frame.sample_rate
                if not SLOWEST_HZ <= rate <= FASTEST_HZ:
                    raise MediaError(f"{self.path} has sound at {rate} Hz; convert the file")
                margin = _margin_samples(rate, sample_rate_hz)
                first = round((start - margin / sample_rate_hz) * rate)  # half a sample off at most
                line = np.zeros(
                    math.ceil((num_samples + 2 * margin) * rate / sample_rate_hz), np.float32
                )
                # a first frame may be cut at its beginning, never at its end
                ends = seconds + frame.samples / rate
                position = self._on_the_grid(ends, rate) - frame.samples
            elif frame.sample_rate != rate:
                raise MediaError(
                    f"{self.path} changes its sample rate from {rate} to {frame.sample_rate} Hz; "
                    "convert it to one rate"
                )
            stamped = round(seconds * rate)
            if abs(stamped - position) > JITTER_SECONDS * rate:
                position = stamped
            sound = self._mono(frame, seconds)
            begin, end = max(position, first), min(position + len(sound), first + len(line))
            if end > begin:
                line[begin - first : end - first] = sound[begin - position : end - position]
                pieces.append((begin - first, end - first))
            position += len(sound)
            if position >= first + len(line):
                break
        else:
            self._require_end(
                "audio", position / rate if rate else 0.0, start + num_samples / sample_rate_hz
            )
        if line is None:
            return np.zeros(num_samples, np.float32), (0, 0)
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
        return np.pad(resampled, (0, num_samples - len(resampled))), heard

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

    def _mono(self, frame: Any, seconds: float) -> np.ndarray:
        """The mean of a decoded frame's channels, (S,) float32."""
        sound = _mono(frame)
        # false for nan too
        if len(sound) and not np.abs(sound).max() <= LOUDEST:
            raise MediaError(
                f"{self.path} has samples at {seconds:.2f} s that are not finite or far beyond "
                "[-1, 1]; replace or remove the file"
            )
        return sound


@functools.cache
def _one_thread() -> dict[str, int]:
    """The scaler's option that keeps it from starting threads of its own, from PyAV 17 on."""
    reformatter = import_av().video.reformatter.VideoReformatter
    return {"threads": 1} if "threads" in (reformatter.reformat.__doc__ or "") else {}


@functools.cache
def _may_be_transparent(pixel_format: str) -> bool:
    described = import_av().VideoFormat(pixel_format)
    return described.has_palette or any(part.is_alpha for part in described.components)


def _orientation(frame: Any) -> tuple[bool, int]:
    """Whether a picture is mirrored, then by how many quarters it is turned counterclockwise."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, 0
    return orientation_of_matrix(np.frombuffer(bytes(matrix), np.int32, 9))


def _cropped(frame: Any, box: tuple[float, float, float, float], picture_format: str) -> Any:
    """The part of a picture, at least a pixel of it."""
    left, top = math.floor(box[0]), math.floor(box[1])
    right, bottom = max(math.ceil(box[2]), left + 1), max(math.ceil(box[3]), top + 1)
    part = np.ascontiguousarray(frame.to_ndarray()[top:bottom, left:right])
    return import_av().VideoFrame.from_ndarray(part, format=picture_format)


def _check_window(start: float, **sizes: float) -> None:
    if not math.isfinite(start) or start < 0:
        raise ValueError(f"start is {start} s; it must be a finite time, 0 or later")
    for name, value in sizes.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}; it must be positive")


def _mono(frame: Any) -> np.ndarray:
    """The mean of a decoded frame's channels, (S,) float32."""
    channels = frame.layout.nb_channels
    values = frame.to_ndarray()
    if values.shape[0] == 1 and channels > 1:  # packed: samples of the channels alternate
        values = values.reshape(-1, channels).T
    if values.dtype == np.uint8:
        values = values.astype(np.float32) / 128 - 1
    elif values.dtype.kind == "i":
        values = values.astype(np.float32) / -float(np.iinfo(values.dtype).min)
    return values.mean(axis=0, dtype=np.float32) if channels > 1 else values[0].astype(np.float32)


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
