"""Pictures decoded by torchcodec instead of PyAV, where it loads; sound stays with PyAV.

torchcodec looks through a file's packets first, so the pictures are those on screen at the times
asked for, as PyAV's are. They are made RGB before they are scaled, so values differ by rounding.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np

from .media import MediaError, MediaReader, orientation
from .media_file import STAMP_TOLERANCE_SECONDS
from .media_scaling import may_be_transparent
from .media_scan import import_av

Decoder = Literal["pyav", "torchcodec"]
_AT_A_TIME = 32  # pictures, of full size


def reader_class(decoder: Decoder) -> type[MediaReader]:
    """What opens media for a decoder.

    Raises:
        ValueError: no such decoder, or one that is not installed or does not load, and why.
    """
    if decoder not in get_args(Decoder):
        raise ValueError(f"decoder is {decoder!r}; it is one of {', '.join(get_args(Decoder))}")
    if decoder == "pyav":
        return MediaReader
    _video_decoder()
    return TorchcodecReader


@functools.cache
def _video_decoder() -> Any:
    try:
        from torchcodec.decoders import VideoDecoder
    # it loads FFmpeg's libraries and torch's by hand, and raises whatever they do
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"decoder='torchcodec' does not load ({reason[0]}); install the torchcodec of this "
            "torch and FFmpeg's libraries, or leave the decoder at 'pyav'"
        ) from error
    return VideoDecoder


class TorchcodecReader(MediaReader):
    """A ``MediaReader`` whose pictures torchcodec decodes.

    What it does not show as players do is left to PyAV: pictures that are mirrored, turned or
    transparent. So are containers without an index, shards, URLs and still images.
    """

    def _decode_from(
        self, kind: str, seconds: float, shown_at: np.ndarray | None = None
    ) -> Iterator[tuple[Any, float]]:
        if kind == "video" and shown_at is not None and self._is_plain:
            return self._decoded_at(shown_at)
        return super()._decode_from(kind, seconds, shown_at)

    @functools.cached_property
    def _is_plain(self) -> bool:
        if self._packets is not None or self.place.is_part or self.place.is_remote:
            return False
        first = next(super()._decode_from("video", 0.0), None)
        return (
            first is not None
            and orientation(first[0]) == (False, 0)
            and not may_be_transparent(first[0].format.name)
        )

    def _decoded_at(self, shown_at: np.ndarray) -> Iterator[tuple[Any, float]]:
        """The pictures on screen at the rising times, each once, and when they came there."""
        av = import_av()
        stream = self._stream("video")
        try:
            decoder = _video_decoder()(
                self.place.path, stream_index=stream.index, dimension_order="NHWC", device="cpu"
            )
            begin = decoder.metadata.begin_stream_seconds
            end = decoder.metadata.end_stream_seconds
            times = np.clip(
                shown_at + self._origin_seconds + STAMP_TOLERANCE_SECONDS,
                begin,
                np.nextafter(end, begin),
            )
            before = -math.inf
            for some in np.array_split(times, -(-len(times) // _AT_A_TIME)):
                found = decoder.get_frames_played_at(some.tolist())
                stamps, lengths = found.pts_seconds.tolist(), found.duration_seconds.tolist()
                for values, stamp, length in zip(found.data, stamps, lengths, strict=True):
                    if stamp <= before:
                        continue
                    before = stamp
                    frame = av.VideoFrame.from_ndarray(values.numpy(), format="rgb24")
                    frame.time_base = stream.time_base
                    frame.duration = round(length / stream.time_base)
                    yield frame, stamp - self._origin_seconds
        except RuntimeError as error:  # all that FFmpeg says goes through this one
            raise MediaError(
                f"{self.name} cannot be decoded by torchcodec ({str(error).splitlines()[0]}); "
                "replace or remove the file"
            ) from error
