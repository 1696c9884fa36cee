"""Media files to arrays, through PyAV: frames at any rate, mono sound at any rate, in sync.

Time 0 is the start of the file's presentation. Frame i of a clip is the one on screen at
``start + i / frames_per_second``: the latest at or before that time, by its time stamp. Sample j is
the sound at ``start + j / sample_rate_hz``. Where a file shows nothing, before its start or past
its end, a clip holds black frames and silence: zeros, as patches are padded with.
``media_writer.py`` goes the other way.

Shapes: T frames, H rows, W columns, S samples, C channels.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from .media_file import (
    STAMP_TOLERANCE_SECONDS,
    MediaError,
    MediaFile,
    MediaInfo,
    frame_seconds,
    import_av,
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


@dataclass(frozen=True)
class Clip:
    """One raw example: video (T, H, W, 3) uint8 and audio (S,) float32 in [-1, 1].

    None stands for a stream that the file does not have.
    """

    video: np.ndarray | None
    audio: np.ndarray | None


def probe(path: str | os.PathLike) -> MediaInfo:
    """Duration and streams of a file.

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

    The picture is scaled to cover height x width and cropped around its centre. Rotation marks and
    non-square pixels are applied. An image file is a video of one repeated frame.

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
    ) -> Clip:
        video = audio = None
        if self.info.has_video:
            video = self.video(
                start=start,
                num_frames=num_frames,
                frames_per_second=frames_per_second,
                height=height,
                width=width,
            )
        if self.info.has_audio:
            audio = self.audio(start=start, num_samples=num_samples, sample_rate_hz=sample_rate_hz)
        return Clip(video, audio)

    def video(
        self, *, start: float, num_frames: int, frames_per_second: float, height: int, width: int
    ) -> np.ndarray:
        _check_window(
            start,
            num_frames=num_frames,
            frames_per_second=frames_per_second,
            height=height,
            width=width,
        )
        if not self.info.has_video:
            raise MediaError(f"{self.path} has no video stream; read its audio only")
        frames = np.zeros((num_frames, height, width, 3), np.uint8)
        times = start + np.arange(num_frames) / frames_per_second
        with self._naming_the_file():
            if self.info.is_image:
                picture = next(self._container.decode(self._streams["video"]))
                frames[:] = self._picture(picture, height, width)
                self._open()  # image demuxers do not seek
            else:
                self._fill_frames(frames, times)
        return frames

    def _fill_frames(self, frames: np.ndarray, times: np.ndarray) -> None:
        """Write the picture shown at each time. Pictures between two times are never converted."""
        num_frames, height, width, _ = frames.shape
        interval = times[1] - times[0] if num_frames > 1 else 0.0
        filled = 0  # frames before this index are done
        shown = None  # the latest decoded picture, on screen from shown_seconds
        shown_seconds = last_duration = 0.0
        for frame, seconds in self._decode_from("video", times[0]):
            if shown is None:
                # A video that begins within one interval begins with its first picture, not black.
                early = max(interval, STAMP_TOLERANCE_SECONDS)
                filled = int(np.searchsorted(times, seconds - early))
            upto = int(np.searchsorted(times, seconds - STAMP_TOLERANCE_SECONDS))
            if upto > filled:
                frames[filled:upto] = self._picture(
                    frame if shown is None else shown, height, width
                )
                filled = upto
            if filled == num_frames:
                return
            last_duration = frame_seconds(frame, self._streams["video"])
            shown, shown_seconds = frame, seconds
        end = shown_seconds + last_duration if shown is not None else 0.0
        self._require_end("video", end, times[-1])
        upto = int(np.searchsorted(times, end - STAMP_TOLERANCE_SECONDS))
        if shown is not None and upto > filled:
            frames[filled:upto] = self._picture(shown, height, width)

    def _picture(self, frame: Any, height: int, width: int) -> np.ndarray:
        """One decoded picture, upright, scaled to cover (height, width), cropped to its centre."""
        if frame.is_corrupt:
            raise MediaError(
                f"{self.path} has a damaged picture at {frame.time} s; replace or remove the file"
            )
        turns = round(frame.rotation / 90) % 4  # quarter turns counterclockwise
        rows, columns = (width, height) if turns % 2 else (height, width)
        aspect = float(self._streams["video"].sample_aspect_ratio or 1) or 1.0
        scale = max(rows / frame.height, columns / (frame.width * aspect))
        scaled_rows = max(rows, round(frame.height * scale))
        scaled_columns = max(columns, round(frame.width * aspect * scale))
        scaled = self._reformatter.reformat(
            frame, scaled_columns, scaled_rows, "rgb24", interpolation="BILINEAR"
        )
        top, left = (scaled_rows - rows) // 2, (scaled_columns - columns) // 2
        return np.rot90(scaled.to_ndarray()[top : top + rows, left : left + columns], turns)

    def audio(self, *, start: float, num_samples: int, sample_rate_hz: int) -> np.ndarray:
        _check_window(start, num_samples=num_samples, sample_rate_hz=sample_rate_hz)
        if not self.info.has_audio:
            raise MediaError(f"{self.path} has no audio stream; read its video only")
        with self._naming_the_file():
            samples = self._samples(start, num_samples, sample_rate_hz)
        return np.clip(samples, -1.0, 1.0)

    def _samples(self, start: float, num_samples: int, sample_rate_hz: int) -> np.ndarray:
        """Lay the decoded sound on a line of zeros at its own rate, then resample that line.

        Time stamps say where each piece belongs.
        """
        line: np.ndarray | None = None
        rate = first = margin = position = 0
        for frame, seconds in self._decode_from("audio", start - PREROLL_SECONDS):
            if frame.is_corrupt:
                raise MediaError(
                    f"{self.path} has damaged sound at {seconds:.2f} s; replace or remove the file"
                )
            if line is None:
                rate = frame.sample_rate
                margin = _margin_samples(rate, sample_rate_hz)
                first = round((start - margin / sample_rate_hz) * rate)  # half a sample off at most
                line = np.zeros(
                    math.ceil((num_samples + 2 * margin) * rate / sample_rate_hz), np.float32
                )
                position = round(seconds * rate)
            elif frame.sample_rate != rate:
                raise MediaError(
                    f"{self.path} changes its sample rate from {rate} to {frame.sample_rate} Hz; "
                    "convert it to one rate"
                )
            stamped = round(seconds * rate)
            if abs(stamped - position) > JITTER_SECONDS * rate:
                position = stamped
            sound = _mono(frame)
            begin, end = max(position, first), min(position + len(sound), first + len(line))
            if end > begin:
                line[begin - first : end - first] = sound[begin - position : end - position]
            position += len(sound)
            if position >= first + len(line):
                break
        else:
            self._require_end(
                "audio", position / rate if rate else 0.0, start + num_samples / sample_rate_hz
            )
        if line is None:
            return np.zeros(num_samples, np.float32)
        declared = self._declared_end("audio")
        if declared is not None and 0 < position - declared * rate < CODEC_FRAME_SAMPLES:
            # what fills the codec's last frame is no sound
            line[max(round(declared * rate) - first, 0) :] = 0
        resampled = _resample(line, rate, sample_rate_hz)[margin : margin + num_samples]
        return np.pad(resampled, (0, num_samples - len(resampled)))


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
