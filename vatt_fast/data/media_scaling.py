"""A part of a decoded picture, scaled, in RGB, through FFmpeg's scaler.

Shapes: H rows, W columns of the output.
"""

import functools
import math
from typing import Any

import numpy as np

from .media_scan import import_av
from .pictures import over_page

# Pictures whose colours have half the resolution of their light, as in nearly all videos. They are
# scaled as they are, then converted: from scaled sizes FFmpeg converts four times as fast as while
# it scales.
_HALF_COLOURS = "yuv422p"
_FAST = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv420p10le", "yuv422p10le")
# the part that is cut out begins at a multiple of it, where planes of every kind have a pixel
_UNIT = 4


class Scaler:
    """One file's scaler. It keeps its tables as long as sizes and parts stay."""

    def __init__(self) -> None:
        reformatter = import_av().video.reformatter.VideoReformatter
        self._scale, self._convert = reformatter(), reformatter()
        self._part, self._rows = _Cutter(), _Cutter()

    def scaled(
        self, frame: Any, part: tuple[float, float, float, float], height: int, width: int
    ) -> np.ndarray:
        """The part (left, top, right, bottom) of a frame, (H, W, 3) uint8, over a white page.

        What lies around it takes no time. Sizes are even to half a pixel of the output.
        """
        picture_format = "rgba" if may_be_transparent(frame.format.name) else "rgb24"
        (left, right), (columns, first_column) = _span(part[0], part[2], frame.width, width)
        (top, bottom), (rows, first_row) = _span(part[1], part[3], frame.height, height)
        if (left, top, right, bottom) != (0, 0, frame.width, frame.height):
            frame = self._cut_out(frame, left, top, right, bottom)
        if frame.format.name in _FAST and (rows, columns) != (frame.height, frame.width):
            frame = self._reformat(self._scale, frame, _HALF_COLOURS, columns, rows)
            if rows % 2:  # of which FFmpeg converts a pixel six to twelve times as slowly
                frame = self._rows.cut(frame, 0, first_row, columns, first_row + height)
                rows, first_row = height, 0
        frame = self._reformat(self._convert, frame, picture_format, columns, rows)
        inner = slice(first_row, first_row + height), slice(first_column, first_column + width)
        if picture_format == "rgb24":
            return _values(frame.planes[0], 3).reshape(rows, -1, 3)[inner]
        picture = _values(frame.planes[0], 4).reshape(rows, -1, 4)[inner]
        # a picture that hides everything is one whose fourth channel means nothing
        return over_page(picture) if picture[..., 3].any() else picture[..., :3]

    def _reformat(self, by: Any, frame: Any, name: str, columns: int, rows: int) -> Any:
        colours = int(frame.color_range)
        return by.reformat(
            frame,
            columns,
            rows,
            name,
            interpolation="BILINEAR",
            src_color_range=colours,
            dst_color_range=colours if name == _HALF_COLOURS else "JPEG",  # RGB is of full range
            threads=1,
        )

    def _cut_out(self, frame: Any, left: int, top: int, right: int, bottom: int) -> Any:
        """A frame of whole pixels of another; in RGB where its pixels cannot be copied."""
        name = frame.format.name
        if _planes(name) is None or frame.planes[0].line_size < 0:
            picture_format = "rgba" if may_be_transparent(name) else "rgb24"
            whole = self._reformat(self._convert, frame, picture_format, frame.width, frame.height)
            part = np.ascontiguousarray(whole.to_ndarray()[top:bottom, left:right])
            return import_av().VideoFrame.from_ndarray(part, format=picture_format)
        return self._part.cut(frame, left, top, right, bottom)


class _Cutter:
    """Copies parts of frames to a frame that is used again while their size stays."""

    def __init__(self) -> None:
        self._cut: Any = None
        self._targets: list[np.ndarray] = []  # its planes

    def cut(self, frame: Any, left: int, top: int, right: int, bottom: int) -> Any:
        """Whole pixels of a frame; ``left`` and ``top`` are where each plane has a pixel."""
        name, size = frame.format.name, (right - left, bottom - top)
        bytes_a_pixel = _planes(name)
        assert bytes_a_pixel is not None
        cut = self._cut
        if cut is None or (cut.width, cut.height) != size or cut.format.name != name:
            cut = self._cut = import_av().VideoFrame(*size, name)
            self._targets = [_values(*each) for each in zip(cut.planes, bytes_a_pixel, strict=True)]
        cut.colorspace, cut.color_range = frame.colorspace, frame.color_range
        for plane, wide, target in zip(frame.planes, bytes_a_pixel, self._targets, strict=True):
            x = left // -(-frame.width // plane.width) * wide
            y = top // -(-frame.height // plane.height)
            target[:] = _values(plane, wide)[y : y + target.shape[0], x : x + target.shape[1]]
        return cut


@functools.lru_cache
def _span(
    begin: float, end: float, size: int, output: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Along one axis: the whole pixels to scale, to what length, and where the output begins in it.

    Args:
        begin, end: the part that fills the output, in pixels; less than a pixel counts as one.
        size: pixels of the picture. output: pixels of the output.
    """
    middle = (begin + end) / 2
    length = min(max(end - begin, 1.0), size)
    begin = min(max(middle - length / 2, 0.0), size - length)
    first = math.floor(begin + 1e-6) // _UNIT * _UNIT
    last = min(-(-math.ceil(begin + length - 1e-6) // _UNIT) * _UNIT, size)
    scale = output / length
    scaled = max(round((last - first) * scale), output)
    return (first, last), (scaled, min(round((begin - first) * scale), scaled - output))


def _values(plane: Any, bytes_a_pixel: int) -> np.ndarray:
    """(rows, bytes) of one of a frame's planes, without the padding; it may be written to."""
    values = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    return values[:, : plane.width * bytes_a_pixel]


@functools.cache
def _planes(name: str) -> tuple[int, ...] | None:
    """Bytes of a pixel of each plane; None for formats whose pixels share bytes."""
    described = import_av().VideoFormat(name)
    alone = described.is_planar or len(described.components) == 1
    if not alone or described.has_palette or described.is_bit_stream:
        return None
    sizes: dict[int, int] = {}
    for part in described.components:
        sizes[part.plane] = sizes.get(part.plane, 0) + (1 if part.bits <= 8 else 2)
    return tuple(sizes[plane] for plane in sorted(sizes))


@functools.cache
def may_be_transparent(pixel_format: str) -> bool:
    described = import_av().VideoFormat(pixel_format)
    return described.has_palette or any(part.is_alpha for part in described.components)
