"""Log-mel spectrograms as patch rows: what a model with ``audio_input="spectrogram"`` computes.

As the released code does: frames of 2048 samples at 48 kHz every 1024 (42.67 and 21.33 ms, at any
rate to a sample), zeros past the end, a periodic Hann window, magnitudes, triangles on TensorFlow's
mel scale from 80 to 7600 Hz, log(1 + 10000 x), and each clip brought to [0, 1]. Its transposed
position tables are not copied.

Shapes: B clips, S samples, F frames, M mel bins, N patches, k values a patch.
"""

import functools
from typing import Any

import numpy as np

from .config import MEL_RANGE_HZ, VATTConfig


@functools.lru_cache(maxsize=8)
def window_and_mel(hop: int, rate: float, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The window of 2 * hop samples, and (hop + 1, M) weights of frequencies in mel bins; fp32."""
    turn = np.arange(2 * hop) / (2 * hop)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * turn)
    frequencies = _mel(np.arange(hop + 1) * rate / (2 * hop))[:, None]
    low, high = _mel(np.array(MEL_RANGE_HZ)).tolist()
    edges = np.linspace(low, high, bins + 2)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (frequencies - left) / (centre - left)
    falling = (right - frequencies) / (right - centre)
    weights = np.maximum(0, np.minimum(rising, falling))
    weights[0] = 0  # a constant is no sound
    return window.astype(np.float32), weights.astype(np.float32)


def _mel(hertz: np.ndarray) -> np.ndarray:
    return 1127 * np.log1p(hertz / 700)


def log_mel(waveform: Any, window: Any, weights: Any, *, xp: Any, matmul: Any = None) -> Any:
    """Waveforms (B, S) of at least two frames' length -> (B, F, M) in [0, 1]; F is S / hop, ceiled.

    Args:
        window, weights: of ``window_and_mel``, on the waveforms' device.
        xp: numpy, torch or jax.numpy.
        matmul: of the mel weights, where another precision must be asked for.
    """
    count, samples = waveform.shape
    hop = window.shape[0] // 2
    frames = -(-samples // hop)
    silence = xp.zeros_like(waveform[:, : (frames + 1) * hop - samples])
    blocks = xp.concatenate((waveform, silence), 1).reshape(count, frames + 1, hop)
    framed = xp.concatenate((blocks[:, :-1], blocks[:, 1:]), 2) * window
    mel = (matmul or xp.matmul)(xp.abs(xp.fft.rfft(framed)), weights)
    loud = xp.log1p(1e4 * mel)
    flat = loud.reshape(count, -1)
    low, high = xp.amin(flat, 1)[:, None, None], xp.amax(flat, 1)[:, None, None]
    return (loud - low) / ((high - low) + (high == low))  # silence is 0


def patch_rows(spectrogram: Any, patch: tuple[int, int], *, xp: Any) -> Any:
    """(B, F, M) -> (B, N, k): patches of time and mel, time-major; frames that fill none go."""
    count, frames, bins = spectrogram.shape
    times, mels = frames // patch[0], bins // patch[1]
    whole = spectrogram[:, : times * patch[0]]
    cut = whole.reshape(count, times, patch[0], mels, patch[1])
    return xp.moveaxis(cut, 3, 2).reshape(count, times * mels, patch[0] * patch[1])


def needs_spectrogram(config: VATTConfig, audio: Any) -> bool:
    """Whether this is a waveform of a model that looks at spectrograms."""
    return config.audio_input == "spectrogram" and audio.ndim == 2
