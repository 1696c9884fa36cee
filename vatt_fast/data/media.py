"""Media files to arrays, through PyAV: frames at any rate, mono sound at any rate, in sync.

Time 0 is the start of the file's presentation. Frame i of a clip is the one on screen at
``start + i / frames_per_second``: the latest at or before that time, by its time stamp. Sample j is
the sound at ``start + j / sample_rate_hz``. Where a file shows nothing, before its start or past
its end, a clip holds black frames and silence: zeros, as patches are padded with.
``media_writer.py`` goes the other way.

Shapes: T frames, H rows, W columns, S samples, C channels.
"""

import contextlib
import math
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MEDIA_SUFFIXES = VIDEO_SUFFIXES + AUDIO_SUFFIXES + IMAGE_SUFFIXES

# Containers round time stamps, Matroska to whole milliseconds. A frame stamped this much late is
# still on time.
STAMP_TOLERANCE_SECONDS = 1e-3
# A stream that ends this much before its declared end was cut short or could not be decoded.
END_TOLERANCE_SECONDS = 0.25
# Sound is decoded from a little earlier than asked: lossy decoders need the packets before it, and
# the resampler needs the length of its filter.
PREROLL_SECONDS = 0.2
MARGIN_SECONDS = 0.02
# Where an index leads too far, the next try is this much earlier. If that fails too, the file is
# read from its start.
INDEX_ERROR_SECONDS = 10.0
# Rounded stamps must not tear contiguous sound apart; a larger jump is a real gap.
JITTER_SECONDS = 5e-3
# The longest frame of the usual codecs (HE-AAC): the last one may reach this far past the end of
# the sound.
CODEC_FRAME_SAMPLES = 2048


class MediaError(ValueError):
    """A media file that cannot be decoded; the message names it."""


@dataclass(frozen=True)
class MediaInfo:
    """What ``probe`` finds. A still image lasts 0 seconds and may be read at any time."""

    duration_seconds: float
    has_video: bool
    has_audio: bool
    is_image: bool


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


class MediaReader:
    """An open media file that can be read many times; a context manager.

    ``video``, ``audio`` and ``clip`` return what the functions ``read_...`` above return.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        with open(self.path, "rb"):  # errors of the file system are not errors of the content
            pass
        self._container: Any = None
        try:
            with self._naming_the_file():
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        av = import_av()
        self.close()
        self._container = self._connect()
        cover = av.stream.Disposition.attached_pic
        # by kind, looked up anew at each use: a stream must not outlive its container
        self._streams: dict[str, Any] = {}
        for stream in self._container.streams:
            if (
                stream.type in ("video", "audio")
                and stream.type not in self._streams
                and not stream.disposition & cover
            ):
                self._streams[stream.type] = stream
                stream.codec_context.thread_count = 1  # loaders run one process a core
        # kept, since it holds the scaler's tables
        self._reformatter = av.video.reformatter.VideoReformatter()
        format_name = self._container.format.name
        is_image = format_name == "image2" or format_name.endswith("_pipe")
        start_seconds = (self._container.start_time or 0) / av.time_base
        # a negative start is a codec's warm-up, which is not presented
        self._origin_seconds = max(start_seconds, 0.0)
        duration = self._container.duration
        if is_image:
            seconds = 0.0
        elif duration is not None:
            seconds = max(duration / av.time_base + min(start_seconds, 0.0), 0.0)
        else:
            with self._connect() as other:
                seconds = _last_packet_end(other) - self._origin_seconds
        self.info = MediaInfo(seconds, "video" in self._streams, "audio" in self._streams, is_image)
        if not (self.info.has_video or self.info.has_audio):
            raise MediaError(f"{self.path} has neither video nor audio; name a media file")

    def _connect(self) -> Any:
        # With "file:", a name that holds a colon stays a name. With the whitelist, a playlist
        # cannot reach for the network.
        return import_av().open(
            f"file:{self.path}", options={"protocol_whitelist": "file"}, metadata_errors="replace"
        )

    def close(self) -> None:
        self._streams = {}
        if self._container is not None:
            self._container.close()
            self._container = None

    def __enter__(self) -> "MediaReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

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
            last_duration = _frame_seconds(frame, self._streams["video"])
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

    def _decode_from(self, kind: str, seconds: float) -> Iterator[tuple[Any, float]]:
        """Decoded frames and their times, from at or before ``seconds``.

        They begin later where the stream does.
        """
        stream = self._streams[kind]
        begins = float((stream.start_time or 0) * stream.time_base) - self._origin_seconds
        latest = max(seconds, begins) + STAMP_TOLERANCE_SECONDS
        for earlier in (0.0, INDEX_ERROR_SECONDS):
            if not self._seek(kind, seconds - earlier):
                break
            frames = self._timed_frames(kind, from_key=True)
            first = next(frames, None)
            if first is not None and first[1] <= latest:
                yield first
                yield from frames
                return
            frames.close()
        self._open()  # no index, or one that led too far: read from the start
        yield from self._timed_frames(kind, from_key=False)

    def _seek(self, kind: str, seconds: float) -> bool:
        """Move to the key frame at or before ``seconds``, as far as the container's index is right.

        False where the container has no index.
        """
        stream = self._streams[kind]
        try:
            target = int((max(seconds, 0.0) + self._origin_seconds) / stream.time_base)
            self._container.seek(target, stream=stream, backward=True)
        except import_av().error.FFmpegError:
            return False
        return True

    def _timed_frames(
        self, kind: str, *, from_key: bool
    ) -> Generator[tuple[Any, float], None, None]:
        stream = self._streams[kind]
        following = 0.0
        for packet in self._container.demux(stream):
            # transport streams seek to any packet; what comes before a key frame decodes to rubbish
            if from_key and not packet.is_keyframe:
                continue
            from_key = False
            for frame in packet.decode():
                stamp = frame.pts if frame.pts is not None else frame.dts
                if stamp is not None:
                    following = float(stamp * frame.time_base) - self._origin_seconds
                # raw streams carry no stamps: then frames follow one another
                yield frame, following
                following += _frame_seconds(frame, stream)

    def _require_end(self, kind: str, end_seconds: float, wanted_seconds: float) -> None:
        """Raise where a stream stopped before both its declared end and the end of the window."""
        declared = self._declared_end(kind)
        if (
            declared is not None
            and min(declared, wanted_seconds) - end_seconds > END_TOLERANCE_SECONDS
        ):
            raise MediaError(
                f"{self.path}: the {kind} ends at {end_seconds:.2f} s of the {declared:.2f} s it "
                "declares, so it is cut short or damaged; replace or remove the file"
            )

    def _declared_end(self, kind: str) -> float | None:
        """When the container says that the stream ends; None for containers that estimate it."""
        stream = self._streams[kind]
        name = self._container.format.name
        if stream.duration is not None and any(
            exact in name for exact in ("mov", "wav", "flac", "ogg")
        ):
            start = stream.start_time or 0
            return min(
                float((start + stream.duration) * stream.time_base) - self._origin_seconds,
                self.info.duration_seconds,
            )
        if "matroska" in name and (tag := stream.metadata.get("DURATION")):
            hours, minutes, seconds = tag.split(":")
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds) - self._origin_seconds
        return None

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Turn decoder errors into MediaError with the file's name."""
        av = import_av()
        try:
            yield
        except MediaError:
            raise
        except (av.error.FFmpegError, ValueError, StopIteration) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise MediaError(
                f"{self.path} cannot be decoded ({reason}); replace or remove the file"
            ) from error


def _check_window(start: float, **sizes: float) -> None:
    if not math.isfinite(start) or start < 0:
        raise ValueError(f"start is {start} s; it must be a finite time, 0 or later")
    for name, value in sizes.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}; it must be positive")


def _last_packet_end(container: Any) -> float:
    """When the last packet ends.

    For files that do not say how long they are: streamed WebM, raw streams.
    """
    end, counted = 0.0, 0.0
    for packet in container.demux():
        length = float((packet.duration or 0) * packet.time_base)
        if packet.pts is not None:
            end = max(end, float(packet.pts * packet.time_base) + length)
        if packet.stream == container.streams[0]:
            counted += length  # packets without stamps follow one another
    return max(end, counted)


def _frame_seconds(frame: Any, stream: Any) -> float:
    """How long a decoded frame lasts."""
    if stream.type == "audio":
        return frame.samples / frame.sample_rate
    if frame.duration:
        return float(frame.duration * frame.time_base)
    rate = stream.average_rate or stream.guessed_rate
    return float(1 / rate) if rate else 0.0


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


def import_av() -> Any:
    """PyAV, imported where media are first read or written: training on arrays does not need it."""
    try:
        import av
        import av.video.reformatter
    except ImportError as error:
        raise ImportError(
            "media files need PyAV, which is not installed: pip install vatt_fast[data]"
        ) from error
    return av
