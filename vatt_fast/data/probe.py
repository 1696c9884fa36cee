"""What an index keeps of a media file, found by opening it, without decoding pictures."""

import os

import numpy as np

from .columns import AUDIO, IMAGE, MEASURED, VIDEO, Measured
from .media import AUDIO_SUFFIXES, IMAGE_SUFFIXES, MediaReader
from .source import Place


def measure(place: Place) -> Measured:
    """Duration, streams, sizes, rates and key frames of a media file.

    Raises:
        MediaError: it is corrupt, cut short before its header, or no media file.
        OSError: it cannot be opened.
    """
    with _Opened(place) as file:
        return file.measured()


def guessed(name: str) -> Measured:
    """What a name's suffix says: the streams that such a file may have."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return Measured(streams=IMAGE)
    return Measured(streams=AUDIO if suffix in AUDIO_SUFFIXES else VIDEO | AUDIO)


class _Opened(MediaReader):
    def measured(self) -> Measured:
        info = self.info
        if info.is_image:
            return Measured(0.0, IMAGE | MEASURED)
        found: dict[str, float | int] = {}
        if info.has_video:
            stream = self._stream("video")
            found["width"], found["height"] = stream.width, stream.height
            found["frames_per_second"] = float(stream.average_rate or stream.guessed_rate or 0)
            found["key_frames"], found["key_seconds"] = _key_frames(stream, info.duration_seconds)
        if info.has_audio:
            found["sample_rate"] = self._stream("audio").codec_context.sample_rate
        streams = MEASURED | VIDEO * info.has_video | AUDIO * info.has_audio
        return Measured(info.duration_seconds, streams, **found)  # type: ignore[arg-type]


def _key_frames(stream: object, duration: float) -> tuple[int, float]:
    """How many the container lists, and the longest time from one to the next or to the end."""
    entries = stream.index_entries  # type: ignore[attr-defined]
    base = float(stream.time_base)  # type: ignore[attr-defined]
    times = np.array([each.timestamp * base for each in entries if each.is_keyframe])
    if not len(times):
        return 0, 0.0
    gaps = np.diff(np.append(times - times[0], duration))
    return len(times), max(float(gaps.max()), 0.0)
