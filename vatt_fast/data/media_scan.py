"""Reading a media file through without decoding: which packets it has, and when they play.

For containers without an index, whose durations and seeks are guesses.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

# Time stamps that fall back by more than this begin anew: files put one behind the other.
RESTART_SECONDS = 1.0


@dataclass(frozen=True)
class Packets:
    """One stream's packets, in the order of the file.

    Args:
        stamps: (n,) seconds, when each is presented; nan where nobody says.
        keys: (n,) bool, where decoding may begin.
        end: when the last one ends, in seconds.
        reordered: the container does not say in which order pictures are presented. ``stamps`` are
            those of storage, in rising order, and only counting from the start is right.
    """

    stamps: np.ndarray
    keys: np.ndarray
    end: float
    reordered: bool

    def key_before(self, seconds: float) -> int:
        """The place of the last key packet presented at or before ``seconds``.

        The first key packet where there is none: recordings begin amid a group of pictures.
        """
        places = np.flatnonzero(self.keys)
        if not len(places) or (self.reordered and len(places) < len(self.keys)):
            return 0
        with np.errstate(invalid="ignore"):
            before = places[self.stamps[places] <= seconds]
        return int(before[-1] if len(before) else places[0])


def scan(
    identity: str, connect: Callable[[], Any], check: Callable[[], None]
) -> dict[int, Packets]:
    """The packets of a file's video and audio streams, by the streams' indices.

    Args:
        identity: of the file, another one once it has changed: the last files scanned are
            remembered.
        connect: opens the file. check: called for each packet, may raise.

    Raises:
        ValueError: time stamps that begin anew in the middle of the file.
    """
    if identity not in _scanned:
        if len(_scanned) >= _MOST_SCANNED:
            del _scanned[next(iter(_scanned))]
        _scanned[identity] = _scan(connect, check)
    return _scanned[identity]


def packets_of(container: Any, *streams: Any) -> Iterator[Any]:
    """The packets of some streams, in the order of the file.

    A demuxer that is dropped halfway gives back what it holds only if it is told to end.
    """
    with contextlib.closing(container.demux(*streams)) as packets:
        yield from packets


_MOST_SCANNED = 64
_scanned: dict[str, dict[int, Packets]] = {}


def _scan(connect: Callable[[], Any], check: Callable[[], None]) -> dict[int, Packets]:
    with connect() as container:
        streams = [s for s in container.streams if s.type in ("video", "audio")]
        rows: dict[int, list[tuple[float, float, float, bool]]] = {s.index: [] for s in streams}
        for packet in packets_of(container, *streams):
            check()
            if not packet.size:
                continue
            base = float(packet.time_base)
            rows[packet.stream_index].append(
                (
                    np.nan if packet.pts is None else packet.pts * base,
                    np.nan if packet.dts is None else packet.dts * base,
                    (packet.duration or 0) * base,
                    packet.is_keyframe,
                )
            )
        in_storage_order = container.format.name == "avi"
        return {
            s.index: _packets(rows[s.index], in_storage_order and s.type == "video")
            for s in streams
        }


def _packets(rows: list[tuple[float, float, float, bool]], in_storage_order: bool) -> Packets:
    pts, dts, lengths, keys = np.array(rows, np.float64).reshape(-1, 4).T
    stored = dts[np.isfinite(dts)]
    if len(stored) and (falls := np.flatnonzero(np.diff(stored) < -RESTART_SECONDS)).size:
        raise ValueError(
            f"its time stamps begin anew after {stored[falls[0]]:.2f} s, as where files were put "
            "one behind the other: write it anew as one file"
        )
    reordered = in_storage_order and bool(np.isfinite(dts).all())
    stamps = np.sort(dts) if reordered else np.where(np.isfinite(pts), pts, dts)
    ends = stamps + lengths
    counted = float(lengths.sum())  # packets without stamps follow one another
    end = float(np.nanmax(ends)) if np.isfinite(ends).any() else counted
    return Packets(stamps, keys > 0, end, reordered)


@functools.cache
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
