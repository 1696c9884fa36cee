"""Pictures as a viewer shows them: upright, not mirrored, without what transparency hides.

Shapes: H rows, W columns.
"""

import math
import os
import struct
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from .media_bytes import open_bytes, place_of
from .source import Place

# A part of a picture as it is shown: top, left, height and width as fractions of it, or a function
# of its height and width in pixels that gives them. None is the middle, of the output's shape.
Rectangle = tuple[float, float, float, float]
Box = Rectangle | Callable[[int, int], Rectangle | None] | None

# transparent parts show a page's white
PAGE = 255
# Quarter turns counterclockwise after a flip of the columns, by EXIF's orientation.
_ORIENTATIONS = {
    1: (False, 0),
    2: (True, 0),
    3: (False, 2),
    4: (True, 2),
    5: (True, 1),
    6: (False, 3),
    7: (True, 3),
    8: (False, 1),
}
_EXIF_ORIENTATION = 0x0112


def covering_box(
    rows: int, columns: int, height: int, width: int, aspect: float = 1.0
) -> Rectangle:
    """The largest centred part (left, top, right, bottom) of a picture with an output's shape.

    Args:
        rows, columns: of the picture.
        height, width: of the output.
        aspect: width of one of the picture's pixels over its height.
    """
    scale = max(height / rows, width / (columns * aspect))
    tall, wide = min(rows, height / scale), min(columns, width / (scale * aspect))
    left, top = (columns - wide) / 2, (rows - tall) / 2
    return left, top, left + wide, top + tall


def checked_box(box: Box, height: int, width: int) -> Rectangle | None:
    """The box of a picture that is shown with this height and width.

    Raises:
        ValueError: a box that is no part of the picture.
    """
    chosen = box(height, width) if callable(box) else box
    if chosen is None:
        return None
    top, left, tall, wide = map(float, chosen)
    slack = 1e-6  # of fractions that were added up
    if not (
        min(top, left) >= -slack
        and min(tall, wide) > 0
        and top + tall <= 1 + slack
        and left + wide <= 1 + slack
    ):
        raise ValueError(
            f"box is {top:g}, {left:g}, {tall:g}, {wide:g}; it must be a top, left, height and "
            "width within the picture, as fractions of it"
        )
    return top, left, tall, wide


def stored_part(box: Rectangle | None, flip: bool, turns: int) -> Rectangle | None:
    """A part of a picture as it is shown, in fractions of the picture as it is stored.

    ``flip`` and ``turns`` as ``oriented`` takes them, which is undone here.
    """
    if box is None:
        return None
    top, left, tall, wide = box
    for _ in range(turns % 4):  # a quarter turn clockwise
        top, left, tall, wide = left, 1 - top - tall, wide, tall
    return top, (1 - left - wide if flip else left), tall, wide


def part_of(
    part: Rectangle | None,
    rows: int,
    columns: int,
    height: int,
    width: int,
    aspect: float = 1.0,
) -> Rectangle:
    """A part as (left, top, right, bottom) in pixels. None is ``covering_box``, of whose sizes."""
    if part is None:
        return covering_box(rows, columns, height, width, aspect)
    top, left, tall, wide = part
    top, left = max(top, 0.0) * rows, max(left, 0.0) * columns
    return left, top, min(left + wide * columns, columns), min(top + tall * rows, rows)


def oriented(picture: np.ndarray, flip: bool, turns: int) -> np.ndarray:
    """(H, W, 3), its columns flipped, then turned counterclockwise by quarters."""
    return np.rot90(picture[:, ::-1] if flip else picture, turns)


def orientation_of_matrix(matrix: np.ndarray) -> tuple[bool, int]:
    """The flip and the quarter turns of a display matrix (9,) of a video's header.

    Its first four numbers map (x, y), y downwards, to (a x + c y, b x + d y).
    """
    a, b, _, c, d = (int(value) for value in matrix[:5])
    flip = a * d - b * c < 0
    if flip:  # the columns are flipped first, so x counts from the other side
        a, b = -a, -b
    return flip, round(math.atan2(-b, a) / (math.pi / 2)) % 4


def over_page(picture: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 with alpha, laid over the page: (H, W, 3)."""
    alpha = picture[..., 3:].astype(np.uint16)
    mixed = picture[..., :3] * alpha + PAGE * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def read_picture(
    path: str | os.PathLike | Place, height: int, width: int, box: Box = None
) -> np.ndarray:
    """A picture file (H, W, 3) uint8, scaled to cover the size and cropped to its centre.

    JPEG is decoded at a fraction of its size where that suffices. Of an animated file it is the
    first picture.

    Args:
        box: the part to scale instead, whatever its shape.

    Raises:
        ValueError: a file that holds no picture, or a damaged or absurdly large one.
    """

    def scaled(image: Any) -> np.ndarray:
        flip, turns = _ORIENTATIONS.get(_orientation(image), (False, 0))
        rows, columns = (width, height) if turns % 2 else (height, width)
        shown = (image.width, image.height) if turns % 2 else (image.height, image.width)
        part = stored_part(checked_box(box, *shown), flip, turns)
        _, _, tall, wide = part or (0, 0, 1, 1)
        image.draft("RGB", (math.ceil(columns / wide), math.ceil(rows / tall)))
        image.load()
        pixels = part_of(part, image.height, image.width, rows, columns)
        return oriented(_resized(image, columns, rows, pixels), flip, turns)

    return _with_picture(path, scaled)


def picture_size(path: str | os.PathLike | Place) -> tuple[int, int]:
    """The rows and columns of a picture file as it is shown. It raises as ``read_picture``."""

    def size(image: Any) -> tuple[int, int]:
        _, turns = _ORIENTATIONS.get(_orientation(image), (False, 0))
        return (image.width, image.height) if turns % 2 else (image.height, image.width)

    return _with_picture(path, size)


def is_picture(path: str | os.PathLike | Place) -> bool:
    """Whether a file begins like a picture. Raises ValueError for an absurdly large one."""
    from PIL import UnidentifiedImageError

    try:
        return _with_picture(path, lambda image: image.width > 0 and image.height > 0)
    except ValueError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            return False
        raise


def _with_picture(path: str | os.PathLike | Place, use: Callable[[Any], Any]) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "pictures need Pillow, which is not installed: pip install vatt_fast[data]"
        ) from error
    try:
        with warnings.catch_warnings():
            # it warns of half the size that it refuses
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # of damaged EXIF
            with open_bytes(place_of(path)) as file, Image.open(file) as image:
                return use(image)
    except (
        OSError,  # Pillow's own error for damaged content
        ValueError,
        ArithmeticError,
        MemoryError,
        LookupError,
        SyntaxError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _orientation(image: Any) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    # damaged EXIF is no reason to lose a picture
    except (OSError, ValueError, TypeError, LookupError, SyntaxError, struct.error):
        return 1


def _resized(image: Any, columns: int, rows: int, box: Rectangle) -> np.ndarray:
    """A part of an image, opaque, (rows, columns, 3). Only the part is copied."""
    if image.mode not in ("L", "RGB") or "transparency" in image.info:
        # whole pixels around the box, so that only they are converted
        left, top = math.floor(box[0]), math.floor(box[1])
        right, bottom = math.ceil(box[2]), math.ceil(box[3])
        # the crop stands at its own corner
        box = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
        image = _in_eight_bits(image.crop((left, top, right, bottom)))
    resized = image.resize((columns, rows), resample=2, box=box)  # 2: bilinear, of all pixels
    if image.mode == "RGBA":
        return over_page(np.asarray(resized))
    return np.asarray(resized.convert("RGB"))


def _in_eight_bits(image: Any) -> Any:
    """An image of any mode as RGB, or RGBA where it is transparent somewhere."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # grey of 16 bits
        values = np.clip(np.asarray(image), 0, 65535).astype(np.uint16) >> 8
        return Image.fromarray(values.astype(np.uint8))
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")
