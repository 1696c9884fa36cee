"""Media files of any container and codec, made with PyAV: pictures that carry their number, noise.

Shapes: T frames, S samples.
"""

import contextlib
import os
from fractions import Fraction

import numpy as np

SIDE = 64
BITS = 8


def numbered(count, side=SIDE):
    """(T, side, side, 3) uint8: bit b of a picture's number is a white or black bar.

    The last bar is always white.
    """
    frames = np.zeros((count, side, side, 3), np.uint8)
    bars = BITS + 1
    for bit in range(bars):
        on = np.ones(count, bool) if bit == BITS else (np.arange(count) >> bit & 1).astype(bool)
        frames[on, :, bit * side // bars : (bit + 1) * side // bars] = 255
    return frames


def read_numbers(frames):
    """The numbers of ``numbered``; None for a picture without the last bar."""
    bars, width = BITS + 1, frames.shape[2]
    middles = [(2 * bit + 1) * width // (2 * bars) for bit in range(bars)]
    lit = frames[:, frames.shape[1] // 2, middles].mean(-1) > 128
    values = (lit[:, :BITS] << np.arange(BITS)).sum(1)
    return [
        int(value) if bright else None for value, bright in zip(values, lit[:, -1], strict=True)
    ]


def noise(seconds, rate, seed=0):
    """(S,) float32: low noise that no stretch repeats."""
    values = np.random.default_rng(seed).normal(0, 0.3, round(seconds * rate) + 16)
    smooth = np.convolve(values, np.hanning(17) / 8.5, "valid")
    return smooth[: round(seconds * rate)].astype(np.float32)


def encode(
    path,
    *,
    video=None,
    audio=None,
    seconds=16.0,
    fps=10,
    rate=44100,
    sounds=None,
    frames=None,
    pixels="yuv420p",
    video_options=None,
    audio_options=None,
    container=None,
    muxer=None,
    layout="mono",
):
    """Write a file of ``seconds`` of numbered pictures and noise in the codecs named.

    Args:
        sounds: seconds of sound where they differ from the picture's.
        frames, muxer, container: other pictures; the format's name; the muxer's options.
    """
    import av

    with _usual_scheduling(), av.open(str(path), "w", format=muxer, options=container or {}) as out:
        writers = []
        if video:
            stream = out.add_stream(video, rate=fps)
            stream.width = stream.height = SIDE
            stream.pix_fmt, stream.options = pixels, video_options or {}
            stream.codec_context.thread_count = 1
            pictures = numbered(round(seconds * fps)) if frames is None else frames
            stream.height, stream.width = pictures.shape[1:3]
            writers.append(_pictures(av, stream, pictures, fps))
        if audio:
            stream = out.add_stream(audio, rate=rate, layout=layout)
            stream.options = audio_options or {}
            writers.append(_sound(av, stream, noise(sounds or seconds, rate), rate, layout))
        # interleaved by time, as players need it
        times = [next(writer) for writer in writers]
        packets = [[] for _ in writers]
        while any(time is not None for time in times):
            place = min((time, place) for place, time in enumerate(times) if time is not None)[1]
            packets[place] = writers[place].send(None)
            times[place], ready = packets[place]
            for packet in ready:
                out.mux(packet)


@contextlib.contextmanager
def _usual_scheduling():
    """Undo what SVT-AV1 does as root: it gives the thread that calls it real-time priority.

    All that this process starts later would inherit it, and starve every other one.
    """
    policy = os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None
    try:
        yield
    finally:
        if policy is not None and os.sched_getscheduler(0) != policy:
            os.sched_setscheduler(0, policy, os.sched_param(0))


def _pictures(av, stream, pictures, fps):
    yield 0.0
    for number, values in enumerate(pictures):
        picture = av.VideoFrame.from_ndarray(values, format="rgb24")
        picture.pts, picture.time_base = number, Fraction(1, fps)
        yield (number + 1) / fps, stream.encode(picture)
    yield None, stream.encode(None)


def _sound(av, stream, values, rate, layout):
    yield 0.0
    context = stream.codec_context
    resampler = av.AudioResampler(
        format=context.format.name, layout=layout, rate=rate, frame_size=context.frame_size or 1024
    )
    for first in range(0, len(values), 4096):
        piece = values[None, first : first + 4096]
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, first
        frame.time_base = Fraction(1, rate)
        ready = [p for part in resampler.resample(frame) for p in stream.encode(part)]
        yield (first + 4096) / rate, ready
    ready = [p for part in resampler.resample(None) for p in stream.encode(part)]
    yield None, ready + stream.encode(None)
