"""Retrieval on held-out clips during a run, as ``vatt-fast retrieve`` measures it."""

import os

from ..data.folder import folder_captions
from ..evaluation.search import measure, read_folder
from ..model import VATT

# ``PretrainConfig.best_by`` -> the value that decides
BEST_BY = {"text_to_video": "text_to_video_r10", "audio_to_video": "audio_to_video_r10"}
_KINDS = ("text_to_video", "audio_to_video")


def require_held_out_clips(folder: str | os.PathLike) -> None:
    """Raises ValueError where ``folder`` holds no media, or captions that cannot be read."""
    folder_captions(folder)


def evaluate(model: VATT, folder: str | os.PathLike) -> dict[str, float]:
    """text_to_video_r1, ..., audio_to_video_median_rank: those that the folder has queries for.

    The model's weights and statistics stay what they are.

    Raises:
        ValueError: as ``measure``.
    """
    found = measure(model, folder, read_folder(model, folder))
    return {
        f"{kind}_{name}": float(value)
        for kind in _KINDS
        for name, value in found.get(kind, {}).items()
        if name != "queries"
    }
