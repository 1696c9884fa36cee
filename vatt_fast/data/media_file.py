"""An open media file, through PyAV: its streams, and their decoded frames from any time on.

``media.py`` makes arrays of the frames. Time 0 is the start of the file's presentation.
"""

import contextlib
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

# Containers round time stamps, Matroska to whole milliseconds. A frame stamped this much late is
# still on time.
STAMP_TOLERANCE_SECONDS = 1e-3
# A stream that ends this much before its declared end was cut short or could not be decoded.
END_TOLERANCE_SECONDS = 0.25
# Where an index leads too far, the next try is this much earlier. If that fails too, the file is
# read from its start.
INDEX_ERROR_SECONDS = 10.0


class MediaError(ValueError):
    """A media file that cannot be decoded; the message names it."""


@dataclass(frozen=True)
class MediaInfo:
    """What ``probe`` finds. A still image lasts 0 seconds and may be read at any time."""

    duration_seconds: float
    has_video: bool
    has_audio: bool
    is_image: bool


class MediaFile:
    """An open media file; a context manager. Raises MediaError for a corrupt file."""

    def __init__(self, path: str | os.PathLike) -> None:
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

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
                following += frame_seconds(frame, stream)

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


def frame_seconds(frame: Any, stream: Any) -> float:
    """How long a decoded frame lasts."""
    if stream.type == "audio":
        return frame.samples / frame.sample_rate
    if frame.duration:
        return float(frame.duration * frame.time_base)
    rate = stream.average_rate or stream.guessed_rate
    return float(1 / rate) if rate else 0.0


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
