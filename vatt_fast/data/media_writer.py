"""Arrays to media files, through PyAV.

Shapes: T frames, H rows, W columns, S samples, C channels.
"""

import os
import uuid
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from .media_scan import import_av

# Frames from one key frame to the next in what ``write_clip`` writes.
KEY_FRAMES = 50
# Without x264's look-ahead: on small pictures it reads memory that nobody set, and the same frames
# gave different files.
_X264_OPTIONS = {
    "preset": "veryfast",
    "x264-params": "bframes=0:mbtree=0:rc-lookahead=0:scenecut=0:keyint={}",
}


def h264_options(crf: int, key_frames: int) -> tuple[str, dict[str, str]]:
    """An encoder and its options: H.264 where PyAV carries libx264, else MPEG-4.

    Args:
        crf: quality of H.264. key_frames: frames from one key frame to the next.
    """
    if "libx264" in import_av().codecs_available:
        options = {name: value.format(key_frames) for name, value in _X264_OPTIONS.items()}
        return "libx264", {"crf": str(crf), **options}
    return "mpeg4", {"qscale": "3", "g": str(key_frames)}


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
    """Encode a clip into ``path``.

    The file is either whole or absent, whenever the process dies. The same arrays give the same
    bytes.

    Args:
        frames: (T, H, W, 3) uint8 RGB, or None for a file without video.
        audio: (S,) or (S, C) float in [-1, 1], or None for a file without sound. It becomes AAC,
            in a .wav 16-bit samples.
        video_codec: None takes H.264 where PyAV carries libx264, else MPEG-4.
        crf: quality of H.264; lower is better.
        audio_bit_rate: of AAC, in bits a second.

    Raises:
        ValueError: arrays that cannot be encoded.
    """
    av = import_av()
    path = Path(path)
    if frames is None and audio is None:
        raise ValueError(f"nothing to write into {path}: give frames, audio or both")
    frames = None if frames is None else _checked_frames(np.asarray(frames))
    audio = None if audio is None else _checked_audio(np.asarray(audio))
    usual, options = h264_options(crf, KEY_FRAMES)
    if video_codec not in (None, usual):
        usual, options = video_codec, {"qscale": "3"}

    part = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")
    try:
        with av.open(f"file:{part}", "w") as container:
            # every stream is declared before the first packet: the header lists them
            writers = []
            if frames is not None:
                rate = Fraction(frames_per_second).limit_denominator(10000)
                writers.append(_video_writer(av, container, frames, rate, usual, options))
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


def _checked_frames(frames: np.ndarray) -> np.ndarray:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(
            f"frames are {frames.dtype} {frames.shape}; they must be uint8 (T, H, W, 3) with T at "
            "least 1"
        )
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(
            f"frames are {frames.shape[1]} x {frames.shape[2]}; 4:2:0 video needs even sizes: crop "
            "or pad by one"
        )
    return frames


def _checked_audio(audio: np.ndarray) -> np.ndarray:
    """(S, C)."""
    columns = audio[:, None] if audio.ndim == 1 else audio
    fits = columns.ndim == 2 and columns.shape[1] in (1, 2) and len(columns) > 0
    if not fits or columns.dtype.kind != "f":
        raise ValueError(
            f"audio is {columns.dtype} {columns.shape}; it must be float (S,) or (S, C) with "
            "1 or 2 channels"
        )
    if not np.isfinite(columns).all():
        raise ValueError("audio holds values that are not finite; samples lie in [-1, 1]")
    return columns


def _video_writer(
    av: Any, container: Any, frames: np.ndarray, rate: Fraction, codec: str, options: dict[str, str]
) -> Callable[[], None]:
    """Declare the stream; the function that is returned writes its packets."""
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
    av: Any, container: Any, audio: np.ndarray, sample_rate_hz: int, codec: str, bit_rate: int
) -> Callable[[], None]:
    """Declare the stream; the function that is returned writes its packets."""
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
                integers = np.round(values * 32767).astype(np.int16).reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(integers, format="s16", layout=layout)
            frame.sample_rate, frame.pts = sample_rate_hz, first
            frame.time_base = Fraction(1, sample_rate_hz)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

    return write
