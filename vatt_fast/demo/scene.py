"""What a clip of the rendered world shows, and how it moves.

Picture and sound share the motion's course, so they stay in step.
"""

from dataclasses import dataclass

import numpy as np

SIDE = 64  # pixels; space wraps around at this length
SECONDS = 3.2
FRAMES_PER_SECOND = 10

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# all brighter than any background: an edge means the same in every colour
COLOURS = {
    "red": (255, 70, 60),
    "green": (70, 220, 90),
    "blue": (90, 130, 255),
    "yellow": (250, 230, 60),
    "purple": (225, 95, 250),
    "cyan": (70, 230, 235),
}
MOTIONS = ("left", "right", "up", "down", "grow", "shrink", "orbit", "bounce")
BACKGROUNDS = ("plain", "striped", "checkered", "dotted")
FACTORS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "motion": MOTIONS,
    "background": BACKGROUNDS,
}


@dataclass(frozen=True)
class Factors:
    """What a clip shows. Raises ValueError for values that the world does not have."""

    shape: str
    colour: str
    motion: str
    background: str

    def __post_init__(self) -> None:
        for name, values in FACTORS.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it is one of {', '.join(values)}"
                )


# -- motion ----------------------------------------------------------------------------------------

# Seconds of one round. Steady motions cross 3 to 5 pixels a frame. Every round fits, or nearly
# fits, into a window of 1.6 s.
PERIOD_SECONDS = {
    **dict.fromkeys(("left", "right", "up", "down", "orbit"), (1.2, 2.0)),
    **dict.fromkeys(("grow", "shrink"), (0.9, 1.5)),
    "bounce": (0.7, 1.1),
}
ORBIT_RADIUS = (12.0, 16.0)
BOUNCE_HEIGHT = (24.0, 32.0)
SIZE = (12.5, 13.5)  # half the width of a shape, before its RELATIVE_SIZE (picture.py)
GROWTH = (0.55, 1.4)  # factors between which the size of a growing shape runs
GLIDE_SEMITONES = 3.5  # either way; less than half the distance between two shapes' pitches
QUIET = 0.2  # the softest loudness, the loudest being 1


@dataclass(frozen=True)
class Course:
    """The random part of one clip's motion."""

    period_seconds: float
    phase: float
    x: float
    y: float
    size: float
    reach: float  # pixels: radius of the orbit or height of the bounce
    turn: int  # sense of the orbit

    @classmethod
    def draw(cls, motion: str, generator: np.random.Generator) -> "Course":
        reach = {"orbit": ORBIT_RADIUS, "bounce": BOUNCE_HEIGHT}.get(motion, (0.0, 0.0))
        return cls(
            period_seconds=generator.uniform(*PERIOD_SECONDS[motion]),
            phase=generator.random(),
            x=generator.uniform(0, SIDE),
            y=generator.uniform(0, SIDE),
            size=generator.uniform(*SIZE),
            reach=generator.uniform(*reach),
            turn=int(generator.choice([-1, 1])),
        )

    def at(self, seconds: np.ndarray) -> np.ndarray:
        """How far each time is into its round, 0 to 1."""
        return (seconds / self.period_seconds + self.phase) % 1.0


def position(
    motion: str, course: Course, seconds: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y and size at each time; y points down, and neither is wrapped around yet."""
    part = course.at(seconds)
    still = np.zeros_like(part)
    x, y, size = course.x + still, course.y + still, course.size + still
    low, high = GROWTH
    if motion == "left":
        x -= SIDE * part
    elif motion == "right":
        x += SIDE * part
    elif motion == "up":
        y -= SIDE * part
    elif motion == "down":
        y += SIDE * part
    elif motion == "grow":
        size *= low * (high / low) ** part
    elif motion == "shrink":
        size *= high * (low / high) ** part
    elif motion == "orbit":
        x += course.reach * np.cos(2 * np.pi * part)
        y += course.turn * course.reach * np.sin(2 * np.pi * part)
    else:
        y -= course.reach * np.sin(np.pi * part)
    return x, y, size


def contour(motion: str, course: Course, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pitch offset in semitones and loudness (QUIET to 1) at each time.

    Each motion has its own pair of curves.
    """
    part = course.at(seconds)
    level = np.zeros_like(part)
    rising = GLIDE_SEMITONES * (2 * part - 1)
    swelling = QUIET + (1 - QUIET) * part
    fading = QUIET + (1 - QUIET) * (1 - part)
    if motion == "left":
        return level, fading
    if motion == "right":
        return level, swelling
    if motion == "up":
        return rising, level + 1
    if motion == "down":
        return -rising, level + 1
    if motion == "grow":
        return -rising, swelling
    if motion == "shrink":
        return rising, fading
    if motion == "orbit":
        turning = 2 * np.pi * part
        swaying = 0.5 + 0.5 * np.cos(turning)
        return GLIDE_SEMITONES * np.sin(turning), QUIET + (1 - QUIET) * swaying
    thump = np.exp(-5 * part)  # on the floor
    return GLIDE_SEMITONES * (2 * np.sin(np.pi * part) - 1), QUIET + (1 - QUIET) * thump
