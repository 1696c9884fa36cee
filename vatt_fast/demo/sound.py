"""The sound of a clip of the rendered world."""

import numpy as np

from .scene import SECONDS, SHAPES, Course, Factors, contour

SAMPLE_RATE_HZ = 16000
NOISE_BELOW_SIGNAL_DB = 20

# Base pitches lie 8 semitones apart, so glides of neighbours do not meet. They are high enough for
# a glide to show within one patch of 8 ms.
PITCH_HZ = {shape: 300.0 * 1.6**place for place, shape in enumerate(SHAPES)}
HIGHEST_HZ = 6500.0  # glides stay below half the sample rate
LOUDEST = 0.9  # of full scale, in every clip
# Waveforms are sums of harmonics: (number, strength), as far as they lie below HIGHEST_HZ.
HARMONICS: dict[str, tuple[tuple[int, float], ...]] = {
    "circle": ((1, 1.0),),  # a sine
    "square": tuple((n, 1 / n) for n in (1, 3, 5, 7, 9, 11)),
    "triangle": tuple((n, (-1) ** (n // 2) / n**2) for n in (1, 3, 5, 7)),
    "star": tuple((n, 1 / n) for n in range(1, 11)),  # a sawtooth
    "cross": ((1, 1.0), (2, 0.9), (4, 0.6), (8, 0.3)),  # an organ
    "ring": ((1, 0.7), (3, 1.0), (4, 0.6)),  # a bell
}


def render_audio(factors: Factors, course: Course, generator: np.random.Generator) -> np.ndarray:
    """(S,) float32 in [-1, 1]: the shape's voice along the motion's contour, and noise."""
    seconds = np.arange(round(SECONDS * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    semitones, loudness = contour(factors.motion, course, seconds)
    pitch_hz = PITCH_HZ[factors.shape] * 2.0 ** (semitones / 12)
    turns = np.cumsum(pitch_hz) / SAMPLE_RATE_HZ + generator.random()
    turn = np.exp(2j * np.pi * (turns % 1.0))
    voice, power, reached = np.zeros_like(seconds), np.ones_like(turn), 0
    for number, strength in HARMONICS[factors.shape]:
        # the base pitch decides, not the gliding one: the same harmonics whatever the motion
        if number * PITCH_HZ[factors.shape] > HIGHEST_HZ:
            break
        while reached < number:
            power = power * turn
            reached += 1
        voice += strength * power.imag
    voice *= loudness / np.sqrt(np.mean(voice**2))
    voice *= LOUDEST / np.abs(voice).max()
    noise = (
        generator.normal(size=len(voice))
        * np.sqrt(np.mean(voice**2))
        * 10 ** (-NOISE_BELOW_SIGNAL_DB / 20)
    )
    return np.clip(voice + noise, -1, 1).astype(np.float32)
