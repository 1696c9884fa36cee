"""An open media file, through PyAV: its streams, and their decoded frames from any time on.

``media.py`` makes arrays of the frames, ``media_bytes.py`` opens what is no file of its own. Time 0
is the start of the file's presentation.

Containers that keep an index of their packets are sought by it. The others estimate: their
durations, their seeks, some their time stamps. They are read through once, without decoding
(``media_scan.py``); windows are then found by counting packets.
"""

import bisect
import contextlib
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

import numpy as np

from .media_bytes import MediaError, identity, opener, place_of, url_of
from .media_scan import Packets, import_av, packets_of, scan
from .source import Place

# Containers round time stamps, Matroska to whole milliseconds. A frame stamped this much late is
# still on time.
STAMP_TOLERANCE_SECONDS = 1e-3
# A stream that ends this much before its declared end was cut short or could not be decoded.
END_TOLERANCE_SECONDS = 0.25
# Where an index leads too far, the next try is this much earlier. If that fails too, the file is
# read from its start.
INDEX_ERROR_SECONDS = 10.0
# A file that takes more time of the processor than this for one window, or whose reads hang for
# longer than this, is given up.
DEADLINE_SECONDS = 120.0
# What FFmpeg opens by opening other files: the file named is the file read.
PLAYLISTS = ("concat", "dash", "hls", "imf", "sdp")
# Larger pictures are refused before they are decoded: 134 million pixels, four times those of 8K.
MAX_PIXELS = 2**27

_MATROSKA_TIME = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d*)?)")


# Pictures may be stored this many before those that they follow on screen: H.264 and HEVC allow 16.
REORDERED_PICTURES = 16


@dataclass(frozen=True)
class MediaInfo:
    """What ``probe`` finds. A still image lasts 0 seconds and may be read at any time."""

    duration_seconds: float
    has_video: bool
    has_audio: bool
    is_image: bool


class Deadline:
    """Raises MediaError once a file has taken too much of the processor's time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.until = time.thread_time() + DEADLINE_SECONDS

    def check(self) -> None:
        if time.thread_time() > self.until:
            raise MediaError(
                f"{self.name} took more than {DEADLINE_SECONDS:g} s to decode; replace or remove "
                "the file"
            )


class MediaFile:
    """An open media file; a context manager. Raises MediaError for a corrupt file.

    Args:
        path: a file, or the place of its bytes: in a tar, or at a URL that fsspec opens.
    """

    def __init__(self, path: str | os.PathLike | Place) -> None:
        self.place = place_of(path)
        self.name = self.place.name
        self._open_bytes = opener(self.place)
        self._container: Any = None
        self._connection = contextlib.ExitStack()
        # Streams that can be decoded here, by kind, and the codecs of those that cannot. They are
        # indices: a stream must not outlive its container.
        self._decodable: dict[str, list[int]] = {"video": [], "audio": []}
        self._undecodable: dict[str, list[str]] = {"video": [], "audio": []}
        # errors of the file system are not errors of the content
        self._identity = identity(self.place)
        try:
            with self._naming_the_file():
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self.close()
        self._container = self._connection.enter_context(self._connect())
        self._begun: set[str] = set()  # kinds whose decoders have worked
        if hasattr(self, "info"):
            for streams in self._decodable.values():
                if streams:
                    _opens(self._container.streams[streams[0]])
        else:
            self._choose_streams()
            self.info = self._inspect()

    @contextlib.contextmanager
    def _connect(self) -> Iterator[Any]:
        # With the whitelist, a playlist cannot reach for the network.
        options = {
            "protocol_whitelist": "file,subfile",
            "max_pixels": str(MAX_PIXELS),
            "pattern_type": "none",
        }
        how = dict(options=options, metadata_errors="replace", timeout=DEADLINE_SECONDS)
        if url := url_of(self.place):
            with import_av().open(url, **how) as container:
                yield container
        else:
            with self._open_bytes() as file, import_av().open(file, **how) as container:
                yield container

    def _choose_streams(self) -> None:
        disposition = import_av().stream.Disposition
        cover = disposition.attached_pic | disposition.timed_thumbnails
        for stream in self._container.streams:
            if stream.type in self._decodable and not stream.disposition & cover:
                if _opens(stream):
                    self._decodable[stream.type].append(stream.index)
                else:
                    self._undecodable[stream.type].append(self._codec_of(stream))
        if not any(self._decodable.values()):
            if any(self._undecodable.values()):
                raise MediaError(f"{self.missing('video')}; {self.missing('audio')}")
            raise MediaError(f"{self.name} has neither video nor audio; name a media file")

    def _codec_of(self, stream: Any) -> str:
        """A stream's codec, or the container's tag where FFmpeg has no decoder."""
        if stream.codec_context is not None:
            return stream.codec_context.name
        logging = import_av().logging
        level = logging.get_level()
        logging.set_level(logging.INFO)  # what FFmpeg describes goes through its log
        try:
            text = self._container.dumps_format()
        finally:
            logging.set_level(level)
        described = re.search(rf"Stream #0:{stream.index}\b.*?: (?:Video|Audio): ([^,\n]*)", text)
        return described[1].strip() if described else "unknown"

    def missing(self, kind: str) -> str:
        """Why the file has no stream of this kind."""
        if codecs := self._undecodable[kind]:
            return (
                f"{self.name} has {kind} that cannot be decoded here (codec {', '.join(codecs)}); "
                "convert the file"
            )
        other = "audio" if kind == "video" else "video"
        return f"{self.name} has no {kind} stream; read its {other} only"

    def _inspect(self) -> MediaInfo:
        container = self._container
        per_second = import_av().time_base
        start_seconds = (container.start_time or 0) / per_second
        # a negative start is a codec's warm-up, which is not presented
        self._origin_seconds = max(start_seconds, 0.0)
        self._packets: dict[int, Packets] | None = None
        has = {kind: bool(streams) for kind, streams in self._decodable.items()}
        name = container.format.name
        if name in PLAYLISTS:
            raise MediaError(f"{self.name} is a list of other files ({name}); name those")
        if name == "image2" or name.endswith("_pipe"):
            return MediaInfo(0.0, True, False, True)
        if self._has_an_index():
            seconds = container.duration / per_second + min(start_seconds, 0.0)
        else:
            self._packets = scan(self._identity, self._connect, Deadline(self.name).check)
            ends = [
                self._packets[index].end
                for streams in self._decodable.values()
                for index in streams[:1]
                if index in self._packets
            ]
            seconds = max(ends, default=0.0) - self._origin_seconds
        return MediaInfo(max(seconds, 0.0), has["video"], has["audio"], False)

    def _has_an_index(self) -> bool:
        """Whether duration and seeks are facts, not estimates."""
        container = self._container
        name = container.format.name
        if container.duration is None:
            return False
        if "matroska" in name:
            # the duration of a stream is an estimate here: Matroska has none
            return all(stream.duration is None for stream in container.streams)
        if "mov" in name:
            return not _is_fragmented(self._open_bytes) and all(
                stream.duration is not None
                for stream in container.streams
                if stream.type in ("video", "audio")
            )
        # only in PCM is a byte's place its time
        return name == "flac" or (
            name == "wav" and self._container.streams[0].codec_context.name.startswith("pcm_")
        )

    def close(self) -> None:
        self._container = None
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _stream(self, kind: str) -> Any:
        return self._container.streams[self._decodable[kind][0]]

    def _decode_from(
        self, kind: str, seconds: float, shown_at: np.ndarray | None = None
    ) -> Iterator[tuple[Any, float]]:
        """Decoded frames and their times, from at or before ``seconds``.

        They begin later where the stream does. They are of the first stream that decodes.

        Args:
            shown_at: (T,) rising times. Pictures that none of them shows may be left out, where
                that is known and no other picture is made from them.
        """
        av = import_av()
        while True:
            frames = self._stream_from(kind, seconds, shown_at)
            try:
                first = next(frames, None)
            except (av.error.FFmpegError, ValueError):
                if not self._leave_a_dead_stream(kind):
                    raise
                continue
            if first is None and self._leave_a_dead_stream(kind):
                continue
            if first is not None:
                yield first
                yield from frames
            return

    def _leave_a_dead_stream(self, kind: str) -> bool:
        """Go on with the next stream of a kind where nothing of the present one decodes."""
        av = import_av()
        if len(self._decodable[kind]) == 1:
            return False
        self._open()
        try:
            if next(self._timed_frames(kind), None) is not None:
                return False
        except (av.error.FFmpegError, ValueError):
            pass  # dead, as was asked
        del self._decodable[kind][0]
        self._open()
        return True

    def _stream_from(
        self, kind: str, seconds: float, shown_at: np.ndarray | None
    ) -> Iterator[tuple[Any, float]]:
        stream = self._stream(kind)
        begins = float((stream.start_time or 0) * stream.time_base) - self._origin_seconds
        latest = max(seconds, begins) + STAMP_TOLERANCE_SECONDS
        del stream  # the container is opened anew below, which ends it
        for earlier in (0.0, INDEX_ERROR_SECONDS):
            if self._packets is None:
                if kind in self._begun and kind == "audio":
                    # decoders remember: the noise that AAC fills in would be another one
                    self._open()
                if not self._seek(kind, seconds - earlier):
                    break
                frames = self._timed_frames(kind, from_key=True, shown_at=shown_at)
            else:
                packets = self._packets[self._decodable[kind][0]]
                place = packets.key_before(seconds - earlier + self._origin_seconds)
                if place == packets.key_before(-math.inf):
                    break
                self._open()
                frames = self._timed_frames(kind, skip=place)
            first = next(frames, None)
            if first is not None and first[1] <= latest:
                yield first
                yield from frames
                return
            frames.close()
        self._open()  # no index, or one that led too far: read from the start
        first_key = 0
        if self._packets is not None:
            first_key = self._packets[self._decodable[kind][0]].key_before(-math.inf)
        yield from self._timed_frames(kind, skip=first_key)

    def _seek(self, kind: str, seconds: float) -> bool:
        """Move to the key frame at or before ``seconds``, as far as the container's index is right.

        False where the container has no index.
        """
        stream = self._stream(kind)
        discard = import_av().stream.Discard
        for other in self._container.streams:
            # so that their bytes are not even read
            other.discard = discard.default if other.index == stream.index else discard.all
        try:
            target = int((max(seconds, 0.0) + self._origin_seconds) / stream.time_base)
            self._container.seek(target, stream=stream, backward=True)
        except import_av().error.FFmpegError:
            return False
        return True

    def _timed_frames(
        self,
        kind: str,
        *,
        from_key: bool = False,
        skip: int = 0,
        shown_at: np.ndarray | None = None,
    ) -> Generator[tuple[Any, float], None, None]:
        """Decoded frames and their times: all, or those from the first key frame on.

        Args:
            skip: as many packets of the stream are left out.
            shown_at: as ``_decode_from``.
        """
        stream = self._stream(kind)
        self._begun.add(kind)
        deadline = Deadline(self.name)
        following = 0.0
        # where a container's stamps are in the order of storage, pictures take them in rising order
        rising: Iterator[float] | None = None
        if self._packets is not None:
            stamps = self._packets[stream.index].stamps[skip:]
            if self._packets[stream.index].reordered:
                rising = iter(stamps)
            if skip and len(stamps) and math.isfinite(stamps[0]):
                following = float(stamps[0]) - self._origin_seconds
        packets: Iterator[tuple[Any, bool]]
        packets = ((packet, False) for packet in packets_of(self._container, stream))
        if shown_at is not None and self._packets is None and _marks_what_is_unreferenced(stream):
            packets = self._spared(stream, shown_at)
        context, sparing = stream.codec_context, False
        for packet, spare in packets:
            deadline.check()
            if skip and packet.size:
                skip -= 1
                continue
            # what comes before a key frame decodes to rubbish
            if from_key and not packet.is_keyframe:
                continue
            from_key = False
            if spare != sparing:
                context.skip_frame, sparing = "NONREF" if spare else "DEFAULT", spare
            for frame in packet.decode():
                stamp = frame.pts if frame.pts is not None else frame.dts
                if rising is not None:
                    following = next(rising, following + self._origin_seconds)
                    following -= self._origin_seconds
                elif stamp is not None:
                    following = _seconds(stamp, frame.time_base) - self._origin_seconds
                # raw streams carry no stamps: then frames follow one another
                yield frame, following
                following += frame_seconds(frame, stream)

    def _spared(self, stream: Any, shown_at: np.ndarray) -> Iterator[tuple[Any, bool]]:
        """A stream's packets, each with whether its picture is at none of the times on screen.

        Where stamps leave it open, and past the last time, it is not said of any.
        """
        base, times = stream.time_base, shown_at.tolist()
        numerator, denominator = base.numerator, base.denominator

        def place(stamp: int) -> int:
            """The first of the times at which a picture with this stamp may be shown."""
            seconds = stamp * numerator / denominator - self._origin_seconds
            return bisect.bisect_left(times, seconds - STAMP_TOLERANCE_SECONDS)

        waiting: deque[Any] = deque()
        known: list[int] = []  # stamps in order, of the packets that wait and some before them
        first_key: int | None = None
        in_order, latest = True, -(2**63)  # of decoding

        def spare(packet: Any) -> bool:
            nonlocal first_key
            stamp, known_until = packet.pts, waiting[-1].dts if waiting else None
            if first_key is None and packet.is_keyframe:
                first_key = stamp
            if stamp is None or known_until is None or first_key is None or stamp <= first_key:
                return False
            if packet.is_discard or not in_order:
                return False
            after = bisect.bisect_right(known, stamp)
            # later packets show later pictures than they are decoded
            if after == len(known) or known[after] > known_until:
                return False
            first = place(stamp)
            return first < len(times) and place(known[after]) == first

        for packet in packets_of(self._container, stream):
            waiting.append(packet)
            if packet.dts is not None:
                in_order, latest = in_order and packet.dts >= latest, packet.dts
            # what an edit list leaves out is decoded and never shown, whatever its stamp
            if packet.pts is not None and not packet.is_discard:
                bisect.insort(known, packet.pts)
                if len(known) > 4 * REORDERED_PICTURES:
                    del known[:REORDERED_PICTURES]
            if len(waiting) > REORDERED_PICTURES:
                packet = waiting.popleft()
                yield packet, spare(packet)
        while waiting:
            packet = waiting.popleft()
            yield packet, spare(packet)

    def _require_end(self, kind: str, end_seconds: float, wanted_seconds: float) -> None:
        """Raise where a stream stopped before both its declared end and the end of the window."""
        declared = self._declared_end(kind)
        if (
            declared is not None
            and min(declared, wanted_seconds) - end_seconds > END_TOLERANCE_SECONDS
        ):
            raise MediaError(
                f"{self.name}: the {kind} ends at {end_seconds:.2f} s of the {declared:.2f} s it "
                "declares, so it is cut short or damaged; replace or remove the file"
            )

    def _declared_end(self, kind: str) -> float | None:
        """When the container says that the stream ends; None for containers that estimate it."""
        stream = self._stream(kind)
        name = self._container.format.name
        if self._packets is None and "matroska" not in name and stream.duration is not None:
            end = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
            return min(end - self._origin_seconds, self.info.duration_seconds)
        # written by some muxer, or by hand: what cannot be read says nothing
        if "matroska" in name and (
            tag := _MATROSKA_TIME.fullmatch(stream.metadata.get("DURATION", "").strip("\0 "))
        ):
            hours, minutes, seconds = map(float, tag.groups())
            end = hours * 3600 + minutes * 60 + seconds - self._origin_seconds
            return min(end, self.info.duration_seconds)
        return None

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Turn decoder errors into MediaError with the file's name."""
        av = import_av()
        try:
            yield
        except MediaError:
            raise
        # damaged headers hold numbers that divide by zero, overflow, or ask for all memory
        except (
            av.error.FFmpegError,
            ValueError,
            ArithmeticError,
            MemoryError,
            StopIteration,
        ) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            if isinstance(error, av.error.ExitError):
                reason = f"a read took more than {DEADLINE_SECONDS:g} s"
            raise MediaError(
                f"{self.name} cannot be decoded ({reason}); replace or remove the file"
            ) from error


def _opens(stream: Any) -> bool:
    """Whether there is a decoder, and it takes the stream's header."""
    context = stream.codec_context
    if context is None:
        return False
    context.thread_count = 1  # loaders run one process a core
    context.options = {"max_pixels": str(MAX_PIXELS)}
    try:
        context.open(strict=False)
    except (import_av().error.FFmpegError, ValueError):
        return False
    return True


def _is_fragmented(open_bytes: Callable[[], BinaryIO]) -> bool:
    """Whether an MP4 file is made of fragments, whose header does not know their end."""
    with open_bytes() as file:
        size_of_file = file.seek(0, os.SEEK_END)
        at = 0
        while at + 8 <= size_of_file:
            file.seek(at)
            head = file.read(16)
            size, name = int.from_bytes(head[:4], "big"), head[4:8]
            if name == b"moof":
                return True
            if size == 1:
                size = int.from_bytes(head[8:16], "big")
            if size < 8:  # 0: to the end of the file
                return False
            at += size
    return False


def _seconds(stamp: int, base: Any) -> float:
    """A time stamp as seconds; ``float(stamp * base)`` in a tenth of its time."""
    return stamp * base.numerator / base.denominator


def _marks_what_is_unreferenced(stream: Any) -> bool:
    """Whether a stream's pictures say that no other one is made from them, and the decoder knows.

    HEVC says it of its own temporal layer, so there may be only one. In MPEG-2 and MPEG-4 Part 2
    it is every picture of type B.
    """
    name, header = stream.codec_context.name, stream.codec_context.extradata
    if name == "hevc" and header and len(header) > 21 and header[0] == 1:  # ISO 14496-15, 8.3.3.1
        return header[21] >> 3 & 7 == 1
    return name in ("h264", "mpeg2video", "mpeg4")


def frame_seconds(frame: Any, stream: Any) -> float:
    """How long a decoded frame lasts."""
    if stream.type == "audio":
        return frame.samples / frame.sample_rate
    if frame.duration:
        return _seconds(frame.duration, frame.time_base)
    return _interval(stream) or 0.0


def held_seconds(frame: Any, stream: Any) -> float:
    """How long a stream's last picture is shown: no longer than others, whatever it declares."""
    own = frame_seconds(frame, stream)
    return min(own, _interval(stream) or own)


def _interval(stream: Any) -> float | None:
    rate = stream.average_rate or stream.guessed_rate
    return float(1 / rate) if rate else None
