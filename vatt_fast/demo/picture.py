"""The pictures of a clip of the rendered world."""

import numpy as np

from .scene import COLOURS, FRAMES_PER_SECOND, SECONDS, SIDE, Course, Factors, position

TINTS = {"plain": (0, 0, 0), "striped": (0, 0, 28), "checkered": (0, 22, 0), "dotted": (28, 0, 0)}

# tells the shapes apart at the scale of a patch
RELATIVE_SIZE = {
    "circle": 0.6,
    "star": 0.75,
    "triangle": 0.95,
    "square": 1.05,
    "cross": 1.3,
    "ring": 1.4,
}


def _outline(shape: str, x: np.ndarray, y: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Distance in pixels to the shape's edge, negative inside; x and y count from its middle."""
    if shape == "circle":
        return np.hypot(x, y) - size
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88 * size
    if shape == "triangle":
        slant = np.sqrt(3) / 2
        return np.maximum(np.maximum(y, slant * x - y / 2), -slant * x - y / 2) - 0.66 * size
    if shape == "star":
        outer, inner, step = 1.35, 0.55, np.pi / 5
        # every edge is folded onto the one right of the upper tip
        angle = np.abs((np.arctan2(x, -y) + step) % (2 * step) - step)
        along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
        edge = np.array([inner * np.cos(step) - outer, inner * np.sin(step)])
        normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
        return along * normal[0] + across * normal[1] - outer * normal[0] * size
    if shape == "cross":
        long, short = 1.15 * size, 0.38 * size
        x, y = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(x - long, y - short), np.maximum(x - short, y - long))
    return np.abs(np.hypot(x, y) - 0.85 * size) - 0.3 * size


def _background(background: str, generator: np.random.Generator) -> np.ndarray:
    """(SIDE, SIDE, 3) float: two dark greys, slightly tinted, in a pattern at a random place."""
    rows, columns = np.mgrid[:SIDE, :SIDE] + generator.integers(0, 16, 2)[:, None, None]
    if generator.random() < 0.5:
        rows, columns = columns, rows
    if background == "plain":
        light = np.full((SIDE, SIDE), 0.5)
    elif background == "striped":
        light = (rows // 8 % 2).astype(float)
    elif background == "checkered":
        light = ((rows // 8 + columns // 8) % 2).astype(float)
    else:
        light = (np.hypot(rows % 16 - 7.5, columns % 16 - 7.5) < 4.5).astype(float)
    grey = generator.uniform(15, 30) + 35 * light
    return grey[..., None] + TINTS[background] + generator.uniform(-6, 6, 3)


def render_frames(factors: Factors, course: Course, generator: np.random.Generator) -> np.ndarray:
    """(T, SIDE, SIDE, 3) uint8: the whole clip's pictures, with smooth edges."""
    seconds = np.arange(round(SECONDS * FRAMES_PER_SECOND)) / FRAMES_PER_SECOND
    x, y, size = (
        values[:, None, None].astype(np.float32)
        for values in position(factors.motion, course, seconds)
    )
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    half = SIDE / 2
    across, down = (columns - x + half) % SIDE - half, (rows - y + half) % SIDE - half
    size = size * np.float32(RELATIVE_SIZE[factors.shape])
    cover = np.clip(0.5 - _outline(factors.shape, across, down, size), 0, 1)[..., None]
    colour = (np.array(COLOURS[factors.colour]) + generator.uniform(-8, 8, 3)).astype(np.float32)
    ground = _background(factors.background, generator).astype(np.float32)
    return np.clip(ground + cover * (colour - ground) + 0.5, 0, 255).astype(np.uint8)
