"""Media files to arrays and back, through PyAV: frames at any rate from any time, mono sound at any rate, in sync.

Time 0 is the start of the file's presentation. Frame i of a clip is the one on screen at ``start + i / frames_per_second`` (the
latest at or before that time, by its time stamp); sample j is the sound at ``start + j / sample_rate_hz``. Where a file shows
nothing, before its start or past its end, a clip holds black frames and silence, the zeros that patches are padded with too.

Shapes: T frames, H rows, W columns, S samples, C channels.
"""

import contextlib
import math
import os
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MEDIA_SUFFIXES = VIDEO_SUFFIXES + AUDIO_SUFFIXES + IMAGE_SUFFIXES

# Containers round time stamps, Matroska to whole milliseconds; a frame stamped this much late is still on time.
STAMP_TOLERANCE_SECONDS = 1e-3
# A stream that ends this much before its declared end was cut short or could not be decoded.
END_TOLERANCE_SECONDS = 0.25
# Sound is decoded from a little earlier than asked: lossy decoders need the packets before, the resampler its filter's length.
PREROLL_SECONDS = 0.2
MARGIN_SECONDS = 0.02
# Where an index leads too far, the next try is this much earlier; then the file is read from its start.
INDEX_ERROR_SECONDS = 10.0
# Rounded stamps must not tear contiguous sound apart; a larger jump is a real gap.
JITTER_SECONDS = 5e-3
# The longest frame of the usual codecs (HE-AAC): the last one may reach this far past the sound's end.
CODEC_FRAME_SAMPLES = 2048
# Without its look-ahead: on small pictures that reads memory nobody set, and the same frames gave different files.
_X264_OPTIONS = {
    "preset": "veryfast",
    "x264-params": "bframes=0:mbtree=0:rc-lookahead=0:scenecut=0:keyint=50",
}


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
    """One raw example: video (T, H, W, 3) uint8, audio (S,) float32 in [-1, 1]; None where the file has no such stream."""

    video: np.ndarray | None
    audio: np.ndarray | None


def probe(path: str | os.PathLike) -> MediaInfo:
    """Duration and streams of a file. Raises MediaError for a corrupt file, FileNotFoundError for a missing one."""
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

    The picture is scaled to cover height x width and cropped around its centre; rotation marks and non-square pixels are applied.
    An image file is a video of one repeated frame. Raises MediaError for a corrupt file and for one without video, ValueError for
    arguments out of range.
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

    Raises MediaError for a corrupt file and for one without audio, ValueError for arguments out of range.
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
    """Video and audio of one window, in sync; None for a stream that the file does not have. Errors as ``read_video``."""
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
    """An open media file, read as often as wanted; a context manager. The functions above say what each part returns."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        with open(
            self.path, "rb"
        ):  # trouble of the file system is told apart from trouble of the content
            pass
        self._container: Any = None
        try:
            with self._naming_the_file():
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        av = _import_av()
        self.close()
        self._container = self._connect()
        cover = av.stream.Disposition.attached_pic
        # by kind, looked up anew at each use: a stream must not outlive the container it came from
        self._streams: dict[str, Any] = {}
        for stream in self._container.streams:
            if (
                stream.type in ("video", "audio")
                and stream.type not in self._streams
                and not stream.disposition & cover
            ):
                self._streams[stream.type] = stream
                stream.codec_context.thread_count = 1  # loaders run one process a core
        self._reformatter = (
            av.video.reformatter.VideoReformatter()
        )  # kept: it holds the scaler's tables
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

    def _connect(self):
        # "file:" and the whitelist: a name with a colon stays a name, and no playlist reaches for the network
        return _import_av().open(
            f"file:{self.path}", options={"protocol_whitelist": "file"}, metadata_errors="replace"
        )

    def close(self) -> None:
        self._streams = {}
        if self._container is not None:
            self._container.close()
            self._container = None

    def __enter__(self) -> "MediaReader":
        return self

    def __exit__(self, *exception) -> None:
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
                frames[:] = self._picture(
                    next(self._container.decode(self._streams["video"])), height, width
                )
                self._open()  # image demuxers do not seek
            else:
                self._fill_frames(frames, times)
        return frames

    def _fill_frames(self, frames: np.ndarray, times: np.ndarray) -> None:
        """Write the picture shown at each time; pictures that nobody sees are decoded but never converted."""
        num_frames, height, width, _ = frames.shape
        interval = times[1] - times[0] if num_frames > 1 else 0.0
        filled = 0  # frames before this index are done
        shown = None  # the latest decoded picture, on screen from shown_seconds
        shown_seconds = last_duration = 0.0
        for frame, seconds in self._decode_from("video", times[0]):
            if shown is None:
                # a video that begins within one interval begins with its first picture, not with black
                filled = int(
                    np.searchsorted(times, seconds - max(interval, STAMP_TOLERANCE_SECONDS))
                )
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

    def _picture(self, frame, height: int, width: int) -> np.ndarray:
        """One decoded picture, upright, scaled to cover (height, width) and cropped around its centre."""
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
        """Lay the decoded sound on a line of zeros at its own rate, by time stamp, and resample that line."""
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
                    f"{self.path} changes its sample rate from {rate} to {frame.sample_rate} Hz; convert it to one rate"
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
            line[max(round(declared * rate) - first, 0) :] = (
                0  # what fills the codec's last frame is no sound
            )
        resampled = _resample(line, rate, sample_rate_hz)[margin : margin + num_samples]
        return np.pad(resampled, (0, num_samples - len(resampled)))

    def _decode_from(self, kind: str, seconds: float) -> Iterator[tuple[Any, float]]:
        """Decoded frames and their times, from at or before ``seconds`` where the stream reaches back that far."""
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
        self._open()  # no index, or one that led too far: walk from the start
        yield from self._timed_frames(kind, from_key=False)

    def _seek(self, kind: str, seconds: float) -> bool:
        """Move to the key frame at or before ``seconds``, where the container's index is right; False where it has none."""
        stream = self._streams[kind]
        try:
            target = int((max(seconds, 0.0) + self._origin_seconds) / stream.time_base)
            self._container.seek(target, stream=stream, backward=True)
        except _import_av().error.FFmpegError:
            return False
        return True

    def _timed_frames(
        self, kind: str, *, from_key: bool
    ) -> Generator[tuple[Any, float], None, None]:
        stream = self._streams[kind]
        following = 0.0
        for packet in self._container.demux(stream):
            if from_key and not packet.is_keyframe:
                continue  # transport streams seek to any packet, and what comes before a key frame decodes to rubbish
            from_key = False
            for frame in packet.decode():
                stamp = frame.pts if frame.pts is not None else frame.dts
                if stamp is not None:
                    following = float(stamp * frame.time_base) - self._origin_seconds
                yield (
                    frame,
                    following,
                )  # raw streams carry no stamps: then frames follow one another
                following += _frame_seconds(frame, stream)

    def _require_end(self, kind: str, end_seconds: float, wanted_seconds: float) -> None:
        """Raise where a stream stopped before both its declared end and the end of the window."""
        declared = self._declared_end(kind)
        if (
            declared is not None
            and min(declared, wanted_seconds) - end_seconds > END_TOLERANCE_SECONDS
        ):
            raise MediaError(
                f"{self.path}: the {kind} ends at {end_seconds:.2f} s of the {declared:.2f} s it declares, so it is cut short or damaged; "
                "replace or remove the file"
            )

    def _declared_end(self, kind: str) -> float | None:
        """When the container promises that the stream ends; None for containers that only estimate it."""
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
        """Decoder errors become MediaError with the file's name."""
        av = _import_av()
        try:
            yield
        except MediaError:
            raise
        except (av.error.FFmpegError, ValueError, StopIteration) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise MediaError(
                f"{self.path} cannot be decoded ({reason}); replace or remove the file"
            ) from error


def write_clip(
    path: str | os.PathLike,
    frames: np.ndarray | None,
    audio: np.ndarray | None,
    *,
    frames_per_second: float = 10.0,
    sample_rate_hz: int = 16000,
    video_codec: str | None = None,
    crf: int = 18,
    audio_bit_rate: int = 64000,
) -> None:
    """Encode frames (T, H, W, 3) uint8 RGB and audio (S,) or (S, C) float in [-1, 1] into ``path``; None leaves a stream out.

    Video is H.264 where PyAV carries libx264, else MPEG-4 (or ``video_codec``), audio AAC; a .wav holds 16-bit samples. ``path`` is
    either whole or absent, whenever the process dies, and the same arrays give the same bytes. Raises ValueError for arrays that
    cannot be encoded.
    """
    av = _import_av()
    path = Path(path)
    if frames is None and audio is None:
        raise ValueError(f"nothing to write into {path}: give frames, audio or both")
    if frames is not None:
        frames = np.asarray(frames)
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
            raise ValueError(
                f"frames are {frames.dtype} {frames.shape}; they must be uint8 (T, H, W, 3) with T at least 1"
            )
        if frames.shape[1] % 2 or frames.shape[2] % 2:
            raise ValueError(
                f"frames are {frames.shape[1]} x {frames.shape[2]}; 4:2:0 video needs even sizes: crop or pad by one"
            )
    if audio is not None:
        audio = np.asarray(audio)
        if audio.ndim == 1:
            audio = audio[:, None]
        if (
            audio.ndim != 2
            or audio.shape[1] not in (1, 2)
            or audio.dtype.kind != "f"
            or not len(audio)
        ):
            raise ValueError(
                f"audio is {audio.dtype} {audio.shape}; it must be float (S,) or (S, C) with 1 or 2 channels"
            )
        if not np.isfinite(audio).all():
            raise ValueError("audio holds values that are not finite; samples lie in [-1, 1]")
    if video_codec is None:
        video_codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"

    part = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")
    try:
        with av.open(f"file:{part}", "w") as container:
            # every stream is declared before the first packet: the header lists them
            writers = []
            if frames is not None:
                options = (
                    {"crf": str(crf), **_X264_OPTIONS}
                    if video_codec == "libx264"
                    else {"qscale": "3"}
                )
                writers.append(
                    _video_writer(
                        av,
                        container,
                        frames,
                        Fraction(frames_per_second).limit_denominator(10000),
                        video_codec,
                        options,
                    )
                )
            if audio is not None:
                codec = "pcm_s16le" if path.suffix.lower() == ".wav" else "aac"
                sound = np.clip(audio, -1.0, 1.0).astype(np.float32)
                writers.append(
                    _audio_writer(av, container, sound, sample_rate_hz, codec, audio_bit_rate)
                )
            for write in writers:
                write()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _video_writer(
    av, container, frames: np.ndarray, rate: Fraction, codec: str, options: dict[str, str]
) -> Callable[[], None]:
    stream = container.add_stream(codec, rate=rate)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.codec_context.thread_count = 1  # more threads change the bytes
    stream.options = options

    def write() -> None:
        for index, values in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(values), format="rgb24")
            picture.pts, picture.time_base = index, 1 / rate
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))

    return write


def _audio_writer(
    av, container, audio: np.ndarray, sample_rate_hz: int, codec: str, bit_rate: int
) -> Callable[[], None]:
    layout = "mono" if audio.shape[1] == 1 else "stereo"
    stream = container.add_stream(codec, rate=sample_rate_hz, layout=layout)
    if codec == "aac":
        stream.bit_rate = bit_rate
        stream.options = {"aac_coder": "fast"}  # half the time of the default search

    def write() -> None:
        for first in range(0, len(audio), 1024):  # an AAC frame
            values = audio[first : first + 1024]
            if codec == "aac":
                frame = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(values.T), format="fltp", layout=layout
                )
            else:
                frame = av.AudioFrame.from_ndarray(
                    np.round(values * 32767).astype(np.int16).reshape(1, -1),
                    format="s16",
                    layout=layout,
                )
            frame.sample_rate, frame.pts, frame.time_base = (
                sample_rate_hz,
                first,
                Fraction(1, sample_rate_hz),
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

    return write


def _check_window(start: float, **sizes: float) -> None:
    if not math.isfinite(start) or start < 0:
        raise ValueError(f"start is {start} s; it must be a finite time, 0 or later")
    for name, value in sizes.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}; it must be positive")


def _last_packet_end(container) -> float:
    """When the last packet ends, for files that do not say how long they are (streamed WebM, raw streams)."""
    end, counted = 0.0, 0.0
    for packet in container.demux():
        length = float((packet.duration or 0) * packet.time_base)
        if packet.pts is not None:
            end = max(end, float(packet.pts * packet.time_base) + length)
        if packet.stream == container.streams[0]:
            counted += length  # packets without stamps follow one another
    return max(end, counted)


def _frame_seconds(frame, stream) -> float:
    """How long a decoded frame lasts."""
    if stream.type == "audio":
        return frame.samples / frame.sample_rate
    if frame.duration:
        return float(frame.duration * frame.time_base)
    rate = stream.average_rate or stream.guessed_rate
    return float(1 / rate) if rate else 0.0


def _mono(frame) -> np.ndarray:
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
    """A short time as samples at ``sample_rate_hz``: a whole number of samples at ``rate`` too, wherever such a time is short."""
    common = math.gcd(rate, sample_rate_hz)
    unit = sample_rate_hz // common
    shortest = math.ceil(MARGIN_SECONDS * sample_rate_hz)
    return shortest if unit > 5 * shortest else math.ceil(shortest / unit) * unit


def _resample(samples: np.ndarray, rate: int, sample_rate_hz: int) -> np.ndarray:
    """(S,) at ``rate`` to (about S * sample_rate_hz / rate,), band-limited, sample 0 staying at time 0."""
    if rate == sample_rate_hz:
        return samples
    av = _import_av()
    frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=sample_rate_hz)
    parts = [
        part.to_ndarray()[0] for part in (*resampler.resample(frame), *resampler.resample(None))
    ]
    return np.concatenate(parts)


def _import_av():
    """PyAV, imported when media are first touched: training on arrays does not need it."""
    try:
        import av
        import av.video.reformatter
    except ImportError as error:
        raise ImportError(
            "media files need PyAV, which is not installed: pip install vatt_fast[data]"
        ) from error
    return av
