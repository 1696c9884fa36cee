"""Retrieval on held-out clips during a run, as ``vatt-fast retrieve`` measures it."""

import os

from ..data.source import Source
from ..evaluation.search import measure, read_folder
from ..model import VATT

# ``PretrainConfig.best_by`` -> the value that decides
BEST_BY = {"text_to_video": "text_to_video_r10", "audio_to_video": "audio_to_video_r10"}
_KINDS = ("text_to_video", "audio_to_video")


def evaluate(
    model: VATT, data: str | os.PathLike | Source, source: Source | None = None
) -> dict[str, float]:
    """text_to_video_r1, ..., audio_to_video_median_rank: those that there are queries for.

    The model's weights and statistics stay what they are.

    Args:
        data: as ``measure``. source: what it opens as, to open it once.

    Raises:
        ValueError: as ``measure``.
    """
    found = measure(model, data, read_folder(model, source or data))
    return {
        f"{kind}_{name}": float(value)
        for kind in _KINDS
        for name, value in found.get(kind, {}).items()
        if name != "queries"
    }
